"""X-LoRA, served by the engine and compared with PEFT's forward pass."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders.adapters import (
    base_of,
    edit_config,
    edit_tensors,
    linear_modules,
    lower_with_components,
    read_adapter,
)
from builders.adapters import tiny_llama as make_llama
from builders.bases.tiny_models import tiny_config
from builders.methods import load_adapter
from builders.mixes.xloras import KINDS, save_loras, save_xlora
from method_oracle import (
    check_greedy,
    check_oracles,
    check_rounding,
    check_score,
    prompt_of,
    serve,
    twin,
)
from peft import XLoraConfig
from safetensors.torch import load_file
from said import says
from servers.engine_harness import make_request
from servers.gpu_serving import gpu_serving
from transformers import AutoModelForCausalLM

from turret.server.adapters.base import BaseModel
from turret.server.adapters.lowering import Lowered
from turret.server.adapters.methods import method_for
from turret.server.adapters.methods.xlora import modules_in_order
from turret.server.cli import main
from turret.server.engine.scheduling.request import Request
from turret.server.errors import (
    AdapterCheckpointError,
    AdapterMismatchError,
    InvalidRequestError,
    PromptTooLongError,
)
from turret.server.models.families import read_arch
from turret.training.conversion import xlora
from turret.training.words import say
from turret.words import Text

COMPONENTS = ("0", "1", "2")


def save_all(model: Any, root: Path, *names: str) -> dict[str, Any]:
    save_loras(model, root)
    return {name: save_xlora(model, root, name, **KINDS[name]) for name in names}


@pytest.mark.parametrize("architecture", ["llama", pytest.param("qwen2", marks=pytest.mark.long)])
async def test_scores_and_answers_match_peft(architecture: str, tmp_path: Path) -> None:
    base = twin(architecture)
    oracles = save_all(base.model, tmp_path, *KINDS)
    await check_oracles(base, tmp_path, [*COMPONENTS, *KINDS], oracles.items())


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.long)])
async def test_bits_do_not_depend_on_other_requests(
    dtype: str, tmp_path: Path, preempted: list[tuple[Any, int]]
) -> None:
    """Bits are the same in chunks, alongside other rows, from the cache, and after preemption."""
    base = twin("llama")
    names = ("deep", "constant")
    save_all(base.model, tmp_path, *names)
    prompts = [prompt_of(length, seed) for seed, length in enumerate((150, 101, 9))]
    own = [(name, prompt) for name in names for prompt in prompts]

    def asked(name: str, prompt: list[int]) -> Request:
        return make_request(prompt, name, max_tokens=40)

    alone = []
    async with serve(
        base, tmp_path, dtype=dtype, adapters=[*COMPONENTS, *names], max_num_batched_tokens=256
    ) as harness:
        for name, prompt in own:
            alone.append((await harness.run(asked(name, prompt))).bits)
            again = await harness.run(asked(name, prompt))
            assert again.finish.usage.cached_tokens == (len(prompt) - 1) // 16 * 16
            assert again.bits == alone[-1]
    async with serve(
        base, tmp_path, dtype=dtype, adapters=[*COMPONENTS, *names], max_num_batched_tokens=37
    ) as harness:
        harness.leave_blocks(60)
        others = [make_request(p, n, max_tokens=40) for p in prompts for n in COMPONENTS]
        others += [make_request(prompt, max_tokens=40) for prompt in prompts]
        answers = await harness.run_all([*others, *(asked(*each) for each in own)])
        assert [answer.bits for answer in answers[len(others) :]] == alone
    assert any(sequence.first_pass is not None for sequence, _ in preempted)


async def test_the_first_pass_of_an_xlora_shares_blocks_with_the_base(tmp_path: Path) -> None:
    base = twin("llama")
    oracles = save_all(base.model, tmp_path, "deep", "constant")
    prompt = prompt_of(70, 5)
    async with serve(base, tmp_path, adapters=[*COMPONENTS, *oracles]) as harness:
        plain = await harness.run(make_request(prompt, max_tokens=3))
        # The X-LoRA's own keys and values are not computed yet.
        first = await harness.run(make_request(prompt, "deep", max_tokens=3))
        assert first.finish.usage.cached_tokens == 0
        again = await harness.run(make_request(prompt, max_tokens=3))
        assert again.bits == plain.bits
        other = await harness.run(make_request(prompt_of(64, 6), "deep", max_tokens=3))
        shared = await harness.run(make_request([*prompt_of(64, 6), 1, 2], max_tokens=3))
        assert shared.finish.usage.cached_tokens == 64
        assert other.token_ids
        await harness.run(make_request(prompt_of(64, 7), "constant", max_tokens=3))
        alone = await harness.run(make_request([*prompt_of(64, 7), 1, 2], max_tokens=3))
        assert alone.finish.usage.cached_tokens == 0
        check_greedy(first, oracles["deep"], prompt, "alongside the base's blocks")


async def test_mixes_are_sums_of_changes(tmp_path: Path) -> None:
    """With weight 0 for one member, the other acts alone.

    Two members with a first pass are rejected.
    """
    base = twin("llama")
    save_all(base.model, tmp_path, "deep", "shallow")
    prompt = prompt_of(20, 4)
    async with serve(
        base, tmp_path, adapters=[*COMPONENTS, "deep", "shallow"], kv_cache_bytes=1 << 20
    ) as harness:
        alone = await harness.run(make_request(prompt, "deep", score=True))
        mixed = await harness.run(make_request(prompt, "deep", ("0", 0.0), score=True))
        assert mixed.prompt_logprobs == alone.prompt_logprobs
        lora = await harness.run(make_request(prompt, "0", score=True))
        switched = await harness.run(make_request(prompt, "0", ("deep", 0.0), score=True))
        assert switched.prompt_logprobs == lora.prompt_logprobs
        both = await harness.run(make_request(prompt, "0", "deep", score=True))
        assert both.prompt_logprobs not in (alone.prompt_logprobs, lora.prompt_logprobs)
        with pytest.raises(InvalidRequestError, check=says("SEVERAL_FIRST_PASSES")):
            await harness.run(make_request(prompt, "deep", "shallow"))


async def test_an_xlora_at_weight_0_is_the_base(tmp_path: Path) -> None:
    """In every step, the rows of the X-LoRA get scalings that no adapter reads."""
    base = twin("llama")
    save_all(base.model, tmp_path, "deep")
    prompt = prompt_of(20, 4)
    async with serve(base, tmp_path, dtype="bfloat16", adapters=[*COMPONENTS, "deep"]) as harness:
        switched = await harness.run(make_request(prompt, ("deep", 0.0), max_tokens=5))
        plain = await harness.run(make_request(prompt, max_tokens=5))
        assert switched.bits == plain.bits


async def test_a_prompt_that_needs_all_blocks_twice_is_refused(tmp_path: Path) -> None:
    base = twin("llama")
    save_all(base.model, tmp_path, "shallow")
    adapters = [*COMPONENTS, "shallow"]
    # 64 blocks in fp32, including one for padding.
    async with serve(base, tmp_path, adapters=adapters, kv_cache_bytes=1 << 20) as harness:
        assert 496 <= harness.engine.max_model_len < 1000
        assert (await harness.run(make_request(prompt_of(496 - 3), "shallow", max_tokens=3))).text
        with pytest.raises(PromptTooLongError):
            await harness.run(make_request(prompt_of(496 - 2), "shallow", max_tokens=3))
        assert (await harness.run(make_request(prompt_of(496 - 2), max_tokens=3))).text


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter needs CPU tensors")
@pytest.mark.long
async def test_the_gpu_path_equals_peft(tmp_path: Path) -> None:
    """The X-LoRA runs alongside the base, a LoRA and another X-LoRA with its own first pass."""
    base = twin("llama")
    oracles = save_all(base.model, tmp_path, "deep", "constant")
    names = [None, "deep", "constant", "0", "deep"]
    asked = [(name, prompt_of(n, n)) for name, n in zip(names, (40, 70, 30, 5, 3), strict=True)]
    async with gpu_serving(base.folder, tmp_path, [*COMPONENTS, *oracles]) as harness:
        answers = await harness.run_all([make_request(p, n, max_tokens=3) for n, p in asked])
        scored = await harness.run(make_request(asked[1][1], "deep", score=True))
        # Captured steps of other requests, before and after, are not affected.
        again = await harness.run(make_request(asked[0][1], max_tokens=3))
    for (name, prompt), answer in zip(asked, answers, strict=True):
        model: Any = oracles.get(name or "", base.model)
        if name == "0":
            model = load_adapter(base.model, tmp_path / "0")
        check_greedy(answer, model, prompt, f"{name}")
    check_score(scored, oracles["deep"], asked[1][1], "deep")
    assert again.token_ids == answers[0].token_ids


@pytest.mark.parametrize("name", ["deep", pytest.param("constant", marks=pytest.mark.long)])
async def test_bfloat16_is_as_close_as_peft_in_bfloat16(name: str, tmp_path: Path) -> None:
    base = twin("llama", torch.bfloat16)
    save_loras(base.model, tmp_path, strength=0.3)
    exact = save_xlora(base.model, tmp_path, name, **KINDS[name])
    rounded: Any = copy.deepcopy(exact).bfloat16()
    rounded.base_model.internal_xlora_classifier.dtype = torch.bfloat16
    await check_rounding(base, tmp_path, [*COMPONENTS, name], exact, rounded)


# The files of an X-LoRA, and their conversion by ``turret convert``.


LAYERS = "internal_xlora_classifier.layers"
CLASSIFIER = f"base_model.{LAYERS}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRAs and a layerwise X-LoRA on ``tiny_llama``, as saved by PEFT and as converted."""
    root = tmp_path_factory.mktemp("xlora")
    model = make_llama()
    save_loras(model, root)
    save_xlora(model, root, "deep", **KINDS["deep"])
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "root"))


def lower(root: Path, base: BaseModel | None = None) -> Lowered:
    return lower_with_components(root, "deep", base or base_of(make_llama()), "012")


def refusal(root: Path) -> AdapterCheckpointError:
    with pytest.raises(AdapterCheckpointError) as caught:
        lower(root)
    return caught.value


def convert(root: Path, *more: str) -> int:
    return main(["convert", str(root / "deep-saved"), "--output", str(root / "new"), *more])


def test_every_key_that_peft_writes_has_a_rule(root: Path) -> None:
    checkpoint = read_adapter(root, "deep")
    fields = {field.name for field in dataclasses.fields(XLoraConfig)}
    assert fields | checkpoint.config.keys() <= method_for(checkpoint).rules.keys()


def test_an_xlora_declares_its_first_pass(root: Path) -> None:
    lowered = lower(root)
    facts = lowered.facts(read_adapter(root, "deep"), "xlora")
    assert (facts.first_pass, facts.method) == ("base", "xlora")
    assert len(facts.components) == 3
    edit_config(root / "deep", scaling_pass_value=0.5)
    lowered = lower(root)
    assert lowered.facts(read_adapter(root, "deep"), "xlora").first_pass == "adapter"
    assert lowered.operators.router is not None
    # top_k_lora also applies to constant scalings; of equal ones, the first are kept.
    assert lowered.operators.router.first_pass == (0.5, 0.5, 0.0)


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"components": ...}, "components", "PART_OF_XLORA"),
        ({"top_k_lora": 4}, "top_k_lora", "NOT_IN_RANGE"),
        ({"softmax_temperature": 0}, "softmax_temperature", "INVALID_VALUE"),
        ({"xlora_depth": 2}, f"{CLASSIFIER}.6.weight", "UNKNOWN_TENSOR"),
        ({"xlora_depth": 4}, f"{LAYERS}.9", "PART_OF_XLORA"),
        ({"xlora_dropout_p": 0.0}, f"{CLASSIFIER}.3.bias", "UNKNOWN_TENSOR"),
        ({"layerwise_scalings": False}, "internal_xlora_classifier", "WRONG_COUNT"),
        ({"xlora_size": 21}, f"{LAYERS}.0.weight", "WRONG_SHAPE"),
        ({"hidden_size": 32}, f"{LAYERS}.0.weight", "WRONG_SHAPE"),
        ({"what": 1}, "what", "UNKNOWN_FIELD"),
    ],
)
def test_an_error_names_the_contradictory_field(
    changes: dict[str, Any], field: str, reason: str, root: Path
) -> None:
    edit_config(root / "deep", **changes)
    assert (field, reason) in [(name, why.reason) for name, why in refusal(root).violations]


def test_a_classifier_without_its_first_layer_is_refused(root: Path) -> None:
    edit_tensors(
        root / "deep", lambda t: {name: v for name, v in t.items() if ".layers.0." not in name}
    )
    found = {name: why.reason for name, why in refusal(root).violations}
    assert found[f"{LAYERS}.0"] == "PART_OF_XLORA"


def test_states_of_another_base_are_a_mismatch(root: Path) -> None:
    base = dataclasses.replace(base_of(make_llama()), hidden_size=65)
    with pytest.raises(AdapterMismatchError, check=says("DIFFERS_FROM_BASE", expected=65)):
        lower(root, base)


def test_a_component_that_is_not_a_plain_lora_is_rejected(root: Path) -> None:
    edit_config(root / "0", use_dora=True)
    names = [name for name in linear_modules(make_llama()) if name.endswith("q_proj")]
    assert names
    edit_tensors(
        root / "0",
        lambda t: {
            **t,
            **{
                name.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(len(v))
                for name, v in t.items()
                if name.endswith("lora_B.weight")
            },
        },
    )
    config = json.loads((root / "deep" / "adapter_config.json").read_text())
    config["components"][0]["digest"] = read_adapter(root, "0").digest
    edit_config(root / "deep", components=config["components"])
    assert says("UNFIT_COMPONENT", method="dora")(refusal(root))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "glm4", "granitemoehybrid", "phi3"])
def test_modules_are_counted_in_pefts_order(architecture: str) -> None:
    config = tiny_config(architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    arch = read_arch(config)
    ours = [
        f"model.layers.{number}.{path}"
        for number in range(2)
        for name, slices in arch.linears().items()
        if arch.has(number, name)
        for path, _, _ in slices
    ]
    base: Any = SimpleNamespace(model_type=arch.model_type, modules=[*ours, "lm_head"])
    assert modules_in_order(base) == linear


def test_layers_that_peft_does_not_save_are_restored(root: Path) -> None:
    """PEFT does not save all layers of an X-LoRA, which is why turret converts it.

    Once PEFT saves all layers, the main file can be read directly.
    """
    saved = load_file(root / "deep-saved" / "adapter_model.safetensors")
    assert f"{CLASSIFIER}.0.weight" not in saved
    whole = load_file(root / "deep" / "adapter_model.safetensors")
    assert sorted(whole) == sorted(
        f"{CLASSIFIER}.{n}.{kind}" for n in (0, 3, 6) for kind in ("weight", "bias")
    )
    # The LoRAs equal the originals byte for byte.
    assert read_adapter(root, "1").digest == read_adapter(root, "b").digest


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The reasons of the messages that a conversion produces, in order."""
    found: list[str] = []

    def record(reason: str, **params: Any) -> Text:
        found.append(reason)
        return say(reason, **params)

    monkeypatch.setattr(xlora, "say", record)
    return found


def test_loras_that_have_moved_are_named(root: Path, reasons: list[str]) -> None:
    config = json.loads((root / "deep-saved" / "adapter_config.json").read_text())
    gone = dict.fromkeys(config["adapters"], "/nowhere/at/all")
    edit_config(root / "deep-saved", adapters=gone)
    assert convert(root) == 1
    wrong = [f"--lora={root / name}" for name in "bac"]
    assert convert(root, *wrong) == 1
    assert convert(root, *wrong[:2]) == 1
    assert reasons == ["XLORA_NO_ORIGINAL", "XLORA_OTHER_LORA", "LORA_COUNT"]
    assert convert(root, *(f"--lora={root / name}" for name in "abc")) == 0
    assert read_adapter(root / "new", "xlora").config["components"] == [
        {"name": str(number), "digest": read_adapter(root, name).digest}
        for number, name in enumerate("abc")
    ]


def test_more_than_ten_loras_keep_their_order(root: Path) -> None:
    """PEFT sorts the keys, so 10 precedes 2; the classifier's outputs are in numerical order."""
    loras = ["abc"[number % 3] for number in range(11)]
    made = save_xlora(make_llama(), root, "many", loras=loras, **KINDS["shallow"])
    active = made.base_model.lora_model.active_adapters  # type: ignore[union-attr]
    assert active == [str(number) for number in range(11)]
    assert read_adapter(root, "many").config["components"] == [
        {"name": str(number), "digest": read_adapter(root, name).digest}
        for number, name in enumerate(loras)
    ]


def test_parts_that_cannot_be_restored_are_reported(root: Path, reasons: list[str]) -> None:
    edit_config(root / "deep-saved", use_trainable_adapters=True)
    assert convert(root) == 1
    edit_config(root / "deep-saved", use_trainable_adapters=False)
    shutil.rmtree(root / "deep-saved" / "0")
    assert convert(root) == 1
    edit_config(root / "deep-saved", adapters={"sql": "a", "json": "b"})
    assert convert(root) == 1
    assert reasons == ["XLORA_TRAINED_LORAS", "XLORA_NO_CLASSIFIER", "XLORA_NAME"]
    assert not (root / "new").exists()


def test_files_of_older_peft_versions_are_copied_unchanged(root: Path) -> None:
    """The files are complete: the main one has the classifier, the folders have only LoRAs."""
    folder = root / "deep-saved"
    shutil.copy(root / "deep" / "adapter_model.safetensors", folder)
    edit_config(folder, use_trainable_adapters=True, adapters=dict.fromkeys("012", "/gone"))
    for number, name in enumerate("abc"):
        tensors = load_file(root / name / "adapter_model.safetensors")
        edit_tensors(
            folder / str(number),
            lambda _, tensors=tensors: {
                name.replace("base_model.model.", "base_model.lora_model.model."): tensor
                for name, tensor in tensors.items()
            },
        )
    assert convert(root) == 0
    for number, name in enumerate("abc"):
        made = load_file(root / "new" / str(number) / "adapter_model.safetensors")
        assert made.keys() == load_file(root / name / "adapter_model.safetensors").keys()
    for name in ("0", "1", "2", "deep"):
        shutil.rmtree(root / name)
        shutil.copytree(root / "new" / name.replace("deep", "xlora"), root / name)
    assert lower(root).operators.router is not None
