"""Arrow (arXiv 2405.11157, ``arrow_config``): routes each token to the LoRAs that fit it best.

Every expert ``e``, which is a LoRA, has a prototype ``p_e`` per module: the direction of inputs to
which ``B_e A_e`` responds most. Prototypes need no training::

    α = softmax over top_k of |p_e · x| / T          y += Σ_e α_e s_e B_e A_e x

General knowledge subtraction (GenKnowSub, ACL 2025, short paper 54) first subtracts the mean ``A``
and the mean ``B`` of general LoRAs from those of every expert. The experts and the general LoRAs
are registered adapters, which the config identifies by digest, as in a learned fusion. A router's
file from PEFT also contains factors that PEFT's forward pass never reads.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.methods.lora import METHOD as LORA
from turret.server.adapters.methods.lora import A, B
from turret.server.adapters.operators.gate import PrototypeScore
from turret.server.adapters.peft_format.config_rules import listed_twice
from turret.server.adapters.peft_format.lora_rules import ARROW

# Power-iteration steps and tolerance; same as PEFT's.
_ITERATIONS, _EPS = 15, 1e-8
_DEFAULTS = {"top_k": 3, "router_temperature": 1.0, "use_gks": False}
_NO_UPDATE = "a router has no update of its own"
_PLAIN = "a router from create_arrow_model has none"


def _fault_of_names(value: Any) -> Text | None:
    is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return listed_twice(value) if is_list else invalid(value, "a list of names of components")


def _fault_of_arrow(value: Any) -> Text | None:
    problem = LORA.keys[ARROW](value)
    if problem is not None or not isinstance(value, Mapping):
        return problem or invalid(value, "an object")
    config = {**_DEFAULTS, **value}
    general = config.get("gks_adapter_names") or []
    checks = (
        ("top_k", fault_of_rank(config["top_k"])),
        ("router_temperature", fault_of_positive(config["router_temperature"])),
        ("use_gks", fault_of_bool(config["use_gks"])),
        ("rng_seed", None if config.get("rng_seed") is None else fault_of_seed(config["rng_seed"])),
        ("task_adapter_names", _fault_of_names(config.get("task_adapter_names"))),
        ("gks_adapter_names", _fault_of_names(general)),
    )
    for key, why in checks:
        if why is not None:
            return say("INVALID_ENTRY", entry=key, why=why)
    experts, top_k = config["task_adapter_names"], config["top_k"]
    if not top_k <= len(experts):
        why = say("NOT_IN_RANGE", least=1, most=len(experts), value=top_k)
        return say("INVALID_ENTRY", entry="top_k", why=why)
    if config["use_gks"] != bool(general):
        why = invalid(config["use_gks"], "true if gks_adapter_names has names, else false")
        return say("INVALID_ENTRY", entry="use_gks", why=why)
    return listed_twice([*experts, *general])


def _check_names(adapter: Reading) -> None:
    """Checks the two lists of names against the components."""
    config, findings = adapter.config, adapter.findings
    if not adapter.modules:
        findings.add("target_modules", say("SELECTS_NOTHING"))
    arrow = config[ARROW]
    named = {*arrow["task_adapter_names"], *(arrow.get("gks_adapter_names") or [])}
    known = [item["name"] for item in config[COMPONENTS_KEY]]
    if twice := listed_twice(known):
        findings.add(COMPONENTS_KEY, twice)
    for name in sorted(named - set(known)):
        findings.add(ARROW, say("COMPONENT_UNLISTED", component=name, by=COMPONENTS_KEY))
    for name in sorted(set(known) - named):
        findings.add(COMPONENTS_KEY, say("COMPONENT_UNLISTED", component=name, by=ARROW))


def _settings(adapter: Reading) -> dict[str, Any]:
    """The router's settings from the config, completed with PEFT's defaults."""
    return {**_DEFAULTS, **adapter.config[ARROW]}


class _Expert(NamedTuple):
    """A component's factors on a module, fp32 or wider; ``b`` does not contain the scaling."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def _updates(adapter: Reading) -> dict[str, list[_Expert]]:
    """Every expert's factors on every module, after the subtraction.

    Raises:
        AdapterCheckpointError: Components lack a module, or the factors cannot be subtracted. The
            error lists all of them.
    """
    settings, findings = _settings(adapter), adapter.findings
    by_name = {component.ref.name: component for component in adapter.once(components_of)}
    experts = [by_name[name] for name in settings["task_adapter_names"]]
    general = [by_name[name] for name in settings.get("gks_adapter_names") or []]
    for component in (*experts, *general):
        if any(update_of(component, name) is None for name in adapter.modules):
            why = "it does not adapt all modules that the router targets"
            findings.add(COMPONENTS_KEY, unfit(component, why))
        if any(component.scalings.get(name) == 0 for name in adapter.modules):
            findings.add(COMPONENTS_KEY, unfit(component, "it has a scaling of 0"))
        if general and component.method != "lora":
            findings.add(COMPONENTS_KEY, unfit(component, "use_gks needs a plain LoRA"))
    findings.raise_if_any()
    made: dict[str, list[_Expert]] = {}
    for name in adapter.modules:
        made[name] = own = [_unscaled(one, name) for one in experts]
        means = [_unscaled(one, name) for one in general]
        shapes = {one.a.shape for one in (*own, *means)}
        if means and len(shapes) > 1:
            ranks = ", ".join(str(shape[0]) for shape in sorted(shapes))
            findings.add(COMPONENTS_KEY, say("UNEQUAL_RANKS", ranks=ranks, module=name))
        elif means:
            a = torch.stack([one.a for one in means]).mean(0)
            b = torch.stack([one.b for one in means]).mean(0)
            made[name] = [_Expert(one.a - a, one.b - b, one.scaling) for one in own]
    findings.raise_if_any()
    return made


def _unscaled(component: Component, name: str) -> _Expert:
    update, scaling = update_of(component, name), component.scalings.get(name, 1.0)
    assert update is not None, "_updates has checked it"
    wide = torch.promote_types(update.a.dtype, torch.float32)
    return _Expert(update.a.to(wide), update.b.to(wide) / scaling, scaling)


def _starts(adapter: Reading) -> dict[int, torch.Tensor]:
    """The vectors from which the search for prototypes starts, by number of inputs.

    They are drawn as PEFT draws them.
    """
    seed = _settings(adapter).get("rng_seed")
    if seed is None:
        adapter.warn(say("ARROW_WITHOUT_SEED"))
    drawn = {}
    for inputs in {m.inputs for m in adapter.modules.values()}:
        start = torch.randn(inputs, generator=torch.Generator().manual_seed(seed or 0))
        drawn[inputs] = start / (start.norm() + _EPS)
    return drawn


def _operators(m: Module) -> Piece:
    settings, dtype = _settings(m.reading), m.reading.dtype
    experts, start = m.once(_updates)[m.name], m.once(_starts)[m.inputs]
    updates = [LowRank(one.a.to(dtype), (one.b * one.scaling).to(dtype)) for one in experts]
    prototypes = torch.stack([_prototype(one, start) for one in experts])
    temperature = float(settings["router_temperature"])
    score = PrototypeScore(prototypes, settings["top_k"], temperature)
    return gate_of(updates, lambda _: score)


def _prototype(expert: _Expert, start: torch.Tensor) -> torch.Tensor:
    """An approximation of the top right singular vector of ``B A``, ``[in]`` fp32, by PEFT's steps.

    The products and layouts are PEFT's, because rounding matters if singular values are close to
    each other.
    """
    a, b = expert.a.float(), expert.b.T.float().contiguous()
    squares = b.T @ b
    found = start
    for _ in range(_ITERATIONS):
        found = a.T @ (squares @ (a @ found))
        found = found / (found.norm() + _EPS)
    return found


_UNREAD = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
METHOD = replace(
    LORA,
    name="arrow",
    accepts=lambda config: isinstance(config.get(ARROW), Mapping),
    keys={**LORA.keys, ARROW: _fault_of_arrow, COMPONENTS_KEY: fault_of_components},
    ignored={**LORA.ignored, **dict.fromkeys(_UNREAD, _NO_UPDATE)},
    refused={
        **LORA.refused,
        "bias": (("none",), _PLAIN),
        "lora_bias": ((False, None), _PLAIN),
        "modules_to_save": ((None, []), _PLAIN),
        "trainable_token_indices": ((None, [], {}), _PLAIN),
        "target_parameters": ((None, []), _PLAIN),
    },
    bias=(),
    rank=None,
    alpha=None,
    root=None,
    has_patterns=False,
    required=(ARROW, COMPONENTS_KEY),
    needs_tensors=False,
    # PEFT's file contains a LoRA for every module, whose shapes must fit; a hand-made file may
    # contain none.
    tensors={
        **{role: optionally(shape) for role, shape in LORA.tensors.items()},
        A: optionally((extent(A, 0), IN)),
        B: optionally((OUT, extent(A, 0))),
    },
    check_all=_check_names,
    operators=_operators,
)
