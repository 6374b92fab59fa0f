"""The shapes, the device and the report that all parts of the GPU benchmark share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cuda import estimate
from cuda.kernel_launches import MODELS, Model
from cuda.timing import Report, Stopwatch

# Maximum RMS of the error over the RMS of the exact result: one rounding, and sums in another
# order.
MAX_ERROR = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


@dataclass(frozen=True, slots=True)
class Setting:
    """Shapes, device and report of a run.

    Attributes:
        model: The shapes of the model.
        num_layers: The number of layers of the decode step.
        rows: The number of sequences of the decode step.
        context: The number of tokens before the step.
        dtype: The dtype of activations and adapters.
        adapters: The number of distinct adapters in the scenarios.
        rank: The rank of uniform scenarios.
        row_counts: The numbers of rows of the base product.
        stopwatch: Measures on the device.
        report: Collects rows.
        contexts: The contexts of the attention sweep.
    """

    model: Model
    num_layers: int
    rows: int
    context: int
    dtype: torch.dtype
    adapters: tuple[int, ...]
    rank: int
    row_counts: tuple[int, ...]
    stopwatch: Stopwatch
    report: Report
    contexts: tuple[int, ...]

    @classmethod
    def full(cls) -> Setting:
        """Llama-3.1-8B on the GPU."""
        device = torch.device("cuda", torch.cuda.current_device())
        return cls(
            model=MODELS["Llama-3.1-8B"],
            num_layers=32,
            rows=64,
            context=512,
            dtype=torch.bfloat16,
            adapters=(1, 8, 32, 64),
            rank=16,
            row_counts=(1, 4, 16, 32, 64),
            stopwatch=Stopwatch(device),
            report=Report(device, estimate.card_of(torch.cuda.get_device_name(device))),
            contexts=(512, 4096, 32768),
        )

    @classmethod
    def tiny(cls) -> Setting:
        """A toy model in the interpreter, which has no bf16 products."""
        device = torch.device("cpu")
        return cls(
            model=Model(hidden=64, heads=4, kv_heads=2, head_dim=16, inner=128, vocab=100),
            num_layers=1,
            rows=4,
            context=20,
            dtype=torch.float16,
            adapters=(1, 4),
            rank=8,
            row_counts=(1, 4),
            stopwatch=Stopwatch(device),
            # Any known card, so that the estimates are printed too.
            report=Report(device, estimate.card_of("H100")),
            contexts=(20, 300),
        )

    @property
    def device(self) -> torch.device:
        return self.stopwatch.device

    @property
    def heads(self) -> tuple[int, int, int]:
        """KV heads, queries per KV head and head dim."""
        model = self.model
        return model.kv_heads, model.heads // model.kv_heads, model.head_dim

    def random(self, *shape: int) -> torch.Tensor:
        """Normally distributed values in the setting's dtype, on its device."""
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def check(self, actual: torch.Tensor, exact: torch.Tensor) -> float:
        """The error ratio of a result.

        Raises:
            AssertionError: The ratio exceeds the bound, or a value is not finite.
        """
        difference = actual.double() - exact.double()
        ratio = float(difference.norm() / exact.double().norm())
        assert ratio < MAX_ERROR[self.dtype], f"error ratio {ratio:.3g}"
        return ratio
