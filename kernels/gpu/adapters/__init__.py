"""What adapters add to a projection, for the rows of a step at once."""
