"""The JSON files of an adapter's directory, read without torch."""

from __future__ import annotations

from typing import Any

from turret.server.adapters.checkpoint.adapter_root import AdapterDirectory
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.strict_json import FormatError, parse_object
from turret.server.adapters.source import CONFIG_FILE, MAX_CONFIG_BYTES, PROVENANCE_FILE
from turret.server.basics.files import why_lfs_pointer
from turret.server.errors import AdapterCheckpointError
from turret.server.words import say

# Values of these keys stay in memory and on disk, and go to every client that lists adapters.
_NAMES = ("base_model_name_or_path", "revision")
MAX_NAME_CHARS = 512


def parse_config(data: bytes, path: str) -> dict[str, Any]:
    """``adapter_config.json`` of the adapter ``path``.

    Raises:
        AdapterCheckpointError: It or a name in it is too long, or it is no JSON object.
    """
    findings = Findings(path)
    config: dict[str, Any] = {}
    if len(data) > MAX_CONFIG_BYTES:
        findings.add(CONFIG_FILE, say("FILE_TOO_LARGE", most=MAX_CONFIG_BYTES))
    else:
        try:
            config = parse_object(data)
        except FormatError as error:
            is_pointer = why_lfs_pointer(data)
            findings.add(CONFIG_FILE, say("LFS_POINTER") if is_pointer else error.why)
    for key in _NAMES:
        value = config.get(key)
        if isinstance(value, str) and len(value) > MAX_NAME_CHARS:
            findings.add(key, say("TOO_MANY_CHARACTERS", most=MAX_NAME_CHARS, found=len(value)))
    findings.raise_if_any()
    return config


def read_base_digest(directory: AdapterDirectory) -> str:
    """The base's digest that ``turret train`` wrote; "" if there is no readable one."""
    if not directory.has(PROVENANCE_FILE):
        return ""
    try:
        with directory.open_file(PROVENANCE_FILE) as file:
            digest = parse_object(file.read(MAX_CONFIG_BYTES))["base"]["digest"]
    except (AdapterCheckpointError, OSError, ValueError, LookupError, TypeError):
        return ""
    return digest if isinstance(digest, str) else ""
