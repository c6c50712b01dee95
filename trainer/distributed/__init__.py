"""Processes, devices, the mesh of ranks, and deterministic kernels."""
