"""``turret model inspect``: the memory that a base model takes, and how its modules are served."""

from __future__ import annotations

import argparse
import dataclasses
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

from turret.clients.verbs.command import print_json
from turret.server.command.start_lines import refuse
from turret.words import about_bytes

if TYPE_CHECKING:
    from turret.server.models.fidelity import Fidelity
    from turret.server.models.memory import Memory

_RANKS = (8, 16, 64)
# The server does not import the trainer, so the function that adds its verb is found by name.
_REPAIR = "turret.training.verbs:add_repair"
EXIT_FAILED = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], text: str) -> None:
    parser = subparsers.add_parser("model", help=text)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    inspect = verbs.add_parser(
        "inspect",
        help="show the memory that a base model takes, and which modules are quantised",
        description="Show the memory that a base model, its KV cache and adapters take. If the"
        " model's files are on this machine, show for each kind of module how many are served as"
        " stored, requantised, quantised or in 16 bits. Weights are not read. The quantisation"
        " error is shown only for a model that has been served before.",
    )
    inspect.add_argument(
        "model", metavar="DIR|ORG/NAME|FILE", type=Path, nargs="?", help="as for turret serve"
    )
    inspect.add_argument(
        "--skip-modules", action="append", default=[], metavar="MODULE", help="as for turret serve"
    )
    inspect.add_argument("--quantize-all", action="store_true", help="as for turret serve")
    inspect.add_argument("--json", action="store_true", help="print JSON, with sizes in bytes")
    inspect.set_defaults(func=_inspect)
    pkgutil.resolve_name(_REPAIR)(verbs)


def _inspect(args: argparse.Namespace) -> int:
    from turret.server.errors import TurretError
    from turret.server.models.model_source import inspect_model
    from turret.server.models.sources.check import check_model, default_cache_dir

    model: Path | None = args.model
    memory = found = None
    try:
        if _is_here(model) or args.skip_modules or args.quantize_all:
            check_model(model)
            skipped = [part for each in args.skip_modules for part in each.split(",")]
            found = inspect_model(
                model, default_cache_dir(), quantizes_all=args.quantize_all, skip_modules=skipped
            )
        if model is not None and not model.is_file():
            memory = _memory(model, found)
    except TurretError as error:
        texts = [text for _, text in error.violations] or [str(error)]
        refuse([("", text) for text in texts], is_json=False, command="turret model inspect")
        return EXIT_FAILED
    kinds = None if found is None else found.kinds()
    if args.json:
        sizes = {} if memory is None else {n: getattr(memory, n) for n in memory.__slots__}
        modules = None if kinds is None else [dataclasses.asdict(kind) for kind in kinds]
        print_json({**sizes, "modules": modules})
        return 0
    if memory is not None:
        print(*(f"{name:<26} {size:>8}" for name, size in _rows(memory).items()), sep="\n")
    if kinds:
        print(*kinds, sep="\n")
    return 0


def _is_here(model: Path | None) -> bool:
    """Whether the files with the weights are on this machine."""
    from turret.server.errors import InvalidRequestError
    from turret.server.models.sources.model_directory import cached_model, hub_model_id

    if model is None or model.is_file():
        return True
    hub_id = hub_model_id(model)
    if hub_id is None:
        return any(model.glob("*.safetensors"))
    try:
        cached_model(hub_id)
    except InvalidRequestError:
        return False
    return True


def _memory(model: Path, found: Fidelity | None) -> Memory:
    """Estimate a model's memory from its configuration and, if known, how its weights are served.

    Raises:
        InvalidRequestError: The configuration cannot be read, or is that of an unsupported model.
    """
    from turret.server.models.families import read_arch, transformers_config
    from turret.server.models.memory import memory_of
    from turret.server.models.sources.model_directory import (
        check_config,
        check_hub_model,
        hub_model_id,
        read_config,
    )

    hub_id = hub_model_id(model)
    if hub_id is None:
        config = read_config(model)
        check_config(config, model)
    else:
        config = check_hub_model(hub_id)
    arch = read_arch(transformers_config(config))
    return memory_of(arch, None if found is None else found.storage())


def _rows(memory: Memory) -> dict[str, str]:
    return {
        "base weights": about_bytes(memory.base),
        "base weights in 16 bits": about_bytes(memory.base_wide),
        "KV cache per 1,000 tokens": about_bytes(1000 * memory.kv_per_token),
        **{f"LoRA of rank {rank}": about_bytes(rank * memory.adapter_per_rank) for rank in _RANKS},
    }
