"""A base model on the Hugging Face hub: whether it can be served, and its files in the cache.

Only safetensors is fetched, with the configs and the tokenizer beside it; never code.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from turret.server.basics.hub_id import HubId
from turret.server.errors import HubError, HubUnavailableError, InvalidRequestError
from turret.server.hub.download import download
from turret.server.hub.repository import (
    Repository,
    cache_dir,
    cached_repository,
    find_repository,
)
from turret.server.models.families import text_type
from turret.server.models.sources.model_directory import (
    INDEX,
    WEIGHTS,
    check_config,
    check_model_directory,
    files_missing,
    has_tokenizer,
    indexed_files,
    read_config,
)
from turret.server.words import Text, say

# Configs, tokenizers and chat templates, at the top of the repository.
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_CONFIG = "config.json"
_ADAPTER_CONFIG = "adapter_config.json"

# Called with (description, done, total).
Progress = Callable[[str, int, int], None]


def hub_model_id(model: Path) -> HubId | None:
    """The hub model that ``--model`` refers to; None if it is a path on this machine."""
    return None if model.exists() else HubId.find(str(model))


def check_hub_model(hub_id: HubId) -> str:
    """Refuse what is no model that can be served, before its weights are fetched.

    Weights that the cache has already are looked at, as those of a directory.

    Returns:
        Its ``model_type``.

    Raises:
        InvalidRequestError: Says what is there instead, and what to do.
    """
    try:
        repository, folder = _describe(hub_id)
    except (HubError, HubUnavailableError) as error:
        raise _refuse(say("MODEL_NOT_ON_HUB", model=hub_id, problem=error.message)) from None
    if all((folder / name).is_file() for name in _weights(repository, folder)):
        check_model_directory(folder)
    return text_type(read_config(folder))


def checked_config(hub_id: HubId) -> dict[str, Any]:
    """The config of a model that ``check_hub_model`` accepted, from the cache without network.

    Empty where the cache does not tell which commit that was.
    """
    repository = cached_repository(hub_id)
    if repository is None or _CONFIG not in repository.files:
        return {}
    return read_config(cache_dir() / repository.id.snapshot)


def fetch_hub_model(hub_id: HubId, progress: Progress) -> tuple[Path, str]:
    """Have a model's files in the hub's cache.

    Args:
        hub_id: The repository and the revision.
        progress: Told how many MiB came.

    Returns:
        The directory, all of whose files are of one commit; that commit.

    Raises:
        InvalidRequestError: As ``check_hub_model``; or the hub does not answer.
    """
    try:
        repository, folder = _describe(hub_id)
        names = [*_small(repository.files), *_weights(repository, folder)]
        if not repository.is_cached:
            _download(repository, names, progress)
    except (HubError, HubUnavailableError) as error:
        raise _refuse(error.message) from None
    check_model_directory(folder)
    return folder, repository.commit


def _describe(hub_id: HubId) -> tuple[Repository, Path]:
    """The repository, and the folder of its config, which is checked to be supported."""
    repository = find_repository(hub_id, may_be_old=True)
    files = repository.files
    if repository.is_cached and not (_CONFIG in files and {WEIGHTS, INDEX} & set(files)):
        raise _refuse(say("HUB_CACHE_INCOMPLETE", model=hub_id))
    if _CONFIG not in files:
        raise _refuse(_what_else(hub_id, files))
    _check_weights(hub_id, files)
    if not has_tokenizer(files):
        raise _refuse(say("NO_TOKENIZER", model=hub_id))
    wanted = [name for name in (_CONFIG, INDEX) if name in files]
    folder = download(repository, wanted, lambda _: None)
    check_config(read_config(folder), str(hub_id))
    return repository, folder


def _what_else(hub_id: HubId, files: Mapping[str, int]) -> Text:
    if _ADAPTER_CONFIG in files:
        return say("MODEL_IS_AN_ADAPTER", model=hub_id)
    ggufs = [name for name in files if name.endswith(".gguf")]
    if ggufs:
        return say("MODEL_IS_GGUF", model=hub_id, file=ggufs[0])
    return say("MODEL_HAS_NO_CONFIG", model=hub_id)


def _check_weights(hub_id: HubId, files: Iterable[str]) -> None:
    if {WEIGHTS, INDEX}.isdisjoint(files):
        raise _refuse(say("MODEL_HAS_NO_WEIGHTS", model=hub_id, file=WEIGHTS))


def _small(files: Iterable[str]) -> list[str]:
    return [
        name
        for name in files
        if "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in _SMALL)
    ]


def _weights(repository: Repository, folder: Path) -> list[str]:
    """The files that hold the weights: those that the index names, where there is one."""
    if INDEX not in repository.files:
        return [WEIGHTS]
    names = indexed_files(folder / INDEX)
    lacking = [name for name in names if name not in repository.files]
    if lacking:
        raise _refuse(files_missing(repository.id, lacking, names))
    return names


def _download(repository: Repository, names: list[str], progress: Progress) -> None:
    what = f"Downloading {repository.id.repository} (MiB)"
    folder = cache_dir() / repository.id.snapshot
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return
    total = sum(repository.files[name] for name in missing)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress(what, done >> 20, max(total >> 20, 1))

    on_bytes(0)
    download(repository, missing, on_bytes)
    progress(what, max(total >> 20, 1), max(total >> 20, 1))


def _refuse(why: str) -> InvalidRequestError:
    return InvalidRequestError.of("model", why)
