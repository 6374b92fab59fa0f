"""The adapters of the running steps, where they compute: torch, compiled C, Triton."""
