"""``--model FILE.gguf``: a model with the dequantised weights, or an error."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import astuple
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from builders.bases.gguf_files import TEMPLATE, finish, gguf_writer, write_gguf
from builders.bases.mixed_checkpoints import tensors_4bit
from builders.bases.tiny_models import BOS, EOS, save_tiny_model
from chats import encode_chat
from gguf import GGMLQuantizationType as Kind
from gguf_oracle import assert_alike, transformers_state
from safetensors.torch import load_file, save_file
from said import says
from transformers import AutoConfig, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from turret.kernels.likeliest import Screen, ScreenCodes
from turret.server.errors import InvalidRequestError
from turret.server.models import model_source
from turret.server.models.families import read_arch, transformers_config
from turret.server.models.loader import CheckpointTensors, eos_token_ids
from turret.server.models.model_source import resolve_model
from turret.server.models.sources import gguf_header
from turret.server.models.sources.check import MODEL_NAME, check_model, default_cache_dir, find_gguf
from turret.server.models.sources.gguf_file import open_gguf
from turret.server.models.tokenizer import Tokenizer
from turret.server.models.weights.nf4 import Nf4Weight, PackedLinear

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def tiny(architecture: str, folder: Path) -> Path:
    """A checkpoint without scaled rotary positions, as GGUF supports only a few scalings."""
    save_tiny_model(architecture, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = PLAIN_ROPE
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_tokenizer_and_its_template_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, file = tiny("llama", tmp_path / "model"), tmp_path / "tiny.gguf"
    write_gguf(folder, file, Kind.F16)
    source = resolve_model(file, default_cache_dir())
    assert eos_token_ids(source.files) == {EOS}
    ours, theirs = (Tokenizer.load(f, frozenset(), 258) for f in (source.files, folder))
    for text in ("Hello, world!", "é<eos>x", "  two spaces"):
        assert ours.encode(text) == theirs.encode(text)
    chat = encode_chat(ours, [{"role": "user", "content": "hi"}])
    assert ours.decode(chat) == "<user>hi"
    assert TEMPLATE


@pytest.mark.parametrize(
    ("pre", "has_bos"), [("default", False), ("llama-bpe", True), ("tekken", True)]
)
def test_older_files_without_a_setting_get_a_bos_by_family(
    pre: str, has_bos: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By llama.cpp's rule, texts of Llama 3 and Mistral Nemo begin with a BOS."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, file = tiny("llama", tmp_path / "model"), tmp_path / "tiny.gguf"
    write_gguf(folder, file, Kind.F16, pre=pre)
    files = resolve_model(file, default_cache_dir()).files
    tokenizer = Tokenizer.load(files, frozenset(), 258)
    word = Tokenizer.load(folder, frozenset(), 258).encode("Hello")
    assert tokenizer.encode("Hello") == [BOS] * has_bos + word
    assert tokenizer.encode("<bos>Hello") == [BOS, *word]


def llama3_factors(factor: float) -> np.ndarray:
    rope = {
        **{"rope_type": "llama3", "factor": factor, "rope_theta": 10000.0},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(head_dim=32, max_position_embeddings=131072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 10000.0 ** (torch.arange(0, 32, 2).float() / 32)
    return (plain / scaled).numpy()


def with_tensor(file: Path, copy: Path, name: str, values: np.ndarray) -> Path:
    """A file with an additional tensor."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(copy, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), kind, sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.add_tensor(name, values)
    finish(writer)
    return copy


def test_scaled_rotary_positions_are_read_or_refused(tmp_path: Path) -> None:
    folder, file = tiny("llama", tmp_path / "model"), tmp_path / "tiny.gguf"
    write_gguf(folder, file, Kind.F16)
    for factor in (8.0, 32.0):
        more = with_tensor(file, tmp_path / "f.gguf", "rope_freqs.weight", llama3_factors(factor))
        rope = open_gguf(more).config.rope_parameters
        assert (rope["rope_type"], rope["factor"]) == ("llama3", factor)
    odd = with_tensor(file, tmp_path / "f.gguf", "rope_freqs.weight", llama3_factors(5.0))
    with pytest.raises(InvalidRequestError, check=says("GGUF_ROPE_UNSUPPORTED")):
        open_gguf(odd)
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    write_gguf(folder, file, Kind.F16, more=linear)
    assert open_gguf(file).config.rope_parameters["factor"] == 4.0
    write_gguf(folder, file, Kind.F16, more={**linear, "rope.scaling.type": "longrope"})
    with pytest.raises(InvalidRequestError, check=says("GGUF_ROPE_UNSUPPORTED", kind="longrope")):
        open_gguf(file)


def test_unknown_tensors_are_rejected_by_name(tmp_path: Path) -> None:
    folder, file = tiny("llama", tmp_path / "model"), tmp_path / "tiny.gguf"
    unexpected = says("TENSORS_UNEXPECTED")
    write_gguf(folder, file, Kind.F16, more={"expert_count": 8, "expert_used_count": 2})
    with pytest.raises(InvalidRequestError, match=r"blk\.0\.ffn_(gate|up|down)", check=unexpected):
        open_gguf(file)
    write_gguf(folder, file, Kind.F16, more={"expert_count": 0})
    sinks = np.zeros(4, np.float32)
    more = with_tensor(file, tmp_path / "t.gguf", "blk.0.attn_sinks.weight", sinks)
    with pytest.raises(InvalidRequestError, match=r"blk\.0\.attn_sinks", check=unexpected):
        open_gguf(more)


def test_files_that_are_not_gguf_fail_before_torch(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    for data in (b"", b"GGUF", b"PK" + bytes(60), b"GGUF" + bytes(60), b"GGUF\3" + b"\xff" * 60):
        file.write_bytes(data)
        with pytest.raises(InvalidRequestError, check=says("GGUF_INVALID")):
            check_model(file)
    finish(gguf_writer(file, "gemma3n", block_count=1))
    with pytest.raises(InvalidRequestError, check=says("GGUF_ARCHITECTURE", value="gemma3n")):
        check_model(file)
    for architecture, layers in (("llama", 1 << 30), ("qwen3", 0)):
        finish(gguf_writer(file, architecture, block_count=layers))
        expected = says("CONFIG_UNSUPPORTED", key=f"{architecture}.block_count", value=layers)
        with pytest.raises(InvalidRequestError, check=expected):
            check_model(file)
    write_gguf(tiny("qwen3", tmp_path / "model"), file, Kind.F16)
    whole = file.read_bytes()
    # Cut in the tensors, in their table, and in the vocabulary.
    for size in (len(whole) - 1, len(whole) // 2, whole.index(b"blk.0.") + 9, len(whole) // 99):
        file.write_bytes(whole[:size])
        for look in (check_model, open_gguf):
            with pytest.raises(InvalidRequestError, check=says("FILE_DAMAGED")):
                look(file)
    file.write_bytes(whole)
    check_model(file)
    file.write_bytes(whole.replace(b"blk.0.attn_q.weight\2\0\0\0", b"blk.0.attn_q.weight\1\0\0\0"))
    check_model(file)
    with pytest.raises(InvalidRequestError, check=says("GGUF_UNREADABLE")):
        open_gguf(file)
    # transformers cannot read a file that does not name its tokenizer.
    file.write_bytes(whole.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.medal"))
    check_model(file)
    with pytest.raises(InvalidRequestError, check=says("GGUF_UNREADABLE")):
        open_gguf(file)


def test_block_sizes_match_gguf() -> None:
    for kind, sizes in gguf_header._BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == sizes
    # With a missing type, the end of the file would be unknown.
    assert {Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.MXFP4} <= {*gguf_header._BLOCKS}


def test_reading_reports_progress_without_drawing_a_bar(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, file = tiny("llama", tmp_path / "model"), tmp_path / "tiny.gguf"
    write_gguf(folder, file, Kind.F16)
    capfd.readouterr()
    told: list[tuple[int, int]] = []
    resolve_model(file, tmp_path / "cache", lambda what, done, of: told.append((done, of)))
    total = len(open_gguf(file).tensors.formats())
    assert told == [(done, total) for done in range(total + 1)]
    assert capfd.readouterr().err == ""


def test_other_weights_of_the_same_size_and_time_are_other_models(tmp_path: Path) -> None:
    folder, cache = tiny("llama", tmp_path / "model"), tmp_path / "cache"
    (file,) = folder.glob("*.safetensors")
    os.utime(file, (0, 0))
    before, size = resolve_model(folder, cache), file.stat().st_size
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, {"format": "pt"})
    os.utime(file, (0, 0))
    assert file.stat().st_size == size
    assert resolve_model(folder, cache).digest != before.digest


def test_a_process_that_was_slower_leaves_the_finished_model_alone(tmp_path: Path) -> None:
    folder, cache = tiny("llama", tmp_path / "model"), tmp_path / "cache"
    places: list[int] = []

    def finish_another(*_: object) -> None:
        if not places:
            places.append(0)
            places[0] = resolve_model(folder, cache).weights.stat().st_ino

    assert resolve_model(folder, cache, finish_another).weights.stat().st_ino == places[0]


def test_a_disk_that_fails_while_a_damaged_model_is_replaced_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = tiny("llama", tmp_path / "model"), tmp_path / "cache"
    (resolve_model(folder, cache).weights / "model.safetensors").write_bytes(b"")

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(model_source.os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        resolve_model(folder, cache)


def test_what_killed_processes_left_in_the_cache_is_removed(tmp_path: Path) -> None:
    folder, cache = tiny("llama", tmp_path / "model"), tmp_path / "cache"
    old, new = (cache / f".building-{name}" for name in ("old", "new"))
    for each in (old, new):
        each.mkdir(parents=True)
        (each / "model.safetensors").write_bytes(b"half")
    os.utime(old, (0, 0))
    made = resolve_model(folder, cache)
    assert {each.name for each in cache.iterdir()} == {new.name, made.weights.name}


def test_the_embedded_model_given_by_path_is_named_after_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = tiny("llama", tmp_path / "model"), tmp_path / "tiny.gguf"
    write_gguf(folder, file, Kind.F16)
    monkeypatch.setattr(model_source, "find_gguf", lambda: file)
    names = [resolve_model(model, tmp_path / "cache").name for model in (file, None, file)]
    assert names == ["tiny", MODEL_NAME, "tiny"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "turret.json", "tokenizer.json", "generation_config.json"]
)
@pytest.mark.parametrize("fault", ["cut", "empty", "missing"])
def test_damaged_files_in_the_cache_are_written_again(
    name: str, fault: str, tmp_path: Path
) -> None:
    folder, file = tiny("llama", tmp_path / "model"), tmp_path / "tiny.gguf"
    write_gguf(folder, file, Kind.F16)
    source = resolve_model(file, tmp_path / "cache")
    damaged = source.weights / name
    content = damaged.read_bytes()
    damaged.unlink()
    if fault != "missing":
        damaged.write_bytes(content[:-1] if fault == "cut" else b"")
    assert resolve_model(file, tmp_path / "cache") == source
    assert damaged.read_bytes() == content


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mixtral", "gpt_oss"])
def test_the_cache_has_the_weights_as_products_read_them(architecture: str, tmp_path: Path) -> None:
    """The oracle packs each module by itself, and writes bitsandbytes' format with safetensors."""
    folder = save_tiny_model(architecture, tmp_path / "model")
    source = resolve_model(folder, tmp_path / "cache")
    tensors = tensors_4bit(source)
    save_file(tensors, tmp_path / "4bit", {"format": "pt"})
    assert hashlib.sha256((tmp_path / "4bit").read_bytes()).hexdigest() == source.digest
    arch = read_arch(transformers_config(folder))
    stored = CheckpointTensors(source, arch.experts)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    if Screen.serves(head):
        expected = ScreenCodes.of(head)
        for name, value in zip(model_source.HEAD_COPY, astuple(expected), strict=True):
            assert torch.equal(stored.get(name), value), name
    for modules in arch.projections(1):
        linear, slices = stored.packed(modules), []
        assert linear is not None
        for path, _, _ in modules:
            name = f"{path}.weight"
            parts = {key: t for key, t in tensors.items() if key.startswith(name)}
            weight = Nf4Weight.from_tensors(name, parts)
            assert weight is not None
            slices.append(weight)
        expected = PackedLinear.pack(slices)
        assert linear.widths == expected.widths
        assert torch.equal(linear.packed, expected.packed)
        assert torch.equal(linear.absmax, expected.absmax)
        assert linear.packed.data_ptr() % 64 == linear.absmax.data_ptr() % 64 == 0


@pytest.mark.long
def test_the_embedded_model_matches_transformers() -> None:
    """The file is SmolLM2-135M-Instruct in Q4_1."""
    file = find_gguf()
    found, theirs = open_gguf(file), transformers_state(file)
    ours = {name: tensor.to(torch.bfloat16) for name, tensor in found.tensors}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    archs = [read_arch(config) for config in (found.config, AutoConfig.from_pretrained(**where))]
    assert_alike(*archs)
    turns = [{"role": "user", "content": "How are you?  Fine, 1 234."}]
    tokenizers = (found.tokenizer, AutoTokenizer.from_pretrained(**where))
    chats = [tokenizer.apply_chat_template(turns)["input_ids"] for tokenizer in tokenizers]
    assert chats[0] == chats[1]
