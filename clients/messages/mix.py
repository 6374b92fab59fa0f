"""The adapters of a request, in the forms that callers may use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from turret.clients.messages.fields import ArgumentValueError, check_text, named, not_of_type
from turret.clients.words import say
from turret.v1 import adapters_pb2

# Separators of members and weights in a model name over HTTP. Adapter names contain neither.
_OF_HTTP = frozenset("+*")


@dataclass(frozen=True, slots=True)
class AdapterWeight:
    """One member of a mix.

    The argument ``adapters`` of calls (``AdaptersLike``) is one member or several: ``"sql"``,
    ``("json", -0.5)``, an ``AdapterWeight``, a list of these, or a mapping of names to weights such
    as ``{"sql": 0.5, "json": -0.5}``.

    Attributes:
        name: A registered name.
        weight: Factor on the adapter's update, in [-100, 100].
        generation: The required generation; None means the current one.
    """

    name: str
    weight: float = 1.0
    generation: int | None = None

    @classmethod
    def parse(cls, text: str) -> AdapterWeight:
        """Read ``NAME[@GENERATION][=WEIGHT]``.

        Raises:
            TypeError: The value is not text.
            ValueError: The text has another form, such as HTTP's form of a mix.
        """
        check_text("text", text)
        head, equals, weight = text.partition("=")
        name, at, generation = head.partition("@")
        try:
            if not name or not _OF_HTTP.isdisjoint(name):
                raise ValueError
            return cls(name, float(weight) if equals else 1.0, int(generation) if at else None)
        except ValueError:
            raise ValueError(say("NOT_A_MIX_MEMBER", value=text)) from None

    def __str__(self) -> str:
        generation = "" if self.generation is None else f"@{self.generation}"
        return f"{self.name}{generation}" + ("" if self.weight == 1.0 else f"={self.weight:g}")


_FORMS = '"name", ("name", weight), {"name": weight} or an AdapterWeight'
# "sql", ("json", -0.5), AdapterWeight("json", generation=2), or the message itself.
AdapterLike = str | tuple[str, float] | AdapterWeight | adapters_pb2.AdapterWeight
# An adapter, several adapters, or a mapping from adapters to weights: {"sql": 0.5, "json": -0.5}.
AdaptersLike = AdapterLike | Sequence[AdapterLike] | Mapping[str, float]


def to_mix(adapters: AdaptersLike) -> list[adapters_pb2.AdapterWeight]:
    """Convert the adapters of a request; a single one needs no list.

    Raises:
        TypeError: A member has none of the accepted forms.
        ValueError: A name contains one of the command line's separators, or a generation is out of
            range.
    """
    match adapters:
        case str() | AdapterWeight() | adapters_pb2.AdapterWeight() | (str(), int() | float()):
            return [_to_proto(adapters)]
        case Mapping():
            return [_to_proto(member) for member in adapters.items()]
    if not isinstance(adapters, Iterable):
        raise not_of_type("adapters", f"{_FORMS}, or a list of these", adapters)
    return [_to_proto(adapter) for adapter in adapters]


def _to_proto(adapter: object) -> adapters_pb2.AdapterWeight:
    match adapter:
        case adapters_pb2.AdapterWeight():
            return adapter
        case str():
            return adapters_pb2.AdapterWeight(name=_plain_name(adapter))
        case AdapterWeight():
            member = adapter
        case (name, weight):
            member = AdapterWeight(name, weight)
        case _:
            raise not_of_type("adapters", _FORMS, adapter)
    made = adapters_pb2.AdapterWeight(name=_plain_name(member.name))
    with named("adapters", adapter):
        made.weight = member.weight
        if member.generation is not None:
            made.generation = member.generation
    return made


def _plain_name(name: str) -> str:
    """The name; raises ``ValueError`` if it contains a separator of names and weights."""
    check_text("adapters", name)
    if (_OF_HTTP | {"=", "@"}).isdisjoint(name):
        return name
    raise ArgumentValueError("adapters", say("NOT_A_PLAIN_NAME", value=name))
