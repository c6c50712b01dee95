"""Run state in and out of a checkpoint, and when checkpoints are written."""
