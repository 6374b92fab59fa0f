"""Reads adapters, lowers them (turns files into operators), and checks the budgets."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from turret.server.adapters.adapter import (
    REQUEST,
    TOKENIZER_FILE,
    AdapterFacts,
    OwnTemplate,
    Source,
    TokenizerFiles,
    origin_of,
)
from turret.server.adapters.base import NOTHING_SPECIAL, Allowed, BaseModel
from turret.server.adapters.checkpoint import AdapterCheckpoint, Findings
from turret.server.adapters.checkpoint.adapter_root import AdapterRoot, DigestCache
from turret.server.adapters.checkpoint.reader import over_host_memory, read_checkpoint
from turret.server.adapters.checkpoint.tokenizer_files import (
    read_chat_template,
    read_tokenizer_files,
)
from turret.server.adapters.component import (
    COMPONENTS_KEY,
    Component,
    ComponentRef,
    FindComponent,
    find_no_component,
)
from turret.server.adapters.lowering import Lowered
from turret.server.adapters.methods.lower import lower_checkpoint
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.peft_format.refusals import (
    base_difference,
    is_other_base,
    of_other_base,
)
from turret.server.adapters.peft_format.vocabulary_checkpoint import vocabulary_of
from turret.server.basics.work import compute_on_this_thread
from turret.server.errors import (
    AdapterChangedError,
    AdapterCheckpointError,
    AdapterMismatchError,
    InvalidRequestError,
)
from turret.server.remote import AdapterHub
from turret.server.words import Text, say

_log = logging.getLogger(__name__)


def changed(name: str, source: Source, digest: str, found: str) -> AdapterChangedError:
    """The error for files that were replaced by others.

    Args:
        name: The adapter's name.
        source: The location of the files.
        digest: Digest of the registered files.
        found: Digest of the present files.
    """
    facts = {"adapter": name, "path": source.shown, "digest": digest}
    return AdapterChangedError(say("FILES_CHANGED", **facts, found_digest=found))


def lost(name: str, source: Source, error: AdapterCheckpointError) -> AdapterChangedError:
    """The error for files that are missing or broken.

    The reason is only logged, because it would show clients the server's directories.

    Args:
        name: The adapter's name.
        source: The former location of the files.
        error: The error from reading them; returned unchanged if it is an AdapterChangedError.
    """
    if isinstance(error, AdapterChangedError):
        return error
    _log.warning("adapter %r cannot be read again: %s", name, error)
    return AdapterChangedError(say("FILES_LOST", adapter=name, path=source.shown))


# Takes a tokenizer (None for the base's), the number of vocabulary rows, and a chat template (empty
# for the tokenizer's); raises InvalidRequestError if they are unusable.
CheckTokenizer = Callable[[TokenizerFiles | None, int, str], None]


def _take_any_tokenizer(files: TokenizerFiles | None, rows: int, chat_template: str) -> None:
    """Checks nothing; for programs that answer no requests."""


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """A lowered checkpoint: its facts, and its operators in host memory.

    ``base_generation`` is the generation of the base weights from which the operators were
    computed; None if the operators do not depend on the base weights.
    """

    facts: AdapterFacts
    operators: AdapterOperators
    base_generation: int | None = None


class AdapterLoader:
    """Reads and lowers adapters. Keeps only the digests of uploads; thread-safe.

    It keeps no digests of files below the adapter root, because unchanged times do not prove
    unchanged content: a program that has mapped a file can write to it without changing its times.

    Attributes:
        base: The base model as served; may be set at any time.
        check_tokenizer: Rejects an adapter's own tokenizer or chat template that cannot be served;
            set it before the first adapter is loaded.

    Args:
        root: The allow-listed adapter root; None to reject every path but those of the hub.
        base: The base model as served.
        host_bytes: The maximum size of one adapter's operators.
        max_rank: The maximum rank served.
        uploads: The directory to which the paths of uploads are relative.
        find_source: Finds the files of a component; raises AdapterComponentError if the component
            is not registered.
        allowed: Exceptions to the default rejections.
        hub: The hub for paths that begin with ``hub:``; None to reject them.
        admit: Called with every adapter's operators; raises if they cannot be served.
    """

    def __init__(
        self,
        root: Path | None,
        base: BaseModel,
        host_bytes: int,
        max_rank: int,
        uploads: Path | None = None,
        *,
        find_source: Callable[[ComponentRef], Source] = find_no_component,
        allowed: Allowed = NOTHING_SPECIAL,
        hub: AdapterHub | None = None,
        admit: Callable[[AdapterOperators], None] = lambda operators: None,
    ) -> None:
        self._admit = admit
        self.check_tokenizer: CheckTokenizer = _take_any_tokenizer
        self._root = AdapterRoot(root)
        self._hub = hub or AdapterHub()
        self._cache = AdapterRoot(self._hub.root)
        self._uploads = AdapterRoot(uploads)
        self.base = base
        self._host_bytes = host_bytes
        self._max_rank = max_rank
        self._find_source = find_source
        self._allowed = allowed
        is_private = uploads is not None and _is_private(uploads)
        self._known = DigestCache() if is_private else None

    def root_of(self, source: Source) -> AdapterRoot:
        """The only directory in which the source's files may be opened."""
        if source.is_hub:
            return self._cache
        return self._uploads if source.is_upload else self._root

    def find(self, path: str, task: int | None = None) -> Source:
        """The source of a path; the hub's files are downloaded, which blocks.

        Raises:
            See ``AdapterHub.fetch``.
        """
        source = Source(self._root.relative(path), task=task)
        return Source(self._hub.fetch(path), task=task) if source.is_hub else source

    def read(self, source: Source) -> AdapterCheckpoint:
        """Reads and hashes an adapter; see ``read_checkpoint`` for the errors."""
        compute_on_this_thread()
        if source.is_hub:
            # This downloads nothing unless the cache was emptied.
            self._hub.fetch(source.path)
        # Operators have at least one element per weight in the file, so a larger file cannot fit.
        item_bytes = self.base.dtype.itemsize
        checkpoint = read_checkpoint(
            self.root_of(source),
            source.place,
            max_elements=self._host_bytes // item_bytes,
            item_bytes=item_bytes,
            known=self._known if source.is_upload else None,
            shown=source.shown,
        )
        return self._with_tokenizer(checkpoint, source).of_task(source.task)

    def read_new(
        self, source: Source, chat_template: OwnTemplate | None = None
    ) -> AdapterCheckpoint:
        """Like ``read``, but also reads the chat template.

        The template is read only for a new adapter. The registration keeps it, so later changes of
        the file have no effect.

        Args:
            source: Where the files are.
            chat_template: The template to use instead of the one in the files.
        """
        checkpoint = self.read(source)
        findings = Findings(source.shown)
        with self.root_of(source).open_directory(source.place, source.shown) as directory:
            template = read_chat_template(directory, findings, chat_template)
        findings.raise_if_any()
        return replace(checkpoint, chat_template=template)

    def _with_tokenizer(self, checkpoint: AdapterCheckpoint, source: Source) -> AdapterCheckpoint:
        """The checkpoint, with its own tokenizer if its tokens may differ from the base's."""
        vocabulary = self.base.vocabulary
        rows, is_other = vocabulary_of(checkpoint, self.base)
        if not is_other:
            return checkpoint
        files = self.read_tokenizer(source)
        if files is not None:
            return checkpoint.with_tokenizer(files)
        named = vocabulary.size if vocabulary.named is None else vocabulary.named
        if rows and not named <= rows <= vocabulary.size:
            findings = Findings(checkpoint.path)
            findings.add(
                TOKENIZER_FILE, say("ADAPTER_LACKS_TOKENIZER", rows=rows, base_rows=vocabulary.size)
            )
            findings.raise_if_any()
        return checkpoint

    def read_tokenizer(self, source: Source) -> TokenizerFiles | None:
        """Reads the tokenizer alongside an adapter's files; None if there is none.

        Raises:
            AdapterCheckpointError: A file is rejected.
        """
        if source.is_hub:
            self._hub.fetch_tokenizer(source.path)
        findings = Findings(source.shown)
        with self.root_of(source).open_directory(source.place, source.shown) as directory:
            files = read_tokenizer_files(directory, findings)
        findings.raise_if_any()
        return files

    def lower(self, checkpoint: AdapterCheckpoint) -> LoadedAdapter:
        """Turns a checkpoint into operators.

        Raises:
            AdapterCheckpointError: A method, key or tensor is not supported.
            AdapterMismatchError: The adapter was made for another base.
            AdapterComponentError: A component is not registered.
            BudgetExceededError: The rank or the size exceeds a limit.
        """
        compute_on_this_thread()
        # Keep one base for the whole lowering, even if it is replaced meanwhile.
        base = self.base
        method, lowered = self._lowered(checkpoint, base, partial(self._read_component, base))
        if not self._allowed.other_base:
            check_same_base(checkpoint, base)
        if self._allowed.strict_base and (difference := base_difference(checkpoint, base)):
            text = say("BASE_DIFFERS", path=checkpoint.path, problem=difference)
            raise AdapterMismatchError(text, violations=[("base_model_name_or_path", text)])
        self.check_size(checkpoint.path, lowered.operators)
        generation = base.generation if lowered.depends_on_base else None
        facts = lowered.facts(checkpoint, method)
        if checkpoint.tokenizer is not None:
            rows = facts.vocab_size or base.vocabulary.size
            facts = replace(facts, vocab_size=rows, tokenizer=checkpoint.tokenizer.digest)
        if checkpoint.tokenizer is not None or checkpoint.chat_template:
            self._check(checkpoint, facts)
        return LoadedAdapter(facts, lowered.operators, generation)

    def check_size(self, shown: str, operators: AdapterOperators) -> None:
        """Raises BudgetExceededError for operators that are too large to be served."""
        if operators.num_bytes > self._host_bytes:
            raise over_host_memory(shown, operators.num_bytes, self._host_bytes)
        self._admit(operators)

    def _check(self, checkpoint: AdapterCheckpoint, facts: AdapterFacts) -> None:
        try:
            self.check_tokenizer(checkpoint.tokenizer, facts.vocab_size, checkpoint.chat_template)
        except InvalidRequestError as error:
            why: Text = error.args[0]
            is_template = why.reason == "CHAT_TEMPLATE_INVALID"
            findings = Findings(checkpoint.path)
            origin = origin_of(facts.chat_template) if is_template else TOKENIZER_FILE
            findings.add("chat_template" if origin == REQUEST else origin, why)
            findings.raise_if_any()

    def _read_component(self, base: BaseModel, ref: ComponentRef) -> Component:
        checkpoint = self._read_same(ref.name, self._find_source(ref), ref.digest)
        if COMPONENTS_KEY in checkpoint.config:
            text = say("NESTED_COMPONENT", component=ref.name)
            raise AdapterCheckpointError(text, violations=[(COMPONENTS_KEY, text)])
        method, lowered = self._lowered(checkpoint, base, find_no_component)
        return Component(ref, method, lowered.operators, lowered.ranks, lowered.scalings)

    def reload(self, name: str, source: Source, digest: str) -> LoadedAdapter:
        """Reads an adapter that was registered before, and requires the same content.

        Raises:
            AdapterChangedError: The files changed since, or are gone.
        """
        return self.lower(self._read_same(name, source, digest))

    def reread(self, name: str, source: Source, digest: str, base: BaseModel) -> Lowered:
        """Like ``reload``, for a base of a dtype other than the served one."""
        checkpoint = self._read_same(name, source, digest)
        return self._lowered(checkpoint, base, partial(self._read_component, base))[1]

    def _lowered(
        self, checkpoint: AdapterCheckpoint, base: BaseModel, find_component: FindComponent
    ) -> tuple[str, Lowered]:
        """The method's name and its result, within this server's limits."""
        dense_bytes = self._host_bytes if self._allowed.dense else 0
        return lower_checkpoint(
            checkpoint, base, self._max_rank, find_component, max_dense_bytes=dense_bytes
        )

    def _read_same(self, name: str, source: Source, digest: str) -> AdapterCheckpoint:
        try:
            checkpoint = self.read(source)
        except AdapterCheckpointError as error:
            raise lost(name, source, error) from None
        if checkpoint.digest != digest:
            raise changed(name, source, digest, checkpoint.digest)
        return checkpoint


def check_same_base(checkpoint: AdapterCheckpoint, base: BaseModel) -> None:
    """Rejects an adapter that fits in shape but names another base.

    Raises:
        AdapterMismatchError: The name differs, and the provenance does not prove the same base.
    """
    trained = checkpoint.config.get("base_model_name_or_path") or ""
    if checkpoint.trained_base.digest == base.digest or not is_other_base(trained, base.name):
        return
    raise of_other_base(checkpoint.path, trained, base.name)


def _is_private(directory: Path) -> bool:
    """Whether a directory exists and only this server's user can write in it."""
    try:
        status = directory.stat()
    except OSError:
        return False
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
