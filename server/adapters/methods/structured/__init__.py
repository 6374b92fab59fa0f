"""Methods whose update has few parameters but a high rank, such as products or single entries."""
