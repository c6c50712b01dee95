"""`python -m checkpoints`."""

from checkpoints.cli import app

app(prog_name="python -m checkpoints")
