"""Checks whether a directory can be a base model, by file names and config, without torch."""

from __future__ import annotations

import fnmatch
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from turret.server.basics.files import is_there, why_lfs_pointer
from turret.server.basics.names import HubId
from turret.server.basics.work import OnProgress
from turret.server.errors import HubError, HubUnavailableError, InvalidRequestError
from turret.server.hub import Repository, cache_dir, cached_repository, download, find_repository
from turret.server.models import families
from turret.server.words import Text, say

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Formats of quantised checkpoints that are read like plain ones.
_READ = ("mxfp4", "fp8")
# Files from which transformers builds a fast tokenizer. tokenizer_config.json alone is not enough.
_TOKENIZERS = ("tokenizer*.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")
_TOKENIZER_CONFIG = "tokenizer_config.json"
# The limit of safetensors itself.
_MAX_HEADER_BYTES = 100_000_000
# Errors of files with unexpected content.
_DAMAGES = ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError
_HUB_CACHE = re.compile(r".*/models--(.+?)--(.+)/snapshots/[0-9a-f]{40}")


def check_model_directory(model: Path) -> dict[str, Any]:
    """Reject a directory that is not a supported model.

    Args:
        model: A directory in Hugging Face format.

    Returns:
        Its ``config.json``.

    Raises:
        InvalidRequestError: The error states what is there instead, and what to do.
    """
    if not is_there(model):
        raise _refuse(say("MODEL_NOT_FOUND", model=model))
    if not model.is_dir():
        raise _refuse(say("MODEL_IS_A_FILE", model=model))
    config = read_config(model)
    check_config(config, model)
    for file in weight_files(model):
        _check_whole(file)
    return config


# Reading a config takes memory for each layer, so the number of layers is limited. No published
# model has as many.
MOST_SIZES = {
    "num_hidden_layers": 1024,
    **dict.fromkeys(
        (
            *("hidden_size", "intermediate_size", "head_dim", "vocab_size"),
            *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        ),
        (1 << 31) - 1,
    ),
}
# Reading a config also takes time for each expert, so their number is limited too. It may be 0,
# because some dense models state that they have no experts.
_EXPERTS = ("num_local_experts", "num_experts")
_MOST_EXPERTS = 4096
_POSITIVE = ("rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor")
_ROPES = ("rope_scaling", "rope_parameters")


def check_size(key: str, value: object, known_as: str) -> None:
    """Reject a size of a model that is not a whole number in its range.

    Args:
        key: Its key in the file.
        value: The value.
        known_as: Its key in a ``config.json``.
    """
    most = MOST_SIZES[known_as]
    if type(value) is not int or not 1 <= value <= most:
        raise unsupported(key, value, f"1 to {most}")


def check_numbers(part: Mapping[str, Any]) -> None:
    """Reject numbers of a config that transformers accepts, but no model has."""
    for key, value in part.items():
        if value is None:
            continue
        if key in MOST_SIZES:
            check_size(key, value, key)
        elif key in _EXPERTS:
            if type(value) is not int or not 0 <= value <= _MOST_EXPERTS:
                raise unsupported(key, value, f"0 to {_MOST_EXPERTS}")
        elif key in _POSITIVE:
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise unsupported(key, value, "positive numbers")
        elif key in _ROPES:
            if not isinstance(value, dict):
                raise unsupported(key, value, "objects")
            for each in (value, *value.values()):
                if isinstance(each, dict):
                    check_numbers(each)


def unsupported(key: str, value: object, choices: str) -> InvalidRequestError:
    """The error for an unsupported value of a config."""
    shown = str(value)[:60] if isinstance(value, str | list | dict) else value
    return _refuse(say("CONFIG_UNSUPPORTED", key=key, value=shown, choices=choices))


def check_config(config: dict[str, Any], model: Path | str) -> None:
    """Reject the ``config.json`` of an unsupported model.

    Args:
        config: Its content.
        model: The name of the model in messages.

    Raises:
        InvalidRequestError: The error states what is there instead, and what to do.
    """
    kind = families.text_type(config)
    if kind not in families.FAMILIES:
        raise families.not_served(kind)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            check_numbers(part)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict | None):
        raise unsupported("quantization_config", quantization, "objects")
    if quantization is None or is_4bit(config):
        return
    method = quantization.get("quant_method")
    if method not in _READ:
        raise _refuse(say("QUANTIZATION_UNSUPPORTED", model=model, value=method))


def has_tokenizer(names: Iterable[str]) -> bool:
    """Whether one of the files is a tokenizer."""
    return any(
        fnmatch.fnmatch(name, pattern) and name != _TOKENIZER_CONFIG
        for name in names
        for pattern in _TOKENIZERS
    )


def is_4bit(config: dict[str, Any]) -> bool:
    """Whether a config belongs to a bitsandbytes 4-bit checkpoint, which is used unchanged."""
    quantization = config.get("quantization_config")
    return (
        quantization is not None
        and quantization.get("quant_method") == "bitsandbytes"
        and bool(quantization.get("load_in_4bit", quantization.get("_load_in_4bit")))
    )


def model_name(model: Path, config: dict[str, Any]) -> str:
    """The checkpoint's own name, its repository in the hub's cache, or the directory's name."""
    named = config.get("_name_or_path")
    if named:
        return str(named)
    # A snapshot directory in the hub's cache is named by its commit, so use the repository's name.
    cached = _HUB_CACHE.fullmatch(str(model.resolve()))
    return "/".join(cached.groups()) if cached else model.resolve().name


def scale_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of an FP8 weight that share a scale; None if the config has no block size.

    Raises:
        InvalidRequestError: ``weight_block_size`` is not two positive numbers.
    """
    sizes = (config.get("quantization_config") or {}).get("weight_block_size")
    if sizes is None:
        return None
    are_two = isinstance(sizes, list) and len(sizes) == 2
    if not are_two or not all(type(size) is int and size > 0 for size in sizes):
        raise _refuse(say("BLOCK_SIZE_INVALID", value=str(sizes)[:60]))
    return sizes[0], sizes[1]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sharded or not.

    Raises:
        InvalidRequestError: There are none (pickle files are not read), or some are missing.
    """
    index = folder / INDEX
    if index.is_file():
        names = indexed_files(index)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise _refuse(files_missing(folder, missing, names))
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    raise _refuse(say("MODEL_HAS_NO_WEIGHTS", model=folder, file=WEIGHTS))


def files_missing(model: object, missing: Sequence[str], names: Sequence[str]) -> Text:
    """The error for files that an index lists but that do not exist."""
    found = {"missing": len(missing), "count": len(names), "name": missing[0]}
    return say("FILES_MISSING", model=model, index=INDEX, **found)


def _check_whole(file: Path) -> None:
    """Reject a file that is only a Git LFS pointer, or does not end where its tensors do.

    Only the header is read.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        word = opened.read(8)
        if word and (why := why_lfs_pointer(word)):
            raise _refuse(say("PATH_UNUSABLE", path=file, problem=why))
        (length,) = struct.unpack("<Q", word.ljust(8, b"\0"))
        text = opened.read(length) if length <= _MAX_HEADER_BYTES else b""
    if len(word) < 8 or len(text) < length:
        raise _refuse(say("FILE_DAMAGED", path=file))
    try:
        table: dict[str, Any] = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in table.items() if name[:2] != "__"]
        whole = 8 + length + max(ends, default=0)
        if size == whole:
            # This checks shapes, dtypes and offsets.
            safe_open(file, framework="np")
    except _DAMAGES:
        raise _refuse(say("FILE_DAMAGED", path=file)) from None
    if size != whole:
        raise _refuse(say("FILE_WRONG_SIZE", path=file, found=size, expected=whole))


def indexed_files(index: Path) -> list[str]:
    """The files that the index of a sharded checkpoint names, each once.

    Raises:
        InvalidRequestError: The file is not an index, or names files outside its directory.
    """
    data = index.read_bytes()
    if why := why_lfs_pointer(data):
        raise _refuse(say("PATH_UNUSABLE", path=index, problem=why))
    try:
        names = set(json.loads(data)["weight_map"].values())
        paths = {name: PurePosixPath(name) for name in names}
    except _DAMAGES:
        paths = {}
    if not paths:
        raise _refuse(say("FILE_DAMAGED", path=index))
    outside = [name for name, path in paths.items() if path.is_absolute() or ".." in path.parts]
    if outside:
        raise _refuse(say("INDEX_LEAVES_DIRECTORY", path=index, name=outside[0][:80]))
    return sorted(paths)


def read_config(model: Path) -> dict[str, Any]:
    """The ``config.json`` of a directory.

    Raises:
        InvalidRequestError: The file is missing, or is not a JSON object.
    """
    path = model / "config.json"
    if not is_there(path):
        if not is_there(model):
            raise _refuse(say("MODEL_NOT_FOUND", model=model))
        if (model / "adapter_config.json").is_file():
            raise _refuse(say("MODEL_IS_AN_ADAPTER", model=model))
        if ggufs := sorted(model.glob("*.gguf")):
            raise _refuse(say("MODEL_IS_GGUF", model=model, file=ggufs[0]))
        raise _refuse(say("MODEL_HAS_NO_CONFIG", model=model))
    return read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model.

    Raises:
        InvalidRequestError: The file is not a JSON object.
    """
    data = path.read_bytes()
    if why := why_lfs_pointer(data):
        raise _refuse(say("PATH_UNUSABLE", path=path, problem=why))
    try:
        config = json.loads(data)
    except ValueError as error:
        raise _refuse(
            say("PATH_UNUSABLE", path=path, problem=say("NOT_JSON", problem=error))
        ) from None
    except RecursionError:
        why = say("JSON_TOO_NESTED")
        raise _refuse(say("PATH_UNUSABLE", path=path, problem=why)) from None
    if not isinstance(config, dict):
        raise _refuse(say("FILE_NOT_A_JSON_OBJECT", path=path))
    return config


def _refuse(why: str) -> InvalidRequestError:
    return InvalidRequestError.of("model", why)


# A base model on the Hugging Face hub: whether it can be served, and its files in the cache.
#
# Only safetensors, configs and tokenizers are downloaded, never code.


# Configs, tokenizers and chat templates, at the top of the repository.
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_CONFIG = "config.json"
_ADAPTER_CONFIG = "adapter_config.json"


def hub_model_id(model: Path) -> HubId | None:
    """The hub model that ``--model`` refers to; None if it is a path on this machine."""
    return None if is_there(model) else HubId.find(str(model))


def check_hub_model(hub_id: HubId) -> dict[str, Any]:
    """Check that a repository is a supported model, before its weights are fetched.

    Weights that are already in the cache are checked like those of a directory.

    Returns:
        Its ``config.json``.

    Raises:
        InvalidRequestError: The model is not supported. The error contains the reason and advice.
    """
    try:
        repository, folder = _describe(hub_id)
    except (HubError, HubUnavailableError) as error:
        raise _refuse(say("MODEL_NOT_ON_HUB", model=hub_id, problem=error.message)) from None
    if all((folder / name).is_file() for name in _weights(repository, folder)):
        check_model_directory(folder)
    return read_config(folder)


def cached_model(hub_id: HubId) -> Path:
    """The directory of a hub model in the cache, without using the network.

    Raises:
        InvalidRequestError: The cache does not have all of its files.
    """
    repository = cached_repository(hub_id)
    folder = None if repository is None else cache_dir() / repository.id.snapshot
    if repository is None or folder is None or not {WEIGHTS, INDEX} & set(repository.files):
        raise _refuse(say("MODEL_NOT_DOWNLOADED", model=hub_id))
    if not all((folder / name).is_file() for name in _weights(repository, folder)):
        raise _refuse(say("MODEL_NOT_DOWNLOADED", model=hub_id))
    return folder


def fetch_hub_model(hub_id: HubId, progress: OnProgress) -> tuple[Path, str]:
    """Fetch a model's files to the hub's cache.

    Args:
        hub_id: The repository and the revision.
        progress: Called with the number of MiB that have arrived.

    Returns:
        The directory, whose files all belong to one commit, and the commit.

    Raises:
        InvalidRequestError: See ``check_hub_model``; or the hub does not answer.
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
    """The repository, and the directory of its config. Checks that the config is supported."""
    repository = find_repository(hub_id, may_be_old=True)
    files = repository.files
    if repository.is_cached and not (_CONFIG in files and {WEIGHTS, INDEX} & set(files)):
        raise _refuse(say("HUB_CACHE_INCOMPLETE", model=hub_id))
    if _CONFIG not in files:
        raise _refuse(_what_else(hub_id, files))
    if {WEIGHTS, INDEX}.isdisjoint(files):
        raise _refuse(say("MODEL_HAS_NO_WEIGHTS", model=hub_id, file=WEIGHTS))
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


def _small(files: Iterable[str]) -> list[str]:
    return [
        name
        for name in files
        if "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in _SMALL)
    ]


def _weights(repository: Repository, folder: Path) -> list[str]:
    """The files with the weights: those in the index, if there is one."""
    if INDEX not in repository.files:
        return [WEIGHTS]
    names = indexed_files(folder / INDEX)
    lacking = [name for name in names if name not in repository.files]
    if lacking:
        raise _refuse(files_missing(repository.id, lacking, names))
    return names


def _download(repository: Repository, names: list[str], progress: OnProgress) -> None:
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
