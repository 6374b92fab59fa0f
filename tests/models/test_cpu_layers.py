"""All layers in one native call: the bits of the kernels called one by one, for every family.

Faults planted in ``layers.c``, and how many of the 16 tests of families without experts failed: the
bias added twice to adapted rows (2), or not to base rows alongside adapted ones (2), the norm after
attention left out (5), the residual scale left out (2), the norm of queries used for keys (4), the
first layer's window (4) or frequencies (3) used in every layer. All four mixtures fail if updates
of experts are left out, or those of the first layer are used in every layer. gpt-oss fails without
sinks, biases of experts or its own activation, and Qwen3 if weights are always normalised. Only the
test of equal scores fails if a product and a sum of experts' results are fused. The test of
operators fails if ``CpuStep.is_native`` ignores added changes, gates or products with the base, one
at a time, or if every slice uses the first one's change.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from builders.bases.tiny_models import ARCHITECTURES, MIXTURES, OTHER_ARCHITECTURES
from builders.methods import make_config, save_adapter
from builders.mixes.fusions import save_fusion
from method_oracle import prompt_of, twin
from safetensors.torch import load_file, save_file
from servers.engine_harness import EngineHarness, make_request

from turret.kernels import cpu as native
from turret.server.adapters.adapter import AdapterRef
from turret.server.adapters.device import KERNELS, Resident
from turret.server.adapters.device.cpu import CpuStore
from turret.server.adapters.operators.low_rank import ExpertLowRank
from turret.server.adapters.operators.modulated_base import ModulatedBase
from turret.server.models.decoding.cpu_layers import CpuLayers
from turret.server.models.decoding.decoder import Decoder

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")

EVERY = {"target_modules": "all-linear"}
ADAPTERS = {
    "lora": ("lora", {**EVERY, "lora_bias": True}),
    "attention": ("lora", {"target_modules": r".*o_proj"}),
    "dora": ("dora", EVERY),
}
# In PEFT, experts and routers are parameters, which have plain LoRAs only.
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = {"target_modules": r".*self_attn\.._proj"}
OF_MIXTURES = {
    "lora": ("lora", {**ATTENTION, "target_parameters": [*EXPERTS, "mlp.gate.weight"]}),
    "dora": ("dora", ATTENTION),
}
OF_GPT_OSS = {"lora": ("lora", {**ATTENTION, "target_parameters": [*EXPERTS, "mlp.router.weight"]})}
# torch computes queries that grow with their position.
ONE_BY_ONE = {"ministral3"}


def requests() -> list[Any]:
    """Prompts longer and shorter than windows and blocks, with and without adapters."""
    names = (None, "lora", None, "attention", "dora")
    lengths = (60, 1, 26, 140, 17)
    return [
        make_request(prompt_of(length, number), *([name] if name else []), max_tokens=4)
        for number, (name, length) in enumerate(zip(names, lengths, strict=True))
    ]


async def answers(folder: Path, root: Path, *, together: bool = True) -> list[Any]:
    harness = EngineHarness.start(folder, root, dtype="bfloat16", adapters=list(ADAPTERS))
    async with harness as started:
        if together:
            return [answer.bits for answer in await started.run_all(requests())]
        return [(await started.run(request)).bits for request in requests()]


def save_adapters(architecture: str, root: Path) -> None:
    adapters = ADAPTERS | (OF_MIXTURES if architecture in MIXTURES else {})
    adapters |= OF_GPT_OSS if architecture == "gpt_oss" else {}
    for seed, (name, (method, changes)) in enumerate(adapters.items()):
        config = make_config(method, **changes)
        save_adapter(twin(architecture).model, config, root / name, seed=seed)


@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES, *OTHER_ARCHITECTURES}))
async def test_one_call_gives_the_bits_of_many(architecture: str, tmp_path: Path) -> None:
    base = twin(architecture)
    save_adapters(architecture, tmp_path)
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


@pytest.mark.parametrize("isa", native.usable_isas())
async def test_experts_with_equal_scores_are_chosen_as_in_torch(
    isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = native.load(isa)
    monkeypatch.setattr(native, "library", lambda: library)
    folder = Path(shutil.copytree(twin("olmoe").folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    routers = [tensor for name, tensor in tensors.items() if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2
    for router in routers:
        router[[2, 3, 5, 7]] = router[[0]]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_adapters("olmoe", tmp_path)
    with patch.object(Decoder, "_in_one_call", lambda *_: None):
        many = await answers(folder, tmp_path)
    with patch.object(CpuLayers, "run", autospec=True, side_effect=CpuLayers.run) as run:
        assert await answers(folder, tmp_path) == many
        assert await answers(folder, tmp_path, together=False) == many
    assert run.called


# At least one method per operator. A step runs all layers in one call, except with some methods.
IN_ONE_CALL = ["lora", "dora", "loha", "lokr", "shira", "road", "c3a", "beft", "randlora"]
IN_ONE_CALL += ["ln_tuning", "oft", "boft"]
IN_SEVERAL_CALLS = ["ia3", "hira"]


async def answers_alone(folder: Path, root: Path) -> list[Any]:
    """The base's and every adapter's answers to one prompt, alone and mixed, in separate steps."""
    names = [*IN_ONE_CALL, *IN_SEVERAL_CALLS, "fusion"]
    mixes: list[tuple[AdapterRef, ...]] = [()]
    for name in names:
        mixed = (AdapterRef(name=name, weight=0.7), AdapterRef(name="other", weight=0.5))
        mixes += [(AdapterRef(name=name),), mixed]
    harness = EngineHarness.start(folder, root, dtype="bfloat16", adapters=["other", *names])
    async with harness as started:
        found = [
            await started.run(make_request(prompt_of(21), *refs, max_tokens=3)) for refs in mixes
        ]
    return [answer.bits for answer in found]


async def test_every_operator_gives_the_same_bits_in_one_call(tmp_path: Path) -> None:
    base = twin("qwen2")
    for seed, name in enumerate((*IN_ONE_CALL, *IN_SEVERAL_CALLS)):
        save_adapter(base.model, make_config(name), tmp_path / name, seed=seed)
    save_adapter(base.model, make_config("lora", r=3), tmp_path / "other", seed=99)
    save_fusion(base.model, tmp_path, "fusion", ("lora", "other"), ("q_proj", "up_proj"))
    served = set()
    insert = CpuStore._insert

    def noted(self: CpuStore, adapter: Resident) -> None:
        assert adapter.operators is not None
        for module in adapter.operators.modules.values():
            served.update(type(part) for part in module.operators)
        insert(self, adapter)

    one_by_one = patch.object(Decoder, "_in_one_call", lambda *_: None)
    with one_by_one, patch.object(CpuStore, "_insert", noted):
        many = await answers_alone(base.folder, tmp_path)
    assert served == (KERNELS.keys() | {ModulatedBase}) - {ExpertLowRank}
    calls = 0
    run = CpuLayers.run

    def counted(self: CpuLayers, *args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        return run(self, *args, **more)

    with patch.object(CpuLayers, "run", counted):
        one = await answers_alone(base.folder, tmp_path)
    assert one == many
    # All answers must differ, which detects an operator that both paths ignore.
    assert len(set(one)) == len(one)
    # Three steps for each request. IA3's gain must not scale another member's change, so only IA3
    # alone is one call.
    assert calls == 3 * (1 + 2 * len(IN_ONE_CALL) + 1)
