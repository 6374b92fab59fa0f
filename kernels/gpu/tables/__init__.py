"""What differs between two steps of a shape, in device buffers of fixed address."""
