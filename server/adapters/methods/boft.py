"""BOFT (arXiv 2311.06243): ``y = s ⊙ W (x M) + b``, where ``M`` is a product of butterfly factors.

``M = M_N … M_1`` and ``M_i = P_i diag(R_i) P_iᵀ``. Each block of ``R_i`` is the Cayley transform of
the skew part of the saved block of size ``b``. The permutation ``P_i`` moves inputs only within
runs of ``b 2ⁱ⁻¹``, so ``M`` is block-diagonal again, with blocks of size ``b 2ᴺ⁻¹``. If PEFT's CUDA
extension is missing, PEFT trains only one factor, whatever the config says.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_R, _S = "boft_R", "boft_s"


def _conflicts(config: Mapping[str, Any]) -> Iterable[tuple[str, Text]]:
    if bool(config.get("boft_block_size")) == bool(config.get("boft_block_num")):
        yield "boft_block_size", say("SET_EXACTLY_ONE", keys="boft_block_size and boft_block_num")


def _block_size(m: Module) -> int:
    return m.config["boft_block_size"] or (IN / key("boft_block_num")).of(m)


def _factors(m: Module) -> int:
    return m.extent(_R, 0) if len(m.tensors[_R].shape) == 4 else 1


_FACTORS = Dim(lambda m: _factors(m) if _R in m else 1)
_SIZE = Dim(_block_size)


def _check(m: Module) -> None:
    factors, size = _factors(m), _block_size(m)
    wanted = m.config["boft_n_butterfly_factor"]
    if factors not in (1, wanted):
        m.fault(_R, say("WRONG_COUNT", found=factors, what="factors", expected=wanted))
    elif factors > 1 and size % 2:
        m.fault(_R, say("NOT_DIVISIBLE", size=size, what="rows of a block", by=2))
    elif m.inputs % _run(m):
        raise Misfit(say("NOT_DIVISIBLE", size=m.inputs, what="inputs", by=_run(m)))


def _run(m: Module) -> int:
    """Number of inputs in a block of the product ``M``."""
    return _block_size(m) << (_factors(m) - 1)


def _operators(m: Module) -> tuple[Piece, Piece]:
    return InputBlocks(_product(m.exact(_R))), Gain(m.tensors[_S])


def _product(saved: torch.Tensor) -> torch.Tensor:
    """``M − I``, ``[blocks / 2ᴺ⁻¹, b 2ᴺ⁻¹, b 2ᴺ⁻¹]``, from saved ``[N, blocks, b, b]`` fp64."""
    num_factors, count, size, _ = saved.shape
    run = size << (num_factors - 1)
    total: torch.Tensor | None = None
    for number, factor in enumerate(saved):
        change = cayley(0.5 * (factor - factor.transpose(1, 2)))
        inside = change.view(count * size // run, run // size, size, size)
        wide = torch.stack([torch.block_diag(*blocks) for blocks in inside])
        order = _order(run, size << number, size // 2) if num_factors > 1 else torch.arange(run)
        wide = wide[:, order][:, :, order]
        # Multiply the next factor I + C and the product so far, I + T: (I + C)(I + T) − I.
        total = wide if total is None else wide + total + wide @ total
    assert total is not None
    return total


def _order(run: int, width: int, half: int) -> torch.Tensor:
    """The butterfly's order: of every ``width`` inputs, the even half-blocks, then the odd ones."""
    halves = torch.arange(run).view(run // width, width // half, half)
    return torch.cat((halves[:, ::2], halves[:, 1::2]), dim=1).flatten()


METHOD = LinearMethod(
    name="boft",
    peft_types={"BOFT"},
    keys={
        "boft_block_size": fault_of_count,
        "boft_block_num": fault_of_count,
        "boft_n_butterfly_factor": fault_of_rank,
    },
    ignored={"boft_dropout": DROPOUT},
    bias=("boft_only",),
    rank=None,
    rank_name="block size",
    rank_of=_run,
    required=("boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
    conflicts=_conflicts,
    tensors={_R: (_FACTORS, IN / _SIZE, _SIZE, _SIZE), _S: (OUT, 1)},
    check=_check,
    operators=_operators,
)
