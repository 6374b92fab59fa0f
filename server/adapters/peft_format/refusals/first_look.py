"""What an adapter's config and the header of its tensors already say against it, without torch.

A start that is to load adapters looks at them before it loads the model. Nothing is refused here
that the methods would take; what only they can tell is left to them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from turret.server.adapters.checkpoint.adapter_root import AdapterDirectory
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.json_files import parse_config, read_base_digest
from turret.server.adapters.checkpoint.safetensors_header import SafetensorsHeader, read_header
from turret.server.adapters.checkpoint.tensor_names import canonical_name
from turret.server.adapters.peft_format.refusals.base_name import is_other_base, of_other_base
from turret.server.adapters.peft_format.refusals.known_shapes import (
    BaseSize,
    check_pairs,
    check_shapes,
)
from turret.server.adapters.peft_format.refusals.limits import check_rank
from turret.server.adapters.peft_format.refusals.unserved import (
    SERVED_TYPES,
    UNSERVED,
    peft_type_of,
    why_unserved,
)
from turret.server.adapters.source import CONFIG_FILE, MAX_CONFIG_BYTES, TENSORS_FILE
from turret.server.basics.closest import did_you_mean

_BASE = "base_model_name_or_path"
_A = ".lora_A.weight"
# Keys of a LoRA whose ``lora_A`` has other rows than those of one rank.
_OTHER_ROWS = ("target_parameters", "arrow_config")
_PATTERN = "rank_pattern"
# Types whose ``r`` is the rank of all that they adapt, where no pattern says otherwise.
_RANKED_BY_R = frozenset(
    {
        *("DELORA", "HRA", "LOHA", "PEANUT", "POLY", "PVERA", "TINYLORA", "UNILORA", "VBLORA"),
        "VERA",
    }
)


def look_at(
    directory: AdapterDirectory,
    path: str,
    *,
    base: str | None,
    size: BaseSize | None = None,
    max_rank: int | None,
) -> None:
    """Refuse an adapter whose files cannot be served, as far as that shows.

    Args:
        directory: Has its two files.
        path: What messages call the adapter.
        base: The base's name as served; None if adapters of any base are taken.
        size: What is known of the base's shapes; None is nothing.
        max_rank: Largest rank; None is any.

    Raises:
        AdapterCheckpointError: A file cannot be read, the ``peft_type`` is misspelt or not served,
            ``r`` is no rank or contradicts a LoRA's factors, or one of two factors is missing.
        AdapterMismatchError: It names another base, or a LoRA's factors are for other shapes.
        BudgetExceededError: A rank is over ``max_rank``: of a LoRA, by its tensors, or of a method
            that has one, by its config.
    """
    with directory.open_file(CONFIG_FILE) as file:
        config = parse_config(file.read(MAX_CONFIG_BYTES + 1), path)
    findings = Findings(path)
    _check_peft_type(config, findings)
    header = _header(directory, findings)
    ranks = {} if header is None else _ranks(config, header)
    _check_ranks(config, ranks, findings)
    lora = header if peft_type_of(config) == "LORA" else None
    if lora is not None:
        check_pairs(lora, findings)
    findings.raise_if_any()
    # With a digest of its base beside it, the name alone proves nothing.
    trained = None if read_base_digest(directory) else config.get(_BASE)
    if base is not None and isinstance(trained, str) and is_other_base(trained, base):
        raise of_other_base(path, trained, base)
    if lora is not None and size is not None:
        check_shapes(path, config, lora, size)
    check_rank(path, max([*ranks.values(), _rank_of_all(config)]), max_rank)


def _check_peft_type(config: Mapping[str, Any], findings: Findings) -> None:
    kind = peft_type_of(config)
    # One that is like no other may be that of a method which was added to this installation.
    is_meant = kind not in SERVED_TYPES and did_you_mean(kind, sorted({*SERVED_TYPES, *UNSERVED}))
    if not kind or kind in UNSERVED or is_meant:
        findings.add("peft_type", why_unserved(kind, SERVED_TYPES))


def _header(directory: AdapterDirectory, findings: Findings) -> SafetensorsHeader | None:
    with directory.open_file(TENSORS_FILE) as file:
        try:
            return read_header(file, os.fstat(file.fileno()).st_size)
        except ValueError as error:
            findings.add(TENSORS_FILE, str(error))
    return None


def _ranks(config: Mapping[str, Any], header: SafetensorsHeader) -> dict[str, int]:
    """Rows of each ``lora_A`` of a LoRA, by the tensor's name, where they are its rank."""
    if peft_type_of(config) != "LORA" or any(config.get(key) for key in _OTHER_ROWS):
        return {}
    names = {entry: canonical_name(entry.name) for entry in header.entries}
    return {
        name: entry.shape[0]
        for entry, name in names.items()
        if name.endswith(_A) and len(entry.shape) == 2
    }


def _rank_of_all(config: Mapping[str, Any]) -> int:
    """What a config alone says of the rank of every adapted module; 0 where it does not."""
    rank = config.get("r")
    is_told = peft_type_of(config) in _RANKED_BY_R and not config.get(_PATTERN)
    return rank if is_told and type(rank) is int else 0


def _check_ranks(config: Mapping[str, Any], ranks: Mapping[str, int], findings: Findings) -> None:
    rank = config.get("r")
    has_rank = peft_type_of(config) in {"LORA", *_RANKED_BY_R} and "r" in config
    if has_rank and not (type(rank) is int and rank >= 1):
        findings.add("r", f"must be an integer >= 1, not {rank!r:.60}")
        return
    if config.get(_PATTERN):
        # Which rank a module has then, the base's modules decide.
        return
    for name, rows in ranks.items():
        if type(rank) is int and rows != rank:
            why = f"has rank {rows}, the config says {rank}"
            findings.add(name, f"{why}; {CONFIG_FILE} may be of another training")
