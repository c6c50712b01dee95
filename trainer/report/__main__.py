"""Run the command `python -m trainer.report`."""

from trainer.report.main import main

main()
