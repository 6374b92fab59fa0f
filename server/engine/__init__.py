"""The waiting line, the step and the thread that owns the device."""
