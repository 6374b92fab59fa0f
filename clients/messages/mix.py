"""How callers name the adapters of a request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from turret.v1 import adapters_pb2

# What divides members and weights in the name of a model over HTTP; no adapter's name holds it.
_OF_HTTP = frozenset("+*")


@dataclass(frozen=True, slots=True)
class AdapterWeight:
    """One member of a mix.

    Attributes:
        name: A registered name.
        weight: Factor on the adapter's update, in [-100, 100].
        generation: The generation meant; None means the newest.
    """

    name: str
    weight: float = 1.0
    generation: int | None = None

    @classmethod
    def parse(cls, text: str) -> AdapterWeight:
        """Read ``NAME[@GENERATION][=WEIGHT]``.

        Raises:
            ValueError: The text has another form; of a mix as HTTP has it (``json+sql*0.5``) it
                says how it is written here.
        """
        head, equals, weight = text.partition("=")
        name, at, generation = head.partition("@")
        try:
            if not name or not _OF_HTTP.isdisjoint(name):
                raise ValueError("no name")
            return cls(name, float(weight) if equals else 1.0, int(generation) if at else None)
        except ValueError:
            raise ValueError(f"{text!r} is not NAME[@GENERATION][=WEIGHT]{_here(text)}") from None

    def __str__(self) -> str:
        generation = "" if self.generation is None else f"@{self.generation}"
        return f"{self.name}{generation}" + ("" if self.weight == 1.0 else f"={self.weight:g}")


def _here(text: str) -> str:
    """How a mix that is written as HTTP has it is written here; empty of any other text."""
    if _OF_HTTP.isdisjoint(text):
        return ""
    members = [member.strip().replace("*", "=") for member in text.split("+")]
    if len(members) > 1:
        return f"; the members of a mix are given one by one: {', '.join(members)}"
    return f"; with a weight it is {members[0]}"


_FORMS = 'an adapter is "name", ("name", weight) or an AdapterWeight'
# "sql", ("json", -0.5), AdapterWeight("json", generation=2), or the message itself.
AdapterLike = str | tuple[str, float] | AdapterWeight | adapters_pb2.AdapterWeight


def to_mix(adapters: AdapterLike | Sequence[AdapterLike]) -> list[adapters_pb2.AdapterWeight]:
    """Convert the adapters of a request; a single one may stand for itself.

    Raises:
        TypeError: A member has none of the accepted forms.
        ValueError: A name holds what the command line divides names and weights by.
    """
    match adapters:
        case str() | AdapterWeight() | adapters_pb2.AdapterWeight() | (str(), int() | float()):
            return [_to_proto(adapters)]
    if not isinstance(adapters, Iterable):
        raise TypeError(f"adapters: {_FORMS}, or several, not {adapters!r}")
    return [_to_proto(adapter) for adapter in adapters]


def routing_key(mix: Iterable[adapters_pb2.AdapterWeight]) -> str:
    """What a balancer in front of several servers may choose by: the names, sorted, with commas.

    Weights are left out, since all mixes of the same adapters need the same memory. Empty for the
    base model, which every server has.
    """
    return ",".join(sorted(member.name for member in mix))


def _to_proto(adapter: object) -> adapters_pb2.AdapterWeight:
    match adapter:
        case adapters_pb2.AdapterWeight():
            return adapter
        case str():
            if not (_OF_HTTP | {"=", "@"}).isdisjoint(adapter):
                meant = '("name", weight) or AdapterWeight.parse("name@generation=weight")'
                why = f"with a weight it is {meant}, and a mix is a list of members"
                raise ValueError(f"adapters: {adapter!r} is no name; {why}")
            return adapters_pb2.AdapterWeight(name=adapter)
        case AdapterWeight(name, weight, generation):
            return adapters_pb2.AdapterWeight(name=name, weight=weight, generation=generation)
        case (str() as name, int() | float() as weight):
            return adapters_pb2.AdapterWeight(name=name, weight=weight)
    raise TypeError(f"adapters: {_FORMS}, not {adapter!r}")
