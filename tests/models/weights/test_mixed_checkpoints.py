"""Modules that a 4-bit checkpoint keeps in 16 bits are served in 16 bits.

The oracle is transformers with bitsandbytes on the same checkpoint.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from builders.bases.mixed_checkpoints import UNSLOTH, load_4bit, save_4bit, tensors_4bit
from builders.bases.tiny_models import save_tiny_model
from builders.methods import load_adapter, make_config, save_adapter
from method_oracle import (
    check_batch,
    check_effect,
    check_request,
    check_score,
    check_within_peer,
    found_scores,
    prompt_of,
    prompt_scores,
)
from safetensors.torch import load_file, save_file
from said import says
from servers.engine_harness import Asked, EngineHarness, make_request
from servers.gpu_serving import gpu_serving

from turret.kernels.cpu import library
from turret.server.cli import main
from turret.server.command.preflight import problems
from turret.server.config import Config, ModelConfig
from turret.server.errors import InvalidRequestError
from turret.server.models.describe import describe_base
from turret.server.models.loader import load_decoder
from turret.server.models.model_source import (
    HEAD_COPY,
    modules_in_16_bits,
    resolve_model,
    stored_weights,
)
from turret.server.models.weights.nf4 import (
    DenseLinear,
    DequantizedLinear,
    MixedLinear,
    Nf4Weight,
    PackedLinear,
    dequantize_stored,
)
from turret.training.base_model import empty_model, find_base, load_model

# The form of 4-bit weights on this processor.
QUANTIZED = PackedLinear if library() is not None else DequantizedLinear
# Modules of their own, all of a fused projection, some of it, and none.
LAYOUTS: dict[str, Sequence[str]] = {
    "unsloth": UNSLOTH,
    "members": ("lm_head", "v_proj", "up_proj"),
    "first": ("lm_head", "layers.1.self_attn.q_proj", "gate_proj"),
    "none": (),
}
# Every operator, and both ways in which inputs change.
METHODS = (
    *("lora", "dora", "loha", "lokr", "ia3", "ln_tuning", "vera", "oft", "boft", "road"),
    *("c3a", "hira", "fourierft", "shira", "miss", "glora"),
)


@dataclass(frozen=True)
class Mixed:
    """A checkpoint, and what transformers makes of it in fp32 and in bf16."""

    folder: Path
    exact: Any
    half: Any


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Mixed]:
    made: dict[tuple[str, str], Mixed] = {}

    def make(architecture: str, layout: str) -> Mixed:
        if (architecture, layout) not in made:
            folder = tmp_path_factory.mktemp(f"{architecture}-{layout}")
            plain = save_tiny_model(architecture, folder / "plain")
            packed = save_4bit(plain, folder / "packed", LAYOUTS[layout])
            made[architecture, layout] = Mixed(packed, *load_4bit(packed))
        return made[architecture, layout]

    return make


def save_methods(model: Mixed, root: Path, methods: Sequence[str] = METHODS) -> None:
    for seed, method in enumerate(methods):
        save_adapter(model.exact, make_config(method), root / method, seed=seed)


@pytest.mark.parametrize(
    ("architecture", "layout"),
    [("llama", layout) for layout in LAYOUTS] + [("qwen2", "members"), ("phi3", "unsloth")],
)
async def test_equals_transformers_and_bitsandbytes(
    mixed: Any, architecture: str, layout: str
) -> None:
    model = mixed(architecture, layout)
    async with EngineHarness.start(model.folder) as harness:
        for prompt in (prompt_of(37, 1), prompt_of(6, 2)):
            await check_request(harness, model.exact, prompt, max_tokens=6)


async def check_errors(model: Mixed, prompts: Sequence[list[int]]) -> None:
    """Compare the errors in bf16 of turret and of transformers."""
    ours, theirs = [], []
    async with EngineHarness.start(model.folder, dtype="bfloat16") as harness:
        for prompt in prompts:
            expected = prompt_scores(model.exact, prompt)
            scored = await harness.run(make_request(prompt, score=True))
            ours.append(found_scores(scored) - expected)
            theirs.append(prompt_scores(model.half, prompt) - expected)
    check_within_peer(ours, theirs, "bfloat16")


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_bfloat16_is_as_exact_as_bitsandbytes(mixed: Any, layout: str) -> None:
    prompts = [prompt_of(length, length) for length in (60, 150, 200, 97)]
    await check_errors(mixed("llama", layout), prompts)


@pytest.mark.long
async def test_real_weights_are_as_exact_as_bitsandbytes(tmp_path: Path) -> None:
    """The first layers of SmolLM2, whose activations are far larger than random ones."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from turret.server.models.sources.check import default_cache_dir, find_gguf
    from turret.server.models.sources.gguf_file import open_gguf

    found = open_gguf(find_gguf())
    found.config.num_hidden_layers = 6
    model = AutoModelForCausalLM.from_config(found.config, dtype=torch.bfloat16)
    model.load_state_dict({n: t.to(torch.bfloat16) for n, t in found.tensors}, strict=False)
    model.save_pretrained(tmp_path / "plain")
    files = resolve_model(None, default_cache_dir()).files
    tokenizer = AutoTokenizer.from_pretrained(files)
    tokenizer.save_pretrained(tmp_path / "plain")
    packed = save_4bit(tmp_path / "plain", tmp_path / "packed", UNSLOTH)
    text = (Path(__file__).parents[3] / "README.md").read_text()
    # The first token is an attention sink whose log probability small errors move by nats.
    prompts = [tokenizer.encode(text)[start : start + 90] for start in (0, 200, 400)]
    await check_errors(Mixed(packed, *load_4bit(packed)), prompts)


@pytest.mark.parametrize("layout", ["unsloth", "members"])
async def test_adapters_of_every_kind_equal_peft(mixed: Any, tmp_path: Path, layout: str) -> None:
    model = mixed("qwen2", layout)
    save_methods(model, tmp_path)
    prompt = prompt_of(37, 1)
    async with EngineHarness.start(
        model.folder, tmp_path, adapters=METHODS, max_num_batched_tokens=24, max_num_seqs=8
    ) as harness:
        for method in METHODS:
            oracle = load_adapter(model.exact, tmp_path / method)
            check_effect(oracle, model.exact, prompt, method)
            scored = await harness.run(make_request(prompt, method, score=True))
            check_score(scored, oracle, prompt, method)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter needs CPU tensors")
@pytest.mark.long
@pytest.mark.parametrize("layout", ["unsloth", "members"])
async def test_the_gpu_path_equals_peft(mixed: Any, tmp_path: Path, layout: str) -> None:
    model, methods = mixed("qwen2", layout), ("lora", "dora", "oft")
    save_methods(model, tmp_path, methods)
    async with gpu_serving(model.folder, tmp_path, methods) as harness:
        asked = [(name, prompt_of(9, 1)) for name in (None, *methods)]
        await check_batch(harness, model.exact, tmp_path, asked, max_tokens=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["unsloth", "members"])
async def test_a_mixed_batch_has_the_bits_of_lone_requests(
    mixed: Any, tmp_path: Path, layout: str, dtype: str
) -> None:
    model = mixed("qwen2", layout)
    save_methods(model, tmp_path)
    mixes: list[list[Asked]] = [[], *([method] for method in METHODS)]
    mixes += [["lora", ("oft", 0.5)], ["ia3", "road"]]
    requests = [
        make_request(prompt_of(5 + 7 * (n % 4), n), *mix, max_tokens=5)
        for n, mix in enumerate(mixes)
    ]
    async with EngineHarness.start(
        model.folder, tmp_path, adapters=METHODS, dtype=dtype, max_num_batched_tokens=96
    ) as harness:
        await harness.run_together_and_alone(requests)


def bases(folder: Path, **options: Any) -> dict[str, type]:
    source = resolve_model(folder, folder.parent / "cache", **options)
    decoder = load_decoder(source, dtype=torch.bfloat16, device=torch.device("cpu"))
    names = ("qkv", "o", "gate_up", "down")
    return {
        f"{number}.{name}": type(getattr(layer, name).base)
        for number, layer in enumerate(decoder.layers)
        for name in names
    }


def test_the_file_determines_which_modules_are_in_16_bits(mixed: Any) -> None:
    folder = mixed("llama", "unsloth").folder
    found = bases(folder)
    dense = {name for name, kind in found.items() if kind is DenseLinear}
    assert dense == {"0.qkv", "0.o", "1.down"}
    assert {kind for name, kind in found.items() if name not in dense} == {QUANTIZED}
    assert len(modules_in_16_bits(folder)) == 5
    assert bases(mixed("llama", "members").folder)["0.qkv"] is MixedLinear
    assert modules_in_16_bits(mixed("llama", "none").folder) == []


def test_quantize_all_makes_another_base(mixed: Any) -> None:
    folder = mixed("llama", "unsloth").folder
    assert set(bases(folder, quantizes_all=True).values()) == {QUANTIZED}
    for layout, count in (("unsloth", 2), ("none", 1)):
        folder = mixed("llama", layout).folder
        digests = {
            resolve_model(folder, folder.parent / "cache", quantizes_all=all_of_them).digest
            for all_of_them in (False, True)
        }
        assert len(digests) == count


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block", [64, 128, 4096])
def test_blocks_of_any_multiple_of_64_keep_their_values(block: int, double: bool) -> None:
    weight = torch.randn(96, 160)  # Blocks span rows.
    packed, state = bnb_functional.quantize_4bit(
        weight, blocksize=block, quant_type="nf4", compress_statistics=double
    )
    parts = {f"w.{key}": value for key, value in state.as_dict(packed=True).items()}
    made = Nf4Weight.from_tensors("w", {"w": packed, **parts})
    assert made is not None
    expected = dequantize_stored("w", {"w": packed, **parts})
    assert torch.equal(made.dequantize(torch.float32), expected)
    assert (expected - weight).norm() < 0.13 * weight.norm()


def store_in_blocks(packed: Path, plain: Path, block: int) -> None:
    """Replace a weight of a 4-bit checkpoint with one in NF4 with another block size."""
    name = "model.layers.0.mlp.down_proj.weight"
    file = packed / "model.safetensors"
    tensors, originals = load_file(file), load_file(plain / "model.safetensors")
    codes, state = bnb_functional.quantize_4bit(originals[name], blocksize=block, quant_type="nf4")
    tensors = {key: t for key, t in tensors.items() if not key.startswith(name)}
    states = state.as_dict(packed=True).items()
    save_file({**tensors, name: codes, **{f"{name}.{k}": v for k, v in states}}, file)


@pytest.mark.parametrize(("kind", "block"), [("fp4", 64), ("nf4", 32)])
def test_other_codes_are_requantised(tmp_path: Path, kind: str, block: int) -> None:
    plain = save_tiny_model("llama", tmp_path / "plain")
    packed = tmp_path / "packed"
    save_4bit(plain, packed, ("lm_head", "q_proj"), bnb_4bit_quant_type=kind)
    if block != 64:
        store_in_blocks(packed, plain, block)
    source = resolve_model(packed, tmp_path / "cache")
    decoder = load_decoder(source, dtype=torch.float32, device=torch.device("cpu"))
    found = {(k.module, k.state): k for k in decoder.fidelity.kinds()}
    assert found["q_proj", "16-bit"].count == 2
    requantized = found["down_proj", "requantized"]
    assert requantized.source == kind
    assert requantized.count == (2 if kind == "fp4" else 1)
    inspected = {(k.module, k.state, k.source): k.count for k in stored_weights(source).kinds()}
    assert inspected == {(k.module, k.state, k.source): k.count for k in found.values()}
    assert 0.01 < (requantized.relative_error or 0) < 0.15


def with_experts_in_16_bits(tmp_path: Path) -> tuple[Path, Path]:
    """A mixture, and its 4-bit checkpoint in which an expert's weights are dequantised."""
    plain = save_tiny_model("mixtral", tmp_path / "plain")
    cached = resolve_model(plain, tmp_path / "cache" / "turret")
    packed = tmp_path / "packed"
    shutil.copytree(plain, packed)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (packed / "config.json").write_text(json.dumps(config))
    tensors = tensors_4bit(cached)
    for name in [n for n in tensors if ".experts.1." in n and n.endswith(".weight")]:
        parts = {key: t for key, t in tensors.items() if key.startswith(name)}
        for key in parts:
            del tensors[key]
        tensors[name] = dequantize_stored(name, parts)
    save_file(tensors, packed / "model.safetensors")
    assert modules_in_16_bits(packed)
    return plain, packed


def test_the_layout_of_the_cache_is_not_read_from_a_checkpoint(tmp_path: Path) -> None:
    """The kernels trust the sizes in the cache, but a checkpoint may come from anybody."""
    plain = save_tiny_model("llama", tmp_path / "plain")
    packed = save_4bit(plain, tmp_path / "packed", ("lm_head",))
    path = "model.layers.0.self_attn.o_proj.weight"
    for folder in plain, packed:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for names in ((f"{path}:packed", f"{path}:absmax"), HEAD_COPY):
            save_file(tensors | {name: torch.ones(1) for name in names}, file)
            with pytest.raises(InvalidRequestError, check=says("TENSORS_UNEXPECTED")):
                bases(folder)


async def test_experts_in_16_bits(tmp_path: Path) -> None:
    """An expert whose weights are dequantised ones gives the answers of the quantised expert."""
    plain, packed = with_experts_in_16_bits(tmp_path)
    prompt, scores = prompt_of(20), []
    for folder in (plain, packed):
        async with EngineHarness.start(folder) as harness:
            scored = await harness.run(make_request(prompt, score=True))
            scores.append([p for p in scored.prompt_logprobs if p is not None])
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


async def test_skipped_modules_of_a_plain_checkpoint(tmp_path: Path) -> None:
    """The result is what bitsandbytes makes with the same list, even when it is read again."""
    plain = save_tiny_model("llama", tmp_path / "plain")
    skip = ("layers.1.mlp.down_proj", r"model\.layers\.0\.self_attn\.[qk]_proj", "lm_head")
    packed = save_4bit(plain, tmp_path / "packed", skip)
    exact, _ = load_4bit(packed)
    expected = bases(packed)
    assert MixedLinear in expected.values()
    cache = tmp_path / "cache"
    for time in range(2):
        told: list[Any] = []
        source = resolve_model(plain, cache, lambda *said: told.append(said), skip_modules=skip)  # noqa: B023
        decoder = load_decoder(source, dtype=torch.float32, device=torch.device("cpu"))
        base = describe_base(decoder, source)
        for name, module in base.modules.items():
            weight = exact.get_submodule(name).weight
            assert torch.equal(module.dequantize(), weight), name
        found = {(kind.module, kind.state): kind for kind in decoder.fidelity.kinds()}
        assert found["down_proj", "16-bit"].count == found["down_proj", "quantized"].count == 1
        assert found["q_proj", "16-bit"].relative_error is None
        assert 0.05 < (found["v_proj", "quantized"].relative_error or 0) < 0.15
        assert bool(told) is (time == 0)
    source = resolve_model(plain, cache, skip_modules=skip)
    assert source.digest != resolve_model(plain, cache).digest
    assert modules_in_16_bits(source.weights) == modules_in_16_bits(packed)


def test_a_pattern_that_matches_nothing_is_rejected(mixed: Any, tmp_path: Path) -> None:
    plain = save_tiny_model("llama", tmp_path / "plain")
    with pytest.raises(InvalidRequestError) as raised:
        resolve_model(plain, tmp_path / "cache", skip_modules=("q_porj",))
    ((field, text),) = raised.value.violations
    assert field == "skip_modules"
    assert says("UNKNOWN_MODULE", closest="q_proj")(text)
    for pattern in ("", "(", "layers.2.mlp"):
        with pytest.raises(InvalidRequestError, check=says("UNKNOWN_MODULE")):
            resolve_model(plain, tmp_path / "cache", skip_modules=(pattern,))
    folder = mixed("llama", "unsloth").folder
    with pytest.raises(InvalidRequestError, check=says("ALREADY_QUANTIZED")):
        resolve_model(folder, tmp_path / "cache", skip_modules=("q_proj",))
    # The checks before the start give the same answers.
    for model, skip, reason in (
        (plain, "q_porj", "UNKNOWN_MODULE"),
        (folder, "q_proj", "ALREADY_QUANTIZED"),
    ):
        config = Config(model=ModelConfig(model=model, skip_modules=(skip,)))
        found = [v for v in problems(config) if v.field == "model.skip_modules"]
        assert [violation.text.reason for violation in found] == [reason]
    config = Config(model=ModelConfig(model=plain, skip_modules=("q_proj", "lm_head")))
    assert [v for v in problems(config) if v.field == "model.skip_modules"] == []


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[tuple[str, str], Any]:
    assert main(["model", "inspect", *arguments, "--json"]) == 0
    modules = json.loads(capsys.readouterr().out)["modules"]
    return {(each["module"], each["state"]): each for each in modules}


async def test_the_report_of_a_model(
    mixed: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tiny_model: Any,
) -> None:
    packed = mixed("llama", "unsloth").folder
    found = inspected(capsys, str(packed))
    assert found["down_proj", "as-stored"]["count"] == found["down_proj", "16-bit"]["count"] == 1
    assert found["q_proj", "16-bit"]["relative_error"] is None
    found = inspected(capsys, str(packed), "--quantize-all")
    assert found["q_proj", "quantized"]["count"] == 1
    plain = tiny_model("llama")
    skip = ("--skip-modules", "v_proj")
    assert inspected(capsys, str(plain), *skip)["q_proj", "quantized"]["relative_error"] is None
    source = resolve_model(plain, tmp_path / "cache" / "turret", skip_modules=["v_proj"])
    everything = resolve_model(
        plain, tmp_path / "cache" / "turret", skip_modules=["v_proj"], quantizes_all=True
    )
    assert everything == source
    found = inspected(capsys, str(plain), *skip)
    assert found["v_proj", "16-bit"]["count"] == found["q_proj", "quantized"]["count"] == 2
    weights = load_file(plain / "model.safetensors")
    served = describe_base(
        load_decoder(source, dtype=torch.float32, device=torch.device("cpu")), source
    )
    names = [name for name in served.modules if name.endswith("q_proj")]
    stored = torch.stack([weights[f"{name}.weight"].float() for name in names])
    error = torch.stack([served.modules[name].dequantize() for name in names]) - stored
    expected = float(error.norm() / stored.norm())
    assert found["q_proj", "quantized"]["relative_error"] == pytest.approx(expected, rel=1e-3)
    assert stored_weights(source).storage() == served.weights
    assert main(["model", "inspect", str(plain), "--skip-modules", "w_prjo"]) == 1
    with caplog.at_level(logging.INFO):
        async with EngineHarness.start(packed) as harness:
            info = harness.backend.model_info
    (fields,) = [r.fields for r in caplog.records if r.getMessage() == "model loaded"]  # type: ignore[attr-defined]
    assert fields["digest"] == info.digest
    assert "1 down_proj 16-bit" in fields["weights"]


@pytest.mark.parametrize("kind", ["nf4", "fp4", "large blocks", "experts"])
def test_training_uses_the_served_weights(kind: str, tmp_path: Path) -> None:
    if kind == "experts":
        _, packed = with_experts_in_16_bits(tmp_path)
    else:
        plain = save_tiny_model("llama", tmp_path / "plain")
        code = "fp4" if kind == "fp4" else "nf4"
        packed = save_4bit(plain, tmp_path / "packed", UNSLOTH, bnb_4bit_quant_type=code)
        if kind == "large blocks":
            store_in_blocks(packed, plain, 128)
    base = find_base(packed)
    model = load_model(base, "nf4", torch.float32, "cpu")
    kept = set(modules_in_16_bits(packed))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            stored = name.replace(".mlp.experts.", ".block_sparse_moe.experts.")
            assert isinstance(module, Linear4bit) is (stored not in kept), name
    decoder = load_decoder(base.source, dtype=torch.float32, device=torch.device("cpu"))
    served = describe_base(decoder, base.source)
    for name in [name for name in served.modules if ".layers." in name]:
        module: Any = model.get_submodule(name)
        is_nf4 = isinstance(module, Linear4bit)
        weight = module.dequantize(torch.float32) if is_nf4 else module.weight
        assert torch.equal(weight.float(), served.modules[name].dequantize()), name
    empty = empty_model(base, "nf4", torch.float32, "cpu")
    for name, module in empty.named_modules():
        if isinstance(module, torch.nn.Linear) and name in served.modules and name != "lm_head":
            assert isinstance(module, Linear4bit) is (name not in kept), name
