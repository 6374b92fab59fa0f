"""Rules for the keys of ``adapter_config.json``: each is used, known to be irrelevant, or rejected.

A method declares its keys in a table of rules; a key without a rule is rejected. A server that
ignores unknown keys may compute the wrong function without an error.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from turret.server.adapters.checkpoint import Findings
from turret.server.adapters.operators.vocabulary import EMBEDDING, HEAD
from turret.server.basics.names import closest
from turret.server.words import Text, say

# Returns the reason why a value is invalid, or None.
Check = Callable[[Any], Text | None]


@dataclass(frozen=True, slots=True)
class Used:
    """A key that the method reads."""

    check: Check


@dataclass(frozen=True, slots=True)
class Irrelevant:
    """A key that never affects the forward pass. ``why`` is the reason in brief."""

    why: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A key that changes the forward pass in an unsupported way unless its value is in ``off``."""

    off: tuple[Any, ...]
    advice: str


Rule = Used | Irrelevant | Rejected
Rules = Mapping[str, Rule]


def same(value: Any, other: Any) -> bool:
    """Equality that keeps ``0``, ``0.0`` and ``False`` apart."""
    return type(value) is type(other) and value == other


def invalid(value: Any, wanted: str) -> Text:
    """The fault of an invalid value."""
    return say("INVALID_VALUE", value=value, wanted=wanted)


def fault_of_bool(value: Any) -> Text | None:
    return None if isinstance(value, bool) else invalid(value, "true or false")


def fault_of_integer(least: int, most: float, wanted: str = "") -> Check:
    """Makes a check for integers other than true and false; ``wanted`` describes them in errors."""
    wanted = wanted or f"an integer from {least} to {most}"
    return lambda value: (
        None if type(value) is int and least <= value <= most else invalid(value, wanted)
    )


fault_of_rank = fault_of_integer(1, math.inf, "an integer of at least 1")
fault_of_count = fault_of_integer(0, math.inf, "an integer of at least 0")
fault_of_seed = fault_of_integer(-(2**63), 2**63 - 1, "a 64-bit integer")


def fault_of_number(value: Any) -> Text | None:
    # Values up to this limit are far from an overflow in fp32 arithmetic. The limit also excludes
    # infinities.
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e9
    return None if ok else invalid(value, "a number from -1e9 to 1e9")


def fault_of_positive(value: Any) -> Text | None:
    return fault_of_number(value) or (None if value > 0 else invalid(value, "greater than 0"))


def fault_of_text(value: Any) -> Text | None:
    return None if isinstance(value, str) else invalid(value, "a string")


def optional(check: Check) -> Check:
    """A check that also accepts null."""
    return lambda value: None if value is None else check(value)


def fault_of_choice(*allowed: Any) -> Check:
    def check(value: Any) -> Text | None:
        if any(same(value, one) for one in allowed):
            return None
        listed = [json.dumps(one) for one in allowed]
        wanted = " or ".join(listed) if len(listed) < 3 else f"one of {', '.join(listed)}"
        return invalid(value, wanted)

    return check


def _fault_of_task(value: Any) -> Text | None:
    if value in (None, "CAUSAL_LM", "FEATURE_EXTRACTION"):
        return None
    return invalid(value, "CAUSAL_LM, SEQ_CLS, FEATURE_EXTRACTION or null")


# Reasons for ignoring a key.
DROPOUT = "dropout is off at inference"
START = "sets the starting point of training"
TRAINING = "matters only in training"
IN_TENSORS = "the tensors already contain its effect"
PEFTS_WORK = "controls how PEFT loads or trains a model"
COMMON_RULES: Rules = {
    "peft_type": Used(fault_of_text),
    # Models with a head and without one are accepted; ``take_classifier`` handles SEQ_CLS earlier.
    "task_type": Used(_fault_of_task),
    "base_model_name_or_path": Used(optional(fault_of_text)),
    "revision": Irrelevant("commit of the base; turret compares the base's name and shapes"),
    "auto_mapping": Irrelevant(PEFTS_WORK),
    "inference_mode": Irrelevant(TRAINING),
    "peft_version": Irrelevant("provenance"),
    # Most methods have this key. A method that reads it declares it again.
    "init_weights": Irrelevant(START),
    "runtime_config": Irrelevant(PEFTS_WORK),
}


def check_config(config: Mapping[str, Any], rules: Rules, findings: Findings) -> None:
    """Adds a fault for every key that is unknown, malformed or not served."""
    for key, value in config.items():
        rule = rules.get(key)
        match rule:
            case None:
                # PEFT adds keys in newer versions; null means that such a feature is off.
                if value is not None:
                    findings.add(key, say("UNKNOWN_FIELD", closest=closest(key, rules)))
            case Used(check):
                problem = check(value)
                if problem is not None:
                    findings.add(key, problem)
            case Rejected(off, advice):
                if not any(same(value, one) for one in off):
                    findings.add(key, say("UNSUPPORTED_VALUE", value=value, why=advice))
            case Irrelevant():
                pass


Config = Mapping[str, Any]


def _accepts_all(config: Config) -> bool:
    return True


def _never(config: Config) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class MethodKeys:
    """The part of a method that concerns its config.

    Attributes:
        name: The name for clients, e.g. ``lora``.
        peft_types: The values of ``peft_type`` (upper case) that it may accept.
        keys: The config keys that it reads, each with a check.
        ignored: Config keys that do not affect the forward pass, each with the reason.
        refused: Config keys that change the forward pass in an unsupported way, with the values
            that switch them off, and advice.
        required: The method's own config keys that must be present; ``needed`` has all such keys.
        tasks: The config key for the number of tasks in the files, or None.
        bias: Values of ``bias`` that stand for the targeted modules' biases. If there are none, the
            config has no such key.
        conflicts: Returns pairs of a key and the reason why it conflicts with others. Each key
            alone is well-formed.
        accepts: Whether a config is for this method, and not for another one with the same
            ``peft_type``.
        is_dense: Whether the updates of an adapter with this config are whole matrices, which
            need ``--allow-dense-adapters``.
        on_vocabulary: Whether it may also adapt the embedding and experts.
        more_integers: Parts of the names of further tensors that may hold integers.
    """

    name: str
    peft_types: Set[str]
    keys: Mapping[str, Check] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    tasks: str | None = None
    bias: tuple[str, ...] = ()
    conflicts: Callable[[Config], Iterable[tuple[str, Text]]] | None = None
    accepts: Callable[[Config], bool] = _accepts_all
    is_dense: Callable[[Config], bool] = _never
    on_vocabulary: bool = False
    more_integers: Set[str] = frozenset()

    @property
    def common(self) -> Rules:
        """Rules for keys that all methods of this kind have; a method's own rules override them."""
        return {}

    @property
    def needed(self) -> tuple[str, ...]:
        """Config keys that must be present."""
        return self.required

    @property
    def integers(self) -> Set[str]:
        """Parts of the names of tensors that may hold integers."""
        return self.more_integers

    @cached_property
    def rules(self) -> Rules:
        """A rule for every key that the config may have."""
        rules: dict[str, Rule] = {**COMMON_RULES, **self.common}
        if self.bias:
            rules["bias"] = Used(fault_of_choice("none", "all", *self.bias))
        rules |= {name: Used(check) for name, check in self.keys.items()}
        rules |= {name: Irrelevant(why) for name, why in self.ignored.items()}
        return rules | {name: Rejected(*rejected) for name, rejected in self.refused.items()}

    @cached_property
    def used(self) -> frozenset[str]:
        """The keys that the method reads."""
        return frozenset(name for name, rule in self.rules.items() if isinstance(rule, Used))

    def check_config(self, config: Config, findings: Findings) -> None:
        """Reports every key that is unknown, malformed, not served or missing."""
        check_config(config, self.rules, findings)
        if self.conflicts is not None and not findings.fields & self.used:
            for name, why in self.conflicts(config):
                findings.add(name, why)
        for name in self.needed:
            if name not in config:
                findings.add(name, say("REQUIRED"))


_NAMES = {name: module for module in (EMBEDDING, HEAD) for name in (module, module.split(".")[-1])}
_MAX_IDS = 1 << 20


def vocabulary_module(name: str) -> str | None:
    """``model.embed_tokens`` or ``lm_head`` for a name by which PEFT finds it, else None."""
    return _NAMES.get(name)


def fault_of_modules_to_save(value: Any) -> Text | None:
    """Checks ``modules_to_save``: only the embedding and the head are supported."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return invalid(value, "a list of module names or null")
    others = [name for name in value if vocabulary_module(name) is None]
    if not others:
        return None
    why = "only embed_tokens and lm_head are served as whole modules; express the change as LoRA"
    return say("UNSUPPORTED_VALUE", value=others, why=why)


def fault_of_head_to_save(value: Any) -> Text | None:
    """Checks ``modules_to_save`` of methods whose prompt PEFT embeds with the base's matrix."""
    problem = fault_of_modules_to_save(value)
    if problem is None and EMBEDDING in map(vocabulary_module, value or ()):
        why = "PEFT does not combine a saved embedding with soft tokens; use another method"
        return say("UNSUPPORTED_VALUE", value=value, why=why)
    return problem


def fault_of_token_indices(value: Any) -> Text | None:
    """Checks ``trainable_token_indices``: a list of ids for the embedding, or a list per module."""
    if value is None or isinstance(value, list):
        return None if value is None else fault_of_token_list(value)
    if not isinstance(value, Mapping):
        return invalid(value, "a list of token ids, an object of such lists by module, or null")
    for name, ids in value.items():
        if vocabulary_module(name) is None:
            return say("NOT_ADAPTABLE", module=name, method="trainable_tokens")
        problem = fault_of_token_list(ids)
        if problem is not None:
            return say("INVALID_ENTRY", entry=name, why=problem)
    return None


def fault_of_token_list(value: Any) -> Text | None:
    ok = isinstance(value, list) and 0 < len(value) <= _MAX_IDS
    if not ok or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
        return invalid(value, "a non-empty list of token ids")
    return listed_twice(value)


def listed_twice(values: Sequence[Any]) -> Text | None:
    """The fault of a list that names a value more than once."""
    twice = next((value for value, count in Counter(values).items() if count > 1), None)
    return None if twice is None else say("DUPLICATE", value=twice)


def token_ids_by_module(value: Any, *, is_tied: bool) -> dict[str, list[int]]:
    """The rows that ``trainable_token_indices`` (well-formed) selects, by module.

    With tied embeddings, the rows of the embedding are rows of the head as well, unless the head
    has its own list (PEFT's ``set_additional_trainable_modules``).
    """
    if value is None:
        return {}
    by_name = value if isinstance(value, Mapping) else {EMBEDDING: value}
    found = {_NAMES[name]: list(ids) for name, ids in by_name.items()}
    if is_tied and EMBEDDING in found:
        found.setdefault(HEAD, found[EMBEDDING])
    return found
