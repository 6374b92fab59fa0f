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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from turret.server.errors import InvalidRequestError
from turret.server.models.decoding.arch import Experts
from turret.server.models.families import read_arch
from turret.server.models.sources.check import MODEL_NAME, find_gguf
from turret.server.models.sources.gguf_file import open_gguf
from turret.server.models.sources.gguf_header import SUFFIX
from turret.server.models.sources.model_directory import (
    WEIGHTS,
    Progress,
    check_model_directory,
    fetch_hub_model,
    hub_model_id,
    is_4bit,
    model_name,
    scale_block,
    weight_files,
)
from turret.server.models.weights.nf4 import Nf4Weight
from turret.server.models.weights.nf4_experts import ExpertStacks
from turret.server.words import say

# Multimodal models. Their checkpoints hold a language model, a vision tower and a projector between
# them. Only the language model is read, because requests are text.

# Prefixes of the language model within a multimodal model, as checkpoints write them (the names
# before transformers 4.52) and as current models do.
_TEXT = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
# The other modules of these models.
_OTHERS = ("vision_tower.", "multi_modal_projector.", "visual.")
_SKIPPED = (*_OTHERS, *(f"model.{name}" for name in _OTHERS))


def text_name(name: str) -> str | None:
    """The tensor's name in the language model; None if it belongs to another part."""
    if name.startswith(_SKIPPED):
        return None
    for prefix, own in _TEXT:
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


# Weights in 8-bit floats (E4M3, arXiv 2209.05433), with one scale for the weight or one per block.
# Ministral 3, Qwen3's ``-FP8`` releases and older checkpoints of llm-compressor use this format.

DTYPE = "F8_E4M3"
# Suffixes of a weight's scale. DeepSeek's files call it inverse but mean this same factor.
SCALES = ("_scale_inv", "_scale")
# Scales for 8-bit activations and KV caches, which turret does not use.
NOT_USED = (".activation_scale", ".input_scale", ".k_scale", ".v_scale", ".kv_scale")


def dequantize_float8(
    codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None
) -> torch.Tensor:
    """Dequantise a weight.

    Args:
        codes: ``[out, in]`` float8_e4m3fn.
        scale: A number, or ``[⌈out / rows⌉, ⌈in / columns⌉]``, in any float.
        block: Rows and columns that share a scale; required if there are several scales.

    Returns:
        ``[out, in]`` fp32.

    Raises:
        ValueError: There are not as many scales as blocks.
    """
    values, scale = codes.float(), scale.float()
    if scale.numel() == 1:
        return values * scale.reshape(())
    out, inner = values.shape
    # Without a block size, each row of the weight has one scale.
    rows, columns = block or (1, inner)
    scale = scale.reshape(-1, 1) if scale.dim() == 1 else scale
    expected = -(-out // rows), -(-inner // columns)
    if tuple(scale.shape) != expected:
        raise ValueError(say("SCALES_MISMATCH", found=list(scale.shape), expected=list(expected)))
    spread = scale.repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :inner]
    return values * spread


_BYTES = "U8"
_WEIGHT = ".weight"


class StoredTensors:
    """Reads tensors across files, as if each were stored by itself and as numbers.

    Experts that are stored in one tensor appear as separate tensors, and weights in 8-bit floats
    are dequantised.

    Args:
        files: The checkpoint's files.
        experts: The experts of the architecture, or None.
        block: Rows and columns of a weight in 8-bit floats that share a scale, or None.
    """

    def __init__(
        self,
        files: Sequence[Path],
        experts: Experts | None,
        block: tuple[int, int] | None = None,
    ) -> None:
        self._files = [safe_open(path, framework="pt") for path in files]
        # Name → file, and the tensor's name in that file.
        self._owner = {
            name: (file, stored)
            for file in self._files
            for stored in file.keys()  # noqa: SIM118 - safe_open is not a mapping
            if (name := text_name(stored)) is not None and not name.endswith(NOT_USED)
        }
        self._block = block
        # Weight → its scales.
        self._scales: dict[str, tuple[safe_open, str]] = {}
        for name in [name for name in self._owner if self._is_float8(name)]:
            scale = next((name + s for s in SCALES if name + s in self._owner), None)
            if scale is not None:
                self._scales[name] = self._owner.pop(scale)
        self._stacks = experts_in(self._owner, experts)
        self._num_experts = 0 if experts is None else experts.count

    def __contains__(self, name: str) -> bool:
        is_own = name in self._owner and name not in self._stacks.names
        return is_own or name in self._stacks.parts

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._owner if name not in self._stacks.names)
        yield from self._stacks.parts

    def __len__(self) -> int:
        return len(self._owner) - len(self._stacks.names) + len(self._stacks.parts)

    def get(self, name: str) -> torch.Tensor:
        """Read a tensor into memory of its own.

        Raises:
            InvalidRequestError: There is none of that name.
        """
        if name in self._stacks.parts:
            return self._stacks.read(name, self._expert)
        file, stored = self._place(name)
        # A copy: the result must not keep the file mapped.
        tensor = file.get_tensor(stored).clone()
        return self._scaled(name, tensor) if self._is_float8(name) else tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that is stored by itself, read from its file's header.

        Raises:
            InvalidRequestError: There is none of that name.
        """
        file, stored = self._place(name)
        return tuple(file.get_slice(stored).get_shape())

    def codes(self) -> list[str]:
        """Names of the tensors that hold bytes, which are codes, not numbers to multiply by."""
        return [
            name
            for name, (file, stored) in self._owner.items()
            if name not in self._stacks.names and file.get_slice(stored).get_dtype() == _BYTES
        ]

    def _is_float8(self, name: str) -> bool:
        file, stored = self._owner[name]
        return name.endswith(_WEIGHT) and file.get_slice(stored).get_dtype() == DTYPE

    def _scaled(self, name: str, codes: torch.Tensor) -> torch.Tensor:
        if name not in self._scales:
            raise InvalidRequestError.of("model", say("SCALE_MISSING", name=name))
        file, stored = self._scales[name]
        try:
            return dequantize_float8(codes, file.get_tensor(stored), self._block)
        except ValueError as error:
            raise InvalidRequestError.of(
                "model", say("TENSOR_INVALID", name=name, problem=error)
            ) from None

    def _expert(self, name: str, expert: int) -> torch.Tensor:
        file, stored = self._place(name)
        stack = file.get_slice(stored)
        found = (stack.get_shape() or [0])[0]
        if found != self._num_experts:
            said = say("EXPERTS_MISMATCH", name=name, found=found, expected=self._num_experts)
            raise InvalidRequestError.of("model", said)
        return stack[expert].clone()

    def _place(self, name: str) -> tuple[safe_open, str]:
        if name not in self._owner:
            raise InvalidRequestError.of("model", say("TENSOR_MISSING", name=name))
        return self._owner[name]


def experts_in(names: Iterable[str], experts: Experts | None) -> ExpertStacks:
    """The stacks of experts among a checkpoint's tensors."""
    if experts is None or not experts.are_stacked:
        return ExpertStacks({}, 0, names)
    folder = f"{experts.checkpoint_path}.experts"
    modules = {
        f"{folder}.{parameter}": f"{folder}.{experts.modules[projection][0]}"
        for projection, parameter in experts.parameters.items()
    }
    return ExpertStacks(modules, experts.count, names)


# Part of the cache key: raise it when the format of the cached files changes.
_FORMAT = "2"
_MANIFEST = "turret.json"


def no_progress(description: str, done: int, total: int) -> None:
    """A progress callback that does nothing."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that is ready to be loaded.

    Attributes:
        name: Model id on the hub or as the checkpoint names itself, else the directory's name.
        weights: Directory of a bitsandbytes-4bit checkpoint.
        files: Directory with config.json and the tokenizer.
        digest: SHA-256 of the weight files.
        commit: The commit of a model from the hub.
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
        cache_dir: The directory for quantised checkpoints.
        progress: Called with the progress of quantisation.

    Raises:
        InvalidRequestError: ``model`` is none of these, or has an unsupported format.
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
    """Whether a tensor is the weight of a linear module of a decoder layer, but not of a router."""
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
