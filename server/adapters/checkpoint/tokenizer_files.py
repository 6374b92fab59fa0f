"""The tokenizer in an adapter's folder: its files as bytes, and not yet understood.

Adapters with tokens that the base lacks bring one. Only files with known names are opened, only as
large as they may be; of the config only keys that are known to say nothing but what texts and
tokens are: others name files, classes and code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from turret.server.adapters.checkpoint.adapter_root import AdapterDirectory
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.strict_json import FormatError, parse_object
from turret.server.adapters.source import TOKENIZER_FILE, TOKENIZER_FILES
from turret.server.adapters.tokenizer_files import TokenizerFiles
from turret.server.words import say

_CONFIG = "tokenizer_config.json"
_DOMAIN = b"turret-tokenizer-1\0"
_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Config keys that are passed to transformers. Others (paths, repository names, training settings)
# are dropped; code is rejected.
_SAID = frozenset(
    (
        *(f"{kind}_token" for kind in _TOKENS),
        "add_bos_token",
        "add_eos_token",
        "add_prefix_space",
        "added_tokens_decoder",
        "additional_special_tokens",
        "chat_template",
        "clean_up_tokenization_spaces",
        "extra_special_tokens",
        "legacy",
        "model_max_length",
        "spaces_between_special_tokens",
        "tokenizer_class",
    )
)
_CODE = ("auto_map", "custom_code")


def read_tokenizer_files(directory: AdapterDirectory, findings: Findings) -> TokenizerFiles | None:
    """Reads the tokenizer of a folder; None if it has none or adds findings.

    Args:
        directory: The adapter's.
        findings: Receives the faults of a file, by its name.

    Raises:
        AdapterCheckpointError: A file leads out of the root, or is no regular file.
    """
    if not directory.has(TOKENIZER_FILE):
        return None
    found: dict[str, bytes] = {}
    read: dict[str, bytes] = {}
    for name, most in TOKENIZER_FILES.items():
        if not directory.has(name):
            continue
        with directory.open_file(name) as file:
            data = file.read(most + 1)
        if len(data) > most:
            findings.add(name, say("FILE_TOO_LARGE", most=most))
            return None
        checked = _checked(name, data, findings)
        if checked is None:
            return None
        read[name], found[name] = data, checked
    return TokenizerFiles(found, tokenizer_digest(read), sum(map(len, read.values())))


def tokenizer_digest(files: Mapping[str, bytes]) -> str:
    """The digest of a tokenizer's files, by name in the order of ``TOKENIZER_FILES``."""
    digest = hashlib.sha256(_DOMAIN)
    for name, data in files.items():
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def _checked(name: str, data: bytes, findings: Findings) -> bytes | None:
    """The content to pass to transformers, or None if it is invalid."""
    try:
        if not name.endswith(".json"):
            data.decode()
            return data
        if name == TOKENIZER_FILE:
            # This file has millions of keys; the tokenizers library parses it, just as strictly.
            return data
        content = parse_object(data)
    except UnicodeDecodeError:
        findings.add(name, say("NOT_UTF8"))
        return None
    except FormatError as error:
        findings.add(name, error.why)
        return None
    return data if name != _CONFIG else _checked_config(content, findings)


def _checked_config(content: Mapping[str, Any], findings: Findings) -> bytes | None:
    for key in _CODE:
        if content.get(key):
            findings.add(f"{_CONFIG}[{key}]", say("TOKENIZER_CODE"))
            return None
    said = {key: value for key, value in content.items() if key in _SAID}
    kind = said.get("tokenizer_class")
    if kind is not None and not (isinstance(kind, str) and kind.isidentifier()):
        wanted = "the name of a class"
        findings.add(f"{_CONFIG}[tokenizer_class]", say("INVALID_VALUE", value=kind, wanted=wanted))
        return None
    return json.dumps(said).encode()
