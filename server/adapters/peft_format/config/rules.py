"""Every key of ``adapter_config.json`` is used, proved irrelevant, or rejected by name.

A method states its keys as a table of rules; a key without a rule is rejected. Reading an unknown
key as "probably fine" is how servers come to compute the wrong function without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from turret.server.adapters.checkpoint.findings import Findings
from turret.server.basics.closest import did_you_mean


@dataclass(frozen=True, slots=True)
class Used:
    """Read by the method. ``check`` returns what is wrong with the value, or None."""

    check: Callable[[Any], str | None]


@dataclass(frozen=True, slots=True)
class Irrelevant:
    """Has no part in the forward pass, whatever its value; ``why`` is the proof in brief."""

    why: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """Changes the forward pass in a way not served, unless the value is one of ``off``."""

    off: tuple[Any, ...]
    advice: str


_MAX_SEED = 2**63

Rule = Used | Irrelevant | Rejected
Rules = Mapping[str, Rule]


def same(value: Any, other: Any) -> bool:
    """Equality that keeps ``0``, ``0.0`` and ``False`` apart."""
    return type(value) is type(other) and value == other


def is_bool(value: Any) -> str | None:
    return None if isinstance(value, bool) else f"must be true or false, not {value!r:.60}"


def is_optional_bool(value: Any) -> str | None:
    return None if value is None else is_bool(value)


def is_rank(value: Any) -> str | None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    return None if ok else f"must be an integer >= 1, not {value!r:.60}"


def is_count(value: Any) -> str | None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return None if ok else f"must be an integer >= 0, not {value!r:.60}"


def is_seed(value: Any) -> str | None:
    ok = isinstance(value, int) and not isinstance(value, bool) and -_MAX_SEED <= value < _MAX_SEED
    return None if ok else f"must be a 64-bit integer, not {value!r:.60}"


def is_number(value: Any) -> str | None:
    # |value| stays exactly representable in fp32 arithmetic; this also excludes infinities.
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e9
    return None if ok else f"must be a number in [-1e9, 1e9], not {value!r:.60}"


def is_optional_text(value: Any) -> str | None:
    return None if value is None or isinstance(value, str) else "must be a string or null"


def is_text(value: Any) -> str | None:
    return None if isinstance(value, str) else "must be a string"


def is_one_of(*allowed: Any) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if any(same(value, one) for one in allowed):
            return None
        return f"is {value!r:.60}; served values: {', '.join(map(repr, allowed))}"

    return check


def _is_task(value: Any) -> str | None:
    if value in (None, "CAUSAL_LM", "FEATURE_EXTRACTION"):
        return None
    return (
        f"is {value!r:.60}; the base is a causal language model, for which PEFT writes CAUSAL_LM,"
        " SEQ_CLS, FEATURE_EXTRACTION or nothing: train it on such a base"
    )


COMMON_RULES: Rules = {
    "peft_type": Used(is_text),
    # Of the model with its head or without it. SEQ_CLS is read before (``take_classifier``).
    "task_type": Used(_is_task),
    "base_model_name_or_path": Used(is_optional_text),
    "revision": Irrelevant("names the base's commit; the base is compared by shapes and name"),
    "auto_mapping": Irrelevant("helps PEFT to find the base's class"),
    "inference_mode": Irrelevant("freezes parameters; this server never trains"),
    "peft_version": Irrelevant("provenance"),
    "runtime_config": Irrelevant("PEFT drops it on save and ignores it on load"),
}


def check_config(config: Mapping[str, Any], rules: Rules, findings: Findings) -> None:
    """Adds a fault for every key that is unknown, malformed or not served."""
    for key, value in config.items():
        rule = rules.get(key)
        match rule:
            case None:
                # Newer versions of PEFT write keys that older ones lack; null switches one off.
                if value is not None:
                    meant = did_you_mean(key, rules)
                    advice = meant or "; if it does not change the forward pass, remove it"
                    findings.add(key, f"is unknown to this version{advice}")
            case Used(check):
                problem = check(value)
                if problem is not None:
                    findings.add(key, problem)
            case Rejected(off, advice):
                if not any(same(value, one) for one in off):
                    findings.add(key, advice)
            case Irrelevant():
                pass
