"""Adapters: the nouns that all rooms share, and one room for each thing done with them."""
