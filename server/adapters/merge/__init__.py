"""Merges a mix into the base, and restores the base."""
