"""The `python -m checkpoints` command."""
