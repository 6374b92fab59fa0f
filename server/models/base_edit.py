"""Other weights for some modules of the base, beside those it has."""

from __future__ import annotations

import torch

from turret.server.adapters.base import Precision
from turret.server.models.decoding.adapted_linear import AdaptedLinear
from turret.server.models.decoding.decoder import Decoder
from turret.server.models.describe import projections
from turret.server.models.weights.base_linear import BaseLinear, DenseLinear, join_linears
from turret.server.models.weights.nf4 import Nf4Linear, Nf4Weight


class BaseEdit:
    """Collects weights; ``swap`` then exchanges them with the decoder's own, back and forth.

    The decoder's weights are never written to: whatever fails before ``swap``, the base is as it
    was. Nor are they freed, so that a second ``swap`` brings back the very same memory. What an
    edit takes is the packed size of the fused projections that it changes (NF4), or two bytes a
    weight of the changed modules (BF16).

    Args:
        decoder: Every projection as loaded.
        precision: ``NF4`` quantises each module anew, as bitsandbytes does: block 64, double
            quantisation. ``BF16`` stores each weight with one rounding; the other modules of a
            fused projection stay 4-bit.
    """

    def __init__(self, decoder: Decoder, precision: Precision) -> None:
        self._decoder = decoder
        self._precision = precision
        self._dtype, self._device = decoder.dtype, decoder.device
        self._projections = dict(projections(decoder))
        self._owner = {
            path: linear for linear, paths in self._projections.items() for path in paths
        }
        self._parts: dict[str, Nf4Linear | DenseLinear] = {}
        self._biases: dict[str, torch.Tensor] = {}
        self._others: list[tuple[AdaptedLinear, BaseLinear, torch.Tensor | None]] = []

    def put_weight(self, path: str, weight: torch.Tensor) -> torch.Tensor:
        """Store a module's new weight.

        Args:
            path: Full path of the module.
            weight: ``[out, in]`` fp32, on the CPU.

        Returns:
            The weight as it will be multiplied, ``[out, in]`` fp32, on the CPU.
        """
        if self._precision == "NF4":
            part = _nf4(self._owner[path]).stored_alike(Nf4Weight.quantize(weight))
        else:
            rounded = weight.to(torch.bfloat16).to(self._device, self._dtype)
            part = DenseLinear(rounded.contiguous(), (weight.shape[0],))
        self._parts[path] = part
        return part.dequantize(0)

    def put_bias(self, path: str, change: torch.Tensor) -> None:
        """Store what is added to a module's bias, ``[out]`` fp32, on the CPU."""
        self._biases[path] = change

    def join(self) -> None:
        """Fuse what was stored with the slices that keep their weights; call it once."""
        for linear, paths in self._projections.items():
            base, bias = linear.base, linear.bias
            if any(path in self._parts for path in paths):
                own = _nf4(linear)
                parts = [self._parts.pop(path, None) or own.part(i) for i, path in enumerate(paths)]
                base = join_linears(parts)
            if any(path in self._biases for path in paths):
                bias = self._bias(linear, paths)
            if base is not linear.base or bias is not linear.bias:
                self._others.append((linear, base, bias))

    def _bias(self, linear: AdaptedLinear, paths: tuple[str, ...]) -> torch.Tensor:
        changes = [
            self._biases.get(path, torch.zeros(width))
            for path, width in zip(paths, linear.base.widths, strict=True)
        ]
        change = torch.cat(changes).to(self._device)
        total = change if linear.bias is None else linear.bias.float() + change
        return total.to(self._dtype)

    def swap(self) -> None:
        """Exchange the weights; only where nothing runs on them. Cannot fail half-way."""
        if self._device.type == "cuda":
            # The new weights were computed on another stream, and the last prompt chunks may still
            # be running.
            torch.cuda.synchronize(self._device)
        before = [(linear, linear.base, linear.bias) for linear, _, _ in self._others]
        for linear, base, bias in self._others:
            linear.base, linear.bias = base, bias
        self._others = before
        self._decoder.epoch += 1


def _nf4(linear: AdaptedLinear) -> Nf4Linear:
    assert isinstance(linear.base, Nf4Linear), "edits begin at the weights as loaded"
    return linear.base
