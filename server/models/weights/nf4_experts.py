"""The same fused projection of every expert of a layer, each stored separately."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turret.kernels.cpu import has_kernels
from turret.kernels.expert_routing import Routing
from turret.kernels.nf4_matmul import MXFP4, NF4, Nf4Matrix
from turret.server.errors import InvalidRequestError
from turret.server.models.weights import BaseLinear
from turret.server.models.weights.nf4 import (
    BLOCKSIZE,
    Nf4Weight,
    PackedLinear,
    Weight,
    fuse_weights,
)
from turret.server.models.weights.nf4_cpu import nf4_expert_products
from turret.server.words import say


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
        addresses: Addresses of the experts' weights (``nf4_expert_products``), or None if one call
            of the C product cannot compute all of them.
        format: The format of the weights that have ``addresses``.
    """

    def __init__(
        self,
        experts: Sequence[Sequence[Weight]],
        dtype: torch.dtype,
        device: torch.device,
        *,
        gpu: bool = False,
    ) -> None:
        self.out_features = sum(weight.shape[0] for weight in experts[0])
        self.in_features = experts[0][0].shape[1]
        self._dtype = dtype
        self._experts: list[BaseLinear] = []
        self.addresses: torch.Tensor | None = None
        self.format = NF4
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
            (self.format,) = formats
            addresses = [[each.packed.data_ptr(), each.absmax.data_ptr()] for each in packed]
            self.addresses = torch.tensor(addresses, dtype=torch.int64)

    def _stack(
        self, experts: Sequence[Sequence[Weight]], device: torch.device
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

    def _numbers(self, weight: Weight) -> torch.Tensor:
        if isinstance(weight, Nf4Weight):
            return weight.dequantize(self._dtype)
        assert isinstance(weight, torch.Tensor)
        return weight.to(self._dtype)

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
        if self.addresses is not None:
            shape = self.out_features, self.in_features
            return nf4_expert_products(x, routing.ends, self.addresses, shape, self.format)
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
