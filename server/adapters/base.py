"""What the adapter side needs to know of the base model, and no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol

from turret.lazy_torch import torch

# Kinds of adapters that are refused unless the operator allows them.


@dataclass(frozen=True, slots=True)
class Allowed:
    """Switches for what is refused by default; all are off.

    Attributes:
        other_base: Adapters whose base is another one by name, if shapes fit.
        dense: Adapters whose updates are as large as the weights they change.
    """

    other_base: bool = False
    dense: bool = False


NOTHING_SPECIAL = Allowed()


class WeightRows(Protocol):
    """A weight, ``[out_features, in_features]``, that need not be there as a whole."""

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
        dequantize: Returns the weight actually served, ``[out_features, in_features]`` fp32. Costs
            a full dequantisation per call: call it for one module at a time and drop the result.
            Do not write to it: it may be the very memory that is served.
        served: The same weight in any dtype, by rows and where it is kept; None for ``dequantize``.
    """

    name: str
    in_features: int
    out_features: int
    bias: torch.Tensor | None
    dequantize: Callable[[], torch.Tensor]
    served: Callable[[], WeightRows] | None = None

    def rows(self) -> WeightRows:
        """The weight, to be read block by block."""
        return self.dequantize() if self.served is None else self.served()

    @property
    def has_bias(self) -> bool:
        return self.bias is not None


@dataclass(frozen=True, slots=True)
class BaseExperts:
    """A fused projection of all experts of a layer: what adapters know as one parameter.

    Attributes:
        name: Its path, e.g. ``model.layers.0.mlp.experts.gate_up_proj``.
        modules: The modules of one expert that it is made of, side by side along their outputs, as
            older checkpoints name them: ``{}`` stands for the expert.
        count: Experts.
        in_features: Inputs of an expert.
        out_features: Outputs of an expert.
        is_first: Whether it is the first of its module's parameters: PEFT, which wraps a module
            once for each, keeps its tensors innermost.
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
        """The module whose parameter it is."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class BaseNorm:
    """A norm of the base whose result only linear modules use.

    Attributes:
        weight: As the checkpoint has it, ``[hidden]`` fp32.
        offset: Number that the model adds to the weight before it multiplies.
        feeds: The modules that take its result, by path.
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
        is_tied: Whether the checkpoint declares them to be one (``tie_word_embeddings``).
        named: Rows that the base's tokenizer has tokens for; the others, behind them, are padding.
            None is all of them.
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
    """The base as adapters see it, with the weights of one generation.

    Attributes:
        name: Model id as its config or directory names it (compared, loosely, with
            ``base_model_name_or_path``).
        model_type: As the checkpoint's config names it.
        digest: SHA-256 over the weights as loaded: what an adapter was trained on. A merge does not
            change it; ``generation`` tells the weights served.
        dtype: Serving dtype of activations and operators.
        modules: The quantised linear modules of the decoder layers, by full path, in layer order,
            and ``lm_head`` behind them.
        other_modules: Paths that exist but are not linear modules (norms, ``model.embed_tokens``):
            a method that does not serve one names it in an error, not a silent skip.
        experts: Fused projections of experts, by path, in layer order.
        renamed: Parts of paths that older checkpoints of adapters have, and what they are called.
        norms: Those of ``other_modules`` that are norms and feed only linear modules, by path.
        vocabulary: Embedding and head.
        num_layers: Decoder layers.
        hidden_size: Width of an embedding.
        num_kv_heads: Heads of keys and values per layer.
        head_dim: Width of one head.
        generation: Counts the weights, from 1: a merge and an unmerge each make other ones.
        text_prefix: Of the adapter that is read, where it was trained on a model of text and images
            (``tensor_names.text_prefix``).
        beside: Inside ``with base.beside():`` a thread's work on the device goes beside the steps.
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
    generation: int = 1
    text_prefix: str = ""
    beside: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size

    @property
    def kv_width(self) -> int:
        """Numbers of a token's keys in a layer, all heads together."""
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

    Attributes are those of ``BaseModel``. ``kv_width`` is that of keys.
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
    """The base has other weights now.

    Attributes:
        generation: The number of these weights.
        stale: Keys of adapters that were computed from those before, so that copies of their
            operators have to go.
    """

    generation: int
    stale: frozenset[str]


Precision = Literal["NF4", "BF16"]
