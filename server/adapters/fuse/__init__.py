"""Combines several adapters into one LoRA."""
