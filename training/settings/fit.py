"""Which settings go together, told by the method's name before torch is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from turret.training.errors import ConfigError
from turret.training.settings.config import MethodConfig, TrainConfig
from turret.training.words import say

_FACTORS = ("targets", "rank", "alpha", "dropout")
# Keys of ``MethodConfig`` that each method reads; a test compares them with training/methods.
METHOD_KEYS: Mapping[str, tuple[str, ...]] = {
    "lora": _FACTORS,
    "rslora": _FACTORS,
    "dora": _FACTORS,
    "alora": (*_FACTORS, "invocation"),
    "miss": ("targets", "rank", "dropout"),
    "oft": ("targets", "rank", "dropout"),
    "hra": ("targets", "rank"),
    "vblora": ("targets", "rank", "dropout"),
    "shira": ("targets", "rank"),
    "loha": _FACTORS,
    "lokr": (*_FACTORS, "decompose_both", "decompose_factor"),
    "ia3": ("targets",),
    "prefix_tuning": ("num_virtual_tokens", "prefix_projection", "encoder_hidden_size"),
    "prompt_tuning": ("num_virtual_tokens", "init_text"),
    "p_tuning": ("num_virtual_tokens", "encoder_hidden_size", "dropout"),
    "learned_fusion": ("components", "d_k", "guidance"),
}
# Defaults that do not depend on the base, and each method's peak learning rate; a test compares
# them with training/methods.
_LOW_RANK = {"rank": 8, "dropout": 0.0, "learning_rate": 1e-3}
DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "lora": _LOW_RANK,
    "rslora": {**_LOW_RANK, "alpha": 8.0},
    "dora": _LOW_RANK,
    "alora": {**_LOW_RANK, "rank": 32},
    "miss": {**_LOW_RANK, "rank": 16},
    "oft": {**_LOW_RANK, "rank": 16},
    "hra": {"rank": 8, "learning_rate": 5e-3},
    "vblora": {"rank": 4, "dropout": 0.0, "learning_rate": 1e-2},
    "shira": {"rank": 8, "learning_rate": 1e-3},
    "loha": {"dropout": 0.0, "learning_rate": 2e-3},
    "lokr": {
        **_LOW_RANK,
        "learning_rate": 2e-3,
        "decompose_both": False,
        "decompose_factor": -1,
    },
    "ia3": {"learning_rate": 1e-2},
    "prefix_tuning": {"num_virtual_tokens": 16, "prefix_projection": True, "learning_rate": 1e-3},
    "prompt_tuning": {"num_virtual_tokens": 16, "learning_rate": 3e-2},
    "p_tuning": {"num_virtual_tokens": 16, "dropout": 0.0, "learning_rate": 1e-3},
    "learned_fusion": {"d_k": 8, "guidance": 1.0, "learning_rate": 3e-3},
}
# Methods that stand before one text, and those with factors A and B.
PROMPTS = ("prefix_tuning", "prompt_tuning", "p_tuning")
WITH_FACTORS = ("lora", "rslora", "dora", "alora")
# Methods that the server takes on the experts of a mixture.
ON_EXPERTS = ("lora", "rslora")
# Methods that cannot be trained to classify: the first learns a gate, and the second does not
# change the text before its invocation.
_WITHOUT_HEAD = ("learned_fusion", "alora")


def check_fit(config: TrainConfig) -> None:
    """Refuse settings that the method gives no meaning to.

    Args:
        config: As read.

    Raises:
        ConfigError: Names the first key at fault.
    """
    name = config.method.name
    _check_keys(config.method)
    if name == "hra" and (config.method.rank or 0) % 2:
        # HRA starts from pairs of reflections that undo each other.
        raise ConfigError.of("method.rank", say("ODD_RANK", value=config.method.rank))
    # These methods act on one place of a row, which a packed row has several times.
    if config.data.packing and name in (*PROMPTS, "alora"):
        raise _unsupported("data.packing", "true", name)
    if config.data.task == "classification" and name in _WITHOUT_HEAD:
        raise _unsupported("data.task", "classification", name)
    # Checkpointing switches off the cache, in which a prefix passes its keys and values.
    if config.run.gradient_checkpointing and name == "prefix_tuning":
        raise _unsupported("run.gradient_checkpointing", "true", name)
    ratio = config.optimizer.lora_plus_ratio
    if ratio is not None and name not in WITH_FACTORS:
        raise _unsupported("optimizer.lora_plus_ratio", ratio, name)


def _unsupported(key: str, value: object, method: str) -> ConfigError:
    return ConfigError.of(key, say("VALUE_UNSUPPORTED_BY", value=value, method=method))


def _check_keys(config: MethodConfig) -> None:
    keys = METHOD_KEYS[config.name]
    for entry in dataclasses.fields(config):
        given = getattr(config, entry.name) is not None
        if given and entry.name != "name" and entry.name not in keys:
            text = say("KEY_UNSUPPORTED_BY", method=config.name, choices=", ".join(keys))
            raise ConfigError.of(f"method.{entry.name}", text)
