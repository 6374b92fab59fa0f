"""The whole server on the GPU path, in Triton's interpreter, compared with plain torch.

It uses real gRPC, a tiny float32 model, and one batch with every adapter method and mixes of them.
Decode steps use captured bodies (``gpu_path.FakeCapture``).

A fault anywhere on the path (a slot, an order of rows, a table of the last step) changes tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from builders.methods import make_config, save_adapter
from builders.mixes.fusions import save_fusion
from builders.mixes.routers import write_router
from gpu_path import FakeCapture
from method_oracle import prompt_of, twin

from turret.clients.aio import AdapterWeight, AsyncTurretClient
from turret.clients.results import Completion
from turret.server.app import App
from turret.server.build import build_backend
from turret.server.config import (
    AdapterConfig,
    CacheConfig,
    Config,
    ListenConfig,
    ModelConfig,
    SchedulerConfig,
)
from turret.server.engine.step import gpu_executor as executor

pytestmark = pytest.mark.usefixtures("coarse_tiles")
# Maximum difference of a logprob, relative if it is larger than 1: both paths sum in fp32, in
# different orders.
MAX_DIFFERENCE = 1e-5
# The prompts may take two steps; a second decode step finds the state of the first one.
MAX_TOKENS = 4
FEW = {"num_virtual_tokens": 3}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "rslora": ("rslora", {"r": 9, "target_modules": ["q_proj", "down_proj"]}),
    "dora": ("dora", {}),
    "loha": ("loha", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "lokr": ("lokr", {"target_modules": ["k_proj", "o_proj", "up_proj"]}),
    "ia3": ("ia3", {"feedforward_modules": ["down_proj", "v_proj"]}),
    "norms": ("ln_tuning", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    "oft": ("oft", {"target_modules": ["q_proj", "v_proj", "gate_proj"]}),
    "adaption": ("adaption_prompt", {"adapter_len": 5, "adapter_layers": 1}),
    "adalora": ("adalora", {"target_modules": ["q_proj", "up_proj"]}),
    "vera": ("vera", {"target_modules": ["v_proj", "o_proj"]}),
    "head": ("lora", {"target_modules": ["v_proj", "lm_head", "embed_tokens"]}),
    "tokens": ("lora", {"target_modules": ["q_proj"], "trainable_token_indices": [*range(90)]}),
    # This aLoRA acts from the second token of the first prompt on, and never on the next prompt.
    "alora": ("alora", {"alora_invocation_tokens": prompt_of(2, 0)[1:]}),
    "prefix": ("prefix_tuning", FEW),
    "prompt": ("prompt_tuning", FEW),
    "p-tuning": ("p_tuning", FEW),
}
MIXES: list[list[tuple[str, float]]] = [
    [("lora", 1.0), ("alora", 0.8)],
    [("loha", 0.6), ("lokr", 0.7), ("rslora", -0.5), ("alora", 1.0)],
    [("ia3", 1.0), ("tokens", 0.7)],
    [("norms", 1.0)],
    [("oft", 0.7), ("lora", -0.4), ("norms", 0.5), ("adaption", 1.0)],
    [("dora", 0.8), ("adalora", -0.4)],
    [("vera", 1.0), ("prefix", 1.0), ("ia3", 0.5)],
    [("prompt", 1.0), ("dora", 0.0)],
    [("p-tuning", 1.0)],
    [],
    [("head", 0.5), ("fusion", 0.8)],
    [("fusion", 1.0), ("loha", 0.3), ("fusion-2", -0.6)],
    [("arrow", 0.9), ("fusion-2", 0.5)],
]


# The server runs on a GPU if there is one; otherwise, its kernels are interpreted.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.asynccontextmanager
async def serving(
    root: Path, names: Iterable[str], *, gpu: bool
) -> AsyncIterator[tuple[App, AsyncTurretClient]]:
    """A server with these adapters of ``root``, and a client over gRPC."""
    config = Config(
        model=ModelConfig(
            model=twin("llama").folder, device=DEVICE if gpu else "cpu", dtype="float32"
        ),
        # On a real card, the server plans its memory.
        cache=CacheConfig(kv_cache_bytes=None if gpu and DEVICE == "cuda" else 4 << 20),
        scheduler=SchedulerConfig(max_num_seqs=13, max_num_batched_tokens=52),
        adapters=AdapterConfig(adapter_root=root, preload=tuple((n, n) for n in names)),
        listen=ListenConfig(address="127.0.0.1:0", metrics_address=None),
    )
    app = App(config, build=lambda c, m, s: build_backend(c, m, gpu=gpu, state=s))
    await app.startup()
    assert app.rpc is not None
    try:
        async with AsyncTurretClient(app.rpc.address) as client:
            yield app, client
    finally:
        await app.shutdown()


async def ask(
    client: AsyncTurretClient, number: int, mix: list[tuple[str, float]], max_tokens: int
) -> Completion:
    return await client.generate(
        prompt_of(2 + number % 3, number),
        adapters=[AdapterWeight(name, weight) for name, weight in mix],
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        logprobs=True,
        token_ids=True,
    )


async def answers(root: Path, *, gpu: bool) -> list[Completion]:
    """Serve every mix at once."""
    names = (*ADAPTERS, "fusion", "fusion-2", "arrow")
    async with serving(root, names, gpu=gpu) as (_, client):
        calls = [ask(client, number, mix, MAX_TOKENS) for number, mix in enumerate(MIXES)]
        return await asyncio.gather(*calls)


@contextlib.contextmanager
def captures() -> Iterator[FakeCapture]:
    """Capture steps as Python objects where there is no GPU."""
    capture = FakeCapture()
    with contextlib.ExitStack() as stack:
        if DEVICE == "cpu":
            fake = patch.object(executor, "capture_for", lambda device: capture)
            stack.enter_context(fake)
        yield capture


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """A directory with every adapter."""
    model = twin("llama").model
    for seed, (name, (method, keys)) in enumerate(ADAPTERS.items()):
        save_adapter(model, make_config(method, **keys), tmp_path / name, seed=seed)
    save_fusion(model, tmp_path, "fusion", ("lora", "rslora"), ("q_proj", "down_proj"))
    save_fusion(model, tmp_path, "fusion-2", ("rslora", "lora"), ("q_proj", "up_proj"), seed=1)
    write_router(tmp_path, "arrow", ("lora", "rslora"), ["q_proj", "down_proj"], top_k=1)
    return tmp_path


# Rows that only pad a step compute on uninitialised memory, which may cause warnings.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.gpu
async def test_every_method_in_one_batch_as_on_plain_torch(adapters: Path) -> None:
    expected = await answers(adapters, gpu=False)
    with captures() as capture:
        found = await answers(adapters, gpu=True)
    for mix, one, two in zip(MIXES, found, expected, strict=True):
        assert len(one.logprobs) == MAX_TOKENS
        assert one.token_ids == two.token_ids, mix
        for mine, theirs in zip(one.logprobs, two.logprobs, strict=True):
            assert mine.logprob is not None
            assert theirs.logprob is not None
            bound = MAX_DIFFERENCE * max(1.0, abs(theirs.logprob))
            assert abs(mine.logprob - theirs.logprob) <= bound, mix
    assert len({answer.token_ids for answer in expected}) == len(MIXES), "adapters without effect"
    # Some of these methods have no kernels; test_beside_projections.py tests captured steps.
    assert capture.num_captures == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.gpu
@pytest.mark.long
async def test_loads_beside_captured_steps(
    adapters: Path, monkeypatch: pytest.MonkeyPatch, soak_seconds: float
) -> None:
    """Adapters come and go while requests decode; no answer changes, and captures go on."""
    # Capture often, so that many captures meet loads.
    monkeypatch.setattr(executor, "SIGHTS", 2)
    mixes = [[("lora", 1.0)], [("dora", 0.8)], [("ia3", 1.0)], []]
    loads, ends = 0, time.monotonic() + soak_seconds / 2

    async def generate(client: AsyncTurretClient, number: int) -> set[tuple[int, ...]]:
        found = set()
        while time.monotonic() < ends or not loads:
            found.add((await ask(client, number, mixes[number], 8)).token_ids)
        return found

    async def load(client: AsyncTurretClient, method: str, mix: int) -> None:
        nonlocal loads
        while time.monotonic() < ends or not loads:
            name = f"another-{method}"
            await client.adapters.load(name, method)
            again = await ask(client, mix, [(name, mixes[mix][0][1])], 3)
            assert again.token_ids == expected[mix].token_ids[:3]
            await client.adapters.unload(name)
            loads += 1

    with captures() as capture:
        names = ("lora", "dora", "ia3")
        async with serving(adapters, names, gpu=True) as (app, client):
            expected = [await ask(client, number, mix, 8) for number, mix in enumerate(mixes)]
            tasks = [generate(client, number) for number in range(len(mixes))]
            others = [load(client, "dora", 1), load(client, "lora", 0)]
            found = await asyncio.gather(*tasks, *others)
            assert app.metrics.registry.get_sample_value("turret_cuda_graphs_off") == 0.0
    for answer, one in zip(found, expected, strict=False):
        assert answer == {one.token_ids}
    assert loads
    assert DEVICE == "cuda" or capture.num_replays
