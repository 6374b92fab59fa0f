"""Bindings of the CPU kernels, whose C sources are in ``c``; see ``native.py``."""
