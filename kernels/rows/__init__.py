"""Rows on a CPU whose bits do not depend on the batch: the torch formulations, and their trials."""
