"""What an adapter's directory holds, not yet interpreted. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from turret.lazy_torch import torch
from turret.server.adapters.tokenizer_files import TokenizerFiles

_TASK_DOMAIN = b"turret-adapter-task-1\0"
_TOKENIZER_DOMAIN = b"turret-adapter-tokenizer-1\0"


@dataclass(frozen=True, slots=True)
class AdapterCheckpoint:
    """A directory's content, structurally sound and finite, not yet interpreted.

    Attributes:
        path: What messages call the adapter: its path below the adapter root, or the name of one
            that was uploaded.
        config: ``adapter_config.json``.
        tensors: By canonical name (module path and PEFT's parameter name, without wrapper
            prefixes), in the file's dtype; views of one buffer, which is not the file's mapping.
        digest: SHA-256, hex, over the config (canonical JSON) and every byte of the tensor file.
        bytes_disk: Size of the two files.
        is_partial: Whether tensors were taken out that the method must not miss.
        base_digest: The base's digest in ``provenance.json`` beside the files; "" without that
            file.
        task: Which task of the files is meant, or None. The digest includes it.
        text_prefix: What stood before the language model's names where the adapter was trained
            on a model of text and images; "" if nothing did.
        tokenizer: Its own, where it needs one, or None. The digest includes it.
        chat_template: See ``AdapterFacts``. The digest does not include it.
    """

    path: str
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    digest: str
    bytes_disk: int
    is_partial: bool = False
    base_digest: str = ""
    task: int | None = None
    text_prefix: str = ""
    tokenizer: TokenizerFiles | None = None
    chat_template: str = ""

    @property
    def content(self) -> tuple[str, str]:
        """See ``AdapterFacts.content``."""
        return self.digest, self.chat_template

    def of_task(self, task: int | None) -> AdapterCheckpoint:
        """A copy for one task of the files: another adapter, with its own digest."""
        if task is None:
            return self
        return replace(self, task=task, digest=digest_of_task(self.digest, task))

    def with_tokenizer(self, tokenizer: TokenizerFiles) -> AdapterCheckpoint:
        """A copy with its own tokenizer: another adapter, with its own digest."""
        return replace(
            self,
            tokenizer=tokenizer,
            digest=digest_with_tokenizer(self.digest, tokenizer.digest),
            bytes_disk=self.bytes_disk + tokenizer.bytes_disk,
        )


def digest_of_task(digest: str, task: int | None) -> str:
    """The digest of one task, from the digest of all of an adapter's files."""
    if task is None:
        return digest
    return hashlib.sha256(_TASK_DOMAIN + bytes.fromhex(digest) + str(task).encode()).hexdigest()


def digest_with_tokenizer(digest: str, tokenizer: str) -> str:
    """The digest of an adapter with a tokenizer of its own, from those of weights and tokenizer."""
    both = bytes.fromhex(digest) + bytes.fromhex(tokenizer)
    return hashlib.sha256(_TOKENIZER_DOMAIN + both).hexdigest()
