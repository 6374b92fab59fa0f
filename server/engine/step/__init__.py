"""From a scheduled step to the tokens drawn: rows, batch, compute path, sampler."""
