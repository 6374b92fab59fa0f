"""Which adapters are in host memory, and which requests wait for them."""
