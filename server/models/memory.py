"""The memory that a base model, its KV cache and adapters on it take, from its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from turret.server.models.decoding import ROUTER, Arch
from turret.server.models.fidelity import kind_of

# Bytes of a 16-bit number.
_WIDE = 2
# NF4 with blocks of 64: four bits, and an 8-bit scale per block, whose own scales are in fp32 for
# blocks of 256.
_NF4 = 0.5 + (1 + 4 / 256) / 64


@dataclass(frozen=True, slots=True)
class Memory:
    """Sizes in bytes.

    Attributes:
        base: The weights as they are served.
        base_wide: The weights in 16 bits, as they are kept if no kernel reads their codes.
        kv_per_token: Keys and values of a token in all layers.
        adapter_per_rank: A LoRA of rank 1 on all linear modules, in 16 bits; without experts.
    """

    base: int
    base_wide: int
    kv_per_token: int
    adapter_per_rank: int


def memory_of(arch: Arch, weights: Mapping[str, Mapping[str, int]] | None = None) -> Memory:
    """The memory of a model with this architecture, except norms and biases, which are small.

    Args:
        arch: The architecture.
        weights: ``Fidelity.storage`` of the linear modules; by default all are in NF4.
    """
    quantized = wide = rank = 0
    for layer in range(arch.num_layers):
        for name, slices in arch.linears().items():
            if not arch.has(layer, name):
                continue
            for _, out, inner in slices:
                rank += out + inner
                if name == ROUTER:
                    wide += out * inner
                else:
                    quantized += out * inner
        if arch.experts is not None and arch.has(layer, ROUTER):
            each = sum(out * inner for _, out, inner in arch.expert_linears().values())
            quantized += arch.experts.count * each
    sizes = _sizes(arch)
    for kind, counts in (weights or {}).items():
        kept = counts.get("16-bit", 0) * sizes.get(kind, 0)
        quantized, wide = quantized - kept, wide + kept
    wide += arch.vocab_size * arch.hidden_size * (1 if arch.tie_word_embeddings else 2)
    return Memory(
        base=round(quantized * _NF4) + wide * _WIDE,
        base_wide=(quantized + wide) * _WIDE,
        kv_per_token=2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * _WIDE,
        adapter_per_rank=rank * _WIDE,
    )


def _sizes(arch: Arch) -> dict[str, int]:
    """The number of weights of a module of each kind."""
    sizes = {
        kind_of(path): out * inner
        for slices in arch.linears().values()
        for path, out, inner in slices
    }
    if arch.experts is not None:
        for projection, (_, out, inner) in arch.expert_linears().items():
            names = arch.experts.modules[projection]
            for name in names:
                sizes[kind_of(f".experts.{name.format(0)}")] = out // len(names) * inner
    return sizes
