"""Gated adapters (learned fusions, Arrow, X-LoRA) on the gpu path."""
