"""Helpers for all packages, such as sizes, names, addresses and files.

They import no other package of the server.
"""
