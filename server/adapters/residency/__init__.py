"""Adapters in host memory, and the requests that wait for them."""
