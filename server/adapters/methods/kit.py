"""Everything that a method's file imports, for its declaration and for making operators.

A method is one file that assigns ``METHOD``. Its declaration names the values of ``peft_type``, the
config keys that it reads (each with a check), the keys that it ignores (each with the reason) and
the tensors with their shapes. The declaration determines which adapters are served, every
rejection, the check of a header before the weights are read, and the tables in docs/adapters.md.
A declaration's function ``operators`` turns the tensors of a module into operators.

``torch`` is imported here at its first use, so that the declarations do not need it.
"""

from __future__ import annotations

# Some of these imports are used only by the methods, which import all names of this file.
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from turret.lazy_torch import torch
from turret.server.adapters.base import BaseModel
from turret.server.adapters.component import COMPONENTS_KEY, Component, fault_of_components, unfit
from turret.server.adapters.lowering import (
    Assembly,
    LinearMethod,
    Lowered,
    Method,
    NewModule,
    Piece,
    Pieces,
    Scaled,
    Start,
    find_components,
    finish,
    gate_of,
    low_rank,
    query_score,
    sparse,
    times_weight,
    update_of,
    weight_times,
)
from turret.server.adapters.operators.circulant import Circulant
from turret.server.adapters.operators.dense import Dense
from turret.server.adapters.operators.hadamard import Hadamard
from turret.server.adapters.operators.input_blocks import InputBlocks
from turret.server.adapters.operators.kronecker import Kronecker
from turret.server.adapters.operators.low_rank import LowRank
from turret.server.adapters.operators.modulated_base import ModulatedBase
from turret.server.adapters.operators.pair_rotation import PairRotation
from turret.server.adapters.operators.vectors import Bias, Gain, InputGain
from turret.server.adapters.peft_format.config_rules import (
    DROPOUT,
    IN_TENSORS,
    PEFTS_WORK,
    START,
    TRAINING,
    fault_of_bool,
    fault_of_choice,
    fault_of_count,
    fault_of_integer,
    fault_of_number,
    fault_of_positive,
    fault_of_rank,
    fault_of_seed,
    fault_of_text,
    invalid,
    optional,
)
from turret.server.adapters.peft_format.linear_format import (
    ANY,
    IN,
    OUT,
    UNREAD,
    Dim,
    LinearFormat,
    Misfit,
    R,
    Shape,
    Shared,
    StopChecks,
    either,
    extent,
    indices,
    key,
    optionally,
    when,
)
from turret.server.adapters.peft_format.reading import Module, Reading
from turret.server.adapters.peft_format.targets import (
    MAX_LIST_ITEMS,
    fault_of_optional_selector,
    fault_of_patterns,
    fault_of_rank_pattern,
)
from turret.server.words import Text, say

LYCORIS_IGNORED = {
    "rank_dropout": DROPOUT,
    "module_dropout": DROPOUT,
    "use_effective_conv2d": "read for convolutions; the models served have none",
}


def always(config: Mapping[str, Any]) -> bool:
    """A value of ``is_dense`` for methods whose updates are full matrices with any config."""
    return True


def is_saved(adapter: Module | Reading) -> bool:
    """Whether the file contains the method's fixed random matrices, which it may leave out."""
    return adapter.config.get("save_projection", True)


def needs_seed(config: Mapping[str, Any]) -> Iterable[tuple[str, Text]]:
    """Reports a config that omits the fixed random matrices and has no seed to draw them from."""
    if not config.get("save_projection", True) and "projection_prng_key" not in config:
        yield "projection_prng_key", say("REQUIRED")


def drawn(names: str, seed: str = "projection_prng_key") -> Text:
    """The warning for an adapter whose fixed tensors were drawn again."""
    return say("DRAWN_AGAIN", names=names, seed=seed)


def drawn_places(m: Module, count: int) -> torch.Tensor:
    """Positions of coefficients in a weight, drawn from ``random_loc_seed`` as PEFT draws them."""
    m.warn(drawn("the positions of the coefficients", "random_loc_seed"))
    return m.once(_place_drawer)(m.outputs * m.inputs, count)


def _place_drawer(adapter: Reading) -> Callable[[int, int], torch.Tensor]:
    """Makes the function that draws positions of a module's entries as PEFT does.

    Returns:
        ``(count, size)`` → the first ``size`` of a permutation of ``count`` positions, int64. The
        function caches permutations for modules of the same size. The cache lives only as long as
        the function, because the permutations for a large weight can take half a gigabyte.
    """

    @functools.lru_cache(maxsize=8)
    def draw(count: int, size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(adapter.config["random_loc_seed"])
        # Copy the part that is needed: a permutation of all positions can take more than 100 MB.
        return torch.randperm(count, generator=generator)[:size].clone()

    return draw


def check_coefficients(m: Module, role: str) -> None:
    """Reports a coefficient vector that is empty, or has more entries than the weight."""
    shape, size = tuple(m.tensors[role].shape), m.inputs * m.outputs
    if len(shape) != 1 or not shape[0]:
        wanted = "a vector with at least one coefficient"
        m.fault(role, say("WRONG_SHAPE", shape=list(shape), expected=wanted))
    elif shape[0] > size:
        m.misfit(
            say("WRONG_COUNT", found=shape[0], what="coefficients", expected=f"at most {size}"),
            role,
        )


def check_places(module: Module) -> None:
    """Reports a module with more inputs than a sparse update can index."""
    most = 1 << 16
    if module.inputs > most:
        expected = f"at most {most} for a sparse update"
        why = say("WRONG_COUNT", found=module.inputs, what="inputs", expected=expected)
        module.reading.fault(module.name, why)


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """``R − I = −2 Q (I + Q)⁻¹`` of ``R = (I − Q)(I + Q)⁻¹``, without cancellation.

    Args:
        skew: ``Q``, ``[blocks, size, size]``, fp32 or wider.
    """
    eye = torch.eye(skew.shape[1], dtype=skew.dtype)
    return torch.linalg.solve(eye + skew, -2.0 * skew, left=False)


def components_of(adapter: Reading) -> Sequence[Component]:
    """The components of this adapter, in the config's order."""
    components = find_components(adapter)
    adapted = {name for component in components for name in component.operators.modules}
    if count := len(adapted.difference(adapter.modules)):
        adapter.warn(say("COMPONENTS_ADAPT_MORE", count=count))
    return components


def without(table: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The table without some of its keys."""
    return {name: value for name, value in table.items() if name not in keys}
