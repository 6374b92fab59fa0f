"""``turret model repair``: an adapter that approximates a model's quantisation error."""
