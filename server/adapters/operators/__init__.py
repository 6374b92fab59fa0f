"""The operators of adapters, one per file, each with its formula, dense form and cost."""
