"""Why an adapter is not served: its method, its base, its size, its files."""
