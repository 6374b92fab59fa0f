"""Adapters with a different number of tokens: which are accepted, and how others are rejected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders.adapters import edit_config, edit_tensors
from builders.added_tokens import FIRST, ROWS, grown_tokenizer, save_grown
from builders.bases.tiny_models import tiny_tokenizer
from builders.methods import make_config, save_adapter
from method_oracle import twin
from said import says

from turret.server.adapters.adapter import TOKENIZER_FILES, Source
from turret.server.adapters.checkpoint.adapter_root import AdapterDirectory
from turret.server.adapters.installer import AdapterTokenizers
from turret.server.adapters.loader import AdapterLoader
from turret.server.adapters.registry import AdapterExport
from turret.server.errors import AdapterChangedError, AdapterCheckpointError, AdapterMismatchError
from turret.server.models.describe import describe_base
from turret.server.models.loader import load_decoder
from turret.server.models.model_source import resolve_model
from turret.server.models.own_tokenizers import OwnTokenizers
from turret.server.models.tokenizer import Tokenizer

Q = {"target_modules": ["q_proj"]}
SAVED = {**Q, "modules_to_save": ["embed_tokens", "lm_head"]}
EMBEDDING = "base_model.model.model.embed_tokens"


@pytest.fixture(scope="module")
def loader_of() -> Any:
    folder = twin("llama").folder
    source = resolve_model(folder, folder.parent / "cache" / "turret")
    decoder = load_decoder(source, dtype=torch.float32, device=torch.device("cpu"))
    tokenizer = Tokenizer.load(folder, frozenset(), decoder.arch.vocab_size)

    def make(root: Path, named: int | None = None) -> AdapterLoader:
        base = describe_base(decoder, source, named=named)
        loader = AdapterLoader(root, base, 1 << 26, 64)
        loader.check_tokenizer = OwnTokenizers(tokenizer, folder / "config.json").check
        return loader

    return make


def load(loader: AdapterLoader) -> Any:
    return loader.lower(loader.read(Source("a")))


def grown(root: Path, method: str = "lora", rows: int = ROWS, **keys: Any) -> Path:
    save_grown(twin("llama").model, make_config(method, **{**SAVED, **keys}), root / "a", rows=rows)
    return root / "a"


def test_the_facts_of_an_adapter_include_its_vocabulary(loader_of: Any, tmp_path: Path) -> None:
    folder = grown(tmp_path)
    loader = loader_of(tmp_path)
    loaded = load(loader)
    assert (loaded.facts.vocab_size, len(loaded.facts.tokenizer)) == (ROWS, 64)
    added = loaded.operators.tokens.added
    assert (added.first, added.head.shape) == (FIRST, (ROWS - FIRST, 128))
    sizes = [(folder / name).stat().st_size for name in TOKENIZER_FILES if (folder / name).exists()]
    assert loaded.facts.bytes_disk > sum(sizes) > 0
    # The tokenizer is a part of the adapter; other files in the folder are not.
    (folder / "training_args.bin").write_bytes(b"never opened")
    assert load(loader).facts == loaded.facts
    (folder / "chat_template.jinja").write_text("another")
    assert load(loader).facts.digest != loaded.facts.digest


@pytest.mark.parametrize(
    ("config", "named", "is_own"),
    [
        ({"trainable_token_indices": [3]}, 250, False),
        ({"trainable_token_indices": [3, 251]}, 250, True),
        ({"modules_to_save": ["embed_tokens"]}, 250, True),
        ({"modules_to_save": ["embed_tokens"]}, 258, False),
        ({}, 250, False),
        ({"target_modules": ["embed_tokens"]}, 250, True),
    ],
)
def test_rows_that_pad_the_base_may_be_tokens(
    loader_of: Any, tmp_path: Path, config: dict[str, Any], named: int, is_own: bool
) -> None:
    """As in Qwen: the padding has room for new tokens, so nothing is resized."""
    save_adapter(twin("llama").model, make_config("lora", **{**Q, **config}), tmp_path / "a")
    loader = loader_of(tmp_path, named)
    assert load(loader).facts.tokenizer == ""
    tiny_tokenizer().save_pretrained(tmp_path / "a")
    facts = load(loader).facts
    assert (facts.tokenizer != "", facts.vocab_size) == (is_own, 258 if is_own else 0)


def test_new_tokens_without_a_tokenizer_are_rejected(loader_of: Any, tmp_path: Path) -> None:
    (grown(tmp_path) / "tokenizer.json").unlink()
    with pytest.raises(AdapterCheckpointError, check=says("ADAPTER_LACKS_TOKENIZER", rows=272)):
        load(loader_of(tmp_path))


def test_fewer_rows_need_no_tokenizer_if_every_base_token_has_one(
    loader_of: Any, tmp_path: Path
) -> None:
    (grown(tmp_path, rows=250) / "tokenizer.json").unlink()
    facts = load(loader_of(tmp_path, named=250)).facts
    assert (facts.vocab_size, facts.tokenizer) == (250, "")
    with pytest.raises(AdapterCheckpointError, check=says("ADAPTER_LACKS_TOKENIZER")):
        load(loader_of(tmp_path, named=251))


def test_an_export_contains_the_loaded_tokenizer(
    loader_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, loader = grown(tmp_path), loader_of(tmp_path)
    record: Any = SimpleNamespace(name="a", facts=load(loader).facts)
    template = folder / "chat_template.jinja"
    loaded, source = template.read_text(), Source("a")

    def exported() -> str:
        with AdapterExport(loader.root_of(source), source, record) as export:
            found = [data for name, data in export.chunks() if name == template.name]
        return b"".join(found).decode()

    assert exported() == loaded
    open_file = AdapterDirectory.open_file

    def and_replace(directory: AdapterDirectory, name: str) -> Any:
        file = open_file(directory, name)
        if name == template.name:
            (folder / "new").write_text("another")
            (folder / "new").replace(template)
        return file

    with monkeypatch.context() as patched:
        patched.setattr(AdapterDirectory, "open_file", and_replace)
        assert exported() == loaded
    with pytest.raises(AdapterChangedError):
        exported()
    template.unlink()
    with pytest.raises(AdapterChangedError):
        exported()


def test_a_missing_tokenizer_is_reported_with_the_adapters_name(
    loader_of: Any, tmp_path: Path
) -> None:
    folder, loader = grown(tmp_path), loader_of(tmp_path)
    adapter: Any = SimpleNamespace(name="named", source=Source("a"), facts=load(loader).facts)
    table: Any = None
    tokenizers = AdapterTokenizers(table, loader)
    assert tokenizers.read(adapter).digest == adapter.facts.tokenizer
    shutil.rmtree(folder)
    with pytest.raises(AdapterChangedError, check=says("FILES_LOST", adapter="named", path="a")):
        tokenizers.read(adapter)


def tokenizer_of(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        path = folder / (name.replace("__", ".") if "__" in name else f"{name}.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer": "{"}, "TOKENIZER_INVALID"),
        ({"tokenizer": "[]"}, "TOKENIZER_INVALID"),
        ({"tokenizer_config": {"tokenizer_class": "CanineTokenizer"}}, "TOKENIZER_INVALID"),
        ({"tokenizer_config": "[]"}, "NOT_A_JSON_OBJECT"),
        ({"tokenizer_config": {"auto_map": {"AutoTokenizer": ["x.Y", None]}}}, "TOKENIZER_CODE"),
        ({"tokenizer_config": {"tokenizer_class": "../x"}}, "INVALID_VALUE"),
        ({"special_tokens_map": '{"a": 1, "a": 2}'}, "JSON_DUPLICATE_KEY"),
        ({"chat_template__jinja": "x" * ((256 << 10) + 1)}, "FILE_TOO_LARGE"),
    ],
)
def test_bad_tokenizers_are_named(
    loader_of: Any, tmp_path: Path, files: dict[str, Any], reason: str
) -> None:
    tokenizer_of(grown(tmp_path), **files)
    with pytest.raises(AdapterCheckpointError, check=says(reason)) as caught:
        load(loader_of(tmp_path))
    assert "/tmp" not in str(caught.value)


def test_file_paths_in_a_tokenizer_config_are_ignored(loader_of: Any, tmp_path: Path) -> None:
    """Otherwise, transformers would open any path in ``tokenizer_file`` or a similar key."""
    other = tmp_path / "other.json"
    other.write_text("{}")
    folder = grown(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    paths = dict.fromkeys(("tokenizer_file", "vocab_file", "merges_file"), str(other))
    tokenizer_of(folder, tokenizer_config={**config, **paths})
    assert load(loader_of(tmp_path)).facts.tokenizer


def test_links_out_of_the_root_are_not_followed(loader_of: Any, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    folder = grown(tmp_path / "root")
    moved = (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(moved)
    with pytest.raises(AdapterCheckpointError, check=says("LINK_OUTSIDE_ROOT")):
        load(loader_of(tmp_path / "root"))


def test_every_token_has_a_row(loader_of: Any, tmp_path: Path) -> None:
    tokenizer = grown_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(20)])
    tokenizer.save_pretrained(grown(tmp_path))
    with pytest.raises(AdapterCheckpointError, check=says("TOKEN_WITHOUT_ROW", rows=272)):
        load(loader_of(tmp_path))


def cut(name: str, rows: int) -> Any:
    return lambda tensors: {**tensors, name: tensors[name][:rows].contiguous()}


def test_an_error_names_the_unsupported_field(loader_of: Any, tmp_path: Path) -> None:
    def refused(field: str, reason: str, **params: object) -> None:
        with pytest.raises((AdapterMismatchError, AdapterCheckpointError)) as caught:
            load(loader_of(tmp_path))
        found = dict(caught.value.violations)
        assert says(reason, **params)(found[field])

    grown(tmp_path, rows=FIRST + 4097)
    refused("model.embed_tokens.weight", "TOO_MANY_ADDED_ROWS", most=4096)
    grown(tmp_path, "dora", target_modules=["embed_tokens", "lm_head"], modules_to_save=None)
    refused("model.embed_tokens.lora_magnitude_vector", "NEEDS_ALL_TOKENS")
    grown(tmp_path, target_modules=["q_proj", "embed_tokens"], modules_to_save=None)
    refused("lm_head.weight", "MISSING_ROWS", first=258, last=271)
    grown(tmp_path, target_modules=["lm_head"], modules_to_save=["embed_tokens"], lora_bias=True)
    refused("lm_head.lora_B.bias", "NEEDS_ALL_TOKENS")
    folder = grown(tmp_path)
    edit_tensors(folder, cut(f"{EMBEDDING}.weight", 270))
    refused("model.embed_tokens.weight", "UNEQUAL_ROWS")
    folder = grown(tmp_path, trainable_token_indices=[FIRST], modules_to_save=None)
    edit_config(folder, trainable_token_indices=[ROWS])
    refused("trainable_token_indices", "NOT_IN_RANGE", value=272, most=271)
    saved: dict[str, Any] = {"modules_to_save": ["embed_tokens"], "feedforward_modules": []}
    grown(tmp_path, "ia3", target_modules=["lm_head"], **saved)
    refused("lm_head.ia3_l", "WRONG_SHAPE")


def test_changed_rows_of_base_tokens_must_be_declared(loader_of: Any, tmp_path: Path) -> None:
    folder = grown(tmp_path, modules_to_save=None)
    assert load(loader_of(tmp_path)).operators.tokens.embedding is None

    def change(tensors: Any) -> Any:
        matrix = tensors[f"{EMBEDDING}.weight"].clone()
        matrix[3] += 1.0
        return {**tensors, f"{EMBEDDING}.weight": matrix}

    edit_tensors(folder, change)
    with pytest.raises(AdapterCheckpointError, check=says("CHANGED_BASE_WEIGHT")):
        load(loader_of(tmp_path))


SHAPES: dict[str, Any] = {
    "a number": lambda tensor: tensor.flatten()[0].clone(),
    "a vector": lambda tensor: tensor.flatten()[:7].clone(),
    "three axes": lambda tensor: tensor.unsqueeze(0).clone(),
    "narrow": lambda tensor: tensor[..., :-1].contiguous(),
    "turned": lambda tensor: tensor.T.contiguous() if tensor.ndim == 2 else tensor[:1].clone(),
    "of another dtype": lambda tensor: tensor.half(),
    "none": lambda tensor: tensor[:0].clone(),
}


@pytest.mark.parametrize(
    "keys",
    [
        {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "lm_head"]},
        {"trainable_token_indices": [3, FIRST, ROWS - 1], "modules_to_save": None},
        {"target_modules": ["embed_tokens", "lm_head"], "modules_to_save": None},
    ],
)
def test_tensors_of_any_form_are_refused_or_read(
    loader_of: Any, tmp_path: Path, keys: dict[str, Any]
) -> None:
    """A file with a tensor of any form is accepted or rejected, without other errors."""
    folder = grown(tmp_path, **keys)
    file = folder / "adapter_model.safetensors"
    sound, loader = file.read_bytes(), loader_of(tmp_path)
    names = list[str]()
    edit_tensors(folder, lambda tensors: names.extend(tensors) or tensors)
    refused = []
    for name in names:
        if ".layers.1." in name:
            continue
        for change in SHAPES.values():
            file.write_bytes(sound)
            edit_tensors(folder, lambda tensors, n=name, c=change: {**tensors, n: c(tensors[n])})
            try:
                load(loader)
            except (AdapterCheckpointError, AdapterMismatchError) as error:
                refused.append(error.violations)
    assert all(refused)
    assert len(refused) > 3 * len(names)
