"""The description of the base model that the code for adapters needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol

from turret.lazy_torch import torch


@dataclass(frozen=True, slots=True)
class Allowed:
    """The kinds of adapters that the operator allows.

    Attributes:
        other_base: Allow adapters whose config names another base, if the shapes fit.
        dense: Allow adapters whose updates are as large as the weights that they change.
        strict_base: Reject adapters that were trained on other weights of the base, instead of
            warning.
    """

    other_base: bool = False
    dense: bool = False
    strict_base: bool = False


NOTHING_SPECIAL = Allowed()


class WeightRows(Protocol):
    """A weight, ``[out_features, in_features]``, that need not be in memory as a whole."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def __getitem__(self, rows: slice, /) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class BaseModule:
    """One linear module of the base model that an adapter may target.

    Attributes:
        name: Full path in the checkpoint, e.g. ``model.layers.0.self_attn.q_proj``.
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        bias: The module's bias, ``[out_features]`` fp32, or None.
        dequantize: Returns the weight as served, ``[out_features, in_features]`` fp32. Each call
            dequantises the whole weight, so call it for one module at a time and drop the result.
            Do not write to the result, because it may be the memory that is served.
        served: Returns the same weight in any dtype and on its device, for reading a block of rows
            at a time; None to use ``dequantize``.
    """

    name: str
    in_features: int
    out_features: int
    bias: torch.Tensor | None
    dequantize: Callable[[], torch.Tensor]
    served: Callable[[], WeightRows] | None = None

    def rows(self) -> WeightRows:
        """The weight, for reading block by block."""
        return self.dequantize() if self.served is None else self.served()

    @property
    def has_bias(self) -> bool:
        return self.bias is not None


@dataclass(frozen=True, slots=True)
class BaseExperts:
    """A fused projection of all experts of a layer, which is one parameter for adapters.

    Attributes:
        name: Its path, e.g. ``model.layers.0.mlp.experts.gate_up_proj``.
        modules: The modules of one expert that the projection joins along their outputs, by their
            names in older checkpoints, where ``{}`` stands for the number of the expert.
        count: The number of experts.
        in_features: Inputs of an expert.
        out_features: Outputs of an expert.
        is_first: Whether the projection is the first parameter of its module. PEFT wraps a module
            once per parameter, and keeps the tensors of the first parameter innermost.
        dequantize: Returns one expert's weight as served, ``[out_features, in_features]`` fp32.
    """

    name: str
    modules: tuple[str, ...]
    count: int
    in_features: int
    out_features: int
    is_first: bool
    dequantize: Callable[[int], torch.Tensor]

    @property
    def folder(self) -> str:
        """The path of the module to which the parameter belongs."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class BaseNorm:
    """A norm of the base whose result only linear modules use.

    Attributes:
        weight: The checkpoint's weight, ``[hidden]`` fp32.
        offset: Number that the model adds to the weight before the multiplication.
        feeds: The paths of the modules that take its result.
    """

    weight: torch.Tensor
    offset: float
    feeds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BaseVocabulary:
    """The matrices that have a row per token, ``[vocab, hidden]`` in the serving dtype.

    Attributes:
        embedding: Turns input tokens into vectors.
        head: Turns the last hidden states into logits.
        is_tied: Whether the checkpoint declares that both are the same matrix
            (``tie_word_embeddings``).
        named: The number of rows for which the base's tokenizer has tokens. The rows after them
            are padding. None means all rows.
    """

    embedding: torch.Tensor
    head: torch.Tensor
    is_tied: bool
    named: int | None = None

    @property
    def size(self) -> int:
        return self.embedding.shape[0]


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The description of the base for adapters, with the weights of one generation.

    Attributes:
        name: The model's name in its config, or the name of its directory. It is compared loosely
            with ``base_model_name_or_path``.
        model_type: The ``model_type`` in the checkpoint's config.
        digest: SHA-256 over the weights as loaded, which adapters are trained on. A merge does not
            change it; ``generation`` identifies the weights served.
        dtype: Serving dtype of activations and operators.
        modules: The quantised linear modules of the decoder layers, by full path, in layer order,
            and ``lm_head`` after them.
        other_modules: Paths of modules that are not linear (norms, ``model.embed_tokens``). A
            method that does not support such a module rejects the adapter instead of skipping the
            module.
        experts: Fused projections of experts, by path, in layer order.
        renamed: Parts of paths in older adapter checkpoints, with their current names.
        norms: The ``other_modules`` that are norms and feed only linear modules, by path.
        vocabulary: Embedding and head.
        num_layers: Decoder layers.
        hidden_size: Width of an embedding.
        num_kv_heads: Heads of keys and values per layer.
        head_dim: Width of one head.
        weights: How the weights are stored: for each kind of module, such as ``down_proj``, the
            number of modules by storage format; see ``Fidelity.storage``.
        weights_shown: The same for each kind as readable text, with the quantisation error.
        generation: The version of the weights, from 1; each merge and each unmerge increases it.
        text_prefix: The prefix of the adapter that is being read, if it was trained on a model of
            text and images (``checkpoint.text_prefix``).
        beside: Makes a context manager. Inside ``with base.beside():``, a thread's work on the
            device does not block steps.
    """

    name: str
    model_type: str
    digest: str
    dtype: torch.dtype
    modules: Mapping[str, BaseModule]
    other_modules: frozenset[str]
    vocabulary: BaseVocabulary
    num_layers: int
    hidden_size: int
    num_kv_heads: int
    head_dim: int
    experts: Mapping[str, BaseExperts] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    norms: Mapping[str, BaseNorm] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    weights_shown: Mapping[str, str] = field(default_factory=dict)
    generation: int = 1
    text_prefix: str = ""
    beside: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size

    @property
    def kv_width(self) -> int:
        """The number of values in a token's keys in a layer, over all heads."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class ModuleSize:
    """The part of a ``BaseModule`` that is known before the model is read.

    ``has_bias`` is None if the model's config does not determine it.
    """

    name: str
    in_features: int
    out_features: int
    has_bias: bool | None = None


@dataclass(frozen=True, slots=True)
class BaseSizes:
    """The part of a ``BaseModel`` that is known before the model is read.

    The attributes are those of ``BaseModel``. ``kv_width`` is the width of keys.
    """

    name: str
    model_type: str
    modules: Mapping[str, ModuleSize]
    num_layers: int
    hidden_size: int
    kv_width: int
    vocab_size: int
    other_modules: frozenset[str] = frozenset()
    text_prefix: str = ""


@dataclass(frozen=True, slots=True)
class ChangedBase:
    """The event that the base has new weights.

    Attributes:
        generation: The version of these weights.
        stale: Keys of adapters whose operators were computed from the previous weights. Copies of
            these operators have to be dropped.
        merged: The uuids and digests of the adapters that are part of these weights.
    """

    generation: int
    stale: frozenset[str]
    merged: frozenset[str] = frozenset()


Precision = Literal["NF4", "BF16"]
