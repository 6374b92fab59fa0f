"""NF4 weights (QLoRA, arXiv 2305.14314) as bitsandbytes stores them, and fused linears on them.

Every module of the checkpoint is quantised separately, with blocks of 64 and double quantisation.
Fusing q·k·v and gate·up joins the *packed* rows, so the served model equals its bitsandbytes-4bit
checkpoint.

Experts of MXFP4 checkpoints keep their values exactly. They are stored in the same way, as
bitsandbytes' ``fp4`` with the values of E2M1, blocks of 32 and scales that are not quantised.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from turret.kernels.cpu import has_kernels
from turret.kernels.cpu.row_adapters import Ahead
from turret.kernels.nf4_matmul import MXFP4, NF4, Format
from turret.kernels.rows import prepare_linear, row_linear, row_linear_transposed
from turret.server.adapters.base import WeightRows
from turret.server.models.weights import BaseLinear
from turret.server.models.weights.nf4_cpu import (
    TILE_ROWS,
    has_library_product,
    nf4_formulation,
    nf4_product,
    nf4_transposed_product,
    pack,
    quantize,
)

# ``bitsandbytes.functional``, imported in a tenth of the usual time.
#
# bitsandbytes imports torch's compiler, which takes seconds of processor time and 70 MiB. At
# import, it passes a few functions to ``torch.compile``. These are for devices without bitsandbytes
# kernels, and also work uncompiled. Later, the first call of each operator would import the
# compiler only to exclude the operator from compilation. A server that ran out of memory during
# that import could not call the operator until its restart. bitsandbytes also imports Triton, which
# only its kernels for Intel's GPUs use.


__all__ = ["functional"]


def _as_it_is(function: Callable[..., object] | None = None, **_: object) -> object:
    """Replaces ``torch.compile`` and ``torch._disable_dynamo``; returns the function unchanged."""
    return _as_it_is if function is None else function


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    replaced = {name: getattr(torch, name) for name in ("compile", "_disable_dynamo")}
    for name in replaced:
        setattr(torch, name, _as_it_is)
    has_triton = "triton" in sys.modules
    if not has_triton:
        sys.modules["triton"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, function in replaced.items():
            setattr(torch, name, function)
        if not has_triton:
            del sys.modules["triton"]


# bitsandbytes warns at import that an optional kernel from the hub is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
with _without_compiler():
    from bitsandbytes import functional


BLOCKSIZE = 64
_IDENTITY_ROWS = 512
# The exponent of E8M0's smallest power of two.
_LEAST_EXPONENT = -127


@dataclass(frozen=True, slots=True)
class Nf4Weight:
    """One module's quantised weight.

    Attributes:
        packed: Two 4-bit codes per byte, ``[out·in/2, 1]`` uint8.
        state: bitsandbytes' quantisation state (absmax, possibly nested; code; shape).
    """

    packed: torch.Tensor
    state: functional.QuantState

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> Nf4Weight:
        """Quantise ``[out, in]`` as bitsandbytes does, with double quantisation."""
        packed, absmax = quantize(weight)
        offset = absmax.mean()
        nested_codes, nested = functional.quantize_blockwise(absmax - offset, blocksize=256)
        state = functional.QuantState(
            absmax=nested_codes,
            shape=weight.shape,
            code=functional.get_4bit_type("nf4", device=weight.device.type),
            blocksize=BLOCKSIZE,
            quant_type="nf4",
            dtype=weight.dtype,
            offset=offset,
            state2=nested,
        )
        return cls(packed, state)

    @classmethod
    def of_mxfp4(cls, weight: torch.Tensor) -> Nf4Weight | None:
        """Encode a weight that was dequantised from MXFP4, with exactly its values.

        The codes and scales may differ from those of the file, because several combinations of
        them stand for the same values.

        Args:
            weight: ``[out, in]``.

        Returns:
            The encoded weight, or None if MXFP4 cannot represent it exactly.
        """
        if weight.shape[1] % MXFP4.block or not weight.isfinite().all():
            return None
        blocks = weight.float().reshape(-1, MXFP4.block)
        # Choose each scale so that the largest magnitude of its block becomes 4 or 6, the largest
        # values of E2M1. E8M0 has no exponent below -127.
        exponents = (blocks.abs().amax(1).frexp().exponent - 3).clamp_(min=_LEAST_EXPONENT)
        doubled = torch.ldexp(blocks.abs(), 1 - exponents[:, None]).to(torch.uint8)
        # The magnitudes, doubled, are 0 to 4, 6, 8 and 12.
        codes = doubled.clamp(max=4).add_(doubled > 4).add_(doubled > 6).add_(doubled > 8)
        packed = codes.add_(blocks.signbit(), alpha=8).view(-1, 2)
        state = functional.QuantState(
            # bf16 holds every power of two of E8M0.
            absmax=torch.ldexp(torch.ones(len(exponents)), exponents).to(torch.bfloat16),
            shape=weight.shape,
            code=torch.tensor(MXFP4.code),
            blocksize=MXFP4.block,
            quant_type="fp4",
            dtype=torch.bfloat16,
        )
        made = cls((packed[:, :1] << 4) | packed[:, 1:], state)
        return made if torch.equal(made.dequantize(torch.float32), weight.float()) else None

    @classmethod
    def from_tensors(cls, name: str, tensors: Mapping[str, torch.Tensor]) -> Nf4Weight | None:
        """Take a weight from a bitsandbytes-4bit checkpoint, with exactly its stored values.

        Args:
            name: The weight's name. ``tensors`` contains it, ``{name}.absmax`` and so on.
            tensors: At least this weight's tensors.

        Returns:
            The weight, or None if no kernel reads it: FP4 other than the MXFP4 of experts, or a
            block size that is not a multiple of 64.
        """
        state = _state_in(name, tensors)
        weight = cls(tensors[name], state)
        if weight.format == MXFP4 and reads_mxfp4(name):
            return weight
        if state.quant_type != "nf4" or weight.blocksize % BLOCKSIZE:
            return None
        return weight.in_blocks_of_64()

    def in_blocks_of_64(self) -> Nf4Weight:
        """The same weights in blocks of 64. Each has the scale of the block from which it comes."""
        repeats = self.blocksize // BLOCKSIZE
        if repeats == 1:
            return self
        out_features, in_features = self.shape
        absmax = self.absmax().repeat_interleave(repeats)
        state = functional.QuantState(
            absmax=absmax[: -(-out_features * in_features // BLOCKSIZE)],
            shape=self.state.shape,
            code=self.state.code,
            blocksize=BLOCKSIZE,
            quant_type="nf4",
            dtype=self.state.dtype,
        )
        return Nf4Weight(self.packed, state)

    def to_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Name the tensors as a bitsandbytes-4bit checkpoint does."""
        extra = {f"{name}.{k}": v for k, v in self.state.as_dict(packed=True).items()}
        return {name: self.packed, **extra}

    @property
    def blocksize(self) -> int:
        """The number of weights that share a maximum."""
        found = self.state.blocksize
        assert found is not None
        return found

    @property
    def format(self) -> Format:
        """NF4 or MXFP4; meaningful only if a kernel reads the weight."""
        code = self.state.code
        if self.blocksize == MXFP4.block and code is not None and code.tolist() == [*MXFP4.code]:
            return MXFP4
        return NF4

    @property
    def shape(self) -> tuple[int, int]:
        shape = self.state.shape
        assert shape is not None
        out_features, in_features = shape
        return out_features, in_features

    def absmax(self) -> torch.Tensor:
        """The block maxima, flat fp32, after undoing the nested quantisation."""
        if not self.state.nested:
            return self.state.absmax.float()
        offset, nested = self.state.offset, self.state.state2
        assert offset is not None
        assert nested is not None
        flat = functional.dequantize_blockwise(self.state.absmax, nested)
        return (flat + offset).float()

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """``[out, in]`` in ``dtype``."""
        if self.format == MXFP4:
            return self.decode().to(dtype)
        # Pass the matrix as one row: bitsandbytes' CPU kernel misreads blocks that span two rows.
        flat = 1, self.shape[0] * self.shape[1]
        return torch.ops.bitsandbytes.dequantize_4bit(
            self.packed, self.absmax(), BLOCKSIZE, "nf4", flat, dtype
        ).view(self.shape)

    def decode(self) -> torch.Tensor:
        """``[out, in]`` fp32, of a weight in any 4-bit format of bitsandbytes."""
        codes = self.packed.view(torch.uint8).view(-1)
        pairs = torch.stack((codes >> 4, codes & 15), dim=1).view(-1).int()
        out_features, in_features = self.shape
        scales = self.absmax().repeat_interleave(self.blocksize)[: out_features * in_features]
        assert self.state.code is not None
        return (self.state.code[pairs] * scales).view(out_features, in_features)


def reads_mxfp4(name: str) -> bool:
    """Whether the products with a weight of this name support MXFP4, as those of experts do."""
    return ".experts." in name


def dequantize_stored(name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A weight of a bitsandbytes-4bit checkpoint of any kind, ``[out, in]`` fp32.

    See ``Nf4Weight.from_tensors``.
    """
    return Nf4Weight(tensors[name], _state_in(name, tensors)).decode()


def _state_in(name: str, tensors: Mapping[str, torch.Tensor]) -> functional.QuantState:
    parts = {
        key.removeprefix(f"{name}."): value
        for key, value in tensors.items()
        if key.startswith(f"{name}.")
    }
    return functional.QuantState.from_dict(parts, device=torch.device("cpu"))


class DenseLinear(BaseLinear):
    """A projection whose weight is stored as numbers.

    Args:
        weight: ``[sum(widths), in]``, contiguous, in the dtype of activations.
        widths: Outputs of each slice.
    """

    def __init__(self, weight: torch.Tensor, widths: tuple[int, ...]) -> None:
        assert sum(widths) == weight.shape[0]
        self.widths = widths
        self.in_features = weight.shape[1]
        self.weight = weight
        prepare_linear(weight)

    def __call__(
        self, x: torch.Tensor, ahead: Ahead | None = None, num_decode: int | None = None
    ) -> torch.Tensor:
        return row_linear(x, self.weight)

    def served(self, index: int) -> torch.Tensor:
        return self.weight[self._rows(index)]

    def dequantize(self, index: int) -> torch.Tensor:
        return self.served(index).float().cpu()

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        return row_linear_transposed(grad, self.weight)

    def part(self, index: int) -> DenseLinear:
        return type(self)(self.served(index), (self.widths[index],))

    @classmethod
    def join(cls, parts: Sequence[DenseLinear]) -> DenseLinear:
        """Fuse projections, in this order."""
        widths = tuple(width for part in parts for width in part.widths)
        return cls(torch.cat([part.weight for part in parts]), widths)


class DequantizedLinear(DenseLinear):
    """NF4 weights that are kept dequantised, because no kernel here reads their codes."""


class PackedLinear(BaseLinear):
    """NF4 weights in bitsandbytes' packed CPU layout, for a bf16 model.

    The layout is the same for all instruction sets.

    Args:
        packed: ``[sum(widths), in / 2]`` uint8.
        absmax: ``[in / 64, sum(widths)]`` bf16, or ``[in / 32, sum(widths)]`` for MXFP4.
        widths: Outputs of each slice, multiples of ``TILE_ROWS``.
    """

    def __init__(self, packed: torch.Tensor, absmax: torch.Tensor, widths: tuple[int, ...]) -> None:
        self.packed, self.absmax, self.widths = packed, absmax, widths
        self.in_features = 2 * packed.shape[1]

    @staticmethod
    def packs(slices: Sequence[Nf4Weight]) -> bool:
        """Whether ``pack`` supports these weights."""
        return (
            len({weight.format for weight in slices}) == 1
            and len({weight.shape[1] for weight in slices}) == 1
            and slices[0].shape[1] % BLOCKSIZE == 0
            and all(weight.shape[0] % TILE_ROWS == 0 for weight in slices)
        )

    @classmethod
    def pack(cls, slices: Sequence[Nf4Weight]) -> PackedLinear:
        """Fuse weights that share their input and their format."""
        inner, widths = slices[0].shape[1], tuple(weight.shape[0] for weight in slices)
        blocks = inner // slices[0].format.block
        packed = torch.empty(sum(widths), inner // 2, dtype=torch.uint8)
        absmax = torch.empty(blocks, sum(widths), dtype=torch.bfloat16)
        # The layout consists of tiles of rows, one after another.
        for weight, rows, columns in zip(
            slices, packed.split(widths), absmax.split(widths, dim=1), strict=True
        ):
            pack(weight.packed, rows)
            columns.copy_(weight.absmax().view(-1, blocks).T)
        return cls(packed, absmax, widths)

    @staticmethod
    def names(modules: Sequence[str]) -> tuple[str, str]:
        """The names of ``packed`` and ``absmax`` in the cache, from the names of the weights."""
        joined = "+".join(modules)
        return f"{joined}:packed", f"{joined}:absmax"

    def __call__(
        self, x: torch.Tensor, ahead: Ahead | None = None, num_decode: int | None = None
    ) -> torch.Tensor:
        return nf4_product(x, self.packed, self.absmax, self.shape, ahead)

    @property
    def format(self) -> Format:
        """The format of the weights."""
        return MXFP4 if self.absmax.shape[0] * MXFP4.block == self.in_features else NF4

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.in_features

    def formulation(self) -> str:
        """The name of the product, for the log. This tries a library's product first."""
        return nf4_formulation(self.shape)

    def dequantize(self, index: int) -> torch.Tensor:
        # The product rounds absmax and products to bf16 internally. Multiplying by the identity
        # shows exactly the weight that it uses.
        rows, columns = self._rows(index), []
        for low in range(0, self.in_features, _IDENTITY_ROWS):
            high = min(low + _IDENTITY_ROWS, self.in_features)
            identity = torch.zeros(high - low, self.in_features, dtype=torch.bfloat16)
            identity[torch.arange(high - low), torch.arange(low, high)] = 1.0
            columns.append(self(identity)[:, rows].float().T)
        return torch.cat(columns, dim=1).contiguous()

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        if not has_kernels(grad.device) or self.format == MXFP4:
            return super().transposed_product(grad)
        return nf4_transposed_product(grad, self.packed, self.absmax, self.shape)

    def part(self, index: int) -> PackedLinear:
        rows = self._rows(index)
        absmax = self.absmax[:, rows].contiguous()
        return PackedLinear(self.packed[rows], absmax, (self.widths[index],))

    @classmethod
    def join(cls, parts: Sequence[PackedLinear]) -> PackedLinear:
        """Fuse projections, in this order; copies their weights."""
        widths = tuple(width for part in parts for width in part.widths)
        absmax = torch.cat([part.absmax for part in parts], dim=1).contiguous()
        return cls(torch.cat([part.packed for part in parts]), absmax, widths)


class MixedLinear(BaseLinear):
    """Projections that are stored in different ways, side by side.

    Args:
        parts: The projections, in the order of their outputs.
    """

    def __init__(self, parts: Sequence[BaseLinear]) -> None:
        self.widths = tuple(width for part in parts for width in part.widths)
        self.in_features = parts[0].in_features
        self._parts = parts
        self._places = [(part, i) for part in parts for i in range(len(part.widths))]

    def __call__(
        self, x: torch.Tensor, ahead: Ahead | None = None, num_decode: int | None = None
    ) -> torch.Tensor:
        return torch.cat([part(x, ahead, num_decode) for part in self._parts], dim=1)

    def served(self, index: int) -> WeightRows:
        part, inner = self._places[index]
        return part.served(inner)

    def dequantize(self, index: int) -> torch.Tensor:
        part, inner = self._places[index]
        return part.dequantize(inner)

    def part(self, index: int) -> BaseLinear:
        part, inner = self._places[index]
        return part.part(inner)


def nf4_linear(
    slices: Sequence[Nf4Weight], dtype: torch.dtype, device: torch.device, *, gpu: bool = False
) -> BaseLinear:
    """Fuse NF4 weights that share their input, in the form that multiplies fastest.

    On the CPU, codes stay packed for a bf16 model if a kernel reads them. Otherwise, the weight is
    kept dequantised.

    Args:
        slices: The weights, all in one format; on the gpu path, NF4.
        dtype: The dtype of activations.
        device: Where they are served.
        gpu: Whether the gpu path serves them.
    """
    if gpu:
        # Imported here, because the other paths run without Triton.
        from turret.server.models.weights.nf4_gpu import GpuLinear

        return GpuLinear.fuse(slices, dtype, device)
    if multiplies_packed(slices[0].format, dtype, device) and PackedLinear.packs(slices):
        return PackedLinear.pack(slices)
    parts = [weight.dequantize(dtype) for weight in slices]
    widths = tuple(weight.shape[0] for weight in slices)
    return DequantizedLinear(torch.cat(parts).to(device), widths)


def multiplies_packed(weight_format: Format, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a product on this device reads codes in the layout of ``PackedLinear``."""
    is_read = has_kernels(device) or (weight_format == NF4 and has_library_product(device))
    return dtype == torch.bfloat16 and is_read


# The weight of a module, or the weights of a fused projection.
Weight = Nf4Weight | PackedLinear | torch.Tensor


def fuse_weights(
    weights: Sequence[Weight],
    dtype: torch.dtype,
    device: torch.device,
    *,
    gpu: bool = False,
) -> BaseLinear:
    """Fuse weights with the same input, in order.

    Adjacent weights in the same format share a product.

    Args:
        weights: Each is quantised, or a tensor ``[out, in]``. If the first is a ``PackedLinear``,
            it must be the only one.
        dtype: The dtype of activations.
        device: Where they are served.
        gpu: Whether the gpu path serves them.
    """
    if isinstance(weights[0], PackedLinear):
        return weights[0]
    parts: list[BaseLinear] = []
    for _, group in groupby(weights, lambda weight: getattr(weight, "format", None)):
        run = list(group)
        nf4 = [weight for weight in run if isinstance(weight, Nf4Weight)]
        dense = [weight.to(dtype) for weight in run if isinstance(weight, torch.Tensor)]
        if nf4:
            parts.append(nf4_linear(nf4, dtype, device, gpu=gpu))
        else:
            widths = tuple(weight.shape[0] for weight in dense)
            parts.append(DenseLinear(torch.cat(dense).to(device), widths))
    return parts[0] if len(parts) == 1 else MixedLinear(parts)


def join_linears(parts: Sequence[Any]) -> BaseLinear:
    """Fuse projections with the same input, in order.

    Adjacent ones in the same format share a product.

    Args:
        parts: Results of ``nf4_linear``, ``DenseLinear`` or their parts.
    """
    runs = [(kind, list(group)) for kind, group in groupby(parts, type)]
    joined = [run[0] if len(run) == 1 else kind.join(run) for kind, run in runs]
    return joined[0] if len(joined) == 1 else MixedLinear(joined)
