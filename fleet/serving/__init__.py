"""A fleet on Ray Serve: one deployment for replicas, one actor for the registry. Needs ``ray``."""
