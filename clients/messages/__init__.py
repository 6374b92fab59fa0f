"""From plain Python values to messages, and from messages back to values."""
