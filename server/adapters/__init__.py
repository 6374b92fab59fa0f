"""Adapters: the nouns that all rooms share, and a room for each thing done with them."""
