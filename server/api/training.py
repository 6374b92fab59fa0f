"""The Training service, independent of the protocol: it takes and returns messages.

Each model has a session of its own, in which the server numbers the commands.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from turret.lazy_torch import torch
from turret.server.adapters.adapter import CONFIG_FILE, TENSORS_FILE
from turret.server.api.access import MAX_EXPORTS
from turret.server.api.call import Call
from turret.server.api.checkpoints import Checkpoint
from turret.server.api.futures import Result
from turret.server.api.tenants import TenantModel, Tenants
from turret.server.api.violations import Violations
from turret.server.basics.files import reporting_disk_faults
from turret.server.errors import InvalidRequestError
from turret.server.training import (
    ADAM_RANGES,
    LOSSES,
    MAX_SEQUENCE_TOKENS,
    TARGETS,
    AdamParams,
    Datum,
    DatumLoss,
    LearnerConfig,
)
from turret.v1 import training_pb2

if TYPE_CHECKING:
    from turret.server.models.describe import ModelInfo


_T = TypeVar("_T")
# The maximum number of sequences in a request.
MAX_DATUMS = 1024
MAX_SETTINGS = 16
SHOWN_CHARS = 40
# The losses are computed in float32.
_MOST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class AskedPass:
    """A training pass that a client requests.

    Attributes:
        data: The sequences.
        loss: A name in ``LOSSES``.
        settings: The settings of the loss.
        is_forward_only: Whether to compute no gradients.
    """

    data: Sequence[Datum]
    loss: str
    settings: Mapping[str, float]
    is_forward_only: bool


class Refused(Exception):
    """Raised when a value is invalid, after the violation has been recorded."""


class DatumReader:
    """Checks sequences, and records violations.

    Args:
        info: The model, which sets the limits on tokens.
        violations: Receives the violations.
    """

    def __init__(self, info: ModelInfo, violations: Violations) -> None:
        self._info = info
        self._violations = violations

    def check_tokens(self, tokens: np.ndarray, path: str) -> None:
        """Check a sequence.

        Raises:
            Refused: It is empty or too long, or has tokens outside of the vocabulary.
        """
        self.check(len(tokens) > 0, path, "EMPTY")
        most = min(self._info.max_model_len, MAX_SEQUENCE_TOKENS)
        fits = len(tokens) <= most
        self.check(fits, path, "PROMPT_TOO_LONG", length=len(tokens), limit=most, unit="tokens")
        self._check_vocabulary(tokens, path)

    def input(self, name: str, numbers: np.ndarray, length: int, path: str) -> Any:
        """An input of a loss as a tensor: int64 for targets, otherwise fp32.

        Raises:
            Refused: Its length differs from the sequence's, or it has a number that is not allowed.
        """
        count = len(numbers)
        self.check(count == length, path, "NOT_AS_LONG", expected=length, found=count)
        if name == TARGETS:
            self._check_vocabulary(numbers, path)
        else:
            is_finite = bool(np.isfinite(numbers).all())
            self.check(is_finite, path, "NOT_FINITE", dtype="float32")
        # The copy is writable and in the machine's byte order, as torch requires.
        return torch.from_numpy(numbers.astype(np.int64 if name == TARGETS else np.float32))

    def check(self, ok: bool, path: str, reason: str, **params: Any) -> None:
        """Record a violation unless ``ok``.

        Raises:
            Refused: There is a violation.
        """
        self._violations.check(ok, path, reason, **params)
        if not ok:
            raise Refused

    def _check_vocabulary(self, tokens: np.ndarray, path: str) -> None:
        size = self._info.vocab_size
        outside = np.flatnonzero((tokens < 0) | (tokens >= size))
        if len(outside):
            value = int(tokens[outside[0]])
            self.check(False, f"{path}[{outside[0]}]", "NOT_A_TOKEN", value=value, size=size)


def check_loss(loss: str, count: int, violations: Violations, path: str) -> bool:
    """Check the name of a loss and the number of sequences.

    Returns:
        Whether the sequences can be read.
    """
    choices, shown = ", ".join(LOSSES), loss[:SHOWN_CHARS]
    violations.check(loss in LOSSES, path, "NOT_ONE_OF", value=shown, choices=choices)
    violations.check(count > 0, "data", "EMPTY")
    return violations.check_count(count, MAX_DATUMS, "data") and loss in LOSSES


def check_settings(
    loss: str, settings: Mapping[str, float], violations: Violations, path: str
) -> None:
    """Check the settings of a loss. The loss itself may be unknown."""
    known = LOSSES[loss].settings if loss in LOSSES else settings
    for name, value in settings.items():
        shown = name[:SHOWN_CHARS]
        violations.check(name in known, f"{path}.{shown}", "UNKNOWN_FIELD", name=shown)
        is_finite = abs(value) <= _MOST_FLOAT32
        violations.check(is_finite, f"{path}.{shown}", "NOT_FINITE", dtype="float32")


# A model is dropped after this time without a call. An open call counts until it ends.
IDLE_SECONDS = 3600.0
_LOOK_SECONDS = 60.0
_MAX_TARGETS, _MAX_PATH_CHARS = 64, 256
_PIECE_BYTES = 256 << 10
# The inputs of losses by the fields of ``TrainingDatum``.
_INPUTS = {TARGETS: "target_ids", **{n: n for n in ("weights", "logprobs", "advantages")}}


class Training:
    """Trains adapters on behalf of clients. Belongs to one event loop.

    Every method raises TrainingNotFoundError for a model or checkpoint that the client does not
    have, and InvalidRequestError for a message with invalid fields, all of which it lists.

    Args:
        tenants: The state of training, which all protocols share.
    """

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants

    async def create_model(
        self, message: training_pb2.CreateModelRequest, call: Call
    ) -> training_pb2.TrainedModel:
        """Create an adapter in training."""
        sessions, config = self._tenants.sessions, _config(message.config)
        training, owner = sessions.training(), self._tenants.owner(call.party)
        session = sessions.begin(owner, lasts=IDLE_SECONDS, is_numbered=False)
        try:
            model = sessions.add_model(session, 0, config, {})

            async def create() -> None:
                model.learner = await training.create(config, owner)

            with _renamed(lambda field: f"config.{field}"):
                await self._command(model, create)
        except BaseException:
            sessions.end(session)
            raise
        return _model(model)

    def list_models(self, call: Call) -> training_pb2.ListModelsResponse:
        """The client's models."""
        models = self._tenants.sessions.models(self._tenants.owner(call.party), is_numbered=False)
        return training_pb2.ListModelsResponse(models=map(_model, models))

    def delete_model(
        self, message: training_pb2.DeleteModelRequest, call: Call
    ) -> training_pb2.DeleteModelResponse:
        """Drop a model."""
        model = self._model(message.model_id, call)
        self._tenants.sessions.end(self._tenants.sessions.of(model))
        return training_pb2.DeleteModelResponse()

    async def forward_backward(
        self, message: training_pb2.ForwardBackwardRequest, call: Call
    ) -> training_pb2.ForwardBackwardResponse:
        """Compute losses and, unless told otherwise, their gradients."""
        tenants, tenant = self._tenants, call.tenant
        model = self._model(message.model_id, call)
        training, info = tenants.sessions.training(), tenants.info()
        violations = Violations()
        violations.check_count(len(message.data), MAX_DATUMS, "data")
        violations.raise_if_any()
        # Keep a waiting pass as bytes, which take less memory than a message.
        sent = message.SerializeToString()
        del message

        async def run() -> training_pb2.ForwardBackwardResponse:
            asked = await tenants.read(tenant, lambda: _read_pass(sent, info))
            losses = await training.pass_over(
                model.learner_number,
                asked.data,
                asked.loss,
                asked.settings,
                is_forward_only=asked.is_forward_only,
            )
            return await tenants.read(tenant, lambda: _losses(losses))

        return await self._command(model, run, len(sent))

    async def optim_step(
        self, message: training_pb2.OptimStepRequest, call: Call
    ) -> training_pb2.OptimStepResponse:
        """Change a model's weights by the gradients since the last step."""
        model, adam = self._model(message.model_id, call), _adam(message)
        training = self._tenants.sessions.training()

        async def run() -> training_pb2.OptimStepResponse:
            metrics = await training.step(model.learner_number, adam)
            return training_pb2.OptimStepResponse(grad_norm=metrics["grad_norm"])

        return await self._command(model, run)

    async def save_checkpoint(
        self, message: training_pb2.SaveCheckpointRequest, call: Call
    ) -> training_pb2.Checkpoint:
        """Save a model with its optimizer."""
        model, name = self._model(message.model_id, call), _short(message.name, "name")
        overwrite = message.overwrite

        async def run() -> Checkpoint:
            return await self._tenants.save(model, "weights", name, overwrite=overwrite)

        with _renamed(lambda field: "name" if field == "path" else field):
            return _checkpoint(await self._command(model, run))

    async def load_checkpoint(
        self, message: training_pb2.LoadCheckpointRequest, call: Call
    ) -> training_pb2.TrainedModel:
        """Continue a model from a checkpoint."""
        model, path = self._model(message.model_id, call), _short(message.path, "path")
        with_optimizer = message.optimizer

        async def run() -> Checkpoint:
            return await self._tenants.load(model, path, with_optimizer=with_optimizer)

        await self._command(model, run)
        return _model(model)

    def list_checkpoints(self, call: Call) -> training_pb2.ListCheckpointsResponse:
        """The client's checkpoints."""
        owned = self._tenants.checkpoints.owned(self._tenants.owner(call.party))
        return training_pb2.ListCheckpointsResponse(checkpoints=map(_checkpoint, owned))

    async def export_checkpoint(
        self, message: training_pb2.ExportCheckpointRequest, call: Call
    ) -> AsyncGenerator[training_pb2.ExportCheckpointResponse, None]:
        """The files of a checkpoint, piece by piece."""
        checkpoints = self._tenants.checkpoints
        found = checkpoints.find(self._tenants.owner(call.party), message.path)
        with (
            contextlib.ExitStack() as stack,
            reporting_disk_faults(),
            checkpoints.reading(found) as folder,
        ):
            stack.enter_context(call.party.shares.transfer("exports", MAX_EXPORTS, call.tenant))
            # Open all files first: then another call may delete or replace the checkpoint.
            files = {
                name: stack.enter_context((folder / name).open("rb"))
                for name in (CONFIG_FILE, TENSORS_FILE)
            }
            for name, file in files.items():
                while data := await asyncio.to_thread(file.read, _PIECE_BYTES):
                    yield training_pb2.ExportCheckpointResponse(file=name, data=data)

    async def delete_checkpoint(
        self, message: training_pb2.DeleteCheckpointRequest, call: Call
    ) -> training_pb2.DeleteCheckpointResponse:
        """Delete a checkpoint."""
        owner, checkpoints = self._tenants.owner(call.party), self._tenants.checkpoints
        await checkpoints.remove(checkpoints.find(owner, message.path))
        return training_pb2.DeleteCheckpointResponse()

    async def publish_model(
        self, message: training_pb2.PublishModelRequest, call: Call
    ) -> training_pb2.PublishModelResponse:
        """Register a model's weights for sampling."""
        model = self._model(message.model_id, call)

        async def run() -> training_pb2.PublishModelResponse:
            generation = (await self._tenants.publish(model)).generation
            return training_pb2.PublishModelResponse(adapter=model.inflight, generation=generation)

        return await self._command(model, run)

    def _model(self, model_id: str, call: Call) -> TenantModel:
        owner = self._tenants.owner(call.party)
        return self._tenants.sessions.model(owner, model_id, is_numbered=False)

    async def _command(
        self, model: TenantModel, run: Callable[[], Awaitable[_T]], size: int = 0
    ) -> _T:
        """The result of a command, which runs to its end even if the caller is cancelled.

        Args:
            model: The model.
            run: Does the work. It must not keep the message, whose memory is counted only during
                the call.
            size: See ``CommandLog.add``.
        """
        futures, session = self._tenants.futures, self._tenants.sessions.of(model)
        number, found = model.log.next_number, list[_T]()

        async def work() -> Result:
            found.append(await run())
            return Result(b"")

        future = model.log.add(number, model.owner, f"{model.model_id}:{number}", work, size)
        while await future.wait(_LOOK_SECONDS) is None:
            session.seen = time.monotonic()
        futures.forget(future)
        if future.error is not None:
            raise future.error
        return found[0]


@contextlib.contextmanager
def _renamed(name: Callable[[str], str]) -> Iterator[None]:
    """Rename the fields in errors to the names that they have in the message."""
    try:
        yield
    except InvalidRequestError as error:
        if not error.violations:
            raise
        raise InvalidRequestError.of_all([(name(f), why) for f, why in error.violations]) from None


# Messages to values.


def _short(text: str, field: str) -> str:
    """The name or path of a checkpoint, which must be short because waiting commands keep it."""
    violations = Violations()
    violations.check_chars(text, _MAX_PATH_CHARS, field)
    violations.raise_if_any()
    return text


def _config(message: training_pb2.TrainingConfig) -> LearnerConfig:
    violations = Violations()
    violations.check_count(len(message.targets), _MAX_TARGETS, "config.targets")
    violations.raise_if_any()
    return LearnerConfig(
        method=message.method or "lora",
        rank=message.rank,
        seed=message.seed if message.HasField("seed") else None,
        alpha=message.alpha if message.HasField("alpha") else None,
        targets=tuple(message.targets),
        attention=message.train_attn if message.HasField("train_attn") else True,
        mlp=message.train_mlp if message.HasField("train_mlp") else True,
        unembed=message.train_unembed,
    )


def _adam(message: training_pb2.OptimStepRequest) -> AdamParams:
    violations, values = Violations(), {}
    for name, (least, most) in ADAM_RANGES.items():
        is_optional = message.DESCRIPTOR.fields_by_name[name].has_presence
        if is_optional and not message.HasField(name):
            continue
        values[name] = value = getattr(message, name)
        # NaN is in no range.
        is_fine = least <= value <= most
        violations.check(is_fine, name, "NOT_IN_RANGE", least=least, most=most, value=value)
    violations.raise_if_any()
    return AdamParams(**values)


def _read_pass(sent: bytes, info: ModelInfo) -> AskedPass:
    message = training_pb2.ForwardBackwardRequest.FromString(sent)
    violations, loss = Violations(), message.loss
    is_readable = check_loss(loss, len(message.data), violations, "loss")
    if violations.check_count(len(message.loss_config), MAX_SETTINGS, "loss_config"):
        check_settings(loss, message.loss_config, violations, "loss_config")
    reader, data = DatumReader(info, violations), []
    for index, datum in enumerate(message.data if is_readable else ()):
        with contextlib.suppress(Refused):
            data.append(_read_datum(datum, loss, reader, f"data[{index}]"))
        if violations.is_full:
            break
    violations.raise_if_any()
    return AskedPass(data, loss, dict(message.loss_config), message.forward_only)


def _read_datum(
    message: training_pb2.TrainingDatum, loss: str, reader: DatumReader, path: str
) -> Datum:
    tokens = np.array(message.token_ids, np.int64)
    reader.check_tokens(tokens, f"{path}.token_ids")
    inputs = {}
    for name in (TARGETS, *LOSSES[loss].inputs):
        field, is_whole = _INPUTS[name], name == TARGETS
        numbers = np.array(getattr(message, field), np.int64 if is_whole else np.float32)
        if name == "weights" and not len(numbers):
            numbers = np.ones(len(tokens), np.float32)
        inputs[name] = reader.input(name, numbers, len(tokens), f"{path}.{field}")
    return Datum(tokens.tolist(), inputs)


# Values to messages.


def _model(model: TenantModel) -> training_pb2.TrainedModel:
    return training_pb2.TrainedModel(model_id=model.model_id, config=_config_message(model.config))


def _config_message(config: LearnerConfig) -> training_pb2.TrainingConfig:
    return training_pb2.TrainingConfig(
        method=config.method,
        rank=config.rank,
        seed=config.seed,
        alpha=config.alpha,
        targets=config.targets,
        train_attn=config.attention,
        train_mlp=config.mlp,
        train_unembed=config.unembed,
    )


def _checkpoint(checkpoint: Checkpoint) -> training_pb2.Checkpoint:
    message = training_pb2.Checkpoint(
        path=checkpoint.path,
        config=_config_message(checkpoint.config),
        size_bytes=checkpoint.size,
        has_optimizer=checkpoint.kind == "weights",
    )
    message.create_time.FromNanoseconds(int(checkpoint.time * 1e9))
    return message


def _losses(losses: Sequence[DatumLoss]) -> training_pb2.ForwardBackwardResponse:
    response = training_pb2.ForwardBackwardResponse()
    for each in losses:
        result = response.results.add()
        result.logprobs.extend(each.logprobs.tolist())
        result.losses.extend(each.losses.tolist())
    response.loss = sum(float(each.losses.double().sum()) for each in losses)
    return response
