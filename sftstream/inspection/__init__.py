"""Read a stored data state, and tell its content in figures and in words."""
