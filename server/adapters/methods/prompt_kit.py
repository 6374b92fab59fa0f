"""The declaration of methods that learn positions before the prompt.

Their files hold ``prompt_embeddings``, a row for each virtual token: embeddings (``SoftTokens``),
or keys and values (``KeysAndValues``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from turret.lazy_torch import torch
from turret.server.adapters.base import BaseModel, BaseSizes
from turret.server.adapters.checkpoint.adapter_checkpoint import (
    PROMPT_EMBEDDINGS,
    AdapterCheckpoint,
    Findings,
)
from turret.server.adapters.component import FindComponent, find_no_component
from turret.server.adapters.lowering.lowered import Lowered, finish
from turret.server.adapters.methods.kit import is_one_of, is_rank, optional
from turret.server.adapters.operators.soft_prompt import PrefixKv, SoftPrompt
from turret.server.adapters.peft_format.config_rules import (
    Check,
    MethodKeys,
    is_head_to_save,
    is_modules_to_save,
)
from turret.server.adapters.peft_format.refusals import check_task, task_warning
from turret.server.words import say

_SIZES: Mapping[str, Check] = {
    "num_virtual_tokens": is_rank,
    "token_dim": is_rank,
    # PEFT uses two for an encoder and a decoder.
    "num_transformer_submodules": is_one_of(1, None),
}
# Keys that PEFT's configs have for a text from which training starts.
WITH_TEXT = dict.fromkeys(
    ("tokenizer_name_or_path", "tokenizer_kwargs"), "read with prompt_tuning_init_text"
)
# Computes the shapes of tensors other than the prompt from the config.
Shapes = Callable[[Mapping[str, Any]], Mapping[str, tuple[int, ...]]]


def _no_more(config: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    return {}


def _plain(tensors: Mapping[str, torch.Tensor], task: int) -> torch.Tensor:
    return tensors[PROMPT_EMBEDDINGS]


@dataclass(frozen=True, kw_only=True)
class SoftTokens(MethodKeys):
    """A method that learns embeddings, ``[num_virtual_tokens, hidden]``.

    Attributes:
        required: Config keys that must be present in addition to those of the size.
        tasks: The config key of the number of tasks in the files, or None.
        more_tensors: The shapes of tensors beside the prompt.
        prompt: Makes the prompt of a task from the tensors.
    """

    required: tuple[str, ...] = ()
    tasks: str | None = None
    more_tensors: Shapes = _no_more
    prompt: Callable[[Mapping[str, torch.Tensor], int], torch.Tensor] = _plain

    @cached_property
    def rules(self) -> Mapping[str, Any]:
        keys, ignored = self._sizes
        return MethodKeys(
            name=self.name,
            peft_types=self.peft_types,
            keys={**keys, **self.keys},
            ignored={**ignored, **self.ignored},
        ).rules

    @property
    def _sizes(self) -> tuple[Mapping[str, Check], Mapping[str, str]]:
        """The keys that all these methods read, and those that they all ignore."""
        ignored = {
            "num_attention_heads": "only keys and values have heads",
            "num_layers": "soft tokens enter before the first layer",
        }
        return {**_SIZES, "modules_to_save": is_head_to_save}, ignored

    @property
    def integers(self) -> Set[str]:
        return self.more_integers

    def read(
        self,
        checkpoint: AdapterCheckpoint,
        base: BaseModel | BaseSizes,
        max_rank: int | None = None,
    ) -> int:
        """Checks config and tensors, as ``LinearFormat.read`` does.

        Returns:
            The chosen task.
        """
        config, findings = checkpoint.config, Findings(checkpoint.path, base.name)
        self.check_config(config, findings)
        required = ("num_virtual_tokens", "token_dim", *self.required)
        for name in required:
            if name not in config:
                findings.add(name, say("REQUIRED"))
        self._check_base(config, base, findings)
        if not findings.fields & {*required}:
            width = self._width(config, base, findings)
            shapes = {PROMPT_EMBEDDINGS: (config["num_virtual_tokens"], width)}
            _check_tensors(checkpoint, {**shapes, **self.more_tensors(config)}, findings)
        task = 0 if self.tasks is None else check_task(checkpoint, self.tasks, findings)
        findings.raise_if_any()
        return task

    def _check_base(
        self, config: Mapping[str, Any], base: BaseModel | BaseSizes, findings: Findings
    ) -> None:
        width = config.get("token_dim")
        if isinstance(width, int) and width != base.hidden_size:
            why = say("DIFFERS_FROM_BASE", value=width, expected=base.hidden_size)
            findings.mismatch("token_dim", why)

    def _width(
        self, config: Mapping[str, Any], base: BaseModel | BaseSizes, findings: Findings
    ) -> int:
        return config["token_dim"]

    def lower(
        self,
        checkpoint: AdapterCheckpoint,
        base: BaseModel,
        max_rank: int | None = None,
        find_component: FindComponent = find_no_component,
    ) -> Lowered:
        """See ``Lower``."""
        task = self.read(checkpoint, base)
        stored = self.prompt(checkpoint.tensors, task).to(base.dtype)
        warnings = () if self.tasks is None else task_warning(task, checkpoint.config[self.tasks])
        return finish(
            checkpoint,
            base,
            prompt=self._soft_prompt(stored, base),
            warnings=warnings,
            depends_on_base=False,
        )

    def _soft_prompt(self, stored: torch.Tensor, base: BaseModel) -> SoftPrompt:

        return SoftPrompt(soft_tokens=stored.contiguous())


@dataclass(frozen=True, kw_only=True)
class KeysAndValues(SoftTokens):
    """A method that learns keys and values, ``[num_virtual_tokens, layers · 2 · token_dim]``.

    PEFT saves them layer by layer, key before value. The keys are used unchanged in place of
    rotated keys, and are not rotated again.
    """

    @property
    def _sizes(self) -> tuple[Mapping[str, Check], Mapping[str, str]]:
        counts = dict.fromkeys(("num_layers", "num_attention_heads"), optional(is_rank))
        return {**_SIZES, **counts, "modules_to_save": is_modules_to_save}, {}

    def _check_base(
        self, config: Mapping[str, Any], base: BaseModel | BaseSizes, findings: Findings
    ) -> None:
        """The shape of the base's key-value cache against the one the adapter was made for."""
        sizes = {"num_layers": base.num_layers, "token_dim": base.kv_width}
        if isinstance(base, BaseModel):
            sizes["num_attention_heads"] = base.num_kv_heads
        for name, served in sizes.items():
            value = config.get(name)
            # The config rules report wrong types.
            if isinstance(value, int) and value != served:
                findings.mismatch(name, say("DIFFERS_FROM_BASE", value=value, expected=served))

    def _width(
        self, config: Mapping[str, Any], base: BaseModel | BaseSizes, findings: Findings
    ) -> int:
        # Use the base's width, unless the sizes already disagree.
        layers = config.get("num_layers") if findings.mismatched else base.num_layers
        return 2 * (layers or 0) * config["token_dim"]

    def _soft_prompt(self, stored: torch.Tensor, base: BaseModel) -> SoftPrompt:

        shaped = stored.view(-1, base.num_layers, 2, base.num_kv_heads, base.head_dim)
        keys, values = shaped.permute(2, 1, 0, 3, 4)
        return SoftPrompt(prefix=PrefixKv(keys.contiguous(), values.contiguous()))


def _check_tensors(
    checkpoint: AdapterCheckpoint, shapes: Mapping[str, tuple[int, ...]], findings: Findings
) -> None:
    for name in checkpoint.tensors:
        if name not in shapes:
            findings.add(name, say("UNKNOWN_TENSOR"))
    for name, shape in shapes.items():
        tensor = checkpoint.tensors.get(name)
        if tensor is None:
            findings.add(name, say("MISSING_TENSOR", by="the config"))
        else:
            findings.check_shape(name, tensor, shape, of_base=False)
