"""``turret score``, ``classify`` and ``embed``: the model's results for given texts."""

from __future__ import annotations

import argparse
import itertools
import json
import math

from turret.clients.client import TurretClient
from turret.clients.evaluate import perplexity
from turret.clients.results import Classification
from turret.clients.verbs import command
from turret.clients.verbs.tables import print_cells, terminal
from turret.words import counted

# Maximum length of a text in the table of labels, and the number of labels shown after the first.
_SHOWN_CHARS, _SHOWN_LABELS = 60, 3


def add_score(subparsers: command.Subparsers, text: str) -> None:
    """Add ``turret score``; ``text`` is its line in the help."""
    about = "Print the log probability (natural logarithm) of every token of a prompt."
    flags: command.Flags = {
        **command.shared(command.ADAPTER, "--json", "prompt", "--request-id"),
        "--top-n": command.flag("print N alternatives per token", type=int, default=0, metavar="N"),
    }
    command.add_verb_parser(subparsers, "score", text, _score, flags, description=about)


def _score(args: argparse.Namespace, client: TurretClient) -> None:
    score = command.call_with_flags(client.score, args, prompt=command.text_argument(args.prompt))
    if args.json:
        command.print_json(score)
        return
    columns = {"id": "number", "token": "text", "logprob": "number"}
    if args.top_n > 0:
        columns["likeliest"] = "text"
    rows = (
        (
            str(token.token_id),
            repr(token.text),
            "" if token.logprob is None else f"{token.logprob:.4f}",
            "  ".join(f"{top.text!r} {top.logprob:.3f}" for top in token.top),
        )
        for token in score.tokens
    )
    print_cells(columns, (row[: len(columns)] for row in rows))
    scored = sum(token.logprob is not None for token in score.tokens)
    if scored:
        terminal().print(
            f"sum {score.logprob:.4f} over {counted(scored, 'token')},"
            f" perplexity {perplexity([(score.logprob, scored)]):.4g}"
        )


def add_classify(subparsers: command.Subparsers, text: str) -> None:
    """Add ``turret classify``; ``text`` is its line in the help."""
    about = "Label texts with an adapter that was trained to classify (SEQ_CLS)."
    flags: command.Flags = {
        **command.shared("texts", "--file", "--json", "--request-id"),
        **command.REQUIRED_ADAPTER,
        "--chat": command.flag(
            "send each text as a user's message, in the chat template", action="store_true"
        ),
        "--labels-only": command.flag("print only the labels, one per line", action="store_true"),
    }
    command.add_verb_parser(subparsers, "classify", text, _classify, flags, description=about)


def _classify(args: argparse.Namespace, client: TurretClient) -> None:
    texts = command.given_texts(args)
    inputs = [[("user", text)] for text in texts] if args.chat else texts
    found = command.call_with_flags(client.classify, args, inputs=inputs)
    if args.json:
        command.print_json(found)
    elif args.labels_only:
        print(*found.labels, sep="\n")
    else:
        columns = {"text": "text", "label": "text", "": "number", "then": "text"}
        rows = (
            (text[:_SHOWN_CHARS], *_ranked(each))
            for text, each in zip(texts, found.classifications, strict=True)
        )
        print_cells(columns, rows)


def _ranked(found: Classification) -> tuple[str, str, str]:
    """The first label, its probability or number, and the next ones."""
    ranked = sorted(found.scores, key=lambda score: score.logit, reverse=True)
    numbers = [
        f"{s.logit:.4g}" if s.probability is None else f"{s.probability:.1%}" for s in ranked
    ]
    others = zip(ranked[1 : _SHOWN_LABELS + 1], numbers[1:], strict=False)
    return ranked[0].label, numbers[0], "  ".join(f"{s.label} {number}" for s, number in others)


def add_embed(subparsers: command.Subparsers, text: str) -> None:
    """Add ``turret embed``; ``text`` is its line in the help."""
    about = "Print the vector of each text, one JSON array per line."
    flags: command.Flags = {
        **command.shared("texts", "--file", command.ADAPTER, "--json", "--request-id"),
        "--pooling": command.flag("final states to pool (default: last)", choices=("last", "mean")),
        "--dimensions": command.flag(
            "keep the first N numbers (default: all)", type=int, metavar="N"
        ),
        "--normalize": command.flag(
            "divide each vector by its length (default: yes)",
            action=argparse.BooleanOptionalAction,
            default=None,
        ),
        "--similarity": command.flag(
            "print the cosine of each pair of texts instead; with --json, one list per text",
            action="store_true",
        ),
    }
    command.add_verb_parser(subparsers, "embed", text, _embed, flags, description=about)


def _embed(args: argparse.Namespace, client: TurretClient) -> None:
    texts = command.given_texts(args)
    found = command.call_with_flags(client.embed, args, inputs=texts)
    if args.similarity:
        cosines = [[_cosine(one, other) for other in found.vectors] for one in found.vectors]
        command.print_json(cosines) if args.json else _print_cosines(texts, cosines)
    elif args.json:
        command.print_json(found)
    else:
        for vector in found.vectors:
            # Nine significant digits identify every single-precision number.
            print(json.dumps([float(f"{value:.9g}") for value in vector]))


def _print_cosines(texts: list[str], cosines: list[list[float]]) -> None:
    pairs = itertools.combinations(range(len(texts)), 2)
    rows = ((f"{cosines[a][b]:.3f}", texts[a], texts[b]) for a, b in pairs)
    print_cells({"cosine": "number", "text": "text", "other text": "text"}, rows)


def _cosine(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    lengths = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0
