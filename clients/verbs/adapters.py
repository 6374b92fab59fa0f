"""``turret adapters``: administer a server's adapters."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from turret.clients.client import TurretClient
from turret.clients.results import MergeState
from turret.clients.verbs import command, tables

_COUNT = {"type": int, "metavar": "N"}
_SHARE = {"type": float, "metavar": "X"}
# Destinations have the names of the arguments of the Python client.
_FLAGS: command.Flags = {
    "name": command.flag("the adapter's name in requests", metavar="NAME"),
    "path": command.flag(
        "directory below the server's --adapter-root, or a path that starts with hub:,"
        " s3:// or oci://",
        metavar="PATH",
    ),
    "targets": command.flag(
        "generation that the alias stands for, NAME[@GENERATION][=WEIGHT]; requests are split"
        " between several in proportion to the weights",
        type=command.adapter_weight,
        nargs="+",
        metavar="TARGET",
    ),
    "--method": command.flag("only adapters of this method", metavar="METHOD"),
    "--residency": command.flag("only adapters in this tier", choices=("disk", "host", "device")),
    "--pin": command.flag("pin the adapter as well", dest="pinned", action="store_true"),
    "--replace": command.flag("make the upload the next generation of NAME", action="store_true"),
    "--task": command.flag("number of the task, from 0, if the files hold several", **_COUNT),
    "--chat-template": command.flag(
        "use the Jinja template in FILE instead of the adapter's own",
        type=command.file_text,
        metavar="FILE",
    ),
    "--force": command.flag(
        "abort the requests that use the adapter",
        dest="mode",
        action="store_const",
        const="force",
        default="drain",
    ),
    "--wait": command.flag(
        "how long to wait for running requests (default: 30)",
        dest="drain_seconds",
        type=float,
        metavar="SECONDS",
    ),
    "--expected-generation": command.flag(
        "fail if the current generation of NAME is not N", **_COUNT
    ),
    "--to": command.flag(
        "a kept generation (default: the one before the current one)",
        type=int,
        dest="generation",
        metavar="GENERATION",
    ),
    "--generation": command.flag("generation to export (default: the current one)", **_COUNT),
    "--combination": command.flag(
        "exact, linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune, or one of"
        " the last four followed by _svd (default: exact)",
        metavar="HOW",
    ),
    "--rank": command.flag("maximum rank, for combinations with svd", **_COUNT),
    "--energy": command.flag(
        "instead of --rank: share of the squared singular values to keep", **_SHARE
    ),
    "--density": command.flag(
        "share of entries that ties, dare and magnitude_prune keep", **_SHARE
    ),
    "--majority-sign-method": command.flag(
        "how ties elects signs (default: total)", choices=("total", "frequency")
    ),
    "--seed": command.flag("seed of the dare combinations (default: 0)", **_COUNT),
    "--precision": command.flag(
        "precision of the merged weights (default: auto, which uses nf4 if the update survives"
        " rounding, else bf16)",
        choices=("auto", "nf4", "bf16"),
        default="auto",
    ),
}
_EXPECTED = "--expected-generation"
_READING = ("--task", "--chat-template")
_FUSING = ("--combination", "--rank", "--energy", "--density", "--majority-sign-method", "--seed")


def add_adapters(subparsers: command.Subparsers, text: str) -> None:
    """Add the verb and its actions; ``text`` is its line in the help."""
    parser = subparsers.add_parser("adapters", help=text)
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def add(name: str, text: str, *flags: str, directory: str = "", mix: bool = False) -> None:
        table = {**command.shared("--json"), **{flag: _FLAGS[flag] for flag in flags}}
        if mix:
            table |= command.REQUIRED_ADAPTER
        run = _list if name == "list" else _run
        action = command.add_verb_parser(actions, name, text, run, table)
        if directory:
            action.add_argument("directory", type=Path, metavar="DIR", help=directory)
        action.set_defaults(action=name)

    add("list", "list the registered adapters", "--method", "--residency")
    add("get", "show one adapter", "name")
    text = "load an adapter from the server's machine or a remote source"
    add("load", text, "name", "path", "--pin", *_READING)
    add("unload", "unregister an adapter", "name", "--force", "--wait", _EXPECTED)
    add("pin", "keep an adapter in host memory", "name")
    add("unpin", "let an adapter be evicted and unloaded", "name")
    text = "upload an adapter from this machine and load it"
    layout = "directory in PEFT's layout"
    add("upload", text, "name", "--pin", "--replace", _EXPECTED, *_READING, directory=layout)
    text = "replace an adapter with another, as its next generation"
    add("replace", text, "name", "path", _EXPECTED, *_READING)
    add("rollback", "serve a kept generation again", "name", "--to", _EXPECTED)
    add("alias", "make a name stand for generations of adapters", "name", "targets")
    add("unalias", "delete an alias", "name")
    add("aliases", "list the aliases")
    place = "new directory on this machine"
    add("export", "write an adapter to a new directory", "name", "--generation", directory=place)
    add("fuse", "compute a new adapter from a mix", "name", *_FUSING, mix=True)
    add("merge", "merge a mix into the base", "--precision", mix=True)
    add("unmerge", "restore the base")
    add("merge-state", "show what is merged")


def _run(args: argparse.Namespace, client: TurretClient) -> None:
    """Call the client's method for the action, and print what it returns."""
    action: str = args.action
    result = command.call_with_flags(getattr(client.adapters, _METHODS.get(action, action)), args)
    if action in _DONE:
        result = {_DONE[action]: args.name}
    command.print_json(result) if args.json else _SHOWN[action](result, args)


# Methods whose names differ from those of their actions, and results of methods that return
# nothing.
_METHODS = {
    "alias": "set_alias",
    "unalias": "delete_alias",
    "aliases": "list_aliases",
    "merge-state": "get_merge_state",
}
_DONE = {"unload": "unloaded", "unalias": "deleted"}
# The functions that print an action's result for people.
_SHOWN: Mapping[str, Callable[[Any, argparse.Namespace], None]] = {
    "get": lambda adapter, _: tables.print_adapter(adapter),
    "load": lambda adapter, _: tables.print_change("loaded", adapter),
    "upload": lambda adapter, _: tables.print_change("uploaded", adapter),
    "replace": lambda adapter, _: tables.print_change("replaced", adapter),
    "pin": lambda adapter, _: print(f"pinned {adapter.name}"),
    "unpin": lambda adapter, _: print(f"unpinned {adapter.name}"),
    "rollback": lambda adapter, _: print(f"{adapter.name}@{adapter.generation} is served now"),
    "unload": lambda _, args: print(f"unloaded {args.name}"),
    "export": lambda adapter, args: print(
        f"exported {adapter.name}@{adapter.generation} to {args.directory}"
    ),
    "fuse": lambda fusion, _: tables.print_fusion(fusion),
    "merge": lambda state, _: _print_merge(state),
    "unmerge": lambda state, _: print(f"unmerged; base generation {state.base_generation}"),
    "merge-state": lambda state, _: tables.print_merge_state(state),
    "alias": lambda alias, _: print(tables.alias_text(alias)),
    "unalias": lambda _, args: print(f"deleted alias {args.name}"),
    "aliases": lambda aliases, _: print("\n".join(map(tables.alias_text, aliases)) or "no aliases"),
}


def _list(args: argparse.Namespace, client: TurretClient) -> None:
    adapters = list(command.call_with_flags(client.adapters.list, args))
    if args.json:
        command.print_json(adapters)
        return
    if adapters:
        tables.print_adapters(adapters)
    else:
        print("no adapter matches; `turret adapters load NAME PATH` registers one")
    merged = client.adapters.get_merge_state(timeout=args.timeout)
    if merged.active:
        print(
            f"merged into the base: {tables.mix_text(merged)};"
            " `turret adapters merge-state` shows details"
        )


def _print_merge(state: MergeState) -> None:
    tables.print_merge_state(state)
    print("every request uses it until `turret adapters unmerge`; do not name it with -a as well")
