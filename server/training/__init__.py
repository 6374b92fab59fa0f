"""Trains adapters on the weights that the server serves."""
