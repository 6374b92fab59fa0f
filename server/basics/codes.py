"""Status codes of calls, shared by all protocols and the metrics, and headers of messages."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass


class Code(enum.Enum):
    """The status of an ended call; names and values are those of ``google.rpc.Code``."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


# The header of a message in an answer with channels.
#
# In gpt-oss' harmony response format by OpenAI, a message is ``<|start|>ROLE
# to=RECIPIENT<|channel|>CHANNEL<|constrain|>TYPE<|message|>TEXT`` and ends with ``<|end|>`` or
# ``<|call|>``. The recipient may follow the channel. An answer begins after the first role.


CHANNEL, MESSAGE = "<|channel|>", "<|message|>"
MARKS = ("<|start|>", CHANNEL, "<|constrain|>", MESSAGE, "<|end|>", "<|call|>")
# The marks that end a message.
ENDS = ("<|end|>", "<|call|>", "<|start|>")
FUNCTIONS = "functions."
_THOUGHTS = "analysis"
_NAME = re.compile(rf"{re.escape(CHANNEL)}\s*([A-Za-z0-9_-]+)")
_RECIPIENT = re.compile(r"(?:^|[\s>])to=([^\s<]+)")


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a message.

    Attributes:
        channel: The name of the channel; empty if there is none.
        recipient: The recipient, ``functions.NAME`` for a tool; empty for the user.
    """

    channel: str
    recipient: str

    @classmethod
    def parse(cls, text: str) -> Header:
        """Parse a header, with its marks and without ``<|message|>``."""
        channel, recipient = _NAME.search(text), _RECIPIENT.search(text)
        return cls(channel[1] if channel else "", recipient[1] if recipient else "")

    @property
    def is_thought(self) -> bool:
        """Whether the message is the model's reasoning, and not a call of a tool."""
        return self.channel == _THOUGHTS and not self.recipient.startswith(FUNCTIONS)

    @property
    def is_for_user(self) -> bool:
        """Whether the message is for the user: the answer, or text before a call."""
        return not self.is_thought and not self.recipient
