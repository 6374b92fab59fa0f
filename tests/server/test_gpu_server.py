"""The whole server on the GPU path, in Triton's interpreter, compared with plain torch.

It uses real gRPC, a tiny float32 model, and one batch with every adapter method and mixes of them.
Decode steps use captured bodies (``gpu_path.FakeCapture``).

A fault anywhere on the path (a slot, an order of rows, a table of the last step) changes tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from turret.clients.messages.results import Completion
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
from turret.server.engine.step.gpu import decode_graphs

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


async def answers(root: Path, *, gpu: bool) -> list[Completion]:
    """Serve every mix at once over gRPC."""
    names = (*ADAPTERS, "fusion", "fusion-2", "arrow")
    config = Config(
        model=ModelConfig(
            model=twin("llama").folder, device=DEVICE if gpu else "cpu", dtype="float32"
        ),
        cache=CacheConfig(kv_cache_bytes=4 << 20),
        scheduler=SchedulerConfig(max_num_seqs=13, max_num_batched_tokens=52),
        adapters=AdapterConfig(adapter_root=root, preload=tuple((n, n) for n in names)),
        listen=ListenConfig(address="127.0.0.1:0", metrics_address=None),
    )
    app = App(config, build=lambda c, m, s: build_backend(c, m, gpu=gpu, state=s))
    await app.startup()
    assert app.rpc is not None
    try:
        async with AsyncTurretClient(app.rpc.address) as client:
            calls = [
                client.generate(
                    prompt_of(2 + number % 3, number),
                    adapters=[AdapterWeight(name, weight) for name, weight in mix],
                    temperature=0.0,
                    max_tokens=MAX_TOKENS,
                    ignore_eos=True,
                    logprobs=True,
                    token_ids=True,
                )
                for number, mix in enumerate(MIXES)
            ]
            return await asyncio.gather(*calls)
    finally:
        await app.shutdown()


# Rows that only pad a step compute on uninitialised memory, which may cause warnings.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.gpu
async def test_every_method_in_one_batch_as_on_plain_torch(tmp_path: Path) -> None:
    model = twin("llama").model
    for seed, (name, (method, keys)) in enumerate(ADAPTERS.items()):
        save_adapter(model, make_config(method, **keys), tmp_path / name, seed=seed)
    save_fusion(model, tmp_path, "fusion", ("lora", "rslora"), ("q_proj", "down_proj"))
    save_fusion(model, tmp_path, "fusion-2", ("rslora", "lora"), ("q_proj", "up_proj"), seed=1)
    write_router(tmp_path, "arrow", ("lora", "rslora"), ["q_proj", "down_proj"], top_k=1)
    expected = await answers(tmp_path, gpu=False)
    capture = FakeCapture()
    with contextlib.ExitStack() as stack:
        if DEVICE == "cpu":
            fake = patch.object(decode_graphs, "capture_for", lambda device: capture)
            stack.enter_context(fake)
        found = await answers(tmp_path, gpu=True)
    for mix, one, two in zip(MIXES, found, expected, strict=True):
        assert len(one.logprobs) == MAX_TOKENS
        assert one.token_ids == two.token_ids, mix
        for mine, theirs in zip(one.logprobs, two.logprobs, strict=True):
            assert mine.logprob is not None
            assert theirs.logprob is not None
            bound = MAX_DIFFERENCE * max(1.0, abs(theirs.logprob))
            assert abs(mine.logprob - theirs.logprob) <= bound, mix
    assert len({answer.token_ids for answer in expected}) == len(MIXES), "adapters without effect"
    # Some of them have no kernels; test_beside_projections.py tests captured steps.
    assert capture.num_captures == 0
