"""Reads an adapter's files: hashed, checked, turned into tensors, but not interpreted."""
