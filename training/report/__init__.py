"""The page about a run: config, curves, answers before and after."""
