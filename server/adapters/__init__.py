"""Adapters: the types that all rooms share, and one room for each task."""
