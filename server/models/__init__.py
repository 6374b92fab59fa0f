"""The base model: architecture, NF4 weights, decoder, KV cache."""
