"""The model families, one file each: a new file here that binds ``FAMILY`` is served."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from turret.server.errors import InvalidRequestError
from turret.server.models.decoding.arch import Arch, check_served
from turret.server.models.family import Family


def _discover() -> dict[str, Family]:
    families: dict[str, Family] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        family: Family = importlib.import_module(f"{__name__}.{info.name}").FAMILY
        for model_type in family.model_types:
            assert model_type not in families, f"two families read {model_type!r}"
            families[model_type] = family
    return families


# By ``model_type``.
FAMILIES: Mapping[str, Family] = _discover()


def read_arch(config: Any) -> Arch:
    """Turns a transformers config into an ``Arch``.

    Args:
        config: A ``PretrainedConfig``.

    Raises:
        InvalidRequestError: No family reads its ``model_type`` (lists those that are read), or it
            asks for what no kernel computes yet (names it).
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        served = ", ".join(sorted(FAMILIES))
        raise InvalidRequestError.of(
            "model", f"model_type {config.model_type!r} is not served; served are {served}"
        )
    arch = family.read(config)
    check_served(arch)
    return arch
