"""Splits stacks, in which some checkpoints store all experts of a layer, into separate tensors.

A stack is ``experts.gate_up_proj`` ``[experts, in, out]``, or MXFP4 in its place::

    experts.gate_up_proj_blocks   [experts, out, in / 32, 16] uint8
    experts.gate_up_proj_scales   [experts, out, in / 32]     uint8

and ``experts.gate_up_proj_bias`` ``[experts, out]`` in either case. The parts are named as in a
checkpoint whose experts are modules: ``experts.gate_up_projs.7.weight`` ``[out, in]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from turret.kernels.nf4_matmul import MXFP4
from turret.server.errors import InvalidRequestError
from turret.server.words import say

# MXFP4 weights (OCP Microscaling Formats 1.0): every 32 FP4 codes share a power of two.

# Number of bytes of codes that share one scale.
BYTES = 16
# The bit pattern of 2^-127 in fp32.
_LEAST = 1 << 22


def dequantize_mxfp4(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """The numbers that a weight's codes stand for; bf16 holds all of them.

    Args:
        codes: ``[out, in / 32, 16]`` uint8, two codes per byte, the first in the lower half.
        exponents: ``[out, in / 32]`` uint8: the exponent of two of each 32 codes, plus 127.

    Returns:
        ``[out, in]`` bf16.
    """
    values = torch.tensor(MXFP4.code, device=codes.device)
    pairs = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).int()
    # Exponents are those of fp32, except that the smallest one gives a subnormal number.
    bits = torch.where(exponents == 0, _LEAST, exponents.int() << 23)
    scales = bits.int().view(torch.float32)
    return (values[pairs] * scales.unsqueeze(-1)).flatten(-2).to(torch.bfloat16)


_CODES, _EXPONENTS, _BIAS = "_blocks", "_scales", "_bias"


class ExpertStacks:
    """The stacks of a checkpoint: tensors in which it stores all experts of a layer.

    Args:
        modules: The path of a stack's parts by the stack's path in a layer; ``{}`` stands for the
            expert.
        count: Experts of a stack.
        names: The names of the checkpoint's tensors.

    Attributes:
        names: The names of the stacks.
        parts: The resulting tensors by name: the stack and the expert of each.

    Raises:
        InvalidRequestError: Weights occur twice, or scales occur without weights.
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

    def format(self, name: str) -> str:
        """``mxfp4`` if ``read`` dequantises a part; else empty."""
        return "mxfp4" if self.parts[name][0].endswith(_CODES) else ""

    def read(self, name: str, read: Callable[[str, int], torch.Tensor]) -> torch.Tensor:
        """A part: a weight ``[out, in]``, which may be strided, or a bias ``[out]``.

        Args:
            name: One of ``parts``.
            read: Gives an expert's part of a tensor of the checkpoint.

        Raises:
            InvalidRequestError: The tensor has another form.
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
