"""Methods whose update is built from the base's weight: rotated, scaled or partly replaced."""
