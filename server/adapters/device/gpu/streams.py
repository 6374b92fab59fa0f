"""Order between the host and what the device does later."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from turret.kernels.gpu.tables.staged_buffer import has_streams


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
