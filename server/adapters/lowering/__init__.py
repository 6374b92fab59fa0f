"""Operators in the serving dtype: scaled, rounded once, in one block of memory."""
