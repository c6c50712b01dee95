"""Readers of file formats: JSON lines and arrays, CSV and TSV, Arrow, Parquet, compressed files."""
