"""Methods that learn vectors: scales of channels, biases, rows of the vocabulary."""
