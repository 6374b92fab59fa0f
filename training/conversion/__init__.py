"""Adapters whose files lack state of the base they were trained on, made into LoRAs on it."""
