"""Results of the calls. Fields have the meaning of the same field in the ``.proto`` files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import cache, partial
from typing import Any, Self, dataclass_transform, get_args, get_origin, get_type_hints

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

# Fields whose name in the message differs.
_RENAMED = {"vectors": "embeddings"}
# Messages that become plain values; every other one becomes the class here that has its name.
_PLAIN: dict[str, Callable[[Any], Any]] = {
    "Duration": lambda span: span.ToTimedelta().total_seconds(),
    "Timestamp": lambda time: time.ToDatetime(UTC),
    "Embedding": lambda embedding: tuple(embedding.values),
}


@dataclass_transform(frozen_default=True)
class Result:
    """A message as a frozen dataclass, whose fields have the names of the message's fields."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True)(cls)

    @classmethod
    def from_proto(cls, proto: Message) -> Self:
        return cls(*[read(proto) for read in _readers(cls, proto.DESCRIPTOR)])


@cache
def _readers(kind: type, message: Descriptor) -> tuple[Callable[[Any], Any], ...]:
    """Functions that take a message, and return the value of each field of the dataclass."""
    hints = get_type_hints(kind)
    return tuple(_reader(message, each.name, hints[each.name]) for each in fields(kind))


def _reader(message: Descriptor, name: str, hint: Any) -> Callable[[Any], Any]:
    if name in message.oneofs_by_name:
        return partial(_chosen, name)
    name = _RENAMED.get(name, name)
    field = message.fields_by_name[name]
    is_optional = type(None) in get_args(hint)
    convert = _converter(field, is_optional)
    if get_origin(hint) is tuple:
        return lambda proto: tuple(map(convert, getattr(proto, name)))
    if is_optional and field.has_presence:
        return lambda proto: convert(getattr(proto, name)) if proto.HasField(name) else None
    return lambda proto: convert(getattr(proto, name))


def _chosen(oneof: str, proto: Message) -> Any:
    which = proto.WhichOneof(oneof)
    return getattr(proto, which) if which else None


def _converter(field: FieldDescriptor, is_optional: bool) -> Callable[[Any], Any]:
    """The function that turns a field's value, or each of its values, into a Python value."""
    if field.message_type is not None:
        name = field.message_type.name
        return _PLAIN.get(name) or globals()[name].from_proto
    if field.enum_type is not None:
        names: dict[int, str | None] = {e.number: e.name for e in field.enum_type.values}
        if is_optional:
            names[0] = None
        # A newer server may send a value for which this client has no name.
        unknown = f"{field.name.upper()}_{{}}".format
        return lambda value: names[value] if value in names else unknown(value)
    return lambda value: value


class TopLogprob(Result):
    """A possible token at a position.

    Attributes:
        token_id: The token.
        text: Its text, in which bytes that do not form a whole character are U+FFFD.
        logprob: Its natural log probability.
    """

    token_id: int
    text: str
    logprob: float


class TokenLogprob(Result):
    """A token with its log probability.

    Attributes:
        token_id: The token.
        text: Its text, in which bytes that do not form a whole character are U+FFFD.
        logprob: Its natural log probability before sampling parameters; None for the first token
            of a prompt.
        top: The likeliest tokens at its position, likeliest first, if requested.
    """

    token_id: int
    text: str
    logprob: float | None
    top: tuple[TopLogprob, ...]


class Usage(Result):
    """The cost of a request, in tokens.

    Attributes:
        prompt_tokens: Tokens of the prompt, including special tokens but not soft tokens.
        cached_tokens: The prompt tokens that came from the prefix cache.
        completion_tokens: Generated tokens, including the stop token.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class AdapterUse(Result):
    """An adapter that a request used.

    Attributes:
        name: The name in the request.
        uuid: The registration that was used.
        generation: The generation that was used.
        digest: The digest of that generation; see :class:`Adapter`.
        weight: Its factor in the mix.
        cold_start: Whether the request had to wait for the adapter to be loaded.
        load_ms: How long the load took, in milliseconds; 0 without a cold start.
    """

    name: str
    uuid: str
    generation: int
    digest: str
    weight: float
    cold_start: bool
    load_ms: float


class Timing(Result):
    """Seconds since the server received the request.

    Attributes:
        queue: Until the request was first scheduled.
        ttft: Until its first token was generated.
        total: Until it finished.
    """

    queue: float
    ttft: float
    total: float


class Completion(Result):
    """A whole answer.

    Attributes:
        text: The answer.
        token_ids: Its tokens, if requested.
        logprobs: One entry per token, if requested.
        finish_reason: ``STOP`` or ``LENGTH``. Two more values precede an error: ``CANCELLED`` in an
            ``AnswerCutError`` and in the last chunk before one, and ``DEADLINE`` in the last chunk
            before a ``DeadlineExceededError``, if the server notices the deadline first.
        stop: The stop string or stop token id of the request that ended the answer, or None.
        usage: The tokens that the request used.
        adapters_used: The adapters that produced the answer, in the order of the request.
        timing: How long the parts of the request took.
        request_id: The request's id.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str
    stop: str | int | None
    usage: Usage
    adapters_used: tuple[AdapterUse, ...]
    timing: Timing
    request_id: str


class Chunk(Result):
    """A part of an answer. Some fields are None or empty in all parts but the last.

    Attributes:
        text: New text of the answer; may be empty.
        token_ids: New tokens of the answer, if requested.
        logprobs: One entry per token, if requested.
        finish_reason: As in :class:`Completion`; None in every chunk but the last.
        stop: As in :class:`Completion`.
        usage: None in every chunk but the last.
        adapters_used: Empty in every chunk but the last and that of the first token.
        timing: None in every chunk but the last.
        request_id: The request's id.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None
    stop: str | int | None
    usage: Usage | None
    adapters_used: tuple[AdapterUse, ...]
    timing: Timing | None
    request_id: str


class Score(Result):
    """The log probabilities of a prompt.

    Attributes:
        tokens: One entry per token of the prompt.
        usage: The tokens that the request used.
        adapters_used: The adapters that were used, in the order of the request.
        timing: How long the parts of the request took.
        request_id: The request's id.
    """

    tokens: tuple[TokenLogprob, ...]
    usage: Usage
    adapters_used: tuple[AdapterUse, ...]
    timing: Timing
    request_id: str

    @property
    def logprob(self) -> float:
        """The prompt's log probability given its first token: the sum over the others."""
        return sum(token.logprob for token in self.tokens if token.logprob is not None)


class Tokens(Result):
    """A text and its tokens.

    Attributes:
        token_ids: The tokens.
        token_texts: The text of each token.
        text: The text of all tokens together.
    """

    token_ids: tuple[int, ...]
    token_texts: tuple[str, ...]
    text: str


class Model(Result):
    """The base model and the server that serves it.

    Attributes:
        name: The model's name, from its config or directory.
        model_type: The architecture, such as ``llama``.
        digest: SHA-256 of the weights as loaded, in hex.
        dtype: The type of activations: ``bfloat16``, ``float16`` or ``float32``.
        quantization: How the weights are stored, such as ``nf4``.
        vocab_size: Tokens in the vocabulary.
        max_model_len: The longest context in tokens, prompt and answer together.
        num_layers: Number of decoder layers.
        hidden_size: Width of the hidden states.
        server_version: The server's version.
        methods: The adapter methods that the server can load, sorted.
        commit: The hub's commit of the model's files; empty if they are from elsewhere.
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
    server_version: str
    methods: tuple[str, ...]
    commit: str = ""


# Results of calls that return vectors or labels instead of text.


class Embeddings(Result):
    """The vectors of all inputs.

    Attributes:
        vectors: One vector for each input, in their order.
        usage: The tokens that all inputs used together.
        adapters_used: The adapters that were used, in the order of the request.
        timing: How long the parts of the request took.
        request_id: The request's id.
    """

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage
    adapters_used: tuple[AdapterUse, ...]
    timing: Timing
    request_id: str


class LabelScore(Result):
    """A head's result for one label.

    Attributes:
        label: The label.
        probability: The label's probability, in [0, 1]; None for regression.
        logit: The head's output.
    """

    label: str
    probability: float | None
    logit: float


class Classification(Result):
    """The labels of one input.

    Attributes:
        label: The label with the largest logit.
        scores: All labels, in the head's order.
    """

    label: str
    scores: tuple[LabelScore, ...]

    @property
    def probabilities(self) -> dict[str, float | None]:
        """The probability of each label, in the head's order."""
        return {score.label: score.probability for score in self.scores}


class Classifications(Result):
    """The labels of all inputs.

    Attributes:
        classifications: One entry for each input, in their order.
        usage: The tokens that all inputs used together.
        adapters_used: The adapters that were used, in the order of the request.
        timing: How long the parts of the request took.
        request_id: The request's id.
    """

    classifications: tuple[Classification, ...]
    usage: Usage
    adapters_used: tuple[AdapterUse, ...]
    timing: Timing
    request_id: str

    @property
    def labels(self) -> tuple[str, ...]:
        """The label of each input."""
        return tuple(each.label for each in self.classifications)


# Results of the adapter calls.


class Adapter(Result):
    """A registered adapter.

    Attributes:
        name: The name that requests use.
        uuid: Identifies this registration.
        generation: The version of the weights under this registration, counted from 1.
        digest: SHA-256 over the config and tensors, in hex.
        method: The method, such as ``lora``.
        ranks: The distinct ranks of its modules.
        target_modules: The modules that it changes.
        bytes_disk: Size on disk, in bytes.
        bytes_host: Host memory in use, in bytes.
        bytes_device: Device memory in use, in bytes.
        residency: ``DISK``, ``HOST`` or ``DEVICE``.
        pinned: Whether it is protected from eviction and unloading.
        in_flight: Number of requests that use it.
        last_used_time: When a request last used it (UTC), or None.
        base_model: The base model in the adapter's config.
        warnings: Possible problems, for people to read.
        state: ``LOADING``, ``ACTIVE`` or ``DELETING``.
        source: The path that it was loaded from, with the commit for the hub; "" if it was
            uploaded or fused.
        invocation_token_ids: The invocation of an aLoRA, which takes effect at its last occurrence
            in the prompt; empty for an adapter that affects every token.
        labels: The labels of its classification head; empty if it has none.
        chat_template: The origin of the adapter's chat template: one of its files, ``request`` if
            it was loaded with one, ``members`` for a fused adapter; "" if conversations use the
            base's template.
        kept_generations: The replaced generations that requests may still name, ascending.
    """

    name: str
    uuid: str
    generation: int
    digest: str
    method: str
    ranks: tuple[int, ...]
    target_modules: tuple[str, ...]
    bytes_disk: int
    bytes_host: int
    bytes_device: int
    residency: str
    pinned: bool
    in_flight: int
    last_used_time: datetime | None
    base_model: str
    warnings: tuple[str, ...]
    state: str
    source: str = ""
    invocation_token_ids: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    chat_template: str = ""
    kept_generations: tuple[int, ...] = ()


class AliasTarget(Result):
    """One of the generations that an alias stands for.

    Attributes:
        name: The name of the adapter.
        generation: The generation.
        weight: The share of the requests, relative to the other targets.
    """

    name: str
    generation: int
    weight: float


class Alias(Result):
    """A name that stands for generations of adapters.

    Attributes:
        name: The name that requests use.
        targets: The generations.
    """

    name: str
    targets: tuple[AliasTarget, ...]


class ModuleError(Result):
    """The error of one module in a fusion or merge.

    Attributes:
        module: Its full path in the base model.
        relative_error: Frobenius norm of the difference over that of the exact result.
        rank: Rank of the result in this module; 0 for a merge.
    """

    module: str
    relative_error: float
    rank: int


class Fusion(Result):
    """A new adapter that was fused from others.

    Attributes:
        adapter: The new adapter.
        relative_error: Over all modules together: the Frobenius norm of the difference from the
            exact sum over that of the sum.
        modules: The same for each module, in the base model's order.
    """

    adapter: Adapter
    relative_error: float
    modules: tuple[ModuleError, ...]


class MergedAdapter(Result):
    """A member of the mix that is merged into the base model.

    Attributes:
        name: Its name at the time of the merge.
        uuid: The registration that was merged.
        generation: The generation that was merged.
        weight: Its factor in the mix.
    """

    name: str
    uuid: str
    generation: int
    weight: float


class MergeState(Result):
    """The mix that is merged into the base model.

    Attributes:
        active: Whether a merge is active. If not, only ``base_generation`` is set.
        base_generation: The version of the base model's weights, counted from 1.
        adapters: The mix.
        precision: ``NF4`` or ``BF16``; empty without a merge.
        merge_time: When the merge took effect (UTC).
        relative_error: Rounding error over all modules together.
        modules: The same for each module.
        update_error: The error as a share of the change; at 1 the mix is lost in the rounding.
    """

    active: bool
    base_generation: int
    adapters: tuple[MergedAdapter, ...]
    precision: str
    merge_time: datetime | None
    relative_error: float
    modules: tuple[ModuleError, ...]
    update_error: float

    def __post_init__(self) -> None:
        if not self.active:
            object.__setattr__(self, "precision", "")


class TrainingConfig(Result):
    """The config of an adapter in training.

    Attributes:
        method: Its method, such as ``lora``.
        rank: Its rank.
        seed: Determines the initial weights; None if they are random.
        alpha: The scale of the update, which is divided by the rank; None for 32.
        targets: The trained modules; empty if the next three fields chose them.
        train_attn: Whether the projections of attention are trained.
        train_mlp: Whether the projections of MLPs are trained.
        train_unembed: Whether the head is trained.
    """

    method: str
    rank: int
    seed: int | None
    alpha: float | None
    targets: tuple[str, ...]
    train_attn: bool
    train_mlp: bool
    train_unembed: bool


class TrainedModel(Result):
    """An adapter in training.

    Attributes:
        model_id: Identifies it in other calls.
        config: Its config.
    """

    model_id: str
    config: TrainingConfig


class DatumLoss(Result):
    """The result of one sequence, with one number for each target.

    Attributes:
        logprobs: The log probability of each target, bit-identical to that of sampling.
        losses: The part of the loss of each target.
    """

    logprobs: tuple[float, ...]
    losses: tuple[float, ...]


class PassResult(Result):
    """The result of a pass over sequences.

    Attributes:
        results: The results, in the order of the sequences.
        loss: The sum of all losses.
    """

    results: tuple[DatumLoss, ...]
    loss: float


class StepResult(Result):
    """The result of an optimizer step.

    Attributes:
        grad_norm: The norm of the gradient before it was clipped.
    """

    grad_norm: float


class Checkpoint(Result):
    """A model that was saved.

    Attributes:
        path: Identifies it in other calls.
        config: The config of the adapter.
        create_time: When it was saved (UTC).
        size_bytes: The size of its files.
        has_optimizer: Whether it contains the state of the optimizer.
    """

    path: str
    config: TrainingConfig
    create_time: datetime
    size_bytes: int
    has_optimizer: bool
