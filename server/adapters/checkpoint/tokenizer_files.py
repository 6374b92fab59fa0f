"""The tokenizer and the chat template in an adapter's directory.

Adapters with tokens that the base lacks have their own tokenizer, whose files are read as bytes and
not interpreted here. Only files with known names are opened, up to their maximum size. From the
config, only the class and the keys that describe texts and tokens are kept, because other keys name
files and code. A chat template is read for any adapter, from the places where transformers looks
for it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from typing import Any

from turret.server.adapters.adapter import (
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    OwnTemplate,
    TokenizerFiles,
)
from turret.server.adapters.checkpoint import Findings
from turret.server.adapters.checkpoint.adapter_root import AdapterDirectory
from turret.server.adapters.checkpoint.reader import FormatError, parse_object
from turret.server.words import say

_DOMAIN = b"turret-tokenizer-1\0"
_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Config keys that are kept and passed to transformers. Others (paths, repository names, training
# settings) are dropped; code is rejected.
_KEPT_KEYS = frozenset(
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
# The templates that turret uses, by their names in older tokenizers.
_TEMPLATES = ("default", "tool_use")


def read_tokenizer_files(directory: AdapterDirectory, findings: Findings) -> TokenizerFiles | None:
    """Reads the tokenizer in a directory. Returns None if there is none, or if findings were added.

    Args:
        directory: The adapter's directory.
        findings: Receives the faults of a file, by its name.

    Raises:
        AdapterCheckpointError: A file is a link out of the root, or not a regular file.
    """
    if not directory.has(TOKENIZER_FILE):
        return None
    found: dict[str, bytes] = {}
    read: dict[str, bytes] = {}
    for name in TOKENIZER_FILES:
        if not directory.has(name):
            continue
        data = _data(directory, name, findings)
        checked = None if data is None else _checked(name, data, findings)
        if data is None or checked is None:
            return None
        read[name], found[name] = data, checked
    return TokenizerFiles(found, tokenizer_digest(read), sum(map(len, read.values())))


def tokenizer_digest(files: Mapping[str, bytes]) -> str:
    """The digest of a tokenizer's files, by name in the order of ``TOKENIZER_FILES``."""
    digest = hashlib.sha256(_DOMAIN)
    for name, data in files.items():
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def read_chat_template(
    directory: AdapterDirectory, findings: Findings, given: OwnTemplate | None = None
) -> str:
    """Reads the chat template in a directory, with the special tokens that it writes.

    Args:
        directory: The adapter's directory.
        findings: Receives the faults of a file, by its name.
        given: The template to use instead. Special tokens that it does not name come from the
            directory.

    Returns:
        The template in the form of ``AdapterFacts.chat_template``; empty if there is none.

    Raises:
        AdapterCheckpointError: A file is a link out of the root, or not a regular file.
    """
    config = _object(directory, TOKENIZER_CONFIG_FILE, findings)
    if given is None:
        given = _template(directory, config, findings)
    if not given.templates:
        return ""
    tokens = _special_tokens(_object(directory, SPECIAL_TOKENS_FILE, findings) | config)
    used = {
        name: token
        for name, token in tokens.items()
        if name == "eos_token" or any(name in text for text in given.templates.values())
    }
    template = OwnTemplate(given.origin, given.templates, {**used, **given.tokens})
    return sys.intern(template.to_json())


def _template(
    directory: AdapterDirectory, config: Mapping[str, Any], findings: Findings
) -> OwnTemplate:
    """The template in a directory, from its own file or the config, without special tokens."""
    if directory.has(TEMPLATE_FILE):
        origin, value = TEMPLATE_FILE, _template_text(directory, findings)
    else:
        origin, value = TOKENIZER_CONFIG_FILE, config.get("chat_template")
    if isinstance(value, list):
        # Older tokenizers have several templates, each an object with a name.
        each = (one for one in value if isinstance(one, dict))
        value = {str(one.get("name")): one.get("template") for one in each}
    named = value if isinstance(value, dict) else {"default": value}
    found = {name: named.get(name) for name in _TEMPLATES}
    templates = {n: t for n, t in found.items() if isinstance(t, str) and t.strip()}
    most = TOKENIZER_FILES[TEMPLATE_FILE]
    if any(len(text.encode()) > most for text in templates.values()):
        findings.add(origin, say("CHAT_TEMPLATE_TOO_LARGE", most=most))
    return OwnTemplate(origin, templates)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str | None]:
    """Texts of the special tokens that a config names, by their keys."""
    tokens: dict[str, str | None] = {}
    for key in (f"{kind}_token" for kind in _TOKENS if f"{kind}_token" in config):
        value = config[key]
        text = value.get("content") if isinstance(value, dict) else value
        tokens[key] = text if isinstance(text, str) else None
    return tokens


def _object(directory: AdapterDirectory, name: str, findings: Findings) -> dict[str, Any]:
    """A JSON file in the directory; empty if it is missing."""
    data = _data(directory, name, findings) if directory.has(name) else None
    try:
        return {} if data is None else parse_object(data)
    except FormatError as error:
        findings.add(name, error.why)
        return {}


def _template_text(directory: AdapterDirectory, findings: Findings) -> str:
    """The template's own file in the directory; empty if it is invalid."""
    try:
        return (_data(directory, TEMPLATE_FILE, findings) or b"").decode()
    except UnicodeDecodeError:
        findings.add(TEMPLATE_FILE, say("NOT_UTF8"))
        return ""


def _data(directory: AdapterDirectory, name: str, findings: Findings) -> bytes | None:
    """A file in the directory, or None if it is too large."""
    most = TOKENIZER_FILES[name]
    with directory.open_file(name) as file:
        data = file.read(most + 1)
    if len(data) <= most:
        return data
    findings.add(name, say("FILE_TOO_LARGE", most=most))
    return None


def _checked(name: str, data: bytes, findings: Findings) -> bytes | None:
    """The content to pass to transformers, or None if it is invalid."""
    try:
        if not name.endswith(".json"):
            data.decode()
            return data
        if name == TOKENIZER_FILE:
            # This file is too large to parse twice; the tokenizers library is just as strict.
            return data
        content = parse_object(data)
    except UnicodeDecodeError:
        findings.add(name, say("NOT_UTF8"))
        return None
    except FormatError as error:
        findings.add(name, error.why)
        return None
    return data if name != TOKENIZER_CONFIG_FILE else _checked_config(content, findings)


def _checked_config(content: Mapping[str, Any], findings: Findings) -> bytes | None:
    for key in _CODE:
        if content.get(key):
            findings.add(f"{TOKENIZER_CONFIG_FILE}[{key}]", say("TOKENIZER_CODE"))
            return None
    kept = {key: value for key, value in content.items() if key in _KEPT_KEYS}
    kind = kept.get("tokenizer_class")
    if kind is not None and not (isinstance(kind, str) and kind.isidentifier()):
        why = say("INVALID_VALUE", value=kind, wanted="the name of a class")
        findings.add(f"{TOKENIZER_CONFIG_FILE}[tokenizer_class]", why)
        return None
    return json.dumps(kept).encode()
