"""Handlers of the calls about what was trained: runs, checkpoints and their files."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tarfile
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from hmac import compare_digest
from pathlib import Path
from typing import Any

from turret.server.api.access import MAX_EXPORTS
from turret.server.api.checkpoints import KINDS, Checkpoint, not_found, unix_time
from turret.server.errors import TrainingNotFoundError
from turret.server.http.endpoint import Exchange, Json
from turret.server.http.refusals import HttpRefusal
from turret.server.http.tinker.schemas import OfPath, Ttl
from turret.server.http.tinker.sessions import owner_of, tenants_of
from turret.server.words import say

_MOST_LISTED = 100
# An archive contains neither files that only serve to resume training, nor the server's own files.
_ARCHIVED = ("adapter_config.json", "adapter_model.safetensors")
_LINK_SECONDS = 900.0
_PIECE_BYTES = 1 << 18
# This key signs links, so that nobody else can make them. Links become invalid when the process
# ends.
_KEY, _SIGNATURE_BYTES = secrets.token_bytes(32), 16


async def weights_info(exchange: Exchange) -> Json:
    """Describe the adapter in a checkpoint."""
    path, tenants = exchange.take_body().checked(OfPath).tinker_path, tenants_of(exchange)
    config = tenants.checkpoints.find(owner_of(exchange), path).config
    return {
        "base_model": tenants.info().name,
        "optimizer_config": {"type": "adamw"},
        "is_lora": True,
        "lora_rank": config.rank,
        "train_unembed": config.unembed,
        "train_mlp": config.mlp,
        "train_attn": config.attention,
    }


@dataclass(slots=True)
class _TrainingRun:
    """A model that is being trained or has checkpoints."""

    run_id: str
    rank: int
    used: float
    metadata: dict[str, str]
    checkpoints: list[Checkpoint]


def _runs(exchange: Exchange) -> list[_TrainingRun]:
    """The runs of the client, the most recently used first."""
    tenants, owner = tenants_of(exchange), owner_of(exchange)
    found: dict[str, _TrainingRun] = {}
    for model in tenants.sessions.models(owner):
        run = _TrainingRun(model.model_id, model.config.rank, model.used, model.metadata, [])
        found[run.run_id] = run
    for checkpoint in tenants.checkpoints.owned(owner):
        run = found.setdefault(
            checkpoint.run,
            _TrainingRun(checkpoint.run, checkpoint.config.rank, checkpoint.time, {}, []),
        )
        run.checkpoints.append(checkpoint)
    return sorted(found.values(), key=lambda run: -run.used)


def _run_json(exchange: Exchange, run: _TrainingRun) -> dict[str, Any]:
    def newest(kind: str) -> dict[str, Any] | None:
        return next((_json(each) for each in run.checkpoints if each.kind == kind), None)

    return {
        "training_run_id": run.run_id,
        "base_model": tenants_of(exchange).info().name,
        "model_owner": "token",
        "is_lora": True,
        "lora_rank": run.rank,
        "last_request_time": _time(run.used),
        "last_checkpoint": newest("weights"),
        "last_sampler_checkpoint": newest("sampler_weights"),
        "user_metadata": run.metadata,
    }


def _json(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{checkpoint.kind}/{checkpoint.name}",
        "checkpoint_type": KINDS[checkpoint.kind],
        "time": _time(checkpoint.time),
        "tinker_path": checkpoint.path,
        "size_bytes": checkpoint.size,
        "public": False,
        "user_metadata": dict(checkpoint.metadata),
        "expires_at": None if checkpoint.expires is None else _time(checkpoint.expires),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _page(
    exchange: Exchange, all_of_them: list[Any], most: int
) -> tuple[list[Any], dict[str, int]]:
    """A page of a list, as the query asks for it, and the cursor that describes it."""

    def number(name: str, otherwise: int) -> int:
        text = exchange.request.query_params.get(name, "")
        return int(text) if text.isdecimal() and len(text) < 10 else otherwise

    limit, offset = min(number("limit", most), _MOST_LISTED), number("offset", 0)
    cursor = {"offset": offset, "limit": limit, "total_count": len(all_of_them)}
    return all_of_them[offset : offset + limit], cursor


async def list_runs(exchange: Exchange) -> Json:
    """List the training runs."""
    runs, cursor = _page(exchange, _runs(exchange), 20)
    found = [_run_json(exchange, run) for run in runs]
    return {"training_runs": found, "cursor": cursor}


async def get_run(exchange: Exchange) -> Json:
    """Describe a training run."""
    wanted = exchange.request.path_params["run"]
    for run in _runs(exchange):
        if run.run_id == wanted:
            return _run_json(exchange, run)
    raise TrainingNotFoundError(say("TRAINING_RUN_NOT_FOUND", run=wanted[:80]))


async def list_run_checkpoints(exchange: Exchange) -> Json:
    """List the checkpoints of a training run."""
    wanted = exchange.request.path_params["run"]
    owned = tenants_of(exchange).checkpoints.owned(owner_of(exchange))
    found = [_json(each) for each in owned if each.run == wanted]
    return {"checkpoints": found}


async def list_checkpoints(exchange: Exchange) -> Json:
    """List all checkpoints."""
    found, cursor = _page(exchange, tenants_of(exchange).checkpoints.owned(owner_of(exchange)), 100)
    return {"checkpoints": [_json(each) for each in found], "cursor": cursor}


def _named(exchange: Exchange) -> Checkpoint:
    """The checkpoint in a request's path."""
    path = exchange.request.path_params
    wanted = f"tinker://{path['run']}/{path['kind']}/{path['name']}"
    return tenants_of(exchange).checkpoints.find(owner_of(exchange), wanted)


async def delete_checkpoint(exchange: Exchange) -> Json:
    """Remove a checkpoint."""
    await tenants_of(exchange).checkpoints.remove(_named(exchange))
    return {}


async def set_ttl(exchange: Exchange) -> Json:
    """Change when a checkpoint is removed."""
    seconds = exchange.take_body().checked(Ttl).ttl_seconds
    expires = None if seconds is None else unix_time() + seconds
    await tenants_of(exchange).checkpoints.expire_at(_named(exchange), expires)
    return {}


# Files. Clients download them without a token, through signed links that name the checkpoint, the
# file and the expiry.


def _link(exchange: Exchange, checkpoint: Checkpoint, name: str, expires: float) -> str:
    """A link to a file of a checkpoint, or to an archive of all files if the name is empty."""
    text = f"{expires} {checkpoint.path} {name}".encode()
    secret = urlsafe_b64encode(_signature(text) + text).decode()
    host = exchange.request.headers.get("host", "")
    return f"{exchange.request.url.scheme}://{host}/api/v1/archives/{secret}"


def _signature(text: bytes) -> bytes:
    return blake2b(text, digest_size=_SIGNATURE_BYTES, key=_KEY).digest()


async def archive(exchange: Exchange) -> Json:
    """Make a link to an archive with the adapter's files."""
    checkpoint, expires = _named(exchange), unix_time() + _LINK_SECONDS
    return {"url": _link(exchange, checkpoint, "", expires), "expires": _time(expires)}


async def file_urls(exchange: Exchange) -> Json:
    """Make a link to each of the adapter's files."""
    checkpoint, expires = _named(exchange), unix_time() + _LINK_SECONDS
    urls = {name: _link(exchange, checkpoint, name, expires) for name in _ARCHIVED}
    return {"urls": urls, "expires": _time(expires)}


async def download(exchange: Exchange) -> None:
    """Send one file of a checkpoint, or all of its files as an uncompressed tar archive."""
    checkpoint, name = _linked(exchange, exchange.request.path_params["secret"])
    found = await asyncio.to_thread(_files, tenants_of(exchange).checkpoints.folder(checkpoint))
    found = [each for each in found if name in ("", each[0].name)]
    if not found:
        raise not_found(checkpoint.path)
    if name:
        ((info, path),) = found
        size, parts, kind = info.size, _content(path, info.size), "application/octet-stream"
    else:
        size = sum(tarfile.BLOCKSIZE + _padded(info.size) for info, _ in found)
        size, parts, kind = size + 2 * tarfile.BLOCKSIZE, _tar(found), "application/x-tar"
    headers = {"content-type": kind, "content-length": str(size)}
    with exchange.call.party.shares.transfer("downloads", MAX_EXPORTS, checkpoint.owner):
        await exchange.reply.stream(parts, headers)


def _linked(exchange: Exchange, secret: str) -> tuple[Checkpoint, str]:
    """The checkpoint and the name of the file in a link.

    Raises:
        HttpRefusal: The link has expired, or was not made by ``_link``.
        TrainingNotFoundError: The checkpoint no longer exists.
    """
    with contextlib.suppress(ValueError):
        data = urlsafe_b64decode(secret)
        signature, text = data[:_SIGNATURE_BYTES], data[_SIGNATURE_BYTES:]
        if compare_digest(signature, _signature(text)):
            expires, path, name = text.decode().split(" ")
            if float(expires) >= unix_time():
                return tenants_of(exchange).checkpoints.find(None, path), name
    raise HttpRefusal(404, say("LINK_EXPIRED"))


def _files(folder: Path) -> list[tuple[tarfile.TarInfo, Path]]:
    found = []
    for name in _ARCHIVED:
        path = folder / name
        if path.is_file():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = path.stat().st_size, int(path.stat().st_mtime)
            found.append((info, path))
    return found


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


async def _tar(files: Iterable[tuple[tarfile.TarInfo, Path]]) -> AsyncIterator[bytes]:
    for info, path in files:
        yield info.tobuf(tarfile.USTAR_FORMAT)
        async for piece in _content(path, info.size):
            yield piece
        yield bytes(_padded(info.size) - info.size)
    yield bytes(2 * tarfile.BLOCKSIZE)


async def _content(path: Path, left: int) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while left:
            piece = await asyncio.to_thread(file.read, min(left, _PIECE_BYTES))
            if not piece:
                raise EOFError("a checkpoint became shorter")
            left -= len(piece)
            yield piece
