"""How high a rank can be: on the modules that a method adapts, and on a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from turret.server.adapters.methods.kit import LinearMethod
from turret.server.adapters.methods.low_rank import miss
from turret.server.adapters.methods.structured.loha import highest_rank
from turret.server.adapters.methods.transforms import hra
from turret.server.config import AdapterConfig
from turret.server.models.decoding.arch import Projections
from turret.training.errors import ConfigError
from turret.training.words import say

# The server's default --max-rank.
SERVED_RANK = AdapterConfig().max_rank
# (last part of the module path, out_features, in_features).
Size = tuple[str, int, int]


def module_sizes(projections: Projections, targets: Sequence[str]) -> Iterator[Size]:
    """Last part of the path, outputs and inputs of each kind of module that is adapted.

    Args:
        projections: Of the base.
        targets: Module names, as ``expand_targets`` gives them.
    """
    for slices in projections.linears().values():
        for path, out, inner in slices:
            name = path.rpartition(".")[2]
            if name in targets:
                yield name, out, inner
    if projections.experts is None:
        return
    for projection, (_, out, inner) in projections.expert_linears().items():
        templates = projections.experts.modules[projection]
        for name in (template.removeprefix("{}.") for template in templates):
            if name in targets:
                yield name, out // len(templates), inner


def check_rank(method: str, sizes: Sequence[Size], rank: int) -> None:
    """Refuse a rank that the method cannot have on modules of these sizes.

    Raises:
        ConfigError: Says how high it may be.
    """
    if method not in _HIGHEST or not sizes:
        return
    limits = [(_HIGHEST[method](inner, out), name) for name, out, inner in sizes]
    highest, module = min(limits, key=lambda limit: limit[0])
    if rank > highest:
        text = say("RANK_TOO_HIGH", most=highest, method=method, value=rank, module=module)
        raise ConfigError.of("method.rank", text)


def highest_loha_rank(sizes: Sequence[Size]) -> int:
    """The highest rank of a LoHa that the server takes on all of these modules."""
    return min(highest_rank(inner, out) for _, out, inner in sizes)


def _most_rank(method: LinearMethod) -> Callable[[int, int], int]:
    assert method.most_rank is not None
    return method.most_rank


def _highest_shira_rank(inner: int, out: int) -> int:
    """SHiRA trains rank · (out + in) entries of a weight, which has out · in."""
    return out * inner // (out + inner)


# Highest rank by the inputs and outputs of a module. That of an update ``B A`` is at most the
# weight's.
_HIGHEST: Mapping[str, Callable[[int, int], int]] = {
    **dict.fromkeys(("lora", "rslora", "dora", "alora", "vblora"), min),
    **{method.name: _most_rank(method) for method in (hra.METHOD, miss.METHOD)},
    "loha": highest_rank,
    "shira": _highest_shira_rank,
}
