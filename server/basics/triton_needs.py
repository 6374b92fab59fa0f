"""The GPU that a process sees, and other requirements of Triton.

Triton compiles C code at its first use: its driver and, in version 3.6, a launcher for each form of
a kernel. For this it needs a C compiler and Python's headers. It writes the results to a folder in
the home directory, to which services and containers often cannot write.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import MutableMapping
from pathlib import Path

from turret.server.errors import InvalidRequestError
from turret.server.words import say

# Triton supports no older NVIDIA devices. AMD devices have higher numbers.
LEAST_CAPABILITY = (8, 0)
_COMPILERS = ("gcc", "clang")


def see_only(device: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Make ``cuda:N`` the only CUDA device that this process sees; other values change nothing.

    Every thread and every library starts with device 0 as its current one, so the serving device
    must be device 0. Call this function before anything asks for devices, as bitsandbytes does when
    it is imported, because CUDA reads ``CUDA_VISIBLE_DEVICES`` only once.

    Raises:
        InvalidRequestError: That variable lists fewer devices.
    """
    if not device.startswith("cuda:"):
        return
    number, visible = int(device.removeprefix("cuda:")), environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number)] * (number + 1)
    if visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
    if number >= len(names):
        why = say("DEVICE_NOT_VISIBLE", device=device, visible=visible)
        raise InvalidRequestError.of("device", why)
    environ["CUDA_VISIBLE_DEVICES"] = names[number]


def missing_for_triton() -> str:
    """The missing packages that Triton needs, in words; empty if there are none."""
    missing = []
    if "CC" not in os.environ and not any(map(shutil.which, _COMPILERS)):
        missing.append("a C compiler (gcc or clang, or another one that CC names)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append("Python's C headers (python3-dev, or what your system calls it)")
    return " and ".join(missing)


def keep_compiled_in(folder: Path, environ: MutableMapping[str, str] = os.environ) -> None:
    """Make Triton keep its compiled code in a folder, unless the environment names one."""
    environ.setdefault("TRITON_CACHE_DIR", str(folder))
