"""What a device does before the first request, so that none of them waits for it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from turret.server.basics.work import is_out_of_memory
from turret.server.engine.step.gpu.executor import GpuExecutor
from turret.server.engine.step.gpu.memory_plan import largest_step

_log = logging.getLogger(__name__)

_PROMPT_TOKENS = 64

# Description, done, total.
Progress = Callable[[str, int, int], None]


def warm_up(executor: GpuExecutor, block_size: int, progress: Progress) -> None:
    """Compile the kernels of steps and capture the common decode steps.

    Other adapters (DoRA, LoHa, …) are compiled and captured when they come. Where memory ends, the
    server goes on with fewer captured steps.

    Args:
        executor: Has computed nothing yet, and draws.
        block_size: Positions per KV block.
        progress: Told how far it is.
    """
    forms = executor.forms()
    try:
        with torch.inference_mode():
            progress("Compiling", 0, 1)
            prompt = largest_step(_PROMPT_TOKENS, 1, block_size)
            executor.run(prompt)
            executor.forget(prompt.scheduled[0].sequence)
            progress("Compiling", 1, 1)
            for number, (bucket, low_rank) in enumerate(forms):
                progress("Capturing decode steps", number, len(forms))
                executor.capture(bucket, low_rank)
            progress("Capturing decode steps", len(forms), len(forms))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        _log.warning("no memory to capture all decode steps at the start")
        executor.free_memory()
