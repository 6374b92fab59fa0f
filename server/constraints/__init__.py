"""Constraints on answers: read, compiled by llguidance, and followed token by token."""
