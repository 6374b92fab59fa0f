"""Adapters and merges, between proto and domain."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from turret.server.adapters.adapter import AdapterRef, origin_of
from turret.server.adapters.fuse.combination import Combination
from turret.server.api.limits import MAX_ALIAS_TARGETS, MAX_WEIGHT, MAX_WORD_CHARS
from turret.server.api.violations import Violations, adapter_refs, message_of, timestamp
from turret.server.errors import InvalidRequestError
from turret.server.words import say
from turret.v1 import adapters_pb2

if TYPE_CHECKING:
    from turret.server.adapters.adapter import AdapterInfo, Alias
    from turret.server.adapters.base import Precision
    from turret.server.adapters.fuse.combination import FuseResult
    from turret.server.adapters.merger import MergeState

# Conversion of registered adapters from domain to proto.


RESIDENCIES = {
    "disk": adapters_pb2.Adapter.DISK,
    "host": adapters_pb2.Adapter.HOST,
    "device": adapters_pb2.Adapter.DEVICE,
}


def _sendable(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which protobuf rejects.

    New adapters with such text are rejected, but a state directory may contain adapters that an
    earlier version accepted.
    """
    return text.encode("utf-8", "replace").decode()


def adapter_message(record: AdapterInfo) -> adapters_pb2.Adapter:
    """A registry record in the form of the API."""
    facts = record.facts
    return message_of(
        adapters_pb2.Adapter,
        record,
        digest=_sendable(facts.digest),
        method=_sendable(facts.method),
        ranks=facts.ranks,
        target_modules=map(_sendable, facts.target_modules),
        bytes_disk=facts.bytes_disk,
        residency=RESIDENCIES[record.residency],
        base_model=_sendable(facts.base_model),
        warnings=map(_sendable, facts.warnings),
        source=_sendable(record.source),
        invocation_token_ids=facts.invocation,
        labels=map(_sendable, facts.labels),
        vocab_size=facts.vocab_size,
        chat_template=origin_of(facts.chat_template),
        last_used_time=timestamp(record.last_used_time),
    )


def alias_message(alias: Alias) -> adapters_pb2.Alias:
    """An alias in the form of the API."""
    targets = [message_of(adapters_pb2.AliasTarget, target) for target in alias.targets]
    return adapters_pb2.Alias(name=alias.name, targets=targets)


def checked_alias(message: adapters_pb2.SetAliasRequest) -> tuple[str, list[AdapterRef]]:
    """The name and the targets of a request.

    Raises:
        InvalidRequestError: Lists every offending field.
    """
    violations = Violations()
    violations.check_name(message.name, "name")
    violations.check(len(message.targets) > 0, "targets", "EMPTY")
    refs: list[AdapterRef] = []
    if violations.check_count(len(message.targets), MAX_ALIAS_TARGETS, "targets"):
        for index, target in enumerate(message.targets):
            path = f"targets[{index}]"
            violations.check_name(target.name, f"{path}.name")
            weight = target.weight if target.HasField("weight") else 1.0
            if not 0 < weight <= MAX_WEIGHT:
                wanted = f"greater than 0 and at most {MAX_WEIGHT}"
                text = say("INVALID_VALUE", value=weight, wanted=wanted)
                violations.add(f"{path}.weight", text)
                continue
            generation = target.generation if target.HasField("generation") else None
            refs.append(AdapterRef(name=target.name, generation=generation, weight=weight))
    violations.raise_if_any()
    return message.name, refs


# Page tokens of ``ListAdapters``: the last name of the previous page, with its filters.

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
# gRPC clients accept 4 MiB by default.
MAX_PAGE_BYTES = 3 << 20
_CHECK_BYTES = 8


def _check(name: bytes, filters: str) -> bytes:
    return hashlib.sha256(filters.encode() + b"\0" + name).digest()[:_CHECK_BYTES]


def make_page_token(last_name: str, filters: str) -> str:
    """A token for the page after ``last_name`` under the same filters."""
    name = last_name.encode()
    return base64.urlsafe_b64encode(_check(name, filters) + name).decode()


def read_page_token(token: str, filters: str) -> str:
    """The name that the page starts after; empty for the first page.

    Raises:
        InvalidRequestError: The token is not from this server, or it is for other filters.
    """
    if not token:
        return ""
    try:
        data = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        data = b""
    check, name = data[:_CHECK_BYTES], data[_CHECK_BYTES:]
    if not name or check != _check(name, filters):
        raise InvalidRequestError.of("page_token", say("NOT_A_PAGE_TOKEN"))
    return name.decode("ascii", "replace")


def page_length(page_size: int) -> int:
    """The number of adapters on a page: 0 is the default, and larger values are limited.

    Raises:
        InvalidRequestError: The value is negative.
    """
    if page_size < 0:
        raise InvalidRequestError.of("page_size", say("TOO_SMALL", least=0, value=page_size))
    return min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def cut_page(messages: Iterable[adapters_pb2.Adapter]) -> list[adapters_pb2.Adapter]:
    """The first adapters, as many as fit into one message, but at least one."""
    page: list[adapters_pb2.Adapter] = []
    left = MAX_PAGE_BYTES
    for message in messages:
        left -= message.ByteSize()
        if page and left < 0:
            break
        page.append(message)
    return page


# Conversion of fusions between proto and domain.

_OPTIONAL = ("rank", "energy", "density", "seed")


def checked_fuse_request(
    request: adapters_pb2.FuseAdaptersRequest,
) -> tuple[str, tuple[AdapterRef, ...], Combination]:
    """The name of the result, its mix and its combination.

    Raises:
        InvalidRequestError: Lists every offending field.
    """
    violations = Violations()
    violations.check_name(request.name, "name")
    violations.check(len(request.adapters) > 0, "adapters", "EMPTY")
    refs = adapter_refs(request.adapters, violations)
    values: dict[str, Any] = {
        field: getattr(request, field) for field in _OPTIONAL if request.HasField(field)
    }
    # An empty string selects the default.
    for field, path in (("name", "combination"), ("majority_sign_method",) * 2):
        text = getattr(request, path)
        violations.check_chars(text, MAX_WORD_CHARS, path)
        if text and len(text) <= MAX_WORD_CHARS:
            values[field] = text
    combination = Combination()
    try:
        combination = Combination(**values)
    except InvalidRequestError as error:
        violations.found.extend(error.violations)
    violations.raise_if_any()
    return request.name, refs, combination


def fuse_response(
    result: FuseResult, adapter: adapters_pb2.Adapter
) -> adapters_pb2.FuseAdaptersResponse:
    """A ``FuseResult`` in the form of the API."""
    modules = [message_of(adapters_pb2.ModuleError, each) for each in result.modules]
    return adapters_pb2.FuseAdaptersResponse(
        adapter=adapter, relative_error=result.relative_error, modules=modules
    )


# Conversion of merges between proto and domain.

_Request = adapters_pb2.MergeAdaptersRequest
# None lets the merge choose the precision.
_PRECISIONS: dict[int, Precision | None] = {
    _Request.PRECISION_UNSPECIFIED: None,
    _Request.AUTO: None,
    _Request.NF4: "NF4",
    _Request.BF16: "BF16",
}


def checked_merge_request(request: _Request) -> tuple[tuple[AdapterRef, ...], Precision | None]:
    """The mix, and the precision in which it is stored.

    Raises:
        InvalidRequestError: Lists every offending field.
    """
    violations = Violations()
    violations.check(len(request.adapters) > 0, "adapters", "EMPTY")
    refs = adapter_refs(request.adapters, violations)
    # A mix whose weights are all zero would change nothing, but would prevent another merge.
    is_nothing = bool(refs) and all(ref.weight == 0 for ref in refs)
    violations.check(not is_nothing, "adapters", "NO_WEIGHT")
    violations.check_enum(request, "precision")
    violations.raise_if_any()
    return refs, _PRECISIONS[request.precision]


def merge_state_message(state: MergeState) -> adapters_pb2.MergeState:
    """The state in the form of the API."""
    merge = state.merge
    if merge is None:
        return adapters_pb2.MergeState(base_generation=state.base_generation)
    return adapters_pb2.MergeState(
        base_generation=state.base_generation,
        active=True,
        adapters=[message_of(adapters_pb2.MergedAdapter, each) for each in merge.adapters],
        precision=merge.precision,
        merge_time=timestamp(merge.time),
        relative_error=merge.report.relative_error,
        update_error=merge.report.update_error,
        modules=[
            adapters_pb2.ModuleError(module=path, relative_error=error)
            for path, error in merge.report.modules
        ],
    )
