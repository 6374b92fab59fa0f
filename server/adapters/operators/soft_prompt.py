"""Soft tokens, or keys and values, that an adapter puts before the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from turret.lazy_torch import torch
from turret.server.adapters.operators import Tensors


@dataclass(frozen=True, slots=True)
class PrefixKv(Tensors):
    """Keys and values before position 0 of the text (prefix tuning, arXiv 2101.00190).

    Attributes:
        keys: ``[layers, positions, kv_heads, head_dim]``; used unchanged, not rotated.
        values: Same shape.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def num_positions(self) -> int:
        return self.keys.shape[1]


@dataclass(frozen=True, slots=True)
class SoftPrompt(Tensors):
    """Soft tokens or a prefix; exactly one of the two is set.

    Attributes:
        soft_tokens: Embeddings, ``[positions, hidden]`` (prompt tuning, arXiv 2104.08691; p-tuning,
            arXiv 2103.10385), which the model processes like those of tokens.
        prefix: Keys and values.
    """

    soft_tokens: torch.Tensor | None = None
    prefix: PrefixKv | None = None

    @property
    def num_positions(self) -> int:
        if self.prefix is not None:
            return self.prefix.num_positions
        assert self.soft_tokens is not None
        return self.soft_tokens.shape[0]


def soft_prompt_of(mix: Any) -> SoftPrompt:
    """The soft prompt of a resident mix that has one (a mix holds at most one)."""
    found = [
        adapter.operators.soft_prompt
        for adapter, _ in mix.members
        if adapter.num_soft_tokens or adapter.num_prefix_positions
    ]
    assert len(found) == 1
    return found[0]
