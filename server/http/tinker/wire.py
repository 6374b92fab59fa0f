"""Protobuf bodies of the Tinker API: requests with sequences to train on, and results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from turret.lazy_torch import torch
from turret.server.api import training
from turret.server.api.violations import Violations
from turret.server.errors import InvalidRequestError
from turret.server.training import LOSSES, TARGETS, Datum, DatumLoss
from turret.server.words import say
from turret.v1 import inference_pb2, tinker_pb2

if TYPE_CHECKING:
    from turret.server.models.describe import ModelInfo

PROTOBUF = "application/x-protobuf"
# Limits on one request. The client divides longer lists into several requests.
MAX_CHUNKS = 64
MAX_INPUTS = 16
_INPUTS = frozenset((TARGETS, "weights", "logprobs", "advantages"))
_NO_LOGPROB = -99999.0
_M = TypeVar("_M", bound=Message)
_Pass, _Parts, _Tensor, _Samples = (
    tinker_pb2.TinkerPass,
    tinker_pb2.TinkerPassParts,
    tinker_pb2.TinkerTensor,
    tinker_pb2.TinkerSamples,
)
_INT32, _INT64, _FLOAT32 = np.dtype("<i4"), np.dtype("<i8"), np.dtype("<f4")


def read_address(body: bytes) -> tuple[str, int]:
    """The model of a pass, and the number of the command.

    Raises:
        InvalidRequestError: The body is not a message.
    """
    message = _parse(_Parts, body)
    return message.model_id, message.seq_id


def _parse(kind: type[_M], body: bytes) -> _M:
    # Parsing a message of millions of parts takes a second, while no other thread runs. Messages
    # whose parts are bytes are parsed ten times as fast, so they serve to count the parts first.
    try:
        return kind.FromString(body)
    except DecodeError:
        raise InvalidRequestError(say("MESSAGE_MALFORMED")) from None


class _PassReader(training.DatumReader):
    """Reads the sequences of a pass."""

    def datum(self, data: bytes, loss: str, path: str) -> Datum | None:
        """A sequence; None if it has violations.

        Raises:
            InvalidRequestError: The bytes are not a sequence.
        """
        parts = _parse(_Parts.DatumParts, data)
        most = ("model_input", MAX_CHUNKS), ("loss_fn_inputs", MAX_INPUTS)
        for name, count in most:
            if not self._violations.check_count(len(getattr(parts, name)), count, f"{path}.{name}"):
                return None
        datum = _parse(_Pass.Datum, data)
        try:
            tokens = self._tokens(datum, f"{path}.model_input")
            inputs = self._inputs(datum, loss, len(tokens), f"{path}.loss_fn_inputs")
        except training.Refused:
            return None
        return Datum(tokens.tolist(), inputs)

    def _tokens(self, datum: tinker_pb2.TinkerPass.Datum, path: str) -> np.ndarray:
        self.check(len(datum.model_input) > 0, path, "EMPTY")
        parts = []
        for index, chunk in enumerate(datum.model_input):
            place = f"{path}[{index}]"
            self.check(chunk.HasField("encoded_text"), place, "NOT_TEXT")
            parts.append(self._numbers(chunk.encoded_text.tokens, _INT32, place))
        tokens = np.concatenate(parts)
        self.check_tokens(tokens, path)
        return tokens

    def _inputs(
        self, datum: tinker_pb2.TinkerPass.Datum, loss: str, length: int, path: str
    ) -> dict[str, Any]:
        sent = datum.loss_fn_inputs
        for name in sent:
            shown = name[: training.SHOWN_CHARS]
            self.check(name in _INPUTS, f"{path}.{shown}", "UNKNOWN_FIELD", name=shown)
        inputs = {}
        for name in (TARGETS, *LOSSES[loss].inputs):
            place = f"{path}.{name}"
            if name == "weights" and name not in sent:
                inputs[name] = torch.ones(length, dtype=torch.float32)
                continue
            self.check(name in sent, place, "REQUIRED")
            numbers = self._tensor(sent[name], name == TARGETS, place)
            inputs[name] = self.input(name, numbers, length, place)
        return inputs

    def _tensor(self, tensor: tinker_pb2.TinkerTensor, is_whole: bool, path: str) -> np.ndarray:
        dtype, kind = (_INT64, _Tensor.INT64) if is_whole else (_FLOAT32, _Tensor.FLOAT32)
        wanted, found = _Tensor.DType.Name(kind), str(tensor.dtype)
        is_kind = tensor.dtype == kind
        self.check(is_kind, f"{path}.dtype", "NOT_ONE_OF", value=found, choices=wanted)
        is_list = len(tensor.shape) <= 1 and not tensor.HasField("sparse_csr")
        self.check(is_list, path, "NOT_A_VECTOR")
        numbers = self._numbers(tensor.dense, dtype, path)
        stated, count = list(tensor.shape), len(numbers)
        is_stated = stated in ([], [count])
        self.check(is_stated, path, "NOT_AS_LONG", expected=sum(stated), found=count)
        return numbers

    def _numbers(self, data: bytes, dtype: np.dtype, path: str) -> np.ndarray:
        size = dtype.itemsize
        self.check(len(data) % size == 0, path, "NOT_WHOLE_NUMBERS", size=size, found=len(data))
        return np.frombuffer(data, dtype)


def read_pass(body: bytes, info: ModelInfo) -> training.AskedPass:
    """The pass in a body.

    Args:
        body: A message.
        info: The model, which sets the limits on tokens.

    Raises:
        InvalidRequestError: Lists every offending field.
    """
    message, violations = _parse(_Parts, body), Violations()
    is_readable = training.check_loss(message.loss_fn, len(message.data), violations, "loss_fn")
    data: list[Datum | None] = []
    if is_readable:
        reader = _PassReader(info, violations)
        for index, datum in enumerate(message.data):
            data.append(reader.datum(datum, message.loss_fn, f"data[{index}]"))
            if violations.is_full:
                break
    numbers = _settings(message, violations)
    violations.raise_if_any()
    sequences = [datum for datum in data if datum is not None]
    return training.AskedPass(sequences, message.loss_fn, numbers, message.forward_only)


def _settings(parts: tinker_pb2.TinkerPassParts, violations: Violations) -> dict[str, float]:
    """The settings of the loss. Settings in the newer field override those in the older one."""
    path = "loss_fn_config"
    count = max(len(parts.loss_fn_config), len(parts.loss_fn_config_v2))
    if not violations.check_count(count, training.MAX_SETTINGS, path):
        return {}
    only = _Parts(
        loss_fn=parts.loss_fn,
        loss_fn_config=parts.loss_fn_config,
        loss_fn_config_v2=parts.loss_fn_config_v2,
    )
    message = _parse(_Pass, only.SerializeToString())
    newer, older = message.loss_fn_config_v2, message.loss_fn_config
    settings = dict(older)
    for name, setting in newer.items():
        place = f"{path}.{name[: training.SHOWN_CHARS]}"
        is_number = setting.WhichOneof("value") == "number"
        violations.check(is_number, place, "NOT_A_NUMBER", value="a string")
        settings[name] = setting.number
    training.check_settings(message.loss_fn, settings, violations, path)
    return settings


def result_of_pass(losses: Sequence[DatumLoss]) -> bytes:
    """The message with each token's log probability and loss in a pass, and the sum of losses."""
    record = tinker_pb2.TinkerPassResult.ArrayRecord(
        type_tag="LossPerToken", num_datums=len(losses)
    )
    fields = {
        "logprobs": [each.logprobs for each in losses],
        "elementwise_loss": [each.losses for each in losses],
    }
    for name, tensors in fields.items():
        arrays = [tensor.numpy().astype(_FLOAT32, copy=False) for tensor in tensors]
        ends = np.cumsum([0, *(array.nbytes for array in arrays)])
        batch = record.fields[name]
        batch.data = b"".join(array.tobytes() for array in arrays)
        batch.offsets = ends.astype(_INT64).tobytes()
        batch.dtype = _Tensor.FLOAT32
    # The sum may be NaN, if one loss is infinite and another one negative infinite.
    total = sum(float(tensor.double().sum()) for tensor in fields["elementwise_loss"])
    result = tinker_pb2.TinkerPassResult(
        loss_fn_output_type=record.type_tag, loss_fn_outputs=[record], metrics={"loss:sum": total}
    )
    return result.SerializeToString()


# Samples.


def result_of_samples(
    answers: Sequence[inference_pb2.GenerateResponse],
    prompt: Sequence[inference_pb2.TokenLogprob],
    *,
    prompt_top: int = 0,
    sample_top: int = 0,
    scored: int | None = None,
    has_scores: bool = False,
) -> bytes:
    """The message with sampled sequences.

    Args:
        answers: The sequences, without their prompt.
        prompt: The prompt's tokens, with log probabilities if they were requested.
        prompt_top: The number of alternatives at each position of the prompt.
        sample_top: The number of alternatives at each position of a sequence.
        scored: How many tokens at the prompt's end have log probabilities; None for all.
        has_scores: Whether the log probabilities of the prompt were requested.
    """
    result = _Samples(prompt_cache_hit_tokens=answers[0].usage.cached_tokens)
    for answer in answers:
        is_cut = answer.finish_reason == inference_pb2.GenerateResponse.LENGTH
        sequence = result.sequences.add(
            stop_reason=int(is_cut),
            tokens=np.array(answer.token_ids, _INT32).tobytes(),
            logprobs=np.array([each.logprob for each in answer.logprobs], _FLOAT32).tobytes(),
        )
        if sample_top:
            sequence.topk_sampled_logprobs.CopyFrom(_top(answer.logprobs, sample_top))
    first = 0 if scored is None else len(prompt) - scored
    if has_scores:
        numbers = [
            token.logprob if token.HasField("logprob") and index >= first else math.nan
            for index, token in enumerate(prompt)
        ]
        result.prompt_logprobs = np.array(numbers, _FLOAT32).tobytes()
    if prompt_top:
        result.topk_prompt_logprobs.CopyFrom(_top(prompt, prompt_top, first))
    return result.SerializeToString()


def _top(
    tokens: Sequence[inference_pb2.TokenLogprob], width: int, first: int = 0
) -> tinker_pb2.TinkerSamples.TopLogprobs:
    """The alternatives to each token; none before position ``first``."""
    ids = np.zeros((len(tokens), width), _INT32)
    logprobs = np.full((len(tokens), width), _NO_LOGPROB, _FLOAT32)
    for row, token in enumerate(tokens[first:], start=first):
        for column, each in enumerate(token.top[:width]):
            ids[row, column], logprobs[row, column] = each.token_id, each.logprob
    return _Samples.TopLogprobs(
        token_ids=ids.tobytes(), logprobs=logprobs.tobytes(), k=width, length=len(tokens)
    )
