"""The cpu path: adapters in host memory, and the tables through which C kernels find them."""
