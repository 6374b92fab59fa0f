"""Writes one adapter of every supported method, under the method's name."""

from __future__ import annotations

from pathlib import Path

from builders.adapters import make_qalora
from builders.method_kinds import ALL, KINDS
from builders.methods import make_config, save_adapter
from builders.mixes.fusions import save_fusion
from builders.mixes.routers import write_router
from builders.mixes.xloras import save_loras, save_xlora
from torch import nn

from turret.server.adapters.methods import METHODS

# Methods that consist of registered adapters, which must be loaded first.
MADE_OF_OTHERS = ("learned_fusion", "arrow", "xlora")
COMPONENTS = ("0", "1", "2")
TASKS = {name: 1 for name, method in METHODS.items() if method.tasks}


def save_every_method(model: nn.Module, root: Path) -> list[str]:
    """Write ``root/<method>`` for every method, and the components of some.

    Returns:
        The names of all adapters, in an order in which they can be loaded.
    """
    made = sorted(METHODS.keys() - {*MADE_OF_OTHERS, "qalora"})
    for seed, name in enumerate(made):
        save_adapter(model, make_config(name), root / name, seed=seed)
    save_adapter(model, make_config("lora"), root / "qalora", seed=len(KINDS))
    make_qalora(root / "qalora", 8)
    save_fusion(model, root, "learned_fusion", ("lora", "vera"), ALL, strength=40.0)
    write_router(root, "arrow", ("lora", "vera"), ALL, top_k=1, rng_seed=5)
    save_loras(model, root)
    save_xlora(model, root, "xlora", xlora_depth=2, layerwise_scalings=True, top_k_lora=2)
    return [*made, "qalora", *COMPONENTS, *MADE_OF_OTHERS]
