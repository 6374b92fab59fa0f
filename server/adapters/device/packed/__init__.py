"""Low-rank updates side by side in wide matrices, and the store of the torch path."""
