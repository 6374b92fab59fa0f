"""Every error that turret raises on purpose, as one tree.

A class's docstring describes when the error occurs, for the table in docs/operations.md. Classes
without a docstring are only bases.

``reason`` is an AIP-193 identifier: the name of the class, unless the class names another. By
default, ``metadata`` contains the parameters of the message, except those that are sentences
themselves. ``code`` is the code with which the call ends; each protocol translates it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Self

from turret.server.basics.codes import Code
from turret.server.words import Text, printable

# Metadata key: the number of invalid fields, if the answer has no room for all of them.
VIOLATION_COUNT = "violation_count"


class TurretError(Exception):
    """Base of the tree; carries a machine-readable reason, metadata and field violations.

    ``retry_after_seconds`` tells clients when to try again; it is None if the call would fail again
    in the same way. An error's value may differ from its class's.
    """

    reason = "INTERNAL"
    code = Code.INTERNAL
    retry_after_seconds: float | None = None

    def __init_subclass__(cls) -> None:
        if "reason" not in vars(cls):
            words = re.findall("[A-Z][a-z]+", cls.__name__.removesuffix("Error"))
            cls.reason = "_".join(words).upper()

    def __init__(
        self,
        message: str,
        *,
        metadata: dict[str, str] | None = None,
        violations: Sequence[tuple[str, str]] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = _metadata_of(message) if metadata is None else metadata
        # (field path, description) pairs, reported as google.rpc.BadRequest. Descriptions are
        # Texts, unless another process sent them.
        self.violations: tuple[tuple[str, Any], ...] = tuple(
            (printable(field), description) for field, description in violations
        )
        if retry_after_seconds is not None:
            self.retry_after_seconds = retry_after_seconds


def _metadata_of(message: str) -> dict[str, str]:
    params = message.params.items() if isinstance(message, Text) else ()
    return {key: str(it) for key, it in params if not isinstance(it, Text)}


class InvalidRequestError(TurretError):
    """A field violates its documented limits."""

    code = Code.INVALID_ARGUMENT

    @classmethod
    def of(cls, field: str, description: str) -> Self:
        """The error for one field; the message is readable on its own."""
        return cls.of_all([(field, description)])

    @classmethod
    def of_all(cls, violations: Sequence[tuple[str, str]]) -> Self:
        """The error for several fields. It has metadata only if there is a single violation."""
        message = "; ".join(
            f"{printable(field)}: {description}" for field, description in violations
        )
        metadata = _metadata_of(violations[0][1]) if len(violations) == 1 else None
        return cls(message, metadata=metadata, violations=violations)


class PromptTooLongError(InvalidRequestError):
    """Prompt and max_tokens exceed the context."""


class AdapterClassifiesError(InvalidRequestError):
    """An adapter with a classification head was asked for text."""


class HeadMissingError(InvalidRequestError):
    """Labels were asked for, and no adapter has a head."""


class AdapterError(TurretError):
    reason = "ADAPTER_ERROR"
    code = Code.FAILED_PRECONDITION


class AdapterNotFoundError(AdapterError):
    """The name (or generation) is not registered."""

    code = Code.NOT_FOUND


class AdapterExistsError(AdapterError):
    """The name is taken by other weights."""

    code = Code.ALREADY_EXISTS


class AdapterCheckpointError(AdapterError):
    """The checkpoint is unreadable, inconsistent or unsupported."""

    code = Code.INVALID_ARGUMENT


class AdapterChangedError(AdapterCheckpointError):
    """The files of a registered adapter have changed."""

    # The call is fine, but the server's files have changed.
    code = Code.FAILED_PRECONDITION


class AdapterMismatchError(AdapterError):
    """The adapter was trained for another base model."""

    reason = "ADAPTER_BASE_MISMATCH"


class AdapterComponentError(AdapterError):
    """A component of the adapter is not registered."""


class AdapterInUseError(AdapterError):
    """The adapter is part of a fusion, or is being changed."""


class AdapterPinnedError(AdapterInUseError):
    """The adapter is pinned."""


class AdapterBusyError(AdapterInUseError):
    """Requests still used the adapter when the timeout passed."""


class AdapterMergedError(AdapterInUseError):
    """The adapter is merged into the base."""


class AdapterGenerationError(AdapterError):
    """The name has a different generation than expected."""


class AdapterUnloadedError(AdapterError):
    """The adapter was force-unloaded during a request or fusion."""

    code = Code.ABORTED


class StateDirRequiredError(AdapterError):
    """Uploads and fused adapters need --state-dir."""


class MergeActiveError(AdapterError):
    """A merge is active."""


class MergeUnderWayError(AdapterError):
    """Another merge or unmerge is under way."""


class NotMergedError(AdapterError):
    """No merge is active."""


class TrainingNotFoundError(TurretError):
    """The model in training, sampler, session or checkpoint does not exist."""

    code = Code.NOT_FOUND


class ResourceError(TurretError):
    reason = "RESOURCE_EXHAUSTED"
    code = Code.RESOURCE_EXHAUSTED
    retry_after_seconds = 1.0


class QueueFullError(ResourceError):
    """Too many requests wait, or too many uploads or fusions run."""


class BudgetExceededError(ResourceError):
    """A budget of ranks, bytes or blocks is exceeded."""

    retry_after_seconds = None


class OutOfMemoryError(ResourceError):
    """The process could not get memory or a thread for the call."""


class StorageFullError(ResourceError):
    """No room on the disk of --state-dir."""

    retry_after_seconds = None


class StorageFailedError(TurretError):
    """The disk is read-only or broken, or no file can be opened."""

    # A retry fails in the same way until somebody repairs the disk.
    code = Code.UNAVAILABLE


class HubError(TurretError):
    """The hub has no such repository, or denies access to it."""

    reason = "HUB_REPOSITORY"
    code = Code.INVALID_ARGUMENT

    @classmethod
    def of(cls, description: Text) -> HubError:
        """The error for one repository."""
        return cls(description, violations=[("path", description)])


class HubUnavailableError(TurretError):
    """The hub does not answer, or answers too slowly."""

    code = Code.UNAVAILABLE
    retry_after_seconds = 10.0


class UnauthenticatedError(TurretError):
    """No token, or an unknown one."""

    code = Code.UNAUTHENTICATED


class PermissionDeniedError(TurretError):
    """The token lacks the role."""

    code = Code.PERMISSION_DENIED


class ServiceElsewhereError(TurretError):
    """The service is at the server's other address."""

    code = Code.UNIMPLEMENTED


class UnavailableError(TurretError):
    """The server is stopping, or the engine is dead."""

    code = Code.UNAVAILABLE
    retry_after_seconds = 1.0


class ServerStartingError(UnavailableError):
    """The model is not loaded yet."""


class DeadlineExceededError(TurretError):
    """The deadline passed before the request finished."""

    code = Code.DEADLINE_EXCEEDED
