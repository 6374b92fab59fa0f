"""Order between the host and what the device does later."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def has_streams(device: torch.device) -> bool:
    """Whether a device works behind the host's back."""
    return device.type == "cuda"


@contextlib.contextmanager
def beside_steps(device: torch.device) -> Iterator[None]:
    """Give the calling thread's work a stream of its own, after all that the device has to do now.

    The work is over at the end of the block.
    """
    if not has_streams(device):
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


class UploadTurns:
    """Keeps the host from writing to pinned memory that the device has yet to copy.

    Every table of a step has two staging buffers and is loaded at most once a step
    (``StagedBuffer``), so a step may be prepared once the copies of the step before the last are
    over. Steps that sample wait for the device anyway; chunks of a long prompt do not.

    Args:
        device: Where the copies go.
    """

    def __init__(self, device: torch.device) -> None:
        # Of the step before the last, and of the last.
        self._events = [torch.cuda.Event() for _ in range(2)] if has_streams(device) else []

    def begin(self) -> None:
        """Wait until this step's staging buffers are free."""
        if self._events:
            self._events[0].synchronize()

    def end(self) -> None:
        """The current stream has been given all copies of the step."""
        if self._events:
            self._events.reverse()
            self._events[1].record(torch.cuda.current_stream())
