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
from turret.server.adapters.checkpoint.safetensors_header import (
    SafetensorsHeader,
    check_fits,
    read_header,
)
from turret.server.adapters.peft_format.refusals.base_name import is_other_base, of_other_base
from turret.server.adapters.peft_format.refusals.early_finite import check_finite
from turret.server.adapters.peft_format.refusals.early_ranks import check_early_rank, check_r
from turret.server.adapters.peft_format.refusals.early_settings import check_settings
from turret.server.adapters.peft_format.refusals.early_tensors import check_tensors
from turret.server.adapters.peft_format.refusals.known_shapes import (
    BaseSize,
    check_modules,
    check_pairs,
    check_tokens,
)
from turret.server.adapters.peft_format.refusals.unserved import (
    SERVED_TYPES,
    peft_type_of,
    why_unserved,
)
from turret.server.adapters.source import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    TENSORS_FILE,
    TOKENIZER_FILE,
)

_BASE = "base_model_name_or_path"


def look_at(
    directory: AdapterDirectory,
    path: str,
    *,
    base: str | None,
    size: BaseSize | None = None,
    max_rank: int | None,
    host_bytes: int | None = None,
    item_bytes: int = 2,
    most_bytes: int = 0,
) -> int:
    """Refuse an adapter whose files cannot be served, as far as that shows.

    Args:
        directory: Has its two files.
        path: What messages call the adapter.
        base: The base's name as served; None if adapters of any base are taken.
        size: What is known of the base's shapes; None is nothing.
        max_rank: Largest rank; None is any.
        host_bytes: Host memory of all adapters; None is any.
        item_bytes: What a weight takes of it as served.
        most_bytes: How many bytes of tensors may be read, to see whether they are finite.

    Returns:
        How many were.

    Raises:
        AdapterCheckpointError: A file cannot be read, the ``peft_type`` is not served, a setting is
            none that the methods take, ``r`` contradicts a LoRA's factors, one of two factors is
            missing, a LoRA's other tensors contradict its config, a tensor holds NaN or Inf, or
            the tokenizer of an adapter with tokens of its own is not beside it.
        AdapterMismatchError: It names another base, is of modules that the base has not, or a
            LoRA's factors are for other shapes.
        BudgetExceededError: A rank is over ``max_rank``, by the tensors or the config, or the
            tensors are more than ``host_bytes`` hold.
    """
    with directory.open_file(CONFIG_FILE) as file:
        config = parse_config(file.read(MAX_CONFIG_BYTES + 1), path)
    findings = Findings(path)
    _check_peft_type(config, findings)
    header = _header(directory, findings)
    check_settings(config, findings)
    check_r(config, header, findings)
    lora = header if peft_type_of(config) == "LORA" else None
    if lora is not None:
        check_pairs(lora, findings)
    findings.raise_if_any()
    # With a digest of its base beside it, the name alone proves nothing.
    trained = None if read_base_digest(directory) else config.get(_BASE)
    if base is not None and isinstance(trained, str) and is_other_base(trained, base):
        raise of_other_base(path, trained, base)
    if header is not None and size is not None:
        check_modules(path, config, header, size)
        if not directory.has(TOKENIZER_FILE):
            check_tokens(header, size, findings)
            findings.raise_if_any()
    check_early_rank(path, config, header, max_rank)
    if header is not None and host_bytes is not None:
        check_fits(path, header, host_bytes // item_bytes, item_bytes)
    if lora is not None:
        # Behind the base's checks: of an adapter for another model that is the cause.
        check_tensors(config, lora, findings)
        findings.raise_if_any()
    return 0 if header is None else check_finite(directory, header, findings, most_bytes)


def _check_peft_type(config: Mapping[str, Any], findings: Findings) -> None:
    kind = peft_type_of(config)
    if kind not in SERVED_TYPES:
        findings.add("peft_type", why_unserved(kind, SERVED_TYPES))


def _header(directory: AdapterDirectory, findings: Findings) -> SafetensorsHeader | None:
    with directory.open_file(TENSORS_FILE) as file:
        try:
            return read_header(file, os.fstat(file.fileno()).st_size)
        except ValueError as error:
            findings.add(TENSORS_FILE, str(error))
    return None
