"""What is wrong with an adapter, or with what is asked of one."""

TEXTS: dict[str, str] = {}
