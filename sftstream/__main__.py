"""`python -m sftstream`."""

from sftstream.cli.main import main

main()
