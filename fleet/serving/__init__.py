"""A fleet on Ray Serve: Ray started, one deployment, one actor for the registry. Needs ``ray``."""
