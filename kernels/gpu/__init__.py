"""The Triton kernels, and the tables they read."""
