"""Decides which request is next and what each step computes. No torch."""
