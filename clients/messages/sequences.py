"""Sequences to train on, and the requests that carry them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from turret.clients.messages.fields import extend, named, not_of_type, several
from turret.clients.messages.requests import filled
from turret.v1 import training_pb2

# A request with more tokens could take longer than the default deadline on a busy server.
_MOST_TOKENS = 4096
# The server's limit on the sequences of a request.
_MOST_DATA = 1024


@dataclass(frozen=True, slots=True)
class TrainingDatum:
    """A sequence with the inputs of its loss, one number for each token.

    Attributes:
        token_ids: The tokens that the model reads.
        target_ids: The token whose log probability is computed at each position, usually the next
            one.
        weights: For ``cross_entropy``: the weight of each target; empty for 1.
        logprobs: For other losses: the log probability with which each target was sampled.
        advantages: For other losses: the advantage of each target.
    """

    token_ids: Sequence[int]
    target_ids: Sequence[int]
    weights: Sequence[float] = ()
    logprobs: Sequence[float] = ()
    advantages: Sequence[float] = ()


def pass_requests(
    model_id: str,
    data: Sequence[TrainingDatum],
    loss: str,
    loss_config: Mapping[str, float] | None,
    forward_only: bool,
) -> Iterator[training_pb2.ForwardBackwardRequest]:
    """The requests of a pass, each with as many sequences as fit.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value does not fit its field.
    """
    head = training_pb2.ForwardBackwardRequest()
    filled(head, model_id=model_id, loss=loss, forward_only=forward_only)
    for name, value in (loss_config or {}).items():
        with named(f"loss_config.{name}", value):
            head.loss_config[name] = value
    request, count = _copy(head), 0
    for index, datum in enumerate(several("data", data, "a list of sequences")):
        if not isinstance(datum, TrainingDatum):
            raise not_of_type(f"data[{index}]", "a TrainingDatum", datum)
        if request.data and (
            count + len(datum.token_ids) > _MOST_TOKENS or len(request.data) == _MOST_DATA
        ):
            yield request
            request, count = _copy(head), 0
        _add(request.data.add(), datum, f"data[{index}]")
        count += len(datum.token_ids)
    yield request


def _copy(head: training_pb2.ForwardBackwardRequest) -> training_pb2.ForwardBackwardRequest:
    request = training_pb2.ForwardBackwardRequest()
    request.CopyFrom(head)
    return request


def _add(message: training_pb2.TrainingDatum, datum: TrainingDatum, path: str) -> None:
    for name in ("token_ids", "target_ids", "weights", "logprobs", "advantages"):
        extend(f"{path}.{name}", getattr(message, name), getattr(datum, name))
