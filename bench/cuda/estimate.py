"""The expected time of a kernel or a step, from its bytes, instructions and launches.

The estimate is printed beside every measured row, so that the first minutes on a card show where it
is wrong. The scarcest of four resources determines the time of a kernel: memory bandwidth,
instruction issue, passes through the load-store units, and tensor-core operations. Instructions and
passes are those of the machine code (``kernels/registers.json``). The model ignores latency,
caches, and programs that end unevenly.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_REGISTERS = Path(__file__).resolve().parents[2] / "kernels" / "registers.json"
# The assumed gap between two kernels of a CUDA graph; a separate benchmark row measures it.
LAUNCH_MS = 1.2e-3
# Passes over a row of logits: for rows that keep all tokens, and approximately for rows with top-k
# or top-p.
UNFILTERED_PASSES, FILTERED_PASSES = 3, 17
_LANES = 32
_SCHEDULERS = 4


@dataclass(frozen=True, slots=True)
class Card:
    """The specification of a GPU.

    Attributes:
        gb_s: The memory bandwidth, in 10⁹ bytes per second.
        tflops: The dense bf16 tensor-core operations, in 10¹² per second.
        sms: The number of streaming multiprocessors.
        ghz: The boost clock.
        target: The compilation target, as in ``registers.json``.
    """

    gb_s: float
    tflops: float
    sms: int
    ghz: float
    target: str


# Keyed by words of torch.cuda.get_device_name; the first entry whose words are all in the name
# applies. Sources: NVIDIA's data sheets and architecture white papers (H100: "H100 Tensor Core GPU
# Architecture", 2022; RTX 4090: "Ada GPU Architecture", 2022; RTX 3090: "Ampere GA102", 2020;
# all others: data sheets).
CARDS: dict[tuple[str, ...], Card] = {
    ("B200",): Card(8000, 2250, 148, 1.965, "sm_90"),
    ("GH200",): Card(4000, 989, 132, 1.755, "sm_90"),
    ("H200",): Card(4800, 989, 132, 1.755, "sm_90"),
    ("H100", "PCIe"): Card(2000, 756, 114, 1.755, "sm_90"),
    ("H100", "NVL"): Card(3900, 835, 132, 1.755, "sm_90"),
    ("H100",): Card(3350, 989, 132, 1.755, "sm_90"),
    ("A100", "40GB"): Card(1555, 312, 108, 1.41, "sm_80"),
    ("A100",): Card(2039, 312, 108, 1.41, "sm_80"),
    ("A10G",): Card(600, 70, 80, 1.71, "sm_80"),
    ("A10",): Card(600, 125, 72, 1.695, "sm_80"),
    ("L40S",): Card(864, 362, 142, 2.52, "sm_80"),
    ("L40",): Card(864, 181, 142, 2.49, "sm_80"),
    ("L4",): Card(300, 121, 58, 2.04, "sm_80"),
    ("PRO", "6000"): Card(1792, 252, 188, 2.6, "sm_80"),
    ("5090",): Card(1792, 209, 170, 2.41, "sm_80"),
    ("4090",): Card(1008, 165, 128, 2.52, "sm_80"),
    ("3090",): Card(936, 71, 82, 1.695, "sm_80"),
}


def card_of(name: str) -> Card | None:
    """The card with a device's name, or None if it is unknown."""
    for words, card in CARDS.items():
        if all(word in name for word in words):
            return card
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work of a kernel.

    Attributes:
        num_bytes: The number of bytes that are read from and written to memory.
        instructions: The number of instructions that threads execute.
        wavefronts: Lanes times passes through the load-store units.
        flops: The number of tensor-core operations.
        launches: The number of kernel launches.
    """

    num_bytes: float = 0
    instructions: float = 0
    wavefronts: float = 0
    flops: float = 0
    launches: int = 1

    def kernel_ms(self, card: Card) -> float:
        """The time by the scarcest resource, without launches."""
        lanes = card.sms * _LANES * card.ghz * 1e9
        return 1e3 * max(
            self.num_bytes / (card.gb_s * 1e9),
            self.instructions / (_SCHEDULERS * lanes),
            self.wavefronts / lanes,
            self.flops / (card.tflops * 1e12),
        )

    def floor_ms(self, card: Card) -> float:
        """The time by bytes alone."""
        return self.num_bytes / card.gb_s / 1e6


# Computes the work that a measured row should need on a given card.
Expected = Callable[[Card], list[Work]]


def expected_ms(works: list[Work], card: Card) -> float:
    """The expected time of kernels that run one after the other."""
    return sum(work.kernel_ms(card) + work.launches * LAUNCH_MS for work in works)


def facts(expected_of: Expected, card: Card | None, measured_ms: float) -> dict[str, float]:
    """The columns printed beside a measured row; empty for an unknown card."""
    if card is None:
        return {}
    works = expected_of(card)
    expected = expected_ms(works, card)
    return {
        "expected_ms": expected,
        "over_expected": measured_ms / expected,
        "floor_ms": sum(work.floor_ms(card) for work in works),
    }


@functools.cache
def _kernels() -> dict[str, Any]:
    versions = json.loads(_REGISTERS.read_text(encoding="utf-8"))
    newest = max(versions, key=lambda version: [int(part) for part in version.split(".")])
    return versions[newest]


def cost(kernel: str, target: str, *forms: str) -> tuple[float, float]:
    """Instructions and wavefronts per unit of work, for the most expensive form with all ``forms``.

    Raises:
        ValueError: The table has no such form.
    """
    found = [
        targets[target]
        for name, targets in _kernels().items()
        if name.startswith(f"{kernel}[") and all(form in name for form in forms)
    ]
    if not found:
        raise ValueError(f"no {kernel} with {forms} in {_REGISTERS.name}")
    return max(row["instructions"] for row in found), max(row["wavefronts"] for row in found)


def bytes_work(num_bytes: float, launches: int = 1) -> Expected:
    """The work of a kernel that does little except read and write."""
    return lambda card: [Work(num_bytes=num_bytes, launches=launches)]


def product_work(rows: int, inner: int, outputs: int) -> Work:
    """The work of a library's product of 16-bit numbers."""
    num_bytes = 2 * (rows * inner + inner * outputs + rows * outputs)
    return Work(num_bytes=num_bytes, flops=2 * rows * inner * outputs)


def written_out_work(outputs: int, inner: int, rows: int) -> list[Work]:
    """The work of writing out a weight once, and of a library's product with it."""
    weights = outputs * inner
    return [Work(num_bytes=weights * (0.5 + 4 / 64 + 2)), product_work(rows, inner, outputs)]


def nf4_work(outputs: int, inner: int, rows: int, card: Card) -> list[Work]:
    """The work of ``nf4_matmul``, with a launch per 64 rows."""
    works, weights = [], outputs * inner
    for start in range(0, rows, 64):
        tiles = -(-min(64, rows - start) // 16)
        tiles = 4 if tiles > 2 else tiles
        instructions, wavefronts = cost("nf4_matmul", card.target, f"TILES={tiles};")
        works.append(
            Work(
                num_bytes=weights * (0.5 + 4 / 64),
                instructions=weights * instructions,
                wavefronts=weights * wavefronts,
                flops=2 * weights * 16 * tiles,
            )
        )
    return works


def attention_work(rows: int, context: int, heads: tuple[int, int, int], card: Card) -> Work:
    """The work of decode attention; ``heads`` is KV heads, queries per KV head and head dim."""
    kv_heads, per_head, head_dim = heads
    size = 16 if per_head <= 16 else 32
    block = max(16, 1 << (head_dim - 1).bit_length())
    forms = (f"BLOCK_M={size};", f"BLOCK_D={block};")
    try:
        instructions, wavefronts = cost("paged_attention", card.target, *forms)
    except ValueError:
        instructions, wavefronts = cost("paged_attention", card.target)
    keys = rows * context * kv_heads
    return Work(
        num_bytes=4 * keys * head_dim,
        instructions=keys * instructions,
        wavefronts=keys * wavefronts,
        flops=4 * keys * size * head_dim,
    )


def low_rank_work(
    inner: int,
    outs: tuple[int, ...],
    rows_of_rank: list[tuple[int, int]],
    card: Card,
) -> list[Work]:
    """The work of shrink and expand of adapters.

    Args:
        inner: The number of inputs.
        outs: The number of outputs of each slice.
        rows_of_rank: The rank and the number of rows of each adapter.
        card: The device.
    """
    works: list[Work] = []
    # A chunk has sixteen ranks of sixteen rows, even if fewer are used.
    tiles = sum(-(-rank // 16) * 16 * -(-rows // 16) for rank, rows in rows_of_rank)
    ranks = sum(rank for rank, _ in rows_of_rank)
    for kernel, per_rank, forms in (
        ("segmented_shrink", len(outs) * inner, ()),
        ("segmented_expand", sum(outs), ("no gain_delta",)),
    ):
        instructions, wavefronts = cost(kernel, card.target, *forms)
        works.append(
            Work(
                num_bytes=2 * ranks * per_rank,
                instructions=tiles * per_rank * instructions,
                wavefronts=tiles * per_rank * wavefronts,
            )
        )
    return works


def hadamard_work(
    inner: int, outs: tuple[int, ...], adapters: int, rank: int, rows: int
) -> list[Work]:
    """The work of both steps of each slice: a launch per step, and split products in the second."""
    features = len(outs) * inner + sum(outs)
    return [
        Work(
            num_bytes=4 * adapters * rank * features,
            flops=4 * rows * rank**2 * features,
            launches=2 * len(outs),
        )
    ]


def kronecker_work(sizes: list[tuple[int, int]], adapters: int) -> list[Work]:
    """The work of one launch per slice, over the elements of its two factors."""
    return [Work(num_bytes=2 * adapters * (small + large)) for small, large in sizes]


def sample_work(rows: int, vocab: int, passes: int, card: Card) -> Work:
    """One program makes a row's passes, and a multiprocessor takes 64 bytes a clock from L2."""
    share = card.sms / min(rows, card.sms)
    return Work(num_bytes=4 * rows * vocab, wavefronts=2 * passes * rows * vocab * share)


def step_work(
    groups: dict[str, tuple[int, tuple[int, ...]]],
    *,
    num_layers: int,
    rows: int,
    context: int,
    heads: tuple[int, int, int],
    vocab: int,
    rows_of_rank: list[tuple[int, int]],
    card: Card,
    others: Callable[[int, tuple[int, ...]], list[Work]] | None = None,
) -> list[Work]:
    """The work of a decode step and of drawing its tokens.

    Args:
        groups: As in ``Model.groups``.
        num_layers: The number of layers.
        rows: The number of sequences.
        context: The number of tokens of each sequence.
        heads: As for ``attention_work``.
        vocab: The number of logits of a row.
        rows_of_rank: The low-rank adapters, as for ``low_rank_work``.
        card: The device.
        others: Returns the work of other adapters on a projection, by its inputs and outputs.
    """
    layer: list[Work] = [attention_work(rows, context, heads, card)]
    hidden = groups["qkv"][0]
    layer += [Work(num_bytes=6 * rows * hidden)] * 2
    for inner, outs in groups.values():
        layer += nf4_work(sum(outs), inner, rows, card)
        if rows_of_rank:
            shrink, expand = low_rank_work(inner, outs, rows_of_rank, card)
            # The shrink needs no launch: it is launched with the base's product.
            layer += [replace(shrink, launches=0), expand]
        if others is not None:
            layer += others(inner, outs)
    if rows_of_rank or others is not None:
        # After an adapted projection, rotation and activation need separate launches.
        layer.append(Work(launches=2))
    head = Work(num_bytes=2 * vocab * hidden + 4 * rows * vocab, flops=2 * vocab * hidden * 64)
    draw = sample_work(rows, vocab, UNFILTERED_PASSES, card)
    return layer * num_layers + [head, draw, Work(launches=5)]
