"""``turret embed``: a vector for each of some texts."""

from __future__ import annotations

import argparse
import json
import math

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from turret.clients.client import TurretClient
from turret.clients.verbs.command import (
    adapter_parser,
    connection_parser,
    json_parser,
    print_json,
    with_client,
)
from turret.clients.verbs.tables import terminal
from turret.clients.verbs.texts import given_texts, text_parser

# Maximum length of a text in the table, and the length shown however narrow the table is.
_SHOWN_CHARS, _FEWEST_CHARS = 40, 4


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], text: str) -> None:
    """Add the verb; ``text`` is its line in the help."""
    parser = subparsers.add_parser(
        "embed",
        help=text,
        description="Print the vector of each text, one JSON array per line.",
        parents=[text_parser(), adapter_parser(), json_parser(), connection_parser()],
    )
    parser.add_argument(
        "--pooling", choices=("last", "mean"), help="final states to use (default: last)"
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
        "--similarity",
        action="store_true",
        help="print the cosine of each pair of texts instead; with --json, one list per text",
    )
    parser.add_argument(
        "--request-id", default="", metavar="ID", help="identifies the request in the server's log"
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
        cosines = [[_cosine(one, other) for other in found.vectors] for one in found.vectors]
        print_json(cosines) if args.json else _print_cosines(texts, cosines)
    elif args.json:
        print_json(found)
    else:
        for vector in found.vectors:
            # Nine significant digits identify every single-precision number.
            print(json.dumps([float(f"{value:.9g}") for value in vector]))


def _print_cosines(texts: list[str], cosines: list[list[float]]) -> None:
    """A table as wide as the terminal, with the columns that it has no room for below it."""
    console = terminal()
    rows = [[f"{cosine:.3f}" for cosine in row] for row in cosines]
    shown = [" ".join(text[:_SHOWN_CHARS].split()) for text in texts]
    number, figure = len(str(len(texts))), max(len(cell) for row in rows for cell in row)
    # Each column has a border and a space on both sides.
    spare = console.width - 1 - (number + 3)
    longest = max(_FEWEST_CHARS, *map(cell_len, shown))
    text = min(longest, max(_FEWEST_CHARS, spare // 3, spare - 3 - len(texts) * (figure + 3)))
    columns = max(1, (spare - text - 3) // (figure + 3))
    for start in range(0, len(texts), columns):
        table = Table()
        table.add_column("", justify="right")
        # A cut text is only a reminder; the number identifies the input.
        table.add_column("text", no_wrap=True, width=text)
        end = min(start + columns, len(texts))
        for other in range(start, end):
            table.add_column(str(other + 1), justify="right", min_width=figure)
        for index, row in enumerate(rows):
            # Text and not str: it may look like rich's markup.
            table.add_row(str(index + 1), Text(shown[index]), *row[start:end])
        console.print(table)
    if columns < len(texts):
        print("--json prints them as one matrix")


def _cosine(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    lengths = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0
