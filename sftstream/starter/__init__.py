"""Write a first config for data that was looked at."""
