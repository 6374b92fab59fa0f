"""Where a base model may come from: a directory, the hub, a GGUF file, a package."""
