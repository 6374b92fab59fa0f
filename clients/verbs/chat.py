"""``turret chat``: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field

from turret.clients.client import TurretClient
from turret.clients.errors import AnswerCutError, NotFoundError, TurretRpcError
from turret.clients.messages.fields import check_text
from turret.clients.messages.mix import AdapterWeight
from turret.clients.messages.requests import GenerateOptions
from turret.clients.verbs.command import (
    adapter_parser,
    connection_parser,
    print_error,
    with_client,
)
from turret.clients.verbs.flags import generation_options, generation_parser
from turret.clients.verbs.generate import summary
from turret.clients.verbs.hints import HINTS
from turret.clients.words import say

_HELP = """\
/adapter NAME[@GENERATION][=WEIGHT] ...   answer with this mix from now on
/adapter                                  answer with the base model alone
/adapters                                 list what the server has
/system TEXT                              set the system message (none without TEXT)
/reset                                    forget the conversation
/stats                                    what the last answer took
/quit                                     leave, as Ctrl-D does
Ctrl-C stops the answer, or leaves if there is none."""
_IN_CHAT = {**HINTS, "ADAPTER_NOT_FOUND": "/adapters lists the registered adapters"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], text: str) -> None:
    """Add the verb; ``text`` is its line in the help."""
    parser = subparsers.add_parser(
        "chat",
        help=text,
        description="Talk to the model. Type /help to list the commands.",
        parents=[adapter_parser(), generation_parser(), connection_parser()],
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.set_defaults(func=with_client(_chat))


def _chat(args: argparse.Namespace, client: TurretClient) -> None:
    check_text("--system", args.system or "")
    conversation = Conversation(
        client,
        options=generation_options(args),
        adapters=args.adapters,
        system=args.system,
        timeout=args.timeout,
    )
    model = client.get_model(timeout=args.timeout)
    conversation.check_adapters()
    try:
        print(f"{model.name} ({model.quantization}). /help for help.")
        while (line := input(conversation.prompt).strip()) != "/quit":
            try:
                conversation.take(line)
            except (TurretRpcError, ValueError) as error:
                if not sys.stdin.isatty():
                    # Without a terminal, nobody can retype the line.
                    raise
                print_error(error, args, _IN_CHAT)
    except (EOFError, KeyboardInterrupt):
        # Both are usual ways to leave. The shell's prompt needs a line of its own.
        print()


@dataclass
class Conversation:
    """The turns so far, and the adapters for the next ones."""

    client: TurretClient
    options: GenerateOptions
    adapters: list[AdapterWeight]
    system: str | None
    timeout: float | None
    turns: list[tuple[str, str]] = field(default_factory=list)
    last_summary: str = "nothing yet"

    @property
    def prompt(self) -> str:
        """The prompt before the user's input, which names the mix. Empty if nobody reads it."""
        mix = " + ".join(map(str, self.adapters)) or "base"
        return f"[{mix}] > " if sys.stdin.isatty() else ""

    def check_adapters(self) -> None:
        """Ask the server for the adapters that are to answer.

        Raises:
            NotFoundError: One of them is not there.
        """
        for member in self.adapters:
            try:
                self.client.adapters.get(member.name, timeout=self.timeout)
            except NotFoundError:
                raise
            except TurretRpcError:
                # The token may not allow this call; then the answers will report unknown names.
                return

    def take(self, line: str) -> None:
        """Act on a line: a command, or a message to answer.

        Raises:
            TurretRpcError: The server refused or failed, or ended the answer before its end.
            ValueError: The command makes no sense.
        """
        command, _, rest = line.partition(" ")
        match command:
            case "":
                return
            case "/help":
                print(_HELP)
            case "/adapter":
                before = self.adapters
                self.adapters = [AdapterWeight.parse(word) for word in rest.split()]
                try:
                    self.check_adapters()
                except NotFoundError:
                    self.adapters = before
                    raise
            case "/adapters":
                for adapter in self.client.adapters.list(timeout=self.timeout):
                    print(f"{adapter.name}@{adapter.generation}  {adapter.method}")
            case "/system":
                self.system = rest.strip() or None
            case "/reset":
                self.turns.clear()
            case "/stats":
                print(self.last_summary)
            case _ if command.startswith("/"):
                raise ValueError(say("UNKNOWN_CHAT_COMMAND", value=command))
            case _:
                self._answer(line)

    def _answer(self, message: str) -> None:
        """Stream the answer and remember both turns; a failed one leaves no trace.

        An interrupted answer counts as far as it went: the user has read it.
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
                    print(chunk.text, end="", flush=True)
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
