"""``turret generate``: complete one prompt."""

from __future__ import annotations

import argparse
import sys

from turret.clients.client import TurretClient
from turret.clients.counted import counted
from turret.clients.errors import AnswerCutError, TurretRpcError, UnavailableError
from turret.clients.messages.fields import check_text
from turret.clients.messages.requests import Prompt
from turret.clients.messages.results import Chunk
from turret.clients.verbs.command import (
    UnfinishedAnswerError,
    adapter_parser,
    connection_parser,
    json_parser,
    print_json,
    text_argument,
    with_client,
)
from turret.clients.verbs.flags import generation_options, generation_parser
from turret.clients.words import say

# Options that plain text cannot show.
_JSON_ONLY = ("logprobs", "top_n", "token_ids")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], text: str) -> None:
    """Add the verb; ``text`` is its line in the help."""
    parser = subparsers.add_parser(
        "generate",
        help=text,
        description="Complete a prompt and print the answer as it arrives.",
        parents=[adapter_parser(), generation_parser(), json_parser(), connection_parser()],
    )
    parser.add_argument("prompt", metavar="PROMPT", help="text; - reads standard input")
    parser.add_argument(
        "--chat", action="store_true", help="send the prompt as a user's message to the chat model"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message; implies --chat")
    parser.add_argument("--echo", action="store_true", help="print the prompt first")
    parser.add_argument("--logprobs", action="store_true", help="with --json: log probabilities")
    parser.add_argument("--top-n", type=int, metavar="N", help="with --json: alternatives")
    parser.add_argument("--token-ids", action="store_true", help="with --json: token ids")
    parser.add_argument(
        "--request-id", metavar="ID", help="identifies the request in the server's log"
    )
    parser.add_argument(
        "--stats", action="store_true", help="print usage and timing to standard error"
    )
    parser.set_defaults(func=with_client(_generate))


def _generate(args: argparse.Namespace, client: TurretClient) -> None:
    options = generation_options(args)
    options["adapters"] = args.adapters
    options["echo"] = args.echo
    options["request_id"] = args.request_id
    prompt = _prompt(args)
    unseen = [flag for flag in _JSON_ONLY if getattr(args, flag)]
    if unseen and not args.json:
        raise ValueError(say("FLAG_NEEDS_JSON", flag=f"--{unseen[0].replace('_', '-')}"))
    if args.json:
        options["logprobs"] = args.logprobs or None
        options["top_n"] = args.top_n
        options["token_ids"] = args.token_ids
        try:
            print_json(client.generate(prompt, timeout=args.timeout, **options))
        except AnswerCutError as error:
            print_json(error.completion)
            raise
        return
    last: Chunk | None = None
    try:
        with client.generate_stream(prompt, timeout=args.timeout, **options) as stream:
            for last in stream:
                print(last.text, end="", flush=True)
    except AnswerCutError:
        _print_end(last, args.stats)
        raise
    except TurretRpcError as error:
        if last is not None:
            # Print the error on a line of its own.
            print()
        if last is None or not isinstance(error, UnavailableError):
            raise
        raise UnfinishedAnswerError(say("ANSWER_LOST")) from error
    _print_end(last, args.stats)


def _print_end(last: Chunk | None, wants_stats: bool) -> None:
    print()
    if wants_stats and last is not None:
        print(summary(last), file=sys.stderr)


def _prompt(args: argparse.Namespace) -> Prompt:
    text = text_argument(args.prompt)
    if not text and (args.chat or args.system is not None):
        # A chat template would still turn it into a prompt, and the answer would not end.
        raise ValueError(say("STANDARD_INPUT_EMPTY" if args.prompt == "-" else "PROMPT_EMPTY"))
    for name, given in (("PROMPT", text), ("--system", args.system or "")):
        check_text(name, given)
    if args.system is not None:
        return [("system", args.system), ("user", text)]
    return [("user", text)] if args.chat else text


def summary(last: Chunk) -> str:
    """One line on what an answer took, from its last chunk."""
    parts = [last.finish_reason or "unfinished"]
    if last.usage is not None:
        usage = last.usage
        parts.append(
            f"{counted(usage.prompt_tokens, 'prompt token')} ({usage.cached_tokens} cached), "
            f"{usage.completion_tokens} generated"
        )
    if last.timing is not None:
        timing = last.timing
        parts.append(
            f"queued {timing.queue:.3f} s, first token after {timing.ttft:.3f} s, "
            f"total {timing.total:.3f} s"
        )
    for use in last.adapters_used:
        loaded = f", loaded in {use.load_ms:.0f} ms" if use.cold_start else ""
        parts.append(f"{use.name}@{use.generation}={use.weight:g}{loaded}")
    return "; ".join(parts)
