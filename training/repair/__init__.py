"""``turret model repair``: an adapter that approximates what quantisation took from a model."""
