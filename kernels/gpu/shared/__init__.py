"""What several kernels are made of, and how they are launched."""
