"""Methods whose update has few parameters but a high rank: products of factors, entries."""
