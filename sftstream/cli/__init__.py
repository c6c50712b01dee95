"""The `sftstream` command."""
