"""Requests and their outputs, independent of proto and torch."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from turret.server.adapters.adapter import AdapterRef, Head
from turret.server.constraints.matcher import MATCHER_BYTES, Constraint
from turret.server.errors import InvalidRequestError
from turret.server.words import say

if TYPE_CHECKING:
    from turret.server.models.tokenizer import Tokenizer

# Requests for a pooled vector of the prompt's final states, instead of an answer.


class PoolingKind(enum.Enum):
    """The final state to use: that of the last token, or the mean over the text's tokens.

    Soft tokens and prefixes do not belong to the text, so the mean leaves them out.
    """

    LAST = "last"
    MEAN = "mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """How a prompt becomes a vector.

    Attributes:
        kind: Which states are used.
        dimensions: How many numbers of the state are kept, from the first; None keeps all.
        classifies: Whether the classification head of the mix computes the vector from the state.
            The vector is then neither cut nor normalised.
        normalize: Whether the kept numbers are divided by their Euclidean length.
    """

    kind: PoolingKind = PoolingKind.LAST
    dimensions: int | None = None
    normalize: bool = True
    classifies: bool = False


@dataclass(frozen=True, slots=True)
class AdapterTokenizer:
    """The tokenizer of a mix that has its own tokenizer or chat template.

    Attributes:
        content: ``AdapterFacts.tokenizer`` of the member that has one, and the mix's chat
            template (``template_of``); an empty part means that of the base.
        tokenizer: The tokenizer.
    """

    content: tuple[str, str]
    tokenizer: Tokenizer


MAX_TOP_N = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
# Approximate memory of a request's parts: a token is an int object in two lists, a bias is a
# dictionary entry and two numbers in tensors, a stop is a set entry.
_TOKEN_BYTES, _BIAS_BYTES, _STOP_BYTES, _FIXED_BYTES = 48, 120, 72, 4096
# Bytes of an answer: a token with its logprob, and the overhead of each step's output.
_LOGPROB_BYTES, _OUTPUT_BYTES = 160, 256


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"


def _check(ok: bool, name: str, reason: str, **params: object) -> None:
    if not ok:
        raise InvalidRequestError.of(name, say(reason, **params))


def _check_range(name: str, value: float, least: float, most: float) -> None:
    _check(least <= value <= most, name, "NOT_IN_RANGE", least=least, most=most, value=value)


def _check_least(name: str, value: int, least: int) -> None:
    _check(value >= least, name, "TOO_SMALL", least=least, value=value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn. Defaults leave the model's distribution as it is.

    Raises:
        InvalidRequestError: A value is outside its range, or NaN. The error names the field.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_range("sampling.temperature", self.temperature, 0, 100)
        _check_least("sampling.top_k", self.top_k, 0)
        p = self.top_p
        _check(0.0 < p <= 1.0, "sampling.top_p", "NOT_IN_RANGE_ABOVE", above=0, most=1, value=p)
        _check_range("sampling.min_p", self.min_p, 0, 1)
        _check_range("sampling.repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check_range("sampling.presence_penalty", self.presence_penalty, -2, 2)
        _check_range("sampling.frequency_penalty", self.frequency_penalty, -2, 2)
        for token_id, bias in self.logit_bias.items():
            _check_least("sampling.logit_bias", token_id, 0)
            _check_range("sampling.logit_bias", bias, -100, 100)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StopConditions:
    """When a sequence ends. ``max_tokens`` None means up to the model's context."""

    max_tokens: int | None = None
    min_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    include_stop: bool = False

    def __post_init__(self) -> None:
        most = self.max_tokens
        if most is not None:
            _check_least("stop.max_tokens", most, 1)
        least, other = self.min_tokens, "max_tokens"
        _check_least("stop.min_tokens", least, 0)
        is_within = most is None or least <= most
        _check(is_within, "stop.min_tokens", "EXCEEDS_FIELD", other=other, most=most, value=least)
        path, count = "stop.stop_strings", len(self.stop_strings)
        is_short = count <= MAX_STOP_STRINGS
        _check(is_short, path, "TOO_MANY_ENTRIES", most=MAX_STOP_STRINGS, found=count)
        for text in self.stop_strings:
            size, longest = len(text), MAX_STOP_STRING_CHARS
            _check(text != "", path, "HOLDS_EMPTY_STRING")
            _check(size <= longest, path, "HOLDS_TOO_LONG_STRING", most=longest, found=size)
        _check_least("stop.stop_token_ids", min(self.stop_token_ids, default=0), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseOptions:
    """What an answer contains in addition to the text. ``top_n`` requires ``logprobs``.

    With ``call_marks``, the text includes the special tokens around tool calls and channels. With
    ``user_text_only``, an answer in channels includes only the text that is meant for the user.
    """

    logprobs: bool = False
    top_n: int = 0
    echo: bool = False
    token_ids: bool = False
    call_marks: bool = False
    user_text_only: bool = False

    def __post_init__(self) -> None:
        _check_range("options.top_n", self.top_n, 0, MAX_TOP_N)
        has_logprobs = self.top_n == 0 or self.logprobs
        _check(has_logprobs, "options.top_n", "NEEDS_FIELD", other="logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A tokenised request, checked but not yet admitted.

    ``deadline`` is a ``time.monotonic()`` value in seconds. ``score`` asks for prompt logprobs
    only: nothing is generated. ``message_bytes`` is the size of the client's message, which is kept
    while the request waits or runs. ``answer_so_far`` contains the first tokens of an earlier
    answer, which this one continues. The answer must match ``constraint``. ``own_tokenizer``
    produced the tokens, if an adapter has one. Requests share cached prefixes and drafts only if
    their ``salt`` is the same. A waiting request takes its turn among those of its ``party``; a
    running one occupies a place of its ``tenant`` (see ``FairQueue``).
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    adapters: tuple[AdapterRef, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: StopConditions = field(default_factory=StopConditions)
    options: ResponseOptions = field(default_factory=ResponseOptions)
    deadline: float | None = None
    score: bool = False
    message_bytes: int = 0
    answer_so_far: tuple[int, ...] = ()
    constraint: Constraint | None = None
    pooling: Pooling | None = None
    own_tokenizer: AdapterTokenizer | None = None
    salt: bytes = b""
    party: bytes = b""
    tenant: bytes = b""

    def __post_init__(self) -> None:
        assert not self.score or self.pooling is None, "a prompt is scored or pooled"
        _check(len(self.prompt_token_ids) > 0, "input", "NO_TOKENS")
        most, so_far = self.stop.max_tokens, len(self.answer_so_far)
        _check(
            most is None or so_far < most,
            "answer_so_far",
            "ANSWER_COMPLETE",
            found=so_far,
            other="max_tokens",
            most=most,
        )
        _check(
            not (so_far and self.options.echo),
            "options.echo",
            "CONFLICTS_WITH",
            other="answer_so_far",
        )

    @property
    def num_bytes(self) -> int:
        """The approximate memory that the request takes until it ends."""
        stop, constraint = self.stop, self.constraint
        return (
            _FIXED_BYTES
            + (0 if constraint is None else MATCHER_BYTES)
            + self.message_bytes
            + _TOKEN_BYTES * (len(self.prompt_token_ids) + len(self.answer_so_far))
            + _BIAS_BYTES * len(self.sampling.logit_bias)
            + _STOP_BYTES * (len(stop.stop_token_ids) + len(stop.stop_strings))
            + 4 * sum(map(len, stop.stop_strings))
            + self.prompt_logprob_bytes
        )

    @property
    def prompt_logprob_bytes(self) -> int:
        """The approximate memory of the prompt's log probabilities; 0 without them."""
        if not self.wants_prompt_logprobs:
            return 0
        return _LOGPROB_BYTES * (1 + self.options.top_n) * len(self.prompt_token_ids)

    def ends(self, usual: frozenset[int]) -> frozenset[int]:
        """The tokens that end its answer: the model's, unless an adapter has its own tokenizer."""
        return usual if self.own_tokenizer is None else self.own_tokenizer.tokenizer.eos_token_ids

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether every prompt position needs logits."""
        return self.score or (self.options.echo and self.options.logprobs)

    @property
    def generates(self) -> bool:
        """Whether tokens are drawn after the prompt."""
        return not self.score and self.pooling is None

    @property
    def classifies(self) -> bool:
        """Whether the requested vector is that of a classification head."""
        return self.pooling is not None and self.pooling.classifies

    @property
    def needs_every_position(self) -> bool:
        """Whether every prompt position has a result, so that the prefix cache cannot help."""
        is_mean = self.pooling is not None and self.pooling.kind is PoolingKind.MEAN
        return is_mean or self.wants_prompt_logprobs


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One alternative at a position."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its logprob (natural log; None for the first prompt token)."""

    token_id: int
    text: str
    logprob: float | None
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts; ``cached_tokens`` of the prompt came from the prefix cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterUse:
    """An adapter that was used for an answer. Its name may already stand for a later generation."""

    name: str
    uuid: str
    generation: int
    digest: str
    weight: float
    cold_start: bool
    load_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds from the receipt of a request until its scheduling, its first token and its end."""

    queue_seconds: float
    time_to_first_token_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """How a request ended. ``stop`` is the string or token id that ended it, if any."""

    reason: FinishReason
    stop: str | int | None = None
    usage: Usage
    adapters_used: tuple[AdapterUse, ...]
    timing: Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """The output of one step for a request; the last one has ``finish``.

    ``text`` contains only characters that can no longer change (no half UTF-8 sequence, no possible
    beginning of a stop string). ``prompt_logprobs`` is set once, before or with the first token,
    and ``adapters_used`` with the first token. ``pooled`` is set together with ``finish``, as is
    ``head`` if ``pooled`` holds the head's numbers.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    adapters_used: tuple[AdapterUse, ...] = ()
    pooled: array[float] | None = None
    head: Head | None = None
    finish: Finish | None = None

    @property
    def answer_bytes(self) -> int:
        """The approximate memory of what the output adds to the answer."""
        reported = (*self.logprobs, *self.prompt_logprobs)
        each = sum(_LOGPROB_BYTES * (1 + len(logprob.top)) for logprob in reported)
        each += 0 if self.pooled is None else self.pooled.itemsize * len(self.pooled)
        return len(self.text) + _TOKEN_BYTES * len(self.token_ids) + each

    @property
    def num_bytes(self) -> int:
        """The approximate memory that the output takes until it is read."""
        return _OUTPUT_BYTES + self.answer_bytes
