"""Computes a scheduled step: rows, batch, compute path and sampler."""
