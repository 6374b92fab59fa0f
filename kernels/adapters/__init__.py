"""What adapters add to a projection: the formulas, their torch forms, and a step's segments."""
