"""Reads a PEFT adapter directory: ``adapter_config.json`` and ``adapter_model.safetensors``.

Each byte is read once: the same bytes are hashed, checked and turned into tensors, so a file that
changes during the load can make it fail but cannot pass a check with other content. Uploads whose
digest is known (``adapter_root.py``) are not hashed again, but their stamp must be the same before
and after. The methods interpret the keys and tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Any, BinaryIO

from turret.lazy_torch import torch
from turret.server.adapters.adapter import CONFIG_FILE, MAX_CONFIG_BYTES, TENSORS_FILE
from turret.server.adapters.checkpoint.adapter_checkpoint import (
    AdapterCheckpoint,
    Findings,
    canonical_names,
    text_prefix,
)
from turret.server.adapters.checkpoint.adapter_root import (
    AdapterRoot,
    DigestCache,
    check_is_adapter,
    stamp_of,
)
from turret.server.adapters.checkpoint.files import (
    DTYPES,
    FormatError,
    TensorEntry,
    check_fits,
    parse_config,
    read_header,
    read_trained_base,
)
from turret.server.words import say


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf; true for an empty tensor and for integers.

    ``torch.aminmax`` propagates NaN and takes a seventh of the time of ``torch.isfinite``, which
    took half of the time for reading an adapter. This matters because adapters are read while
    others are served.
    """
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    least, most = torch.aminmax(tensor.detach())
    return math.isfinite(least) and math.isfinite(most)


# Domain prefix of every digest. Change it when the definition of the digest changes.
_DIGEST_DOMAIN = b"turret-adapter-1\0"


def read_checkpoint(
    root: AdapterRoot,
    path: str,
    *,
    max_elements: int,
    item_bytes: int = 2,
    known: DigestCache | None = None,
    shown: str | None = None,
) -> AdapterCheckpoint:
    """Reads the adapter in directory ``path``.

    Args:
        root: The allow-listed root.
        path: Directory, relative to the root.
        max_elements: The maximum number of elements, over all tensors.
        item_bytes: Bytes that each element takes as served, for the error about an adapter that is
            too large.
        known: Digests of files that were hashed before; receives those of files hashed now.
        shown: The adapter's name in messages; None for its path.

    Raises:
        AdapterCheckpointError: The path, a file, a header or values are rejected.
        BudgetExceededError: There are more than ``max_elements``.
    """
    place, path = path, path if shown is None else shown
    with ExitStack() as files:
        with root.open_directory(place, path) as directory:
            check_is_adapter(directory, path)
            config_file = files.enter_context(directory.open_file(CONFIG_FILE))
            file = files.enter_context(directory.open_file(TENSORS_FILE))
            trained_base = read_trained_base(directory)
        stamp = None if known is None else stamp_of(config_file.fileno(), file.fileno())
        digest = None if known is None else known.find(stamp)
        config_bytes = config_file.read(MAX_CONFIG_BYTES + 1)
        config = parse_config(config_bytes, path)
        hashed = begin_digest(config)
        file_bytes = os.fstat(file.fileno()).st_size
        unhashed = hashed if digest is None else None
        tensors, prefix = _read_tensors(file, file_bytes, path, unhashed, max_elements, item_bytes)
        if digest is not None and stamp_of(config_file.fileno(), file.fileno()) != stamp:
            findings = Findings(path)
            findings.add(TENSORS_FILE, say("FILE_CHANGED"))
            findings.raise_if_any()
    if digest is None:
        digest = hashed.hexdigest()
        if known is not None:
            known.remember(stamp, digest)
    return AdapterCheckpoint(
        path=path,
        config=config,
        tensors=tensors,
        digest=digest,
        bytes_disk=len(config_bytes) + file_bytes,
        trained_base=trained_base,
        text_prefix=prefix,
    )


def begin_digest(config: Mapping[str, Any]) -> Any:
    """A hash of the config; feed it all bytes of the tensor file to get an adapter's digest."""
    digest = hashlib.sha256(_DIGEST_DOMAIN)
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    digest.update(len(canonical).to_bytes(8, "little"))
    digest.update(canonical)
    return digest


def _read_tensors(
    file: BinaryIO,
    file_bytes: int,
    path: str,
    digest: Any | None,
    max_elements: int,
    item_bytes: int,
) -> tuple[dict[str, torch.Tensor], str]:
    """Tensors by canonical name, and the names' ``text_prefix``."""
    findings = Findings(path)
    try:
        header = read_header(file, file_bytes)
    except FormatError as error:
        findings.add(TENSORS_FILE, error.why)
        findings.raise_if_any()
        raise
    check_fits(path, header, max_elements, item_bytes)
    names = canonical_names([entry.name for entry in header.entries], findings)
    data = _read_data(file, header.entries[-1].end if header.entries else 0)
    if data is None or file.read(1):
        findings.add(TENSORS_FILE, say("FILE_CHANGED"))
        findings.raise_if_any()
    assert data is not None
    if digest is not None:
        digest.update(header.raw)
        digest.update(data.numpy().data)
    tensors: dict[str, torch.Tensor] = {}
    for entry, tensor in _tensors_in(data, header.entries, findings):
        if entry.name in names:
            tensors[names[entry.name]] = tensor
    findings.raise_if_any()
    return tensors, text_prefix(entry.name for entry in header.entries)


def _read_data(file: BinaryIO, num_bytes: int) -> torch.Tensor | None:
    """``[num_bytes]`` uint8, or None if there is less. It owns its memory, never a mapping.

    A single read fetches all of it, because reading hundreds of small tensors would hold the GIL,
    which engine steps need.
    """
    data = torch.empty(num_bytes, dtype=torch.uint8)
    view = data.numpy().data
    filled = 0
    while filled < num_bytes:
        count = file.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            return None
        filled += count
    return data


def _tensors_in(
    data: torch.Tensor, entries: Sequence[TensorEntry], findings: Findings
) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
    """The tensors, views of the data, each with its entry; reports those that are not finite."""
    for kind, group in groupby(entries, lambda entry: entry.dtype):
        run, dtype = list(group), getattr(torch, DTYPES[kind])
        part = data[run[0].begin : run[-1].end]
        if run[0].begin % dtype.itemsize:
            part = part.clone()
        values = part.view(dtype)
        is_finite = not dtype.is_floating_point or all_finite(values)
        for entry, flat in zip(run, values.split([e.num_elements for e in run]), strict=True):
            if not is_finite and not all_finite(flat):
                findings.add(entry.name, say("NOT_FINITE", dtype=entry.dtype))
            yield entry, flat.view(entry.shape)
