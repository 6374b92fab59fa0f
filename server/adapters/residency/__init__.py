"""Which adapters are in host memory, and who waits for them."""
