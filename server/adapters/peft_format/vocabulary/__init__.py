"""Tokens that an adapter trains or adds: rows of the embedding and the head."""
