"""PEANuT (arXiv 2410.01870): ``ΔWᵀ = s · f(… f(Wᵀ Aᵀ) …) Bᵀ``, a network that reads the weight.

``A`` is followed by ``depth`` encoders and as many decoders. Each consists of a square matrix and
the activation, and each decoder adds the input of its encoder. The network runs once, at load, and
its result is a factor.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_A, _B = "peanut_A.weight", "peanut_B.weight"
_MAX_DEPTH = 64
_Activation = Callable[[Any], Any]
# Activations by transformers' names; None stands for torch's function of that name.
ACTIVATIONS: Mapping[str, _Activation | None] = {
    **dict.fromkeys(("gelu", "leaky_relu", "mish", "relu", "relu6", "silu")),
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "linear": lambda x: x,
    "relu2": lambda x: x.relu().square(),
    "sigmoid": lambda x: x.sigmoid(),
    "swish": lambda x: torch.nn.functional.silu(x),
    "tanh": lambda x: x.tanh(),
}


def activation(name: str) -> _Activation:
    return ACTIVATIONS[name] or getattr(torch.nn.functional, name)


def _layer(kind: str, number: int) -> str:
    return f"peanut_{kind}coders.{number}.weight"


def _operators(m: Module) -> Piece:
    wide = torch.promote_types(m.tensors[_A].dtype, torch.float32)
    a = _network(times_weight(m.tensors[_A].to(wide), m.rows()).T, m)
    return low_rank(a.T, m.tensors[_B].to(wide) * m.config["scaling"])


def _network(x: torch.Tensor, m: Module) -> torch.Tensor:
    """Runs the network on ``[in_features, rank]``; the result has the same shape."""
    act, depth = activation(m.config["act_fn"]), m.config["depth"]
    x, kept = act(x), []
    for number in range(depth):
        kept.append(x)
        x = act(x @ m.tensors[_layer("en", number)].to(x.dtype).T)
    for number in range(depth):
        x = act(x @ m.tensors[_layer("de", number)].to(x.dtype).T) + kept.pop()
    return x


METHOD = LinearMethod(
    name="peanut",
    peft_types={"PEANUT"},
    keys={
        "depth": fault_of_integer(0, _MAX_DEPTH),
        "act_fn": fault_of_choice(*ACTIVATIONS),
        "scaling": fault_of_number,
    },
    required=("depth", "act_fn", "scaling"),
    tensors={
        _A: (R, OUT),
        _B: (OUT, R),
        **{
            _layer(kind, number): when(lambda m, n=number: n < m.config["depth"], (R, R))
            for kind in ("en", "de")
            for number in range(_MAX_DEPTH)
        },
    },
    operators=_operators,
)
