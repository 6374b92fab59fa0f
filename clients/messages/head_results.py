"""What the calls return that ask for vectors or labels instead of text."""

from __future__ import annotations

from dataclasses import dataclass

from turret.clients.messages.results import AdapterUse, Timing, Usage, used_adapters
from turret.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Inputs as vectors.

    Attributes:
        vectors: One for each input, in their order.
        usage: What all inputs together cost.
        adapters_used: Which weights answered, in the order of the request.
        timing: Where the time went.
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
    """What a head says of one label.

    Attributes:
        label: The label.
        probability: In [0, 1]; None where the head was trained for numbers.
        logit: What the head computed.
    """

    label: str
    probability: float | None
    logit: float


@dataclass(frozen=True, slots=True)
class Classification:
    """What an input was found to be.

    Attributes:
        label: The label with the largest number.
        scores: All labels, in the head's order.
    """

    label: str
    scores: tuple[LabelScore, ...]

    @property
    def probabilities(self) -> dict[str, float | None]:
        """By label, in the head's order."""
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
    """What each input was found to be.

    Attributes:
        classifications: One for each input, in their order.
        usage: What all inputs together cost.
        adapters_used: Which weights answered, in the order of the request.
        timing: Where the time went.
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
