"""The adapters of the running steps, as the torch, cpu and gpu paths compute with them."""
