"""IA3 (arXiv 2205.05638): learned vectors that scale a module's output or input.

The input of a feed-forward module is ``l ⊙ x`` (input gain). The output of any other module is
``l ⊙ (W x + b)``: a gain on the bias-free result, and ``(l − 1) ⊙ b`` added to the bias.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.peft_format.targets import Pattern, match_all

_VECTOR, _KEY = "ia3_l", "feedforward_modules"


def _fault_of_selector(value: Any) -> Text | None:
    if value is None:
        return invalid(value, "a list of module names or a regular expression")
    return fault_of_optional_selector(value)


def _feedforward(adapter: Reading) -> frozenset[str]:
    """The modules whose input is scaled. As in PEFT, a listed name matches the end of any path."""
    chosen, names = adapter.config[_KEY], list(adapter.modules)
    if not isinstance(chosen, str):
        return frozenset(name for name in names if name.endswith(tuple(chosen)))
    (result,) = match_all([Pattern("fullmatch", chosen, chosen)], names)
    if result.error is not None:
        adapter.fault(_KEY, result.error)
    return frozenset(
        name for name, hit in zip(names, result.matches, strict=True) if hit is not None
    )


def _check(adapter: Reading) -> None:
    is_feedforward = adapter.once(_feedforward)
    for name, m in adapter.modules.items():
        found = list(m.tensors[_VECTOR].shape)
        wanted = [1, m.inputs] if name in is_feedforward else [m.outputs, 1]
        if found != wanted:
            # The vector has the size of the module's other side, so config and tensor contradict
            # each other.
            m.fault(_VECTOR, say("WRONG_SHAPE", shape=found, expected=wanted))


def _operators(m: Module) -> Iterator[Piece]:
    vector = m.tensors[_VECTOR]
    if m.name in m.once(_feedforward):
        yield InputGain(vector)
        return
    yield Gain(vector)
    if (served := m.bias()) is not None:
        yield Bias((vector.reshape(-1).float() - 1.0) * served)


# The paper scales the inputs of the last module of the feed-forward network.
_FEEDFORWARD = "down_proj"


def _start(m: NewModule) -> dict[str, torch.Tensor]:
    is_feedforward = m.name.endswith(_FEEDFORWARD)
    return {_VECTOR: m.ones(1, m.inputs) if is_feedforward else m.ones(m.outputs, 1)}


def _start_config(rank: int, targets: Sequence[str]) -> dict[str, Any]:
    return {_KEY: [target for target in targets if target.endswith(_FEEDFORWARD)]}


METHOD = LinearMethod(
    name="ia3",
    peft_types={"IA3"},
    keys={_KEY: _fault_of_selector},
    ignored={"init_ia3_weights": START},
    rank=None,
    required=(_KEY,),
    tensors={_VECTOR: either((OUT, 1), (1, IN))},
    check_all=_check,
    operators=_operators,
    start=Start(_start, _start_config),
)
