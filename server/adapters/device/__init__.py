"""The adapters of the running steps, where they compute: on the torch, cpu or gpu path."""
