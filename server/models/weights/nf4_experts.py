"""The same fused projection of every expert of a layer, each stored separately."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from turret.kernels.cpu.native import has_kernels
from turret.kernels.expert_routing import Routing
from turret.kernels.nf4_matmul import MXFP4, NF4, Nf4Matrix
from turret.server.errors import InvalidRequestError
from turret.server.models.weights.base_linear import BaseLinear
from turret.server.models.weights.nf4 import BLOCKSIZE, Nf4Weight, PackedLinear, fuse_weights
from turret.server.models.weights.nf4_cpu import nf4_expert_products
from turret.server.words import say

# Stacks: tensors in which a checkpoint stores all experts of a layer. They are split into parts.
#
# A stack is ``experts.gate_up_proj`` ``[experts, in, out]``, or MXFP4 in its place::
#
# experts.gate_up_proj_blocks   [experts, out, in / 32, 16] uint8
# experts.gate_up_proj_scales   [experts, out, in / 32]     uint8
#
# and ``experts.gate_up_proj_bias`` ``[experts, out]`` in either case. The parts are named as in a
# checkpoint whose experts are modules: ``experts.gate_up_projs.7.weight`` ``[out, in]``.


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


class Nf4Experts:
    """``x_p W_eᵀ`` for pairs of a row and an expert, without bias.

    Args:
        experts: Per expert, slices that share their input, quantised or as numbers.
        dtype: The dtype of activations.
        device: Where they are served.
        gpu: Whether the gpu path serves them.

    Attributes:
        out_features: Outputs of an expert.
        in_features: Its inputs.
    """

    def __init__(
        self,
        experts: Sequence[Sequence[Nf4Weight | torch.Tensor]],
        dtype: torch.dtype,
        device: torch.device,
        *,
        gpu: bool = False,
    ) -> None:
        self.out_features = sum(weight.shape[0] for weight in experts[0])
        self.in_features = experts[0][0].shape[1]
        self._dtype = dtype
        self._experts: list[BaseLinear] = []
        self._addresses: torch.Tensor | None = None
        self._format = NF4
        # Used on the gpu path. All weights are numbers unless all have the same format.
        self._stacked: Nf4Matrix | torch.Tensor | None = None
        if gpu:
            self._stacked = self._stack(experts, device)
            return
        self._experts = [fuse_weights(slices, dtype, device) for slices in experts]
        # The C product computes all experts in one call if all have the same format.
        packed = [expert for expert in self._experts if isinstance(expert, PackedLinear)]
        formats = {expert.format for expert in packed}
        if has_kernels(device) and len(packed) == len(self._experts) and len(formats) == 1:
            (self._format,) = formats
            addresses = [[each.packed.data_ptr(), each.absmax.data_ptr()] for each in packed]
            self._addresses = torch.tensor(addresses, dtype=torch.int64)

    def _stack(
        self, experts: Sequence[Sequence[Nf4Weight | torch.Tensor]], device: torch.device
    ) -> Nf4Matrix | torch.Tensor:
        if self.in_features % BLOCKSIZE:
            said = say("EXPERT_WIDTH_UNSUPPORTED", width=self.in_features, multiple=BLOCKSIZE)
            raise InvalidRequestError.of("model", said)
        weights = [weight for expert in experts for weight in expert]
        slices = [weight for weight in weights if isinstance(weight, Nf4Weight)]
        formats = {weight.format for weight in slices}
        if len(slices) < len(weights) or len(formats) > 1:
            return torch.cat([self._numbers(weight) for weight in weights]).to(device)
        packed = torch.cat([weight.packed.view(-1) for weight in slices]).to(device)
        absmax = torch.cat([weight.absmax() for weight in slices]).to(device)
        (found,) = formats
        if found == MXFP4:
            absmax = absmax.to(torch.bfloat16)
        return Nf4Matrix(packed, absmax, len(experts) * self.out_features, self.in_features, found)

    def _numbers(self, weight: Nf4Weight | torch.Tensor) -> torch.Tensor:
        if isinstance(weight, torch.Tensor):
            return weight.to(self._dtype)
        return weight.dequantize(self._dtype)

    def __call__(
        self, x: torch.Tensor, routing: Routing, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Multiply every pair by its expert's weight.

        Args:
            x: ``[rows, in]``, or ``[pairs, in]``.
            routing: The pairs.
            rows: The row of ``x`` that each pair reads, ``[pairs]`` int64; None if ``x`` has one
                row per pair.

        Returns:
            ``[pairs, out]``, dtype of ``x``.
        """
        if self._stacked is not None:
            # Imported here, because the other paths run without Triton.
            from turret.kernels.gpu.experts import nf4_experts

            return nf4_experts(x, self._stacked, routing, rows)
        x = x if rows is None else x.index_select(0, rows)
        if self._addresses is not None:
            shape = self.out_features, self.in_features
            addresses = self._addresses
            return nf4_expert_products(x, routing.ends, addresses, shape, self._format)
        parts = [self._experts[expert](x[pairs]) for expert, pairs in routing.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def dequantize(self, expert: int) -> torch.Tensor:
        """An expert's weight as multiplied, ``[out, in]`` fp32, on the CPU. Do not write to it."""
        if self._stacked is not None:
            first = expert * self.out_features
            rows, stacked = slice(first, first + self.out_features), self._stacked
            if isinstance(stacked, torch.Tensor):
                return stacked[rows].float().cpu()
            return stacked.part(rows).dequantize(self._dtype).float().cpu()
        linear = self._experts[expert]
        parts = [linear.dequantize(index) for index in range(len(linear.widths))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
