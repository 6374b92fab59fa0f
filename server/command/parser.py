"""An argument parser whose errors are two lines: what is wrong, and what to type."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from turret.server.basics.closest import did_you_mean

EXIT_USAGE = 2
_UNKNOWN_FLAG = re.compile(r"unrecognized arguments: (--[^\s=]+)")
_BAD_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)", re.DOTALL)


class CommandParser(argparse.ArgumentParser):
    """argparse prints a page of usage for a slip of the finger; this says what was meant."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As argparse's, but the verb itself refuses what it does not know, by its own name."""
        values, rest = super().parse_known_args(args, namespace)
        if rest and self._subparsers is None:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return values, rest

    def error(self, message: str) -> NoReturn:
        self.exit(
            EXIT_USAGE,
            f"{self.prog}: error: {message}{self._meant(message)}\n"
            f"{self.prog} --help shows what there is\n",
        )

    def _meant(self, message: str) -> str:
        if found := _UNKNOWN_FLAG.search(message):
            return did_you_mean(found[1], self._option_string_actions)
        if found := _BAD_CHOICE.search(message):
            return did_you_mean(found[1], re.findall(r"[\w.-]+", found[2]))
        return ""
