"""``turret generate`` and ``turret chat``: completion of a prompt, and a conversation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from turret.clients.client import TurretClient
from turret.clients.errors import AnswerCutError, TurretRpcError, UnavailableError
from turret.clients.fields import ArgumentValueError, check_text
from turret.clients.requests import AdapterWeight, GenerateOptions, Prompt
from turret.clients.results import Chunk
from turret.clients.verbs import command
from turret.clients.words import say
from turret.words import counted

# Options that plain text cannot show.
_JSON_ONLY = ("logprobs", "top_n", "token_ids")
_HELP = """\
/adapter NAME[@GENERATION][=WEIGHT] ...   answer with this mix from now on
/adapter                                  answer with the base model alone
/adapters                                 list the server's adapters
/system TEXT                              set the system message (none without TEXT)
/reset                                    forget the conversation
/stats                                    print usage and timing of the last answer
/quit                                     leave, as Ctrl-D does
Ctrl-C stops the answer, or leaves if there is none."""
# All control characters except tabs and line ends.
_STEERING = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - set(b"\t\n"))


_SWITCH: Mapping[str, Any] = {"action": "store_true"}
_SYSTEM: Mapping[str, Any] = {"metavar": "TEXT"}
_FLAGS: command.Flags = {
    **command.shared(command.ADAPTER, "--json", "prompt", "--request-id"),
    "--chat": command.flag("send the prompt as a user's message to the chat model", **_SWITCH),
    "--system": command.flag("system message; implies --chat", **_SYSTEM),
    "--echo": command.flag("print the prompt first", **_SWITCH),
    "--logprobs": command.flag("with --json: print log probabilities", **_SWITCH, default=None),
    "--top-n": command.flag("with --json: print N alternatives per token", type=int, metavar="N"),
    "--token-ids": command.flag("with --json: print token ids", **_SWITCH),
    "--stats": command.flag("print usage and timing to standard error", **_SWITCH),
}


def add_generate(subparsers: command.Subparsers, text: str) -> None:
    """Add ``turret generate``; ``text`` is its line in the help."""
    about = "Complete a prompt and print the answer as it arrives."
    groups = command.GENERATION_GROUPS
    command.add_verb_parser(subparsers, "generate", text, _generate, _FLAGS, groups, about)


def _generate(args: argparse.Namespace, client: TurretClient) -> None:
    options = command.generation_options(args)
    prompt = _prompt(args)
    unseen = [name for name in _JSON_ONLY if getattr(args, name)]
    if unseen and not args.json:
        raise ArgumentValueError(unseen[0], say("NEEDS_FIELD", other="--json"))
    if args.json:
        try:
            command.print_json(client.generate(prompt, timeout=args.timeout, **options))
        except AnswerCutError as error:
            command.print_json(error.completion)
            raise
        return
    last: Chunk | None = None
    try:
        with client.generate_stream(prompt, timeout=args.timeout, **options) as stream:
            for last in stream:
                _show(last.text)
    except AnswerCutError:
        _print_end(last, args.stats)
        raise
    except TurretRpcError as error:
        if last is not None:
            # Print the error on a line of its own.
            print()
        if last is None or not isinstance(error, UnavailableError):
            raise
        raise command.UnfinishedAnswerError(say("ANSWER_LOST")) from error
    _print_end(last, args.stats)


def _show(text: str) -> None:
    """Print a part of an answer; on a terminal, without the characters that steer it."""
    print(text.translate(_STEERING) if sys.stdout.isatty() else text, end="", flush=True)


def _print_end(last: Chunk | None, wants_stats: bool) -> None:
    print()
    if wants_stats and last is not None:
        print(summary(last), file=sys.stderr)


def _prompt(args: argparse.Namespace) -> Prompt:
    text = command.text_argument(args.prompt)
    if not text and (args.chat or args.system is not None):
        # A chat template would still make a prompt from an empty text, and the answer would not
        # end.
        raise ArgumentValueError(
            "prompt", say("STANDARD_INPUT_EMPTY" if args.prompt == "-" else "EMPTY")
        )
    for name, given in (("PROMPT", text), ("--system", args.system or "")):
        check_text(name, given)
    if args.system is not None:
        return [("system", args.system), ("user", text)]
    return [("user", text)] if args.chat else text


def summary(last: Chunk) -> str:
    """One line about the cost of an answer, from its last chunk."""
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


def add_chat(subparsers: command.Subparsers, text: str) -> None:
    """Add ``turret chat``; ``text`` is its line in the help."""
    flags = {
        **command.shared(command.ADAPTER),
        "--system": command.flag("system message", **_SYSTEM),
    }
    about = "Talk to the model. Type /help to list the commands."
    command.add_verb_parser(
        subparsers, "chat", text, _chat, flags, command.GENERATION_GROUPS, about
    )


def _chat(args: argparse.Namespace, client: TurretClient) -> None:
    check_text("--system", args.system or "")
    conversation = Conversation(
        client,
        options=command.generation_options(args),
        system=args.system,
        timeout=args.timeout,
    )
    model = client.get_model(timeout=args.timeout)
    conversation.select(args.adapters)
    try:
        print(f"{model.name} ({model.quantization}). /help for help.")
        while (line := input(conversation.prompt).strip()) != "/quit":
            try:
                conversation.take(line)
            except (TurretRpcError, ValueError) as error:
                if not sys.stdin.isatty():
                    # Without a terminal, nobody can retype the line.
                    raise
                command.print_error(error, args)
    except (EOFError, KeyboardInterrupt):
        # Ctrl-C and Ctrl-D are usual ways to leave. Let the shell's prompt begin on a new line.
        print()


@dataclass
class Conversation:
    """The turns so far, and the adapters for the next ones."""

    client: TurretClient
    options: GenerateOptions
    system: str | None
    timeout: float | None
    adapters: Sequence[AdapterWeight] = ()
    turns: list[tuple[str, str]] = field(default_factory=list)
    last_summary: str = "nothing yet"

    @property
    def prompt(self) -> str:
        """The prompt before the user's input, which names the mix; empty without a terminal."""
        mix = " + ".join(map(str, self.adapters)) or "base"
        return f"[{mix}] > " if sys.stdin.isatty() else ""

    def select(self, adapters: Sequence[AdapterWeight]) -> None:
        """Answer with this mix from now on.

        Raises:
            NotFoundError: The server lacks one of the adapters or aliases, or the generation.
        """
        if adapters:
            # This call looks up the names as ``generate`` does, and needs no other role.
            self.client.tokenize("a", adapters=adapters, timeout=self.timeout)
        self.adapters = adapters

    def take(self, line: str) -> None:
        """Process a line: a command, or a message to answer.

        Raises:
            TurretRpcError: The server rejected the call, failed, or cut the answer.
            ValueError: The command is invalid.
        """
        word, _, rest = line.partition(" ")
        match word:
            case "":
                return
            case "/help":
                print(_HELP)
            case "/adapter":
                self.select([AdapterWeight.parse(each) for each in rest.split()])
            case "/adapters":
                for adapter in self.client.adapters.list(timeout=self.timeout):
                    print(f"{adapter.name}@{adapter.generation}  {adapter.method}")
            case "/system":
                self.system = rest.strip() or None
            case "/reset":
                self.turns.clear()
            case "/stats":
                print(self.last_summary)
            case _ if word.startswith("/"):
                raise ValueError(say("UNKNOWN_CHAT_COMMAND", value=word))
            case _:
                self._answer(line)

    def _answer(self, message: str) -> None:
        """Stream the answer and keep both turns, or neither if the answer fails.

        The part of an interrupted answer that arrived is kept, because the user has read it.
        """
        turns = [*self.turns, ("user", message)]
        system = [] if self.system is None else [("system", self.system)]
        options: GenerateOptions = {**self.options, "adapters": self.adapters}
        parts: list[str] = []
        cut: AnswerCutError | None = None
        stream = self.client.chat_stream([*system, *turns], timeout=self.timeout, **options)
        try:
            with stream:
                for chunk in stream:
                    parts.append(chunk.text)
                    _show(chunk.text)
                    if chunk.finish_reason is not None:
                        self.last_summary = summary(chunk)
        except KeyboardInterrupt:
            self.last_summary = "interrupted"
        except AnswerCutError as error:
            cut = error
        finally:
            if parts:
                print()
        self.turns = [*turns, ("assistant", "".join(parts))]
        if cut is not None:
            raise cut
