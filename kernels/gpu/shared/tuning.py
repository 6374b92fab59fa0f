"""Launch parameters per device. Found off the serving path by ``bench/gpu.py --tune``."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

# Older versions of Triton omit the fence that Hopper's wgmma needs between an asynchronous copy to
# shared memory and a product that reads the copied data.
_FENCES_COPIES = (3, 9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Launch parameters.

    Those that decide the order of a sum (``*_split*``, ``shrink_block_k``, ``nf4_*``) are fixed per
    device and never depend on the step: a row's bits must not.

    Attributes:
        programs: Programs of the kernels that loop over a device-side work list.
        shrink_programs: Programs of a shrink that is launched with the base's product.
        shrink_split_k: Input features per part of the reduction over them, about; 2 to 16 parts.
        shrink_block_k: Input features per step of that reduction.
        expand_block_n: Output columns per tile.
        hadamard_splits: Parts of the reduction over the input features.
        hadamard_block_k: As ``shrink_block_k``, at rank 16; halved as the rank doubles.
        hadamard_block_n: Output columns per tile; halved at rank 64.
        kronecker_block_l: Columns of ``w2`` per step of its reduction.
        nf4_block_n: Output columns per program.
        nf4_programs: Programs up to which a narrow weight's input features are cut into parts.
        nf4_part_blocks: Quantisation blocks of a part at least.
        nf4_pass_rows: Decoding rows per call of ``nf4_matmul``, at most 64; 0 where writing the
            weight out and a library's product is faster.
        attention_stages: Depth of the pipeline over keys. Block numbers come before their keys: 5
            keep two tiles of keys and values under way, 3 none.
        nf4_stages: Depth of the pipeline of ``nf4_matmul``; four do not fit in 64 KiB (AMD).
        sample_block: Tokens of the vocabulary that the sampler looks at together.
        inline_ptx: Whether kernels may hold PTX: on NVIDIA devices.
    """

    programs: int = 528
    shrink_programs: int = 264
    shrink_split_k: int = 1024
    shrink_block_k: int = 256
    expand_block_n: int = 256
    hadamard_splits: int = 4
    hadamard_block_k: int = 128
    hadamard_block_n: int = 64
    kronecker_block_l: int = 32
    nf4_block_n: int = 128
    nf4_programs: int = 512
    nf4_part_blocks: int = 16
    nf4_pass_rows: int = 64
    # AMD devices have 64 KiB of shared memory, too little for two tiles in flight.
    attention_stages: int = 5 if torch.version.hip is None else 3
    nf4_stages: int = 4 if torch.version.hip is None else 3
    sample_block: int = 4096
    inline_ptx: bool = torch.version.hip is None

    def registers(self, most: int) -> dict[str, int]:
        """Launch option: registers of a thread at most.

        Without a limit NVIDIA's assembler keeps to fewer than there are and spills the rest.
        """
        return {"maxnreg": most} if self.inline_ptx else {}


# Parameters by torch.cuda.get_device_name; devices that are not listed use the default.
_TABLE: dict[str, Tuning] = {}

# Few programs and small tiles, so that loops over work lists and splits are exercised.
_INTERPRETER = Tuning(
    programs=3,
    shrink_programs=2,
    shrink_split_k=64,
    shrink_block_k=32,
    expand_block_n=32,
    hadamard_splits=2,
    hadamard_block_k=32,
    hadamard_block_n=32,
    kronecker_block_l=32,
    nf4_block_n=32,
    nf4_programs=16,
    nf4_part_blocks=1,
    nf4_pass_rows=4,
    sample_block=64,
    inline_ptx=False,
)


def wgmma_stages(stages: int) -> int:
    """Pipeline depth for tiles of 64 rows: 1, so no concurrent copies, if Triton lacks a fence."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return stages if version >= _FENCES_COPIES else 1


@functools.cache
def tuning(device: torch.device) -> Tuning:
    """The parameters for a device (on the CPU: for Triton's interpreter)."""
    if device.type == "cpu":
        return _INTERPRETER
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return _TABLE.get(name, Tuning())
