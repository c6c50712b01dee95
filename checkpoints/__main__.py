"""`python -m checkpoints`."""

from checkpoints.cli.main import main

main()
