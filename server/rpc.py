"""The gRPC server: its services and listeners, and the common handling of all calls.

Listeners are the data plane and an optional admin plane, with TLS, health and reflection.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import inspect
import logging
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
)
from datetime import timedelta
from typing import Any
from weakref import WeakValueDictionary

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from turret.server import log
from turret.server.api.access import (
    ADAPTERS,
    INFERENCE,
    SERVICE_ROLES,
    TRAINING,
    Party,
    WatchedFiles,
    authorize,
    peer_address,
)
from turret.server.api.admin import Adapters
from turret.server.api.call import REQUEST_ID_KEY, Call, fault_of
from turret.server.api.inference import Inference
from turret.server.api.limits import MAX_MESSAGE_BYTES
from turret.server.api.services import Services
from turret.server.api.training import Training
from turret.server.basics.codes import Code
from turret.server.basics.files import read_regular
from turret.server.basics.turns import Limit, Places
from turret.server.config import ListenConfig, SecurityConfig
from turret.server.errors import (
    VIOLATION_COUNT,
    DeadlineExceededError,
    InvalidRequestError,
    ServiceElsewhereError,
    TurretError,
)
from turret.server.words import Text, say
from turret.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    training_pb2_grpc,
)

# Limits on concurrent gRPC calls.

# Limit for all clients together.
MOST_CALLS = 1 << 14
# Limit for one connection, which gRPC enforces (``_OPTIONS``). Clients learn this limit, and wait
# when they reach it. A call that then arrives before the server has ended an earlier one still
# fails with UNAVAILABLE, so the limit is high enough for a program that sends all of its prompts at
# once.
MOST_CALLS_PER_CONNECTION = 4096
# Limit for one token, so that its calls do not keep others out.
MOST_CALLS_PER_TOKEN = MOST_CALLS * 3 // 4
# Limit for services that require no token: health (a watch never ends) and reflection.
MOST_OPEN_CALLS = 4096
# Limit for messages of one service that are being received at the same time. gRPC buffers a message
# until it is complete, up to 4 MiB, and does not report how much it holds.
MOST_ARRIVING = 64
# The same for a service that requires no token, whose messages are short.
MOST_ARRIVING_OPEN = 16


class Arrivals:
    """Limits how many messages are received at the same time.

    One token, or one address without a token, may take three quarters of the places. Its further
    messages wait for one another, and the messages of other clients do not wait for them.

    Args:
        most: The number of places.
    """

    def __init__(self, most: int) -> None:
        self._all = asyncio.Semaphore(most)
        self._most_of_one = most - most // 4
        self._of_one: WeakValueDictionary[Hashable, asyncio.Semaphore] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def place(self, party: Party) -> AsyncIterator[None]:
        """Wait for a place for a message of a party, and hold it while the block runs."""
        client = party.tenant or peer_address(party.peer)
        own = self._of_one.get(client)
        if own is None:
            own = self._of_one[client] = asyncio.Semaphore(self._most_of_one)
        async with own, self._all:
            yield


# Request messages on their way from gRPC to a handler.

# Time limit for a message. A slower client has probably gone, and would hold a place that others
# wait for.
MESSAGE_SECONDS = 60.0


@dataclasses.dataclass(slots=True)
class Received:
    """A message that gRPC keeps until the call ends.

    ``parsed`` is None if the message is not valid protobuf (such as a string that is not UTF-8).
    """

    parsed: Message | bytes | None
    num_bytes: int

    def take(self) -> Message | bytes:
        """Return the message, once, so that the caller decides how long it is kept.

        Raises:
            InvalidRequestError: The message is malformed.
        """
        parsed, self.parsed = self.parsed, None
        if parsed is None:
            raise InvalidRequestError(say("MESSAGE_MALFORMED"))
        return parsed


def tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Received]:
    """A deserialiser that accepts invalid bytes, so that the handler can report them.

    If the deserialiser raised an error, gRPC would report a bug of the server.
    """

    def parse(data: bytes) -> Received:
        try:
            return Received(data if deserialize is None else deserialize(data), len(data))
        except DecodeError:
            return Received(None, len(data))

    return parse


async def one_message(
    requests: AsyncIterator[Received], party: Party, arrivals: Arrivals
) -> Received:
    """The request of a call with a single request message.

    Args:
        requests: gRPC's stream of the call's messages.
        party: The client.
        arrivals: The places in which messages arrive.

    Raises:
        InvalidRequestError: There is no message.
        DeadlineExceededError: The message did not arrive within ``MESSAGE_SECONDS``.
    """
    received = await _next(requests, arrivals.place(party))
    if received is None:
        raise InvalidRequestError(say("MESSAGE_MISSING"))
    return received


async def open_messages(
    requests: AsyncIterator[Received], party: Party, arrivals: Arrivals
) -> AsyncIterator[Any]:
    """The messages of a call that needs no token; arguments as for ``one_message``.

    Raises:
        InvalidRequestError: A message is malformed.
        DeadlineExceededError: A message did not arrive within ``MESSAGE_SECONDS``.
    """
    while each := await _next(requests, arrivals.place(party)):
        yield each.take()


async def all_messages(requests: AsyncIterator[Received]) -> AsyncIterator[Any]:
    """The messages of a call, one after the other.

    The reader limits their number and time.

    Raises:
        InvalidRequestError: A message is malformed.
    """
    async for each in requests:
        yield each.take()


async def _next(
    requests: AsyncIterator[Received], place: contextlib.AbstractAsyncContextManager[None]
) -> Received | None:
    try:
        async with asyncio.timeout(MESSAGE_SECONDS), place:
            return await anext(requests, None)
    except TimeoutError:
        raise DeadlineExceededError(say("NO_MESSAGE_IN_TIME", seconds=MESSAGE_SECONDS)) from None


# An error as a rich gRPC status.

ERROR_DOMAIN = "turret"
DETAILS_KEY = "grpc-status-details-bin"

# Clients refuse response headers over 8 KiB. The message is sent twice (percent-encoded on its own,
# and in the details, which base64 makes a third larger), so both are cut well below that.
MAX_TEXT_BYTES = 800
MAX_VIOLATION_BYTES = 3000
MAX_METADATA_BYTES = 600


def _shortened(text: str, limit: int) -> str:
    """``text`` as valid UTF-8 of at most about ``limit`` bytes on the wire.

    gRPC percent-encodes everything but printable ASCII, which triples it.
    """
    text = text.encode("utf-8", "replace").decode()
    cost = 0
    for index, character in enumerate(text):
        cost += 1 if " " <= character <= "~" else 3 * len(character.encode())
        if cost > limit:
            return text[:index] + "..."
    return text


def _bad_request(
    violations: tuple[tuple[str, str], ...], count: int
) -> error_details_pb2.BadRequest:
    """As many of the ``count`` invalid fields as the headers of an answer have room for."""
    detail = error_details_pb2.BadRequest()
    used = 0
    for index, (field, description) in enumerate(violations):
        reason = description.reason if isinstance(description, Text) else ""
        field, description = _shortened(field, 200), _shortened(description, 400)
        used += len(field.encode()) + len(description.encode()) + len(reason) + 8
        if used > MAX_VIOLATION_BYTES:
            detail.field_violations.add(field="*", description=say("MORE", count=count - index))
            break
        detail.field_violations.add(field=field, description=description, reason=reason)
    return detail


def to_rich_status(fault: TurretError) -> status_pb2.Status:
    """The ``google.rpc.Status`` of an error, cut to what fits into the headers of an answer."""
    status = status_pb2.Status(
        code=fault.code.value, message=_shortened(fault.message, MAX_TEXT_BYTES)
    )
    info = error_details_pb2.ErrorInfo(reason=fault.reason, domain=ERROR_DOMAIN)
    room = MAX_METADATA_BYTES
    for key, value in fault.metadata.items():
        shown = _shortened(str(value), 200)
        room -= len(key) + len(shown.encode())
        if room < 0:
            break
        info.metadata[key] = shown
    status.details.add().Pack(info)
    if fault.violations:
        count = int(fault.metadata.get(VIOLATION_COUNT, len(fault.violations)))
        status.details.add().Pack(_bad_request(fault.violations, count))
    if fault.retry_after_seconds is not None:
        wait = timedelta(seconds=fault.retry_after_seconds)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=wait))
    return status


# The interceptor itself.

_log = logging.getLogger(__name__)

# The calls that turret_requests_total counts: those that name adapters.
COUNTED = frozenset(
    f"/turret.v1.Inference/{name}"
    for name in ("Generate", "GenerateStream", "Score", "Embed", "EmbedStream", "Classify")
)
# Calls with many inputs. Their handlers count each input against the limits of the calling party.
MANY = frozenset(f"/turret.v1.Inference/{name}" for name in ("Embed", "EmbedStream", "Classify"))

# The methods of the services that every server offers on one of its addresses or the other.
_METHODS = frozenset(
    f"/{service.full_name}/{method.name}"
    for file in (inference_pb2.DESCRIPTOR, adapters_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
)

# A client whose deadline passes resets the call. By this machine's clock, that can be slightly
# before the deadline, so a cancellation this close to it counts as a passed deadline.
DEADLINE_SLACK_SECONDS = 0.1

# gRPC allows timeouts of up to 11,000 years, but no request runs for longer than 30 days.
_MAX_DEADLINE_SECONDS = 30 * 86400.0

_current: contextvars.ContextVar[Call] = contextvars.ContextVar("call")


def current_call() -> Call:
    """The call that the current task answers. gRPC has no other way to pass it to a servicer."""
    return _current.get()


def _deadline(context: Any) -> float | None:
    """The deadline on the ``time.monotonic()`` clock; None if there is none or it is far off."""
    remaining = context.time_remaining()
    if remaining is None or remaining > _MAX_DEADLINE_SECONDS:
        return None
    return time.monotonic() + remaining


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Checks every call, unary or streaming, and wraps its handler in ``run``.

    Args:
        services: The services that answer.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._open_calls = Places()
        # Calls whose message is still being received for another server's handler (``receiving``).
        self._receiving_calls = Places()
        # Places by service: slow messages to one service must not delay another service.
        self._arrivals: dict[str, Arrivals] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None and method not in _METHODS:
            return None
        try:
            metadata = handler_call_details.invocation_metadata or ()
            authorize(self._services.tokens, _service_of(method), authorization_of(metadata))
            if handler is None:
                raise _elsewhere(_service_of(method))
        except TurretError as error:
            return self._refusal(method, error)
        return self._answer(method, handler)

    def _answer(self, method: str, handler: Any) -> Any:
        """A handler that runs the servicer's method within ``run``.

        Handlers for single messages are turned into handlers for streams of messages, which look
        the same on the wire. Such a handler starts before the request has arrived, so the call is
        counted and the wait for the request is limited. It ends after the client has received the
        answer, except for the part in the transport's buffers, so the memory of the answer is
        counted until then.
        """
        behaviour = _behaviour(handler)
        service = _service_of(method)
        arrivals = self._arrivals_of(service)

        async def requested(requests: Any) -> Any:
            call = current_call()
            if not handler.request_streaming:
                received = await one_message(requests, call.party, arrivals)
                # Take the message first: gRPC may keep ``received`` beyond a rejected call.
                message = received.take()
                call.receive(received.num_bytes)
                return message
            if service not in SERVICE_ROLES:
                return open_messages(requests, call.party, arrivals)
            return all_messages(requests)

        async def once(requests: Any, context: Any) -> None:
            await context.write(await behaviour(await requested(requests), context))

        # Write the messages instead of yielding them. A cancelled call then raises inside the
        # handler, which frees its memory at once instead of when its generator is collected.
        async def stream(requests: Any, context: Any) -> None:
            responses = behaviour(await requested(requests), context)
            async with contextlib.aclosing(responses):
                async for response in responses:
                    await context.write(response)

        body = stream if handler.response_streaming else once

        async def answer(requests: Any, context: Any) -> None:
            await self.run(method, context, lambda: body(requests, context))

        return _streaming(answer, handler)

    def receiving(self, method: str, handler: Any, context_of: Callable[[Any], Any]) -> Any:
        """A handler that checks a call and receives its message before ``handler`` runs.

        ``fleet/serving/calls.py`` uses it on Ray Serve's handlers, because Serve would otherwise
        read messages before it checks the calls. ``handler`` calls ``run`` itself.

        Args:
            method: The method, as ``/package.Service/Method``.
            handler: The handler that answers. A handler for streams is returned unchanged.
            context_of: Makes the context for ``run`` from gRPC's own.
        """
        if handler.request_streaming:
            return handler
        behaviour, service = _behaviour(handler), _service_of(method)
        arrivals = self._arrivals_of(service)

        async def received(requests: Any, context: Any) -> Any:
            authorization = authorization_of(context.invocation_metadata() or ())
            authorize(self._services.tokens, service, authorization)
            party = Party(self._services.shares, authorization, context.peer())
            with self._receiving_calls.hold(*_limits(method, party.tenant)):
                return (await one_message(requests, party, arrivals)).take()

        async def answer(requests: Any, context: Any) -> None:
            try:
                message = await received(requests, context_of(context))
            except TurretError as error:
                await self._refuse(method, context_of(context), error.with_traceback(None))
                return
            answers = behaviour(message, context)
            # Drop this reference, so that ``handler`` decides how long the message is kept.
            del message
            if handler.response_streaming:
                async with contextlib.aclosing(answers):
                    async for each in answers:
                        await context.write(each)
                return
            whole = await answers
            if (context.code() or grpc.StatusCode.OK) is grpc.StatusCode.OK:
                await context.write(whole)

        return _streaming(answer, handler)

    def _arrivals_of(self, service: str) -> Arrivals:
        arrivals = self._arrivals.get(service)
        if arrivals is None:
            most = MOST_ARRIVING if service in SERVICE_ROLES else MOST_ARRIVING_OPEN
            arrivals = self._arrivals[service] = Arrivals(most)
        return arrivals

    def _refusal(self, method: str, error: TurretError) -> Any:
        """A handler that answers with an error, without reading what the client sends."""

        async def answer(requests: Any, context: Any) -> None:
            await self._refuse(method, context, error)

        return grpc.stream_stream_rpc_method_handler(answer)

    async def _refuse(self, method: str, context: Any, error: TurretError) -> None:
        async def refuse() -> None:
            raise error

        await self.run(method, context, refuse)

    async def run(self, method: str, context: Any, body: Callable[[], Awaitable[Any]]) -> Any:
        """Run a handler's body, and turn its exception into the call's status.

        The status is set instead of raised: ``context.abort`` stores its exception in the context,
        and the frames of the exception refer to the context and the request. This cycle would keep
        the request's memory until the next full garbage collection.
        """
        metadata = context.invocation_metadata() or ()
        sent_ids = (v for k, v in metadata if k == REQUEST_ID_KEY)
        call = Call.begin(
            method,
            sent_ids,
            self._services.metrics,
            headers=lambda: metadata,
            party=Party(self._services.shares, authorization_of(metadata), context.peer()),
            deadline=_deadline(context),
            failures=self._services.failures,
            is_counted=method in COUNTED,
            is_private=_service_of(method) == TRAINING,
            level=logging.INFO if _service_of(method) in SERVICE_ROLES else logging.DEBUG,
        )
        _current.set(call)
        code = Code.INTERNAL
        try:
            held = call.party.hold() if method in COUNTED - MANY else contextlib.nullcontext()
            with self._open_calls.hold(*_limits(method, call.tenant)), held:
                response = await body()
            context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
            # The health service sets a status itself.
            code = Code[(context.code() or grpc.StatusCode.OK).name]
            return response
        except (asyncio.CancelledError, grpc.aio.InternalError) as error:
            # gRPC raises InternalError if the call ends while a message is written, but also for
            # other reasons, which only its text distinguishes.
            if isinstance(error, grpc.aio.InternalError):
                _log.info("call ended by gRPC", extra=log.fields(method=method, problem=error))
            remaining = context.time_remaining()
            is_late = remaining is not None and remaining <= DEADLINE_SLACK_SECONDS
            code = Code.DEADLINE_EXCEEDED if is_late else Code.CANCELLED
            raise asyncio.CancelledError from None
        except grpc.aio.AbortError:
            # The handler has set a status itself (health and reflection do).
            code = Code[(context.code() or grpc.StatusCode.UNKNOWN).name]
            raise
        except Exception as error:
            fault = fault_of(error)
            code = fault.code
            call.fail(
                fault.reason,
                fault.message,
                violations=fault.violations,
                metadata=fault.metadata,
            )
            if code is Code.INTERNAL:
                _log.exception("internal error", extra=log.fields(method=method))
            status = to_rich_status(fault)
            context.set_code(grpc.StatusCode[code.name])
            context.set_details(status.message)
            context.set_trailing_metadata(
                (
                    (REQUEST_ID_KEY, call.request_id),
                    (DETAILS_KEY, status.SerializeToString()),
                )
            )
            # ``body`` may refer to the error, whose frames refer to ``body``. Break this cycle,
            # which would keep the request in memory.
            error.with_traceback(None)
            return None
        finally:
            call.finish(code)


def _limits(method: str, tenant: bytes) -> Iterator[Limit]:
    """The limits on concurrent calls.

    Services that require no token have a separate limit, so their calls do not keep others out.
    """
    is_open = _service_of(method) not in SERVICE_ROLES
    yield Limit(is_open, MOST_OPEN_CALLS if is_open else MOST_CALLS, "TOO_MANY_CALLS")
    if tenant:
        yield Limit(tenant, MOST_CALLS_PER_TOKEN, "TOO_MANY_CALLS_OF_TOKEN")


def authorization_of(metadata: Iterable[tuple[str, str | bytes]]) -> str | bytes | None:
    """The value of the call's ``authorization`` header; None if it has none or several."""
    found = [value for key, value in metadata if key == "authorization"]
    # If there are several headers, a proxy in front may have checked a different one.
    return found[0] if len(found) == 1 else None


def _elsewhere(service: str) -> ServiceElsewhereError:
    """The error for a service that only another listener of this server offers.

    The error does not contain the address, which may be in a network that the caller cannot reach.
    """
    is_admin = service.endswith(".Adapters")
    flag = "--admin-address" if is_admin else "--address"
    return ServiceElsewhereError(say("SERVICE_ELSEWHERE", service=service, flag=flag))


def _service_of(method: str) -> str:
    """``package.Service`` of ``/package.Service/Method``; empty for any other path."""
    return method.split("/")[1] if method.count("/") == 2 else ""


def _streaming(answer: Callable[[Any, Any], Awaitable[None]], handler: Any) -> Any:
    """A handler for streams of messages that replaces ``handler``."""
    return grpc.stream_stream_rpc_method_handler(
        answer,
        request_deserializer=tolerant(handler.request_deserializer),
        response_serializer=handler.response_serializer,
    )


def _behaviour(handler: Any) -> Callable[..., Any]:
    """The servicer's method that a handler calls."""
    if handler.request_streaming:
        return handler.stream_stream if handler.response_streaming else handler.stream_unary
    return handler.unary_stream if handler.response_streaming else handler.unary_unary


# The server, with its options and credentials.

# Do not limit responses, because clients choose how much they ask for and have their own limits.
_UNLIMITED = -1

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _UNLIMITED),
    # If this were enabled, a second server on the same port would silently take half of the calls.
    ("grpc.so_reuseport", 0),
    # Calls that the event loop has not accepted yet. By default, gRPC cancels some of them if there
    # are 1,000 or more. --max-queued-requests limits waiting requests instead, and rejected
    # requests get an answer.
    ("grpc.server.max_pending_requests", MOST_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", MOST_CALLS),
    # Calls that a client resets at once also count until this process has ended them, and calls of
    # other connections wait behind them.
    ("grpc.max_concurrent_streams", MOST_CALLS_PER_CONNECTION),
    # Calls may send 64 KiB before the server reads their message (see ``Arrivals``). By default
    # gRPC raises this to megabytes on fast connections.
    ("grpc.http2.bdp_probe", 0),
    # Close connections after this long without a call; clients reconnect by themselves.
    ("grpc.max_connection_idle_ms", 300_000),
    # Time limit for the TLS handshake and the first bytes of HTTP/2.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
    # Detect within a minute and a half that a client has vanished.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Clients may ping idle connections every 10 s, as load balancers often require. turret's own
    # clients ping during calls. Pings may arrive a little closer together than they were sent.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


def _add_reflection(names: tuple[str, ...], server: grpc.aio.Server) -> None:
    """Offer reflection as v1alpha, and as v1, which has the same messages under another name."""
    reflection.enable_server_reflection(names, server)
    servicer: Any = reflection.aio.ReflectionServicer(names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = {"ServerReflectionInfo": handler}
    v1 = grpc.method_handlers_generic_handler("grpc.reflection.v1.ServerReflection", handlers)
    server.add_generic_rpc_handlers((v1,))


def _certificates(security: SecurityConfig) -> Any:
    assert security.tls_cert is not None
    assert security.tls_key is not None
    authorities = security.tls_client_ca
    return grpc.ssl_server_certificate_configuration(
        [(read_regular(security.tls_key), read_regular(security.tls_cert))],
        root_certificates=read_regular(authorities) if authorities else None,
    )


def read_credentials(security: SecurityConfig) -> grpc.ServerCredentials | None:
    """The TLS credentials that the flags describe; None if they do not enable TLS.

    With ``--tls-client-ca``, clients need a certificate too. After a file has changed, the next
    connection reads all of them again.

    Raises:
        OSError: A file cannot be read.
    """
    if security.tls_cert is None or security.tls_key is None:
        return None
    authorities = security.tls_client_ca
    paths = [p for p in (security.tls_cert, security.tls_key, authorities) if p is not None]
    files = WatchedFiles(paths, lambda: _certificates(security), "certificates")

    def fetch() -> Any:
        """The certificates for the next connection; None if they have not changed."""
        return files.newest if files.look() else None

    return grpc.dynamic_ssl_server_credentials(
        files.newest, fetch, require_client_authentication=authorities is not None
    )


class RpcServer:
    """The gRPC server. Until the model is loaded, it answers that the server is starting.

    Create and use it inside the running event loop.

    Args:
        listen: Addresses. Without an admin address, the Adapters service uses the main one.
        security: TLS files; the caller reads the token file.
        services: The services that answer.
    """

    def __init__(self, listen: ListenConfig, security: SecurityConfig, services: Services) -> None:
        most = services.most_connections
        self._options = (*_OPTIONS, ("grpc.max_allowed_incoming_connections", most))
        # Without --training, the server has no Training service.
        self._tenants = services.tenants
        own = () if self._tenants is None else (TRAINING,)
        self._main = (INFERENCE, *own)
        self.health = HealthServicer((*self._main, ADAPTERS))
        self._listen = listen
        self._security = security
        self._interceptor = CallInterceptor(services)
        self._inference: Any = Servicer(services.inference)
        self._adapters: Any = Servicer(services.adapters)
        self._training: Any = None if self._tenants is None else Servicer(Training(self._tenants))
        self._listeners: list[tuple[grpc.aio.Server, str]] = []

    @property
    def address(self) -> str:
        """The address of the Inference service, with the actual port."""
        return self._listeners[0][1]

    @property
    def admin_address(self) -> str:
        """The address of the Adapters service."""
        return self._listeners[-1][1]

    async def start(self) -> None:
        """Bind and listen.

        Raises:
            OSError: An address cannot be bound, or the TLS files do not match each other.
        """
        if self._tenants is not None:
            self._tenants.start()
        if self._listen.admin_address is None:
            await self._serve(self._listen.address, (*self._main, ADAPTERS))
            return
        await self._serve(self._listen.address, self._main)
        try:
            await self._serve(self._listen.admin_address, (ADAPTERS,))
        except OSError:
            await self.stop(0)
            raise

    async def _serve(self, address: str, services: tuple[str, ...]) -> None:
        server = grpc.aio.server(interceptors=[self._interceptor], options=self._options)
        if INFERENCE in services:
            inference_pb2_grpc.add_InferenceServicer_to_server(self._inference, server)
        if ADAPTERS in services:
            adapters_pb2_grpc.add_AdaptersServicer_to_server(self._adapters, server)
        if TRAINING in services:
            training_pb2_grpc.add_TrainingServicer_to_server(self._training, server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        _add_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        # Read the files for each listener, because a credentials object works for only one.
        credentials = read_credentials(self._security)
        try:
            if credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            await server.stop(None)
            raise OSError(say("ADDRESS_UNUSABLE", value=address, why=str(error))) from None
        is_unix = address.startswith("unix:")
        bound = address if is_unix else f"{address.rpartition(':')[0]}:{port}"
        await server.start()
        self._listeners.append((server, bound))
        _log.info("listening", extra=log.fields(address=bound, services=",".join(services)))

    async def stop(self, grace_seconds: float) -> None:
        """Accept no further calls, and cancel those that still run after the grace period."""
        self.health.close()
        await asyncio.gather(*(server.stop(grace_seconds) for server, _ in self._listeners))
        if self._tenants is not None:
            await self._tenants.stop()


# The services of turret.v1.

_Method = Callable[[Any, Any, Call], Any]
_ADAPTERS: dict[str, _Method] = {
    "LoadAdapter": Adapters.load,
    "UploadAdapter": Adapters.upload,
    "ReplaceAdapter": Adapters.replace,
    "RollbackAdapter": Adapters.rollback,
    "SetAlias": Adapters.set_alias,
    "DeleteAlias": Adapters.delete_alias,
    "ListAliases": lambda api, _, call: adapters_pb2.ListAliasesResponse(aliases=api.aliases()),
    "GetAdapter": Adapters.get,
    "ListAdapters": Adapters.list_page,
    "UnloadAdapter": Adapters.unload,
    "PinAdapter": Adapters.pin,
    "UnpinAdapter": Adapters.unpin,
    "ExportAdapter": Adapters.export,
    "FuseAdapters": Adapters.fuse,
    "MergeAdapters": Adapters.merge,
    "UnmergeAdapters": lambda api, _, call: api.unmerge(call),
    "GetMergeState": lambda api, _, call: api.merge_state(),
}
_TRAINING: dict[str, _Method] = {
    "CreateModel": Training.create_model,
    "ListModels": lambda api, _, call: api.list_models(call),
    "DeleteModel": Training.delete_model,
    "ForwardBackward": Training.forward_backward,
    "OptimStep": Training.optim_step,
    "SaveCheckpoint": Training.save_checkpoint,
    "LoadCheckpoint": Training.load_checkpoint,
    "ListCheckpoints": lambda api, _, call: api.list_checkpoints(call),
    "ExportCheckpoint": Training.export_checkpoint,
    "DeleteCheckpoint": Training.delete_checkpoint,
    "PublishModel": Training.publish_model,
}
_INFERENCE: dict[str, _Method] = {
    "Generate": Inference.generate_whole,
    "GenerateStream": Inference.generate,
    "Score": Inference.score,
    "Embed": Inference.embed,
    "EmbedStream": Inference.embed_stream,
    "Classify": Inference.classify,
    "Tokenize": Inference.tokenize,
    "GetModel": lambda api, _, call: api.model(),
}
# The methods of ``server/api`` by the names of the services and their RPCs.
METHODS: Mapping[str, Mapping[str, _Method]] = {
    "Adapters": _ADAPTERS,
    "Inference": _INFERENCE,
    "Training": _TRAINING,
}


class Servicer:
    """A gRPC servicer that passes every call to a service of ``server/api``.

    Args:
        api: The service.
    """

    def __init__(self, api: Adapters | Inference | Training) -> None:
        for name, method in METHODS[type(api).__name__].items():
            setattr(self, name, _handler(api, method))


def _handler(api: Adapters | Inference | Training, method: _Method) -> Callable[[Any, Any], Any]:
    if inspect.isasyncgenfunction(method):
        return lambda request, _: method(api, request, current_call())

    async def answer(request: Any, _: Any) -> Any:
        answer = method(api, request, current_call())
        # Drop our reference so that the message is freed once it is converted.
        del request
        return await answer if inspect.isawaitable(answer) else answer

    return answer


# The health service, ``grpc.health.v1``.
#
# grpcio's own asyncio servicer drops all watchers of a service when one of them leaves, and keeps
# watchers open while the server stops. This servicer does neither.


SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Reports the same status for all services, because all of them depend on the engine.

    Args:
        services: Full service names. The empty name, which stands for the whole server, is always
            included.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = {"", *services}
        self._status = NOT_SERVING
        self._is_closed = False
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        """Set the status for later checks, and notify all watchers."""
        self._status = SERVING if serving else NOT_SERVING
        # Every change has its own event, so even a slow watcher always sees the latest status.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def close(self) -> None:
        """Set NOT_SERVING permanently. Watchers are notified, and their calls end."""
        self._is_closed = True
        self.set_serving(False)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            # Set the status instead of raising: see CallInterceptor.run.
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details("unknown service")
        return health_pb2.HealthCheckResponse(status=self._status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        last = None
        while True:
            changed = self._changed
            status = self._status if request.service in self._services else _UNKNOWN
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
            if self._is_closed:
                return
            await changed.wait()
