"""Whether ``--model`` names what can be served, told without torch and without its weights."""

from __future__ import annotations

from pathlib import Path

from turret.server.models.families import text_type
from turret.server.models.sources.embedded import find_gguf
from turret.server.models.sources.gguf_header import SUFFIX, check_gguf
from turret.server.models.sources.hub_model import check_hub_model, hub_model_id
from turret.server.models.sources.model_directory import check_model_directory


def check_model(model: Path | None) -> str:
    """Refuse what is no model that can be served.

    Args:
        model: A directory, a GGUF file, or the id of a repository on the hub, which is asked; None
            for the embedded model.

    Returns:
        Its ``model_type``, a key of ``FAMILIES``.

    Raises:
        InvalidRequestError: Says what is there instead, and what to do.
    """
    if model is None:
        return check_gguf(find_gguf())
    hub_id = hub_model_id(model)
    if hub_id is not None:
        return check_hub_model(hub_id)
    if model.suffix == SUFFIX and model.is_file():
        return check_gguf(model)
    return text_type(check_model_directory(model))
