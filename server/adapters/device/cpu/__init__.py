"""The cpu path: adapters where they lie in memory, and the tables that tell C kernels of them."""
