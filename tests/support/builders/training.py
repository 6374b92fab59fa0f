"""Small data sets and configs for the tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from command_modules import loaded_and_said_by

from turret.training.settings import build_config
from turret.training.settings.checks import check_inputs
from turret.training.settings.resolve import Resolved, resolve
from turret.training.settings.variants import Variant, read_variants

# Overrides that methods need for training on ``write_words``, whose prompts end like this.
REQUIRED = {"alora": ("method.invocation=:",)}
WORDS = ("red", "green", "blue", "black", "white", "amber", "pink", "grey")
# A chat template with a mark for each role, and a conversation.
CHAT = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
TURNS = (
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_words(path: Path, count: int = 24) -> Path:
    """Write ``count`` distinct prompts of different lengths, each with a word to learn."""
    rows = [
        {"prompt": "say " + "la " * (number % 5) + f"{number}:", "completion": WORDS[number % 8]}
        for number in range(count)
    ]
    return write_jsonl(path, rows)


def resolve_tiny(folder: Path, model: Path, *overrides: str) -> Resolved:
    """A run of a few steps on ``folder/train.jsonl``, which is written if it is missing."""
    if not (folder / "train.jsonl").exists():
        write_words(folder / "train.jsonl")
    tables = {
        "base": {"model": str(model)},
        "data": {"train": "train.jsonl", "max_length": 64},
        "run": {"steps": 4, "batch_size": 4, "validate_every": 2, "checkpoint_every": 2},
    }
    config = build_config(tables, overrides)
    check_inputs(config, folder)
    return resolve(config, folder)


def tiny_variants(folder: Path, model: Path, *overrides: str) -> list[Variant]:
    """The variants of a sweep into ``folder/sweep`` on ``folder/train.jsonl``, which is written."""
    write_words(folder / "train.jsonl")
    path = folder / "sweep.toml"
    path.write_text(
        f'[base]\nmodel = "{model}"\n[data]\ntrain = "train.jsonl"\nmax_length = 64\n'
        '[run]\nbatch_size = 4\noutput = "sweep"\nadapter_dtype = "float32"\n'
    )
    return read_variants(path, overrides)


def write_config(folder: Path, *lines: str) -> str:
    """Write a config with ``lines`` as its data."""
    folder.mkdir(exist_ok=True)
    (folder / "t.toml").write_text('[data]\ntrain = "t.jsonl"\n')
    (folder / "t.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return str(folder / "t.toml")


def ended(*arguments: str) -> str:
    """The error of a ``turret train`` that fails before it loads torch."""
    code, modules, err = loaded_and_said_by("train", *arguments)
    assert code == 1
    assert not modules & {"torch", "peft", "transformers"}
    return err
