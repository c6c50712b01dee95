"""Run the command `python -m trainer.track`."""

from trainer.track.main import main

main()
