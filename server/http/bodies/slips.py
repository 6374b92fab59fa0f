"""Refuses a request with all that is wrong with it, fields that are misspelt among it.

Clients send many fields that are for other servers, and those are ignored. A slip of a field that
the endpoint reads is not: to ignore it would be another answer than the one that was asked for.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

from turret.server.api.inference.requests import sampling_params, stop_conditions
from turret.server.api.violations import MAX_VIOLATIONS
from turret.server.http.bodies.fields import UINT32, Fields
from turret.server.http.bodies.unsupported import refused_fields
from turret.v1 import inference_pb2

# Rejected fields are neither corrected nor suggested, but some endpoint reads these two.
_REFUSED = {name for names in refused_fields().values() for name in names} - {"tools", "echo"}
# No client sends as many unread fields, or names as long; comparing them would take long.
_MOST_UNREAD, _MOST_CHARS = 32, 40
_SHORT, _LONG = 4, 8
# Names up to this length are similar only if they have the same letters. The limit is lower inside
# an object, which has few fields to confuse.
_SHORT_WITHIN = 2
# Names that other servers use, normalised by ``_plain``, with the fields that they may mean: the
# first that the endpoint reads. Ignoring such a name would silently change the answer.
_LIMITS = ("max_output_tokens", "max_tokens")
_OTHERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("maxnewtokens", "maxoutputtokens", "maxtokenstosample"), _LIMITS),
    **dict.fromkeys(("npredict", "numpredict", "maxlength"), _LIMITS),
    **dict.fromkeys(("stopsequence", "stopsequences", "stopwords"), ("stop",)),
    **dict.fromkeys(("stopstrings", "stoppingstrings", "antiprompt"), ("stop",)),
    "temp": ("temperature",),
    "repeatpenalty": ("repetition_penalty",),
    "randomseed": ("seed",),
    "format": ("response_format",),
}
# Values of these fields that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("npredict", "numpredict"), (-1,)),
    "repeatpenalty": (1,),
    "format": ("",),
}
# Alternatives to a field: if any of them was sent, a misspelt one is not reported.
_AS_GOOD: dict[str, tuple[str, ...]] = dict.fromkeys(_LIMITS, (*_LIMITS, "max_completion_tokens"))


def refuse_if_wrong(
    fields: Fields, names: dict[str, str], message: inference_pb2.GenerateRequest | None = None
) -> None:
    """Raise what was noted of a request whose fields have all been read, and what remains to note.

    Args:
        fields: Of the whole body; slips in the objects within it are noted too.
        names: See ``refusal_of``; takes in names that are the client's own.
        message: What was read, if it says how to generate: where anything is wrong, its ranges are
            checked too, so that one answer names all.

    Raises:
        InvalidRequestError: Something is.
    """
    violations = fields.violations
    for inside, name, meant in reversed(list(itertools.islice(_slips(fields), MAX_VIOLATIONS))):
        path, instead = inside.path + name, inside.path + meant
        # Report the misspelling first, in place of violations of the field that it stands for.
        violations.found = [
            each
            for each in violations.found
            if each[0] != path and not f"{each[0]}.".startswith(f"{instead}.")
        ]
        names[path] = path
        why = f"is no field of {_what(inside)}; did you mean {meant!r}?"
        violations.found.insert(0, (path, why))
    if violations.found and message is not None:
        sampling_params(message.sampling, UINT32, violations)
        stop_conditions(message.stop, UINT32, violations)
    violations.raise_if_any()


def _slips(whole: Fields) -> Iterator[tuple[Fields, str, str]]:
    """Unknown fields sent in place of a known one, each with its object and the known field."""
    compared: set[str] = set()
    for fields in _all_of(whole):
        for name in fields.sent:
            if name in fields.read or fields.is_null(name):
                continue
            if name not in compared and len(compared) == _MOST_UNREAD:
                continue
            compared.add(name)
            meant = _meant(name, fields)
            if meant is None:
                continue
            as_good = (each for each in _AS_GOOD.get(meant, (meant,)) if each in fields.read)
            # If the suggested field was sent too, the unknown one is not a misspelling of it.
            if all(map(fields.is_null, as_good)):
                yield fields, name, meant


def _all_of(fields: Fields) -> Iterator[Fields]:
    yield fields
    for inside in fields.within.values():
        yield from _all_of(inside)


def _what(fields: Fields) -> str:
    return fields.path.removesuffix(".") or "this request"


def _meant(name: str, fields: Fields) -> str | None:
    choices, short = list(fields.read), _SHORT_WITHIN
    if not fields.path:
        if name in _REFUSED:
            return None
        meant = next((each for each in _OTHERS.get(_plain(name), ()) if each in fields.read), None)
        if meant is not None:
            return None if fields.is_any_of(name, _NEUTRAL.get(_plain(name), ())) else meant
        choices, short = [each for each in choices if each not in _REFUSED], _SHORT
    if len(name) > _MOST_CHARS or not _plain(name):
        return None
    slips = [(slips_between(name, choice, short), choice) for choice in choices]
    most = 1 if len(name) < _LONG else 2
    return min(((n, choice) for n, choice in slips if n <= most), default=(0, None))[1]


def _plain(name: str) -> str:
    """The name without the differences between languages' naming styles."""
    return name.lower().replace("_", "").replace("-", "")


@functools.lru_cache(maxsize=8192)
def slips_between(name: str, choice: str, short: int = _SHORT) -> int:
    """Letters added, left out, exchanged or swapped, without regard to case and underscores.

    Of a name that is too short to be told from another (has at most ``short`` letters), so many
    that it is no slip, unless the letters are the same.
    """
    one, other = _plain(name), _plain(choice)
    if one == other:
        return 0
    # Short names need the same letters: ``sede`` may mean seed, but ``top_a`` does not mean top_k.
    is_short = max(len(one), len(other)) <= short and sorted(one) != sorted(other)
    if is_short or abs(len(one) - len(other)) > 2:
        return len(one) + len(other)
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, last, row = row, before, [i]
        for j, wanted in enumerate(other, 1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted))
            if last and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                best = min(best, last[j - 2] + 1)
            row.append(best)
    return row[-1]
