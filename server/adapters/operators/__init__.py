"""What adapters do to the base: an operator per file, with formula, dense form and cost."""
