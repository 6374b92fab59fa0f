"""What a person who trains can get wrong, as one tree; ``turret train`` prints it in one line.

TrainingError
├── ConfigError    a key of the config: unknown, out of range, or without meaning for the method
│   └── ConfigFileError  known of the file alone, whatever the base and the machine
├── DataError      an example: names the file, the line and the field
└── RunError       a run directory that is finished, taken, or of another config or data set
"""

from __future__ import annotations

from pathlib import Path


class TrainingError(Exception):
    """Base of the tree. The message is readable on its own."""


class ConfigError(TrainingError):
    """Names the key, as ``method.rank: must be at least 1``."""

    @classmethod
    def of(cls, key: str, problem: str) -> ConfigError:
        """One bad key."""
        return cls(f"{key}: {problem}")


class ConfigFileError(ConfigError):
    """What no machine would take: names the file too, unless the key was given beside it."""


class DataError(TrainingError):
    """Names file, line and field, as ``train.jsonl:7: messages[2].role: …``."""

    @classmethod
    def of(cls, path: Path, line: int, field: str, problem: str) -> DataError:
        """One bad field of one example."""
        return cls(f"{path}:{line}: {field}: {problem}")


class RunError(TrainingError):
    """The run directory's content and what was asked for do not fit together."""
