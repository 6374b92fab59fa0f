"""The flags that ``turret train``'s verbs share, and what is said of them in their own names."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from turret.server.basics.hub_id import HubId
from turret.training.settings.key_names import ELSEWHERE, all_keys, meant_key

# A server beside it then comes first, and training takes what that leaves.
_NICENESS = 5
_NICEST = 19
# Short flags for the keys that are changed most.
_FLAGS = {
    "--model": ("base.model", "DIR|ORG/NAME"),
    "--method": ("method.name", "NAME"),
    "--rank": ("method.rank", "N"),
    "--train": ("data.train", "FILE"),
    "--output": ("run.output", "DIR"),
    "--steps": ("run.steps", "N"),
    "--seed": ("run.seed", "N"),
    "--learning-rate": ("optimizer.learning_rate", "RATE"),
}
# Flags that take paths relative to the working directory. In the file and with --set, paths are
# relative to the config file.
_PATHS = {
    "--model": "base model",
    "--train": "JSONL file of examples",
    "--output": "where the run goes",
}


def config_parser(*left_out: str) -> argparse.ArgumentParser:
    """A parent for the verbs that read a config.

    Args:
        left_out: Flags that the verb has no use for.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="TOML file (turret train init)")
    parser.add_argument(
        "--set",
        action="append",
        type=_override,
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="override a key, paths as in the file, from its folder; repeat for more",
    )
    for flag, (key, metavar) in _FLAGS.items():
        if flag not in left_out:
            what = f"--set {key}={metavar}"
            if flag in _PATHS:
                what = f"{_PATHS[flag]}, from here: {key}"
            parser.add_argument(flag, metavar=metavar, help=what)
    parser.add_argument(
        "--threads",
        type=_threads,
        metavar="N",
        help="threads that compute (default: OMP_NUM_THREADS, else the processors that affinity and"
        " the container's quota allow)",
    )
    parser.add_argument(
        "--nice",
        type=_niceness,
        default=_NICENESS,
        metavar="N",
        help="how far to step back for others, a server above all; 0 to 19 (default: %(default)s)",
    )
    return parser


def known_otherwise() -> Mapping[str, str]:
    """What may be typed for a key that has no flag, or another one, and what sets it here."""
    names = {key.rpartition(".")[2]: key for key in all_keys()}
    del names["name"]
    said = {f"--{name.replace('_', '-')}": key for name, key in (names | ELSEWHERE).items()}
    flags = {key: flag for flag, (key, _) in _FLAGS.items()}
    return {
        word: f"{flags[key]} VALUE" if key in flags else f"--set {key}=VALUE"
        for word, key in said.items()
        if word not in _FLAGS
    }


def overrides(args: argparse.Namespace) -> list[str]:
    """``TABLE.KEY=VALUE`` of every flag that was given; those with names of their own win."""
    found = list(args.set)
    for flag, key, value in _given(args):
        found.append(f"{key}={_from_here(flag, value, args.config.parent)}")
    return found


def in_own_words(args: argparse.Namespace, said: str) -> str:
    """What is said of a key, said of the flag that set it: who typed a flag knows no key."""
    # Said by the server's own check, which knows no config.
    said = f"base.{said}" if said.startswith("model: ") else said
    if hasattr(args, "ranks") and said.startswith("method.rank: "):
        return said.replace("method.rank", "--ranks", 1)
    for flag, key, _ in _given(args):
        if said.startswith(f"{key}: "):
            return said.replace(key, flag, 1)
    for text in getattr(args, "set", ()):
        if said.startswith(f"{text.partition('=')[0].strip()}: "):
            return f"--set {said}"
    return said


def _given(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(flag, key, value)."""
    values = {flag: getattr(args, flag[2:].replace("-", "_"), None) for flag in _FLAGS}
    return [(f, _FLAGS[f][0], value) for f, value in values.items() if value is not None]


def _from_here(flag: str, value: str, folder: Path) -> str:
    """A flag's value, a path as the file may have it: who types a path stands somewhere.

    A model that is no path here is one that the file's folder has, or one of the hub.
    """
    if flag == "--model" and not Path(value).exists():
        is_path = not (folder / value).exists() and HubId.find(value) is None
    else:
        is_path = flag in _PATHS
    return str(Path(value).absolute()) if is_path else value


def _override(text: str) -> str:
    """``--set``'s value, with a key that exists."""
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not TABLE.KEY=VALUE")
    if name not in (keys := all_keys()):
        meant = meant_key(name)
        step = f"did you mean {meant}={value}?" if meant else _there_are(name, keys)
        raise argparse.ArgumentTypeError(f"there is no key {name!r:.80}; {step}")
    return text


def _there_are(name: str, keys: list[str]) -> str:
    table = name.partition(".")[0]
    inside = [key for key in keys if key.startswith(f"{table}.")]
    if inside:
        return f"there are {', '.join(inside)}"
    return f"tables are {', '.join(dict.fromkeys(key.partition('.')[0] for key in keys))}"


def _threads(text: str) -> int:
    return _whole(text, "must be a whole number from 1 on", range(1, 1 << 16))


def _niceness(text: str) -> int:
    return _whole(text, f"must be 0 to {_NICEST}", range(_NICEST + 1))


def _whole(text: str, problem: str, among: range) -> int:
    if not text.isdecimal() or int(text) not in among:
        raise argparse.ArgumentTypeError(f"{problem}, not {text!r:.40}")
    return int(text)
