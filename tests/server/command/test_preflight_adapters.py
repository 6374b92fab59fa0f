"""Which preloaded adapters a start refuses within a second, before torch is there."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.adapters import base_of, tiny_llama
from checkout import ROOT
from safetensors.numpy import load_file, save_file
from start_problems import found

from turret.server.adapters.base import BaseModule
from turret.server.adapters.checkpoint.adapter_root import AdapterRoot
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import read_checkpoint
from turret.server.adapters.checkpoint.safetensors_header import SafetensorsHeader, TensorEntry
from turret.server.adapters.methods import lower_checkpoint
from turret.server.adapters.peft_format.config.rules import is_number, is_rank
from turret.server.adapters.peft_format.refusals.early_tensors import check_tensors
from turret.server.command import preflight
from turret.server.errors import AdapterCheckpointError

ADAPTERS = ROOT / "examples" / "adapters"


def write_adapter(
    folder: Path, *, width: int = 576, module: str = "0.self_attn.q_proj", **config: Any
) -> Path:
    """A LoRA of rank 4 in PEFT's layout, of the embedded model; ``config`` changes keys."""
    shapes = {
        f"base_model.model.model.layers.{module}.lora_A.weight": (4, width),
        f"base_model.model.model.layers.{module}.lora_B.weight": (width, 4),
    }
    folder.mkdir(exist_ok=True)
    values = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(values, folder / "adapter_model.safetensors")
    targets = [module.rpartition(".")[2]]
    keys = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets, **config}
    (folder / "adapter_config.json").write_text(json.dumps(keys))
    return folder


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "LROA"}, "peft_type: 'LROA' is not supported by this version; did you mean"),
        ({"peft_type": "PSOFT"}, "peft_type: 'PSOFT' is not .* `turret convert DIR --base MODEL"),
        ({"peft_type": None}, "peft_type: is required: "),
        (
            {"r": 8},
            r"lora_A\.weight: has rank 4, the config says 8; adapter_config\.json may",
        ),
        *(({"r": r}, f"r: {is_rank(r)}$") for r in ("four", -1, 0, 4.0, True, None)),
        *(
            ({"peft_type": kind, "r": "four"}, f"r: {is_rank('four')}$")
            for kind in ("VERA", "SHIRA", "MISS", "RANDLORA")
        ),
        ({"peft_type": "WIBBLE"}, "peft_type: 'WIBBLE' is not supported by this version; docs"),
        ({"peft_type": "LOKR", "alpha": "x"}, "alpha: must be a number in .*, not 'x'$"),
        ({"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}, "was trained for 'meta-llama/"),
    ],
)
def test_adapters_whose_config_says_that_they_are_not_served(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "m", **config)
    (problem,) = found("--adapter-root", str(tmp_path), "--preload", "a=m")
    assert re.match(f"--preload a=m: (cannot be served: .*)?{said}", problem)


def test_adapters_that_the_host_budget_cannot_hold(tmp_path: Path) -> None:
    write_adapter(tmp_path / "m")
    weights = 2 * 4 * 576
    flags = ("--adapter-root", str(tmp_path), "--preload", "a=m", "--adapter-host-bytes")
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        held = (*flags, str(weights * size), "--dtype", dtype)
        assert found(*held) == []
        (problem,) = found(*flags, str(weights * size - 1), "--dtype", dtype)
        assert problem.startswith("--preload a=m: needs at least ")
        assert problem.endswith("; `turret serve --adapter-host-bytes SIZE` gives them more")
    (problem,) = found(*flags, "10")
    assert "needs at least 9 KiB of host memory, and all adapters together have 10 bytes" in problem


def test_adapters_of_another_base_where_that_is_allowed_or_not_certain(tmp_path: Path) -> None:
    flags = ("--adapter-root", str(tmp_path), "--preload", "a=m")
    folder = write_adapter(tmp_path / "m", base_model_name_or_path="meta-llama/Llama-3.1-8B")
    assert "serve the base that it was trained for" in found(*flags)[0]
    assert found(*flags, "--allow-other-base") == []
    # A digest tells more than a name, and what it is of is read with the model.
    (folder / "provenance.json").write_text('{"base": {"digest": "00"}}')
    assert found(*flags) == []
    write_adapter(tmp_path / "m", base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct")
    (folder / "provenance.json").unlink()
    assert found(*flags) == []


def test_adapters_whose_ranks_are_too_large(tmp_path: Path) -> None:
    flags = ("--adapter-root", str(tmp_path), "--preload", "a=m", "--max-rank", "3")
    write_adapter(tmp_path / "m")
    (problem,) = found(*flags)
    assert problem == (
        "--preload a=m: has rank 4, the server allows 3; `turret serve --max-rank 4` allows it"
    )
    # Which rank a pattern gives a module, the base decides; the tensors have the one they have.
    write_adapter(tmp_path / "m", r=8, rank_pattern={"q_proj": 4})
    assert found(*flags) == [problem]
    assert found(*flags[:-1], "4") == []
    write_adapter(tmp_path / "m", r=8, target_parameters=["mlp.experts.down_proj"])
    assert found(*flags) == []
    for kind in ("LOHA", "VERA", "HRA"):
        write_adapter(tmp_path / "m", peft_type=kind)
        assert found(*flags) == [problem]
        assert found(*flags[:-1], "4") == []
    write_adapter(tmp_path / "m", peft_type="LOHA", rank_pattern={"q_proj": 2})
    assert found(*flags) == []
    # Of these the config's other keys or the tensors tell.
    told: tuple[tuple[str, dict[str, Any], int], ...] = (
        ("MISS", {}, 4), ("MISS", {"init_weights": "bat"}, 0), ("SHIRA", {}, 0),
        ("GLORA", {"config_A_B": "lora"}, 4), ("GLORA", {"config_A_B": "vector"}, 0),
        ("GRALORA", {"r": 2, "gralora_k": 2, "hybrid_r": 1}, 5),
        ("LORA", {"kasa_config": {"beta": 1.0, "gamma": 1.0}}, 8),
    )  # fmt: skip
    for kind, keys, rank in told:
        write_adapter(tmp_path / "m", peft_type=kind, **keys)
        assert found(*flags[:-1], str(max(rank, 1))) == []
        assert len(found(*flags)) == (rank > 3)
    for kind, tensor, shape, said in (
        ("ADALORA", "lora_E", (5, 1), "has rank 5,"),
        ("HIRA", "hira_A", (6, 576), "has rank 6,"),
        ("DEFT", "deft_P", (576, 7), "has rank 7,"),
        ("LOKR", "lokr_w2_a", (8, 9), "has rank 9,"),
        ("BOFT", "boft_R", (2, 8, 4, 4), "has block size 8,"),
    ):
        folder = write_adapter(tmp_path / "m", peft_type=kind)
        values = {f"model.layers.0.self_attn.q_proj.{tensor}": np.ones(shape, np.float32)}
        save_file(values, folder / "adapter_model.safetensors")
        assert said in found(*flags)[0]


@pytest.mark.parametrize(
    ("width", "module", "said"),
    [
        (64, "0.self_attn.q_proj", "0.self_attn.q_proj: takes 64 features, the base model's 576"),
        (64, "29.mlp.down_proj", "29.mlp.down_proj: gives 64 features, the base model's 576"),
        (576, "30.mlp.up_proj", "it is for a model of at least 31 layers, the base has 30"),
        (576, "0.self_attn.qkv_proj", "has no module 'model.layers.0.self_attn.qkv_proj'"),
        # What these take and give, the model's other sizes say.
        (64, "0.self_attn.other", ""),
    ],
)
def test_adapters_of_other_shapes_than_the_base(
    width: int, module: str, said: str, tmp_path: Path
) -> None:
    flags = ("--adapter-root", str(tmp_path), "--preload", "a=m")
    write_adapter(tmp_path / "m", width=width, module=module)
    problems_found = found(*flags)
    assert len(problems_found) == bool(said)
    for problem in problems_found:
        assert problem.startswith("--preload a=m: does not fit base model 'HuggingFaceTB/SmolLM2-")
        assert said in problem
    # The base that it names says more than shapes do; where it may be any, they decide.
    write_adapter(tmp_path / "m", width=64, base_model_name_or_path="meta-llama/Llama-3.1-8B")
    assert "was trained for 'meta-llama/Llama-3.1-8B', served is" in found(*flags)[0]
    (problem,) = found(*flags, "--allow-other-base")
    assert "trained for 'meta-llama/Llama-3.1-8B', served is 'HuggingFaceTB/Smol" in problem
    assert "does not fit base model" in problem
    # Of these shapes the methods alone know.
    write_adapter(tmp_path / "m", width=64, use_qalora=True)
    assert found(*flags) == []


def test_shapes_of_a_base_in_a_directory(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"a": np.zeros(1, np.float32)}, base / "model.safetensors")
    (base / "tokenizer.json").touch()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2}
    flags = ("--adapter-root", str(tmp_path), "--preload", "a=m", "--model", str(base))
    write_adapter(tmp_path / "m")
    vision = {"hidden_size": 576, "model_type": "gemma3", "text_config": sizes}
    for config in ({**sizes, "model_type": "llama"}, vision):
        (base / "config.json").write_text(json.dumps(config))
        (problem,) = found(*flags)
        assert "takes 576 features, the base model's 64" in problem
    (base / "config.json").write_text('{"model_type": "llama", "hidden_size": 576}')
    assert found(*flags) == []


@pytest.mark.parametrize("tensor", ["ia3_l", "oft_R.weight"])
def test_layers_that_the_base_has_not(tensor: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "m", peft_type="IA3" if tensor == "ia3_l" else "OFT")
    module = "model.layers.99.self_attn.k_proj"
    name = f"base_model.model.{module}.{tensor}"
    save_file({name: np.ones((2, 1), np.float32)}, folder / "adapter_model.safetensors")
    (problem,) = found("--adapter-root", str(tmp_path), "--preload", "a=m")
    assert problem == (
        "--preload a=m: does not fit base model 'HuggingFaceTB/SmolLM2-135M-Instruct': it is for a"
        f" model of at least 100 layers, the base has 30; {module}.{tensor}: the base model has no"
        f" module '{module}'"
    )


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tensors_that_are_not_finite(
    dtype: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--adapter-root", str(tmp_path), "--preload", "a=m")
    file = write_adapter(tmp_path / "m") / "adapter_model.safetensors"
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.float32}
    arrays = {name: array.astype(kinds[dtype]) for name, array in load_file(file).items()}
    (first, second) = arrays
    arrays[first][:] = np.finfo(np.float16).max
    stored = "uint16" if dtype == "BF16" else None

    def save() -> None:
        if stored is None:
            save_file(arrays, file)
            return
        save_file({n: (a.view(np.uint32) >> 16).astype(stored) for n, a in arrays.items()}, file)
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + size].replace(b'"U16"', b'"BF16"')
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])

    save()
    assert found(*flags) == []
    arrays[second][-1, -1] = value
    save()
    assert found(*flags) == [
        f"--preload a=m: cannot be served: {second}: holds NaN or Inf; take a checkpoint from"
        " before that"
    ]
    # What is larger is left to the load.
    monkeypatch.setattr(preflight, "_LOOKED_AT_BYTES", 1000)
    assert found(*flags) == []


@pytest.mark.parametrize("lacking", ["lora_A", "lora_B"])
def test_adapters_that_lack_one_of_two_factors(lacking: str, tmp_path: Path) -> None:
    file = write_adapter(tmp_path / "m") / "adapter_model.safetensors"
    save_file({n: v for n, v in load_file(file).items() if lacking not in n}, file)
    (problem,) = found("--adapter-root", str(tmp_path), "--preload", "a=m")
    assert problem == (
        f"--preload a=m: cannot be served: model.layers.0.self_attn.q_proj.{lacking}.weight: is"
        " missing; other LoRA tensors are there: have PEFT save the adapter again"
    )


_Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"use_dora": True}, {}, f"{_Q}.lora_magnitude_vector: is missing; use_dora is set"),
        (
            {},
            {f"{_Q}.lora_magnitude_vector.weight": np.ones(576, np.float32)},
            f"{_Q}.lora_magnitude_vector: is there, but use_dora is not set",
        ),
        ({}, {"foo.weight": np.ones(4, np.float32)}, "foo.weight: is a whole weight; only those"),
        (
            {},
            {f"{_Q}.lora_A.weight": np.ones((4, 576), np.int8)},
            f"{_Q}.lora_A.weight: holds integers (torch.int8), which lora does not",
        ),
        (
            {"target_modules": ["proj_q"]},
            {},
            f"{_Q}.lora_A.weight: is there, but the config leaves it out; adapter_config.json may"
            " be of another training: take the one that was saved beside adapter_model.safetensors",
        ),
        *(({"lora_alpha": v}, {}, f"lora_alpha: {is_number(v)}") for v in ("x", None, 1e30, True)),
        ({"use_rslora": 1}, {}, "use_rslora: must be true or false, not 1"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights: is 'pissa': the adapter was"),
        ({"alpha_pattern": {"q": "x"}}, {}, f"alpha_pattern: 'q' {is_number('x')}"),
        ({"lora_alhpa": 8}, {}, "lora_alhpa: is unknown to this version; did you mean 'lora_al"),
        ({"wibble": 8}, {}, "wibble: is unknown to this version; if it does not change"),
        (
            {"task_type": "SEQ_CLS", "lora_alpha": "x"},
            {"score.weight": np.ones((2, 576), np.float32)},
            f"lora_alpha: {is_number('x')}",
        ),
        # These are served: all targets, a head, and a suffix of several names.
        ({"target_modules": "all-linear"}, {}, ""),
        ({"task_type": "SEQ_CLS"}, {"score.weight": np.ones((2, 576), np.float32)}, ""),
        ({"target_modules": ["self_attn.q_proj"]}, {}, ""),
        ({"target_modules": [_Q]}, {}, ""),
        (
            {"use_dora": True},
            {f"{_Q}.lora_magnitude_vector": np.ones(576, np.float32)},
            "",
        ),
    ],
)
def test_loras_whose_tensors_contradict_their_config(
    config: dict[str, Any], tensors: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """In the words of a load: what a load of the same folder says is compared."""
    folder = write_adapter(tmp_path / "m", **config)
    file = folder / "adapter_model.safetensors"
    more = {f"base_model.model.{name}": values for name, values in tensors.items()}
    save_file(load_file(file) | more, file)
    problems = found("--adapter-root", str(tmp_path), "--preload", "a=m")
    assert len(problems) == bool(said)
    if not said:
        return
    assert problems[0].startswith(f"--preload a=m: cannot be served: {said}")
    projection = BaseModule(_Q, 576, 576, None, lambda: torch.zeros(576, 576))
    base = dataclasses.replace(base_of(tiny_llama()), modules={_Q: projection})
    checkpoint = read_checkpoint(AdapterRoot(tmp_path), "m", max_elements=1 << 20)
    with pytest.raises(AdapterCheckpointError) as raised:
        lower_checkpoint(checkpoint, base)
    assert f"cannot be served: {said}" in raised.value.message


@pytest.mark.parametrize(
    ("name", "rows", "has_tokenizer"),
    [
        ("model.embed_tokens.weight", 49154, False),
        ("model.embed_tokens.base_layer.weight", 49154, False),
        ("lm_head.weight", 49154, False),
        ("lm_head.weight", 49154, True),
        # Rows that only pad the base's matrices may be missing.
        ("lm_head.weight", 49152, False),
        ("lm_head.weight", 49000, False),
    ],
)
def test_tokens_of_its_own_without_their_tokenizer(
    name: str, rows: int, has_tokenizer: bool, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "m", modules_to_save=["embed_tokens", "lm_head"])
    file = folder / "adapter_model.safetensors"
    # As wide as the base, which nothing here reads, would be 100 MB.
    save_file(load_file(file) | {f"base_model.model.{name}": np.ones((rows, 1), np.float16)}, file)
    if has_tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    problems = found("--adapter-root", str(tmp_path), "--preload", "a=m")
    said = f"rows for {rows} tokens, the base model for 49152, and only its own tokenizer tells"
    is_refused = rows > 49152 and not has_tokenizer
    assert [said in problem for problem in problems] == [True] * is_refused


def test_a_lora_without_tensors(tmp_path: Path) -> None:
    save_file({}, write_adapter(tmp_path / "m") / "adapter_model.safetensors")
    (problem,) = found("--adapter-root", str(tmp_path), "--preload", "a=m")
    assert problem.endswith("adapter_model.safetensors: holds no tensors of this method")


def test_adapters_whose_tensors_are_damaged(tmp_path: Path) -> None:
    flags = ("--adapter-root", str(tmp_path), "--preload", "a=m")
    file = write_adapter(tmp_path / "m") / "adapter_model.safetensors"
    whole = file.read_bytes()
    for damaged, said in (
        (whole[:50], "is cut short: it has 50 bytes, its header alone 2"),
        (whole[:-1], "is cut short: tensors end at 18432, the data at 18431"),
        (whole[:4], "is too short for a safetensors file"),
        (whole[:8] + b"?" + whole[9:], "is not valid JSON"),
    ):
        file.write_bytes(damaged)
        (problem,) = found(*flags)
        assert said in problem
        assert problem.endswith("; copy the file again, or have PEFT save the adapter again")
    file.write_bytes(whole)
    assert found(*flags) == []
    (tmp_path / "m" / "adapter_config.json").write_text("{")
    assert "adapter_config.json: is not valid JSON" in found(*flags)[0]


@pytest.mark.parametrize("target", ["mlp.gate", "block_sparse_moe.gate", "gate"])
@pytest.mark.parametrize("block", ["mlp", "block_sparse_moe"])
def test_a_block_of_experts_goes_by_either_name(block: str, target: str) -> None:
    """A load knows both of Mixtral's, and takes either for the other."""
    module = f"base_model.model.model.layers.0.{block}.gate"
    entries = tuple(
        TensorEntry(f"{module}.lora_{key}.weight", "F32", shape, 0, 128)
        for key, shape in (("A", (4, 8)), ("B", (8, 4)))
    )
    findings = Findings("a")
    config = {"peft_type": "LORA", "target_modules": [target]}
    check_tensors(config, SafetensorsHeader(b"", entries), findings)
    findings.raise_if_any()
    check_tensors(config | {"target_modules": ["other"]}, SafetensorsHeader(b"", entries), findings)
    with pytest.raises(AdapterCheckpointError, match="the config leaves it out"):
        findings.raise_if_any()
