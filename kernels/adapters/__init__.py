"""Segments and gates: definitions that adapter kernels share with the code that prepares steps."""
