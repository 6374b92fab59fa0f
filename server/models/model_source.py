"""Turns any supported source into a directory of 4-bit weights, once.

A plain Hugging Face directory or a GGUF file is quantised tensor by tensor, so the bf16 model is
never in memory as a whole. The result is written to the cache, in the layout of the CPU's products,
and later starts map it. A directory that is already bitsandbytes-4bit is used unchanged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from turret.kernels.likeliest import Screen, ScreenCodes
from turret.server import log
from turret.server.basics.files import safetensors_parts
from turret.server.basics.work import OnProgress
from turret.server.errors import InvalidRequestError
from turret.server.models.decoding import Arch, Experts
from turret.server.models.families import read_arch, transformers_config
from turret.server.models.fidelity import Fidelity, WeightState, squared_error
from turret.server.models.sources.check import MODEL_NAME, find_gguf, skipped_modules
from turret.server.models.sources.expert_stacks import ExpertStacks
from turret.server.models.sources.gguf_file import open_gguf
from turret.server.models.sources.gguf_header import SUFFIX
from turret.server.models.sources.model_directory import (
    WEIGHTS,
    cached_model,
    check_model_directory,
    fetch_hub_model,
    hub_model_id,
    is_4bit,
    model_name,
    scale_block,
    weight_files,
)
from turret.server.models.weights.nf4 import BLOCKSIZE, Nf4Weight, PackedLinear, reads_mxfp4
from turret.server.words import say

_log = logging.getLogger(__name__)

# Multimodal models. Their checkpoints contain a language model, a vision tower, and a projector
# between them. Only the language model is read, because requests are text.

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


# Weights in 8-bit floats (E4M3, arXiv 2209.05433), with a scale per weight, row or block.
# Ministral 3, Qwen3's ``-FP8`` releases and older checkpoints of llm-compressor use this format.

FLOAT8_DTYPE = "F8_E4M3"
# Suffixes of a weight's scale. DeepSeek's files call it inverse, but mean the same factor.
FLOAT8_SCALES = ("_scale_inv", "_scale")
# Scales for 8-bit activations and KV caches, which turret does not use.
FLOAT8_NOT_USED = (".activation_scale", ".input_scale", ".k_scale", ".v_scale", ".kv_scale")


def dequantize_float8(
    codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None
) -> torch.Tensor:
    """Dequantise a weight.

    Args:
        codes: ``[out, in]`` float8_e4m3fn.
        scale: One number, ``[out]``, or ``[⌈out / rows⌉, ⌈in / columns⌉]``, in any float dtype.
        block: Rows and columns that share a scale; None if the weight or each row has one scale.

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
_QUANT_STATE = ".weight.quant_state.bitsandbytes__"


class StoredTensors:
    """Reads tensors across files, as if each were stored separately and as numbers.

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
            if (name := text_name(stored)) is not None and not name.endswith(FLOAT8_NOT_USED)
        }
        self._block = block
        # Weight → its scales.
        self._scales: dict[str, tuple[safe_open, str]] = {}
        for name in [name for name in self._owner if self._is_float8(name)]:
            scale = next((name + s for s in FLOAT8_SCALES if name + s in self._owner), None)
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

    def get(self, name: str, *, is_kept: bool = True) -> torch.Tensor:
        """Read a tensor into separate memory.

        With ``is_kept=False``, the result may be a part of the mapped file. Keep it only if the
        file never changes, as in the cache.

        Raises:
            InvalidRequestError: There is no tensor with that name.
        """
        if name in self._stacks.parts:
            return self._stacks.read(name, self._expert)
        file, stored = self._place(name)
        tensor = file.get_tensor(stored)
        if is_kept:
            tensor = tensor.clone()
        return self._scaled(name, tensor) if self._is_float8(name) else tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that is stored separately, from its file's header.

        Raises:
            InvalidRequestError: There is no tensor with that name.
        """
        file, stored = self._place(name)
        return tuple(file.get_slice(stored).get_shape())

    def format(self, name: str) -> str:
        """``fp8`` or ``mxfp4`` if ``get`` dequantises the tensor; else empty."""
        if name in self._stacks.parts:
            return self._stacks.format(name)
        return "fp8" if self._is_float8(name) else ""

    def codes(self) -> list[str]:
        """Names of the tensors whose bytes are codes instead of numbers."""
        return [
            name
            for name, (file, stored) in self._owner.items()
            if name not in self._stacks.names and file.get_slice(stored).get_dtype() == _BYTES
        ]

    def _is_float8(self, name: str) -> bool:
        file, stored = self._owner[name]
        return name.endswith(_WEIGHT) and file.get_slice(stored).get_dtype() == FLOAT8_DTYPE

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
_FORMAT = "5"
_MANIFEST = "turret.json"


def no_progress(description: str, done: int, total: int) -> None:
    """A progress callback that does nothing."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that is ready to be loaded.

    Attributes:
        name: The model id on the hub, the checkpoint's own name, or the name of the directory or
            GGUF file.
        weights: Directory of a bitsandbytes-4bit checkpoint, or of a model in the cache.
        files: Directory with config.json and the tokenizer.
        digest: Identifies the weights as served: SHA-256 of the weights as a bitsandbytes-4bit
            checkpoint, and of ``quantizes_all`` if that changes them.
        commit: The commit of a model from the hub.
        quantizes_all: Whether weights that a 4-bit checkpoint stores in 16 bits are quantised too.
        fidelity: How the weights differ from the model's files, if turret made the checkpoint.
    """

    name: str
    weights: Path
    files: Path
    digest: str
    commit: str = ""
    quantizes_all: bool = False
    fidelity: Fidelity | None = field(default=None, compare=False)


def resolve_model(
    model: Path | None,
    cache_dir: Path,
    progress: OnProgress = no_progress,
    *,
    quantizes_all: bool = False,
    skip_modules: Sequence[str] = (),
) -> ModelSource:
    """Find or make the 4-bit checkpoint of a model.

    Args:
        model: A Hugging Face model directory, a GGUF file, ``org/name[@revision]`` of the hub, or
            None for the bundled model.
        cache_dir: The directory for quantised checkpoints.
        progress: Called with the progress of quantisation.
        quantizes_all: See ``ModelSource``.
        skip_modules: Patterns of modules that stay in 16 bits; see ``skipped_modules``.

    Raises:
        InvalidRequestError: ``model`` is none of these or has an unsupported format; a pattern
            matches no module; or ``skip_modules`` is set and the model is already quantised.
    """
    hub_id = None if model is None else hub_model_id(model)
    if hub_id is None:
        source = _resolve(model, cache_dir, progress, skip_modules)
    else:
        folder, commit = fetch_hub_model(hub_id, progress)
        source = _resolve(folder, cache_dir, progress, skip_modules)
        source = dataclasses.replace(source, name=hub_id.repository, commit=commit)
    return _with_all_quantized(source) if quantizes_all else source


def _with_all_quantized(source: ModelSource) -> ModelSource:
    """The source with all weights quantised. A source that turret quantised stays unchanged."""
    if source.fidelity is not None or not modules_in_16_bits(source.weights):
        return source
    digest = hashlib.sha256(f"{source.digest} quantize-all".encode()).hexdigest()
    return dataclasses.replace(source, digest=digest, quantizes_all=True)


def modules_in_16_bits(weights: Path) -> list[str]:
    """The linear modules of the decoder layers that a 4-bit checkpoint does not quantise.

    Args:
        weights: The directory of the checkpoint. Only the headers of its files are read.
    """
    return sorted(name for name, kind in _stored_modules(weights).items() if not kind)


def stored_weights(source: ModelSource) -> Fidelity:
    """How the weights of a source are served, according to the headers of its files."""
    if source.fidelity is not None:
        return source.fidelity
    found = Fidelity()
    for name, kind in sorted(_stored_modules(source.weights).items()):
        if not kind:
            found.count(name, "quantized" if source.quantizes_all else "16-bit")
        elif kind == "as-stored":
            found.count(name, kind)
        else:
            found.count(name, "requantized", kind)
    return found


def inspect_model(
    model: Path | None,
    cache_dir: Path,
    *,
    quantizes_all: bool = False,
    skip_modules: Sequence[str] = (),
) -> Fidelity:
    """How a model would be served, without reading its weights or contacting the hub.

    Args:
        model: A model that ``check_model`` accepted.
        cache_dir: See ``resolve_model``. Quantisation errors are known only for models in it.
        quantizes_all: See ``resolve_model``.
        skip_modules: See ``resolve_model``.

    Raises:
        InvalidRequestError: See ``resolve_model``; or the model is not in the hub's cache.
    """
    hub_id = None if model is None else hub_model_id(model)
    if hub_id is not None:
        model = cached_model(hub_id)
    source = _resolve(model, cache_dir, no_progress, skip_modules, is_plan=True)
    return stored_weights(dataclasses.replace(source, quantizes_all=quantizes_all))


def _stored_modules(weights: Path) -> dict[str, str]:
    """The format of each linear module in a 4-bit checkpoint, by path.

    ``as-stored`` if turret serves the stored values, otherwise ``nf4`` or ``fp4``; empty for 16
    bits.
    """
    sizes: dict[str, int] = {}
    for path in weight_files(weights):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                sizes[text_name(name) or ""] = math.prod(file.get_slice(name).get_shape())
    # A stack of experts is a parameter, not the weight of a module.
    stacks = {name for name in sizes if ".experts." in name and name.endswith("_proj")}
    found = dict.fromkeys(stacks, "")
    found |= {name.removesuffix(_WEIGHT): "" for name in sizes if is_quantized(name)}
    for name in sizes:
        module, state, kind = name.partition(_QUANT_STATE)
        if state and module in found:
            # Two codes share a byte. More than ``most`` absmax values mean smaller blocks.
            most = -(-2 * sizes[f"{module}{_WEIGHT}"] // BLOCKSIZE)
            is_served = kind == "nf4" and sizes[f"{module}{_WEIGHT}.absmax"] <= most
            found[module] = "as-stored" if is_served else kind
    return found


def _resolve(
    model: Path | None,
    cache_dir: Path,
    progress: OnProgress,
    skip: Sequence[str],
    *,
    is_plan: bool = False,
) -> ModelSource:
    """Find or make the checkpoint of a model on this machine.

    With ``is_plan``, nothing is created, and no weights are hashed. The result then lacks a digest,
    and also the checkpoint if it is not in the cache.
    """
    if model is None:
        return _resolve_gguf(find_gguf(), MODEL_NAME, cache_dir, progress, skip, is_plan)
    if model.suffix == SUFFIX and model.is_file():
        return _resolve_gguf(model, model.stem, cache_dir, progress, skip, is_plan)
    config = check_model_directory(model)
    name, shards = model_name(model, config), weight_files(model)
    if is_4bit(config):
        if skip:
            raise InvalidRequestError.of("skip_modules", say("ALREADY_QUANTIZED", model=model))
        return ModelSource(name, model, model, "" if is_plan else _digest(shards))
    target = _target(cache_dir, [model / "config.json", *shards], skip)
    if not _is_cached(target):
        arch = read_arch(transformers_config(model))
        tensors = _read_plain(shards, arch, scale_block(config))
        formats = {name: tensors.format(name) for name in tensors}
        quantizing = _Quantizing(formats, skip, progress)
        if is_plan:
            return ModelSource(name, target, model, "", fidelity=quantizing.planned())
        with _new_directory(target) as build:
            quantizing.write(((key, tensors.get(key)) for key in tensors), arch, build, name)
    return _read_cached(target, model)


def _resolve_gguf(
    model: Path,
    name: str,
    cache_dir: Path,
    progress: OnProgress,
    skip: Sequence[str],
    is_plan: bool,
) -> ModelSource:
    target = _target(cache_dir, [model], skip)
    if not _is_cached(target):
        found = open_gguf(model)
        quantizing = _Quantizing(found.tensors.formats(), skip, progress)
        if is_plan:
            return ModelSource(name, target, target, "", fidelity=quantizing.planned())
        with _new_directory(target) as build:
            found.config.save_pretrained(build)
            found.tokenizer.save_pretrained(build)
            ends = json.dumps({"eos_token_id": found.eos_token_ids})
            (build / "generation_config.json").write_text(ends)
            quantizing.write(found.tensors, read_arch(found.config), build, name)
    # The cached name may differ: the bundled model's file may also have been given by its path.
    return dataclasses.replace(_read_cached(target, target), name=name)


def _read_plain(shards: Sequence[Path], arch: Arch, block: tuple[int, int] | None) -> StoredTensors:
    tensors = StoredTensors(shards, arch.experts, block)
    # Only the names of the cache's own tensors may have colons.
    if wrong := [*tensors.codes(), *(name for name in tensors if ":" in name)]:
        raise InvalidRequestError.of("model", say("TENSORS_UNEXPECTED", names=", ".join(wrong[:8])))
    return tensors


def is_quantized(name: str) -> bool:
    """Whether a tensor is the weight of a linear module of a decoder layer, but not of a router."""
    if ".layers." not in name:
        return False
    is_of_expert = ".experts." in name and name.endswith(".weight")
    return is_of_expert or name.endswith(("_proj.weight", "_linear.weight"))


def _state(name: str, source: str) -> WeightState:
    """The state of a weight after ``quantize``."""
    if source == "mxfp4" and reads_mxfp4(name):
        return "as-stored"
    return "requantized" if source else "quantized"


def quantize(name: str, tensor: torch.Tensor, source: str, fidelity: Fidelity) -> Nf4Weight:
    """Quantise a weight to NF4, or encode its MXFP4 values exactly if possible, and count it.

    Args:
        name: The weight's name.
        tensor: ``[out, in]``.
        source: The quantised format in the model's files; empty for numbers.
        fidelity: Counts the weight.
    """
    state = _state(name, source)
    if state == "as-stored" and (exact := Nf4Weight.of_mxfp4(tensor)) is not None:
        fidelity.count(name, state, source)
        return exact
    weight = Nf4Weight.quantize(tensor.to(torch.bfloat16))
    squares = squared_error(tensor, weight.dequantize(torch.float32))
    fidelity.count(name, "requantized" if source else "quantized", source, squares)
    return weight


# The names of the head's ``ScreenCodes`` in the cache.
HEAD_COPY = ("head:codes", "head:scales", "head:bounds")
# The size of a cache line. Products read weights fastest from addresses that are multiples of it.
_LINE = 64


def _ordered(tensors: Mapping[str, torch.Tensor], line: int = 1) -> dict[str, torch.Tensor]:
    """The tensors in the order of ``save_file``, but with those that fill whole lines first."""

    def place(name: str) -> tuple[bool, int, str]:
        return tensors[name].nbytes % line > 0, -tensors[name].itemsize, name

    return {name: tensors[name] for name in sorted(tensors, key=place)}


class _Quantizing:
    """Quantises a model and writes it to the cache, with a report of the errors.

    Args:
        formats: The quantised format of each tensor in the model's files, or empty.
        skip: See ``skip_modules`` of ``resolve_model``.
        progress: Called with the number of tensors.
    """

    def __init__(
        self, formats: Mapping[str, str], skip: Sequence[str], progress: OnProgress
    ) -> None:
        modules = [name.removesuffix(_WEIGHT) for name in formats if is_quantized(name)]
        self._skipped = skipped_modules(skip, modules)
        self._formats = formats
        self._progress = progress
        self._fidelity = Fidelity()

    def write(
        self,
        tensors: Iterable[tuple[str, torch.Tensor]],
        arch: Arch,
        build: Path,
        model_name: str,
    ) -> None:
        """Write the tensors of a model to a directory."""
        total, weights = len(self._formats), dict[str, Nf4Weight | torch.Tensor]()
        for done, (key, tensor) in enumerate(tensors):
            self._progress("Quantising to NF4", done, total)
            weights[key] = self._stored(key, tensor.to(torch.bfloat16))
        self._progress("Quantising to NF4", total, total)
        out = dict[str, torch.Tensor]()
        for key, weight in weights.items():
            out |= weight.to_tensors(key) if isinstance(weight, Nf4Weight) else {key: weight}
        # The digest is that of a bitsandbytes checkpoint with these weights.
        digest = hashlib.sha256()
        for part in safetensors_parts(_ordered(out)):
            digest.update(part)
        _pack(weights, out, arch)
        head = out.get("lm_head.weight", out.get("model.embed_tokens.weight"))
        if head is not None and Screen.serves(head):
            copy = ScreenCodes.of(head)
            out |= zip(HEAD_COPY, (copy.codes, copy.scales, copy.bounds), strict=True)
        try:
            with (build / WEIGHTS).open("wb") as file:
                for part in safetensors_parts(_ordered(out, _LINE), _LINE):
                    file.write(part)
        except OSError as error:
            said = say("CACHE_NOT_WRITABLE", folder=build.parent, problem=error)
            raise InvalidRequestError.of("model", said) from None
        manifest = {
            "name": model_name,
            "digest": digest.hexdigest(),
            "format": _FORMAT,
            "fidelity": self._fidelity.rows(),
            "files": {
                path.name: _digest([path]) for path in build.iterdir() if path.name != WEIGHTS
            },
        }
        (build / _MANIFEST).write_text(json.dumps(manifest))

    def planned(self) -> Fidelity:
        """The states of the modules, without quantisation errors, which are not known yet."""
        found = Fidelity()
        for key, source in self._formats.items():
            if key.removesuffix(_WEIGHT) in self._skipped and is_quantized(key):
                found.count(key, "16-bit", source)
            elif is_quantized(key):
                found.count(key, _state(key, source), source)
        return found

    def _stored(self, key: str, tensor: torch.Tensor) -> Nf4Weight | torch.Tensor:
        source = self._formats[key]
        is_skipped = key.removesuffix(_WEIGHT) in self._skipped
        if is_skipped or not is_quantized(key):
            if is_quantized(key):
                self._fidelity.count(key, "16-bit", source)
            return tensor.contiguous().clone()
        return quantize(key, tensor, source, self._fidelity)


def _pack(
    weights: dict[str, Nf4Weight | torch.Tensor], out: dict[str, torch.Tensor], arch: Arch
) -> None:
    """Replace the codes in ``out`` with those of fused projections, which products on CPUs read."""
    for modules in (each for layer in range(arch.num_layers) for each in arch.projections(layer)):
        names = [f"{path}.weight" for path, _, _ in modules]
        slices = [w for name in names if isinstance(w := weights.get(name), Nf4Weight)]
        shapes = [(rows, inner) for _, rows, inner in modules]
        if [weight.shape for weight in slices] == shapes and PackedLinear.packs(slices):
            linear = PackedLinear.pack(slices)
            out |= zip(PackedLinear.names(names), (linear.packed, linear.absmax), strict=True)
            # Drop the unfused codes now, so that only one projection is in memory twice.
            for name in names:
                del weights[name], out[name]


def _is_cached(target: Path) -> bool:
    """Whether the cache has a checkpoint, with a valid manifest and complete files."""
    if not target.exists():
        return False
    damages = OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError
    with contextlib.suppress(*damages):
        _read_cached(target, target)
        others = json.loads((target / _MANIFEST).read_text())["files"]
        with safe_open(target / WEIGHTS, framework="pt"):
            if all(_digest([target / name]) == digest for name, digest in others.items()):
                return True
    _log.warning("the cached model is damaged", extra=log.fields(path=target))
    return False


def _read_cached(weights: Path, files: Path) -> ModelSource:
    manifest = json.loads((weights / _MANIFEST).read_text())
    fidelity = Fidelity.of_rows(manifest["fidelity"])
    named, digest = manifest["name"], manifest["digest"]
    return ModelSource(named, weights, files, digest, fidelity=fidelity)


# The cache key of a model includes the first bytes of this many equal parts of each file.
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_UNFINISHED = ".building-"
# No model takes this long to quantise, so an older directory was left by a killed process.
_ABANDONED_SECONDS = 86400.0


@contextlib.contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """Fill a directory next to its final path, then rename it: readers see all or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for each in target.parent.glob(f"{_UNFINISHED}*"):
        with contextlib.suppress(FileNotFoundError):  # another process may remove it
            if time.time() - each.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(each, ignore_errors=True)
    build = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=target.parent))
    try:
        yield build
        for each in build.iterdir():
            with each.open("rb") as file:
                os.fsync(file.fileno())
        # Remove a damaged checkpoint, but not the complete one of a process that was faster.
        if not _is_cached(target):
            shutil.rmtree(target, ignore_errors=True)
            build.rename(target)
    except OSError:
        # Another process was faster. Its result is the same.
        if not _is_cached(target):
            raise
    finally:
        shutil.rmtree(build, ignore_errors=True)


def _target(cache_dir: Path, files: Iterable[Path], skip: Sequence[str]) -> Path:
    """The directory of a quantised checkpoint in the cache."""
    key = hashlib.sha256("\n".join((_FORMAT, *sorted(set(skip)))).encode())
    for path in files:
        size = path.stat().st_size
        key.update(f"\n{path.resolve()}:{size}:{path.stat().st_mtime_ns}".encode())
        # All files of a container image can have the same time, and retraining keeps the sizes, so
        # include samples of the content.
        with path.open("rb") as file:
            for part in range(_SAMPLES):
                file.seek(part * size // _SAMPLES)
                key.update(file.read(_SAMPLE_BYTES))
    return cache_dir / f"nf4-{key.hexdigest()[:24]}"


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
