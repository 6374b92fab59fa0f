"""Conversion of Python values to messages, and of messages to values."""
