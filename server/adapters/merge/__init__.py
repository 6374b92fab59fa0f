"""A mix becomes part of the base, and is taken out again."""
