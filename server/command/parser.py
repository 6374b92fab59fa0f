"""An argument parser whose errors are two lines: what is wrong, and what to type."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from turret.server.basics.closest import closest, did_you_mean
from turret.server.command.start_lines import refuse, wants_json

EXIT_USAGE = 2
_REQUIRED = "the following arguments are required"
_TOO_MANY = "unrecognized arguments: "
_UNKNOWN_FLAG = re.compile(r"unrecognized arguments: (--?[A-Za-z][^\s=]*)")
_UNKNOWN_WORD = re.compile(r"unrecognized arguments: ([^-\s]\S*)$")
# Flags that are offered for a part of them.
_FEW = 3
# Arguments that are texts.
_TEXTS = ("prompt", "texts")
# What takes a file that stands where a verb does, by the command and the file's ending.
_OF_FILES = {
    ("turret", ".toml"): "turret train run FILE",
    ("turret", ".jsonl"): "turret eval FILE",
    ("turret", ".gguf"): "turret serve --model FILE",
    ("turret train", ".toml"): "turret train run FILE",
    ("turret train", ".jsonl"): "turret train run CONFIG --train FILE",
    ("turret cluster", ".toml"): "turret cluster serve --config FILE",
}
_OF_DIRECTORIES = {
    "turret adapters": "turret adapters upload NAME DIR",
    "turret train": "turret train report DIR",
}
# What argparse says, with Python's names of types.
_NO_NUMBER = re.compile(r"invalid (int|float) value: ('.*')", re.DOTALL)
_NUMBERS = {"int": "a whole number", "float": "a number"}
_BAD_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)", re.DOTALL)


class CommandParser(argparse.ArgumentParser):
    """argparse prints a page of usage for a slip of the finger; this says what was meant.

    A default named ``known_otherwise``, which a verb of any layer may set, gives flags that the
    verb lacks and people may try → what to type instead, with VALUE in the place of theirs.

    Attributes:
        verbs_below: Names that are no verb here and are one of a verb → the whole of it.
        logs: Whether what it refuses is told in the form of the log, as --log-format has it.
    """

    verbs_below: Callable[[], Mapping[str, str]] = dict
    logs = False
    _given: Sequence[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As argparse's, but flags are typed whole: a part may be one of two in a later version."""
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As argparse's, but the verb itself refuses what it does not know, by its own name."""
        self._given = list(sys.argv[1:] if args is None else args)
        values, rest = super().parse_known_args(args, namespace)
        if rest and self._subparsers is None:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return values, rest

    def error(self, message: str) -> NoReturn:
        if message.startswith(_REQUIRED) and (flag := self._unknown_flag()):
            # What is lacking may be what it was meant for.
            message = f"unrecognized arguments: {flag}"
        message = _NO_NUMBER.sub(lambda found: f"{found[2]} is not {_NUMBERS[found[1]]}", message)
        message += self._meant(message)
        if self.logs and wants_json(self._given, os.environ):
            refuse(message, is_json=True)
            self.exit(EXIT_USAGE)
        self.exit(
            EXIT_USAGE,
            f"{self.prog}: error: {message}\n{self.prog} --help shows what there is\n",
        )

    def _unknown_flag(self) -> str:
        """The first flag given that is none, of those before ``--``."""
        given = itertools.takewhile(lambda word: word != "--", self._given)
        flags = (word.partition("=")[0] for word in given if word.startswith("--"))
        return next((flag for flag in flags if flag not in self._option_string_actions), "")

    def _takes_text(self) -> bool:
        """Whether a word that stands alone is a text, as a prompt is."""
        return any(not one.option_strings and one.dest in _TEXTS for one in self._actions)

    def _meant(self, message: str) -> str:
        if found := _UNKNOWN_FLAG.search(message):
            return self._meant_by_flag(found[1])
        if found := _UNKNOWN_WORD.search(message):
            is_config = found[1].endswith(".toml")
            flags = (*(["--config"] if is_config else []), "--model", "--mix")
            if flag := next(filter(self._option_string_actions.__contains__, flags), ""):
                return f"; did you mean {flag} {found[1]}?"
        if message.startswith(_TOO_MANY) and " -" not in message and self._takes_text():
            return "; a text of several words stands in quotes"
        if found := _BAD_CHOICE.search(message):
            if whole := self.verbs_below().get(found[1]) or self._taking(found[1]):
                return f"; did you mean {whole}?"
            return did_you_mean(found[1], re.findall(r"[\w.-]+", found[2]))
        return ""

    def _taking(self, word: str) -> str:
        """The command that a file or a directory is for; "" of any other word."""
        typed = shlex.quote(word)
        if os.path.isdir(word) and self.prog in _OF_DIRECTORIES:
            return _OF_DIRECTORIES[self.prog].replace("DIR", typed)
        ending = os.path.splitext(word)[1]
        return _OF_FILES.get((self.prog, ending), "").replace("FILE", typed)

    def _meant_by_flag(self, flag: str) -> str:
        known_otherwise: Callable[[], Mapping[str, str]] = (
            self.get_default("known_otherwise") or dict
        )
        others = known_otherwise()
        plain = flag.lower().replace("_", "-")
        if plain not in others:
            near = closest(plain, [*self._option_string_actions, *others])
            if near is None or near not in others:
                return self._begun_by(plain) or did_you_mean(flag, self._option_string_actions)
            plain = near
        return f"; did you mean {others[plain].replace('VALUE', self._value_of(flag))}?"

    def _begun_by(self, part: str) -> str:
        """The flags that begin so, where they are few."""
        whole = [repr(flag) for flag in self._option_string_actions if flag.startswith(part)]
        return f"; did you mean {' or '.join(whole)}?" if 0 < len(whole) <= _FEW else ""

    def _value_of(self, flag: str) -> str:
        """What was given with a flag, after ``=`` or as the next word."""
        words = [*self._given, ""]
        places = (i for i, word in enumerate(words) if word.partition("=")[0] == flag)
        # Flag and value may be one word, in quotes.
        if (index := next(places, None)) is None:
            return "VALUE"
        given = words[index].partition("=")[2] or words[index + 1]
        return "VALUE" if given.startswith("-") or not given else given
