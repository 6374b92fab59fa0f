"""An answer's text taken apart: reasoning, what is said, and calls of tools, as they grow."""
