"""Requests of the administrative calls, from plain Python values."""

from __future__ import annotations

import os
from numbers import Real
from typing import Any, TypeVar

from google.protobuf import duration_pb2
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from turret.clients.messages.fields import (
    ArgumentTypeError,
    ArgumentValueError,
    fill,
    not_of_type,
)
from turret.clients.messages.mix import AdaptersLike, to_mix
from turret.clients.words import say
from turret.v1 import adapters_pb2 as pb

_Request = TypeVar("_Request")
# Keeps durations within what a message can hold; the server checks its own limit.
_MOST_SECONDS = 1e9


def path_text(path: object) -> str:
    """A path on the server, as text.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(path, str | os.PathLike):
        raise not_of_type("path", "a path", path)
    return os.fspath(path)


def list_request(
    page_size: int, page_token: str, method: str | None, residency: str | None
) -> pb.ListAdaptersRequest:
    """Raises ``ValueError`` for an unknown residency."""
    value = _enum_value(pb.Adapter.Residency, "residency", residency)
    request = pb.ListAdaptersRequest(residency=value)  # type: ignore[arg-type]
    return filled(request, page_size=page_size, page_token=page_token, method=method)


def unload_request(
    name: str, mode: str, drain_seconds: float | None, expected_generation: int | None
) -> pb.UnloadAdapterRequest:
    """Raises ``ValueError`` for an unknown mode."""
    request = filled(
        pb.UnloadAdapterRequest(
            mode=_enum_value(pb.UnloadAdapterRequest.Mode, "mode", mode),  # type: ignore[arg-type]
        ),
        name=name,
        expected_generation=expected_generation,
    )
    if drain_seconds is not None:
        request.timeout.CopyFrom(_duration(drain_seconds))
    return request


def fuse_request(name: str, adapters: AdaptersLike, **options: Any) -> pb.FuseAdaptersRequest:
    """``options`` are the request's scalars; None leaves one unset.

    Raises ``ValueError`` for a value that does not fit its field.
    """
    request = filled(pb.FuseAdaptersRequest(adapters=to_mix(adapters)), name=name)
    return filled(request, **options)


def merge_request(adapters: AdaptersLike, precision: str) -> pb.MergeAdaptersRequest:
    """Raises ``ValueError`` for an unknown precision."""
    value = _enum_value(pb.MergeAdaptersRequest.Precision, "precision", precision)
    return pb.MergeAdaptersRequest(
        adapters=to_mix(adapters),
        precision=value,  # type: ignore[arg-type]
    )


def filled(request: _Request, **values: Any) -> _Request:
    """The request with its fields set; None leaves one unset, but for the name.

    Raises:
        TypeError, ValueError: A value does not fit its field, which is named.
    """
    given = {key: value for key, value in values.items() if value is not None or key == "name"}
    fill(request, given, given)
    return request


def _duration(seconds: float) -> duration_pb2.Duration:
    is_number = isinstance(seconds, Real) and not isinstance(seconds, bool)
    if not is_number or not abs(seconds) < _MOST_SECONDS:
        kind = ArgumentValueError if is_number else ArgumentTypeError
        wanted = "a number of seconds from 0 to 3600"
        raise kind("drain_seconds", say("NOT_OF_TYPE", wanted=wanted, value=repr(seconds)))
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(float(seconds) * 1e9))
    return duration


def _enum_value(enum: EnumTypeWrapper, field: str, name: str | None) -> int:
    """The value of that name, in any case; None is unspecified."""
    if name is None:
        return 0
    # Skip the first name, which means unspecified.
    names = [name.lower() for name in enum.keys()[1:]]
    if not isinstance(name, str) or name.lower() not in names:
        kind = ArgumentValueError if isinstance(name, str) else ArgumentTypeError
        raise kind(field, say("NOT_ONE_OF", choices=", ".join(names), value=name))
    return enum.Value(name.upper())
