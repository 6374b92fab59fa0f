"""The engine: the waiting line, the step, and the thread that owns the device."""
