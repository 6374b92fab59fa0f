"""OFT (arXiv 2306.07280): the base multiplies ``x R``, where ``R`` is block-diagonal.

A file has one of three layouts:

- PEFT from 0.16: ``oft_R.weight``, the upper triangle of a skew ``Q`` per block. ``R`` is Cayley's
  ``(I − Q)(I + Q)⁻¹``, or with ``use_cayley_neumann`` the first terms of a series for
  ``(I + Q)(I − Q)⁻¹``. PEFT 0.18 changed this series: before, it was ``I + 2Q + … + 2Qᵗ⁻¹``; since
  then, the last term is halved. An adapter needs the series with which it was trained, which
  ``peft_version`` determines.
- The same layout with ``block_share``: one block for all inputs.
- PEFT 0.14 and 0.15: ``oft_r``, whose skew part is ``Q``, and ``oft_s``, a gain.

Before 0.14, PEFT rotated outputs. Files from those versions are rejected, because they have no
``oft_block_size``.
"""

from __future__ import annotations

import re

from turret.server.adapters.methods.kit import *

_TRIANGLE, _MATRIX, _SCALE = "oft_R.weight", "oft_r", "oft_s"
# PEFT's default is 5 terms. The limit exists because each term takes time during a load.
_MAX_TERMS = 100
# First PEFT version whose series ends with half a term.
_NEW_SERIES = (0, 18)


def _fault_of_pattern(value: Any) -> Text | None:
    return invalid(value, "empty") if value else None


def _conflicts(config: Mapping[str, Any]) -> Iterable[tuple[str, Text]]:
    if bool(config.get("r")) == bool(config.get("oft_block_size")):
        yield "oft_block_size", say("SET_EXACTLY_ONE", keys="r and oft_block_size")
    # Keys that determine how R is computed from Q have no default.
    if config.get("use_cayley_neumann") and "num_cayley_neumann_terms" not in config:
        yield "num_cayley_neumann_terms", say("REQUIRED")
    if config.get("coft") and "eps" not in config:
        yield "eps", say("REQUIRED")


def _block_size(m: Module) -> int:
    """The block size, which PEFT derives from the config so that it divides the inputs."""
    if m.config["oft_block_size"]:
        return dividing(m.inputs, m.config["oft_block_size"])
    return m.inputs // dividing(m.inputs, m.config["r"])


def dividing(in_features: int, wanted: int) -> int:
    """The divisor of ``in_features`` that is closest to ``wanted``; on a tie, the smaller one.

    PEFT derives the block size from it.
    """
    if wanted >= in_features:
        return in_features
    lower = next(n for n in range(wanted, 0, -1) if in_features % n == 0)
    higher = next(n for n in range(wanted, in_features + 1) if in_features % n == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _shape(*size: Dim) -> Callable[[Module], Shape]:
    def shape(m: Module) -> Shape:
        blocks = 1 if m.config["block_share"] else m.inputs // _block_size(m)
        is_one = blocks == 1 or any(m.extent(role, 0) == 1 for role in (_TRIANGLE, _MATRIX))
        return Dim(lambda _: blocks, is_served=not is_one), *size

    return shape


def _is_old(m: Module) -> bool:
    return _MATRIX in m or _SCALE in m


def _operators(m: Module) -> Iterator[Piece]:
    yield InputBlocks(_rotation(m))
    if _SCALE in m:
        yield Gain(m.tensors[_SCALE])


def _rotation(m: Module) -> torch.Tensor:
    """``R − I``, ``[blocks, size, size]`` fp64."""
    config, size = m.config, _block_size(m)
    if _MATRIX in m:
        matrix = m.exact(_MATRIX)
        if config["coft"]:
            matrix = _projected(
                matrix, config["eps"] * math.ceil(m.outputs / (m.inputs // size)) ** 2
            )
        return cayley(0.5 * (matrix - matrix.transpose(1, 2)))
    skew = _skew(m.exact(_TRIANGLE), size)
    if config["coft"]:
        skew = _projected(skew, config["eps"])
    if not config.get("use_cayley_neumann"):
        return cayley(skew)
    return _series(skew, config["num_cayley_neumann_terms"], _is_new(config.get("peft_version")))


def _series(skew: torch.Tensor, terms: int, is_new: bool) -> torch.Tensor:
    """The first terms of ``(I + Q)(I − Q)⁻¹ − I = 2 (Q + Q² + …)``."""
    # PEFT 0.18 and later always use Q³ if they use Q².
    last = max(terms - 1, 3) if is_new and terms > 2 else terms - 1
    power, total = torch.eye(skew.shape[1], dtype=skew.dtype), torch.zeros_like(skew)
    for exponent in range(1, last + 1):
        power = power @ skew
        total = total + (1.0 if is_new and exponent == last > 2 else 2.0) * power
    return total


def _is_new(version: str | None) -> bool:
    """Whether this version of PEFT has the series of 0.18.

    Configs from earlier versions do not contain the version.
    """
    parts = re.match(r"(\d{1,4})\.(\d{1,4})", version or "")
    return parts is not None and (int(parts[1]), int(parts[2])) >= _NEW_SERIES


def _skew(triangle: torch.Tensor, size: int) -> torch.Tensor:
    rows, columns = torch.triu_indices(size, size, 1)
    upper = torch.zeros(len(triangle), size, size, dtype=triangle.dtype)
    upper[:, rows, columns] = triangle
    return upper - upper.transpose(1, 2)


def _projected(blocks: torch.Tensor, eps: float) -> torch.Tensor:
    """The blocks, each limited to a norm of ``eps`` divided by √(number of blocks) (``coft``)."""
    limit = eps / math.sqrt(len(blocks))
    norms = blocks.flatten(1).norm(dim=1)[:, None, None]
    return torch.where(norms <= limit, blocks, limit * (blocks / norms))


def _start(m: NewModule) -> dict[str, torch.Tensor]:
    size = dividing(m.inputs, 2 * m.rank)
    return {_TRIANGLE: m.zeros(m.inputs // size, size * (size - 1) // 2)}


def _start_config(rank: int, targets: Sequence[str]) -> dict[str, Any]:
    """PEFT's defaults, with blocks that cost as much as a LoRA of the rank."""
    return {
        **{"r": 0, "oft_block_size": 2 * rank, "coft": False, "block_share": False},
        **{"use_cayley_neumann": True, "num_cayley_neumann_terms": 5},
        "peft_version": ".".join(map(str, _NEW_SERIES)),
    }


_BLOCK = Dim(_block_size)
_ABOVE = Dim(lambda m: _block_size(m) * (_block_size(m) - 1) // 2)

METHOD = LinearMethod(
    name="oft",
    peft_types={"OFT"},
    keys={
        "r": fault_of_count,
        "oft_block_size": fault_of_count,
        "block_share": fault_of_bool,
        "coft": fault_of_bool,
        "eps": fault_of_number,
        "use_cayley_neumann": fault_of_bool,
        "num_cayley_neumann_terms": fault_of_integer(1, _MAX_TERMS),
        "peft_version": optional(fault_of_text),
        "rank_pattern": _fault_of_pattern,
        "alpha_pattern": _fault_of_pattern,
    },
    ignored={"module_dropout": DROPOUT},
    bias=("oft_only",),
    rank=None,
    rank_name="block size",
    rank_of=_block_size,
    required=("r", "oft_block_size", "coft", "block_share"),
    conflicts=_conflicts,
    tensors={
        _TRIANGLE: when(lambda m: not _is_old(m), _shape(_ABOVE)),
        _MATRIX: when(_is_old, _shape(_BLOCK, _BLOCK)),
        _SCALE: when(_is_old, (OUT, 1)),
    },
    operators=_operators,
    start=Start(_start, _start_config),
)
