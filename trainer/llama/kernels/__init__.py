"""Kernels in Triton for GPUs, imported only there: Triton comes with torch for GPUs."""
