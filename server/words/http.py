"""What only the HTTP API refuses."""

TEXTS: dict[str, str] = {}
