"""Reads a PEFT adapter directory: ``adapter_config.json`` and ``adapter_model.safetensors``.

Each byte is read once: the same bytes are hashed, checked and turned into tensors, so a file that
changes during the load can make it fail but cannot pass a check with other content. Uploads whose
digest is known (``adapter_root.py``) are not hashed again, but their stamp must be the same before
and after. The adapter methods later interpret the keys and tensors.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO

from turret.lazy_torch import torch
from turret.server.adapters.adapter import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    PROVENANCE_FILE,
    TENSORS_FILE,
)
from turret.server.adapters.checkpoint import (
    AdapterCheckpoint,
    Findings,
    TrainedBase,
    canonical_names,
    text_prefix,
)
from turret.server.adapters.checkpoint.adapter_root import (
    AdapterDirectory,
    AdapterRoot,
    DigestCache,
    check_is_adapter,
    stamp_of,
)
from turret.server.basics.files import why_lfs_pointer
from turret.server.errors import AdapterCheckpointError, BudgetExceededError
from turret.server.words import Text, say

# Maximum length of a key in the outermost object. Error messages repeat keys, and no format needs
# longer ones.
MAX_KEY_CHARS = 512


class FormatError(ValueError):
    """A file breaks its format.

    Attributes:
        why: The fault, in words suitable for a client.
    """

    def __init__(self, why: Text) -> None:
        super().__init__(why)
        self.why = why


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise FormatError(say("JSON_DUPLICATE_KEY", key=key))
        result[key] = value
    return result


def _constant(name: str) -> Any:
    raise FormatError(say("JSON_NOT_FINITE", value=name))


def parse_object(data: bytes) -> dict[str, Any]:
    """Parses UTF-8 JSON whose top level is an object, without repeated keys or NaN.

    Returns:
        The object. All of its strings can be encoded as UTF-8, and so be sent to clients.

    Raises:
        FormatError: The data is something else.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_pairs, parse_constant=_constant)
    except UnicodeDecodeError:
        raise FormatError(say("NOT_UTF8")) from None
    except RecursionError:
        raise FormatError(say("JSON_TOO_NESTED")) from None
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(say("NOT_JSON", problem=str(error))) from None
    if not isinstance(value, dict):
        raise FormatError(say("NOT_A_JSON_OBJECT"))
    for key in value:
        if len(key) > MAX_KEY_CHARS:
            raise FormatError(say("JSON_KEY_TOO_LONG", most=MAX_KEY_CHARS, key=key))
    # UTF-8 cannot encode surrogates, so only a \u escape can produce one.
    if b"\\u" in data:
        for key, item in value.items():
            if not (_is_text(key) and _is_text(item)):
                raise FormatError(say("JSON_HALF_CHARACTER", key=ascii(key)[1:-1]))
    return value


def _is_text(value: Any) -> bool:
    """Whether UTF-8 can encode every string in a parsed value."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            try:
                part.encode()
            except UnicodeEncodeError:
                return False
        elif isinstance(part, dict):
            waiting += (*part.keys(), *part.values())
        elif isinstance(part, list):
            waiting += part
    return True


# Keys whose values must be short, because the server keeps them and sends them to every client that
# lists adapters.
_NAMES = ("base_model_name_or_path", "revision")
MAX_NAME_CHARS = 512


def parse_config(data: bytes, path: str) -> dict[str, Any]:
    """Parses the ``adapter_config.json`` of the adapter ``path``.

    Raises:
        AdapterCheckpointError: The file or a name in it is too long, or the file is not a JSON
            object.
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


def read_trained_base(directory: AdapterDirectory) -> TrainedBase:
    """The base in ``provenance.json`` alongside an adapter's files; empty if it is unreadable."""
    if not directory.has(PROVENANCE_FILE):
        return TrainedBase()
    try:
        with directory.open_file(PROVENANCE_FILE) as file:
            base = parse_object(file.read(MAX_CONFIG_BYTES))["base"]
            digest, weights = base["digest"], base.get("weights")
    except (AdapterCheckpointError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return TrainedBase()
    # A warning contains the beginning of the digest, so accept only letters and digits.
    if not isinstance(digest, str) or not digest.isalnum():
        return TrainedBase()
    return TrainedBase(digest, weights if isinstance(weights, dict) else {})


# The safetensors header, checked completely before any tensor byte is read.
#
# Layout: 8 bytes little-endian header length, that many bytes of JSON (``{name: {"dtype", "shape",
# "data_offsets": [begin, end]}, "__metadata__": {...}}``), then the data. Offsets count from the
# end of the header and must tile the data: no gap, no overlap. This code does not use torch,
# because a starting server reads headers before torch is loaded.


# 80 layers of 7 modules with 4 tensors each need about half a megabyte.
MAX_HEADER_BYTES = 8 << 20
MAX_DIMENSIONS = 4
MAX_EXTENT = 1 << 31
_MAX_SHARED_BYTES = 256 << 10
_FIELDS = {"dtype", "shape", "data_offsets"}

# Names of torch's dtypes by those of safetensors: weights, and integers that some methods use as
# indices. 8-bit floats are left out because they mean an unsupported format.
DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The location of one tensor: ``[begin, end)`` in bytes from the end of the header.

    ``dtype`` is a key of ``DTYPES``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def is_floating_point(self) -> bool:
        return "float" in DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """``raw`` is the header as read (length word included); ``entries`` are in file order."""

    raw: bytes
    entries: tuple[TensorEntry, ...]

    @property
    def num_elements(self) -> int:
        return sum(entry.num_elements for entry in self.entries)


def read_header(file: BinaryIO, file_bytes: int) -> SafetensorsHeader:
    """Reads and checks the header; the file is left at the first data byte.

    Args:
        file: Open at its start.
        file_bytes: The size of the whole file.

    Raises:
        FormatError: The file breaks the format or its limits.
    """
    word = file.read(8)
    if why_lfs_pointer(word):
        raise FormatError(say("LFS_POINTER"))
    if len(word) != 8:
        raise _cut_short(file_bytes, 8)
    (length,) = struct.unpack("<Q", word)
    if length > MAX_HEADER_BYTES:
        raise _invalid(say("HEADER_TOO_LARGE", found=length, most=MAX_HEADER_BYTES))
    text = file.read(length)
    if len(text) != length:
        raise _cut_short(file_bytes, 8 + length)
    parse = _parse_shared if length <= _MAX_SHARED_BYTES else _parse
    return SafetensorsHeader(word + text, parse(text, file_bytes - 8 - length))


def _invalid(why: Text) -> FormatError:
    return FormatError(say("INVALID_SAFETENSORS", why=why))


def _cut_short(found: int, needed: int) -> FormatError:
    return FormatError(say("FILE_CUT_SHORT", found=found, needed=needed))


def check_fits(path: str, header: SafetensorsHeader, max_elements: int, item_bytes: int) -> None:
    """Reject an adapter with more weights than host memory may hold.

    Args:
        path: The adapter's name in messages.
        header: Header of the adapter's tensor file.
        max_elements: The maximum number of elements.
        item_bytes: The minimum number of bytes that each element takes as served.

    Raises:
        BudgetExceededError: The adapter has more elements.
    """
    elements = header.num_elements
    if elements > max_elements:
        needed, budget = elements * item_bytes, max_elements * item_bytes
        raise over_host_memory(path, needed, budget, elements=elements)


def over_host_memory(path: str, needed: int, budget: int, **more: int) -> BudgetExceededError:
    """The error for an adapter that needs more bytes than all adapters together may have."""
    text = say("OVER_HOST_MEMORY", path=path, bytes=needed, host_bytes=budget, **more)
    return BudgetExceededError(text)


def _parse(text: bytes, data_bytes: int) -> tuple[TensorEntry, ...]:
    """Parses a header's JSON into entries, in file order."""
    table = parse_object(text)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, Mapping):
        raise _invalid(say("METADATA_NOT_AN_OBJECT"))
    entries = sorted(
        (_entry(name, spec) for name, spec in table.items()), key=lambda e: (e.begin, e.end)
    )
    _check_tiling(entries, data_bytes)
    return tuple(entries)


# Adapters from the same recipe differ only in their weights, so thousands share one header.
_parse_shared = functools.lru_cache(maxsize=16)(_parse)


def _is_index(value: Any) -> bool:
    # Compare types, because a bool is an int too.
    return type(value) is int and value >= 0


def _entry(name: str, spec: Any) -> TensorEntry:
    if not isinstance(spec, dict) or spec.keys() != _FIELDS:
        raise _invalid_entry(name)
    dtype, shape, offsets = spec["dtype"], spec["shape"], spec["data_offsets"]
    if not isinstance(dtype, str):
        raise _invalid_entry(name)
    if dtype not in DTYPES:
        choices = ", ".join(DTYPES)
        raise _invalid(say("TENSOR_DTYPE_UNSUPPORTED", name=name, value=dtype, choices=choices))
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise _invalid_entry(name)
    if any(not _is_index(extent) or extent >= MAX_EXTENT for extent in shape):
        raise _invalid_entry(name)
    is_pair = isinstance(offsets, list) and len(offsets) == 2
    if not is_pair or not (_is_index(offsets[0]) and _is_index(offsets[1])):
        raise _invalid_entry(name)
    begin, end = offsets
    # The number in a dtype's name is its number of bits.
    if end - begin != math.prod(shape) * int(dtype.strip("BFIU")) // 8:
        raise _invalid_entry(name)
    return TensorEntry(name, dtype, tuple(shape), begin, end)


def _invalid_entry(name: str) -> FormatError:
    return _invalid(say("TENSOR_ENTRY_INVALID", name=name))


def _check_tiling(entries: list[TensorEntry], data_bytes: int) -> None:
    at = 0
    for entry in entries:
        if entry.begin != at:
            about = {"name": entry.name, "found": entry.begin, "expected": at}
            raise _invalid(say("TENSORS_NOT_CONTIGUOUS", **about))
        at = entry.end
    if at != data_bytes:
        if at > data_bytes:
            raise _cut_short(data_bytes, at)
        raise _invalid(say("TENSOR_DATA_LEFT", found=at, expected=data_bytes))


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
        BudgetExceededError: There are more than ``max_elements`` elements.
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
    """The file's next bytes, ``[num_bytes]`` uint8, copied to memory; None if there are too few.

    All bytes are read at once, because reading hundreds of small tensors one by one would hold the
    GIL, which engine steps need.
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
