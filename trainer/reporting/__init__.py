"""Metrics files, TensorBoard curves, messages and terminal output."""
