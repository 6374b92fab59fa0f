"""Checks of an adapter by its config and the header of its tensors, without the tensors' values.

A server that loads adapters at startup checks them in this way before it loads the model. It runs
the methods' own checks. Checks that need the values of tensors, or that concern the vocabulary, run
only when the adapter is loaded.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from turret.server.adapters.adapter import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    TENSORS_FILE,
    TOKENIZER_FILE,
)
from turret.server.adapters.base import BaseSizes
from turret.server.adapters.checkpoint import (
    AdapterCheckpoint,
    Findings,
    canonical_names,
    text_prefix,
)
from turret.server.adapters.checkpoint.adapter_root import AdapterDirectory
from turret.server.adapters.checkpoint.reader import (
    FormatError,
    SafetensorsHeader,
    check_fits,
    parse_config,
    read_header,
    read_trained_base,
)
from turret.server.adapters.methods import AnyMethod, check_common, method_for
from turret.server.adapters.operators.vocabulary import EMBEDDING, HEAD
from turret.server.adapters.peft_format.classifier_checkpoint import without_classifier
from turret.server.adapters.peft_format.config_rules import vocabulary_module
from turret.server.adapters.peft_format.refusals import is_other_base, of_other_base
from turret.server.words import say

_BASE = "base_model_name_or_path"
# Names of whole matrices that have one row per token.
_ALL_TOKENS = (
    *(f"{EMBEDDING}{end}" for end in (".weight", ".base_layer.weight")),
    f"{HEAD}.weight",
)


def check_files(
    directory: AdapterDirectory,
    path: str,
    *,
    base: BaseSizes | None,
    base_name: str | None,
    max_rank: int | None,
    host_bytes: int | None = None,
    item_bytes: int = 2,
) -> None:
    """Rejects an adapter that cannot be served, as far as its config and header show.

    Args:
        directory: The adapter's directory, with the config and the tensors.
        path: The adapter's name in messages.
        base: The known facts about the base, or None.
        base_name: The base's name as served; None if adapters of any base are accepted.
        max_rank: The maximum rank; None for any.
        host_bytes: The maximum host memory of all adapters; None for any.
        item_bytes: Bytes of host memory that each weight takes as served.

    Raises:
        AdapterCheckpointError: The errors that a load would raise.
        AdapterMismatchError: Likewise.
        BudgetExceededError: Likewise.
    """
    with directory.open_file(CONFIG_FILE) as file:
        config = parse_config(file.read(MAX_CONFIG_BYTES + 1), path)
    checkpoint = AdapterCheckpoint(path, config, tensors={}, digest="", bytes_disk=0)
    method = method_for(checkpoint)
    findings = Findings(path)
    header = _header(directory, findings)
    names = canonical_names([entry.name for entry in header.entries], findings)
    findings.raise_if_any()
    # The methods' checks read only shapes and dtypes, which header entries have as well.
    entries: Any = {names[entry.name]: entry for entry in header.entries}
    prefix = text_prefix(entry.name for entry in header.entries)
    checkpoint = replace(checkpoint, tensors=entries, text_prefix=prefix)
    check_common(checkpoint, method)
    rest = without_classifier(checkpoint)
    method.check_config(rest.config, findings)
    findings.raise_if_any()
    # If the adapter comes with the digest of its base, do not compare the base's name: the digest
    # decides.
    trained = None if read_trained_base(directory).digest else config.get(_BASE)
    if base_name is not None and isinstance(trained, str) and is_other_base(trained, base_name):
        raise of_other_base(path, trained, base_name)
    if base is not None:
        _check_tensors(rest, method, base, max_rank)
        if not directory.has(TOKENIZER_FILE):
            _check_tokens(checkpoint, base, findings)
            findings.raise_if_any()
    if host_bytes is not None:
        check_fits(path, header, host_bytes // item_bytes, item_bytes)


def _header(directory: AdapterDirectory, findings: Findings) -> SafetensorsHeader:
    with directory.open_file(TENSORS_FILE) as file:
        try:
            return read_header(file, os.fstat(file.fileno()).st_size)
        except FormatError as error:
            findings.add(TENSORS_FILE, error.why)
    return SafetensorsHeader(b"", ())


def _check_tensors(
    checkpoint: AdapterCheckpoint, method: AnyMethod, base: BaseSizes, max_rank: int | None
) -> None:
    """Runs the method's own check on all tensors but those of the vocabulary."""
    tensors = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if name.removeprefix("base_model.").partition(".")[0] != HEAD and "embed_tokens" not in name
    }
    is_partial = len(tensors) < len(checkpoint.tensors)
    saved = checkpoint.config.get("modules_to_save")
    is_saved = saved and any(vocabulary_module(name) for name in saved)
    if is_partial and not (is_saved or method.on_vocabulary):
        # Skip a method that adapts the head: its shared tensors may be as large as the head.
        return
    base = replace(base, text_prefix=checkpoint.text_prefix)
    method.read(replace(checkpoint, tensors=tensors, is_partial=is_partial), base, max_rank)


def _check_tokens(checkpoint: AdapterCheckpoint, base: BaseSizes, findings: Findings) -> None:
    """Reports rows for tokens that the base lacks, if the adapter has no tokenizer for them."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    rows = max((shapes[name][0] for name in _ALL_TOKENS if shapes.get(name)), default=0)
    if 0 < base.vocab_size < rows:
        findings.add(
            TOKENIZER_FILE, say("ADAPTER_LACKS_TOKENIZER", rows=rows, base_rows=base.vocab_size)
        )
