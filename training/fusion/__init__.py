"""Learned fusion in training: frozen components, a gate per module, its loss."""
