"""The Llama model: layers, attention, loss, parallelism, and Hugging Face weights in and out."""
