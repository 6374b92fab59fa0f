"""The minimum time of a decode step: the time to read its bytes once from memory."""

from __future__ import annotations

import time

import torch

from turret.server.models.decoding import Arch

_NF4_BYTES = 0.5 + 2 / 64  # a code, and its share of the bf16 absmax of a block
_BF16_BYTES = 2
_BANDWIDTH_BYTES = 256 << 20


def read_bandwidth() -> float:
    """The bytes per second that all cores together read from memory; the best of several runs."""
    data = torch.ones(_BANDWIDTH_BYTES // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def step_bytes(
    arch: Arch, *, requests: int, loras: int, rank: int, context: int
) -> dict[str, float]:
    """The bytes of the weights, keys and values in a decode step with ``loras`` LoRAs, by part.

    The head counts in full. Greedy steps on a CPU read half of it (``kernels/likeliest.py``), so
    they may take less than the minimum.
    """
    slices = [entry for group in arch.linears().values() for entry in group]
    weights = arch.num_layers * sum(out * inner for _, out, inner in slices)
    if (experts := arch.experts) is not None:
        # The mean number of experts that the rows choose, if each chooses at random.
        missed = (1.0 - experts.per_token / experts.count) ** requests
        chosen = len(experts.layers) * experts.count * (1.0 - missed)
        weights += chosen * 3 * experts.intermediate_size * arch.hidden_size
    low_rank = arch.num_layers * rank * _BF16_BYTES
    per_token = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * _BF16_BYTES
    return {
        "base matmuls": weights * _NF4_BYTES,
        "adapters": loras * low_rank * sum(out + inner for _, out, inner in slices),
        "attention": requests * context * per_token,
        "head": arch.vocab_size * arch.hidden_size * _BF16_BYTES,
    }
