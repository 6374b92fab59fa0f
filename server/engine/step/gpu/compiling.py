"""Compiles kernels for NVIDIA GPUs that this machine may lack, into Triton's cache.

Triton identifies compiled code by its own version, the source of the kernel, the types and
alignments of the arguments, the options of the launch, and the GPU's compute capability. So a
launch with meta tensors, and a driver that only knows the capability, compile what the same launch
on the GPU needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Target:
    """The part of Triton's driver that a launch uses before it runs the kernel.

    Args:
        capability: The compute capability, for example 90 for 9.0.
    """

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        # Triton remembers the code that it has compiled for each device.
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(launches: Callable[[], None], capability: int) -> None:
    """Compile the kernels that ``launches`` launches, on all cores, and launch none of them.

    Afterwards, the process cannot use a GPU.

    Args:
        launches: Launches kernels on meta tensors.
        capability: See ``Target``.
    """
    kernels: Any = JITFunction
    run = kernels.run

    def compiled(function: Any, *args: Any, warmup: bool, **keywords: Any) -> Any:
        return run(function, *args, warmup=True, **keywords)

    target: Any = Target(capability)
    driver.set_active(target)
    kernels.run = compiled
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
            launches()
    finally:
        kernels.run = run
