"""An adapter's two files: hashed, checked, turned into tensors, and not yet understood."""
