"""OFT (arXiv 2306.07280): blocks of the input are turned before the base multiplies them."""

from __future__ import annotations

import peft

from turret.server.adapters.methods.transforms.oft import dividing
from turret.training.methods.method import PeftMethod, Settings
from turret.training.models.base_model import TrainingBase
from turret.training.settings.ranks import module_sizes


def _oft_config(config: Settings, base: TrainingBase) -> peft.PeftConfig:
    # Blocks of b inputs cost what a LoRA of rank b / 2 costs.
    return peft.OFTConfig(
        task_type="CAUSAL_LM",
        oft_block_size=2 * config.rank,
        module_dropout=config.dropout,
        target_modules=list(config.targets),
    )


def _largest_block(config: Settings, base: TrainingBase) -> int:
    sizes = module_sizes(base.arch.projections, config.targets)
    return max(dividing(inner, 2 * config.rank) for _, _, inner in sizes)


def _other_blocks(config: Settings, base: TrainingBase) -> tuple[str, ...]:
    """Where no blocks of the size that was asked for make up a module's inputs."""
    wanted = 2 * config.rank
    widths = sorted({inner for _, _, inner in module_sizes(base.arch.projections, config.targets)})
    made = [f"{dividing(width, wanted)} of {width}" for width in widths if width % wanted]
    if not made:
        return ()
    return (
        f"method.rank {config.rank} asks for blocks of {wanted} inputs, which do not divide all"
        f" modules; the nearest that do are trained: {', '.join(made)}",
    )


OFT = PeftMethod(
    name="oft",
    learning_rate=1e-3,
    defaults={"targets": ("all-linear",), "rank": 16, "dropout": 0.0},
    peft_config=_oft_config,
    rank_served=_largest_block,
    remarks=_other_blocks,
)
