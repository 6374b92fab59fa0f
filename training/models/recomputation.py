"""``run.gradient_checkpointing``: activations that the backward pass computes again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def compute_activations_twice(model: Any) -> None:
    """Have a transformers model keep the activations of no layer."""
    # The name of late 5.x versions, and the one that they deprecate.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


@contextmanager
def without_backward(model: Any) -> Iterator[None]:
    """For passes within the block that no backward pass follows, in evaluation mode.

    PEFT prepares every pass of an aLoRA whose layers say that they are computed twice for a
    backward pass, and refuses the next one until that has come.
    """
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    model.eval()
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
