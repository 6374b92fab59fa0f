"""RandLoRA (arXiv 2502.00987): ``ΔW = s·Σ_n B_n diag(λ_n) A diag(γ_n)``; ``A``, ``B`` are random.

All modules share ``A`` and ``B``, which are fixed. Each module uses the corner that fits its sizes;
if it has more inputs than outputs, the product is transposed. The sum has as many terms, called
bases, as the full rank needs.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_LAMBDA, _GAMMA = "randlora_lambda", "randlora_gamma"
_COPIES = ("randlora_A", "randlora_B")
# Ranks up to this are accepted for any base, even if they exceed the sizes of its weights.
_SMALL_RANK = 512
_A, _B = (f"base_model.{name}" for name in _COPIES)
# Sparsity of a sparse basis, as in PEFT: an entry is nonzero with probability 1/3.
_SPARSITY = 3
_LEAST = Dim(lambda m: min(m.inputs, m.outputs), is_served=True)
_MOST = Dim(lambda m: max(m.inputs, m.outputs), is_served=True)
# Number of bases that make the full rank.
_BASES = Dim(lambda m: -(-_LEAST.of(m) // m.rank), is_served=True)


def _check(adapter: Reading) -> None:
    if adapter.rank > max(_MOST.of(adapter), _SMALL_RANK):
        # The bases would be larger than any weight. A file without them is small at any rank, so it
        # could make the server allocate too much memory.
        most = max(_MOST.of(adapter), _SMALL_RANK)
        adapter.fault("r", say("NOT_IN_RANGE", least=1, most=most, value=adapter.rank))
    for role in _COPIES:
        has = [role in m for m in adapter.modules.values()]
        for name, m in adapter.modules.items():
            if role in m and not is_saved(adapter):
                m.fault(role, say("UNEXPECTED_TENSOR", by="save_projection"))
            elif any(has) and role not in m:
                adapter.fault(f"{name}.{role}", say("MISSING_TENSOR", by="the config"))


def _bases(adapter: Reading) -> tuple[torch.Tensor, torch.Tensor]:
    """``A`` ``[r, 1, least]`` and ``B`` ``[most, bases, r]``, saved or drawn again."""
    if is_saved(adapter):
        return adapter.shared[_A], adapter.shared[_B]
    adapter.warn(drawn("randlora_A and randlora_B"))
    rank, least, most = adapter.rank, _LEAST.of(adapter), _MOST.of(adapter)
    return _draw(adapter, (rank, 1, least), (most, _BASES.of(adapter), rank))


def _operators(m: Module) -> Piece | tuple[()]:
    a, b = m.once(_bases)
    for role, whole in zip(_COPIES, (a, b), strict=True):
        if role in m and not torch.equal(m.tensors[role], whole):
            m.fault(role, say("DIFFERENT_COPY", other=f"base_model.{role}"))
    lambdas, gamma = m.wide(_LAMBDA, _GAMMA)
    count, wide = len(gamma), gamma.dtype
    scaled = lambdas[:, :, None] * a[:, :, : _LEAST.of(m)].to(wide) * gamma
    # PEFT flattens A by ranks first and B by bases first, and the adapter was trained that way.
    update = b[: _MOST.of(m), :count].to(wide).flatten(1) @ scaled.flatten(0, 1)
    update = update if m.inputs == _LEAST.of(m) else update.T
    return Dense(update * (m.config["randlora_alpha"] / m.config["r"]))


def _draw(
    adapter: Reading, a: tuple[int, ...], b: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws PEFT's bases in bf16, as PEFT does wherever bf16 is supported."""
    config = adapter.config
    generator = torch.Generator(device="cpu").manual_seed(config["projection_prng_key"])
    if config.get("sparse") or config.get("very_sparse"):
        sparsity = math.sqrt(a[2]) if config.get("very_sparse") else _SPARSITY
        first, second = torch.rand(a, generator=generator), torch.rand(b, generator=generator)
        return _ternary(first, sparsity), _ternary(second, sparsity)

    def draw(*shape: int) -> torch.Tensor:
        values = torch.empty(shape, dtype=torch.bfloat16)
        return torch.nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)

    first = draw(*a)
    second = torch.cat([draw(b[0], 1, b[2]) for _ in range(b[1])], dim=1)
    return first / first.std(), second / second.std()


def _ternary(uniform: torch.Tensor, sparsity: float) -> torch.Tensor:
    share = 1 / (2 * sparsity)
    signs = (uniform > 1 - share).float() - (uniform < share).float()
    return signs / signs.std()


METHOD = LinearMethod(
    name="randlora",
    peft_types={"RANDLORA"},
    keys={
        "randlora_alpha": fault_of_number,
        "save_projection": fault_of_bool,
        "projection_prng_key": fault_of_seed,
        "sparse": optional(fault_of_bool),
        "very_sparse": optional(fault_of_bool),
    },
    ignored={"randlora_dropout": DROPOUT},
    bias=("randlora_only",),
    # r is the size of a basis; the update can have any rank.
    rank_of=lambda m: 0,
    required=("randlora_alpha",),
    conflicts=needs_seed,
    tensors={
        _LAMBDA: (R, _BASES),
        _GAMMA: (_BASES, _LEAST),
        # PEFT writes the shared matrices again for every module.
        **dict.fromkeys(_COPIES, UNREAD),
    },
    shared={_A: when(is_saved, (R, 1, _LEAST)), _B: when(is_saved, (_MOST, _BASES, R))},
    check_all=_check,
    is_dense=always,
    operators=_operators,
)
