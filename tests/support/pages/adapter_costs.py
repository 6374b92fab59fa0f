"""The cost of each method per token in one module, counted on its operators.

PEFT writes an adapter of its default size for one linear module, and the server lowers it to
operators. The cost is the number of bytes that a row reads, and the number of products that it
needs. No time is measured.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from builders.adapters import base_of, make_qalora, read_adapter
from builders.method_kinds import KINDS
from builders.methods import quiet, save_adapter
from transformers import LlamaConfig, LlamaForCausalLM

from turret.server.adapters.base import BaseModel
from turret.server.adapters.methods import METHODS
from turret.server.adapters.methods.lower import lower_checkpoint

INNER, OUT = 1024, 2048
_MODULE = "model.layers.0.mlp.up_proj"
_TARGETS: dict[str, Any] = {"target_modules": ["up_proj"]}
_BFLOAT16_BYTES = 2
# Bytes per weight: four bits, a byte per 64 weights, and a float32 per 256 of these bytes.
_NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
RANK = 16

# Methods without operators in a module: they have positions, keys and values, or rows of tokens.
# The cost of learned fusions, Arrow and X-LoRA depends on their members and scores.
ELSEWHERE = frozenset(
    {"prefix_tuning", "prompt_tuning", "p_tuning", "cpt", "multitask_prompt", "cartridge"}
    | {"adaption_prompt", "trainable_tokens", "learned_fusion", "arrow", "xlora"}
)
# Methods with updates as large as the weight, which can be counted without lowering.
DENSE = frozenset({"fourierft", "randlora", "osf", "frod"})
# Required keys of configs, in addition to PEFT's defaults.
_REQUIRED: Mapping[str, Mapping[str, Any]] = {
    "dora": {"use_dora": True},
    "alora": {"alora_invocation_tokens": [7]},
    "bd_lora": {"use_bdlora": KINDS["bd_lora"][1]["use_bdlora"]},
    "kasa": {"kasa_config": KINDS["kasa"][1]["kasa_config"]},
    "adalora": {
        "total_step": 10,
        "rank_pattern": {f"{_MODULE}.lora_E": [True] * 8 + [False] * 4},
    },
    "ia3": {"feedforward_modules": []},
    "ln_tuning": {"target_modules": ["post_attention_layernorm"]},
    "vera": {"projection_prng_key": 3},
    "pvera": {"projection_prng_key": 3},
    "poly": {"n_tasks": 2},
}
# The keys for a method's size, if that is not a rank.
_SIZES = {
    "adalora": "target_r",
    "oft": "oft_block_size",
    "boft": "boft_block_size",
    "c3a": "block_size",
    "road": "group_size",
    "waveft": "n_frequency",
    "supertuning": "sparsity",
    "fourierft": "n_frequency",
}
_QALORA_GROUP = 16


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one token in one module.

    Attributes:
        size: The size by PEFT's default, as in the config.
        num_bytes: The bytes of the operators in bf16, which a row reads if it has them alone.
        multiply_adds: The number of multiply-adds.
    """

    size: str
    num_bytes: int
    multiply_adds: int


def module_costs(names: Iterable[str]) -> dict[str, Cost]:
    """The cost of each method that is not in ``ELSEWHERE``, and of LoRA at rank 16 (``""``)."""
    model = _one_layer()
    base = base_of(model, dtype=torch.bfloat16)
    found = {"": _lowered(model, base, "lora", {"r": RANK})}
    for name in names:
        if name in DENSE:
            entries = INNER * OUT
            found[name] = Cost("any", _BFLOAT16_BYTES * entries, entries)
        else:
            found[name] = _lowered(model, base, name, {})
    return found


def cost_cells(names: Iterable[str]) -> dict[str, str]:
    """The cells of the page's table for each method: its size, and two multiples of a LoRA's."""
    costs = module_costs(names)
    unit = costs.pop("")
    return {name: _cells(cost, unit) for name, cost in costs.items()}


def render_costs() -> str:
    """The page's table: the base and all methods by their bytes; equal methods share a row."""
    costs = module_costs(sorted(METHODS.keys() - ELSEWHERE))
    unit = costs.pop("")
    entries = INNER * OUT
    rows = {_cells(Cost("", round(_NF4_BYTES * entries), entries), unit): ["the base, NF4"]}
    for name, cost in sorted(costs.items(), key=lambda item: (item[1].num_bytes, item[0])):
        rows.setdefault(_cells(cost, unit), []).append(f"`{name}`")
    lines = ["| method | size | bytes | products |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {', '.join(names)} {cells}" for cells, names in rows.items())])


def _cells(cost: Cost, unit: Cost) -> str:
    shares = (cost.num_bytes / unit.num_bytes, cost.multiply_adds / unit.multiply_adds)
    read, needed = (f"{share:.2g}" if share < 100 else f"{share:.0f}" for share in shares)
    return f"| {cost.size} | {read} | {needed} |"


def _one_layer() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=INNER,
        intermediate_size=OUT,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return LlamaForCausalLM(config).eval()


def _lowered(
    model: LlamaForCausalLM, base: BaseModel, name: str, changes: Mapping[str, Any]
) -> Cost:
    kind = "lora" if name == "qalora" else name
    needed = {**_TARGETS, **_REQUIRED.get(name, {}), **changes}
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        config = KINDS[kind][0](task_type="CAUSAL_LM", **copy.deepcopy(needed))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, config, Path(folder) / "a", share=True)
        if name == "qalora":
            make_qalora(Path(folder) / "a", _QALORA_GROUP)
        checkpoint = read_adapter(Path(folder), max_elements=1 << 30)
        if name == "poly":
            checkpoint = checkpoint.of_task(0)
        method, lowered = lower_checkpoint(checkpoint, base)
    assert method == name, (method, name)
    # A norm's gain applies to the modules after it; use one of them.
    operators = lowered.operators.modules[_MODULE]
    key = _SIZES.get(name, "r")
    size = f"`{key}` {getattr(config, key)}" if hasattr(config, key) else ""
    needed = sum(part.multiply_adds for part in operators.operators)
    return Cost(size, operators.num_bytes, needed)
