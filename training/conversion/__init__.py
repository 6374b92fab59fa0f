"""Converts adapters into LoRAs if their files lack state that only the base can supply."""
