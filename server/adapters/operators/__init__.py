"""What an adapter does to the base: an operator a file, with its formula, dense form and cost."""
