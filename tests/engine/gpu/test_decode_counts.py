"""The cost of a decode step for the host and the device's queue: launches, copies, memory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from builders.facts import Resident, resident
from builders.operators import everywhere
from counted_steps import (
    ARCH,
    HIDDEN,
    META,
    NUM_LAYERS,
    ROWS,
    VOCAB,
    Capture,
    Counting,
    Decoding,
    gated,
    listed_launches,
    lora,
    low_rank,
    make_executor,
    norm,
    vocabulary,
)

from turret.server.engine.step.gpu_executor import DecodeGraphs, GpuExecutor, Outputs, warm_up

# Launches of a step of 32 layers, including sampling. These limits may only decrease.
MAX_LAUNCHES = {
    **{"base": 237, "lora": 429},
}
MAX_GATED_LAUNCHES = 685
MAX_COPIES = 1
MAX_HOST_CALLS = 1_250


@pytest.fixture
def launched() -> Iterator[list[str]]:
    with listed_launches() as names:
        yield names


def _adapters(kind: str) -> list[Resident]:
    return {
        "base": [],
        "lora": [lora("a0"), lora("a1")],
    }[kind]


@pytest.mark.parametrize("kind", MAX_LAUNCHES)
def test_a_decode_step_has_few_launches_and_copies(kind: str, launched: list[str]):
    capture = Capture(launched)
    adapters = _adapters(kind)
    executor, decoding = make_executor(capture), Decoding(adapters)
    executor.sampler(frozenset())
    with torch.no_grad():
        for _ in range(2):
            decoding.run(executor)
        assert capture.num_captures == 1
        assert len(capture.launches) <= MAX_LAUNCHES[kind], sorted(set(capture.launches))
        assert "sample_rows_kernel" in capture.launches
        launched.clear()
        epoch = executor._epoch()
        for _ in range(20):
            with Counting() as counting:
                decoding.run(executor)
            assert counting.copies <= MAX_COPIES
            assert counting.memory == []
            assert counting.waits == []
            assert [*counting.launches, *launched] == [], "alongside the captured step"
    assert capture.num_captures == 1
    assert executor._epoch() == epoch
    assert executor._prepared is not None


def test_launches_do_not_grow_with_the_number_of_gated_adapters(launched: list[str]):
    """Fusions, and LoRA alongside them, share one graph, without a launch per adapter."""
    capture = Capture(launched)
    executor = make_executor(capture)
    executor.sampler(frozenset())
    fusions = [gated(f"{n}", 2 + n, 16 * (n + 1)) for n in range(3)]
    plain = lora("lora")
    with torch.no_grad():
        executor.store.prepare(fusions)
        for _ in range(2):
            Decoding(fusions[:1]).run(executor)
        assert capture.num_captures == 1
        assert len(capture.launches) <= MAX_GATED_LAUNCHES, sorted(set(capture.launches))
        for kernel in ("gate_shrink_kernel", "fusion_gate_kernel", "segmented_expand_kernel"):
            assert capture.launches.count(kernel) == 4 * NUM_LAYERS
        epoch = executor._epoch()
        for adapters in (fusions[:2], fusions, [plain, fusions[1]]):
            Decoding(adapters).run(executor)
        # A later adapter needs no separate graph either.
        Decoding([gated("late", 7, 48)]).run(executor)
        # Adapters without gates use the same graph, with empty tables of gates.
        for _ in range(2):
            Decoding([plain]).run(executor)
        assert capture.num_captures == 1
    assert executor._epoch() == epoch


def test_layers_stay_captured_beside_other_embeddings_and_heads(launched: list[str]):
    """The head and the embedding are computed by torch, around the replayed launches."""
    capture = Capture(launched)
    executor = make_executor(capture)
    executor.sampler(frozenset())
    first, second = vocabulary("0"), vocabulary("1", head=low_rank)
    late = [vocabulary("2", head=low_rank), vocabulary("3")]
    with torch.no_grad():
        for adapters in ([second], [first, second], late, [second, *late, lora("lora")]):
            Decoding(adapters).run(executor)
        assert capture.num_captures == 1
        assert len(capture.launches) <= MAX_LAUNCHES["lora"]
        launched.clear()
        with Counting() as counting:
            Decoding([first]).run(executor)
        assert launched == ["sample_rows_kernel"], "drawn once more"
        assert counting.waits == []
    assert capture.num_captures == 1


def test_operators_without_a_kernel_are_not_captured(launched: list[str]):
    capture = Capture(launched)
    executor = make_executor(capture)
    executor.sampler(frozenset())
    with torch.no_grad():
        for _ in range(3):
            Decoding([lora("lora"), resident("norms", everywhere(ARCH, norm, "qkv"))]).run(executor)
        assert capture.num_captures == 0
        for _ in range(3):
            Decoding([lora("lora")]).run(executor)
    assert capture.num_captures == 1


def test_after_startup_common_steps_are_neither_compiled_nor_captured(launched: list[str]):
    capture = Capture(launched)
    executor = make_executor(capture, rows=4)
    executor.sampler(frozenset())
    told: list[tuple[str, int, int]] = []
    warm_up(executor, lambda *report: told.append(report))
    forms = len(executor.forms())
    assert capture.num_captures == forms == 4 * 3
    assert told[0] == ("Compiling", 0, len(executor.packed_forms()))
    assert told[-1] == ("Capturing decode steps", forms, forms)
    epoch = executor._epoch()
    everywhere = [lora("all"), lora("attention", "qkv", "o"), lora("qkv", "qkv")]
    with torch.no_grad():
        for adapters in ([], everywhere, everywhere[1:], everywhere[2:], everywhere[::2]):
            for rows in (1, 3, 4):
                decoding = Decoding(adapters, rows)
                launched.clear()
                # The work of the store for new adapters.
                executor.store.prepare(adapters)
                # The first step transfers all block numbers, which a prompt's step would have
                # transferred.
                decoding.run(executor)
                with Counting() as counting:
                    decoding.run(executor)
                assert [*counting.launches, *launched] == []
    assert capture.num_captures == forms
    assert executor._epoch() == epoch


def test_startup_continues_if_a_capture_runs_out_of_memory(launched: list[str]):
    executor = make_executor(Capture(launched), rows=2)
    with patch.object(GpuExecutor, "capture", side_effect=torch.OutOfMemoryError("full")):
        warm_up(executor, lambda *_: None)
    with torch.no_grad():
        Decoding(rows=2).run(executor)


def test_every_kind_of_event_is_counted():
    """Provoke each event that the limits above count."""
    host, device = torch.ones(4), torch.empty(4, device=META)
    with Counting() as counting:
        device.copy_(host, non_blocking=True)
        counted = device + 1
        device.view(2, 2)[0].add_(1)
        torch.empty(3, device=META)
        with contextlib.suppress(RuntimeError, NotImplementedError):
            host.copy_(device)
    assert counted.shape == (4,)
    assert counting.waits == ["copy_"]
    assert (counting.copies, counting.launches) == (1, ["add", "add_"])
    assert counting.memory == ["add", "empty"]


def test_host_calls_before_the_first_launch_are_limited(launched: list[str]):
    """Calls are counted, because times depend on other users of the machine's caches."""
    executor, decoding = make_executor(Capture(launched)), Decoding([lora("a")])
    executor.sampler(frozenset())
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    def replay(graphs: Any, epoch: Any, key: Any, body: Any) -> Outputs:
        sys.setprofile(None)
        return _outputs()

    with torch.inference_mode(), patch.object(DecodeGraphs, "run", replay):
        for _ in range(20):
            step = decoding.step()
            calls = 0
            sys.setprofile(count)
            try:
                executor.run(step)
            finally:
                sys.setprofile(None)
            executor.look_ahead()
            decoding.advance()
    assert 100 <= calls <= MAX_HOST_CALLS


def _outputs() -> Outputs:
    return torch.empty(ROWS, HIDDEN, device=META), torch.empty(ROWS, VOCAB, device=META)
