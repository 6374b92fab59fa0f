"""Decides what each step computes and who is next: requests, sequences, blocks. No torch."""
