"""The cost of serving a run's adapter, measured with the server's own reader.

The adapter is attached to a base whose weights take no memory, saved with all of its own weights
set to one, and lowered to the operators that the server computes. The cost is the size of these
operators, and the products that they add per token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from turret.server.adapters.adapter import TENSORS_FILE, AdapterFacts
from turret.server.adapters.base import BaseModel, BaseModule, BaseVocabulary
from turret.server.adapters.checkpoint.adapter_root import AdapterRoot
from turret.server.adapters.checkpoint.reader import read_checkpoint
from turret.server.adapters.methods.lower import lower_checkpoint
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.models.describe import describe_experts
from turret.training.base_model import DTYPES, TrainingBase, empty_model
from turret.training.engine import attach_to
from turret.training.settings.resolve import Resolved

_ANY_RANK = 1 << 30
_CACHE_DTYPE_BYTES = 2


@dataclass(frozen=True, slots=True)
class ServingCost:
    """The cost of one adapter for a server that computes in bfloat16.

    Attributes:
        file_bytes: Size of ``adapter_model.safetensors``.
        host_bytes: Size of its operators in memory.
        multiply_adds: Multiply-adds that it adds to each token.
        relative_multiply_adds: The same as a share of those of the base's linear modules.
        num_soft_tokens: The number of soft tokens, computed before each prompt that is not in the
            prefix cache.
        num_prefix_positions: The number of prefix positions, to which every token attends. They are
            stored once for all requests.
        cache_bytes: Bytes of the KV cache that these positions take.
    """

    file_bytes: int
    host_bytes: int
    multiply_adds: int
    relative_multiply_adds: float
    num_soft_tokens: int
    num_prefix_positions: int
    cache_bytes: int


def serving_cost(resolved: Resolved) -> ServingCost:
    """Measure an adapter without training it."""
    base, dtype = resolved.base, DTYPES[resolved.config.run.adapter_dtype]
    model = attach_to(empty_model(base, "nf4-dense", torch.float32, "cpu"), resolved)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(torch.ones(parameter.shape)))
    with tempfile.TemporaryDirectory() as folder:
        resolved.method.save(model, Path(folder), dtype)
        root = AdapterRoot(Path(folder))
        checkpoint = read_checkpoint(root, ".", max_elements=_ANY_RANK)
        method, lowered = lower_checkpoint(checkpoint, served_base(base), _ANY_RANK)
        file_bytes = (Path(folder) / TENSORS_FILE).stat().st_size
    return _cost(lowered.operators, lowered.facts(checkpoint, method), base, file_bytes)


def _cost(
    operators: AdapterOperators, facts: AdapterFacts, base: TrainingBase, file_bytes: int
) -> ServingCost:
    arch = base.arch
    positions = facts.num_soft_tokens + facts.num_prefix_positions
    modules = operators.modules.values()
    added = sum(part.multiply_adds for module in modules for part in module.operators)
    per_token = 0 if arch.experts is None else arch.experts.per_token
    for update in (operators.experts or {}).values():
        added += per_token * update.multiply_adds
    # Attention of each token to the adapter's positions: the scores and the weighted sum of values.
    added += positions * 2 * arch.num_heads * arch.head_dim * arch.num_layers
    of_base = sum(
        out * inner
        for number in range(arch.num_layers)
        for name, slices in arch.linears().items()
        if arch.has(number, name)
        for _, out, inner in slices
    )
    if arch.experts is not None:
        of_token = per_token * sum(out * inner for _, out, inner in arch.expert_linears().values())
        of_base += len(arch.experts.layers) * of_token
    per_position = arch.num_layers * 2 * arch.num_kv_heads * arch.head_dim
    return ServingCost(
        file_bytes=file_bytes,
        host_bytes=facts.bytes_host,
        multiply_adds=added,
        relative_multiply_adds=added / of_base,
        num_soft_tokens=facts.num_soft_tokens,
        num_prefix_positions=facts.num_prefix_positions,
        cache_bytes=positions * per_position * _CACHE_DTYPE_BYTES,
    )


def served_base(base: TrainingBase) -> BaseModel:
    """The base in the form that the server's reader needs, with all weights set to one."""
    arch = base.arch
    modules = {}
    for number in range(arch.num_layers):
        for projection, slices in arch.linears().items():
            if not arch.has(number, projection):
                continue
            for path, out, inner in slices:
                name = f"model.layers.{number}.{path}"
                modules[name] = BaseModule(
                    name=name,
                    in_features=inner,
                    out_features=out,
                    bias=torch.zeros(out),
                    dequantize=lambda out=out, inner=inner: torch.ones(out, inner),
                )
    shapes = arch.expert_linears()

    def ones(number: int, projection: str) -> Callable[[int], torch.Tensor]:
        _, out, inner = shapes[projection]
        return lambda expert: torch.ones(out, inner)

    tokens = torch.ones(1, arch.hidden_size).expand(arch.vocab_size, -1)
    return BaseModel(
        name=base.source.name,
        model_type=arch.model_type,
        digest=base.source.digest,
        dtype=torch.bfloat16,
        modules=modules,
        other_modules=frozenset(),
        experts=describe_experts(arch, ones),
        vocabulary=BaseVocabulary(tokens, tokens, arch.tie_word_embeddings),
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
    )
