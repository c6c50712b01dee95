"""Metrics files, TensorBoard curves, and terminal output."""
