"""`python -m checkpoints`."""

from checkpoints.cli import main

main()
