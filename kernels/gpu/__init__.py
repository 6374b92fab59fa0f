"""The Triton kernels, and the tables that they read."""
