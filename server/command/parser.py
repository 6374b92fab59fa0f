"""An argument parser whose errors have two lines: the error, and a command for help."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from turret.closest import closest
from turret.server.words import say

EXIT_USAGE = 2
# Arguments that take a text.
_TEXT_ARGUMENTS = ("prompt", "texts")
# Reasons for rejecting values that are not numbers.
_NOT_NUMBERS: Mapping[Any, str] = {int: "NOT_A_WHOLE_NUMBER", float: "NOT_A_NUMBER"}


def _named(names: Sequence[str]) -> str:
    """The long flag among the names of an argument, or the name of a positional argument."""
    return next((name for name in names if name.startswith("--")), names[0])


class _Formatter(argparse.HelpFormatter):
    """Writes ``[flags]`` in the usage for all optional flags, which the help lists below."""

    def add_usage(
        self, usage: str | None, actions: Any, groups: Any, prefix: str | None = None
    ) -> None:
        needed = {id(each) for group in groups if group.required for each in group._group_actions}
        shown = [
            each
            for each in actions
            if not each.option_strings or each.required or id(each) in needed
        ]
        plain = (argparse._HelpAction, argparse._VersionAction)
        if usage is None and any(e not in shown and not isinstance(e, plain) for e in actions):
            self._prog += " [flags]"
        super().add_usage(usage, shown, groups, prefix)


class CommandParser(argparse.ArgumentParser):
    """Suggests the closest flag, verb or choice instead of printing the usage.

    Attributes:
        verbs_below: Returns the subcommands of the verbs: name → whole command.
    """

    verbs_below: Callable[[], Mapping[str, str]] = dict
    _given: Sequence[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Forbid abbreviated flags, because new flags in later versions may make them ambiguous."""
        own = {"allow_abbrev": False, "exit_on_error": False, "formatter_class": _Formatter}
        super().__init__(*args, **{**own, **kwargs})

    def add_subparsers(self, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().add_subparsers(dest="_verb", **kwargs)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse as argparse does, but let a verb itself reject its unknown arguments."""
        self._given = list(sys.argv[1:] if args is None else args)
        # Check flags first, because argparse would report the argument after an unknown flag
        # instead.
        given = [word.partition("=") for word in self._flags()]
        for flag, equals, _ in given:
            if (action := self._option_string_actions.get(flag)) is None:
                self._refuse_flag(flag)
            if equals and action.nargs == 0:
                self.error(f"{flag}: {say('TAKES_NO_VALUE')}")
        for group in self._mutually_exclusive_groups:
            named = {f for each in group._group_actions for f in each.option_strings}
            found = list(dict.fromkeys(flag for flag, _, _ in given if flag in named))
            if len(found) > 1:
                self.error(f"{found[1]}: {say('CONFLICTS_WITH', other=found[0])}")
        # Missing arguments are reported below, so argparse must not require any. For --help, keep
        # the requirements, because the usage shows required flags.
        asks_help = not {"-h", "--help"}.isdisjoint(self._given)
        required = [] if asks_help else [each for each in self._actions if each.required]
        for action in required:
            action.required = False
        try:
            values, rest = super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            name = f"{_named(error.argument_name.split('/'))}: " if error.argument_name else ""
            self.error(f"{name}{error.message}")
        finally:
            for action in required:
                action.required = True
        missing = [one for one in required if getattr(values, one.dest) is None]
        if rest:
            if len(rest[0]) > 1 and rest[0].startswith("-"):
                # A flag and its value may be one quoted word.
                self._refuse_flag(rest[0].partition("=")[0].partition(" ")[0])
            takes_text = any(one.dest in _TEXT_ARGUMENTS for one in self._get_positional_actions())
            count, unexpected = len(rest), " ".join(rest)
            if takes_text:
                self.error(say("UNQUOTED_TEXT", count=count, values=unexpected))
            self.error(say("UNEXPECTED_ARGUMENTS", count=count, values=unexpected))
        if missing:
            names = [one.option_strings or [str(one.metavar or one.dest)] for one in missing]
            self.error("; ".join(f"{_named(each)}: {say('REQUIRED')}" for each in names))
        return values, rest

    def error(self, message: str) -> NoReturn:
        self.exit(
            EXIT_USAGE,
            f"{self.prog}: error: {message}\nrun `{self.prog} --help` for help\n",
        )

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print a text. argparse itself would ignore write errors, and so lose part of a help."""
        if file is sys.stdout:
            print(message, end="")
        else:
            super()._print_message(message, file)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Check as argparse does, but suggest the closest choice."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        meant = closest(str(value), choices)
        if action.nargs == argparse.PARSER:
            meant = self.verbs_below().get(value) or meant
            self.error(say("UNKNOWN_COMMAND", closest=meant, value=value))
        problem = say("NOT_ONE_OF", closest=meant, choices=", ".join(choices), value=value)
        raise argparse.ArgumentError(action, problem)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Convert as argparse does, but describe numbers in the words of other errors."""
        try:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        except argparse.ArgumentError:
            if (reason := _NOT_NUMBERS.get(action.type)) is None:
                raise
            raise argparse.ArgumentError(action, say(reason, value=f'"{arg_string}"')) from None

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)  # type: ignore[misc]
        except argparse.ArgumentError:
            raise argparse.ArgumentError(action, say("NEEDS_VALUE")) from None

    def _flags(self) -> Iterator[str]:
        """The long flags that were given to this verb, with values after equals signs."""
        words = itertools.takewhile(lambda word: word != "--", self._given)
        if self._subparsers is not None:
            # Flags after a verb belong to that verb.
            words = itertools.takewhile(lambda word: word.startswith("-"), words)
        for word in words:
            if word.startswith("--") and " " not in word.partition("=")[0]:
                yield word

    def _refuse_flag(self, flag: str) -> NoReturn:
        meant = closest(flag, self._option_string_actions)
        self.error(say("UNKNOWN_FLAG", closest=meant, flag=flag))
