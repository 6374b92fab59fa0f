"""The texts of a command that takes several."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from turret.clients.verbs.flags import unusable
from turret.clients.words import say


def text_parser() -> argparse.ArgumentParser:
    """``TEXT ...`` and ``--file``, as a parent parser."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="text; - reads standard input, one text per line",
    )
    parser.add_argument(
        "--file",
        type=Path,
        metavar="FILE",
        help="file with one text per line, used after the TEXT arguments",
    )
    return parser


def given_texts(args: argparse.Namespace) -> list[str]:
    """All texts of the arguments and the file, without empty lines.

    Raises:
        OSError: The file cannot be read.
        ValueError: There is none, or the file is not UTF-8.
    """
    texts: list[str] = []
    for text in args.texts:
        texts += _lines(sys.stdin.read()) if text == "-" else [text]
    if args.file is not None:
        try:
            texts += _lines(args.file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(unusable("--file", args.file, error)) from None
    if not texts:
        raise ValueError(say("NO_TEXTS"))
    return texts


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]
