"""The sources of a base model: a directory, the hub, a GGUF file, a package."""
