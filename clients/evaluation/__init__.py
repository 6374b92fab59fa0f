"""Evaluates adapters on a test set, through a running server."""
