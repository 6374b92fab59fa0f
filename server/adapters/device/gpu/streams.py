"""Order between the host and what the device does later."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from turret.kernels.gpu.tables import has_streams


class StepStream:
    """The stream of the engine's steps. Nothing else is on it, so nothing else holds steps up.

    Args:
        device: Where the steps are computed.
    """

    def __init__(self, device: torch.device) -> None:
        # High priority: steps go before work beside them when both want the device.
        self._stream = torch.cuda.Stream(device, priority=-1) if has_streams(device) else None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Give the calling thread's work to it, after all that the thread's stream has to do."""
        if self._stream is None:
            yield
            return
        before = torch.cuda.current_stream()
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            yield
        before.wait_stream(self._stream)


@contextlib.contextmanager
def beside_steps(device: torch.device) -> Iterator[None]:
    """Give the calling thread's work a stream of its own, after all on the default stream.

    There the weights are made that such work reads; the steps, on theirs, write nothing that it
    reads. The work is over at the end of the block.
    """
    if not has_streams(device):
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
