"""Results of the inference calls. Fields mean what ``inference.proto`` documents for their name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from turret.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """A token that could have stood at a position.

    Attributes:
        token_id: The token.
        text: Its text; bytes that are not a whole character are U+FFFD.
        logprob: Its natural log probability.
    """

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log probability.

    Attributes:
        token_id: The token.
        text: Its text; bytes that are not a whole character are U+FFFD.
        logprob: Its natural log probability before sampling parameters; None for the first token
            of a prompt.
        top: The likeliest tokens at its position, likeliest first, if requested.
    """

    token_id: int
    text: str
    logprob: float | None
    top: tuple[TopLogprob, ...]

    @classmethod
    def from_proto(cls, proto: pb.TokenLogprob) -> TokenLogprob:
        return cls(
            proto.token_id,
            proto.text,
            proto.logprob if proto.HasField("logprob") else None,
            tuple(TopLogprob(t.token_id, t.text, t.logprob) for t in proto.top),
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost, in tokens.

    Attributes:
        prompt_tokens: Tokens of the prompt, including special tokens but not soft tokens.
        cached_tokens: The prompt tokens that came from the prefix cache.
        completion_tokens: Generated tokens, including the stop token.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    @classmethod
    def from_proto(cls, proto: pb.Usage) -> Usage:
        return cls(proto.prompt_tokens, proto.cached_tokens, proto.completion_tokens)


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """The weights of one adapter that answered.

    Attributes:
        name: The name in the request.
        uuid: The registration that answered.
        generation: The generation that answered.
        weight: Its factor in the mix.
        cold_start: Whether the request had to wait for the adapter to be loaded.
        load_ms: How long the load took, in milliseconds; 0 without a cold start.
    """

    name: str
    uuid: str
    generation: int
    weight: float
    cold_start: bool
    load_ms: float

    @classmethod
    def from_proto(cls, proto: pb.AdapterUse) -> AdapterUse:
        return cls(
            proto.name, proto.uuid, proto.generation, proto.weight, proto.cold_start, proto.load_ms
        )


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds since the server received the request.

    Attributes:
        queue: Until the request was first scheduled.
        ttft: Until its first token was generated.
        total: Until it finished.
    """

    queue: float
    ttft: float
    total: float

    @classmethod
    def from_proto(cls, proto: pb.Timing) -> Timing:
        queue, ttft, total = (
            span.ToTimedelta().total_seconds() for span in (proto.queue, proto.ttft, proto.total)
        )
        return cls(queue, ttft, total)


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer.

    Attributes:
        text: The answer.
        token_ids: Its tokens, if requested.
        logprobs: One entry per token, if requested.
        finish_reason: ``STOP`` or ``LENGTH``. Two more values precede an error: ``CANCELLED`` in an
            ``AnswerCutError`` and in the last chunk before one, and ``DEADLINE`` in the last chunk
            before a ``DeadlineExceededError``, if the server notices the deadline first.
        stop: The stop string or stop token id of the request that ended the answer, or None.
        usage: What the request cost.
        adapters_used: Which weights answered, in the order of the request.
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

    @classmethod
    def from_proto(cls, proto: pb.GenerateResponse) -> Completion:
        return cls(
            proto.text,
            tuple(proto.token_ids),
            _logprobs(proto.logprobs),
            _finish_reason(proto) or "FINISH_REASON_UNSPECIFIED",
            _stop(proto),
            Usage.from_proto(proto.usage),
            used_adapters(proto.adapters_used),
            Timing.from_proto(proto.timing),
            proto.request_id,
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of an answer. Fields that are None or empty until then come with the last part.

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

    def without_token_ids(self) -> Chunk:
        return replace(self, token_ids=())

    @classmethod
    def from_proto(cls, proto: pb.GenerateChunk) -> Chunk:
        return cls(
            proto.text,
            tuple(proto.token_ids),
            _logprobs(proto.logprobs),
            _finish_reason(proto),
            _stop(proto),
            Usage.from_proto(proto.usage) if proto.HasField("usage") else None,
            used_adapters(proto.adapters_used),
            Timing.from_proto(proto.timing) if proto.HasField("timing") else None,
            proto.request_id,
        )


@dataclass(frozen=True, slots=True)
class Score:
    """The log probabilities of a prompt.

    Attributes:
        tokens: One entry per token of the prompt.
        usage: What the request cost.
        adapters_used: Which weights answered, in the order of the request.
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

    @classmethod
    def from_proto(cls, proto: pb.ScoreResponse) -> Score:
        return cls(
            _logprobs(proto.tokens),
            Usage.from_proto(proto.usage),
            used_adapters(proto.adapters_used),
            Timing.from_proto(proto.timing),
            proto.request_id,
        )


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text and its tokens.

    Attributes:
        token_ids: The tokens.
        token_texts: The text of each token.
        text: The text of all tokens together.
    """

    token_ids: tuple[int, ...]
    token_texts: tuple[str, ...]
    text: str

    @classmethod
    def from_proto(cls, proto: pb.TokenizeResponse) -> Tokens:
        return cls(tuple(proto.token_ids), tuple(proto.token_texts), proto.text)


@dataclass(frozen=True, slots=True)
class Model:
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

    @classmethod
    def from_proto(cls, proto: pb.GetModelResponse) -> Model:
        return cls(
            proto.name,
            proto.model_type,
            proto.digest,
            proto.dtype,
            proto.quantization,
            proto.vocab_size,
            proto.max_model_len,
            proto.num_layers,
            proto.hidden_size,
            proto.server_version,
            tuple(proto.methods),
            proto.commit,
        )


def _logprobs(protos: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(map(TokenLogprob.from_proto, protos))


def used_adapters(protos: Iterable[pb.AdapterUse]) -> tuple[AdapterUse, ...]:
    """The mix that answered, in the order of the request."""
    return tuple(map(AdapterUse.from_proto, protos))


def _finish_reason(proto: pb.GenerateResponse | pb.GenerateChunk) -> str | None:
    value = proto.finish_reason
    if value == pb.GenerateResponse.FINISH_REASON_UNSPECIFIED:
        return None
    # A newer server may send a reason that this client has no name for.
    known = value in pb.GenerateResponse.FinishReason.values()
    return pb.GenerateResponse.FinishReason.Name(value) if known else f"FINISH_REASON_{value}"


def _stop(proto: pb.GenerateResponse | pb.GenerateChunk) -> str | int | None:
    which = proto.WhichOneof("stop")
    return getattr(proto, which) if which else None


# Results of calls that return vectors or labels instead of text.


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The vectors of all inputs.

    Attributes:
        vectors: One vector for each input, in their order.
        usage: What all inputs together cost.
        adapters_used: Which weights answered, in the order of the request.
        timing: How long the parts of the request took.
        request_id: The request's id.
    """

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage
    adapters_used: tuple[AdapterUse, ...]
    timing: Timing
    request_id: str

    @classmethod
    def from_proto(cls, proto: pb.EmbedResponse) -> Embeddings:
        return cls(
            tuple(tuple(embedding.values) for embedding in proto.embeddings),
            Usage.from_proto(proto.usage),
            used_adapters(proto.adapters_used),
            Timing.from_proto(proto.timing),
            proto.request_id,
        )


@dataclass(frozen=True, slots=True)
class LabelScore:
    """A head's result for one label.

    Attributes:
        label: The label.
        probability: The label's probability, in [0, 1]; None for regression.
        logit: The head's output.
    """

    label: str
    probability: float | None
    logit: float


@dataclass(frozen=True, slots=True)
class Classification:
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

    @classmethod
    def from_proto(cls, proto: pb.Classification) -> Classification:
        scores = (
            LabelScore(s.label, s.probability if s.HasField("probability") else None, s.logit)
            for s in proto.scores
        )
        return cls(proto.label, tuple(scores))


@dataclass(frozen=True, slots=True)
class Classifications:
    """The labels of all inputs.

    Attributes:
        classifications: One entry for each input, in their order.
        usage: What all inputs together cost.
        adapters_used: Which weights answered, in the order of the request.
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

    @classmethod
    def from_proto(cls, proto: pb.ClassifyResponse) -> Classifications:
        return cls(
            tuple(map(Classification.from_proto, proto.classifications)),
            Usage.from_proto(proto.usage),
            used_adapters(proto.adapters_used),
            Timing.from_proto(proto.timing),
            proto.request_id,
        )
