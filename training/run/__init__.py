"""The directory of a run and what is written to it."""
