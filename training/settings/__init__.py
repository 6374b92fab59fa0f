"""The settings of a training run, and the values that are filled in."""
