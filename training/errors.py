"""The errors of training, as one tree; ``turret train`` prints each on one line.

TrainingError
├── ConfigError    an invalid key of the config: unknown, out of range, or unsupported by the method
│   └── ConfigFileError  an error in the file alone, independent of the base and the machine
├── DataError      an invalid example: names the file, the line and the field
└── RunError       any other failure, such as a run directory that is finished or in use
"""

from __future__ import annotations

from pathlib import Path

from turret.server.basics.settings import Violation
from turret.words import Text


class TrainingError(Exception):
    """Base of the tree. The message is readable on its own."""


class ConfigError(TrainingError):
    """Invalid keys of the config.

    Attributes:
        violations: The faults, each with its key.
        path: The file, if the fault is in the file alone.
    """

    def __init__(self, *violations: Violation, path: Path | None = None) -> None:
        where = "" if path is None else f"{path}: "
        lines = [f"{key}: {text}" if key else text for key, text in violations]
        super().__init__("\n".join(f"{where}{line}" for line in lines))
        self.violations = violations
        self.path = path

    @classmethod
    def of(cls, key: str, problem: Text) -> ConfigError:
        """The error for one invalid key."""
        return cls(Violation(key, problem))


class ConfigFileError(ConfigError):
    """An error in the config that does not depend on the base or the machine."""


class DataError(TrainingError):
    """An invalid example; names file, line and field: ``train.jsonl:7: messages[2].role: …``.

    Attributes:
        problem: The fault.
    """

    def __init__(self, problem: Text, place: str = "") -> None:
        super().__init__(f"{place}: {problem}" if place else problem)
        self.problem = problem

    @classmethod
    def of(cls, path: Path, line: int, field: str | None, problem: Text) -> DataError:
        """The error for one invalid field of an example, or for the whole example."""
        return cls(problem, f"{path}:{line}: {field}" if field else f"{path}:{line}")


class RunError(TrainingError):
    """Any other failure: of a run and its directory, a conversion, a repair or a verification."""

    def __init__(self, text: Text) -> None:
        super().__init__(text)
