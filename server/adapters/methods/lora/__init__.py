"""LoRA, and its variants that share a checkpoint's keys and factors."""
