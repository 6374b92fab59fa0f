"""LoRA (arXiv 2106.09685) and rsLoRA (arXiv 2312.03732): ``Δ(x) = s·B A x``.

``s`` is alpha/r, or alpha/√r for rsLoRA, with each module's own r and alpha. A bias inside
``lora_B`` is scaled, too. Biases that PEFT saved whole are converted to differences from the
base's. VeLoRA and MonteCLoRA differ from LoRA only in training.

The variants of LoRA in this package declare their changes to ``METHOD``.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.peft_format.expert_checkpoint import name_modules
from turret.server.adapters.peft_format.lora_rules import (
    ARROW,
    INVOCATION,
    LORA_IGNORED,
    LORA_KEYS,
    LORA_REFUSED,
    VARIANTS,
)

A, B, LORA_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
MAGNITUDE, DIAGONAL = "lora_magnitude_vector", "lora_diag"
_SAMPLER = "lora_monteclora_sampler"
_SAMPLER_PARTS = ("expert_weights", "expert_weights_prior", "gaussian_var_prior", "std_prior")


def _is_plain(config: Mapping[str, Any]) -> bool:
    """Whether the config selects plain LoRA.

    Malformed values count as plain LoRA, whose checks report them.
    """
    flags = any(config.get(key) is True for key in ("use_dora", "use_qalora"))
    flags = flags or isinstance(config.get(INVOCATION), list)
    return not flags and not any(
        isinstance(config.get(key), Mapping) for key in ("use_bdlora", "kasa_config", ARROW)
    )


def _conflicts(config: Mapping[str, Any]) -> Iterable[tuple[str, Text]]:
    first, *others = [key for key in VARIANTS if config.get(key)] or [""]
    for key in others:
        yield key, say("CONFLICTS_WITH", other=first)
    if config.get("use_dora") is True and config.get("lora_bias") is True:
        yield "lora_bias", say("CONFLICTS_WITH", other="use_dora")


def with_bias(m: Module, update: Piece) -> Iterator[Piece]:
    """A low-rank update, and the bias inside ``lora_B`` if there is one."""
    yield update
    if LORA_BIAS in m:
        yield Bias(m.tensors[LORA_BIAS].float() * m.scaling)


def operators(m: Module) -> Iterator[Piece]:
    return with_bias(m, Scaled(m.tensors[A], m.tensors[B], m.scaling))


def start(m: NewModule) -> dict[str, torch.Tensor]:
    return {A: m.kaiming(m.rank, m.inputs), B: m.zeros(m.outputs, m.rank)}


METHOD = LinearMethod(
    name="lora",
    peft_types={"LORA"},
    accepts=_is_plain,
    keys=LORA_KEYS,
    ignored=LORA_IGNORED,
    refused=LORA_REFUSED,
    bias=("lora_only",),
    conflicts=_conflicts,
    prepare=name_modules,
    alpha="lora_alpha",
    root="use_rslora",
    has_patterns=True,
    on_vocabulary=True,
    factors=(A, B),
    tensors={
        A: (R, IN),
        B: (OUT, R),
        LORA_BIAS: when("lora_bias", (OUT,)),
        # The three names come from PEFT's file format, PEFT's parameter and the original DoRA code.
        MAGNITUDE: replace(
            when("use_dora", either((OUT,), (1, OUT), (OUT, 1))),
            also_named=(f"{MAGNITUDE}.weight", "weight_m_wdecomp.weight"),
        ),
        DIAGONAL: when("kasa_config", (R,)),
        "lora_velora_embed": when("velora_config", UNREAD),
        **{f"{_SAMPLER}.{part}": when("monteclora_config", UNREAD) for part in _SAMPLER_PARTS},
    },
    operators=operators,
    start=Start(start, lambda rank, targets: {"use_rslora": False, "use_dora": False}),
)
