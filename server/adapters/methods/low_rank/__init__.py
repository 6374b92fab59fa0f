"""Methods that make a low-rank update of something smaller: shared, banked or blocked factors."""
