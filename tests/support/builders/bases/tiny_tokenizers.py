"""Tokenizers of a few dozen tokens, with the files and peculiarities of published families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

LETTERS = [*map(chr, range(33, 127)), "\n"]

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}\
{% endif %}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' \
else message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + \
'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}\
{% endif %}"""
PHI_3 = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' \
}}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
PHI_4_MINI = PHI_3.replace(r"|>\n'", "|>'")
# A short Harmony template: the date, the model's identity, system messages as the developer's,
# channels, calls as messages to functions, and results as messages from them.
HARMONY = """\
{{- '<|start|>system<|message|>' + (model_identity or 'You are a model.') + '\nCurrent date: ' + \
strftime_now('%Y-%m-%d') + '<|end|>' -}}
{%- if tools -%}{{- '<|start|>developer<|message|># Tools\n' + (tools | tojson) + '<|end|>' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' and 'tool_calls' in message -%}
{%- set call = message.tool_calls[0].function -%}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' + \
call.arguments | tojson + '<|call|>' -}}
{%- elif message['role'] == 'tool' -%}
{{- '<|start|>functions.f to=assistant<|channel|>commentary<|message|>' + \
message['content'] | tojson + '<|end|>' -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + message['content'] + '<|end|>' -}}
{%- else -%}
{%- set role = 'developer' if message['role'] == 'system' else message['role'] -%}
{{- '<|start|>' + role + '<|message|>' + message['content'] + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""


def gemma(folder: Path) -> Path:
    """A BOS before every text, literal spaces, and a BOS in the template as well."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "▁", *LETTERS]
    backend = Tokenizer(models.BPE(_numbered(words), [], unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(w, normalized=False) for w in words[:6]])
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    own = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "chat_template": GEMMA}
    return _save(backend, folder, "gemma2", {**config, **own}, [1])


def phi_3(folder: Path) -> Path:
    """Words begin with an implicit space; special tokens swallow following white space."""
    words = ["<unk>", "<s>", "</s>", "▁", *LETTERS]
    special = ["<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"]
    backend = Tokenizer(models.BPE(_numbered(words), [], unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(w, normalized=False) for w in words[:3]])
    backend.add_special_tokens([AddedToken(w, rstrip=True, normalized=False) for w in special])
    own = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "chat_template": PHI_3}
    ends = [len(words), len(words) + 1, len(words) + 2]
    return _save(backend, folder, "phi3", {**config, **own, "legacy": False}, ends)


def phi_4_mini(folder: Path) -> Path:
    """Some ids between the words and the special tokens are unused."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"<|endoftext|>": 300, "<|assistant|>": 319, "<|end|>": 320, "<|user|>": 321}
    backend = Tokenizer(models.BPE({**_numbered(alphabet), **special}, []))
    _by_bytes(backend, [*special])
    own = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    config = {"tokenizer_class": "GPT2Tokenizer", "chat_template": PHI_4_MINI}
    return _save(backend, folder, "phi3", {**config, **own}, [320, 300])


def gpt_oss(folder: Path) -> Path:
    """The template is a separate file, and uses the date."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|channel|>", "<|start|>"]
    special += ["<|end|>", "<|message|>", "<|call|>", "<|constrain|>"]
    backend = Tokenizer(models.BPE(_numbered(alphabet), []))
    _by_bytes(backend, special)
    own = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **own}
    folder = _save(backend, folder, "gpt_oss", config, [258, 257, 263])
    (folder / "chat_template.jinja").write_text(HARMONY)
    return folder


def _numbered(words: list[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}


def _by_bytes(backend: Tokenizer, special: list[str]) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, normalized=False) for word in special])


def _save(
    backend: Tokenizer, folder: Path, model_type: str, config: dict[str, Any], ends: list[int]
) -> Path:
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    files = {
        "tokenizer_config.json": config,
        "config.json": {"model_type": model_type, "vocab_size": 400},
        "generation_config.json": {"eos_token_id": ends},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder
