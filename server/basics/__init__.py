"""Helpers for any room, which use no other room: sizes, names, addresses, texts."""
