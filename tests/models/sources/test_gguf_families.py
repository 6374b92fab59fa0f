"""A GGUF file of each family equals the directory from which it was converted.

Files are written by llama.cpp's rules (``builders/bases/gguf_converters.py``) in BF16, like the
tiny checkpoints. The served weights must have the same bytes, and ``Arch`` must be the same. The
directory's config contains the values that llama.cpp assumes and no key stores.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from builders.bases.gguf_files import write_gguf
from builders.bases.tiny_models import save_tiny_model
from gguf import GGMLQuantizationType as Kind
from gguf_oracle import assert_alike
from method_oracle import prompt_of
from safetensors.torch import load_file, save_file
from said import says
from servers.engine_harness import EngineHarness, make_request
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

from turret.server.errors import InvalidRequestError
from turret.server.models.decoding.arch import Projections
from turret.server.models.families import read_arch
from turret.server.models.model_source import resolve_model
from turret.server.models.sources.check import check_model, default_cache_dir
from turret.server.models.sources.gguf_file import open_gguf

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
# Kind of tiny model → changes to the config that files of its family can store, and further keys.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma": ({}, {}),
    "gemma2": ({"query_pre_attn_scalar": 64}, {}),
    "gemma3_text": (
        {
            "query_pre_attn_scalar": 64,
            "rope_parameters": {
                "sliding_attention": PLAIN,
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
            },
        },
        # Six layers are many for a tiny model. Google's own files mention the vision tower.
        {
            "attention.sliding_window_pattern": 2,
            "mm.tokens_per_image": 256,
            "vision.block_count": 27,
        },
    ),
    "glm4": ({}, {}),
    "gpt_oss": ({"swiglu_limit": 7.0}, {}),
    "granite": ({}, {}),
    "granitemoehybrid": ({"position_embedding_type": "rope"}, {}),
    "mistral": ({"sliding_window": None, "head_dim": 32}, {}),
    "ministral3": ({}, {}),
    "mixtral": ({"sliding_window": None}, {}),
    "olmo2": ({"rope_parameters": {**YARN, "rope_theta": 500000.0}}, {}),
    "olmo3": ({}, {}),
    "olmoe": ({"norm_topk_prob": False}, {}),
    "phi3": ({}, {}),
    "qwen3_moe": ({"mlp_only_layers": [], "norm_topk_prob": True}, {}),
    "smollm3": ({}, {}),
}


async def assert_is_the_directory(file: Path, folder: Path, tmp_path: Path) -> None:
    """Check that weights, description and answers are the same."""
    # The facts that are known without torch, which check training settings.
    found = check_model(file)
    assert found.model_type == check_model(folder).model_type
    told = found.projections()
    cache = default_cache_dir()
    found, expected = resolve_model(file, cache), resolve_model(folder, cache)
    ours, theirs = (load_file(source.weights / "model.safetensors") for source in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    archs = [read_arch(AutoConfig.from_pretrained(s.files)) for s in (found, expected)]
    assert_alike(*archs)
    # Granite 4 stores its heads per layer, in values that are skipped before torch is loaded.
    expected = Projections(**{f.name: getattr(archs[0], f.name) for f in fields(Projections)})
    assert told == (None if archs[0].model_type == "granitemoehybrid" else expected)
    # The prompt exceeds windows and the switch of LongRoPE.
    request = make_request(prompt_of(70), max_tokens=4)
    answers = []
    for model in (file, folder):
        async with EngineHarness.start(model, tmp_path, dtype="float32") as harness:
            answers.append(await harness.run(request))
    assert answers[0].bits == answers[1].bits


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_gguf_file_equals_the_directory_it_was_made_from(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    changes, more = FAMILIES[family]
    folder = save_tiny_model(family, tmp_path / "model", changes=changes)
    file = tmp_path / "tiny.gguf"
    write_gguf(folder, file, Kind.BF16, more=more)
    await assert_is_the_directory(file, folder, tmp_path)


def in_mxfp4(folder: Path) -> None:
    """Store the experts as gpt-oss' own checkpoint does, with the values of llama.cpp's blocks."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "experts.down_proj"))]:
        rows = tensors.pop(name).transpose(1, 2).float().numpy()
        count, out, inner = rows.shape
        # A block is an exponent and 16 bytes; the second halves of bytes have the later codes.
        blocks = torch.from_numpy(gguf.quantize(rows, Kind.MXFP4)).view(count, out, inner // 32, 17)
        codes = torch.cat((blocks[..., 1:] & 15, blocks[..., 1:] >> 4), dim=-1)
        tensors[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        tensors[f"{name}_scales"] = blocks[..., 0].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "quantization_config": {"quant_method": "mxfp4"}}
    path.write_text(json.dumps(config))


async def test_experts_in_mxfp4_are_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt-oss is released like this, as Hugging Face's checkpoint and in ggml-org's files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    changes, more = FAMILIES["gpt_oss"]
    folder = save_tiny_model("gpt_oss", tmp_path / "model", changes=changes)
    file = tmp_path / "tiny.gguf"
    write_gguf(folder, file, Kind.BF16, more=more, experts=Kind.MXFP4)
    kinds = {t.tensor_type for t in gguf.GGUFReader(file).tensors if "_exps.weight" in t.name}
    assert kinds == {Kind.MXFP4}
    in_mxfp4(folder)
    await assert_is_the_directory(file, folder, tmp_path)
    fidelity = resolve_model(file, default_cache_dir()).fidelity
    assert fidelity is not None
    experts = [kind for kind in fidelity.kinds() if kind.module.startswith("experts.")]
    assert {(kind.state, kind.source) for kind in experts} == {("as-stored", "mxfp4")}


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_tensors_match_those_that_transformers_reads(family: str, tmp_path: Path) -> None:
    """For the families whose files transformers reads itself."""
    changes, more = FAMILIES[family]
    folder = save_tiny_model(family, tmp_path / "model", changes=changes)
    file = tmp_path / "tiny.gguf"
    write_gguf(folder, file, Kind.Q8_0, more=more)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).state_dict()
    ours = dict(open_gguf(file).tensors)
    # A tied head is in the file only once.
    assert theirs.keys() - ours.keys() <= {"lm_head.weight"}
    assert not ours.keys() - theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name].float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "more", "said"),
    [
        (
            "gemma2",
            {"attn_logit_softcapping": None},
            says("GGUF_KEY_MISSING", key="gemma2.attn_logit_softcapping"),
        ),
        (
            "phi3",
            {"rope.dimension_count": None},
            says("GGUF_KEY_MISSING", key="rope.dimension_count"),
        ),
        (
            "granite",
            {"attention.head_count_kv": [2, 1]},
            says("GGUF_HEADS_DIFFER"),
        ),
        (
            "granite",
            {"deepstack_mapping": [0, 1]},
            says("GGUF_KEY_UNSUPPORTED", key="granite.deepstack_mapping"),
        ),
        ("smollm3", {"rope.scaling.attn_factor": 2.0}, says("GGUF_ROPE_UNSUPPORTED")),
        (
            "qwen3_moe",
            {"rope.freq_base_swa": 5.0},
            says("GGUF_KEY_UNSUPPORTED", key="rope.freq_base_swa"),
        ),
    ],
)
def test_missing_and_contradictory_keys_are_rejected(
    family: str, more: dict[str, Any], said: Any, tmp_path: Path
) -> None:
    folder = save_tiny_model(family, tmp_path / "model", changes=FAMILIES[family][0])
    file = tmp_path / "tiny.gguf"
    write_gguf(folder, file, Kind.BF16, more=more)
    with pytest.raises(InvalidRequestError, check=said):
        open_gguf(file)


def test_an_incomplete_pair_of_tensors_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model("gpt_oss", tmp_path / "model")
    file = tmp_path / "tiny.gguf"
    write_gguf(folder, file, Kind.BF16, without="blk.1.ffn_up_exps.bias")
    with pytest.raises(
        InvalidRequestError, check=says("TENSOR_MISSING", name="blk.1.ffn_up_exps.bias")
    ):
        open_gguf(file)
