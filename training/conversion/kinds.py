"""What is converted, told from a config before torch is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from turret.training.errors import RunError

# Values of ``peft_type``; a test compares with the converter's.
KINDS = ("ADAMSS", "PSOFT", "XLORA")


def check_kind(folder: Path) -> None:
    """Refuse an adapter that needs no conversion, or knows none.

    Args:
        folder: What lies in it is the converter's to read; where that is no config, so is the
            refusal.

    Raises:
        RunError: Its ``peft_type`` is none of ``KINDS``.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError):
        return
    if kind not in KINDS:
        raise not_converted(str(folder), kind)


def not_converted(path: str, kind: object) -> RunError:
    """The refusal of a ``peft_type``."""
    return RunError(
        f"{path}: peft_type {kind!r:.60} is not converted, only {', '.join(KINDS)} are; `turret"
        " serve` takes others as they are, or says what to do with them"
    )
