"""The vocabularies of the families' GGUF files: their beginnings, and the splitting of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from builders.bases.gguf_files import finish, gguf_writer
from said import says
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoTokenizer

from turret.server.errors import InvalidRequestError
from turret.server.models.sources.gguf_file import read_gguf_tokenizer
from turret.server.models.sources.gguf_layouts import LAYOUTS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
# The beginning of Gemma's vocabulary; runs of spaces are stored as spaces.
GEMMA = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "  "),
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *("he", "ll", "hell", "hello", "wo", "rl", "worl", "world", "▁world"),
    *("▁", "d", "e", "h", "l", "o", "r", "w"),
]
GEMMA_KINDS = [
    *(CONTROL, CONTROL, CONTROL, UNKNOWN, CONTROL, USER_DEFINED),
    *[BYTE] * 256,
    *[NORMAL] * 17,
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['content'] }}{% endfor %}"


def write(file: Path, architecture: str, **keys: Any) -> dict[str, Any]:
    """Write a file with only a tokenizer and its keys."""
    finish(gguf_writer(file, architecture, block_count=1, chat_template=TEMPLATE, **keys))
    reader = gguf.GGUFReader(file)
    return {key: field.contents() for key, field in reader.fields.items()}


def read(file: Path, fields: dict[str, Any]) -> Any:
    """Read the tokenizer as in a server: from the cached files, alongside the model's config."""
    layout = LAYOUTS[fields["general.architecture"]][-1]
    saved = file.parent / "saved"
    read_gguf_tokenizer(file, fields, layout).save_pretrained(saved)
    AutoConfig.for_model(layout.model_type).save_pretrained(saved)
    return AutoTokenizer.from_pretrained(saved)


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "gemma3"])
def test_gemmas_words_have_no_space_before_them(architecture: str, tmp_path: Path) -> None:
    file = tmp_path / "t.gguf"
    fields = write(
        file,
        architecture,
        tokenizer_model="llama",
        tokenizer_pre="default",
        token_list=GEMMA,
        token_scores=[-1000.0] * len(GEMMA),
        token_types=GEMMA_KINDS,
        bos_token_id=2,
        eos_token_id=1,
        unk_token_id=3,
        pad_token_id=0,
        add_bos_token=True,
        add_eos_token=False,
        add_space_prefix=False,
    )
    tokenizer = read(file, fields)
    for text, words in (
        ("hello world", ["<bos>", "hello", "▁world"]),
        ("hello  world", ["<bos>", "hello", "▁▁", "world"]),
        ("<start_of_turn>é", ["<bos>", "<start_of_turn>", "<0xC3>", "<0xA9>"]),
    ):
        ids = tokenizer.encode(text)
        assert [token.replace("  ", "▁▁") for token in (GEMMA[i] for i in ids)] == words
        assert tokenizer.decode(ids[1:]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<bos><start_of_turn>hello"


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = {
    "tokenizer_model": "gpt2",
    "token_list": [*ALPHABET, "he", "<bos>", "<eos>"],
    "token_types": [NORMAL] * 257 + [CONTROL] * 2,
    "token_merges": ["h e"],
    "bos_token_id": 257,
    "eos_token_id": 258,
}


@pytest.mark.parametrize(
    ("architecture", "pre", "parts"),
    [
        ("glm4", "glm4", ["I", "'M", "Ġ", "123", "45", "!Ċ", "x"]),
        ("glm4", "chatglm-bpe", ["I", "'M", "Ġ", "123", "45", "!Ċ", "x"]),
        ("olmo2", "dbrx", ["I", "'M", "Ġ", "123", "45", "!Ċ", "x"]),
        ("gpt-oss", "gpt-4o", ["I'M", "Ġ", "123", "45", "!Ċ", "x"]),
        ("mistral3", "tekken", ["I", "'M", "Ġ", "1", "2", "3", "4", "5", "!Ċ", "x"]),
        ("granite", "refact", ["I", "'", "M", "Ġ12345", "!", "Ċ", "x"]),
    ],
)
def test_texts_are_split_by_the_rules_that_the_file_names(
    architecture: str, pre: str, parts: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "t.gguf"
    fields = write(file, architecture, **BYTES, tokenizer_pre=pre)
    tokenizer = read(file, fields)
    found = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("I'M 12345!\nx")
    assert [part for part, _ in found] == parts
    ids = tokenizer.encode("I'M 12345!\nx")
    # Mistral's texts begin with a BOS by default.
    assert (ids[0] == 257) == (pre == "tekken")
    assert tokenizer.eos_token == "<eos>"


# For unknown rules, transformers uses GPT-2's with every architecture.
@pytest.mark.parametrize("architecture", ["granite", "llama", "phi3", "qwen2", "qwen3moe"])
def test_unknown_pretokenizer_rules_are_rejected(architecture: str, tmp_path: Path) -> None:
    file = tmp_path / "t.gguf"
    fields = write(file, architecture, **BYTES, tokenizer_pre="viking")
    with pytest.raises(InvalidRequestError, check=says("GGUF_TOKENIZER_UNSUPPORTED", pre="viking")):
        read(file, fields)
