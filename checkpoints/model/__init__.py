"""Write the model of a step as a Hugging Face directory, alone or with the frozen model."""
