"""Methods whose update is made of the base's own weight: turned, scaled, or partly replaced."""
