"""Methods that learn what stands before the prompt: soft tokens, or keys and values."""
