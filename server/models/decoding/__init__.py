"""The architecture of a decoder, as data. Families read it from Hugging Face configs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from turret.lazy_torch import torch
from turret.server.errors import InvalidRequestError
from turret.server.words import say

# Prefix of a layer's modules in a checkpoint, as in ``model.layers.0.self_attn.q_proj``.
LAYER_PREFIX = "model.layers"
# The modules of a layer that form each fused projection, in models that store them separately.
MODULES: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
# The projection that chooses among the experts of a mixture.
ROUTER = "router"
# Added to the positions of long sequences: see ``Rope.long_inv_freq``.
LONG = 1 << 32
# A module's path, its outputs and its inputs.
Linear = tuple[str, int, int]
# Activations of the gate for which every path has a kernel.
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions (RoFormer, arXiv 2104.09864) of one kind of layer.

    Attributes:
        inv_freq: Radians per position, ``[pairs]`` fp32: the first ``2 · pairs`` features of a head
            rotate, and the others stay unchanged.
        scaling: Multiplies cosines and sines.
        long_inv_freq: Used instead of ``inv_freq`` for sequences that may exceed ``Arch.long_from``
            (LongRoPE, arXiv 2402.13753), or None.
    """

    inv_freq: torch.Tensor
    scaling: float = 1.0
    long_inv_freq: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class ClampedSwiglu:
    """An activation of gates and ups that alternate; see ``kernels/rows.py``."""

    alpha: float
    limit: float


@dataclass(frozen=True, slots=True)
class QueryGrowth:
    """``1 + beta · log(1 + ⌊position / length⌋)``, by which a query is multiplied."""

    beta: float
    length: int


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """The positions of a layer's norms, with the names of their modules; None for no norm.

    A norm *after* attention or MLP is applied to the result before it is added to the residual.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None

    def names(self) -> tuple[str, ...]:
        """Names of the norms that exist, in the order in which a layer applies them."""
        places = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(name for name in places if name is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts in place of the MLP (arXiv 1701.06538; 2101.03961 on routing).

    A router, which is a linear module in full precision, gives each token a score per expert.
    Experts are gated MLPs. The experts with the highest scores process the token. Their outputs are
    summed, weighted by the softmax of the scores.

    Attributes:
        layers: The layers that have experts; the others have an MLP.
        count: Number of experts in a layer.
        per_token: The number of experts that process a token.
        intermediate_size: The intermediate size of an expert.
        normalizes: Whether the weights of a token's experts are scaled so that their sum is 1.
        path: The mixture's path in a layer for adapters: ``{path}.gate``, ``{path}.experts``.
        checkpoint_path: The mixture's path in a layer in checkpoints.
        router: The router's module, below either path.
        checkpoint_routers: Other names for the router in checkpoints.
        modules: An expert's modules in the checkpoint, below ``experts``, by fused projection;
            ``{}`` stands for the expert.
        parameters: Adapters' names for the parameters of all experts, below ``experts``.
        are_stacked: Whether a plain checkpoint stores all experts in one tensor, named as in
            ``parameters``: weights ``[experts, in, out]``, biases ``[experts, out]``
            (``ExpertStacks``).
    """

    layers: frozenset[int]
    count: int
    per_token: int
    intermediate_size: int
    normalizes: bool
    path: str = "mlp"
    checkpoint_path: str = "mlp"
    router: str = "gate"
    checkpoint_routers: tuple[str, ...] = ()
    modules: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "experts_gate_up": ("{}.gate_proj", "{}.up_proj"),
            "experts_down": ("{}.down_proj",),
        }
    )
    parameters: Mapping[str, str] = field(
        default_factory=lambda: {"experts_gate_up": "gate_up_proj", "experts_down": "down_proj"}
    )
    are_stacked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Projections:
    """The linear modules of a model's layers, read from ``config.json`` without torch.

    Attributes:
        model_type: The name in the config. It is only informative: no code depends on it.
        num_layers: Number of layers.
        hidden_size: Width of the residual.
        intermediate_size: The inner width of the MLP.
        num_heads: Number of query heads.
        num_kv_heads: Number of key heads, which is also the number of value heads.
        head_dim: Width of one head.
        modules: The modules of a layer, by the projection that they form when they are fused. If a
            checkpoint contains ``qkv`` or ``gate_up`` already fused, the projection is one module.
        experts: The experts of the layers that are mixtures of experts, or None.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MODULES)
    experts: Experts | None = None

    def linears(self) -> dict[str, tuple[Linear, ...]]:
        """Fused projections: (module path in the layer, out, in) per slice, by name.

        If only some layers are mixtures of experts, not every layer has all of them (``has``). The
        experts' projections are not included, but the router is.
        """
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        sizes = {
            "qkv": ((queries, keys, keys), hidden),
            "o": ((hidden,), queries),
            "gate_up": ((inner, inner), hidden),
            "down": ((hidden,), inner),
        }
        found = {}
        for name, (widths, columns) in sizes.items():
            if not any(self.has(layer, name) for layer in range(self.num_layers)):
                continue
            paths = self.modules[name]
            outs = widths if len(paths) > 1 else (sum(widths),)
            found[name] = tuple((p, out, columns) for p, out in zip(paths, outs, strict=True))
        if self.experts is not None:
            router = f"{self.experts.path}.{self.experts.router}"
            found[ROUTER] = ((router, self.experts.count, hidden),)
        return found

    def has(self, layer: int, projection: str) -> bool:
        """Whether a layer has the given projection of ``linears``."""
        is_sparse = self.experts is not None and layer in self.experts.layers
        if projection in ("gate_up", "down"):
            return not is_sparse
        return is_sparse or projection != ROUTER

    def projections(self, layer: int) -> Iterator[tuple[Linear, ...]]:
        """The quantised modules of a layer, grouped as they are fused, with their full paths."""
        for name, slices in self.linears().items():
            if name != ROUTER and self.has(layer, name):
                prefix = f"{LAYER_PREFIX}.{layer}"
                yield tuple((f"{prefix}.{path}", out, inner) for path, out, inner in slices)
        if self.has(layer, ROUTER):
            for experts in self.expert_modules(layer).values():
                yield from experts

    def expert_modules(self, layer: int) -> dict[str, list[tuple[Linear, ...]]]:
        """For each fused projection, the modules of each expert, with their full paths."""
        experts = self.experts
        assert experts is not None, "a layer that has a router has experts"
        folder = f"{LAYER_PREFIX}.{layer}.{experts.checkpoint_path}.experts"
        found = {}
        for name, (_, out, inner) in self.expert_linears().items():
            modules = experts.modules[name]
            found[name] = [
                tuple((f"{folder}.{m.format(e)}", out // len(modules), inner) for m in modules)
                for e in range(experts.count)
            ]
        return found

    def expert_linears(self) -> dict[str, Linear]:
        """Fused projections of an expert, by name: (path of the parameter, out, in)."""
        experts = self.experts
        if experts is None:
            return {}
        inner, hidden = experts.intermediate_size, self.hidden_size
        sizes = {"experts_gate_up": (2 * inner, hidden), "experts_down": (hidden, inner)}
        return {
            name: (f"{experts.path}.experts.{experts.parameters[name]}", *shape)
            for name, shape in sizes.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch(Projections):
    """The architecture of a model, which configures the decoder.

    The decoders read every attribute, including those of ``Projections``, except ``model_type``.
    ``check_served`` rejects values for which there are no kernels.

    Attributes:
        activation: The activation of the MLP's gate, by Hugging Face's name, or the operation on
            gates and ups.
        attention_scale: Multiplies the scores.
        embedding_scale: Multiplies the embeddings, rounded to the dtype of activations.
        scales_soft_tokens: Whether ``embedding_scale`` also multiplies the soft tokens of adapters.
        residual_scale: Multiplies the updates of attention and MLP.
        logit_scale: Multiplies the logits.
        norm_offset: Added to the weights of all norms (1 where a norm is ``1 + w``).
        norms: The norms of a layer.
        qk_norm: Whether queries and keys are normalised: per head, or over the whole projection.
        attention_softcap: If not None, scores become ``c · tanh(score / c)``.
        has_sinks: Whether the softmax of every head includes a learned score that belongs to no
            position.
        logit_softcap: If not None, logits become ``c · tanh(logit / c)``.
        windows: Each layer's sliding window in tokens, or None.
        is_interleaved: Whether a pair that rotates is two neighbouring features of a head, not
            (i, i + pairs).
        query_growth: Multiplies queries by a factor that grows with the position, or None.
        ropes: Rotary positions by kind of layer.
        long_from: A sequence is long if its prompt and ``max_tokens`` together have more tokens
            than this; None if no ``Rope`` depends on it.
        rope_of_layer: Each layer's kind, or None for a layer that does not rotate.
    """

    vocab_size: int
    rms_norm_eps: float
    max_model_len: int
    tie_word_embeddings: bool
    activation: str | ClampedSwiglu
    attention_scale: float
    embedding_scale: float = 1.0
    scales_soft_tokens: bool = False
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    norm_offset: float = 0.0
    norms: LayerNorms = LayerNorms()
    qk_norm: Literal["head", "projection"] | None = None
    attention_softcap: float | None = None
    has_sinks: bool = False
    logit_softcap: float | None = None
    windows: tuple[int | None, ...]
    is_interleaved: bool = False
    query_growth: QueryGrowth | None = None
    ropes: Mapping[str, Rope]
    rope_of_layer: tuple[str | None, ...]
    long_from: int | None = None

    @property
    def queries_per_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def attention_span(self) -> float:
        """The context length at which attention costs as much as the rest of a row, on a CPU.

        A multiplication in attention takes about 1.5 times as long as one by a weight. Layers with
        windows do not count, because windows limit the context.
        """
        attending = sum(window is None for window in self.windows)
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        inner = self.intermediate_size
        if self.experts is not None:
            inner = self.experts.per_token * self.experts.intermediate_size
        weights = self.hidden_size * (2 * queries + 2 * keys + 3 * inner)
        per_position = 1.5 * 2 * queries * attending
        return self.num_layers * weights / per_position if attending else math.inf


def check_served(arch: Arch) -> None:
    """Checks that the decoders support an architecture.

    Raises:
        InvalidRequestError: A part is not supported. The error names the first such part.
    """
    kind = arch.activation
    if isinstance(kind, str) and kind not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        said = say("CONFIG_UNSUPPORTED", key="activation", value=kind, choices=known)
        raise InvalidRequestError.of("model", said)
    if any(2 * len(rope.inv_freq) > arch.head_dim for rope in arch.ropes.values()):
        raise InvalidRequestError.of("model", say("ROTATION_TOO_WIDE"))
