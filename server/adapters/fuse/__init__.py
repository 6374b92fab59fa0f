"""Several adapters become one LoRA."""
