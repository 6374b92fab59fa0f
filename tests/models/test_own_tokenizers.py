"""Tokenizers that adapters bring: which of them stay in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders.added_tokens import ADDED, FIRST, ROWS, grown_tokenizer
from builders.bases.tiny_models import EOS, VOCAB_SIZE, tiny_tokenizer

from turret.server.adapters.checkpoint.adapter_root import AdapterRoot
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.tokenizer_files import read_tokenizer_files
from turret.server.adapters.tokenizer_files import TokenizerFiles
from turret.server.models import own_tokenizers
from turret.server.models.own_tokenizers import OwnTokenizers
from turret.server.models.tokenizer import Tokenizer


def files_of(folder: Path) -> TokenizerFiles:
    grown_tokenizer().save_pretrained(folder / "own")
    with AdapterRoot(folder).open_directory("own") as directory:
        files = read_tokenizer_files(directory, Findings("own"))
    assert files is not None
    return files


@pytest.fixture
def tokenizers(tmp_path: Path) -> OwnTokenizers:
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = Tokenizer.load(tmp_path / "base", frozenset({EOS}), VOCAB_SIZE)
    return OwnTokenizers(base, tmp_path / "base" / "config.json")


def test_what_transformers_reads_is_read(tokenizers: OwnTokenizers, tmp_path: Path) -> None:
    files = files_of(tmp_path)
    found = tokenizers.get(files.digest, ROWS, lambda: files)
    expected: Any = grown_tokenizer()
    for text in ("a turret", "<|user|>x<|end|>", "<call>turretturret</call>"):
        assert found.encode(text) == expected(text)["input_ids"]
    turns = [{"role": "user", "content": "a turret"}]
    assert found.encode_chat(turns) == expected.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
    assert found.vocab_size == FIRST + len(ADDED)
    # The base's end is one of a model that was not trained to stop otherwise.
    assert found.eos_token_ids == {EOS, FIRST + ADDED.index("<|end|>")}


def test_the_latest_are_kept(
    tokenizers: OwnTokenizers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_tokenizers, "MAX_KEPT", 2)
    files = files_of(tmp_path)
    made = [tokenizers.get(files.digest, rows, lambda: files) for rows in (270, 271)]
    assert tokenizers.get(files.digest, 270, lambda: files) is made[0]
    tokenizers.check(files, 272)
    assert tokenizers.find(files.digest, 270) is made[0]
    assert tokenizers.find(files.digest, 271) is None


# Rules that the library takes, and panics of when it follows them: a token that is put before every
# text and that there is not; the ends of a token cut off that is shorter.
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


def with_rule(files: TokenizerFiles, part: str, rule: dict[str, Any]) -> TokenizerFiles:
    said = json.loads(files.files["tokenizer.json"])
    changed = {**files.files, "tokenizer.json": json.dumps({**said, part: rule}).encode()}
    return TokenizerFiles(changed, part, files.bytes_disk)


def test_what_the_library_panics_of_is_refused(tokenizers: OwnTokenizers, tmp_path: Path) -> None:
    files = with_rule(files_of(tmp_path), "post_processor", UNKNOWN_BEFORE)
    with pytest.raises(ValueError, match="no usable tokenizer: panic"):
        tokenizers.check(files, ROWS)


@pytest.mark.parametrize(
    "ask",
    [
        lambda found, a: found.decode([a]),
        lambda found, a: found.token_text(a),
        lambda found, a: found.stream().push(a),
    ],
)
def test_a_panic_is_an_error_as_others_are(
    tokenizers: OwnTokenizers, tmp_path: Path, ask: Callable[[Tokenizer, int], str]
) -> None:
    """A thread that takes care of errors, the engine's, would end of it."""
    files = with_rule(files_of(tmp_path), "decoder", TOO_SHORT)
    found = tokenizers.get(files.digest, ROWS, lambda: files)
    (a,) = tiny_tokenizer()("a")["input_ids"]
    with pytest.raises(RuntimeError, match="panic"):
        ask(found, a)
