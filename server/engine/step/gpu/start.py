"""What a CUDA device does before the first request.

Its memory is divided, by what the largest step takes; kernels are compiled and decode steps
captured, so that no request waits for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from turret.server.adapters.mix import Mix
from turret.server.basics.work import is_out_of_memory
from turret.server.engine.scheduling.request import Request
from turret.server.engine.scheduling.sequence import Scheduled, Sequence, Step

if TYPE_CHECKING:
    # Triton is not installed where other paths run.
    from turret.server.engine.step.gpu.executor import GpuExecutor

# Share of the memory left free by the model.
_ADAPTER_SHARE = 1 / 7
# Share of the device's memory for what captured steps and libraries keep, gaps between allocations,
# and a merge's second copy of a projection.
_SPARE_SHARE = 0.05


def adapter_bytes(device: torch.device) -> int:
    """Default budget for adapters; call it once the model is loaded."""
    return int(_ADAPTER_SHARE * torch.cuda.mem_get_info(device)[0])


def spare_bytes(device: torch.device) -> int:
    """What the plan leaves free."""
    return int(_SPARE_SHARE * torch.cuda.mem_get_info(device)[1])


def captured_bytes(rows: Iterable[int], row_bytes: int) -> int:
    """What captured steps return and keep; their logits are in memory that all share.

    Args:
        rows: Of each captured step.
        row_bytes: Of a row's final hidden state.
    """
    return sum(rows) * row_bytes


def largest_step(num_tokens: int, num_seqs: int, block_size: int) -> Step:
    """A step of prompts with as many rows and as many samples as a step may have.

    One prompt is as long as can be, since short ones are multiplied with less memory. All its
    sequences lie in KV block 1. It uses no adapters.
    """
    num_seqs = min(num_seqs, num_tokens)
    scheduled = []
    for i in range(num_seqs):
        length = 1 if i else num_tokens - num_seqs + 1
        request = Request(request_id=f"rehearsal {i}", prompt_token_ids=(0,) * length)
        sequence = Sequence(request, Mix(()), 0.0)
        sequence.blocks = [1] * -(-length // block_size)
        scheduled.append(Scheduled(sequence, length))
    return Step(tuple(scheduled), (), 0)


def measure(run: Callable[[Step], object], step: Step, device: torch.device) -> int:
    """Bytes that a step takes at its worst moment, beside what is allocated before it.

    What it compiled and cached on its way is free again afterwards.
    """
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run(step)
    torch.cuda.synchronize(device)
    taken = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return taken


_log = logging.getLogger(__name__)

# Description, done, total.
Progress = Callable[[str, int, int], None]


def warm_up(executor: GpuExecutor, progress: Progress) -> None:
    """Compile the kernels of steps and capture the common decode steps.

    Kernels that only some adapters need (LoHa, LoKr, of experts) are compiled when one is loaded;
    see ``GpuStore.admit``. Where memory ends, the server goes on with fewer captured steps.

    Args:
        executor: Has computed nothing yet, and draws.
        progress: Told how far it is.
    """
    forms, packed = executor.forms(), executor.packed_forms()
    try:
        with torch.inference_mode():
            for number, form in enumerate(packed):
                progress("Compiling", number, len(packed))
                executor.compile(form)
            progress("Compiling", len(packed), len(packed))
            for number, (bucket, low_rank) in enumerate(forms):
                progress("Capturing decode steps", number, len(forms))
                executor.capture(bucket, low_rank)
            progress("Capturing decode steps", len(forms), len(forms))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        _log.warning("no memory to capture all decode steps at the start")
        executor.free_memory()
