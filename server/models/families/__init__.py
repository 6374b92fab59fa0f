"""The model families, one file each. A new file here that assigns ``FAMILY`` is used."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from turret.server.errors import InvalidRequestError
from turret.server.models.decoding.arch import Arch, check_served
from turret.server.models.family import Family
from turret.server.words import say


def _discover() -> dict[str, Family]:
    families: dict[str, Family] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        family: Family = importlib.import_module(f"{__name__}.{info.name}").FAMILY
        for model_type in family.readers:
            assert model_type not in families, f"two families read {model_type!r}"
            families[model_type] = family
    return families


# ``model_type`` → family.
FAMILIES: Mapping[str, Family] = _discover()


def served_types() -> list[str]:
    """The supported values of ``model_type`` in ``config.json``, sorted."""
    return sorted({*FAMILIES, *_text_parts()})


def text_type(config: Mapping[str, Any]) -> Any:
    """The ``model_type`` of a ``config.json``, or that of its text part, if it has one."""
    kind, parts, text = config.get("model_type"), _text_parts(), config.get("text_config")
    if isinstance(kind, str) and kind in parts:
        kind = (text.get("model_type") if isinstance(text, dict) else None) or parts[kind]
    # Any other value is not the name of a type.
    return kind if isinstance(kind, str) else None


def text_config(config: Any) -> Any:
    """A transformers config, or its text part for a model of text and images."""
    if config.model_type not in _text_parts():
        return config
    text = config.text_config
    # This setting belongs to the whole model's config.
    text.tie_word_embeddings = bool(config.tie_word_embeddings)
    return text


def read_arch(config: Any) -> Arch:
    """Turns a transformers config into an ``Arch``.

    Args:
        config: A ``PretrainedConfig``; for a model of text and images, the text part is read.

    Raises:
        InvalidRequestError: No family supports the ``model_type``, or the model needs something
            that no kernel computes; the error names it.
    """
    config = text_config(config)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise not_served(config.model_type)
    arch = family.read(config)
    check_served(arch)
    return arch


def not_served(kind: object) -> InvalidRequestError:
    """The error for an unsupported ``model_type``, which lists the supported ones."""
    served = ", ".join(served_types())
    said = say("CONFIG_UNSUPPORTED", key="model_type", value=kind, choices=served)
    return InvalidRequestError.of("model", said)


def _text_parts() -> dict[str, str]:
    parts: dict[str, str] = {}
    for family in FAMILIES.values():
        parts |= family.text_part_of
    return parts
