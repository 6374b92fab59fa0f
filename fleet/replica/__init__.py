"""One replica of a fleet: what the registry says made true, what callers want proposed to it."""
