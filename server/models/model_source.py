"""Turns any supported source into a bitsandbytes-4bit checkpoint directory, once.

A plain Hugging Face directory or a GGUF file is quantised tensor by tensor (the bf16 model
is never held whole) and written to the cache; later starts read the cache. A directory that is
already bitsandbytes-4bit is taken as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from turret.server.errors import InvalidRequestError
from turret.server.models.families import read_arch
from turret.server.models.sources.embedded import MODEL_NAME, find_gguf
from turret.server.models.sources.gguf_file import open_gguf
from turret.server.models.sources.gguf_header import SUFFIX
from turret.server.models.sources.hub_model import Progress, fetch_hub_model, hub_model_id
from turret.server.models.sources.model_directory import (
    WEIGHTS,
    check_model_directory,
    is_4bit,
    model_name,
    scale_block,
    weight_files,
)
from turret.server.models.stored_tensors import StoredTensors
from turret.server.models.weights.nf4 import Nf4Weight
from turret.server.words import say

# Part of the cache key: raise it when the format of the cached files changes.
_FORMAT = "2"
_MANIFEST = "turret.json"


def no_progress(description: str, done: int, total: int) -> None:
    """A progress callback that does nothing."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model is, ready to load.

    Attributes:
        name: Model id on the hub or as the checkpoint names itself, else the directory's name.
        weights: Directory of a bitsandbytes-4bit checkpoint.
        files: Directory with config.json and the tokenizer.
        digest: SHA-256 of the weight files.
        commit: Of a model from the hub.
    """

    name: str
    weights: Path
    files: Path
    digest: str
    commit: str = ""


def resolve_model(
    model: Path | None, cache_dir: Path, progress: Progress = no_progress
) -> ModelSource:
    """Find or make the 4-bit checkpoint of a model.

    Args:
        model: A Hugging Face model directory, a GGUF file, ``org/name[@revision]`` of the hub, or
            None for the embedded model.
        cache_dir: Where quantised checkpoints are kept.
        progress: Told how far quantisation is.

    Raises:
        InvalidRequestError: None of these, or in a format that is not served.
    """
    hub_id = None if model is None else hub_model_id(model)
    if hub_id is not None:
        folder, commit = fetch_hub_model(hub_id, progress)
        source = _resolve(folder, cache_dir, progress)
        return dataclasses.replace(source, name=hub_id.repository, commit=commit)
    return _resolve(model, cache_dir, progress)


def _resolve(model: Path | None, cache_dir: Path, progress: Progress) -> ModelSource:
    if model is None:
        return _resolve_gguf(find_gguf(), MODEL_NAME, cache_dir, progress)
    if model.suffix == SUFFIX and model.is_file():
        return _resolve_gguf(model, model.stem, cache_dir, progress)
    config, config_file = check_model_directory(model), model / "config.json"
    shards = weight_files(model)
    if is_4bit(config):
        return ModelSource(model_name(model, config), model, model, _digest(shards))
    target = cache_dir / f"nf4-{_key([config_file, *shards])}"
    if not (target / _MANIFEST).exists():
        with _new_directory(target) as build:
            tensors = _read_plain(model, shards, scale_block(config))
            each = ((name, tensors.get(name)) for name in tensors)
            _quantize(each, len(tensors), build, model_name(model, config), progress)
    return _read_cached(target, model)


def _resolve_gguf(model: Path, name: str, cache_dir: Path, progress: Progress) -> ModelSource:
    target = cache_dir / f"nf4-{_key([model])}"
    if not (target / _MANIFEST).exists():
        found = open_gguf(model)
        with _new_directory(target) as build:
            found.config.save_pretrained(build)
            found.tokenizer.save_pretrained(build)
            ends = json.dumps({"eos_token_id": found.eos_token_ids})
            (build / "generation_config.json").write_text(ends)
            _quantize(found.tensors(), found.num_tensors, build, name, progress)
    # The embedded model's file may also be given by its path; it keeps the embedded model's name.
    return dataclasses.replace(_read_cached(target, target), name=name)


def _read_plain(
    model: Path, shards: Sequence[Path], block: tuple[int, int] | None
) -> StoredTensors:
    # Imported here because it is slow and a cached model does not need it.
    from transformers import AutoConfig

    tensors = StoredTensors(shards, read_arch(AutoConfig.from_pretrained(model)).experts, block)
    if codes := tensors.codes():
        raise InvalidRequestError.of("model", say("TENSORS_UNEXPECTED", names=", ".join(codes[:8])))
    return tensors


def is_quantized(name: str) -> bool:
    """Whether a tensor is the weight of a decoder layer's linear module, a router's excepted."""
    if ".layers." not in name:
        return False
    is_of_expert = ".experts." in name and name.endswith(".weight")
    return is_of_expert or name.endswith(("_proj.weight", "_linear.weight"))


def _quantize(
    tensors: Iterable[tuple[str, torch.Tensor]],
    total: int,
    build: Path,
    name: str,
    progress: Progress,
) -> None:
    out: dict[str, torch.Tensor] = {}
    for done, (key, tensor) in enumerate(tensors):
        progress("Quantising to NF4", done, total)
        tensor = tensor.to(torch.bfloat16)
        if is_quantized(key):
            out.update(Nf4Weight.quantize(tensor).to_tensors(key))
        else:
            out[key] = tensor.contiguous().clone()
    progress("Quantising to NF4", total, total)
    try:
        save_file(out, build / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        said = say("CACHE_NOT_WRITABLE", folder=build.parent, problem=error)
        raise InvalidRequestError.of("model", said) from None
    manifest = {"name": name, "digest": _digest([build / WEIGHTS]), "format": _FORMAT}
    (build / _MANIFEST).write_text(json.dumps(manifest))


def _read_cached(weights: Path, files: Path) -> ModelSource:
    manifest = json.loads((weights / _MANIFEST).read_text())
    return ModelSource(manifest["name"], weights, files, manifest["digest"])


class _new_directory:
    """Fill a directory beside its final place, then rename it there: readers see all or nothing."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> Path:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._build = Path(tempfile.mkdtemp(prefix=".building-", dir=self._target.parent))
        return self._build

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._build.rename(self._target)
        except OSError:
            # Another process was faster; its result is the same.
            if not (self._target / _MANIFEST).exists():
                raise
        finally:
            shutil.rmtree(self._build, ignore_errors=True)


def _key(files: Iterable[Path]) -> str:
    parts = [_FORMAT]
    for file in files:
        stat = file.stat()
        parts.append(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
