"""``turret embed``: a vector for each of some texts."""

from __future__ import annotations

import argparse
import json
import math

from rich.table import Table
from rich.text import Text

from turret.clients.client import TurretClient
from turret.clients.messages.head_results import Embeddings
from turret.clients.messages.requests import POOLINGS
from turret.clients.verbs.command import (
    adapter_parser,
    connection_parser,
    json_parser,
    print_json,
    with_client,
)
from turret.clients.verbs.tables import terminal
from turret.clients.verbs.texts import given_texts, text_parser

# Characters of a text in the table.
_SHOWN_CHARS = 40


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "embed",
        help="turn texts into vectors",
        description="Print the vector of each text, a JSON array a line.",
        parents=[text_parser(), adapter_parser(), json_parser(), connection_parser()],
    )
    parser.add_argument(
        "--pooling", choices=sorted(POOLINGS), help="which final states count (default: last)"
    )
    parser.add_argument(
        "--dimensions", type=int, metavar="N", help="keep the first N numbers (default: all)"
    )
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="divide each vector by its length (default: yes)",
    )
    parser.add_argument(
        "--similarity", action="store_true", help="print the cosine of every two texts instead"
    )
    parser.add_argument(
        "--request-id", default="", metavar="ID", help="names the request in the server's log"
    )
    parser.set_defaults(func=with_client(_embed))


def _embed(args: argparse.Namespace, client: TurretClient) -> None:
    texts = given_texts(args)
    found = client.embed(
        texts,
        adapters=args.adapters,
        pooling=args.pooling,
        normalize=args.normalize,
        dimensions=args.dimensions,
        request_id=args.request_id,
        timeout=args.timeout,
    )
    if args.similarity:
        terminal().print(_table(texts, found))
    elif args.json:
        print_json(found)
    else:
        for vector in found.vectors:
            # Nine digits tell a number of single precision from every other.
            print(json.dumps([float(f"{value:.9g}") for value in vector]))


def _table(texts: list[str], found: Embeddings) -> Table:
    table = Table()
    table.add_column("", justify="right")
    table.add_column("text")
    for number in range(len(texts)):
        table.add_column(str(number + 1), justify="right")
    for number, (text, vector) in enumerate(zip(texts, found.vectors, strict=True), 1):
        cosines = (f"{_cosine(vector, other):.3f}" for other in found.vectors)
        # Text and not str: it may look like rich's markup.
        table.add_row(str(number), Text(text[:_SHOWN_CHARS]), *cosines)
    return table


def _cosine(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    lengths = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0
