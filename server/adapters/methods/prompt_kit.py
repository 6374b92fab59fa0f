"""Declarations for methods that learn positions before the prompt.

Their files contain ``prompt_embeddings`` with one row per virtual token. A row is an embedding
(``SoftTokens``), or keys and values (``KeysAndValues``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from turret.lazy_torch import torch
from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint import PROMPT_EMBEDDINGS
from turret.server.adapters.lowering import Lowered, Start, finish
from turret.server.adapters.operators.soft_prompt import PrefixKv, SoftPrompt
from turret.server.adapters.peft_format.config_rules import (
    START,
    Irrelevant,
    Rules,
    Used,
    fault_of_choice,
    fault_of_head_to_save,
    fault_of_modules_to_save,
    fault_of_rank,
    optional,
)
from turret.server.adapters.peft_format.reading import Base, FileFormat, Reading
from turret.server.words import say

_SIZES: Rules = {
    "num_virtual_tokens": Used(fault_of_rank),
    "token_dim": Used(fault_of_rank),
    # PEFT uses two submodules for a model with encoder and decoder, which turret does not serve.
    "num_transformer_submodules": Used(fault_of_choice(1, None)),
}
# Keys of PEFT's configs for a text with whose embeddings training starts.
WITH_TEXT = dict.fromkeys(("tokenizer_name_or_path", "tokenizer_kwargs"), START)
_INDEPENDENT = "soft tokens do not depend on it"
# Computes the shapes of tensors other than the prompt from the config.
Shapes = Callable[[Mapping[str, Any]], Mapping[str, tuple[int, ...]]]


def _no_more(config: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    return {}


def _plain(tensors: Mapping[str, torch.Tensor], task: int) -> torch.Tensor:
    return tensors[PROMPT_EMBEDDINGS]


@dataclass(frozen=True, kw_only=True)
class SoftTokens(FileFormat):
    """A method that learns embeddings, ``[num_virtual_tokens, hidden]``.

    Attributes:
        more_tensors: The shapes of tensors other than the prompt.
        prompt: Makes the prompt of a task from the tensors.
        start: How a server trains the method from scratch; None if the server cannot.
    """

    more_tensors: Shapes = _no_more
    prompt: Callable[[Mapping[str, torch.Tensor], int], torch.Tensor] = _plain
    start: Start | None = None

    @property
    def common(self) -> Rules:
        """The rules for keys of sizes, for ``modules_to_save`` and for keys of prefixes only."""
        return {
            **_SIZES,
            "modules_to_save": Used(fault_of_head_to_save),
            "num_attention_heads": Irrelevant(_INDEPENDENT),
            "num_layers": Irrelevant(_INDEPENDENT),
        }

    @property
    def needed(self) -> tuple[str, ...]:
        """The required keys: those of the size, and the method's own."""
        return ("num_virtual_tokens", "token_dim", *self.required)

    def inspect(self, reading: Reading) -> None:
        """See ``FileFormat.inspect``."""
        config, findings = reading.config, reading.findings
        for name, served in self._sizes_of(reading.base).items():
            value = config.get(name)
            # The config rules report wrong types.
            if isinstance(value, int) and value != served:
                findings.mismatch(name, say("DIFFERS_FROM_BASE", value=value, expected=served))
        if findings.fields & {*self.needed}:
            return
        shape = config["num_virtual_tokens"], self._width(reading)
        shapes = {PROMPT_EMBEDDINGS: shape, **self.more_tensors(config)}
        tensors = reading.checkpoint.tensors
        for name in tensors:
            if name not in shapes:
                findings.add(name, say("UNKNOWN_TENSOR"))
        for name, shape in shapes.items():
            if name not in tensors:
                findings.add(name, say("MISSING_TENSOR", by="the config"))
            else:
                findings.check_shape(name, tensors[name], shape, of_base=False)

    def lower(self, reading: Reading) -> Lowered:
        """See ``LinearMethod.lower``."""
        stored = self.prompt(reading.checkpoint.tensors, reading.task).to(reading.dtype)
        return finish(reading, prompt=self._soft_prompt(stored, reading.model))

    def _sizes_of(self, base: Base) -> Mapping[str, int]:
        """The values that this base requires for some config keys."""
        return {"token_dim": base.hidden_size}

    def _width(self, reading: Reading) -> int:
        return reading.config["token_dim"]

    def _soft_prompt(self, stored: torch.Tensor, base: BaseModel) -> SoftPrompt:
        return SoftPrompt(soft_tokens=stored.contiguous())


@dataclass(frozen=True, kw_only=True)
class KeysAndValues(SoftTokens):
    """A method that learns keys and values, ``[num_virtual_tokens, layers · 2 · token_dim]``.

    PEFT saves them layer by layer, key before value. The keys take the place of rotated keys, so
    they are not rotated again.
    """

    @property
    def common(self) -> Rules:
        """The rules for keys of sizes, and for ``modules_to_save``."""
        counts = dict.fromkeys(("num_layers", "num_attention_heads"), Used(optional(fault_of_rank)))
        return {**_SIZES, **counts, "modules_to_save": Used(fault_of_modules_to_save)}

    def _sizes_of(self, base: Base) -> Mapping[str, int]:
        sizes = {"num_layers": base.num_layers, "token_dim": base.kv_width}
        if isinstance(base, BaseModel):
            sizes["num_attention_heads"] = base.num_kv_heads
        return sizes

    def _width(self, reading: Reading) -> int:
        # Use the base's number of layers, unless a size is already known to differ from the base's.
        config, is_other = reading.config, reading.findings.mismatched
        layers = config.get("num_layers") if is_other else reading.base.num_layers
        return 2 * (layers or 0) * config["token_dim"]

    def _soft_prompt(self, stored: torch.Tensor, base: BaseModel) -> SoftPrompt:
        shaped = stored.view(-1, base.num_layers, 2, base.num_kv_heads, base.head_dim)
        keys, values = shaped.permute(2, 1, 0, 3, 4)
        return SoftPrompt(prefix=PrefixKv(keys.contiguous(), values.contiguous()))
