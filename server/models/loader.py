"""Builds the decoder from a bitsandbytes-4bit checkpoint or from the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from turret.kernels import cpu as native
from turret.kernels.likeliest import Screen, ScreenCodes
from turret.kernels.rows import choices, linear_formulation, prepare_linear
from turret.server.basics.work import OnProgress
from turret.server.errors import InvalidRequestError
from turret.server.models.decoding import LAYER_PREFIX, ROUTER, Arch, Experts, Linear
from turret.server.models.decoding.adapted_linear import (
    AdaptedExperts,
    AdaptedLinear,
    ExpertMixture,
)
from turret.server.models.decoding.cpu_layers import CpuLayerOps
from turret.server.models.decoding.decoder import Decoder, DecoderLayer
from turret.server.models.families import read_arch, transformers_config
from turret.server.models.fidelity import Fidelity
from turret.server.models.model_source import (
    HEAD_COPY,
    ModelSource,
    StoredTensors,
    no_progress,
    quantize,
)
from turret.server.models.sources.model_directory import read_object, unsupported, weight_files
from turret.server.models.weights import BaseLinear
from turret.server.models.weights.nf4 import (
    DenseLinear,
    Nf4Weight,
    PackedLinear,
    Weight,
    dequantize_stored,
    fuse_weights,
    multiplies_packed,
)
from turret.server.models.weights.nf4_cpu import unpack
from turret.server.models.weights.nf4_experts import Nf4Experts
from turret.server.words import say

# Names, for the log, of the implementations that compute each part of a step on this machine.


def formulations(decoder: Decoder, *, is_head_screened: bool) -> dict[str, str]:
    """The implementation of each part; empty on a GPU.

    A value is ``native``, or a library with the sizes of the calls that keep a row's bits, such as
    ``torch 4 rows or more``. For a part that has not been tried yet, it is just ``torch``. If only
    the products have native kernels, it is ``native products`` or ``native products, torch``.
    ``isa`` is the instruction set of the native kernels.

    Args:
        decoder: The decoder that computes.
        is_head_screened: Whether greedy tokens are found with a copy of the head.
    """
    if decoder.device.type != "cpu":
        return {}
    found = {} if native.isa() is None else {"isa": str(native.isa())}
    attention = "torch" if native.isa() is None else "native products, torch"
    if isinstance(decoder.ops, CpuLayerOps):
        attention = "native"
    elif "linear" in choices():
        attention = f"torch {choices()['linear']}"
    adapters = "native" if native.has_native(decoder.dtype, decoder.device) else "native products"
    screened = ", screened in int8" if is_head_screened else ""
    return found | {
        "products": _product(decoder.layers[0].qkv.base),
        "head": linear_formulation(decoder.head) + screened,
        "adapters": adapters if native.isa() is not None else "torch",
        "attention": attention,
    }


def _product(base: BaseLinear) -> str:
    if isinstance(base, PackedLinear):
        return base.formulation()
    if isinstance(base, DenseLinear):
        return linear_formulation(base.weight)
    return "native" if native.has_kernels(torch.device("cpu")) else "torch"


class CheckpointTensors:
    """Reads tensors and quantised weights, and records which were read.

    In the cache, a fused projection is stored as a ``PackedLinear`` if ``PackedLinear.packs``
    supports it. In other files, tensors with the names of a ``PackedLinear`` are not used, because
    the kernels do not check their sizes.

    Args:
        source: The model.
        experts: The experts of its architecture, or None.

    Attributes:
        fidelity: The states of the weights that were read.
    """

    def __init__(self, source: ModelSource, experts: Experts | None) -> None:
        self.fidelity = Fidelity()
        self._quantizes_all = source.quantizes_all
        self._is_cached = source.fidelity is not None
        self._stored = StoredTensors(weight_files(source.weights), experts)
        self._read: set[str] = set()
        # Weight → names of the tensors of its quantisation state. The names are indexed once,
        # because there may be 100,000 of them.
        self._beside: dict[str, list[str]] = {}
        for name in self._stored:
            module, found, _ = name.partition(".weight.")
            if found:
                self._beside.setdefault(f"{module}.weight", []).append(name)
        # Weight → all weights of the fused projection in which its codes are stored.
        self._fused: dict[str, tuple[str, ...]] = {}
        for name in self._stored:
            modules, _, kind = name.partition(":")
            if self._is_cached and kind == "packed":
                weights = tuple(modules.split("+"))
                self._fused |= dict.fromkeys(weights, weights)

    def has(self, name: str) -> bool:
        return name in self._stored

    def get(self, name: str, *, is_kept: bool = True) -> torch.Tensor:
        """See ``StoredTensors``."""
        self._read.add(name)
        return self._stored.get(name, is_kept=is_kept)

    def of_shape(self, name: str, *shape: int) -> torch.Tensor:
        tensor = self.get(name)
        _check_shape(name, tuple(tensor.shape), shape)
        return tensor

    def weight(self, name: str, shape: tuple[int, int]) -> Nf4Weight | torch.Tensor:
        """The weight of a linear module; a tensor if it is stored and served in 16 bits.

        Its large tensors may be parts of the mapped file, so copy them before you keep them.
        """
        weight = self._weight(name)
        _check_shape(name, tuple(weight.shape), shape)
        return weight

    def packed(self, modules: Sequence[Linear]) -> PackedLinear | None:
        """A fused projection as a part of the mapped file; None if it is stored in another form.

        Args:
            modules: The modules that form the projection.
        """
        names = tuple(f"{path}.weight" for path, _, _ in modules)
        if self._fused.get(names[0]) != names:
            return None
        self._read.update(*(self._beside[name] for name in names))
        packed, absmax = (self.get(name, is_kept=False) for name in PackedLinear.names(names))
        linear = PackedLinear(packed, absmax, tuple(out for _, out, _ in modules))
        _check_shape(names[0], linear.shape, (sum(linear.widths), modules[0][2]))
        return linear

    def head_copy(self) -> ScreenCodes | None:
        """The int8 copy of the head, if the cache has one."""
        if not self._is_cached or not self.has(HEAD_COPY[0]):
            return None
        return ScreenCodes(*(self.get(name, is_kept=False) for name in HEAD_COPY))

    def _codes(self, name: str) -> torch.Tensor:
        """The codes of a weight, row by row."""
        if name not in self._fused:
            return self.get(name, is_kept=False)
        names = self._fused[name]
        packed, absmax = (self.get(each, is_kept=False) for each in PackedLinear.names(names))
        blocks = [math.prod(self._stored.shape(f"{each}.absmax")) for each in names]
        rows = packed.split([count // len(absmax) for count in blocks])
        return unpack(rows[names.index(name)])

    def _weight(self, name: str) -> Nf4Weight | torch.Tensor:
        parts = {key: self.get(key) for key in self._beside.get(name, ())}
        tensor = self._codes(name)
        if not parts:
            source = self._stored.format(name)
            if not source and not self._quantizes_all:
                self.fidelity.count(name, "16-bit")
                return tensor
            return quantize(name, tensor, source, self.fidelity)
        parts[name] = tensor
        exact = Nf4Weight.from_tensors(name, parts)
        if exact is None:
            kind = next(key for key in parts if ".quant_state." in key).rpartition("__")[2]
            return quantize(name, dequantize_stored(name, parts), kind, self.fidelity)
        self.fidelity.count(name, "as-stored")
        return exact

    def plain(self, name: str) -> torch.Tensor:
        """A weight as plain numbers, dequantised if bitsandbytes quantised the module."""
        parts = {key: self.get(key) for key in self._beside.get(name, ())}
        tensor = self.get(name)
        return dequantize_stored(name, {name: tensor, **parts}) if parts else tensor

    def unread(self) -> list[str]:
        known = ("rotary_emb.inv_freq",)
        return sorted(n for n in self._stored if n not in self._read and not n.endswith(known))


def _check_shape(name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if found != shape:
        raise InvalidRequestError.of(
            "model", say("SHAPE_MISMATCH", name=name, found=found, expected=shape)
        )


def load_decoder(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    gpu: bool = False,
    progress: OnProgress = no_progress,
) -> Decoder:
    """Load a model. The decoder's ``fidelity`` reports how its weights are stored.

    Args:
        source: Result of ``resolve_model``.
        dtype: Dtype of activations, embeddings, norms and head.
        device: The serving device.
        gpu: Whether the gpu path serves it (a ``GpuDecoder``, whose layers run as Triton kernels).
        progress: Called with the progress of loading.

    Raises:
        InvalidRequestError: Unsupported architecture, or tensors that the config does not explain.
    """
    arch = read_arch(transformers_config(source.files))
    tensors = CheckpointTensors(source, arch.experts)

    def dense(name: str) -> torch.Tensor:
        # Files in the cache never change, so the mapped file itself can be the tensor's memory.
        stored = tensors.get(name, is_kept=source.fidelity is None)
        _check_shape(name, tuple(stored.shape), (arch.vocab_size, arch.hidden_size))
        return stored.to(dtype=dtype, device=device)

    embedding = dense("model.embed_tokens.weight")
    layers = []
    for number in range(arch.num_layers):
        progress("Loading layers", number, arch.num_layers)
        layers.append(_load_layer(tensors, arch, number, dtype, device, gpu))
    norm = _norm(tensors, arch, "model.norm", arch.hidden_size, device)
    head = embedding
    if tensors.has("lm_head.weight"):
        own = dense("lm_head.weight")
        # Some configs claim or default to tied embeddings although the checkpoint has two tensors.
        if not (arch.tie_word_embeddings and torch.equal(own, embedding)):
            head, arch = own, replace(arch, tie_word_embeddings=False)
    head_copy, unread = tensors.head_copy(), tensors.unread()
    if unread:
        raise InvalidRequestError.of(
            "model", say("TENSORS_UNEXPECTED", names=", ".join(unread[:8]))
        )
    progress("Loading layers", arch.num_layers, arch.num_layers)
    if not gpu:
        prepare_linear(head)
    decoder = _decoder_type(gpu)(arch, embedding=embedding, layers=layers, norm=norm, head=head)
    decoder.fidelity = source.fidelity or tensors.fidelity
    # An unused copy would keep the whole file mapped.
    decoder.head_copy = head_copy if Screen.serves(head) else None
    return decoder


def _decoder_type(gpu: bool) -> type[Decoder]:
    if not gpu:
        return Decoder
    # Imported here, because the other paths run without Triton.
    from turret.server.models.decoding.gpu_decoder import GpuDecoder

    return GpuDecoder


def _load_layer(
    tensors: CheckpointTensors,
    arch: Arch,
    number: int,
    dtype: torch.dtype,
    device: torch.device,
    gpu: bool,
) -> DecoderLayer:
    prefix = f"{LAYER_PREFIX}.{number}"

    def bias(path: str, out: int) -> torch.Tensor:
        if not tensors.has(f"{prefix}.{path}.bias"):
            return torch.zeros(out, dtype=dtype, device=device)
        return tensors.of_shape(f"{prefix}.{path}.bias", out).to(dtype=dtype, device=device)

    def norm(name: str | None, size: int = arch.hidden_size) -> torch.Tensor | None:
        return None if name is None else _norm(tensors, arch, f"{prefix}.{name}", size, device)

    def head_norm(name: str, num_heads: int) -> torch.Tensor | None:
        normalised = num_heads if arch.qk_norm == "projection" else 1
        return norm(name if arch.qk_norm else None, normalised * arch.head_dim)

    projections = {}
    for name, slices in arch.linears().items():
        if name == ROUTER or not arch.has(number, name):
            continue
        modules = [(f"{prefix}.{path}", out, inner) for path, out, inner in slices]
        weights = _weights(tensors, modules, dtype, device, gpu)
        biases = [bias(path, out) for path, out, _ in slices]
        has_bias = any(tensors.has(f"{prefix}.{path}.bias") for path, _, _ in slices)
        projections[name] = AdaptedLinear(
            number,
            name,
            fuse_weights(weights, dtype, device, gpu=gpu),
            torch.cat(biases) if has_bias else None,
        )
    return DecoderLayer(
        norm_before_attention=norm(arch.norms.before_attention),
        norm_after_attention=norm(arch.norms.after_attention),
        norm_before_mlp=norm(arch.norms.before_mlp),
        norm_after_mlp=norm(arch.norms.after_mlp),
        q_norm=head_norm("self_attn.q_norm", arch.num_heads),
        k_norm=head_norm("self_attn.k_norm", arch.num_kv_heads),
        sinks=tensors.of_shape(f"{prefix}.self_attn.sinks", arch.num_heads).float().to(device)
        if arch.has_sinks
        else None,
        experts=_load_experts(tensors, arch, number, dtype, device, gpu)
        if arch.has(number, ROUTER)
        else None,
        **projections,
    )


def _weights(
    tensors: CheckpointTensors,
    modules: Sequence[Linear],
    dtype: torch.dtype,
    device: torch.device,
    gpu: bool,
) -> list[Weight]:
    """The weights of a fused projection, in a form that its products read."""
    packed = None if gpu else tensors.packed(modules)
    if packed is not None and multiplies_packed(packed.format, dtype, device):
        return [packed]
    return [tensors.weight(f"{path}.weight", (out, inner)) for path, out, inner in modules]


def _load_experts(
    tensors: CheckpointTensors,
    arch: Arch,
    number: int,
    dtype: torch.dtype,
    device: torch.device,
    gpu: bool,
) -> ExpertMixture:
    projections = {}
    for name, experts in arch.expert_modules(number).items():
        weights = [_weights(tensors, modules, dtype, device, gpu) for modules in experts]
        bias = None
        if tensors.has(f"{experts[0][0][0]}.bias"):
            parts = [[tensors.of_shape(f"{m}.bias", out) for m, out, _ in each] for each in experts]
            bias = torch.stack([torch.cat(each) for each in parts]).to(dtype=dtype, device=device)
        base = Nf4Experts(weights, dtype, device, gpu=gpu)
        projections[name] = AdaptedExperts(number, name, base, bias)
    return ExpertMixture(
        router=_load_router(tensors, arch, number, dtype, device),
        gate_up=projections["experts_gate_up"],
        down=projections["experts_down"],
    )


def _load_router(
    tensors: CheckpointTensors, arch: Arch, number: int, dtype: torch.dtype, device: torch.device
) -> AdaptedLinear:
    experts, hidden = arch.experts, arch.hidden_size
    assert experts is not None
    prefix = f"{LAYER_PREFIX}.{number}.{experts.checkpoint_path}"
    paths = [f"{prefix}.{name}" for name in (experts.router, *experts.checkpoint_routers)]
    path = next((path for path in paths if tensors.has(f"{path}.weight")), paths[0])
    weight = tensors.plain(f"{path}.weight").to(dtype=dtype, device=device)
    _check_shape(f"{path}.weight", tuple(weight.shape), (experts.count, hidden))
    bias = None
    if tensors.has(f"{path}.bias"):
        bias = tensors.of_shape(f"{path}.bias", experts.count).to(dtype=dtype, device=device)
    # The router is not quantised, because a small error can select another expert.
    return AdaptedLinear(number, ROUTER, DenseLinear(weight, (experts.count,)), bias)


def _norm(
    tensors: CheckpointTensors, arch: Arch, name: str, size: int, device: torch.device
) -> torch.Tensor:
    """A norm's weight: fp32, because ``1 + w`` does not fit into 16 bits."""
    weight = tensors.of_shape(f"{name}.weight", size)
    return weight.float().add_(arch.norm_offset).to(device)


def eos_token_ids(files: Path) -> frozenset[int]:
    """End-of-sequence ids from generation_config.json and config.json.

    Raises:
        InvalidRequestError: A file is not a JSON object, or a value is not a token id.
    """
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = files / name
        if path.is_file():
            config = read_object(path)
            value, text = config.get("eos_token_id"), config.get("text_config")
            if value is None and isinstance(text, dict):
                value = text.get("eos_token_id")
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(number) is int for number in ids):
                raise unsupported("eos_token_id", value, "token ids")
            found.update(ids)
    return frozenset(found)
