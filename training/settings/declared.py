"""The methods that can be trained: their keys in the config, with their defaults.

This file does not need torch, so that a config can be checked before torch is loaded.
``training/methods`` has the rest of each method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Declared(NamedTuple):
    """A method's peak learning rate, and the keys of ``MethodConfig`` that it reads.

    Attributes:
        learning_rate: The rate if the config sets none.
        defaults: The default of each key, in the order in which keys are filled in. None means
            that the method computes the value from earlier keys, or that the key may stay unset.
    """

    learning_rate: float
    defaults: Mapping[str, Any]


_ALL = {"targets": ("all-linear",)}
_FACTORS = {**_ALL, "rank": 8, "dropout": 0.0}
DECLARED: Mapping[str, Declared] = {
    "lora": Declared(1e-3, {**_FACTORS, "alpha": None}),
    # The scale falls with the square root of the rank; at rank 16 it is LoRA's default.
    "rslora": Declared(1e-3, {**_FACTORS, "alpha": 8.0}),
    "dora": Declared(1e-3, {**_FACTORS, "alpha": None}),
    # aLoRA affects fewer tokens than LoRA; a higher rank compensates for that.
    "alora": Declared(1e-3, {**_FACTORS, "rank": 32, "alpha": None, "invocation": None}),
    "miss": Declared(1e-3, {**_FACTORS, "rank": 16}),
    "oft": Declared(1e-3, {**_FACTORS, "rank": 16}),
    "hra": Declared(5e-3, {**_ALL, "rank": 8}),
    # PEFT's example uses 1e-3 for the vector bank and 1e-2 for the logits; here all have one rate.
    "vblora": Declared(1e-2, {**_FACTORS, "rank": 4}),
    "shira": Declared(1e-3, {**_ALL, "rank": 8}),
    "loha": Declared(2e-3, {**_FACTORS, "rank": None, "alpha": None}),
    "lokr": Declared(
        2e-3, {**_FACTORS, "alpha": None, "decompose_both": False, "decompose_factor": -1}
    ),
    # The paper adapts keys, values and the feed-forward layers.
    "ia3": Declared(1e-2, {"targets": ("k_proj", "v_proj", "down_proj")}),
    "prefix_tuning": Declared(
        1e-3, {"num_virtual_tokens": 16, "prefix_projection": True, "encoder_hidden_size": None}
    ),
    "prompt_tuning": Declared(3e-2, {"num_virtual_tokens": 16, "init_text": None}),
    "p_tuning": Declared(
        1e-3, {"num_virtual_tokens": 16, "encoder_hidden_size": None, "dropout": 0.0}
    ),
    "learned_fusion": Declared(3e-3, {"components": None, "d_k": 8, "guidance": 1.0}),
}
METHOD_NAMES = tuple(DECLARED)
