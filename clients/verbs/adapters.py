"""``turret adapters``: administer a server's adapters."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from turret.clients.client import TurretClient
from turret.clients.messages.results import Adapter
from turret.clients.verbs.command import (
    adapter_parser,
    connection_parser,
    json_parser,
    print_json,
    with_client,
)
from turret.clients.verbs.flags import file_text
from turret.clients.verbs.tables import (
    mix_text,
    print_adapter,
    print_adapters,
    print_change,
    print_fusion,
    print_merge_state,
)

_COMBINATIONS = (
    "exact",
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], text: str) -> None:
    """Add the verb and its actions; ``text`` is its line in the help."""
    parser = subparsers.add_parser("adapters", help=text)
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    _add_lifecycle(actions)
    _add_transfers(actions)
    _add_combinations(actions)


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    func: Callable[[argparse.Namespace, TurretClient], None],
    *,
    named: bool = True,
    mix: bool = False,
) -> argparse.ArgumentParser:
    parents = [json_parser(), connection_parser()]
    if mix:
        parents.insert(0, adapter_parser(required=True))
    parser = actions.add_parser(name, help=text, description=text.capitalize(), parents=parents)
    if named:
        parser.add_argument("name", metavar="NAME", help="how requests name the adapter")
    parser.set_defaults(func=with_client(func))
    return parser


def _add_lifecycle(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    listing = _action(actions, "list", "list the registered adapters", _list, named=False)
    listing.add_argument("--method", metavar="METHOD", help="only adapters of this method")
    listing.add_argument(
        "--residency", choices=("disk", "host", "device"), help="only adapters in this tier"
    )
    _action(actions, "get", "show one adapter", _get)
    load = _action(actions, "load", "register a directory on the server's machine", _load)
    load.add_argument(
        "path", metavar="PATH", help="directory, relative to the server's --adapter-root"
    )
    load.add_argument("--pin", action="store_true", help="also pin the adapter")
    _add_reading(load)
    unload = _action(actions, "unload", "unregister an adapter", _unload)
    unload.add_argument("--force", action="store_true", help="abort the requests that use it")
    unload.add_argument(
        "--wait",
        type=float,
        metavar="SECONDS",
        help="how long to wait for running requests (default: 30)",
    )
    _add_expected(unload)
    _action(actions, "pin", "keep an adapter resident", _pin)
    _action(actions, "unpin", "let an adapter be evicted and unloaded", _unpin)


def _add_expected(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--expected-generation", type=int, metavar="N", help="fail if NAME has another generation"
    )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task",
        type=int,
        metavar="N",
        help="number of the task, from 0, if the files hold several",
    )
    parser.add_argument(
        "--chat-template",
        type=file_text,
        metavar="FILE",
        help="use the Jinja template in FILE instead of the adapter's own",
    )


def _add_transfers(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    upload = _action(actions, "upload", "send a directory on this machine and register it", _upload)
    upload.add_argument("directory", type=Path, metavar="DIR", help="directory in PEFT's layout")
    upload.add_argument("--pin", action="store_true", help="also pin the adapter")
    upload.add_argument(
        "--replace", action="store_true", help="make it the next generation of NAME"
    )
    _add_expected(upload)
    _add_reading(upload)
    replace = _action(
        actions,
        "replace",
        "replace an adapter with a directory, as its next generation",
        _replace,
    )
    replace.add_argument(
        "path", metavar="PATH", help="directory, relative to the server's --adapter-root"
    )
    _add_expected(replace)
    _add_reading(replace)
    export = _action(actions, "export", "write an adapter to a new directory", _export)
    export.add_argument("directory", type=Path, metavar="DIR", help="new directory on this machine")
    export.add_argument(
        "--generation",
        type=int,
        metavar="N",
        help="generation to export (default: the current one)",
    )


def _add_combinations(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    fuse = _action(actions, "fuse", "compute a new adapter from a mix", _fuse, mix=True)
    fuse.add_argument(
        "--combination",
        choices=_COMBINATIONS,
        metavar="HOW",
        help=f"one of {', '.join(_COMBINATIONS)} (default: exact)",
    )
    fuse.add_argument(
        "--rank", type=int, metavar="N", help="maximum rank, for combinations with svd"
    )
    fuse.add_argument(
        "--energy",
        type=float,
        metavar="X",
        help="instead of --rank: share of the squared singular values to keep",
    )
    fuse.add_argument(
        "--density",
        type=float,
        metavar="X",
        help="share of entries that ties, dare and magnitude_prune keep",
    )
    fuse.add_argument(
        "--majority-sign-method",
        choices=("total", "frequency"),
        help="how ties elects signs (default: total)",
    )
    fuse.add_argument(
        "--seed", type=int, metavar="N", help="seed of the dare combinations (default: 0)"
    )
    merge = _action(actions, "merge", "merge a mix into the base", _merge, named=False, mix=True)
    merge.add_argument(
        "--precision",
        choices=("auto", "nf4", "bf16"),
        default="auto",
        help="default: auto, which is nf4 if the update survives it, else bf16",
    )
    _action(actions, "unmerge", "restore the base", _unmerge, named=False)
    _action(actions, "merge-state", "show what is merged", _merge_state, named=False)


def _list(args: argparse.Namespace, client: TurretClient) -> None:
    adapters = list(
        client.adapters.list(method=args.method, residency=args.residency, timeout=args.timeout)
    )
    if args.json:
        print_json(adapters)
        return
    is_filtered = args.method is not None or args.residency is not None
    others = client.adapters.list(timeout=args.timeout) if is_filtered and not adapters else ()
    print_adapters(adapters, others=list(others), method=args.method)
    merged = client.adapters.get_merge_state(timeout=args.timeout)
    if merged.active:
        print(
            f"merged into the base: {mix_text(merged)}; `turret adapters merge-state` shows details"
        )


def _get(args: argparse.Namespace, client: TurretClient) -> None:
    adapter = client.adapters.get(args.name, timeout=args.timeout)
    print_json(adapter) if args.json else print_adapter(adapter)


def _load(args: argparse.Namespace, client: TurretClient) -> None:
    before = _registered(args, client)
    adapter = client.adapters.load(
        args.name,
        args.path,
        pinned=args.pin,
        task=args.task,
        chat_template=args.chat_template,
        timeout=args.timeout,
    )
    print_json(adapter) if args.json else print_change("loaded", adapter, before)


def _unload(args: argparse.Namespace, client: TurretClient) -> None:
    mode = "force" if args.force else "drain"
    client.adapters.unload(
        args.name,
        mode=mode,
        drain_seconds=args.wait,
        expected_generation=args.expected_generation,
        timeout=args.timeout,
    )
    print_json({"unloaded": args.name}) if args.json else print(f"unloaded {args.name}")


def _pin(args: argparse.Namespace, client: TurretClient) -> None:
    adapter = client.adapters.pin(args.name, timeout=args.timeout)
    print_json(adapter) if args.json else print(f"pinned {adapter.name}")


def _unpin(args: argparse.Namespace, client: TurretClient) -> None:
    adapter = client.adapters.unpin(args.name, timeout=args.timeout)
    print_json(adapter) if args.json else print(f"unpinned {adapter.name}")


def _upload(args: argparse.Namespace, client: TurretClient) -> None:
    before = _registered(args, client)
    adapter = client.adapters.upload(
        args.name,
        args.directory,
        pinned=args.pin,
        replace=args.replace,
        expected_generation=args.expected_generation,
        task=args.task,
        chat_template=args.chat_template,
        timeout=args.timeout,
    )
    print_json(adapter) if args.json else print_change("uploaded", adapter, before)


def _replace(args: argparse.Namespace, client: TurretClient) -> None:
    before = _registered(args, client)
    adapter = client.adapters.replace(
        args.name,
        args.path,
        expected_generation=args.expected_generation,
        task=args.task,
        chat_template=args.chat_template,
        timeout=args.timeout,
    )
    print_json(adapter) if args.json else print_change("replaced", adapter, before)


def _registered(args: argparse.Namespace, client: TurretClient) -> Adapter | None:
    """The adapter with this name before a change; None if it is not reported anyway.

    By the list: of a new name the server would show that it was asked for and not there.
    """
    if args.json:
        return None
    listed = client.adapters.list(timeout=args.timeout)
    return next((each for each in listed if each.name == args.name), None)


def _export(args: argparse.Namespace, client: TurretClient) -> None:
    adapter = client.adapters.export(
        args.name, args.directory, generation=args.generation, timeout=args.timeout
    )
    line = f"exported {adapter.name}@{adapter.generation} to {args.directory}"
    print_json(adapter) if args.json else print(line)


def _fuse(args: argparse.Namespace, client: TurretClient) -> None:
    fusion = client.adapters.fuse(
        args.name,
        args.adapters,
        combination=args.combination,
        rank=args.rank,
        energy=args.energy,
        density=args.density,
        majority_sign_method=args.majority_sign_method,
        seed=args.seed,
        timeout=args.timeout,
    )
    print_json(fusion) if args.json else print_fusion(fusion)


def _merge(args: argparse.Namespace, client: TurretClient) -> None:
    state = client.adapters.merge(args.adapters, precision=args.precision, timeout=args.timeout)
    if args.json:
        print_json(state)
        return
    print_merge_state(state)
    again = state.adapters[0].name
    print(f"every request uses it until `turret adapters unmerge`; -a {again} applies it twice")


def _unmerge(args: argparse.Namespace, client: TurretClient) -> None:
    before = client.adapters.get_merge_state(timeout=args.timeout)
    state = client.adapters.unmerge(timeout=args.timeout)
    if args.json:
        print_json(state)
    else:
        print(f"unmerged {mix_text(before)}; base generation {state.base_generation}")


def _merge_state(args: argparse.Namespace, client: TurretClient) -> None:
    state = client.adapters.get_merge_state(timeout=args.timeout)
    print_json(state) if args.json else print_merge_state(state)
