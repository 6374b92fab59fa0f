"""Scripts with which a shell completes the ``turret`` command, made from its parser."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_FILES = "<file>"
# What stands for a value that is no path: nothing is offered for it.
_TEXT = "<text>"
# What stands for an adapter's name: the server that the line is for is asked, which takes 0.15 s,
# and where none answers within a second nothing is offered.
_ADAPTERS = "<adapter>"
_ASKED = "adapters list --json --timeout 1"
# Nothing of a name is left for a shell to expand.
_NAMES = """sed -n 's/^    "name": "\\([a-z0-9._-]*\\)".*/\\1/p'"""
# What a path is called in the help.
_PATHS = ("FILE", "DIR", "PATH", "FILE.svg")
_OF_ADAPTERS = ("adapters", "mixes")


@dataclass(frozen=True, slots=True)
class _Verb:
    """What may follow a path of verbs, such as ``adapters load``."""

    path: str
    verbs: dict[str, str]
    flags: dict[str, str]
    choices: dict[str, tuple[str, ...]]
    # Of a flag with a letter for short, by the long one.
    letters: dict[str, str]

    def names(self, flag: str) -> tuple[str, ...]:
        return (flag, self.letters[flag]) if flag in self.letters else (flag,)


def script(
    parser: argparse.ArgumentParser, shell: str, offers: Mapping[str, Sequence[str]] | None = None
) -> str:
    """The script.

    Args:
        parser: With all flags of all verbs.
        shell: ``bash``, ``zsh`` or ``fish``.
        offers: Values to offer for ``VERB:--FLAG`` that the parser itself leaves open.
    """
    verbs = list(_walk(parser, ""))
    for verb in verbs:
        given = {flag: (offers or {}).get(f"{verb.path}:{flag}") for flag in verb.choices}
        verb.choices.update({flag: tuple(words) for flag, words in given.items() if words})
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](verbs)


def verb_paths(parser: argparse.ArgumentParser) -> list[str]:
    """Every verb with those that it stands below, such as ``adapters load``."""
    return [verb.path for verb in _walk(parser, "") if verb.path]


def _walk(parser: argparse.ArgumentParser, path: str) -> Iterator[_Verb]:
    below: dict[str, argparse.ArgumentParser] = {}
    helps: dict[str, str] = {}
    flags: dict[str, str] = {}
    choices: dict[str, tuple[str, ...]] = {}
    letters: dict[str, str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below = dict(action.choices)
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            continue
        if action.help == argparse.SUPPRESS:
            continue
        names = [name for name in action.option_strings if name.startswith("--")]
        for name in names:
            flags[name] = (action.help or "").partition(" (default")[0].replace("%%", "%")
            takes_value = action.nargs != 0
            letters.update((name, short) for short in action.option_strings if len(short) == 2)
            if takes_value:
                choices[name] = tuple(map(str, action.choices or (_kind(action),)))
        if not action.option_strings and action.choices:
            helps |= dict.fromkeys(map(str, action.choices), "")
    verbs = {name: helps.get(name, "") for name in below or helps}
    yield _Verb(path, verbs, flags, choices, letters)
    for name, child in below.items():
        yield from _walk(child, f"{path} {name}".strip())


def _kind(action: argparse.Action) -> str:
    """Whether a flag's value is a path or an adapter, as its name in the help says."""
    if action.dest in _OF_ADAPTERS:
        return _ADAPTERS
    shown = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    # DIR|ORG/NAME, NAME=PATH
    parts = shown.replace("=", "|").split("|")
    return _FILES if {parts[0], parts[-1]} & {*_PATHS} else _TEXT


def _values(verbs: list[_Verb]) -> str:
    """Branches of a case over verb and flag, of bash and zsh alike."""
    return "\n".join(
        "    "
        + "|".join(shlex.quote(f"{verb.path}:{name}") for name in verb.names(flag))
        + f") values={shlex.quote(' '.join(choices))} ;;"
        for verb in verbs
        for flag, choices in verb.choices.items()
    )


def _bash(verbs: list[_Verb]) -> str:
    words = "\n".join(
        f"    {shlex.quote(verb.path)}) words={shlex.quote(' '.join([*verb.verbs, *verb.flags]))};;"
        for verb in verbs
    )
    paths = " ".join(shlex.quote(verb.path) for verb in verbs if verb.path)
    # Bash cuts a line at = and : too.
    return f"""\
# bash completion of turret; load it with: source <(turret completion bash)
_turret_adapters() {{
  local at=()
  if [[ $COMP_LINE =~ --address[=\\ ]([^ ]+) ]]; then at=(--address "${{BASH_REMATCH[1]}}"); fi
  "${{COMP_WORDS[0]}}" {_ASKED} "${{at[@]}}" 2>/dev/null </dev/null | {_NAMES}
}}
_turret() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} last=${{COMP_WORDS[COMP_CWORD-1]}}
  local path="" word words="" values="" known
  if [[ $current == = ]]; then current=""
  elif [[ $last == = ]]; then last=${{COMP_WORDS[COMP_CWORD-2]}}; fi
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    for known in {paths}; do
      if [[ $known == "${{path:+$path }}$word" ]]; then path=$known; break; fi
    done
  done
  case "$path:$last" in
{_values(verbs)}
  esac
  if [[ $values == '{_TEXT}' ]]; then COMPREPLY=(); return; fi
  if [[ $values == '{_FILES}' ]]; then COMPREPLY=($(compgen -f -- "$current")); return; fi
  if [[ $values == '{_ADAPTERS}' ]]; then
    COMPREPLY=($(compgen -W "$(_turret_adapters)" -- "$current")); return
  fi
  if [[ -n $values ]]; then COMPREPLY=($(compgen -W "$values" -- "$current")); return; fi
  case "$path" in
{words}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  if [[ $current != -* && ${{#COMPREPLY[@]}} -eq 0 ]]; then
    COMPREPLY=($(compgen -f -- "$current"))
  fi
}}
complete -o filenames -F _turret turret
"""


def _zsh(verbs: list[_Verb]) -> str:
    words = "\n".join(
        f"    {shlex.quote(verb.path)})\n"
        f"      verbs=({_zsh_described(verb.verbs)})\n"
        f"      flags=({_zsh_described(verb.flags)}) ;;"
        for verb in verbs
    )
    paths = " ".join(shlex.quote(verb.path) for verb in verbs if verb.path)
    # Not `path`, which zsh ties to PATH, and not `words`, which holds the line.
    return f"""\
#compdef turret
# zsh completion of turret; load it with: source <(turret completion zsh)
_turret_adapters() {{
  local -a at
  if [[ $BUFFER =~ '--address[= ]([^ ]+)' ]]; then at=(--address $match[1]); fi
  ${{(Q)words[1]}} {_ASKED} $at 2>/dev/null </dev/null | {_NAMES}
}}
_turret() {{
  local verb="" last=${{words[CURRENT-1]}} values="" word known
  local -a verbs flags
  for word in "${{(@)words[2,CURRENT-1]}}"; do
    for known in {paths}; do
      if [[ $known == "${{verb:+$verb }}$word" ]]; then verb=$known; break; fi
    done
  done
  if [[ ${{words[CURRENT]}} == --*=* ]]; then
    last=${{words[CURRENT]%%=*}}
    compset -P '*='
  fi
  case "$verb:$last" in
{_values(verbs)}
  esac
  if [[ $values == {shlex.quote(_TEXT)} ]]; then return 1; fi
  if [[ $values == {shlex.quote(_FILES)} ]]; then _files; return; fi
  if [[ $values == {shlex.quote(_ADAPTERS)} ]]; then compadd -- $(_turret_adapters); return; fi
  if [[ -n $values ]]; then compadd -- ${{=values}}; return; fi
  case "$verb" in
{words}
  esac
  if [[ ${{words[CURRENT]}} == -* ]]; then _describe -o option flags; return; fi
  if (( $#verbs )); then _describe command verbs; return; fi
  _files
}}
if [[ $funcstack[1] == _turret ]]; then
  _turret "$@"
else
  (( ${{+functions[compdef]}} )) || {{ autoload -U compinit && compinit; }}
  compdef _turret turret
fi
"""


def _zsh_described(texts: dict[str, str]) -> str:
    return " ".join(shlex.quote(f"{name}:{text}") for name, text in texts.items())


def _fish(verbs: list[_Verb]) -> str:
    lines = [
        "# fish completion of turret; load it with: turret completion fish | source",
        "complete -c turret -f",
        "function __turret_adapters",
        "  set -l at (string match -rg -- '--address[= ](\\S+)' (commandline -p))",
        "  set -q at[1]; and set at --address $at[1]",
        "  set -l command (commandline -opc)[1]",
        "  command -q $command; or return",
        f"  $command {_ASKED} $at 2>/dev/null </dev/null | {_NAMES}",
        "end",
    ]
    for verb in verbs:
        words = verb.path.split()
        tests = [f"__fish_seen_subcommand_from {word}" for word in words]
        if verb.verbs:
            tests.append(f"not __fish_seen_subcommand_from {' '.join(verb.verbs)}")
        condition = shlex.quote("; and ".join(tests)) if tests else ""
        start = f"complete -c turret{f' -n {condition}' if condition else ''}"
        for name, text in verb.verbs.items():
            lines.append(f"{start} -a {name} -d {_fish_text(text)}")
        for flag, text in verb.flags.items():
            letter = verb.letters.get(flag, "").removeprefix("-")
            line = f"{start} -l {flag.removeprefix('--')} -d {_fish_text(text)}"
            line += f" -s {letter}" if letter else ""
            choices = verb.choices.get(flag)
            if choices == (_FILES,):
                line += " -r -F"
            elif choices == (_TEXT,):
                line += " -x"
            elif choices == (_ADAPTERS,):
                line += " -x -a '(__turret_adapters)'"
            elif choices:
                line += f" -x -a {_fish_text(' '.join(choices))}"
            lines.append(line)
    return "\n".join(lines) + "\n"


def _fish_text(text: str) -> str:
    """A single-quoted word of fish, which knows two escapes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
