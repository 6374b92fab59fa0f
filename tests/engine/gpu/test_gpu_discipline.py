"""Guarantees of the GPU path for a step: fixed buffers, and no wait for the device.

The whole step runs on meta tensors without launches. A meta tensor has no values, so reading one
fails, and ``_Copies`` records every copy from the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from builders.facts import Resident, resident
from builders.operators import every_operator
from counted_steps import Capture, gated, meta_decoder
from gpu_path import FakeCapture
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from triton.runtime.interpreter import InterpretedFunction

from turret.kernels.fusion_gate import MAX_COMPONENTS
from turret.kernels.gpu.hadamard import MAX_RANK as MAX_HADAMARD_RANK
from turret.kernels.gpu.kronecker import MAX_IN_M, MAX_RANK
from turret.server.adapters.adapter import Mix
from turret.server.adapters.device import has_kernel
from turret.server.adapters.device.gpu_store import GpuStore
from turret.server.adapters.operators.adapter_operators import AdapterOperators, ModuleOperators
from turret.server.adapters.operators.gate import Gate
from turret.server.adapters.operators.hadamard import Hadamard
from turret.server.adapters.operators.kronecker import Kronecker
from turret.server.engine.scheduling.request import Request
from turret.server.engine.scheduling.sequence import Scheduled, Sequence, Step
from turret.server.engine.step import gpu_executor
from turret.server.engine.step.gpu_executor import GpuExecutor, largest_step, warm_up
from turret.server.models.decoding.gpu_decoder import GpuStep
from turret.server.models.decoding.layer_ops import KvCache
from turret.server.models.describe import describe_projections
from turret.server.models.families import read_arch

META = torch.device("meta")
DTYPE = torch.float16
ARCH = read_arch(
    LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
)
_DECODE = ("decode", "decode, base only", "decode, low rank", "decode, two passes")
STEPS = (*_DECODE, "prompts", "prompts, two passes")
# Operations that make the host wait for a value on the device.
READS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "unique", "unique2"),
    *("equal", "is_nonzero"),
}


def _executor(capture: Any = None, budget: int = 1 << 30) -> GpuExecutor:
    return GpuExecutor(
        meta_decoder(ARCH, biased="qkv"),
        KvCache(ARCH, 64, 16, DTYPE, META),
        GpuStore(describe_projections(ARCH), DTYPE, META, budget),
        max_num_seqs=8,
        max_num_batched_tokens=48,
        capture=capture,
    )


def _adapters() -> dict[str, Resident]:
    found = every_operator(ARCH, DTYPE)
    return {name: resident(name, _with_kernels(operators)) for name, operators in found.items()}


def _with_kernels(operators: AdapterOperators) -> AdapterOperators:
    """Only operators with kernels, because the values of others are read on the host."""
    modules = {
        path: ModuleOperators(*(part for part in ops.operators if has_kernel(part, "gpu")))
        for path, ops in operators.modules.items()
    }
    return dataclasses.replace(operators, modules=modules, attention=None)


def _sequence(
    first_block: int, computed: int, *mix: tuple[Resident, float], prompt: int = 6
) -> Sequence:
    made = Mix(mix)
    request = Request(request_id="r", prompt_token_ids=tuple(range(prompt)))
    virtual = sum(a.num_soft_tokens + a.num_prefix_positions for a, _ in mix)
    padding = 0
    preset = 0
    if any(a.num_prefix_positions for a, _ in mix):
        padding, preset, virtual = 11, 16, 16
    sequence = Sequence(request, made, 0.0, virtual, preset, padding)
    sequence.blocks = list(range(first_block, first_block + 4))
    sequence.num_computed = computed
    if computed >= sequence.prompt_end:
        sequence.tokens += [1] * (computed + 1 - sequence.prompt_end)
    return sequence


def _with_own_first_pass(operators: AdapterOperators) -> AdapterOperators:
    assert operators.router is not None
    router = dataclasses.replace(operators.router, first_pass=(0.5, 0.0, 0.25))
    return dataclasses.replace(operators, router=router)


def _with_first_pass(
    first_block: int, computed: int, adapter: Resident, *own: Resident
) -> Sequence:
    """A sequence whose adapter needs a first pass, by the base or with the adapters ``own``."""
    sequence = _sequence(first_block, computed, (adapter, 0.8))
    first_pass = _sequence(first_block + 4, computed, *((adapter, 1.0) for adapter in own))
    first_pass.tokens = sequence.tokens
    sequence.first_pass = first_pass
    return sequence


def _steps(adapters: dict[str, Resident]) -> dict[str, Step]:
    """Steps: prompts with all kinds of adapters, decode steps, and steps with first passes."""
    low, other = (adapters["low"], 0.5), (adapters["other"], -1.0)
    gated, turned = (adapters["gated"], 0.7), (adapters["turned"], 1.0)
    words, constants = (adapters["words"], 0.5), (adapters["constants"], 1.0)
    scaled, paired = (adapters["scaled"], 1.0), (adapters["paired"], 0.5)
    prompts = [
        Scheduled(_sequence(1, 0, low, other, gated, words, constants), 6),
        Scheduled(_sequence(5, 0, (adapters["soft"], 1.0), turned, scaled, paired), 9),
        Scheduled(_sequence(9, 6, low), 1),
        Scheduled(_sequence(17, 0), 4),
    ]
    prefixed = _sequence(13, 16, (adapters["prefix"], 1.0), other)
    prompts.append(Scheduled(prefixed, 6))
    decode = [
        Scheduled(_sequence(1, 6, low, other, gated), 1),
        Scheduled(_sequence(5, 7, low, turned, constants), 1),
        Scheduled(_sequence(9, 8, low, scaled, paired, words), 1),
    ]
    base = [Scheduled(_sequence(1, 9), 1)]
    router = adapters["router"]
    constant = resident("constant", _with_own_first_pass(router.operators))
    first = [
        Scheduled(_with_first_pass(33, 0, router), 6),
        Scheduled(_with_first_pass(41, 6, constant, constant), 1),
    ]
    later = [
        Scheduled(_with_first_pass(33, 6, router), 1),
        Scheduled(_with_first_pass(41, 7, constant, constant), 1),
    ]
    return {
        "prompts": Step(tuple(prompts), (1, 2), 0, ((prefixed, 0),)),
        "decode": Step(tuple(decode), (), 0),
        "decode, base only": Step(tuple(base), (), 0),
        "decode, low rank": Step((Scheduled(_sequence(9, 8, low), 1),), (), 0),
        "prompts, two passes": Step((*first, *base), (), 0),
        "decode, two passes": Step((*later, *base, decode[1]), (), 0),
    }


class _Copies(TorchDispatchMode):
    """Records operations that would make the host wait: reads, and blocking copies.

    It must not run under ``inference_mode``, in which composite operations are not decomposed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.uploads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        on_device = any(t.device == META for t in tensors)
        if on_device and name in READS:
            self.waits.append(name)
        if name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        ):
            self.waits.append(f"{name} by a mask")
        source = target = None
        non_blocking: Any = False
        if name == "_to_copy":
            source, target = args[0].device, kwargs.get("device") or args[0].device
            non_blocking = kwargs.get("non_blocking", False)
        elif name == "copy_":
            source, target = args[1].device, args[0].device
            non_blocking = kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])
        if source is not None and source != target:
            self.uploads += 1
            if META not in (source, target) or target != META or not non_blocking:
                self.waits.append(f"{name} {source} → {target}, non_blocking={non_blocking}")
        return func(*args, **kwargs)


@contextlib.contextmanager
def watched() -> Iterator[_Copies]:
    """Records the device's operations within the block, including ``torch.tensor(…, device=…)``."""
    copies, original = _Copies(), torch.tensor

    def tensor(*args: Any, device: Any = None, **keywords: Any) -> torch.Tensor:
        if device == META:
            copies.waits.append("torch.tensor on the device")
        return original(*args, device=device, **keywords)

    with copies, patch.object(torch, "tensor", tensor):
        yield copies


def _form(kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, ...]:
    """A kernel with the properties on which the compiler would specialise a launch."""
    fixed = kernel.kwargs.get("do_not_specialize") or ()
    parameters = inspect.signature(kernel.fn).parameters
    values = {**dict(zip(parameters, args, strict=False)), **keywords}
    found: list[Any] = [kernel.fn.__name__]
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            offset = value.storage_offset() * value.itemsize
            found.append((name, value.dtype, offset % 16 == 0))
        elif name in parameters and "constexpr" not in str(parameters[name].annotation):
            is_number = isinstance(value, int) and not isinstance(value, bool)
            found.append((name, value == 1, value % 16 == 0) if is_number else name)
            if name in fixed:
                found.pop()
        else:
            found.append((name, str(value)))
    return tuple(found)


class Launched(list[str]):
    """The names of launched kernels; ``forms`` has all forms for which they were compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.forms: set[tuple[Any, ...]] = set()

    def launch(self, kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.append(kernel.fn.__name__)
        self.forms.add(_form(kernel, args, keywords))


@pytest.fixture(autouse=True)
def no_launches() -> Iterator[Launched]:
    """Record launches instead of executing them."""
    launched = Launched()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launched.launch(self, args, keywords)

    with (
        patch.object(InterpretedFunction, "run", run, create=True),
        patch.object(
            InterpretedFunction,
            "__getitem__",
            lambda self, grid: lambda *args, **keywords: launched.launch(self, args, keywords),
            create=True,
        ),
    ):
        yield launched


@pytest.mark.parametrize("name", STEPS)
def test_a_step_never_waits_for_the_device(name: str, no_launches: list[str]):
    executor = _executor()
    step = _steps(_adapters())[name]
    with torch.no_grad():
        # The first run in a process copies constants.
        executor.run(step)
        no_launches.clear()
        with watched() as copies:
            computed = executor.run(step)
    assert copies.waits == []
    # A decode step copies only its rows, because the first run copied the adapters. A step with
    # prompts also copies soft tokens, a prefix, and the numbers of the rows whose embeddings or
    # heads change. A first pass counts as a step.
    limits = {"prompts": 10, "prompts, two passes": 5, "decode, two passes": 6}
    assert copies.uploads <= limits.get(name, 1), copies.uploads
    assert computed.logits is not None
    assert len(computed.logits) == sum(item.samples for item in step.scheduled)
    kernels = set(no_launches)
    # ``_with_kernels`` leaves only the router of an adapter with a first pass, so no adapter
    # changes the products of plain steps, and the kernel of the base's product also rotates the
    # heads.
    is_plain = name in ("decode, base only", "prompts, two passes")
    heads = "nf4_rotate_kernel" if is_plain else "rope_kv_write_kernel"
    assert {"paged_attention_kernel", heads} <= kernels
    assert kernels & {"nf4_matmul_kernel", "nf4_shrink_kernel"}
    adapted = {f"{one}_kernel" for one in ("hadamard_expand", "kronecker", "fusion_gate")}
    in_two_passes = name.endswith("two passes")
    assert (adapted <= kernels) == (name in ("prompts", "decode"))
    assert ("nf4_shrink_kernel" in kernels) != is_plain
    if in_two_passes:
        # Each layer launches attention once in each pass.
        assert no_launches.count("paged_attention_kernel") == 2 * ARCH.num_layers


def test_the_largest_step_runs_with_a_cache_of_two_blocks(no_launches: list[str]):
    executor = _executor()
    executor._cache = KvCache(ARCH, 2, 16, DTYPE, META)
    step = largest_step(48, 8, 16)
    with torch.no_grad():
        computed = executor.run(step)
    assert computed.logits is not None
    assert computed.logits.shape == (8, ARCH.vocab_size)
    assert computed.hidden.shape[0] == 48
    assert "paged_attention_kernel" in no_launches


def _gated(key: str, components: int) -> Resident:
    return gated(key, components, 64, arch=ARCH, rank=8)


@pytest.mark.parametrize(("budget", "is_odd"), [(1 << 30, 0), ((1 << 30) + (150 << 10), 1)])
def test_nothing_is_compiled_inside_a_step(no_launches: Launched, budget: int, is_odd: int):
    """Further kernels for an adapter are compiled when it is loaded."""
    executor, adapters = _executor(FakeCapture(), budget), _adapters()
    # With an odd number of slots, parts of tables would begin between multiples of 16 bytes.
    assert executor.store._pack.num_slots % 2 == is_odd
    with torch.no_grad():
        warm_up(executor, lambda *_: None)
        assert not {name for name, *_ in no_launches.forms} & {"kronecker_kernel"}
        for adapter in adapters.values():
            executor.store.admit(adapter.operators)
        known = set(no_launches.forms)
        for step in _steps(adapters).values():
            executor.run(step)
        # Every pair of adapters, in decode steps and with longer prompts.
        pairs = itertools.combinations(["low", "other", "gated", "scaled", "words"], 2)
        for one, two in pairs:
            mix = (adapters[one], 0.5), (adapters[two], 1.0)
            for chunk, prompt in ((1, 6), (1, 66), (33, 66), (66, 66)):
                computed = prompt if chunk == 1 else prompt - chunk
                sequence = _sequence(1, computed, *mix, prompt=prompt)
                sequence.blocks = list(range(1, 9))
                rows = [Scheduled(sequence, chunk), Scheduled(_sequence(9, 6, mix[0]), 1)]
                if chunk < 48:
                    executor.run(Step(tuple(rows), (), 0))
        # Prompts of the base model alone.
        for prompt, chunk in ((16, 16), (32, 17), (33, 33), (66, 30), (66, 40)):
            sequence = _sequence(1, 0, prompt=prompt)
            sequence.blocks = list(range(1, 9))
            executor.run(Step((Scheduled(sequence, chunk),), (), 0))
        # Mixes that exceed the initial sizes of a step's tables (members, components, ranks,
        # queries).
        large = [(_gated(f"gated {components}", components), 1.0) for components in (9, 16, 33)]
        for count in (1, 2, 3):
            for prompt, chunk in ((6, 1), (66, 33)):
                sequence = _sequence(1, prompt if chunk == 1 else chunk, *large[:count], prompt=66)
                sequence.blocks = list(range(1, 9))
                executor.run(Step((Scheduled(sequence, chunk),), (), 0))
    assert {"kronecker_kernel", "fusion_gate_kernel", "segmented_shrink_kernel"} <= set(no_launches)
    assert no_launches.forms == known


def _only(operators: AdapterOperators, *kinds: str) -> AdapterOperators:
    """An adapter's operators of some kinds."""
    modules = {
        path: ModuleOperators(*(part for part in ops.operators if part.name in kinds))
        for path, ops in operators.modules.items()
    }
    return dataclasses.replace(operators, modules=modules)


def test_steps_with_six_methods_are_replayed_from_graphs(monkeypatch: pytest.MonkeyPatch):
    """Up to eight sequences of about 150 tokens start and end. LoRA was captured at startup."""
    monkeypatch.setattr(gpu_executor, "SIGHTS", 8)
    computed, draw, steps, replayed = list[GpuStep](), random.Random(3), 4000, 0
    capture = Capture([])
    executor, every = _executor(capture), every_operator(ARCH, DTYPE)
    methods = {
        "lora": _only(every["low"], "low_rank"),
        "dora": _only(every["low"], "low_rank", "gain"),
        "gains": _only(every["low"], "gain"),
        "loha": _only(every["other"], "hadamard"),
        "lokr": _only(every["other"], "kronecker"),
        "words": every["words"],
    }
    adapters = [resident(name, operators) for name, operators in methods.items()]

    def compute(step: GpuStep, cache: KvCache) -> tuple[torch.Tensor, torch.Tensor]:
        computed.append(step)
        return torch.empty(8, 1), torch.empty(8, 1)

    monkeypatch.setattr(executor._decoder, "compute", compute)
    monkeypatch.setattr(executor._decoder, "embed", lambda _: torch.empty(1, device=META))
    monkeypatch.setattr(executor, "_change_heads", lambda *_: None)
    with torch.no_grad():
        warm_up(executor, lambda *_: None)
        prepared, running = capture.num_captures, list[tuple[Sequence, int]]()
        for step in range(steps):
            running = [(sequence, end) for sequence, end in running if end > step]
            if not running or (len(running) < 8 and draw.random() < 0.04):
                mix = [(adapter, 1.0) for adapter in draw.choices([*adapters, None]) if adapter]
                sequence = _sequence(1, 6, *mix)
                sequence.blocks = list(range(1, 17))
                running.append((sequence, step + draw.randint(50, 240)))
            computed.clear()
            executor.run(Step(tuple(Scheduled(sequence, 1) for sequence, _ in running), (), 0))
            replayed += not computed
            for sequence, _ in running:
                sequence.num_computed += 1
                sequence.tokens.append(1)
    assert replayed > 0.95 * steps
    assert 0 < capture.num_captures - prepared < steps / 200


def test_operators_beyond_the_kernels_limits_are_left_to_torch():
    for over in (0, 1):
        square = torch.zeros(MAX_HADAMARD_RANK + over, MAX_HADAMARD_RANK + over)
        wide = Kronecker(torch.zeros(2, MAX_IN_M + over), torch.zeros(2, 2))
        deep = Kronecker(torch.zeros(2, 2), (square[:2], torch.zeros(MAX_RANK + over, 2)))
        fusion = _gated("", MAX_COMPONENTS + over).operators.modules
        gate = next(iter(fusion.values())).get(Gate)
        assert gate is not None
        parts = (Hadamard(*(square,) * 4), wide, deep, gate)
        assert {has_kernel(one, "gpu") for one in parts} == {not over}


def test_one_copy_moves_an_adapter_into_the_pack():
    executor = _executor()
    adapters = _adapters()
    with torch.no_grad(), watched() as copies:
        executor.store.prepare([adapters["low"], adapters["other"]])
    assert copies.waits == []
    # One copy for each adapter, and one for the addresses of the slot tables.
    assert copies.uploads == 3
    with torch.no_grad(), watched() as copies:
        executor.store.prepare([adapters["gated"]])
    assert copies.waits == []
    # The gates' scores need a separate copy.
    assert copies.uploads == 2
    with torch.no_grad(), watched() as copies:
        executor.store.prepare([adapters["router"]])
    assert copies.waits == []
    # Only the router's tensors: its gates have no kernel, so ``_with_kernels`` has removed them.
    assert copies.uploads == 1


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x + torch.ones(3).to(META),
        lambda x: x.cpu(),
        lambda x: torch.tensor([1.0], device=META),
        lambda x: x.nonzero(),
    ],
)
def test_a_wait_for_the_device_is_detected(wait: Callable[[torch.Tensor], object]):
    # Some of these raise on a meta tensor; others would wait only on a GPU.
    with watched() as copies, contextlib.suppress(RuntimeError, NotImplementedError):
        wait(torch.empty(3, device=META))
    assert len(copies.waits) >= 1


def test_buffers_keep_their_addresses():
    """Every tensor that the body of a decode step reads is the same object in a later step."""
    executor = _executor(FakeCapture())
    seen = []

    def compute(step: Any, cache: Any) -> Any:
        bound = [
            pair for pairs in step.adapters.slot_tables.by_projection.values() for pair in pairs
        ]
        tables = [*step.attention.values(), step.adapters.table]
        tables += [table for _, tables in bound for table in tables]
        rows = (step.token_ids, step.positions, step.kv_slots, step.sample_rows)
        places = [(t.untyped_storage()._cdata, t.storage_offset(), t.shape) for t in rows]
        seen.append((places, [id(table) for table in tables]))
        return torch.zeros(4, 1), torch.zeros(4, 1)

    adapters = _adapters()
    step = _steps(adapters)["decode"]
    with (
        torch.no_grad(),
        patch.object(executor._decoder, "compute", compute),
        patch.object(executor, "_change_heads"),
    ):
        executor.run(step)
        executor.run(Step(step.scheduled[::-1], (), 0))
    assert len(seen) == 2
    assert seen[0] == seen[1]
