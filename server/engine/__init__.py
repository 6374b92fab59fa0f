"""The engine: the queue, the step, and the thread that owns the device."""
