"""What a fleet has on the machine that started it: a folder, an ingress, what Ray prints there."""
