"""Experts that a checkpoint holds all in one tensor, taken apart.

A stack is ``experts.gate_up_proj`` ``[experts, in, out]``, or MXFP4 in its place::

    experts.gate_up_proj_blocks   [experts, out, in / 32, 16] uint8
    experts.gate_up_proj_scales   [experts, out, in / 32]     uint8

and ``experts.gate_up_proj_bias`` ``[experts, out]`` in either case. Its parts are what a checkpoint
has whose experts are modules: ``experts.gate_up_projs.7.weight`` ``[out, in]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F

from turret.kernels.cpu.row_adapters import Ahead
from turret.server.errors import InvalidRequestError
from turret.server.models.weights.base_linear import DenseLinear
from turret.server.words import say

# MXFP4 weights (OCP Microscaling Formats 1.0): FP4 codes that share a power of two by 32.

# Bytes of codes that share one scale.
BYTES = 16
# Values of E2M1's three lower bits; the fourth bit is the sign.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The bit pattern of 2^-127 in fp32.
_LEAST = 1 << 22


def dequantize_mxfp4(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """The numbers that a weight's codes stand for; bf16 holds all of them.

    Args:
        codes: ``[out, in / 32, 16]`` uint8, two a byte, the first in the lower half.
        exponents: ``[out, in / 32]`` uint8: each 32's power of two, and 127 more.

    Returns:
        ``[out, in]`` bf16.
    """
    signed = [*_MAGNITUDES, *(-value for value in _MAGNITUDES)]
    values = torch.tensor(signed, device=codes.device)
    pairs = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).int()
    # Exponents are those of fp32, except that the smallest one gives a subnormal number.
    bits = torch.where(exponents == 0, _LEAST, exponents.int() << 23)
    scales = bits.int().view(torch.float32)
    return (values[pairs] * scales.unsqueeze(-1)).flatten(-2).to(torch.bfloat16)


# A router's projection: not quantised, since a small error can choose another expert.

# Libraries choose their algorithm by shape: on a GPU a product always has this many rows.
_ROWS = 64


class RouterLinear(DenseLinear):
    """``[rows, hidden]`` to a score per expert; see ``BaseLinear``.

    Args:
        weight: ``[experts, hidden]``, in the dtype of activations.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight, (weight.shape[0],))

    def __call__(
        self, x: torch.Tensor, ahead: Ahead | None = None, num_decode: int | None = None
    ) -> torch.Tensor:
        if x.device.type == "cpu":
            return super().__call__(x)
        padded = F.pad(x, (0, 0, 0, -x.shape[0] % _ROWS))
        pieces = [F.linear(piece, self._weight) for piece in padded.split(_ROWS)]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[: x.shape[0]]


_CODES, _EXPONENTS, _BIAS = "_blocks", "_scales", "_bias"


class ExpertStacks:
    """The stacks of a checkpoint.

    Args:
        modules: What a stack's parts are modules of, by its path in a layer; ``{}`` stands for the
            expert.
        count: Experts of a stack.
        names: The checkpoint's tensors.

    Attributes:
        names: Those that are stacks.
        parts: What they are made into: the stack and the expert of each tensor.

    Raises:
        InvalidRequestError: Weights are there twice, or scales without what they scale.
    """

    def __init__(self, modules: Mapping[str, str], count: int, names: Iterable[str]) -> None:
        leaves = {"": ".weight", _CODES: ".weight", _EXPONENTS: None, _BIAS: ".bias"}
        kinds = {
            stack + suffix: None if leaf is None else module + leaf
            for stack, module in modules.items()
            for suffix, leaf in leaves.items()
        }
        self.names: set[str] = set()
        self.parts: dict[str, tuple[str, int]] = {}
        for name in names if kinds else ():
            for path, part in kinds.items():
                if not name.endswith(f".{path}"):
                    continue
                self.names.add(name)
                prefix = name.removesuffix(path)
                if part is not None:
                    self._add(name, [prefix + part.format(e) for e in range(count)])
        for name in self.names:
            codes = name.removesuffix(_EXPONENTS) + _CODES
            if name.endswith(_EXPONENTS) and codes not in self.names:
                raise InvalidRequestError.of("model", say("TENSOR_MISSING", name=codes))

    def _add(self, stack: str, parts: list[str]) -> None:
        if other := next((self.parts[part][0] for part in parts if part in self.parts), None):
            raise InvalidRequestError.of("model", say("TENSORS_DUPLICATE", name=stack, other=other))
        self.parts |= {part: (stack, expert) for expert, part in enumerate(parts)}

    def read(self, name: str, read: Callable[[str, int], torch.Tensor]) -> torch.Tensor:
        """A part: a weight ``[out, in]``, which may be strided, or a bias ``[out]``.

        Args:
            name: One of ``parts``.
            read: Gives an expert's part of a tensor of the checkpoint.

        Raises:
            InvalidRequestError: Its form is another.
        """
        stack, expert = self.parts[name]
        tensor = read(stack, expert)
        if stack.endswith(_CODES):
            exponents = read(stack.removesuffix(_CODES) + _EXPONENTS, expert)
            is_mxfp4 = tensor.ndim == 3 and tensor.shape[2] == BYTES
            is_mxfp4 &= tensor.dtype == exponents.dtype == torch.uint8
            if not is_mxfp4 or exponents.shape != tensor.shape[:2]:
                forms = {"found": _form(tensor), "scales": _form(exponents)}
                raise InvalidRequestError.of("model", say("NOT_MXFP4", name=stack, **forms))
            return dequantize_mxfp4(tensor, exponents)
        if tensor.ndim != (1 if stack.endswith(_BIAS) else 2):
            raise InvalidRequestError.of(
                "model", say("EXPERT_SHAPE_UNSUPPORTED", name=stack, found=_form(tensor))
            )
        return tensor.T if tensor.ndim == 2 else tensor


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
