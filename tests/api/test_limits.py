"""The limits that the comments in the proto files state are those that the API enforces."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from pages.security import FILES, comments, name_of, number_in
from servers.fakes import FakeEngine, FakeFuser, FakeMerger, FakeRegistry, fake_backend

from turret.server.api.call import Call
from turret.server.api.gate import ServingGate
from turret.server.api.services import Services
from turret.server.errors import InvalidRequestError
from turret.server.rpc import METHODS

# Chunks follow a valid header; tests/rpc/test_transfers.py sends them.
_CHUNK = "FileChunk"
# The fake vocabularies read no templates; tests/http/test_chat_templates.py sends one.
_TEMPLATE = "Chat.chat_template"


def paths(message: Descriptor, above: tuple[FieldDescriptor, ...] = ()) -> Iterator[Any]:
    """The paths from a message to its texts and lists."""
    for field in message.fields:
        path = (*above, field)
        if field.type == FieldDescriptor.TYPE_STRING or field.is_repeated:
            yield path
        inner = field.message_type
        if inner is None or inner.name == _CHUNK or inner.GetOptions().map_entry:
            continue
        if inner.full_name.startswith("turret."):
            yield from paths(inner, path)


def cases() -> Iterator[Any]:
    told = comments()
    for service in (service for file in FILES for service in file.services_by_name.values()):
        for method in service.methods:
            for path in paths(method.input_type):
                most = number_in(told[name_of(path[-1])])
                if most and name_of(path[-1]) != _TEMPLATE:
                    name = f"{method.name}.{'.'.join(field.name for field in path)}"
                    yield pytest.param(method, path, most, id=name)


def oversized(method: MethodDescriptor, path: tuple[FieldDescriptor, ...], most: int) -> Any:
    """A message with one character or entry more than the limit."""
    message = at = GetMessageClass(method.input_type)()
    for field in path[:-1]:
        at = getattr(at, field.name)
        at = at.add() if field.is_repeated else at
    last = path[-1]
    if not last.is_repeated:
        setattr(at, last.name, "a" * (most + 1))
        return message
    entries = getattr(at, last.name)
    if last.message_type is not None and last.message_type.GetOptions().map_entry:
        entries.update(dict.fromkeys(range(most + 1), 0.0))
    elif last.message_type is not None:
        for _ in range(most + 1):
            entries.add()
    else:
        is_text = last.type == FieldDescriptor.TYPE_STRING
        entries.extend(["a" if is_text else 1] * (most + 1))
    return message


async def alone(message: Any) -> AsyncIterator[Any]:
    yield message


@pytest.mark.parametrize(("method", "path", "most"), [*cases()])
async def test_more_than_the_limit_is_a_violation_of_the_field(
    method: MethodDescriptor, path: tuple[FieldDescriptor, ...], most: int
) -> None:
    services = Services(gate=ServingGate())
    backend = fake_backend(FakeEngine(), FakeRegistry(), FakeMerger(), FakeFuser())
    services.gate.open(backend)
    service = method.containing_service.name
    api: Any = services.adapters if service == "Adapters" else services.inference
    message = oversized(method, path, most)
    if method.client_streaming:
        message = alone(message)
    call = Call.begin("x", [], services.metrics)
    answer = METHODS[service][method.name](api, message, call)
    with pytest.raises(InvalidRequestError) as caught:
        await (anext(answer) if inspect.isasyncgen(answer) else answer)
    services.adapters.close()
    name = path[-1].name
    found = {text.reason: text.params for field, text in caught.value.violations if name in field}
    sizes = {params.get("most") for params in found.values()}
    forms = {"NOT_AN_ADAPTER_NAME", "NOT_MATCHING", "NOT_A_DIGEST", "NOT_ONE_OF"}
    assert most in sizes or forms & found.keys(), caught.value
