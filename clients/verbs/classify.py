"""``turret classify``: a label for each of some texts."""

from __future__ import annotations

import argparse

from rich.table import Table
from rich.text import Text

from turret.clients.client import TurretClient
from turret.clients.messages.results import Classification
from turret.clients.verbs.command import (
    adapter_parser,
    connection_parser,
    json_parser,
    print_json,
    with_client,
)
from turret.clients.verbs.tables import print_table
from turret.clients.verbs.texts import given_texts, text_parser

# Maximum length of a text in the table, and number of labels beside the first.
_SHOWN_CHARS, _SHOWN_LABELS = 60, 3


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], text: str) -> None:
    """Add the verb; ``text`` is its line in the help."""
    parser = subparsers.add_parser(
        "classify",
        help=text,
        description="Label texts with an adapter that was trained to classify (SEQ_CLS).",
        parents=[text_parser(), adapter_parser(required=True), json_parser(), connection_parser()],
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="send each text as a user's message, in the chat template",
    )
    parser.add_argument(
        "--labels-only", action="store_true", help="print only the labels, one per line"
    )
    parser.add_argument(
        "--request-id", default="", metavar="ID", help="identifies the request in the server's log"
    )
    parser.set_defaults(func=with_client(_classify))


def _classify(args: argparse.Namespace, client: TurretClient) -> None:
    texts = given_texts(args)
    inputs = [[("user", text)] for text in texts] if args.chat else texts
    found = client.classify(
        inputs, adapters=args.adapters, request_id=args.request_id, timeout=args.timeout
    )
    if args.json:
        print_json(found)
        return
    if args.labels_only:
        for label in found.labels:
            print(label)
        return
    table = Table()
    table.add_column("text", overflow="fold")
    table.add_column("label", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("then")
    for text, each in zip(texts, found.classifications, strict=True):
        first, *others = _ranked(each)
        # Text and not str: a label may look like rich's markup.
        table.add_row(
            Text(text[:_SHOWN_CHARS]),
            Text(first[0]),
            first[1],
            Text("  ".join(f"{label} {number}" for label, number in others[:_SHOWN_LABELS])),
        )
    print_table(table)


def _ranked(found: Classification) -> list[tuple[str, str]]:
    """Labels with their probabilities, or numbers, the largest first."""
    ranked = sorted(found.scores, key=lambda score: score.logit, reverse=True)
    return [
        (s.label, f"{s.logit:.4g}" if s.probability is None else f"{s.probability:.1%}")
        for s in ranked
    ]
