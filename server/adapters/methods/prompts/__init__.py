"""Methods that learn something before the prompt: soft tokens, or keys and values."""
