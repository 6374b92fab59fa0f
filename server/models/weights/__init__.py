"""The ways in which projections store their weights and multiply by them."""
