"""Checkpoints with all experts of a layer in one tensor: plain, MXFP4, and partly 4-bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.mixed_checkpoints import tensors_4bit
from builders.bases.tiny_models import served_weights
from builders.methods import load_adapter, make_config, save_adapter
from method_oracle import check_effect, check_greedy, prompt_of
from safetensors.torch import load_file, save_file
from said import says
from servers.engine_harness import EngineHarness, make_request
from servers.gpu_serving import gpu_serving
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.utils.quantization_config import Mxfp4Config

from turret.server.errors import InvalidRequestError
from turret.server.models.fidelity import ModuleKind
from turret.server.models.model_source import inspect_model, resolve_model
from turret.server.models.sources.expert_stacks import dequantize_mxfp4
from turret.server.models.weights.nf4 import Nf4Weight

WEIGHTS = "model.safetensors"
EXPERTS = "model.layers.1.mlp.experts"
Tensors = dict[str, torch.Tensor]


def random_codes(out: int, inner: int, *lead: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out + inner)
    shape = (*lead, out, inner // 32)
    codes = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(119, 125, shape, generator=generator, dtype=torch.uint8)
    return codes, exponents


def change(folder: Path, edit: Callable[[Tensors], Any], **config: Any) -> Path:
    """Edit the tensors of a directory, and its config."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


@pytest.fixture
def plain(tiny_model: Any) -> Path:
    return tiny_model("gpt_oss")


def same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_mxfp4_is_dequantised_as_transformers_does() -> None:
    codes, exponents = random_codes(64, 96, 3)
    found = torch.stack([dequantize_mxfp4(*pair) for pair in zip(codes, exponents, strict=True)])
    expected = convert_moe_packed_tensors(codes, exponents, dtype=torch.bfloat16)
    assert torch.equal(found, expected.mT)
    assert torch.equal(found.signbit(), expected.mT.signbit())


@pytest.mark.parametrize("exponent", [0, 1, 127, 250, 252])
def test_every_code_is_exact(exponent: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    found = dequantize_mxfp4(codes, torch.full((1, 16), exponent, dtype=torch.uint8))
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    values = torch.cat((magnitudes, -magnitudes)) * 2.0 ** (exponent - 127)
    expected = torch.stack((values.repeat(16), values.repeat_interleave(16)), -1).view(1, -1)
    assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("exponents", [(0, 20), (100, 130), (0, 253)])
def test_an_encoded_weight_has_the_same_values(exponents: tuple[int, int]) -> None:
    codes, _ = random_codes(64, 192)
    # A block of zeros, blocks of one magnitude, and one whose largest code is 1.5.
    codes[0, 0], codes[0, 1], codes[0, 2] = 0, 0x11, 0x90
    codes[1] &= 0x33
    scales = torch.randint(*exponents, (64, 6), dtype=torch.uint8)
    weight = dequantize_mxfp4(codes, scales)
    made = Nf4Weight.of_mxfp4(weight)
    assert made is not None
    stored = Nf4Weight.from_tensors("x.experts.0", made.to_tensors("x.experts.0"))
    assert stored is not None
    for found in (made, stored):
        values = found.dequantize(torch.float32)
        assert torch.equal(values, weight.float())
        assert torch.equal(values.signbit(), weight.signbit())


@pytest.mark.parametrize("value", [1.25, 7.0, float("inf"), float("nan")])
def test_other_values_are_not_encoded(value: float) -> None:
    weight = torch.zeros(32, 64)
    weight[3, 3], weight[3, 4] = value, 2.0
    assert Nf4Weight.of_mxfp4(weight) is None


def in_mxfp4(folder: Path) -> Path:
    """Replace the experts with random ones in the released layout, with codes in another file."""
    shards: dict[str, Tensors] = {"a": {}, "b": {}}

    def to_codes(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "s.down_proj"))]:
            count, inner, out = tensors.pop(name).shape
            codes, exponents = random_codes(out, inner, count)
            shards["a"][f"{name}_scales"], shards["b"][f"{name}_blocks"] = exponents, codes
        shards["a"].update(tensors)

    change(folder, to_codes, quantization_config={"quant_method": "mxfp4"})
    (folder / WEIGHTS).unlink()
    for shard, tensors in shards.items():
        save_file(tensors, folder / f"{shard}.safetensors", metadata={"format": "pt"})
    index = {name: f"{s}.safetensors" for s, tensors in shards.items() for name in tensors}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.fixture
def packed(plain: Path, tmp_path: Path) -> Path:
    return in_mxfp4(shutil.copytree(plain, tmp_path / "packed"))


def transformers_model(folder: Path) -> Any:
    """Transformers' own model of an MXFP4 checkpoint, dequantised."""
    config = Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_is_served_as_transformers_dequantises_it(
    plain: Path, packed: Path, dtype: torch.dtype
) -> None:
    found = served_weights(packed, dtype)
    theirs = transformers_model(packed).state_dict()
    experts = {name: theirs[name].mT.float() for name in found if ".experts." in name}
    assert len(experts) == 4
    same(found, served_weights(plain, dtype) | experts)


def test_mxfp4_is_reported_as_stored(packed: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "turret"
    planned = inspect_model(packed, cache).kinds()
    made = resolve_model(packed, cache).fidelity
    assert made is not None
    for kinds in (planned, made.kinds()):
        experts = [kind for kind in kinds if kind.module.startswith("experts.")]
        modules = ("experts.down_projs", "experts.gate_up_projs")
        expected = [ModuleKind(module, "as-stored", "mxfp4", 12, None) for module in modules]
        assert sorted(experts, key=lambda kind: kind.module) == expected
        assert {k.state for k in kinds if k not in experts} == {"quantized"}


PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


async def check_answers(
    packed: Path, root: Path, serve: Callable[..., Any], lengths: Sequence[int], **options: Any
) -> None:
    """Compare answers in one batch with PEFT and, bit by bit, with the same requests alone."""
    oracle = transformers_model(packed).float()
    lora = make_config("lora", target_modules=["q_proj"], target_parameters=PARAMETERS)
    save_adapter(oracle, lora, root / "a", seed=3)
    # Give the oracle the served weights of all other modules.
    served = served_weights(packed, torch.float32)
    with torch.no_grad():
        for name, weight in served.items():
            if ".experts." not in name:
                oracle.get_submodule(name).weight.copy_(weight)
    prompts = [prompt_of(length, length) for length in lengths]
    names = [("a" if n % 2 else None) for n in range(len(prompts))]
    asked = [make_request(p, n, max_tokens=4) for p, n in zip(prompts, names, strict=True)]
    async with serve(packed, root, adapters=["a"], **options) as harness:
        together = await harness.run_together_and_alone(asked)
    adapted = load_adapter(oracle, root / "a")
    check_effect(adapted, oracle, prompts[0], "a")
    if options.get("dtype") != "bfloat16":
        for name, prompt, answer in zip(names, prompts, together, strict=True):
            check_greedy(answer, adapted if name else oracle, prompt, f"{name}: {len(prompt)}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_answers_on_mxfp4_equal_peft(packed: Path, tmp_path: Path, dtype: str) -> None:
    lengths = (40, 3, 25, 1, 17, 30)
    await check_answers(packed, tmp_path, EngineHarness.start, lengths, dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter needs CPU tensors")
@pytest.mark.long
async def test_answers_on_mxfp4_equal_peft_on_the_gpu_path(packed: Path, tmp_path: Path) -> None:
    await check_answers(packed, tmp_path, gpu_serving, (9, 3))


def test_a_4bit_checkpoint_may_have_experts_in_either_form(plain: Path, tmp_path: Path) -> None:
    """Each expert is a quantised module and the router is renamed, or experts are 16-bit stacks."""
    expected = served_weights(plain, torch.float32)
    quantised = tensors_4bit(resolve_model(plain, tmp_path / "cache" / "turret"))
    stacked = load_file(plain / WEIGHTS)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}

    def to_modules(tensors: Tensors) -> None:
        tensors.clear()
        for name, tensor in quantised.items():
            tensors[name.replace(".router.", ".router.linear.")] = tensor

    def to_mixed(tensors: Tensors) -> None:
        tensors.clear()
        tensors.update({k: t for k, t in quantised.items() if ".experts." not in k})
        tensors.update({k: t for k, t in stacked.items() if ".experts." in k})

    # The modules that are left in 16 bits are served in 16 bits.
    ends = (".experts.down_proj", ".experts.gate_up_proj")
    left = {name: t.mT.float() for name, t in stacked.items() if name.endswith(ends)}
    for number, (edit, others) in enumerate(((to_modules, {}), (to_mixed, left))):
        folder = shutil.copytree(plain, tmp_path / str(number))
        change(folder, edit, quantization_config=config)
        same(served_weights(folder, torch.float32), expected | others)
    assert len(left) == 4


def put(name: str, *pairs: tuple[str, torch.Tensor]) -> Callable[[Tensors], Any]:
    """Replace a tensor with others, each of which has the same name and a suffix."""

    def edit(tensors: Tensors) -> None:
        tensors.pop(name, None)
        tensors.update({name + suffix: tensor for suffix, tensor in pairs})

    return edit


DOWN = f"{EXPERTS}.down_proj"
CODES, SCALES = random_codes(128, 192, 6)
FAULTS: dict[str, tuple[Callable[[Tensors], Any], Callable[[BaseException], bool]]] = {
    "codes": (
        lambda t: t.update({"model.layers.0.self_attn.o_proj.weight_blocks": t["x"].byte()}),
        says("TENSORS_UNEXPECTED", names="model.layers.0.self_attn.o_proj.weight_blocks"),
    ),
    "scales": (put(DOWN, ("_blocks", CODES)), says("TENSOR_MISSING", name=f"{DOWN}_scales")),
    "blocks": (
        lambda t: t.update({f"{DOWN}_scales": SCALES}),
        says("TENSOR_MISSING", name=f"{DOWN}_blocks"),
    ),
    "twice": (
        lambda t: t.update({f"{DOWN}_scales": SCALES, f"{DOWN}_blocks": CODES}),
        says("TENSORS_DUPLICATE"),
    ),
    "one scale for all": (
        put(DOWN, ("_blocks", CODES), ("_scales", SCALES[:, :, :1].clone())),
        says("NOT_MXFP4", name=f"{DOWN}_blocks", scales="uint8 [128, 1]"),
    ),
    "no codes": (
        put(DOWN, ("_blocks", CODES.int()), ("_scales", SCALES)),
        says("NOT_MXFP4", name=f"{DOWN}_blocks", found="int32 [128, 6, 16]"),
    ),
    "flat": (
        put(DOWN, ("", torch.ones(6, 192))),
        says("EXPERT_SHAPE_UNSUPPORTED", name=DOWN, found="float32 [192]"),
    ),
    "a number": (put(DOWN, ("", torch.ones(()))), says("EXPERTS_MISMATCH", name=DOWN, found=0)),
    "fewer": (
        lambda t: t.update({DOWN: t[DOWN][:5]}),
        says("EXPERTS_MISMATCH", name=DOWN, found=5, expected=6),
    ),
    "more": (
        lambda t: t.update({DOWN: torch.cat((t[DOWN], t[DOWN][:1]))}),
        says("EXPERTS_MISMATCH", name=DOWN, found=7, expected=6),
    ),
}
# Tensors that are not quantised, so their errors appear only when the model is loaded.
UNFIT = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    *(
        f"model.layers.1.{name}"
        for name in (
            "input_layernorm.weight",
            "self_attn.sinks",
            "self_attn.q_proj.bias",
            "mlp.router.weight",
            "mlp.router.bias",
            "mlp.experts.gate_up_proj_bias",
        )
    ),
)


@pytest.mark.parametrize("key", UNFIT)
def test_a_tensor_of_another_shape_is_named(key: str, plain: Path) -> None:
    # Remove a row, a head or a feature; each expert's bias loses one value.
    change(plain, lambda t: t.update({key: t[key][:, :-1] if t[key].ndim == 2 else t[key][:-1]}))
    found = key.replace("gate_up_proj_bias", "gate_up_projs.0.bias")
    with pytest.raises(InvalidRequestError, match=rf"{found} ", check=says("SHAPE_MISMATCH")):
        served_weights(plain, torch.float32)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_names_the_faulty_tensor(fault: str, plain: Path, tmp_path: Path) -> None:
    edit, check = FAULTS[fault]

    def plant(tensors: Tensors) -> None:
        tensors["x"] = torch.ones(2)
        edit(tensors)
        del tensors["x"]

    change(plain, plant)
    with pytest.raises(InvalidRequestError, check=check):
        resolve_model(plain, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("nf4-*")) == []
