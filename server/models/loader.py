"""Builds the decoder from a bitsandbytes-4bit checkpoint directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from turret.kernels.cpu.dense_product import serves_dense
from turret.kernels.row_linear import row_multiple
from turret.server.adapters.base import EMBEDDING, HEAD, BaseModel, BaseModule, BaseVocabulary
from turret.server.adapters.packed_group import PackLayout, SliceShape
from turret.server.errors import InvalidRequestError
from turret.server.models.adapted_linear import AdaptedLinear
from turret.server.models.arch import Arch, read_arch
from turret.server.models.decoder import Decoder, DecoderLayer
from turret.server.models.nf4 import Nf4Linear, Nf4Weight
from turret.server.models.nf4_cache import ModelSource, Progress, no_progress, weight_files

_PREFIX = "model.layers"


class _Tensors:
    """Reads tensors by name across shards; knows which were read."""

    def __init__(self, folder: Path) -> None:
        self._files = [safe_open(path, framework="pt") for path in weight_files(folder)]
        self._owner = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self._owner

    def get(self, name: str) -> torch.Tensor:
        if name not in self._owner:
            raise InvalidRequestError.of("model", f"the checkpoint lacks {name}")
        self._read.add(name)
        # A copy: the result must not keep the file mapped.
        return self._owner[name].get_tensor(name).clone()

    def weight(self, name: str, shape: tuple[int, int]) -> Nf4Weight:
        """A quantised weight; a plain one (a module bitsandbytes skipped) is quantised here."""
        parts = {key: self.get(key) for key in self._owner if key.startswith(f"{name}.")}
        tensor = self.get(name)
        if parts:
            weight = Nf4Weight.from_tensors(name, {name: tensor, **parts})
        else:
            weight = Nf4Weight.quantize(tensor.to(torch.bfloat16))
        if weight.shape != shape:
            raise InvalidRequestError.of("model", f"{name} is {weight.shape}, config says {shape}")
        return weight

    def unread(self) -> list[str]:
        known = ("rotary_emb.inv_freq",)
        return sorted(n for n in self._owner if n not in self._read and not n.endswith(known))


def load_decoder(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    triton: bool = False,
    progress: Progress = no_progress,
) -> Decoder:
    """Load a model.

    Args:
        source: Result of ``resolve_model``.
        dtype: Dtype of activations, embeddings, norms and head.
        device: Where it is served.
        triton: Whether the layers run as Triton kernels (a ``GpuDecoder``).
        progress: Told how far loading is.

    Raises:
        InvalidRequestError: Unsupported architecture, or tensors that the config does not explain.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.files)
    arch = read_arch(config)
    tensors = _Tensors(source.weights)

    def dense(name: str) -> torch.Tensor:
        return tensors.get(name).to(dtype=dtype, device=device)

    embedding = dense("model.embed_tokens.weight")
    layers = []
    for number in range(arch.num_layers):
        progress("Loading layers", number, arch.num_layers)
        layers.append(_load_layer(tensors, arch, number, dtype, device, triton))
    norm = dense("model.norm.weight")
    if tensors.has("lm_head.weight") and not arch.tie_word_embeddings:
        head = dense("lm_head.weight")
    else:
        head = embedding
        if tensors.has("lm_head.weight"):
            tensors.get("lm_head.weight")
    unread = tensors.unread()
    if unread:
        raise InvalidRequestError.of("model", f"unexpected tensors: {', '.join(unread[:8])}")
    progress("Loading layers", arch.num_layers, arch.num_layers)
    if not (triton or serves_dense(head)):
        # Probed here, once, rather than by the first request.
        row_multiple(dtype, *head.shape)
    return _decoder_type(triton)(arch, embedding=embedding, layers=layers, norm=norm, head=head)


def _decoder_type(triton: bool) -> type[Decoder]:
    if not triton:
        return Decoder
    # Imported where it is used: Triton is not everywhere where the CPU path runs.
    from turret.server.models.gpu_decoder import GpuDecoder

    return GpuDecoder


def _load_layer(
    tensors: _Tensors,
    arch: Arch,
    number: int,
    dtype: torch.dtype,
    device: torch.device,
    triton: bool,
) -> DecoderLayer:
    prefix = f"{_PREFIX}.{number}"

    def dense(name: str) -> torch.Tensor:
        return tensors.get(f"{prefix}.{name}").to(dtype=dtype, device=device)

    projections = {}
    for group, slices in arch.linears().items():
        weights = [
            tensors.weight(f"{prefix}.{path}.weight", (out, inner)) for path, out, inner in slices
        ]
        biases = [
            dense(f"{path}.bias")
            if tensors.has(f"{prefix}.{path}.bias")
            else torch.zeros(out, dtype=dtype, device=device)
            for path, out, _ in slices
        ]
        has_bias = any(tensors.has(f"{prefix}.{path}.bias") for path, _, _ in slices)
        projections[group] = AdaptedLinear(
            number,
            group,
            Nf4Linear(weights, dtype, device, triton=triton),
            torch.cat(biases) if has_bias else None,
        )
    return DecoderLayer(
        input_norm=dense("input_layernorm.weight"),
        post_attention_norm=dense("post_attention_layernorm.weight"),
        q_norm=dense("self_attn.q_norm.weight") if arch.qk_norm else None,
        k_norm=dense("self_attn.k_norm.weight") if arch.qk_norm else None,
        **projections,
    )


def projections(decoder: Decoder) -> Iterator[tuple[AdaptedLinear, tuple[str, ...]]]:
    """Every fused projection in layer order, with the full paths of its slices."""
    groups = decoder.arch.linears()
    for number, layer in enumerate(decoder.layers):
        for group, slices in groups.items():
            paths = tuple(f"{_PREFIX}.{number}.{path}" for path, _, _ in slices)
            yield getattr(layer, group), paths


def describe_base(decoder: Decoder, source: ModelSource, generation: int = 1) -> BaseModel:
    """The base model as adapters see it, with the weights that it has now."""
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
                # Of these weights, whatever takes their place later.
                dequantize=lambda base=base, index=index: base.dequantize(index),
            )
    head = decoder.head
    modules[HEAD] = BaseModule(HEAD, arch.hidden_size, head.shape[0], None, lambda: head.float())
    others = {EMBEDDING, "model.norm"}
    for number in range(arch.num_layers):
        others |= {
            f"{_PREFIX}.{number}.{n}" for n in ("input_layernorm", "post_attention_layernorm")
        }
        if arch.qk_norm:
            others |= {f"{_PREFIX}.{number}.self_attn.{n}" for n in ("q_norm", "k_norm")}
    return BaseModel(
        name=source.name,
        model_type=arch.model_type,
        digest=source.digest,
        generation=generation,
        dtype=decoder.dtype,
        modules=modules,
        other_modules=frozenset(others),
        vocabulary=BaseVocabulary(decoder.embedding, head, arch.tie_word_embeddings),
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
    )


def describe_pack(arch: Arch) -> PackLayout:
    """The base model as the adapter pack sees it."""
    groups: Mapping[str, tuple[SliceShape, ...]] = {
        group: tuple(SliceShape(path, out, inner) for path, out, inner in slices)
        for group, slices in arch.linears().items()
    }
    return PackLayout(num_layers=arch.num_layers, groups=groups, layer_prefix=_PREFIX)


def eos_token_ids(files: Path) -> frozenset[int]:
    """End-of-sequence ids from generation_config.json and config.json."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = files / name
        if path.is_file():
            value = json.loads(path.read_text()).get("eos_token_id")
            if value is not None:
                found.update([value] if isinstance(value, int) else value)
    return frozenset(found)
