"""Adapters' own tokenizers: their contents, and caching in memory."""

from __future__ import annotations

import errno
import json
import random
import string
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders.added_tokens import ADDED, FIRST, ROWS, grown_tokenizer
from builders.bases.tiny_models import EOS, VOCAB_SIZE, tiny_tokenizer
from chats import encode_chat
from said import says
from transformers import AutoTokenizer

from turret.server.adapters.adapter import OwnTemplate, TokenizerFiles
from turret.server.adapters.checkpoint import Findings
from turret.server.adapters.checkpoint.adapter_root import AdapterRoot
from turret.server.adapters.checkpoint.tokenizer_files import read_tokenizer_files
from turret.server.errors import (
    InvalidRequestError,
    OutOfMemoryError,
    StorageFullError,
    UnavailableError,
)
from turret.server.models import own_tokenizers
from turret.server.models.model_source import resolve_model
from turret.server.models.own_tokenizers import OwnTokenizers
from turret.server.models.sources.check import default_cache_dir, find_gguf
from turret.server.models.tokenizer import Tokenizer


def files_of(folder: Path, tokenizer: Any = None) -> TokenizerFiles:
    (tokenizer or grown_tokenizer()).save_pretrained(folder / "own")
    return read(folder)


def read(folder: Path) -> TokenizerFiles:
    with AdapterRoot(folder).open_directory("own") as directory:
        files = read_tokenizer_files(directory, Findings("own"))
    assert files is not None
    return files


@pytest.fixture
def tokenizers(tmp_path: Path) -> OwnTokenizers:
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = Tokenizer.load(tmp_path / "base", frozenset({EOS}), VOCAB_SIZE)
    return OwnTokenizers(base, tmp_path / "base" / "config.json")


def test_tokenizers_are_read_as_transformers_reads_them(
    tokenizers: OwnTokenizers, tmp_path: Path
) -> None:
    files = files_of(tmp_path)
    found = tokenizers.get((files.digest, ROWS, ""), lambda: files)
    expected: Any = grown_tokenizer()
    for text in ("a turret", "<|user|>x<|end|>", "<call>turretturret</call>"):
        assert found.encode(text) == expected(text)["input_ids"]
    turns = [{"role": "user", "content": "a turret"}]
    assert encode_chat(found, turns) == expected.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
    assert found.vocab_size == FIRST + len(ADDED)
    # The base's end token still counts, for a model that was not trained to stop differently.
    assert found.eos_token_ids == {EOS, FIRST + ADDED.index("<|end|>")}


def test_the_most_recently_used_tokenizers_are_kept(
    tokenizers: OwnTokenizers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_tokenizers, "MAX_KEPT", 2)
    files = files_of(tmp_path)
    made = [tokenizers.get((files.digest, rows, ""), lambda: files) for rows in (270, 271)]
    assert tokenizers.get((files.digest, 270, ""), lambda: files) is made[0]
    tokenizers.check(files, 272, "")
    assert tokenizers.find((files.digest, 270, "")) is made[0]
    assert tokenizers.find((files.digest, 271, "")) is None


# Rules that the library accepts, but panics on when it applies them: an unknown token before every
# text, and cutting the ends of a shorter token.
UNKNOWN_BEFORE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "[X]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}
TOO_SHORT = {"type": "Strip", "content": "a", "start": 0, "stop": 5}


def with_rule(files: TokenizerFiles, part: str, rule: Any) -> TokenizerFiles:
    said = json.loads(files.files["tokenizer.json"])
    changed = {**files.files, "tokenizer.json": json.dumps({**said, part: rule}).encode()}
    return TokenizerFiles(changed, part, files.bytes_disk)


def test_a_file_that_makes_the_library_panic_is_rejected(
    tokenizers: OwnTokenizers, tmp_path: Path
) -> None:
    files = with_rule(files_of(tmp_path), "post_processor", UNKNOWN_BEFORE)
    with pytest.raises(InvalidRequestError, check=says("TOKENIZER_INVALID")):
        tokenizers.check(files, ROWS, "")


@pytest.mark.parametrize(
    "ask",
    [
        lambda found, a: found.decode([a]),
        lambda found, a: found.token_text(a),
        lambda found, a: found.stream().push(a),
    ],
)
def test_a_panic_becomes_an_ordinary_error(
    tmp_path: Path, ask: Callable[[Tokenizer, int], str]
) -> None:
    """A panic would end even a thread that handles errors, such as the engine's."""
    for name, data in with_rule(files_of(tmp_path), "decoder", TOO_SHORT).files.items():
        (tmp_path / name).write_bytes(data)
    found = Tokenizer.load(tmp_path, frozenset({EOS}), ROWS)
    (a,) = tiny_tokenizer()("a")["input_ids"]
    with pytest.raises(RuntimeError, match="panic"):
        ask(found, a)


# (a+)+b takes 2^n steps on n letters "a". The others produce a text of millions of letters.
SLOW = {"Regex": "(a+)+b"}
SPLIT = {"type": "Split", "pattern": SLOW, "behavior": "Isolated", "invert": False}
DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
REPEATED = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 999,
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}


@pytest.mark.parametrize(
    ("part", "rule", "reason"),
    [
        ("pre_tokenizer", SPLIT, "TOKENIZER_DIFFERS"),
        ("normalizer", {"type": "Sequence", "normalizers": [DOUBLING] * 40}, "TOKENIZER_DIFFERS"),
        ("normalizer", {**DOUBLING, "pattern": SLOW}, "TOKENIZER_DIFFERS"),
        ("decoder", {**DOUBLING, "pattern": SLOW}, "TOKENIZER_DIFFERS"),
        ("decoder", TOO_SHORT, "TOKENIZER_DIFFERS"),
        ("model", {"type": "WordPiece", "unk_token": "a", "vocab": {"a": 0}}, "TOKENIZER_DIFFERS"),
        ("post_processor", REPEATED, "POST_PROCESSOR_UNSUPPORTED"),
    ],
)
def test_rules_that_differ_from_the_base_are_refused_and_never_run(
    tokenizers: OwnTokenizers, tmp_path: Path, part: str, rule: dict[str, Any], reason: str
) -> None:
    kinds = {"max_input_chars_per_word": 1 << 30, "continuing_subword_prefix": ""}
    rule = {**rule, **kinds} if part == "model" else rule
    params = {"part": part} if reason == "TOKENIZER_DIFFERS" else {}
    with pytest.raises(InvalidRequestError, check=says(reason, **params)):
        tokenizers.check(with_rule(files_of(tmp_path), part, rule), ROWS, "")


def test_a_vocabulary_that_differs_from_the_base_is_refused(
    tokenizers: OwnTokenizers, tmp_path: Path
) -> None:
    files = files_of(tmp_path)
    model = json.loads(files.files["tokenizer.json"])["model"]
    for change in ({"vocab": {**model["vocab"], "turrets": 260}}, {"dropout": 0.5}):
        with pytest.raises(InvalidRequestError, check=says("TOKENIZER_DIFFERS", part="model")):
            tokenizers.check(with_rule(files, "model", {**model, **change}), ROWS, "")


def test_files_are_read_under_limits(
    tokenizers: OwnTokenizers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of(tmp_path)
    large = TokenizerFiles({"tokenizer.json": b"[" + b"[],[]," * 1_000_000}, "x", 0)
    monkeypatch.setattr(own_tokenizers, "MAX_BYTES", 160 << 20)
    with pytest.raises(InvalidRequestError, check=says("PROCESS_MEMORY_LIMIT", most="160MiB")):
        tokenizers.check(large, ROWS, "")
    monkeypatch.setattr(own_tokenizers, "CPU_SECONDS", 0.01)
    limits = says("PROCESS_TIME_LIMIT"), says("PROCESS_MEMORY_LIMIT")
    with pytest.raises(InvalidRequestError, check=lambda e: any(says_it(e) for says_it in limits)):
        tokenizers.check(large, ROWS, "")
    monkeypatch.undo()
    said = json.loads(files.files["tokenizer.json"])
    said["added_tokens"][-1]["content"] = "x" * 1025
    with pytest.raises(InvalidRequestError, check=says("ADDED_TOKEN_TOO_LONG", most=1024)):
        tokenizers.check(with_rule(files, "added_tokens", said["added_tokens"]), ROWS, "")
    said["added_tokens"][-1] = {**said["added_tokens"][-1], "content": "xyzzy", "id": FIRST + 9}
    taken = says("TOKEN_NUMBER_TAKEN", number=FIRST + 9, found=FIRST + 4)
    with pytest.raises(InvalidRequestError, check=taken):
        tokenizers.check(with_rule(files, "added_tokens", said["added_tokens"]), ROWS, "")


@pytest.mark.parametrize(
    ("place", "error", "expected"),
    [
        ("transformers", MemoryError(), OutOfMemoryError),
        ("transformers, wrapped", MemoryError(), OutOfMemoryError),
        ("disk", OSError(errno.ENOMEM, "no"), OutOfMemoryError),
        ("disk", OSError(errno.ENOSPC, "no"), StorageFullError),
        ("process", OSError(errno.EAGAIN, "no"), OutOfMemoryError),
        ("process", OSError(errno.EMFILE, "no"), UnavailableError),
    ],
)
def test_a_shortage_on_the_server_is_not_reported_as_a_fault_of_the_files(
    tokenizers: OwnTokenizers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: Exception,
    expected: type[Exception],
) -> None:
    files = files_of(tmp_path)

    def fails(*_: object, **__: object) -> Any:
        try:
            raise error
        except MemoryError:
            if "wrapped" in place:
                # transformers raises this for unexpected errors.
                raise OSError("cannot load the tokenizer")  # noqa: B904
            raise

    owner, name = {
        "disk": (Path, "write_bytes"),
        "process": (subprocess, "Popen"),
    }.get(place, (AutoTokenizer, "from_pretrained"))
    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(expected):
        tokenizers.check(files, ROWS, "")
    monkeypatch.undo()
    tokenizers.check(files, ROWS, "")


def test_only_a_small_file_is_read_under_the_gil(
    tokenizers: OwnTokenizers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library holds the GIL while it reads a file, so other threads would wait."""
    sizes: list[int] = []
    load = AutoTokenizer.from_pretrained

    def seen(folder: Path, **how: Any) -> Any:
        sizes.append((folder / "tokenizer.json").stat().st_size)
        return load(folder, **how)

    files = files_of(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", seen)
    tokenizers.check(files, ROWS, "")
    assert len(sizes) == 1
    assert sizes[0] < len(files.files["tokenizer.json"]) / 2


def test_older_files_and_other_special_tokens_are_read_as_transformers_does(
    tmp_path: Path,
) -> None:
    """Merges are single strings, and some newer settings are missing."""
    find_gguf()
    base_files = resolve_model(None, default_cache_dir()).files
    base = Tokenizer.load(base_files, frozenset(), 1 << 20)
    theirs: Any = AutoTokenizer.from_pretrained(base_files)
    theirs.add_special_tokens({"bos_token": "<begin>", "eos_token": "<end>"})
    theirs.add_tokens(["turret", "Ġtower"])
    theirs.add_bos_token = True
    theirs.save_pretrained(tmp_path / "own")
    file = tmp_path / "own" / "tokenizer.json"
    said = json.loads(file.read_text())
    said["model"]["merges"] = [" ".join(pair) for pair in said["model"]["merges"]]
    del said["model"]["ignore_merges"], said["model"]["byte_fallback"]
    file.write_text(json.dumps(said))
    config = tmp_path / "own" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "add_bos_token": True}))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "own")
    files = read(tmp_path)
    found = OwnTokenizers(base, base_files / "config.json").get(("x", 1 << 20, ""), lambda: files)
    for text in ("a turret and a tower", "<begin>hi<end>", "für 日本 🎉", ""):
        ids = found.encode(text)
        assert ids[:1] == [theirs.bos_token_id]
        expected = theirs(text, add_special_tokens=not text.startswith("<begin>"))["input_ids"]
        assert ids == expected
        assert found.decode(ids, special=True) == theirs.decode(ids)
    assert found.eos_token_ids == {theirs.eos_token_id} | base.eos_token_ids
    assert (found.vocab_size, found.beyond(0)) == (len(theirs), theirs.get_vocab())
    turns = [{"role": "user", "content": "a turret"}]
    assert encode_chat(found, turns) == theirs.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )


def test_many_special_tokens_are_found_in_a_text_in_linear_time(
    tokenizers: OwnTokenizers, tmp_path: Path
) -> None:
    """One expression for all of them would take seconds, during which no other thread runs."""
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_letters, k=8)) for _ in range(4096)]
    grown = grown_tokenizer("{{ messages[0].content }}")
    grown.add_tokens(words, special_tokens=True)
    files = files_of(tmp_path, grown)
    found = tokenizers.get((files.digest, FIRST + 4200, ""), lambda: files)
    text = "".join(draw.choices(string.ascii_letters, k=50_000)) + words[0] + words[1] + "b"
    before = time.thread_time()
    chat = found.render_chat([{"role": "user", "content": text}])
    assert time.thread_time() - before < 0.5
    assert "".join(chat.parts) == text
    assert chat.parts[-4:] == [words[0], "", words[1], "b"]
    ids = found.encode_rendered(chat)
    assert found.decode(ids, special=True) == text
    assert max(ids) < FIRST


def test_a_template_equal_to_that_of_the_base_is_ignored() -> None:
    inner: Any = tiny_tokenizer()
    inner.chat_template = {"default": "a{{ eos_token }}", "tool_use": "b"}
    base = Tokenizer(inner, frozenset({EOS}), VOCAB_SIZE)
    same = OwnTemplate("x", {"default": "a{{ eos_token }}"}, {"eos_token": "<eos>"})
    assert base.with_template(same) is base
    turns = [{"role": "user", "content": "hi"}]
    for own, expected in (
        (OwnTemplate("x", {"default": "a{{ eos_token }}"}, {"eos_token": "c"}), "ac"),
        (OwnTemplate("x", {"default": "d{{ eos_token }}"}, {}), "d<eos>"),
        (OwnTemplate("x", {"default": "d{{ eos_token }}"}, {"eos_token": None}), "d"),
    ):
        made = base.with_template(own)
        assert made.render_chat(turns).parts == [expected]
        number = base.number_of(own.tokens.get("eos_token") or "")
        assert made.eos_token_ids == {EOS} | ({number} - {None})
        made.close()
    base.close()


def test_configs_have_a_limited_number_of_short_texts(
    tokenizers: OwnTokenizers, tmp_path: Path
) -> None:
    files = files_of(tmp_path)
    config = json.loads(files.files["tokenizer_config.json"])
    many = {f"q{number}": number for number in range(own_tokenizers.MAX_TEXTS + 1)}
    long = "x" * (own_tokenizers.MAX_TOKEN_CHARS + 1)
    for name, content, reason in (
        ("added_tokens.json", many, "TOO_MANY_ENTRIES"),
        ("tokenizer_config.json", {**config, "bos_token": long}, "ADDED_TOKEN_TOO_LONG"),
    ):
        data = {**files.files, name: json.dumps(content).encode()}
        changed = replace(files, files=data)
        begun = time.process_time()
        with pytest.raises(InvalidRequestError, check=says(reason)):
            tokenizers.get((name, ROWS, ""), lambda changed=changed: changed)
        assert time.process_time() - begun < 1
