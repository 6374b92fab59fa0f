"""Methods with a low-rank update from shared factors, gated sums or fewer parameters."""
