"""Fuzzes all targets, guided by coverage if atheris is installed, otherwise at random.

cd tests/support && python -m fuzz.guided SECONDS FINDINGS

Fuzzing starts from the committed corpus. An input that causes a failure is written to FINDINGS,
together with the failure. Copy it to ``tests/fuzz/corpus/<target>/`` in the commit of the fix, so
that it is always tried. The exit code is 1 if there is a finding.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ORDER = (
    *("header", "config", "folder", "tokens", "message", "http", "bodies", "training"),
    "registration",
)


def _note(findings: Path, name: str, data: bytes) -> None:
    findings.mkdir(parents=True, exist_ok=True)
    text = traceback.format_exc()
    kept = findings / f"{name}-{abs(hash(data)):x}"
    kept.write_bytes(data)
    kept.with_suffix(".txt").write_text(text)
    print(f"{kept}:\n{text}", file=sys.stderr, flush=True)


def at_random(seconds: float, findings: Path) -> int:
    """Run the targets in turn with damaged seeds; returns the number of findings."""
    from fuzz.corpus import seeds
    from fuzz.mutation import mutated
    from fuzz.targets import opened

    source, found, tried = random.Random(), 0, 0
    corpus = {name: [data for each, data in seeds() if each == name] for name in ORDER}
    end = time.monotonic() + seconds
    with opened() as targets:
        while time.monotonic() < end and found < 10:
            name = ORDER[tried % len(ORDER)]
            tried += 1
            data = mutated(source, corpus[name])
            try:
                targets.by_name[name](data)
            except Exception:
                found += 1
                _note(findings, name, data)
    print(f"{tried} inputs at random, {found} findings")
    return found


def guided(seconds: float, findings: Path) -> int:
    """Like ``at_random``, by libFuzzer, which ends the process; the first byte selects a target."""
    atheris: Any = importlib.import_module("atheris")

    with atheris.instrument_imports(include=["turret.server"], enable_loader_override=False):
        from fuzz.corpus import seeds
        from fuzz.targets import MAX_BYTES, Targets

    folder, corpus = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    targets = Targets(folder)
    for number, (name, data) in enumerate(seeds()):
        (corpus / str(number)).write_bytes(bytes([ORDER.index(name)]) + data)

    def one(data: bytes) -> None:
        name = ORDER[data[0] % len(ORDER)] if data else ORDER[0]
        try:
            targets.by_name[name](data[1:])
        except Exception:
            _note(findings, name, data[1:])
            raise

    arguments = [
        *(sys.argv[0], f"-max_total_time={seconds:.0f}", f"-max_len={MAX_BYTES}"),
        *("-timeout=30", "-rss_limit_mb=4096", "-print_final_stats=1", "-verbosity=0"),
        *(f"-artifact_prefix={folder}/", str(corpus)),
    ]
    atheris.Setup(arguments, one)
    atheris.Fuzz()
    return 0


def main() -> int:
    seconds, findings = float(sys.argv[1]), Path(sys.argv[2])
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: no coverage guides", file=sys.stderr)
        return min(at_random(seconds, findings), 1)
    return guided(seconds, findings)


if __name__ == "__main__":
    sys.exit(main())
