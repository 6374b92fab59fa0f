"""Whether ``--model`` names what can be served, told without torch and without its weights."""

from __future__ import annotations

from pathlib import Path

from turret.server.models.sources.embedded import find_gguf
from turret.server.models.sources.gguf_header import SUFFIX, check_gguf
from turret.server.models.sources.hub_model import check_hub_model, hub_model_id
from turret.server.models.sources.model_directory import check_model_directory


def check_model(model: Path | None) -> None:
    """Refuse what is no model that can be served.

    Args:
        model: A directory, a GGUF file, or the id of a repository on the hub, which is asked; None
            for the embedded model.

    Raises:
        InvalidRequestError: Says what is there instead, and what to do.
    """
    if model is None:
        find_gguf()
        return
    hub_id = hub_model_id(model)
    if hub_id is not None:
        check_hub_model(hub_id)
    elif model.suffix == SUFFIX and model.is_file():
        check_gguf(model)
    else:
        check_model_directory(model)
