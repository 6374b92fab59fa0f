"""What a client may ask about the served model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Identity and sizes of the base model.

    ``dtype`` is that of activations, ``commit`` the hub's, where the model is from there.
    """

    name: str
    model_type: str
    digest: str
    dtype: str
    quantization: str
    vocab_size: int
    max_model_len: int
    num_layers: int
    hidden_size: int
    commit: str = ""
