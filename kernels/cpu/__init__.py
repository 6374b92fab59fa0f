"""Bindings of the CPU kernels, which `c` holds in C; see `native.py`."""
