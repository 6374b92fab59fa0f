"""``turret model inspect``: what a base model will take, before it is downloaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from turret.clients.verbs.command import print_json
from turret.server.command.start_lines import refuse
from turret.words import about_bytes

_RANKS = (8, 16, 64)
EXIT_FAILED = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], text: str) -> None:
    parser = subparsers.add_parser("model", help=text)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    inspect = verbs.add_parser(
        "inspect",
        help="show the memory that a base model takes",
        description="Show the memory that a base model, its KV cache and adapters take. Reads only"
        " the model's config.json.",
    )
    inspect.add_argument("model", metavar="DIR|ORG/NAME", type=Path, help="as for turret serve")
    inspect.add_argument("--json", action="store_true", help="print JSON, with sizes in bytes")
    inspect.set_defaults(func=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from transformers import AutoConfig

    from turret.server.errors import TurretError
    from turret.server.models.families import read_arch
    from turret.server.models.memory import memory_of
    from turret.server.models.sources.model_directory import (
        check_config,
        check_hub_model,
        checked_config,
        hub_model_id,
        read_config,
    )

    try:
        hub_id = hub_model_id(args.model)
        if hub_id is None:
            config = read_config(args.model)
            check_config(config, args.model)
        else:
            check_hub_model(hub_id)
            config = checked_config(hub_id)
        found = memory_of(read_arch(AutoConfig.for_model(**config)))
    except TurretError as error:
        texts = [text for _, text in error.violations] or [str(error)]
        refuse([("", text) for text in texts], is_json=False, command="turret model inspect")
        return EXIT_FAILED
    if args.json:
        print_json({name: getattr(found, name) for name in found.__slots__})
        return 0
    rows = {
        "base weights": about_bytes(found.base),
        "base weights in 16 bits": about_bytes(found.base_wide),
        "KV cache per 1,000 tokens": about_bytes(1000 * found.kv_per_token),
        **{f"LoRA of rank {rank}": about_bytes(rank * found.adapter_per_rank) for rank in _RANKS},
    }
    for name, size in rows.items():
        print(f"{name:<26} {size:>8}")
    return 0
