"""Adapters: the types that all subpackages share, and one subpackage for each task."""
