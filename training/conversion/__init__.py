"""Converts adapters whose files lack state of their base into LoRAs."""
