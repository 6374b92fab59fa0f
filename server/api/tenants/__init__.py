"""What every protocol for training shares: models, their commands, checkpoints, and limits."""
