"""How high a rank can be: on the modules that a method adapts, and on a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from turret.server.adapters.methods.kit import LinearMethod
from turret.server.adapters.methods.low_rank import miss
from turret.server.adapters.methods.structured.loha import highest_rank
from turret.server.adapters.methods.transforms import hra
from turret.server.config import AdapterConfig
from turret.server.models.decoding.arch import Projections
from turret.training.errors import ConfigError

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
    problem = _PROBLEMS[method](sizes, rank) if method in _PROBLEMS and sizes else None
    if problem is not None:
        raise ConfigError.of("method.rank", problem)


def highest_loha_rank(sizes: Sequence[Size]) -> int:
    """The highest rank of a LoHa that the server takes on all of these modules."""
    return min(highest_rank(inner, out) for _, out, inner in sizes)


def _over_both_sides(sizes: Sequence[Size], rank: int) -> str | None:
    """Of an update ``B A``, whose rank is at most the weight's."""
    name, out, inner = min(sizes, key=lambda size: min(size[1:]))
    if rank <= min(out, inner):
        return None
    return (
        f"at most {min(out, inner)} on these modules: {name} has {inner} inputs and {out} outputs,"
        " and no update of it has a higher rank"
    )


def _over_most(method: LinearMethod, sizes: Sequence[Size], rank: int) -> str | None:
    """A rank over the one that the server takes on the smallest of the modules."""
    assert method.most_rank is not None
    limits = [(method.most_rank(inner, out), name) for name, out, inner in sizes]
    most, name = min(limits, key=lambda limit: limit[0])
    if rank <= most:
        return None
    return f"at most {most} on these modules, which is as much as {name} takes"


def _over_loha(sizes: Sequence[Size], rank: int) -> str | None:
    highest = highest_loha_rank(sizes)
    if rank <= highest:
        return None
    return f"LoHa is served up to rank {highest} on these modules of this base"


def _over_entries(sizes: Sequence[Size], rank: int) -> str | None:
    """Of SHiRA's, which trains rank · (out + in) entries of a weight."""
    highest = min(out * inner // (out + inner) for _, out, inner in sizes)
    if rank <= highest:
        return None
    return f"at most {highest}, where all entries of one of these modules are trained"


_PROBLEMS: Mapping[str, Callable[[Sequence[Size], int], str | None]] = {
    **dict.fromkeys(("lora", "rslora", "dora", "alora", "vblora"), _over_both_sides),
    **{method.name: partial(_over_most, method) for method in (hra.METHOD, miss.METHOD)},
    "loha": _over_loha,
    "shira": _over_entries,
}
