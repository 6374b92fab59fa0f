"""How projections store their weights and multiply by them."""
