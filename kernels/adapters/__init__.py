"""Segments of a step, and gates: what kernels of adapters share with those who prepare a step."""
