"""One call over any protocol: its id, what it used, and how it ended, as clients see it."""

from __future__ import annotations

import itertools
import logging
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from turret.server import log, tracing
from turret.server.adapters.adapter import Adapter, AdapterRef
from turret.server.api.access import Party, Shares
from turret.server.api.limits import MAX_MIX_MEMBERS, MAX_NAME_CHARS, MAX_REQUEST_ID_CHARS
from turret.server.basics.codes import Code
from turret.server.basics.names import is_private
from turret.server.basics.work import turret_error
from turret.server.errors import VIOLATION_COUNT, TurretError
from turret.server.metrics import Metrics
from turret.server.words import say
from turret.v1 import adapters_pb2, inference_pb2

# The latest calls that failed, over any protocol, for operators who watch the server.

MAX_FAILURES = 50
# The message may repeat what the client sent, so keep only as much as explains the failure.
MAX_MESSAGE_CHARS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One failed call.

    Attributes:
        method: The method, as the log shows it.
        protocol: ``grpc`` or ``http``.
        request_id: The id in the log lines of the call.
        code: Name of the code that the call ended with.
        reason: A constant for programs, such as ``ADAPTER_NOT_FOUND``.
        message: The message for the client; empty if it may contain names that only the client
            may know.
        adapters: The names of the call's adapters, if they were known and are not private.
        time: When the call ended, in Unix seconds.
    """

    method: str
    protocol: str
    request_id: str
    code: str
    reason: str
    message: str
    adapters: tuple[str, ...] = ()
    time: float = field(default_factory=time.time)


# Failed calls, the newest last. Use an instance on one event loop only.
Failures = deque[Failure]


def fault_of(error: BaseException) -> TurretError:
    """The part of an error that clients may know.

    An error that turret did not raise on purpose becomes INTERNAL, unless it reports a lack of
    memory. Its text may contain anything, so clients do not get it, and the caller must log it.
    """
    found = turret_error(error)
    return TurretError(say("INTERNAL")) if found.code is Code.INTERNAL else found


_log = logging.getLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
# The log holds no prompts. For a rejected call, it holds the reason, names of fields of turret.v1,
# and these entries of the error's metadata, which contain only names and numbers.
_LOGGED = frozenset(
    (
        *("path", "base_model", "peft_type", "repository", "role", "service"),
        *("least", "most", "found", "expected", "length", "limit", "size", "seconds"),
        *("prompt_tokens", "max_tokens", "max_model_len", "room", "rank", "max_rank", "modules"),
        *("bytes", "max_bytes", "budget_bytes", "free_bytes", "host_bytes", "elements"),
        *("max_queued_requests", "max_queued_bytes", "max_unread_bytes"),
        *("max_requests_per_token", "max_requests_per_peer"),
        *("generation", "current_generation", VIOLATION_COUNT),
    )
)
_FIELDS = frozenset(
    field.name
    for file in (inference_pb2.DESCRIPTOR, adapters_pb2.DESCRIPTOR)
    for message in file.message_types_by_name.values()
    for field in message.fields
)
_MOST_LOGGED_FIELDS = 8


# The first bytes of every message and answer are not counted, so that short ones are accepted even
# when long ones fill the memory for messages. The limits on connections and calls bound the
# uncounted bytes.
UNCOUNTED_BYTES = 64 << 10

# No caller can predict or influence this generator, unlike Python's default generator, which tests
# and libraries seed.
new_draw = random.SystemRandom().random


def is_request_id(text: str) -> bool:
    """Whether a text is 1 to 128 printable ASCII characters, which are safe in headers and logs."""
    return 0 < len(text) <= MAX_REQUEST_ID_CHARS and text.isascii() and text.isprintable()


def request_id_of(sent_ids: Iterable[str | bytes]) -> str:
    """The first usable id that the client sent, otherwise a new one."""
    usable = (sent for sent in sent_ids if isinstance(sent, str) and is_request_id(sent))
    return next(usable, None) or uuid.uuid4().hex


@dataclass(slots=True, eq=False, kw_only=True)
class Call:
    """One call: the protocol begins and finishes it, and its handler records what is counted.

    The methods are called in this order: ``begin``; ``receive`` for each part of the message;
    ``about`` once the message is read; ``rename`` and ``runs_on`` for each engine request that the
    call makes; ``send`` for an answer in one piece; ``fail`` in case of an error; ``finish``.

    Attributes:
        method: The method, as the log shows it.
        protocol: The protocol of the call: ``grpc`` or ``http``.
        request_id: The id in every line that the current task logs.
        party: The client, whose open requests are counted together.
        deadline: ``time.monotonic()`` seconds, or None.
        draw: A random number from 0 to 1 that selects a target of each alias that the call names.
        adapters: The names of the call's adapters; None until they are known.
        aliases: Each alias that the call named, and the adapter and generation that it got.
        prompt_tokens: The tokens of all prompts together; 0 until the engine has answered.
        generated_tokens: The number of tokens generated so far.
        message_bytes: Size of the request message as received; 0 for a stream of messages.
        tenant: See ``Party.tenant``.
        kept_bytes: Memory of the answers that the call collects to send them as a whole.
        trace: The call's span; None if it is not traced.
    """

    method: str
    protocol: str
    request_id: str
    party: Party
    deadline: float | None
    draw: float = field(default_factory=new_draw)
    adapters: tuple[str, ...] | None = None
    aliases: tuple[tuple[str, str, int], ...] = ()
    prompt_tokens: int = 0
    generated_tokens: int = 0
    message_bytes: int = 0
    tenant: bytes = b""
    kept_bytes: int = 0
    trace: tracing.CallTrace | None = None
    _metrics: Metrics
    _failures: Failures | None
    _is_counted: bool
    _is_private: bool
    _level: int
    _started: float = field(default_factory=time.monotonic)
    _at_end: list[Callable[[], None]] = field(default_factory=list)
    _error: tuple[str, str] | None = None
    _logged: dict[str, str | int] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        method: str,
        sent_ids: Iterable[str | bytes],
        metrics: Metrics,
        *,
        headers: tracing.Headers = lambda: (),
        protocol: str = "grpc",
        party: Party | None = None,
        deadline: float | None = None,
        failures: Failures | None = None,
        is_counted: bool = False,
        is_private: bool = False,
        level: int = logging.INFO,
    ) -> Call:
        """Begin a call in the current task.

        Args:
            method: The method.
            sent_ids: The values of ``x-request-id`` that the client sent; the first usable one
                becomes the call's id. Without one, the server generates an id.
            metrics: The metrics that count the call.
            headers: Returns the headers or metadata of the call.
            protocol: The protocol of the call.
            party: The client; None for a client without limits.
            deadline: ``time.monotonic()`` seconds, or None.
            failures: Records the call if it fails; None records nothing.
            is_counted: Whether metrics and traces record the call, as they do for calls that run
                the model.
            is_private: Whether error messages may contain the names of a client's sessions, and
                thereby those of its adapters.
            level: The level of the line that is logged when the call ends.
        """
        party = party or Party(Shares())
        call = cls(
            method=method,
            protocol=protocol,
            request_id=request_id_of(sent_ids),
            party=party,
            deadline=deadline,
            tenant=party.tenant,
            trace=tracing.begin(method, headers) if is_counted else None,
            _metrics=metrics,
            _failures=failures,
            _is_counted=is_counted,
            _is_private=is_private,
            _level=level,
        )
        log.request_id.set(call.request_id)
        return call

    @property
    def turn(self) -> bytes:
        """The party whose turns in the queue the call uses: the tenant, or else the call itself."""
        return self.tenant or self.request_id.encode()

    def receive(self, num_bytes: int) -> None:
        """Count bytes of the call's message as used memory until the call ends.

        Raises:
            QueueFullError: See ``MessageMemory.hold``.
        """
        counted = max(self.message_bytes - UNCOUNTED_BYTES, 0)
        self.message_bytes += num_bytes
        self.hold(max(self.message_bytes - UNCOUNTED_BYTES, 0) - counted)

    def send(self, num_bytes: int) -> None:
        """Count bytes of an answer, which is sent as a whole, as used memory until the call ends.

        Raises:
            QueueFullError: See ``MessageMemory.hold``.
        """
        self.hold(max(num_bytes - UNCOUNTED_BYTES, 0))

    def hold(self, num_bytes: int) -> None:
        """Count bytes as used memory until the call ends.

        Raises:
            QueueFullError: See ``MessageMemory.hold``.
        """
        if num_bytes:
            messages, tenant = self.party.shares.messages, self.tenant
            messages.hold(tenant, num_bytes)
            self.at_end(lambda: messages.release(tenant, num_bytes))

    def rename(self, request_id: str) -> None:
        """Use the id that the request message itself contains."""
        self.request_id = request_id
        log.request_id.set(request_id)

    def about(self, mix: Sequence[adapters_pb2.AdapterWeight]) -> None:
        """Record the adapters of the request, before it is validated."""
        named = mix[:MAX_MIX_MEMBERS]
        self.adapters = tuple(member.name[:MAX_NAME_CHARS] for member in named)

    def runs_on(
        self, refs: Sequence[AdapterRef], find: Callable[[AdapterRef], Adapter | None]
    ) -> None:
        """Record the adapters of a checked request, and what its aliases stand for."""
        adapters, aliases = [], []
        for ref in refs:
            found = find(ref)
            adapters.append(ref.name if found is None else found.name)
            if found is not None and found.name != ref.name:
                aliases.append((ref.name, found.name, found.generation))
        self.adapters, self.aliases = tuple(adapters), tuple(aliases)

    def fail(
        self,
        reason: str,
        message: str,
        *,
        violations: Iterable[tuple[str, str]] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Record the error that the client gets; ``finish`` logs it without its message."""
        self._error = (reason, message)
        self._logged = {"reason": reason}
        fields = dict.fromkeys(filter(None, (_known(path) for path, _ in violations)))
        if fields:
            self._logged["fields"] = ",".join([*fields][:_MOST_LOGGED_FIELDS])
        for key, value in (metadata or {}).items():
            if key in _LOGGED:
                self._logged[key] = int(value) if value.isdecimal() else value

    def at_end(self, release: Callable[[], None]) -> None:
        """Have ``finish`` call ``release``, however the call ends. ``release`` must not raise."""
        self._at_end.append(release)

    def finish(self, code: Code) -> None:
        """Count the call and log its end. Call this once, after everything else."""
        for release in self._at_end:
            release()
        self._at_end.clear()
        names = self.adapters or ()
        seconds = time.monotonic() - self._started
        if self._is_counted:
            # A call that ended before its adapters were read must not count for the base model.
            if self.adapters is not None:
                self._metrics.request_finished(names, code.name)
                for alias in self.aliases:
                    self._metrics.alias_finished(*alias, code.name)
            self._metrics.calls.labels(self.protocol, code.name).inc()
            self._metrics.duration.labels(self.method, code.name).observe(seconds)
            if self.prompt_tokens:
                self._metrics.tokens(
                    names, prompt=self.prompt_tokens, generated=self.generated_tokens
                )
        if self._failures is not None and self._error is not None:
            reason, message = self._error
            is_hidden = self._is_private or any(map(is_private, names))
            self._failures.append(
                Failure(
                    method=self.method,
                    protocol=self.protocol,
                    request_id=self.request_id,
                    code=code.name,
                    reason=reason,
                    message="" if is_hidden else message[:MAX_MESSAGE_CHARS],
                    adapters=() if is_hidden else names,
                )
            )
        # An unregistered name may be any text from the client.
        shown = [name if self._metrics.is_registered(name) else "?" for name in names]
        if self.trace is not None:
            self.trace.end(
                code,
                reason=None if self._error is None else self._error[0],
                names=shown,
                request_id=self.request_id,
                prompt_tokens=self.prompt_tokens,
                generated_tokens=self.generated_tokens,
            )
        logged = {
            "method": self.method,
            "code": code.name,
            "seconds": round(seconds, 3),
            "adapters": ",".join(shown),
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
        }
        _log.log(self._level, "call finished", extra=log.fields(**{**logged, **self._logged}))


def _known(path: str) -> str:
    """The beginning of a field's path that consists of names of turret.v1, without indices."""
    names = [part.partition("[")[0] for part in path.split(".")]
    return ".".join(itertools.takewhile(_FIELDS.__contains__, names))
