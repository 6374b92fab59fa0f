"""Every error that turret raises on purpose, as one tree.

    TurretError
    ├── InvalidRequestError          a field violates its documented limits
    │   ├── PromptTooLongError       prompt and max_tokens exceed the context
    │   ├── AdapterClassifiesError   an adapter with a classification head was asked for text
    │   └── HeadMissingError         labels were asked for, and no adapter has a head
    ├── AdapterError
    │   ├── AdapterNotFoundError     the name (or generation) is not registered
    │   ├── AdapterExistsError       the name is taken by other weights
    │   ├── AdapterCheckpointError   the checkpoint is unreadable, inconsistent or unsupported
    │   │   └── AdapterChangedError  the files of a registered adapter have changed
    │   ├── AdapterMismatchError     the adapter was trained for another base model
    │   ├── AdapterComponentError    a component of the adapter is not registered
    │   ├── AdapterInUseError        the adapter is part of a fusion, or is being changed
    │   │   ├── AdapterPinnedError   the adapter is pinned
    │   │   ├── AdapterBusyError     requests still used it when the wait ended
    │   │   └── AdapterMergedError   the adapter is merged into the base
    │   ├── AdapterGenerationError   the name has another generation than expected
    │   ├── AdapterUnloadedError     the adapter was force-unloaded during a request or fusion
    │   ├── StateDirRequiredError    uploads and fused adapters need --state-dir
    │   ├── MergeActiveError         a merge is active
    │   ├── MergeUnderWayError       another merge or unmerge is under way
    │   └── NotMergedError           no merge is active
    ├── TrainingNotFoundError        no such model in training, sampler, session or checkpoint
    ├── ResourceError
    │   ├── QueueFullError           too many requests wait, or too many uploads or fusions run
    │   ├── BudgetExceededError      a budget of ranks, bytes or blocks is exceeded
    │   ├── OutOfMemoryError         the process could not get memory or a thread for the call
    │   └── StorageFullError         no room on the disk of --state-dir
    ├── StorageFailedError           the disk is read-only or broken, or no file can be opened
    ├── HubError                     the hub has no such repository, or denies access to it
    ├── HubUnavailableError          the hub does not answer, or answers too slowly
    ├── UnauthenticatedError         no token, or an unknown one
    ├── PermissionDeniedError        the token lacks the role
    ├── ServiceElsewhereError        the service is at the server's other address
    ├── UnavailableError             the server is stopping, or the engine is dead
    │   └── ServerStartingError      the model is not loaded yet
    └── DeadlineExceededError        the deadline passed before the request finished

``reason`` is an AIP-193 identifier. Unless it is given, ``metadata`` has the parameters of the
message, except those that are sentences themselves. ``code`` is the code with which the call ends;
each protocol translates it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from turret.server.basics.codes import Code
from turret.server.words import Text, printable

# Metadata key: the number of invalid fields, if the answer has no room for all of them.
VIOLATION_COUNT = "violation_count"


class TurretError(Exception):
    """Base of the tree; carries a machine-readable reason, metadata and field violations.

    ``retry_after_seconds`` tells clients when to try again; it is None if the call would fail again
    in the same way. An error may have another value than its class.
    """

    reason = "INTERNAL"
    code = Code.INTERNAL
    retry_after_seconds: float | None = None

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
    reason = "INVALID_REQUEST"
    code = Code.INVALID_ARGUMENT

    @classmethod
    def of(cls, field: str, description: str) -> Self:
        """The error for one field; the message is readable on its own."""
        return cls.of_all([(field, description)])

    @classmethod
    def of_all(cls, violations: Sequence[tuple[str, str]]) -> Self:
        """The error for several fields; only a single one has parameters as metadata."""
        message = "; ".join(
            f"{printable(field)}: {description}" for field, description in violations
        )
        metadata = _metadata_of(violations[0][1]) if len(violations) == 1 else None
        return cls(message, metadata=metadata, violations=violations)


class PromptTooLongError(InvalidRequestError):
    reason = "PROMPT_TOO_LONG"


class AdapterClassifiesError(InvalidRequestError):
    reason = "ADAPTER_CLASSIFIES"


class HeadMissingError(InvalidRequestError):
    reason = "HEAD_MISSING"


class AdapterError(TurretError):
    reason = "ADAPTER_ERROR"
    code = Code.FAILED_PRECONDITION


class AdapterNotFoundError(AdapterError):
    reason = "ADAPTER_NOT_FOUND"
    code = Code.NOT_FOUND


class AdapterExistsError(AdapterError):
    reason = "ADAPTER_EXISTS"
    code = Code.ALREADY_EXISTS


class AdapterCheckpointError(AdapterError):
    """A checkpoint that cannot be served exactly.

    Lists every offending key in ``violations``.
    """

    reason = "ADAPTER_CHECKPOINT"
    code = Code.INVALID_ARGUMENT


class AdapterChangedError(AdapterCheckpointError):
    reason = "ADAPTER_CHANGED"
    # The call is fine, but the server's files have changed.
    code = Code.FAILED_PRECONDITION


class AdapterMismatchError(AdapterError):
    reason = "ADAPTER_BASE_MISMATCH"


class AdapterComponentError(AdapterError):
    reason = "ADAPTER_COMPONENT"


class AdapterInUseError(AdapterError):
    reason = "ADAPTER_IN_USE"


class AdapterPinnedError(AdapterInUseError):
    reason = "ADAPTER_PINNED"


class AdapterBusyError(AdapterInUseError):
    reason = "ADAPTER_BUSY"


class AdapterMergedError(AdapterInUseError):
    reason = "ADAPTER_MERGED"


class AdapterGenerationError(AdapterError):
    """The name has a different generation from the one that the caller expected."""

    reason = "ADAPTER_GENERATION"


class AdapterUnloadedError(AdapterError):
    reason = "ADAPTER_UNLOADED"
    code = Code.ABORTED


class StateDirRequiredError(AdapterError):
    reason = "STATE_DIR_REQUIRED"


class MergeActiveError(AdapterError):
    reason = "MERGE_ACTIVE"


class MergeUnderWayError(AdapterError):
    reason = "MERGE_UNDER_WAY"


class NotMergedError(AdapterError):
    reason = "NOT_MERGED"


class TrainingNotFoundError(TurretError):
    """A model, sampler, session or checkpoint that is not there, or belongs to another client."""

    reason = "TRAINING_NOT_FOUND"
    code = Code.NOT_FOUND


class ResourceError(TurretError):
    reason = "RESOURCE_EXHAUSTED"
    code = Code.RESOURCE_EXHAUSTED
    retry_after_seconds = 1.0


class QueueFullError(ResourceError):
    reason = "QUEUE_FULL"


class BudgetExceededError(ResourceError):
    reason = "BUDGET_EXCEEDED"
    retry_after_seconds = None


class OutOfMemoryError(ResourceError):
    reason = "OUT_OF_MEMORY"


class StorageFullError(ResourceError):
    reason = "STORAGE_FULL"
    retry_after_seconds = None


class StorageFailedError(TurretError):
    """The server's disk cannot be used: it is read-only or broken, or no descriptor is left."""

    reason = "STORAGE_FAILED"
    # A retry fails in the same way until an operator acts.
    code = Code.UNAVAILABLE


class HubError(TurretError):
    """A repository or revision that the hub does not have, or does not show to this machine."""

    reason = "HUB_REPOSITORY"
    code = Code.INVALID_ARGUMENT

    @classmethod
    def of(cls, description: Text) -> HubError:
        """The error for one repository."""
        return cls(description, violations=[("path", description)])


class HubUnavailableError(TurretError):
    """The hub failed during a download; a retry may help."""

    reason = "HUB_UNAVAILABLE"
    code = Code.UNAVAILABLE
    retry_after_seconds = 10.0


class UnauthenticatedError(TurretError):
    reason = "UNAUTHENTICATED"
    code = Code.UNAUTHENTICATED


class PermissionDeniedError(TurretError):
    reason = "PERMISSION_DENIED"
    code = Code.PERMISSION_DENIED


class ServiceElsewhereError(TurretError):
    reason = "SERVICE_ELSEWHERE"
    code = Code.UNIMPLEMENTED


class UnavailableError(TurretError):
    reason = "UNAVAILABLE"
    code = Code.UNAVAILABLE
    retry_after_seconds = 1.0


class ServerStartingError(UnavailableError):
    reason = "SERVER_STARTING"


class DeadlineExceededError(TurretError):
    reason = "DEADLINE_EXCEEDED"
    code = Code.DEADLINE_EXCEEDED
