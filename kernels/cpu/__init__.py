"""CPU formulations in C, with their bindings; see ``native.py``."""
