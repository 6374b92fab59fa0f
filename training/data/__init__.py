"""From a data file to batches: examples, tokens, rows."""
