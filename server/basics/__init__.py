"""Helpers that all packages use and that import no package: sizes, names, addresses, files."""
