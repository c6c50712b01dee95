"""Reports of runs: read a run's files, summarize them in one record, and draw a page."""
