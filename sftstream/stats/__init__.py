"""Measure all rows of a config: lengths, trained share, fill, mixture, refusals, duplicates."""
