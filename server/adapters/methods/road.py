"""RoAd (arXiv 2409.00119): pairs of outputs are rotated and scaled, ``y = R (W x + b)``.

Outputs form groups, and the outputs in the two halves of a group are partners. With ``z = W x +
b``, ``y_o = c_o z_o − s_o z_p(o)`` in the first half, and ``c_o z_o + s_o z_p(o)`` in the second.
``c = α cos θ`` and ``s = α sin θ``. With ``road_1``, two partners share one ``α`` and one ``θ``.
With ``road_2``, each output has its own. With ``road_4``, each output has one ``α`` and ``θ`` for
``c``, and another ``α`` and ``θ`` for ``s``. The operators are a gain ``c``, the additions of
partners, and ``R b − b`` added to the bias.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_THETA, _ALPHA = "road_theta", "road_alpha"


def _fault_of_group(value: Any) -> Text | None:
    is_even = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return None if is_even and value % 2 == 0 else invalid(value, "an even number above 0")


def _shape(m: Module) -> Shape:
    out, group = m.outputs, m.config["group_size"]
    if out % group:
        raise Misfit(say("NOT_DIVISIBLE", size=out, what="outputs", by=group))
    sizes = {"road_1": out // 2, "road_2": out, "road_4": 2 * out}
    size = sizes[m.config["variant"]]
    # If the size fits another variant, the config is wrong; otherwise, the adapter is for another
    # base.
    is_other = any(m.extent(role, 0) in sizes.values() for role in (_THETA, _ALPHA))
    return (Dim(lambda _: size, is_served=not is_other),)


def _operators(m: Module) -> Iterator[Piece]:
    group = m.config["group_size"]
    cosine, sine = _columns(m.config["variant"], group, m.exact(_THETA), m.exact(_ALPHA))
    signs = torch.tensor([-1.0, 1.0]).repeat_interleave(group // 2)
    cosine, sine = cosine.float(), (sine * signs.repeat(len(sine) // group)).float()
    yield PairRotation(sine, group)
    yield Gain(cosine)
    if (served := m.bias()) is not None:
        partners = served.view(-1, 2, group // 2).flip(1).flatten()
        yield Bias((cosine - 1.0) * served + sine * partners)


def _columns(
    variant: str, group: int, theta: torch.Tensor, alpha: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``c`` and ``s`` of every output."""
    if variant == "road_1":
        theta, alpha = (
            values.view(-1, group // 2).repeat_interleave(2, 0).flatten()
            for values in (theta, alpha)
        )
    if variant != "road_4":
        return alpha * theta.cos(), alpha * theta.sin()
    thetas, alphas = theta.view(-1, 2, group), alpha.view(-1, 2, group)
    cosine, sine = alphas[:, 0] * thetas[:, 0].cos(), alphas[:, 1] * thetas[:, 1].sin()
    return cosine.flatten(), sine.flatten()


METHOD = LinearMethod(
    name="road",
    peft_types={"ROAD"},
    keys={"variant": fault_of_choice("road_1", "road_2", "road_4"), "group_size": _fault_of_group},
    rank=None,
    required=("variant", "group_size"),
    tensors={_THETA: _shape, _ALPHA: _shape},
    operators=_operators,
)
