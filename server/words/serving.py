"""What the server, its model, its engine and its disk cannot do."""

TEXTS: dict[str, str] = {}
