"""Kernels of the embedding and the head where adapters change them."""
