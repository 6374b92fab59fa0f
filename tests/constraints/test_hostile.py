"""Hostile constraints: their compilation and evaluation are bounded.

They run in a separate process, which must survive them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from checkout import ROOT

from turret.server.constraints.grammar import MAX_CHOICES, MAX_CONSTRAINT_CHARS


def chain(length: int, link: str) -> str:
    """A grammar of nested rules or terminals."""
    links = "".join(link.format(i, i + 1) for i in range(length))
    name = link[0]
    return f'start: {name}0\n{links}{name}{length}: "z"'


# Each constraint is as long as allowed, or as wide as is sensible. On an ordinary stack, the first
# three would crash the process.
HOSTILE = {
    "nested rules": chain(5000, "r{0}: r{1}\n"),
    "nested terminals": chain(3600, 'R{0}: "a" R{1}?\n'),
    "prefixes": chain(3900, 'r{0}: "a" r{1}\n'),
    "parentheses": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000,
    "ambiguous": 'start: e\ne: | e e | e e e | /[a-z ]+/ | "(" e ")"',
    "repeated": 'start: (("a"~1..1000)~1..1000)~1..1000',
    "repeated terminal": 'start: "b" ' + "A " * 15_000 + '| "cx"\nA: "' + "ab" * 15_000 + '"',
    "long text": "start: " + json.dumps("ab " * 20_000),
    "line breaks": "\n" * MAX_CONSTRAINT_CHARS,
    "line breaks after a fault": "start: missing" + "\n" * 65_000,
}  # fmt: skip
HOSTILE_REGEXES = {
    "nested counts": "((a{0,1000}){0,1000}){0,1000}",
    "exact counts": "(a{500}){500}",
    "look back": "(.|\n)*a(.|\n){2000}",
    "long": "ab" * (MAX_CONSTRAINT_CHARS // 2),
    "alternatives": "|".join(f"w{i}" for i in range(9000)),
    "letters": r"((\p{L}|\p{N}){1,500}[-_ ]){1,500}",
    "parentheses": "(" * 30_000 + "a" + ")" * 30_000,
}
HOSTILE_SCHEMAS: dict[str, Any] = {
    "conjunctions": {
        "allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in "abcd"]} for i in range(12)]
    },
    "doubling": {
        "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
        | {"d40": {}},
        "$ref": "#/$defs/d0",
    },
    "properties": {
        "type": "object",
        "properties": {f"k{i}": {"type": "string", "maxLength": 20} for i in range(1200)},
    },
    "arrays": {"minItems": 100_000, "items": {"minItems": 100_000, "items": {"type": "array"}}},
    "enum": {"enum": [f"v{i}" for i in range(6000)]},
}  # fmt: skip

_CHILD = """
import json, sys, time
import numpy as np
from builders.constraints import compiled
from turret.server.constraints.matcher import roomy_executor
from turret.server.errors import TurretError
def tried(kind, text):
    start = time.process_time()
    try:
        constraint = compiled(kind, text)
    except TurretError as error:
        return [time.process_time() - start, 0.0, str(error)[:60]]
    took = time.process_time() - start
    matcher, worst, rng, why = constraint.matcher(), 0.0, np.random.default_rng(0), ""
    try:
        for _ in range(40):
            start = time.thread_time()
            words = matcher.mask()
            worst = max(worst, time.thread_time() - start)
            bits = np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()[0]
            matcher.advance(int(rng.choice(bits)))
    except TurretError as error:
        why = str(error)[:60]
    return [took, worst, why]
# The thread that evaluates grammars has a large stack, as in a server.
executor = roomy_executor(1, "masks")
for kind, text in json.load(sys.stdin):
    print(json.dumps(executor.submit(tried, kind, text).result()), flush=True)
"""


def test_hostile_constraints_have_bounded_cost_and_crash_nothing() -> None:
    jobs = [("grammar", text) for text in HOSTILE.values()]
    jobs += [("regex", text) for text in HOSTILE_REGEXES.values()]
    jobs += [("json_schema", json.dumps(value)) for value in HOSTILE_SCHEMAS.values()]
    assert all(len(text) <= MAX_CONSTRAINT_CHARS for _, text in jobs)
    ended = subprocess.run(
        [sys.executable, "-c", _CHILD], input=json.dumps(jobs), capture_output=True, text=True,
        timeout=300, check=False, env={**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support")},
    )  # fmt: skip
    rows = [json.loads(line) for line in ended.stdout.splitlines()]
    names = [*HOSTILE, *HOSTILE_REGEXES, *HOSTILE_SCHEMAS]
    assert ended.returncode == 0, (names[len(rows)], ended.stderr[-2000:])
    for name, (seconds, worst, why) in zip(names, rows, strict=True):
        # The limits, 10 s and 2 s, are about ten times the measured times.
        assert max(seconds / 10, worst / 2) < 1, (name, seconds, worst, why)
    # The maximum number of choices is smaller than the number tried here.
    assert MAX_CHOICES < 9000
