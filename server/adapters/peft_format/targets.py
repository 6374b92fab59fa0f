"""PEFT's rules for which modules an adapter changes, and with which rank and alpha.

These functions agree with PEFT 0.21 (``tuners_utils.check_target_module_exists``,
``_maybe_include_all_linear_layers``, ``utils.other.get_pattern_key``), including its corner cases:
an exact name in ``target_modules`` skips ``layers_to_transform``, and the first matching pattern
wins.
"""

from __future__ import annotations

import math
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from turret.server.adapters.checkpoint import Findings, name_in_training
from turret.server.adapters.operators.vocabulary import HEAD
from turret.server.adapters.peft_format.config_rules import (
    Check,
    fault_of_number,
    fault_of_rank,
    invalid,
)
from turret.server.basics.confined import Confined, ConfinedError
from turret.server.words import Text, say

# Python's ``re`` has no time limit and keeps the interpreter lock while it backtracks, so one
# hostile pattern in an uploaded config would stop the whole server. Plain patterns are matched
# here. A pattern that can backtrack is matched by a child interpreter with limits on processor time
# and memory, one child at a time. A pattern that was too slow once is not tried again, although a
# config's patterns are matched several times.

# Processor time rather than elapsed time, so that a busy machine does not reject more patterns.
CPU_SECONDS = 2
MAX_CHILD_BYTES = 256 << 20
_MAX_ANSWER_BYTES = 64 << 20
_MAX_SLOW = 256
MAX_PATTERN_CHARS = 8192
# Without these characters a pattern has no repetition, group, class or alternative, so matching
# takes at most one step per character.
_BACKTRACKING = frozenset("*+?{}()[]|\\")
_PROGRAM = Path(__file__).with_name("pattern_program.py")

_one_child = threading.Lock()
# Recent patterns that exceeded a limit; guarded by the lock.
_too_slow: OrderedDict[Pattern, None] = OrderedDict()


@dataclass(frozen=True, slots=True)
class Pattern:
    """``re.<mode>(regex, name)``; ``plain`` is the part that came from the config."""

    mode: Literal["match", "fullmatch"]
    regex: str
    plain: str


@dataclass(frozen=True, slots=True)
class PatternResult:
    """One pattern over all names.

    Attributes:
        matches: Per name: None (no match), or the text of the group ``idx`` ("" without one).
        error: Why the pattern could not be used, or None.
    """

    matches: tuple[str | None, ...]
    error: Text | None = None


def match_all(patterns: Sequence[Pattern], names: Sequence[str]) -> list[PatternResult]:
    """Matches every pattern against every name.

    Returns:
        One result per pattern, in order. A bad or slow pattern raises nothing: its result has an
        ``error``.
    """
    results: dict[int, PatternResult] = {}
    child: list[int] = []
    for i, pattern in enumerate(patterns):
        if len(pattern.plain) > MAX_PATTERN_CHARS:
            why = say("TOO_MANY_CHARACTERS", most=MAX_PATTERN_CHARS, found=len(pattern.plain))
            results[i] = PatternResult((None,) * len(names), why)
        elif _BACKTRACKING.isdisjoint(pattern.plain):
            results[i] = _match_here(pattern, names)
        else:
            child.append(i)
    if child:
        rows = _match_in_child([patterns[i] for i in child], names)
        results.update(zip(child, rows, strict=True))
    return [results[i] for i in range(len(patterns))]


def _match_here(pattern: Pattern, names: Sequence[str]) -> PatternResult:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            match = getattr(re.compile(pattern.regex), pattern.mode)
    except re.error as error:
        return _not_regular(pattern, len(names), str(error))
    found = (match(name) for name in names)
    return PatternResult(
        tuple(None if m is None else m.groupdict().get("idx") or "" for m in found)
    )


def _not_regular(pattern: Pattern, count: int, why: str) -> PatternResult:
    return PatternResult(
        (None,) * count,
        say("INVALID_ENTRY", entry=pattern.plain, why=say("PATTERN_INVALID", problem=why)),
    )


def _match_in_child(patterns: Sequence[Pattern], names: Sequence[str]) -> list[PatternResult]:
    """Runs one isolated interpreter (standard library only) over the patterns in order."""
    nothing: tuple[None, ...] = (None,) * len(names)
    slow = [PatternResult(nothing, say("SLOW_PATTERN", pattern=p.plain)) for p in patterns]
    untried = [PatternResult(nothing, say("UNTRIED_PATTERN", pattern=p.plain)) for p in patterns]
    with _one_child:
        if not _too_slow.keys().isdisjoint(patterns):
            return [slow[i] if p in _too_slow else untried[i] for i, p in enumerate(patterns)]
        child = Confined(
            _PROGRAM,
            cpu_seconds=CPU_SECONDS,
            max_bytes=MAX_CHILD_BYTES,
            max_answer_bytes=_MAX_ANSWER_BYTES,
        )
        is_over_limit = False
        try:
            answers = child.ask([[(p.mode, p.regex) for p in patterns], list(names)])
        except ConfinedError as error:
            answers, is_over_limit = error.answers, error.is_over_limit
        finally:
            child.close()
        rows = [
            _not_regular(pattern, len(names), answer["error"])
            if isinstance(answer, dict)
            else PatternResult(tuple(answer))
            for pattern, answer in zip(patterns, answers, strict=False)
        ]
        # The child works in order, so the first pattern without an answer is the one at fault.
        if len(rows) < len(patterns):
            if is_over_limit:
                _too_slow[patterns[len(rows)]] = None
            if len(_too_slow) > _MAX_SLOW:
                _too_slow.popitem(last=False)
            first = len(rows)
            rows += [slow[first], *untried[first + 1 :]]
        return rows


ALL_LINEAR = "all-linear"
MAX_LIST_ITEMS = 4096
# Maximum number of warnings. A config of a megabyte can have thousands of patterns that all match
# every module, and the warnings stay in memory and go to every client that lists adapters.
_MAX_WARNINGS = 16
_SHOWN_PATTERNS = 4
# Maximum number of pairs of a pattern and a name. Matching this many takes about fifteen seconds.
# Experts can have thirty thousand names.
_MAX_MATCHES = 1 << 24
_REGEX = "a regular expression in target_modules"
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."


@dataclass(frozen=True, slots=True)
class Targets:
    """The config's settings for each module of the base.

    Attributes:
        targeted: Names that PEFT would adapt.
        ranks: Configured rank per targeted name.
        alphas: Configured alpha per targeted name.
        warnings: Ambiguities that the server's operator should know about.
        is_rank_stabilised: Whether alpha is divided by the root of the rank (rsLoRA).
    """

    targeted: frozenset[str]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    warnings: tuple[Text, ...] = ()
    is_rank_stabilised: bool = False

    def scaling(self, name: str) -> float:
        """``alpha / r`` of a module, or ``alpha / sqrt(r)``."""
        rank = self.ranks[name]
        return self.alphas[name] / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def _is_string_list(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_LIST_ITEMS
        and all(isinstance(item, str) and item for item in value)
    )


def fault_of_module_selector(value: Any) -> Text | None:
    """Accepts a non-empty list of names, or one regular expression."""
    if (isinstance(value, str) and value) or (_is_string_list(value) and value):
        return None
    return invalid(value, "a non-empty list of module names or a regular expression")


def fault_of_optional_selector(value: Any) -> Text | None:
    if value is None or isinstance(value, str) or _is_string_list(value):
        return None
    return invalid(value, "a list of module names, a regular expression or null")


def fault_of_layer_indexes(value: Any) -> Text | None:
    items = value if isinstance(value, list) else [value]
    if value is None or all(isinstance(i, int) and not isinstance(i, bool) for i in items):
        return None
    return invalid(value, "an integer, a list of integers or null")


def fault_of_patterns(check: Check) -> Check:
    """Makes a check for a ``{regular expression: value}`` object (null counts as empty)."""

    def check_pattern(value: Any) -> Text | None:
        if value is None:
            return None
        if not isinstance(value, Mapping) or len(value) > MAX_LIST_ITEMS:
            return invalid(value, f"an object with at most {MAX_LIST_ITEMS} keys")
        for key, item in value.items():
            problem = check(item)
            if problem is not None:
                return say("INVALID_ENTRY", entry=key, why=problem)
        return None

    return check_pattern


fault_of_rank_pattern = fault_of_patterns(fault_of_rank)
fault_of_alpha_pattern = fault_of_patterns(fault_of_number)


class _Patterns:
    """Collects all patterns of a config, so that one call matches them all."""

    def __init__(self, names: Sequence[str], findings: Findings) -> None:
        self._names = names
        self._findings = findings
        self._wanted: dict[tuple[str, Pattern], None] = {}
        self._index = {name: i for i, name in enumerate(names)}
        self._results: dict[Pattern, PatternResult] = {}

    def want(self, field: str, pattern: Pattern) -> Pattern:
        self._wanted[field, pattern] = None
        return pattern

    def run(self) -> bool:
        """Matches all patterns. Returns False and adds a fault if that would take too long."""
        wanted = list(self._wanted)
        if len(wanted) * len(self._names) > _MAX_MATCHES:
            why = say("TOO_MANY_PATTERNS", count=len(wanted), modules=len(self._names))
            for field in dict(wanted):
                self._findings.add(field, why)
            return False
        results = match_all([pattern for _, pattern in wanted], self._names)
        for (field, pattern), result in zip(wanted, results, strict=True):
            self._results[pattern] = result
            if result.error is not None:
                self._findings.add(field, result.error)
        return True

    def group(self, pattern: Pattern, name: str) -> str | None:
        """The captured layer index, or "" for a match without one; None without a match."""
        return self._results[pattern].matches[self._index[name]]

    def matches(self, pattern: Pattern, name: str) -> bool:
        return self.group(pattern, name) is not None


def _suffixes(names: Any) -> tuple[str, ...]:
    """Path endings of the modules that a list selects by their last components."""
    return tuple(f".{name}" for name in names) if isinstance(names, list) else ()


def _selector_pattern(patterns: _Patterns, field: str, value: Any) -> Pattern | None:
    if isinstance(value, str) and value:
        return patterns.want(field, Pattern("fullmatch", value, value))
    return None


def _keyed_patterns(
    patterns: _Patterns, field: str, config: Mapping[str, Any]
) -> dict[str, Pattern]:
    """Patterns by key, in the file's order, because PEFT takes the first one that matches."""
    table = config.get(field) or {}
    return {key: patterns.want(field, Pattern("match", rf"(.*\.)?({key})$", key)) for key in table}


def _check_combination(config: Mapping[str, Any], findings: Findings) -> None:
    is_regex = isinstance(config.get("target_modules"), str)
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if is_regex and layers is not None:
        findings.add("layers_to_transform", say("CONFLICTS_WITH", other=_REGEX))
    if is_regex and pattern is not None:
        findings.add("layers_pattern", say("CONFLICTS_WITH", other=_REGEX))
    if pattern and layers is None:
        findings.add("layers_pattern", say("NEEDS_FIELD", other="layers_to_transform"))


def resolve_targets(
    config: Mapping[str, Any],
    linear_names: Sequence[str],
    other_names: Sequence[str],
    findings: Findings,
    text_prefix: str = "",
) -> Targets:
    """Applies the selection keys of a config to a base model's module names.

    Args:
        config: The selection keys, among them ``target_modules``, checked by the ``fault_of_*``
            functions above.
        linear_names: Linear modules.
        other_names: Modules that exist but are not linear.
        findings: Receives bad patterns and contradictory keys.
        text_prefix: The checkpoint's prefix, because the config uses the names from training.

    Returns:
        The targets, by the base's names; meaningless if a fault was added.
    """
    _check_combination(config, findings)
    own_names = {name_in_training(n, text_prefix): n for n in (*linear_names, *other_names)}
    patterns = _Patterns(list(own_names), findings)
    targets, excludes = config["target_modules"], config.get("exclude_modules")
    is_all_linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    target_regex = _selector_pattern(patterns, "target_modules", None if is_all_linear else targets)
    exclude_regex = _selector_pattern(patterns, "exclude_modules", excludes)
    layer_regexes = _layer_patterns(patterns, config)
    rank_regexes = _keyed_patterns(patterns, "rank_pattern", config)
    alpha_regexes = _keyed_patterns(patterns, "alpha_pattern", config)
    if not patterns.run():
        return _unresolved(config, own_names.values())
    target_suffixes, exclude_suffixes = _suffixes(targets), _suffixes(excludes)

    def is_excluded(name: str) -> bool:
        if exclude_regex is not None:
            return patterns.matches(exclude_regex, name)
        return name in (excludes or ()) or name.endswith(exclude_suffixes)

    def is_targeted(name: str) -> bool:
        if is_all_linear:
            return name in linear
        if target_regex is not None:
            return patterns.matches(target_regex, name)
        if name in targets:
            return True
        return name.endswith(target_suffixes) and _is_layer_chosen(
            name, config.get("layers_to_transform"), layer_regexes, patterns
        )

    # "all-linear" means all linear modules but the output head.
    linear = {name_in_training(name, text_prefix) for name in linear_names if name != HEAD}
    targeted = [name for name in own_names if not is_excluded(name) and is_targeted(name)]
    warnings: list[Text] = []

    def values(field: str, regexes: dict[str, Pattern], default: Any) -> dict[str, Any]:
        table = config.get(field) or {}
        result = {own_names[name]: default for name in targeted}
        for name in targeted if regexes else ():
            hits = [key for key, regex in regexes.items() if patterns.matches(regex, name)]
            if hits:
                result[own_names[name]] = table[hits[0]]
            if len({table[key] for key in hits}) > 1:
                # PEFT sorts the keys when it saves, so training may have used another order.
                warnings.append(_ambiguity(field, hits, name))
        return result

    ranks = values("rank_pattern", rank_regexes, config.get("r", 1))
    alphas = values("alpha_pattern", alpha_regexes, config.get("lora_alpha", 1))
    few = _few(warnings)
    return Targets(frozenset(ranks), ranks, alphas, few, config.get("use_rslora") is True)


def _unresolved(config: Mapping[str, Any], names: Iterable[str]) -> Targets:
    """A placeholder result for a config whose patterns cannot be matched."""
    rank: int = config.get("r", 1)
    alpha: float = config.get("lora_alpha", 1)
    ranks = dict.fromkeys(names, rank)
    return Targets(frozenset(), ranks, dict.fromkeys(ranks, alpha))


def _few(warnings: Sequence[Text]) -> tuple[Text, ...]:
    hidden = len(warnings) - _MAX_WARNINGS
    more = (say("MORE", count=hidden),) if hidden > 0 else ()
    return (*warnings[:_MAX_WARNINGS], *more)


def _ambiguity(field: str, hits: Sequence[str], name: str) -> Text:
    shown = ", ".join(f"{hit!r:.60}" for hit in hits[:_SHOWN_PATTERNS])
    return say("AMBIGUOUS_PATTERNS", field=field, count=len(hits), patterns=shown, module=name)


def _layer_patterns(patterns: _Patterns, config: Mapping[str, Any]) -> list[Pattern]:
    """The patterns that find a module's layer index, tried in order; [] if none is needed."""
    if config.get("layers_to_transform") in (None, []):
        return []
    given = config.get("layers_pattern")
    if not given:
        return [patterns.want("layers_pattern", Pattern("match", _ANY_LAYER, ""))]
    given = [given] if isinstance(given, str) else given
    return [
        patterns.want("layers_pattern", Pattern("match", rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.", p))
        for p in given
    ]


def _is_layer_chosen(
    name: str, indexes: int | list[int] | None, regexes: list[Pattern], patterns: _Patterns
) -> bool:
    if not regexes:
        return True
    found = next((hit for p in regexes if (hit := patterns.group(p, name)) is not None), None)
    if not found:
        return False
    chosen = [indexes] if isinstance(indexes, int) else indexes or []
    return int(found) in chosen
