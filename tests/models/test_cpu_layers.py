"""All layers in one native call: the bits of the kernels called one by one, for every family.

Faults planted in ``layers.c``, and how many of the 16 tests each one failed: the bias added once
more to adapted rows (2), to no row of the base beside adapted ones (2), the norm after attention
left out (5), the residual scale left out (2), the norm of queries for that of keys (4), every
layer's window (4) or frequencies (3) those of the first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from builders.methods import make_config, save_adapter
from builders.tiny_models import ARCHITECTURES, MIXTURES, OTHER_ARCHITECTURES
from method_oracle import prompt_of, twin
from servers.engine_harness import EngineHarness, make_request

from turret.kernels.cpu.native import has_native_products
from turret.server.models.decoding.cpu_layers import CpuLayers
from turret.server.models.decoding.decoder import Decoder

pytestmark = pytest.mark.skipif(
    not has_native_products(), reason="the compiled NF4 product needs AVX512-BF16"
)

EVERY = {"target_modules": "all-linear"}
ADAPTERS = {
    "lora": ("lora", {**EVERY, "lora_bias": True}),
    "attention": ("lora", {"target_modules": r".*o_proj"}),
    "dora": ("dora", EVERY),
}
# Queries that grow with their position are torch's.
ONE_BY_ONE = {"ministral3"}


def requests() -> list[Any]:
    """Prompts longer and shorter than windows and blocks, adapted and not, side by side."""
    names = (None, "lora", None, "attention", "dora")
    lengths = (60, 1, 26, 140, 17)
    return [
        make_request(prompt_of(length, number), *([name] if name else []), max_tokens=4)
        for number, (name, length) in enumerate(zip(names, lengths, strict=True))
    ]


async def answers(folder: Path, root: Path) -> list[Any]:
    harness = EngineHarness.start(folder, root, dtype="bfloat16", adapters=list(ADAPTERS))
    async with harness as started:
        return [answer.bits for answer in await started.run_all(requests())]


# The rows of mixtures are routed, and other adapters fit them: test_family_oracle.py has them.
@pytest.mark.parametrize(
    "architecture", sorted({*ARCHITECTURES, *OTHER_ARCHITECTURES} - {*MIXTURES})
)
async def test_one_call_gives_the_bits_of_many(architecture: str, tmp_path: Path) -> None:
    base = twin(architecture)
    for seed, (name, (method, changes)) in enumerate(ADAPTERS.items()):
        save_adapter(base.model, make_config(method, **changes), tmp_path / name, seed=seed)
    with patch.object(Decoder, "_in_one_call", lambda *_: None):
        many = await answers(base.folder, tmp_path)
    calls = []
    run = CpuLayers.run

    def counted(self: CpuLayers, *args: Any, **more: Any) -> Any:
        calls.append(more["adapters"])
        return run(self, *args, **more)

    with patch.object(CpuLayers, "run", counted):
        one = await answers(base.folder, tmp_path)
    assert one == many
    if architecture in ONE_BY_ONE:
        assert not calls
    else:
        assert any(adapters is None for adapters in calls) or len(calls) > 3
        assert any(adapters is not None for adapters in calls)
