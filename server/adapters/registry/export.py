"""Exports an adapter's files, byte for byte as they were loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Self

from turret.server.adapters.adapter import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    TEMPLATE_FILES,
    TENSORS_FILE,
    TOKENIZER_FILES,
    AdapterInfo,
    Source,
    origin_of,
)
from turret.server.adapters.checkpoint.adapter_checkpoint import (
    Findings,
    digest_of_task,
    digest_with_tokenizer,
)
from turret.server.adapters.checkpoint.adapter_root import AdapterDirectory, AdapterRoot
from turret.server.adapters.checkpoint.files import parse_config
from turret.server.adapters.checkpoint.reader import begin_digest
from turret.server.adapters.checkpoint.tokenizer_files import read_chat_template, tokenizer_digest
from turret.server.adapters.residency.loader import changed
from turret.server.errors import AdapterChangedError
from turret.server.words import say

CHUNK_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """One file: its plain name, its size in bytes and the SHA-256 of its content in hex."""

    name: str
    size_bytes: int
    sha256: str


class AdapterExport:
    """An adapter's open files, so that an unload or a replacement does not affect the export.

    The constructor reads the files once, to check that they are the ones that were loaded. It
    blocks on the disk. Use the object as a context manager.

    Args:
        root: The directory to which ``source`` is relative.
        source: The location of the files.
        record: The adapter's record for clients.

    Raises:
        AdapterChangedError: The files are not the ones that were loaded.
        AdapterCheckpointError: The files cannot be opened.
    """

    def __init__(self, root: AdapterRoot, source: Source, record: AdapterInfo) -> None:
        self.record = record
        self._source = source
        self._files: dict[str, BinaryIO] = {}
        try:
            with root.open_directory(source.place, source.shown) as directory:
                names = [CONFIG_FILE, TENSORS_FILE]
                beside = TOKENIZER_FILES if record.facts.tokenizer else ()
                if origin_of(record.facts.chat_template) in TEMPLATE_FILES:
                    self._check_template(directory)
                    beside = beside or TEMPLATE_FILES
                names += [name for name in beside if directory.has(name)]
                for name in names:
                    self._files[name] = directory.open_file(name)
            self.files = tuple(_describe(name, file) for name, file in self._files.items())
            self._check_digest()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def chunks(self) -> Iterator[tuple[str, bytes]]:
        """Yield a file's name and its next bytes, file after file.

        Raises:
            AdapterChangedError: A file changed during the export.
        """
        for announced in self.files:
            file = self._files[announced.name]
            file.seek(0)
            digest = hashlib.sha256()
            while data := file.read(CHUNK_BYTES):
                digest.update(data)
                yield announced.name, data
            if digest.hexdigest() != announced.sha256:
                path = f"{self._source.shown}/{announced.name}"
                raise AdapterChangedError(say("CHANGED_DURING_EXPORT", path=path))

    def _check_template(self, directory: AdapterDirectory) -> None:
        facts, findings = self.record.facts, Findings(self._source.shown)
        if read_chat_template(directory, findings) != facts.chat_template or findings.fields:
            raise changed(self.record.name, self._source, facts.digest, facts.digest)

    def _check_digest(self) -> None:
        config = self._files[CONFIG_FILE]
        config.seek(0)
        digest = begin_digest(parse_config(config.read(MAX_CONFIG_BYTES + 1), self._source.shown))
        file = self._files[TENSORS_FILE]
        file.seek(0)
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
        found, facts = digest.hexdigest(), self.record.facts
        if facts.tokenizer:
            found = digest_with_tokenizer(found, self._tokenizer_digest())
        found = digest_of_task(found, self._source.task)
        if found != facts.digest:
            raise changed(self.record.name, self._source, facts.digest, found)

    def _tokenizer_digest(self) -> str:
        read: dict[str, bytes] = {}
        for name, most in TOKENIZER_FILES.items():
            if name in self._files:
                self._files[name].seek(0)
                read[name] = self._files[name].read(most + 1)
        return tokenizer_digest(read)


def _describe(name: str, file: BinaryIO) -> ExportedFile:
    digest = hashlib.sha256()
    size = 0
    while data := file.read(CHUNK_BYTES):
        digest.update(data)
        size += len(data)
    return ExportedFile(name, size, digest.hexdigest())
