"""Helpers for all packages, which import no other package: sizes, names, addresses, files."""
