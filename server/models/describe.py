"""Descriptions of the base model for adapters and for stores of adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from turret.server.adapters.base import (
    BaseExperts,
    BaseModel,
    BaseModule,
    BaseNorm,
    BaseVocabulary,
    Precision,
)
from turret.server.adapters.device import ExpertShape, ProjectionLayout, SliceShape
from turret.server.adapters.device.gpu_uploads import beside_steps
from turret.server.adapters.operators.vocabulary import EMBEDDING, HEAD
from turret.server.models.decoding import LAYER_PREFIX, ROUTER, Arch
from turret.server.models.decoding.adapted_linear import AdaptedLinear
from turret.server.models.decoding.decoder import Decoder
from turret.server.models.model_source import ModelSource
from turret.server.models.weights import BaseLinear
from turret.server.models.weights.nf4 import DenseLinear, Nf4Weight, join_linears, nf4_linear

# The facts about the served model that clients can request.


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Identity and sizes of the base model.

    ``dtype`` is the dtype of activations. ``commit`` is the commit of a model from the hub.
    """

    name: str
    model_type: str
    digest: str
    dtype: str
    quantization: str
    vocab_size: int
    max_model_len: int
    num_layers: int
    hidden_size: int
    commit: str = ""


_FINAL_NORM = "model.norm"


def projections(decoder: Decoder) -> Iterator[tuple[AdaptedLinear, tuple[str, ...]]]:
    """Every fused projection in layer order, with the full paths of its slices, without experts."""
    linears = decoder.arch.linears()
    for number, layer in enumerate(decoder.layers):
        for name, slices in linears.items():
            if decoder.arch.has(number, name):
                owner = layer.experts if name == ROUTER else layer
                paths = tuple(f"{LAYER_PREFIX}.{number}.{path}" for path, _, _ in slices)
                yield getattr(owner, name), paths


def describe_base(
    decoder: Decoder, source: ModelSource, generation: int = 1, *, named: int | None = None
) -> BaseModel:
    """The base model as adapters see it, with its present weights.

    Args:
        decoder: The model.
        source: The source of the model.
        generation: The generation of its weights.
        named: See ``BaseVocabulary``.
    """
    arch = decoder.arch
    modules = {}
    for linear, paths in projections(decoder):
        base, bias = linear.base, linear.bias
        biases = [None] * len(paths) if bias is None else bias.split(base.widths)
        for index, (name, out) in enumerate(zip(paths, base.widths, strict=True)):
            part = biases[index]
            modules[name] = BaseModule(
                name=name,
                in_features=base.in_features,
                out_features=out,
                bias=None if part is None else part.float().cpu(),
                # Bind ``base`` now: a merge may replace it, and this must keep describing these
                # weights.
                dequantize=lambda base=base, index=index: base.dequantize(index),
                served=lambda base=base, index=index: base.served(index),
            )
    head = decoder.head
    modules[HEAD] = BaseModule(
        name=HEAD,
        in_features=arch.hidden_size,
        out_features=head.shape[0],
        bias=None,
        dequantize=lambda: head.float(),
        served=lambda: head,
    )
    others = {EMBEDDING, _FINAL_NORM}
    names = [*arch.norms.names()]
    if arch.qk_norm is not None:
        names += ["self_attn.q_norm", "self_attn.k_norm"]
    for number in range(arch.num_layers):
        others |= {f"{LAYER_PREFIX}.{number}.{name}" for name in names}
    return BaseModel(
        name=source.name,
        model_type=arch.model_type,
        digest=source.digest,
        weights=decoder.fidelity.storage(),
        weights_shown=decoder.fidelity.shown(),
        generation=generation,
        dtype=decoder.dtype,
        modules=modules,
        other_modules=frozenset(others),
        experts=_experts(decoder),
        renamed=_renamed(arch),
        norms=_norms(decoder),
        vocabulary=BaseVocabulary(decoder.embedding, head, arch.tie_word_embeddings, named),
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        beside=lambda: beside_steps(decoder.device),
    )


def _experts(decoder: Decoder) -> dict[str, BaseExperts]:
    def dequantize(number: int, projection: str) -> Callable[[int], torch.Tensor]:
        experts = getattr(decoder.layers[number].experts, projection.removeprefix("experts_"))
        # Bind ``base`` now, as in ``describe_base``.
        base = experts.base
        return lambda expert: base.dequantize(expert)

    return describe_experts(decoder.arch, dequantize)


def describe_experts(
    arch: Arch, dequantize: Callable[[int, str], Callable[[int], torch.Tensor]]
) -> dict[str, BaseExperts]:
    """The experts of a model as adapters see them, by name; empty if it has none.

    Args:
        arch: The model's architecture.
        dequantize: Returns ``BaseExperts.dequantize`` for a layer and the name of a projection.
    """
    found: dict[str, BaseExperts] = {}
    if arch.experts is None:
        return found
    for number in sorted(arch.experts.layers):
        folder = f"{LAYER_PREFIX}.{number}.{arch.experts.checkpoint_path}.experts"
        for index, (projection, (path, out, inner)) in enumerate(arch.expert_linears().items()):
            name = f"{LAYER_PREFIX}.{number}.{path}"
            found[name] = BaseExperts(
                name=name,
                modules=tuple(f"{folder}.{m}" for m in arch.experts.modules[projection]),
                count=arch.experts.count,
                in_features=inner,
                out_features=out,
                is_first=index == 0,
                dequantize=dequantize(number, projection),
            )
    return found


def _renamed(arch: Arch) -> dict[str, str]:
    experts = arch.experts
    if experts is None or experts.path == experts.checkpoint_path:
        return {}
    return {f".{experts.checkpoint_path}.": f".{experts.path}."}


def _norms(decoder: Decoder) -> dict[str, BaseNorm]:
    """The norms before attention and MLP, and the one before the head."""
    arch, norms = decoder.arch, {}

    def norm(weight: torch.Tensor, *feeds: str) -> BaseNorm:
        return BaseNorm(weight.detach().float().cpu() - arch.norm_offset, arch.norm_offset, feeds)

    linears = arch.linears()
    for number, layer in enumerate(decoder.layers):
        prefix = f"{LAYER_PREFIX}.{number}"
        for name, weight, projection in (
            (arch.norms.before_attention, layer.norm_before_attention, "qkv"),
            (arch.norms.before_mlp, layer.norm_before_mlp, "gate_up"),
        ):
            # An input gain of modules cannot describe the input of experts.
            if name is not None and arch.has(number, projection):
                assert weight is not None, "a norm that has a name has a weight"
                feeds = [f"{prefix}.{path}" for path, _, _ in linears[projection]]
                norms[f"{prefix}.{name}"] = norm(weight, *feeds)
    norms[_FINAL_NORM] = norm(decoder.norm, HEAD)
    return norms


def describe_projections(arch: Arch) -> ProjectionLayout:
    """The base model as stores of adapters see it."""
    projections: Mapping[str, tuple[SliceShape, ...]] = {
        name: tuple(SliceShape(path, out, inner) for path, out, inner in slices)
        for name, slices in arch.linears().items()
    }
    experts = {}
    if arch.experts is not None:
        experts = {
            name: ExpertShape(path, arch.experts.count, out, inner)
            for name, (path, out, inner) in arch.expert_linears().items()
        }
    return ProjectionLayout(arch.num_layers, projections, experts, layer_prefix=LAYER_PREFIX)


# New weights for some modules of the base, in addition to the original ones.


class BaseEdit:
    """Collects new weights; each ``swap`` exchanges them with those that the decoder uses.

    The decoder's weights are never written to, so a failure before ``swap`` leaves the base
    unchanged. They are not freed either, so a second ``swap`` restores the same memory. An edit
    takes as much memory as the fused projections that it changes (NF4), or two bytes per weight of
    the changed modules (BF16).

    Args:
        decoder: The decoder, with every projection as loaded.
        precision: ``NF4`` quantises each module again, as bitsandbytes does: block 64, double
            quantisation; modules in 16 bits stay in 16 bits. ``BF16`` stores each weight with one
            rounding. The other modules of a fused projection stay as they are.
    """

    def __init__(self, decoder: Decoder, precision: Precision) -> None:
        self._decoder = decoder
        self._precision = precision
        self._dtype, self._device = decoder.dtype, decoder.device
        self._projections = dict(projections(decoder))
        self._owner = {
            path: linear for linear, paths in self._projections.items() for path in paths
        }
        self._parts: dict[str, BaseLinear] = {}
        self._biases: dict[str, torch.Tensor] = {}
        self._others: list[tuple[AdaptedLinear, BaseLinear, torch.Tensor | None]] = []

    def put_weight(self, path: str, weight: torch.Tensor) -> torch.Tensor:
        """Store a module's new weight.

        Args:
            path: Full path of the module.
            weight: ``[out, in]`` fp32, on the CPU.

        Returns:
            The weight as it will be multiplied, ``[out, in]`` fp32, on the CPU.
        """
        own = self._owner[path]
        like = own.base.part(self._projections[own].index(path))
        # Modules in 16 bits stay in 16 bits.
        if self._precision == "NF4" and type(like) is not DenseLinear:
            quantized, gpu = Nf4Weight.quantize(weight), hasattr(like, "product")
            part = nf4_linear([quantized], self._dtype, self._device, gpu=gpu)
        else:
            rounded = weight.to(torch.bfloat16).to(self._device, self._dtype)
            part = DenseLinear(rounded.contiguous(), (weight.shape[0],))
        self._parts[path] = part
        return part.dequantize(0)

    def put_bias(self, path: str, change: torch.Tensor) -> None:
        """Store the change of a module's bias, ``[out]`` fp32, on the CPU."""
        self._biases[path] = change

    def join(self) -> None:
        """Fuse the stored weights with the slices that keep theirs; call it once."""
        for linear, paths in self._projections.items():
            base, bias = linear.base, linear.bias
            if any(path in self._parts for path in paths):
                parts = [
                    self._parts.pop(path, None) or linear.base.part(i)
                    for i, path in enumerate(paths)
                ]
                base = join_linears(parts)
            if any(path in self._biases for path in paths):
                bias = self._bias(linear, paths)
            if base is not linear.base or bias is not linear.bias:
                self._others.append((linear, base, bias))

    def _bias(self, linear: AdaptedLinear, paths: tuple[str, ...]) -> torch.Tensor:
        changes = [
            self._biases.get(path, torch.zeros(width))
            for path, width in zip(paths, linear.base.widths, strict=True)
        ]
        change = torch.cat(changes).to(self._device)
        total = change if linear.bias is None else linear.bias.float() + change
        return total.to(self._dtype)

    def swap(self) -> None:
        """Exchange the weights, while nothing runs on them. This cannot fail halfway."""
        if self._device.type == "cuda":
            # The new weights were computed on another stream, and the last prompt chunks may still
            # be running.
            torch.cuda.synchronize(self._device)
        before = [(linear, linear.base, linear.bias) for linear, _, _ in self._others]
        for linear, base, bias in self._others:
            linear.base, linear.bias = base, bias
        self._others = before
        self._decoder.epoch += 1
