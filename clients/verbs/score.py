"""``turret score``: the log probability of every token of a prompt."""

from __future__ import annotations

import argparse
import math

from rich.table import Table
from rich.text import Text

from turret.clients.client import TurretClient
from turret.clients.counted import counted
from turret.clients.messages.results import Score
from turret.clients.verbs.command import (
    adapter_parser,
    connection_parser,
    json_parser,
    print_json,
    text_argument,
    with_client,
)
from turret.clients.verbs.tables import print_table, terminal


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], text: str) -> None:
    """Add the verb; ``text`` is its line in the help."""
    parser = subparsers.add_parser(
        "score",
        help=text,
        description="Print the log probability (natural logarithm) of every token of a prompt.",
        parents=[adapter_parser(), json_parser(), connection_parser()],
    )
    parser.add_argument("prompt", metavar="PROMPT", help="text; - reads standard input")
    parser.add_argument("--top-n", type=int, default=0, metavar="N", help="alternatives per token")
    parser.add_argument(
        "--request-id", default="", metavar="ID", help="identifies the request in the server's log"
    )
    parser.set_defaults(func=with_client(_score))


def _score(args: argparse.Namespace, client: TurretClient) -> None:
    score = client.score(
        text_argument(args.prompt),
        adapters=args.adapters,
        top_n=args.top_n,
        request_id=args.request_id,
        timeout=args.timeout,
    )
    if args.json:
        print_json(score)
        return
    print_table(_table(score, with_top=args.top_n > 0))
    scored = sum(token.logprob is not None for token in score.tokens)
    if scored:
        perplexity = _perplexity(score.logprob, scored)
        terminal().print(
            f"sum {score.logprob:.4f} over {counted(scored, 'token')}, perplexity {perplexity}"
        )


def _table(score: Score, *, with_top: bool) -> Table:
    table = Table()
    table.add_column("id", justify="right")
    table.add_column("token", overflow="fold")
    table.add_column("logprob", justify="right")
    if with_top:
        table.add_column("likeliest", overflow="fold")
    for token in score.tokens:
        # Use Text, not str: a token may look like rich's markup.
        row = [
            str(token.token_id),
            Text(repr(token.text)),
            "" if token.logprob is None else f"{token.logprob:.4f}",
        ]
        if with_top:
            row.append(Text("  ".join(f"{top.text!r} {top.logprob:.3f}" for top in token.top)))
        table.add_row(*row)
    return table


def _perplexity(logprob: float, num_tokens: int) -> str:
    try:
        return f"{math.exp(-logprob / num_tokens):.4g}"
    except OverflowError:
        return "inf"
