"""Weights of the components of gated adapters, between shrink and expand."""
