"""Methods with a low-rank update made of less, or of others: shared factors, gated sums."""
