"""Where the files of an adapter's generation are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Source:
    """A directory with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Attributes:
        path: Relative to the adapter root, or to the state directory if ``is_upload``.
        is_upload: The server wrote the files itself and removes them when nobody needs them.
    """

    path: str
    is_upload: bool = False
