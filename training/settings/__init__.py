"""The settings of a training run, and the values chosen for settings that are left out."""
