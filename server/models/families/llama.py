"""Llama, and models that are saved as Llama: SmolLM, SmolLM2, TinyLlama."""

from __future__ import annotations

from turret.server.models.family import Family, read_decoder

FAMILY = Family({"llama": read_decoder})
