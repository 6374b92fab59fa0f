"""The same fused projection of every expert of a layer, each quantised on its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turret.kernels.cpu.native import has_native_products
from turret.kernels.expert_routing import Routing
from turret.kernels.nf4_matmul import Nf4Matrix
from turret.server.errors import InvalidRequestError
from turret.server.models.weights.nf4 import BLOCKSIZE, Nf4Linear, Nf4Weight
from turret.server.models.weights.nf4_cpu import nf4_expert_products
from turret.server.words import say


class Nf4Experts:
    """``x_p W_eᵀ`` for pairs of a row and an expert, without bias.

    Args:
        experts: Per expert, slices that share their input.
        dtype: Of activations.
        device: Where they are served.
        gpu: Whether the gpu path serves them.

    Attributes:
        out_features: Outputs of an expert.
        in_features: Its inputs.
    """

    def __init__(
        self,
        experts: Sequence[Sequence[Nf4Weight]],
        dtype: torch.dtype,
        device: torch.device,
        *,
        gpu: bool = False,
    ) -> None:
        self.out_features = sum(weight.shape[0] for weight in experts[0])
        self.in_features = experts[0][0].shape[1]
        self._dtype = dtype
        self._experts: list[Nf4Linear] = []
        self._addresses: torch.Tensor | None = None
        self._stacked: Nf4Matrix | None = None
        if gpu:
            self._stacked = self._stack(experts, device)
            return
        self._experts = [Nf4Linear(slices, dtype, device) for slices in experts]
        # The C product computes all experts in one call.
        packed = [expert.packed for expert in self._experts if expert.packed is not None]
        if has_native_products() and len(packed) == len(self._experts):
            addresses = [[tensor.data_ptr() for tensor in pair] for pair in packed]
            self._addresses = torch.tensor(addresses, dtype=torch.int64)

    def _stack(self, experts: Sequence[Sequence[Nf4Weight]], device: torch.device) -> Nf4Matrix:
        if self.in_features % BLOCKSIZE:
            said = say("EXPERT_WIDTH_UNSUPPORTED", width=self.in_features, multiple=BLOCKSIZE)
            raise InvalidRequestError.of("model", said)
        slices = [weight for expert in experts for weight in expert]
        packed = torch.cat([weight.packed.view(-1) for weight in slices]).to(device)
        absmax = torch.cat([weight.absmax() for weight in slices]).to(device)
        return Nf4Matrix(packed, absmax, len(experts) * self.out_features, self.in_features)

    def __call__(
        self, x: torch.Tensor, routing: Routing, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Multiply every pair by its expert's weight.

        Args:
            x: ``[rows, in]``, or ``[pairs, in]``.
            routing: The pairs.
            rows: The row of ``x`` that each pair reads, ``[pairs]`` int64; None for its own.

        Returns:
            ``[pairs, out]``, dtype of ``x``.
        """
        if self._stacked is not None:
            # Imported here: the other paths run where Triton is not installed.
            from turret.kernels.gpu.experts import nf4_experts

            return nf4_experts(x, self._stacked, routing, rows)
        x = x if rows is None else x.index_select(0, rows)
        if self._addresses is not None:
            shape = self.out_features, self.in_features
            return nf4_expert_products(x, routing.ends, self._addresses, shape)
        parts = [self._experts[expert](x[pairs]) for expert, pairs in routing.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def dequantize(self, expert: int) -> torch.Tensor:
        """An expert's weight as multiplied, ``[out, in]`` fp32, on the CPU; do not write to it."""
        if self._stacked is not None:
            return self._part(self._stacked, expert).dequantize(self._dtype).float().cpu()
        linear = self._experts[expert]
        parts = [linear.dequantize(index) for index in range(len(linear.widths))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, stacked: Nf4Matrix, expert: int) -> Nf4Matrix:
        codes = self.out_features * self.in_features // 2
        maxima = self.out_features * self.in_features // BLOCKSIZE
        assert isinstance(stacked.absmax, torch.Tensor)
        return Nf4Matrix(
            stacked.packed[expert * codes : (expert + 1) * codes],
            stacked.absmax[expert * maxima : (expert + 1) * maxima],
            self.out_features,
            self.in_features,
        )
