"""The decoder: its architecture as data, its layers on every path, the KV cache."""
