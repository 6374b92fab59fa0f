"""Receives an adapter's files: checks the header, then takes the chunks that follow it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any

from turret.server.adapters.adapter import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    REQUEST,
    TENSORS_FILE,
    TOKENIZER_FILES,
    OwnTemplate,
)
from turret.server.api.limits import MAX_TEMPLATE_CHARS, MAX_UPLOAD_FILES, MAX_WORD_CHARS
from turret.server.api.violations import Violations
from turret.server.errors import DeadlineExceededError, InvalidRequestError
from turret.server.words import say
from turret.v1 import adapters_pb2

# An adapter is read from these files. Any other file would be stored for nothing.
_REQUIRED = (CONFIG_FILE, TENSORS_FILE)
UPLOAD_FILES = (*_REQUIRED, *TOKENIZER_FILES)
_MOST_BYTES = {CONFIG_FILE: MAX_CONFIG_BYTES, **TOKENIZER_FILES}
MAX_CHUNK_BYTES = 1 << 20
# An upload ends if its client is silent for this long. The client may have disconnected, and other
# uploads may be waiting for its place.
IDLE_SECONDS = 60.0
# Time limit of a whole upload: a base, plus the time that its bytes take at this rate.
BASE_SECONDS = 120.0
LEAST_BYTES_PER_SECOND = 128 << 10

_SHA256 = re.compile(r"[0-9a-f]{64}")

Messages = AsyncIterator[adapters_pb2.UploadAdapterRequest]
# The files of an archive: each one's name, size in bytes and content.
Entries = AsyncIterator[tuple[str, int, AsyncIterator[bytes]]]


async def next_message(messages: Messages) -> adapters_pb2.UploadAdapterRequest | None:
    """The next message, or None at the end.

    Raises:
        DeadlineExceededError: No message arrived for ``IDLE_SECONDS``.
    """
    try:
        async with asyncio.timeout(IDLE_SECONDS):
            return await anext(messages, None)
    except TimeoutError:
        raise DeadlineExceededError(say("NO_MESSAGE_IN_TIME", seconds=IDLE_SECONDS)) from None


_New = (
    adapters_pb2.LoadAdapterRequest | adapters_pb2.ReplaceAdapterRequest | adapters_pb2.UploadHeader
)


def reading_options(message: _New) -> dict[str, Any]:
    """Options with which the registry reads an adapter's files: the task and the chat template."""
    text = message.chat_template
    return {
        "task": message.task if message.HasField("task") else None,
        "chat_template": OwnTemplate(REQUEST, {"default": text}) if text else None,
    }


def check_template(message: _New, violations: Violations, path: str = "chat_template") -> None:
    """Check the chat template that a message sends for an adapter, but not its syntax."""
    violations.check_chars(message.chat_template, MAX_TEMPLATE_CHARS, path)


def checked_header(message: adapters_pb2.UploadAdapterRequest | None) -> adapters_pb2.UploadHeader:
    """The header, which must be the first message, with every field in its range.

    Raises:
        InvalidRequestError: The header is invalid; lists every offending field.
    """
    if message is None or message.WhichOneof("part") != "header":
        raise InvalidRequestError.of("header", say("NOT_FIRST"))
    header = message.header
    violations = Violations()
    violations.check_name(header.name, "header.name")
    violations.check(
        header.replace or not header.HasField("expected_generation"),
        "header.expected_generation",
        "NEEDS_FIELD",
        other="replace",
    )
    check_template(header, violations, "header.chat_template")
    violations.check_count(len(header.files), MAX_UPLOAD_FILES, "header.files")
    files = header.files[: MAX_UPLOAD_FILES + 1]
    names = [file.path for file in files]
    check_complete(names, violations, "header.files")
    for index, file in enumerate(files):
        where = f"header.files[{index}]"
        check_file(file.path, file.size_bytes, names[:index], violations, where)
        violations.check(
            file.sha256 == "" or _SHA256.fullmatch(file.sha256) is not None,
            f"{where}.sha256",
            "NOT_A_DIGEST",
        )
    violations.raise_if_any()
    return header


def check_complete(names: Collection[str], violations: Violations, where: str) -> None:
    """Check that all required files of an adapter are there."""
    for required in _REQUIRED:
        violations.check(required in names, where, "LACKS", required=required)


def check_file(
    name: str, size: int, before: Collection[str], violations: Violations, where: str
) -> None:
    """Check the name and the size of a file against the files before it."""
    known = ", ".join(UPLOAD_FILES)
    path, size_path = f"{where}.path", f"{where}.size_bytes"
    violations.check(name in UPLOAD_FILES, path, "NOT_ONE_OF", value=name, choices=known)
    violations.check(name not in before, path, "DUPLICATE", value=name)
    violations.check(size >= 1, size_path, "TOO_SMALL", least=1, value=size)
    most = _MOST_BYTES.get(name, size)
    violations.check(size <= most, size_path, "TOO_LARGE", most=most, value=size)


def most_seconds(header: adapters_pb2.UploadHeader) -> float:
    """Time limit in seconds for receiving the files of an upload."""
    return BASE_SECONDS + sum(f.size_bytes for f in header.files) / LEAST_BYTES_PER_SECOND


async def receive_chunks(
    messages: Messages, write: Callable[[str, bytes], Awaitable[Any]], seconds: float
) -> None:
    """Passes every chunk to ``write``, in order, until the client is done.

    Args:
        messages: The messages after the header.
        write: Takes a chunk.
        seconds: Time limit for all chunks together, because a slow client occupies one of the
            places for uploads.

    Raises:
        InvalidRequestError: A message is not a chunk, or its chunk is too large.
        DeadlineExceededError: See ``next_message``; or the upload took longer than ``seconds``.
    """
    try:
        async with asyncio.timeout(seconds):
            await _receive_all(messages, write)
    except TimeoutError:
        raise DeadlineExceededError(say("UPLOAD_TOO_SLOW", seconds=seconds)) from None


async def _receive_all(messages: Messages, write: Callable[[str, bytes], Awaitable[Any]]) -> None:
    while (message := await next_message(messages)) is not None:
        if message.WhichOneof("part") != "chunk":
            raise InvalidRequestError.of("chunk", say("NOT_A_CHUNK"))
        size = len(message.chunk.data)
        violations = Violations()
        violations.check(
            size <= MAX_CHUNK_BYTES,
            "chunk.data",
            "TOO_MANY_BYTES",
            most=MAX_CHUNK_BYTES,
            found=size,
        )
        violations.check_chars(message.chunk.path, MAX_WORD_CHARS, "chunk.path")
        violations.raise_if_any()
        await write(message.chunk.path, message.chunk.data)
