"""Scripts that let a shell complete the ``turret`` command, generated from its parser."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_FILES = "<file>"
# Stands for a value that is not a path: completion offers nothing for it.
_TEXT = "<text>"
# Stands for an adapter's name: completion asks the server of the command line (0.15 s) and offers
# nothing if none answers within a second.
_ADAPTERS = "<adapter>"
_ASKED = "adapters list --json --timeout 1"
# The pattern matches no characters that a shell would expand.
_NAMES = """sed -n 's/^    "name": "\\([a-z0-9._-]*\\)".*/\\1/p'"""
# Placeholders that the help uses for paths.
_PATHS = ("FILE", "DIR", "PATH", "FILE.svg", "CONFIG")
_OF_ADAPTERS = ("adapters", "mixes")
# Verbs whose NAME is that of a new adapter.
_NAMING = ("adapters load", "adapters fuse")


@dataclass(frozen=True, slots=True)
class _Verb:
    """What may follow a path of verbs, such as ``adapters load``."""

    path: str
    verbs: dict[str, str]
    flags: dict[str, str]
    # Keyed by flag, or by position for arguments without one.
    choices: dict[str, tuple[str, ...]]
    # Short flags, keyed by their long form.
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
    """Every verb with the verbs above it, such as ``adapters load``."""
    return [verb.path for verb in _walk(parser, "") if verb.path]


def _walk(parser: argparse.ArgumentParser, path: str) -> Iterator[_Verb]:
    below: dict[str, argparse.ArgumentParser] = {}
    helps: dict[str, str] = {}
    flags: dict[str, str] = {}
    choices: dict[str, tuple[str, ...]] = {}
    letters: dict[str, str] = {}
    places: list[str] = []
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
        elif not action.option_strings:
            is_adapter = action.dest == "name" and path not in _NAMING
            places.append(_ADAPTERS if is_adapter else _kind(action))
    choices |= {str(place): (kind,) for place, kind in enumerate(places) if kind != _TEXT}
    verbs = {name: helps.get(name, "") for name in below or helps}
    yield _Verb(path, verbs, flags, choices, letters)
    for name, child in below.items():
        yield from _walk(child, f"{path} {name}".strip())


def _kind(action: argparse.Action) -> str:
    """Whether a flag takes a path or an adapter, according to its placeholder in the help."""
    if action.dest in _OF_ADAPTERS:
        return _ADAPTERS
    shown = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    # DIR|ORG/NAME, NAME=PATH
    parts = shown.replace("=", "|").split("|")
    return _FILES if {parts[0], parts[-1]} & {*_PATHS} else _TEXT


def _values(verbs: list[_Verb]) -> str:
    """A function for bash and zsh: the ``values`` of a verb's flag or positional argument."""
    branches = "\n".join(
        "    "
        + "|".join(shlex.quote(f"{verb.path}:{name}") for name in verb.names(flag))
        + f") values={shlex.quote(' '.join(choices))} ;;"
        for verb in verbs
        for flag, choices in verb.choices.items()
    )
    return f"""\
_turret_values() {{
  values=""
  case "$1" in
{branches}
  esac
}}"""


def _bash(verbs: list[_Verb]) -> str:
    words = "\n".join(
        f"    {shlex.quote(verb.path)}) words={shlex.quote(' '.join([*verb.verbs, *verb.flags]))};;"
        for verb in verbs
    )
    paths = " ".join(shlex.quote(verb.path) for verb in verbs if verb.path)
    # Bash splits words at = and : too.
    return f"""\
# bash completion of turret; load it with: source <(turret completion bash)
_turret_adapters() {{
  local at=()
  if [[ $COMP_LINE =~ --address[=\\ ]([^ ]+) ]]; then at=(--address "${{BASH_REMATCH[1]}}"); fi
  "${{COMP_WORDS[0]}}" {_ASKED} "${{at[@]}}" 2>/dev/null </dev/null | {_NAMES}
}}
{_values(verbs)}
_turret() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} last=${{COMP_WORDS[COMP_CWORD-1]}}
  local path="" word words="" values="" known place=0 goes_on=""
  if [[ $current == = ]]; then current=""
  elif [[ $last == = ]]; then last=${{COMP_WORDS[COMP_CWORD-2]}}; fi
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    if [[ $word == [=:] ]]; then goes_on=1; continue; fi
    if [[ -n $goes_on ]]; then goes_on=""; continue; fi
    for known in {paths}; do
      if [[ $known == "${{path:+$path }}$word" ]]; then path=$known; continue 2; fi
    done
    if [[ $word == -* ]]; then _turret_values "$path:$word"; goes_on=$values
    else place=$((place + 1)); fi
  done
  _turret_values "$path:$last"
  if [[ -z $values && $current != -* ]]; then _turret_values "$path:$place"; fi
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
    # Avoid the names `path`, which zsh ties to PATH, and `words`, which holds the line.
    return f"""\
#compdef turret
# zsh completion of turret; load it with: source <(turret completion zsh)
_turret_adapters() {{
  local -a at
  if [[ $BUFFER =~ '--address[= ]([^ ]+)' ]]; then at=(--address $match[1]); fi
  ${{(Q)words[1]}} {_ASKED} $at 2>/dev/null </dev/null | {_NAMES}
}}
{_values(verbs)}
_turret() {{
  local verb="" last=${{words[CURRENT-1]}} values="" word known place=0 goes_on=""
  local -a verbs flags
  for word in "${{(@)words[2,CURRENT-1]}}"; do
    if [[ -n $goes_on ]]; then goes_on=""; continue; fi
    for known in {paths}; do
      if [[ $known == "${{verb:+$verb }}$word" ]]; then verb=$known; continue 2; fi
    done
    if [[ $word == -* ]]; then _turret_values "$verb:$word"; goes_on=$values
    else place=$((place + 1)); fi
  done
  if [[ ${{words[CURRENT]}} == --*=* ]]; then
    last=${{words[CURRENT]%%=*}}
    compset -P '*='
  fi
  _turret_values "$verb:$last"
  if [[ -z $values && ${{words[CURRENT]}} != -* ]]; then _turret_values "$verb:$place"; fi
  if [[ $values == {shlex.quote(_TEXT)} ]]; then return 1; fi
  if [[ $values == {shlex.quote(_FILES)} ]]; then _files; return; fi
  if [[ $values == {shlex.quote(_ADAPTERS)} ]]; then compadd -- $(_turret_adapters); return; fi
  if [[ -n $values ]]; then compadd -- ${{=values}}; return; fi
  case "$verb" in
{words}
  esac
  if [[ ${{words[CURRENT]}} == -* ]]; then _describe -o option flags; return; fi
  if (( $#verbs )); then _describe command verbs; return; fi
  return 1
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
        # The first argument is the number of words before this place, without flags; the others are
        # the flags that take a value.
        "function __turret_at",
        "  set -l seen 0",
        "  set -l goes_on",
        "  for word in (commandline -opc)[2..]",
        "    if set -q goes_on[1]; set goes_on",
        "    else if contains -- $word $argv[2..]; set goes_on 1",
        "    else if not string match -q -- '-*' $word; set seen (math $seen + 1); end",
        "  end",
        "  test $seen = $argv[1]",
        "end",
    ]
    for verb in verbs:
        words = verb.path.split()
        tests = [f"__fish_seen_subcommand_from {word}" for word in words]
        if verb.verbs:
            tests.append(f"not __fish_seen_subcommand_from {' '.join(verb.verbs)}")
        condition = "; and ".join(tests)
        start = f"complete -c turret{f' -n {shlex.quote(condition)}' if tests else ''}"
        for name, text in verb.verbs.items():
            lines.append(f"{start} -a {name} -d {_fish_text(text)}")
        lines += _fish_places(verb, condition)
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


def _fish_places(verb: _Verb, condition: str) -> list[str]:
    """Completions for positional arguments."""
    flags = [name for flag in verb.choices if flag in verb.flags for name in verb.names(flag)]
    lines = []
    for place, (kind, *_) in verb.choices.items():
        if place in verb.flags:
            continue
        at = f"__turret_at {len(verb.path.split()) + int(place)} {' '.join(flags)}"
        test = shlex.quote(f"{condition}; and {at}")
        offer = "-F" if kind == _FILES else "-a '(__turret_adapters)'"
        lines.append(f"complete -c turret -n {test} {offer}")
    return lines


def _fish_text(text: str) -> str:
    """A single-quoted word for fish, which has two escapes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
