"""Faults of kernels."""

from __future__ import annotations


class Fault(Exception):
    """A kernel broke a rule of the machine."""
