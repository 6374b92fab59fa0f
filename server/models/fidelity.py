"""How the served weights differ from those in the model's files.

Every linear module of the decoder layers is in one of four states. The report counts the modules of
each kind and state, with the quantisation error of those that turret quantised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from turret.lazy_torch import torch

# A state of a module's weight. ``as-stored``: the values of NF4 or MXFP4 are those of the file.
# ``requantized``: the file has another quantised format, so the weight was rounded twice.
# ``quantized``: rounded once, from 16 or 32 bits. ``16-bit``: not quantised.
WeightState = Literal["as-stored", "requantized", "quantized", "16-bit"]
_INDEX = re.compile(r"\.\d+(?=\.|$)")


def kind_of(path: str) -> str:
    """``model.layers.3.self_attn.q_proj`` → ``q_proj``; ``….experts.7.w1`` → ``experts.w1``."""
    module = path.removesuffix(".weight")
    _, found, expert = module.rpartition(".experts.")
    if found:
        return _INDEX.sub("", f"experts.{expert}")
    return module.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class ModuleKind:
    """Modules of one kind in one state.

    Attributes:
        module: The kind, as ``kind_of`` names it.
        state: The state of the weights.
        source: The quantised format in the files, such as ``fp4``; empty for plain numbers, and for
            NF4 that is served as stored.
        count: The number of modules.
        relative_error: ``‖served − stored‖ / ‖stored‖`` over all of them (Frobenius), None if
            turret did not quantise them or if the error is not known.
    """

    module: str
    state: WeightState
    source: str
    count: int
    relative_error: float | None

    def __str__(self) -> str:
        source = f" from {self.source}" if self.source else ""
        error = "" if self.relative_error is None else f" (error {100 * self.relative_error:.2g}%)"
        return f"{self.count} {self.module} {self.state}{source}{error}"


class Fidelity:
    """Collects the states of modules."""

    def __init__(self) -> None:
        # Kind, state and format → count, squared error, squared norm.
        self._found: dict[tuple[str, WeightState, str], list[float]] = {}

    def count(
        self,
        path: str,
        state: WeightState,
        source: str = "",
        squares: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Count a module.

        Args:
            path: The path of the module or of its weight.
            state: See ``WeightState``.
            source: See ``ModuleKind``.
            squares: The squared norms of the error and of the weight.
        """
        found = self._found.setdefault((kind_of(path), state, source), [0, 0.0, 0.0])
        for i, value in enumerate((1, *squares)):
            found[i] += value

    def kinds(self) -> list[ModuleKind]:
        """The report: one entry for each kind, state and source."""
        return [
            ModuleKind(*key, int(count), (error / norm) ** 0.5 if norm else None)
            for key, (count, error, norm) in self._found.items()
        ]

    def __str__(self) -> str:
        """``30 q_proj quantized (error 9.2%), 2 down_proj 16-bit``."""
        return ", ".join(map(str, self.kinds()))

    def storage(self) -> dict[str, dict[str, int]]:
        """Kind of module → ``4-bit`` or ``16-bit`` → the number of modules."""
        found: dict[str, dict[str, int]] = {}
        for (module, state, _), (count, _, _) in self._found.items():
            bits, counts = "16-bit" if state == "16-bit" else "4-bit", found.setdefault(module, {})
            counts[bits] = counts.get(bits, 0) + int(count)
        return found

    def shown(self) -> dict[str, str]:
        """Kind of module → its part of the report."""
        found: dict[str, list[str]] = {}
        for kind in self.kinds():
            found.setdefault(kind.module, []).append(str(kind))
        return {module: ", ".join(parts) for module, parts in found.items()}

    def rows(self) -> list[list[Any]]:
        """The contents as JSON values; see ``of_rows``."""
        return [[*key, *sums] for key, sums in self._found.items()]

    @classmethod
    def of_rows(cls, rows: Iterable[list[Any]]) -> Fidelity:
        """Restore the contents from what ``rows`` returned."""
        made = cls()
        made._found = {tuple(row[:3]): row[3:] for row in rows}  # type: ignore[misc]
        return made


def squared_error(weight: torch.Tensor, served: torch.Tensor) -> tuple[float, float]:
    """The squared norms of ``served − weight`` and of ``weight``, summed in fp32."""
    weight = weight.float()
    error = served.float().sub_(weight)
    return float(torch.linalg.vector_norm(error)) ** 2, float(torch.linalg.vector_norm(weight)) ** 2
