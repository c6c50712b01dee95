"""Send the numbers of a run to trackers: MLflow, trackio, Weights & Biases."""
