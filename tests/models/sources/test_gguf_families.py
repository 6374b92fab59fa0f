"""A GGUF file of each family equals the directory from which it was converted.

Files are written by llama.cpp's rules (``builders/bases/gguf_converters.py``) in BF16, like the
tiny checkpoints. The served weights must have the same bytes, and ``Arch`` must be the same. The
directory's config contains the values that llama.cpp assumes and that no key stores.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch
from builders.bases.gguf_converters import CONVERTERS
from builders.bases.gguf_files import dequantised_copy, write_gguf
from builders.bases.published_models import PUBLISHED, Published
from builders.bases.tiny_models import save_tiny_model
from gguf import GGMLQuantizationType as Kind
from gguf_oracle import assert_alike
from method_oracle import prompt_of
from safetensors.torch import load_file, save_file
from said import says
from servers.engine_harness import EngineHarness, make_request
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

from turret.server.errors import InvalidRequestError
from turret.server.models.decoding import Projections
from turret.server.models.families import read_arch, text_config
from turret.server.models.model_source import resolve_model
from turret.server.models.sources.check import check_model, default_cache_dir
from turret.server.models.sources.gguf_file import open_gguf, read_gguf_config

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class Family:
    """How the files of a family differ from its tiny model.

    Attributes:
        changes: Changes to the tiny model's config, so that a file can store it.
        more_keys: Keys that the file has in addition.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    more_keys: dict[str, Any] = field(default_factory=dict)


# By the kind of tiny model.
FAMILIES: dict[str, Family] = {
    **{family: Family({"rope_parameters": PLAIN}) for family in ("llama", "qwen2", "qwen3")},
    "gemma": Family(),
    "gemma2": Family({"query_pre_attn_scalar": 64}),
    "gemma3_text": Family(
        {
            "query_pre_attn_scalar": 64,
            "rope_parameters": {
                "sliding_attention": PLAIN,
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
            },
        },
        # The usual pattern of six layers is long for a tiny model. Google's own files mention the
        # vision tower.
        {
            "attention.sliding_window_pattern": 2,
            "mm.tokens_per_image": 256,
            "vision.block_count": 27,
        },
    ),
    "glm4": Family(),
    "gpt_oss": Family({"swiglu_limit": 7.0}),
    "granite": Family(),
    "granitemoehybrid": Family({"position_embedding_type": "rope"}),
    "mistral": Family({"sliding_window": None, "head_dim": 32}),
    "ministral3": Family(),
    "mixtral": Family({"sliding_window": None}),
    "olmo2": Family({"rope_parameters": {**YARN, "rope_theta": 500000.0}}),
    "olmo3": Family(),
    "olmoe": Family({"norm_topk_prob": False}),
    "phi3": Family(),
    "qwen3_moe": Family({"mlp_only_layers": [], "norm_topk_prob": True}),
    "smollm3": Family(),
}


async def assert_is_the_directory(file: Path, folder: Path, tmp_path: Path) -> None:
    """Check that weights, description and answers are the same."""
    # The facts that are known without torch; training settings are checked against them.
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


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, Kind.BF16) for family in FAMILIES),
        *((f, k) for f in ("llama", "qwen2", "qwen3") for k in (Kind.F16, Kind.Q8_0, Kind.Q4_0)),
    ],
)
async def test_a_gguf_file_equals_the_directory_it_was_made_from(
    family: str, kind: Kind, tmp_path: Path, tiny_model: Any
) -> None:
    differences = FAMILIES[family]
    folder = tiny_model(family, changes=differences.changes)
    file = tmp_path / "tiny.gguf"
    write_gguf(folder, file, kind, more=differences.more_keys)
    if kind is not Kind.BF16:
        dequantised_copy(folder, kind)
    await assert_is_the_directory(file, folder, tmp_path)


def in_mxfp4(folder: Path) -> None:
    """Store the experts as gpt-oss' own checkpoint does, with the values of llama.cpp's blocks."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "experts.down_proj"))]:
        rows = tensors.pop(name).transpose(1, 2).float().numpy()
        count, out, inner = rows.shape
        # A block is an exponent and 16 bytes; the high nibbles hold the later codes.
        blocks = torch.from_numpy(gguf.quantize(rows, Kind.MXFP4)).view(count, out, inner // 32, 17)
        codes = torch.cat((blocks[..., 1:] & 15, blocks[..., 1:] >> 4), dim=-1)
        tensors[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        tensors[f"{name}_scales"] = blocks[..., 0].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "quantization_config": {"quant_method": "mxfp4"}}
    path.write_text(json.dumps(config))


async def test_experts_in_mxfp4_are_unchanged(tmp_path: Path, tiny_model: Any) -> None:
    """gpt-oss is released like this, as Hugging Face's checkpoint and in ggml-org's files."""
    differences = FAMILIES["gpt_oss"]
    folder = tiny_model("gpt_oss", changes=differences.changes)
    file = tmp_path / "tiny.gguf"
    write_gguf(folder, file, Kind.BF16, more=differences.more_keys, experts=Kind.MXFP4)
    kinds = {t.tensor_type for t in gguf.GGUFReader(file).tensors if "_exps.weight" in t.name}
    assert kinds == {Kind.MXFP4}
    in_mxfp4(folder)
    await assert_is_the_directory(file, folder, tmp_path)
    fidelity = resolve_model(file, default_cache_dir()).fidelity
    assert fidelity is not None
    experts = [kind for kind in fidelity.kinds() if kind.module.startswith("experts.")]
    assert {(kind.state, kind.source) for kind in experts} == {("as-stored", "mxfp4")}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_tensors_match_those_that_transformers_reads(family: str, tmp_path: Path) -> None:
    """For the families whose files transformers reads itself."""
    differences = FAMILIES[family]
    folder = save_tiny_model(family, tmp_path / "model", changes=differences.changes)
    file = tmp_path / "tiny.gguf"
    write_gguf(folder, file, Kind.Q8_0, more=differences.more_keys)
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


def missing(key: str) -> Callable[[object], bool]:
    return says("GGUF_KEY_MISSING", key=key)


def unsupported(key: str) -> Callable[[object], bool]:
    return says("GGUF_KEY_UNSUPPORTED", key=key)


@pytest.mark.parametrize(
    ("family", "more", "said"),
    [
        ("gemma2", {"attn_logit_softcapping": None}, missing("gemma2.attn_logit_softcapping")),
        ("phi3", {"rope.dimension_count": None}, missing("rope.dimension_count")),
        ("granite", {"attention.head_count_kv": [2, 1]}, says("GGUF_HEADS_DIFFER")),
        ("granite", {"deepstack_mapping": [0, 1]}, unsupported("granite.deepstack_mapping")),
        ("smollm3", {"rope.scaling.attn_factor": 2.0}, says("GGUF_ROPE_UNSUPPORTED")),
        ("llama", {"attention.sliding_window": 24}, unsupported("llama.attention.sliding_window")),
        ("llama", {"expert_shared_count": 8}, unsupported("llama.expert_shared_count")),
        ("llama", {"expert_count": 8}, missing("llama.expert_used_count")),
        ("llama", {"rope.dimension_count": 16}, says("GGUF_HEADS_UNSUPPORTED")),
        (
            "qwen3_moe",
            {"expert_count": (1 << 32) - 1},
            says("CONFIG_UNSUPPORTED", key="num_experts"),
        ),
        ("qwen3_moe", {"rope.freq_base_swa": 5.0}, unsupported("rope.freq_base_swa")),
    ],
)
def test_missing_and_contradictory_keys_are_rejected(
    family: str, more: dict[str, Any], said: Any, tmp_path: Path
) -> None:
    folder = save_tiny_model(family, tmp_path / "model", changes=FAMILIES[family].changes)
    file = tmp_path / "tiny.gguf"
    write_gguf(folder, file, Kind.BF16, more=more)
    with pytest.raises(InvalidRequestError, check=said):
        open_gguf(file)


def test_one_of_a_pair_of_tensors_must_not_be_missing(tmp_path: Path) -> None:
    folder = save_tiny_model("gpt_oss", tmp_path / "model", changes=FAMILIES["gpt_oss"].changes)
    file, lost = tmp_path / "tiny.gguf", "blk.1.ffn_up_exps.bias"
    write_gguf(folder, file, Kind.BF16, without=lost)
    with pytest.raises(InvalidRequestError, check=says("TENSOR_MISSING", name=lost)):
        open_gguf(file)


# The metadata of a GGUF file of a published size is read like its config.


# No key of a GGUF file stores the windows of this model.
WINDOWS_LOST = "mistralai/Ministral-8B-Instruct-2410"


@dataclass(frozen=True)
class Stored:
    """The parts of a ``ReaderTensor`` from which a config is read."""

    data: np.ndarray
    shape: tuple[int, ...]


def published() -> list[Published]:
    kinds = {"gemma3", "mistral3", *CONVERTERS}
    return [m for m in PUBLISHED if m.model_type in kinds and m.repository != WINDOWS_LOST]


@pytest.mark.parametrize("model", published(), ids=lambda model: model.repository)
def test_a_published_file_is_read_as_its_config(model: Published, tmp_path: Path) -> None:
    config = text_config(AutoConfig.from_pretrained(model.write(tmp_path)))
    expected = read_arch(config)
    said = config.to_dict()
    converter = CONVERTERS[said["model_type"]]
    fields: dict[str, Any] = {"general.architecture": converter.architecture}
    for key, value in converter.keys(said).items():
        # A file stores 32-bit floats.
        own = float(np.float32(value)) if isinstance(value, float) else value
        fields[f"{converter.architecture}.{key}"] = own
    sizes = expected.hidden_size, expected.vocab_size
    nothing = np.zeros(0, np.float32)
    tensors = {"token_embd.weight": Stored(nothing, sizes)}
    if not expected.tie_word_embeddings:
        tensors["output.weight"] = Stored(nothing, sizes)
    for name, values in converter.factors(said).items():
        tensors[name] = Stored(values, values.shape)
    stored = cast(dict[str, gguf.ReaderTensor], tensors)
    found, _ = read_gguf_config(tmp_path / "m.gguf", fields, stored)
    assert_alike(read_arch(found), expected)
