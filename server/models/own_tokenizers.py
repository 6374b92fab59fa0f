"""Adapters' own tokenizers and chat templates; the most recently used ones are in memory."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from turret.server.adapters.adapter import TOKENIZER_FILE, OwnTemplate, TokenizerFiles
from turret.server.basics.confined import Confined
from turret.server.basics.files import reporting_disk_faults
from turret.server.basics.work import LACK_OF_MEMORY_IS_REPORTED
from turret.server.errors import InvalidRequestError, TurretError
from turret.server.models.tokenizer import Tokenizer, each_text
from turret.server.words import Text, say

# A tokenizer: the digest of its files and its number of rows (empty and 0 for the base's), and its
# chat template in the form of ``AdapterFacts`` (empty for the one in its files).
TokenizerKey = tuple[str, int, str]
BASE_TOKENIZER: TokenizerKey = ("", 0, "")

# Maximum number of tokenizers in memory, because each may have two processes that render chats.
# Running requests keep their tokenizers even beyond this limit.
MAX_KEPT = 8
# Limits for reading one tokenizer. A file of 64 MiB takes less time. Tokens must be short, because
# they are shown to clients.
CPU_SECONDS = 20.0
MAX_BYTES = 1 << 30
MAX_TOKEN_CHARS = 1024
# The maximum number of texts in the configs, which transformers reads in this process. The largest
# published tokenizers list about 6,500 tokens, each with its number.
MAX_TEXTS = 1 << 15
_MAX_ANSWER_BYTES = 4 << 20
_PROGRAM = Path(__file__).with_name("tokenizer_program.py")
_CONFIG = "config.json"
# Keys of the base's config that help transformers read a tokenizer.
_GUESSED = ("model_type",)


class OwnTokenizers:
    """Reads tokenizers from their files. Thread-safe. Reading may take seconds.

    An adapter's tokenizer is the base's with added tokens. Its file repeats the whole tokenizer,
    and a child process compares it with the base's. Reading it in this process would block every
    other thread for a second, and its regular expressions, replacements and merges could take any
    time and memory on a short text.

    Args:
        base: The base's tokenizer.
        config: The base's ``config.json``, which determines the class of a tokenizer that does not
            name its own.
    """

    def __init__(self, base: Tokenizer, config: Path) -> None:
        self._base = base
        self._config = config
        self._lock = threading.Lock()
        self._kept: OrderedDict[TokenizerKey, Tokenizer] = OrderedDict()
        self._expected: list[dict[str, str]] | None = None

    def check(self, files: TokenizerFiles | None, rows: int, chat_template: str) -> None:
        """Read an adapter's tokenizer and chat template, and keep them for the first request.

        Args:
            files: The tokenizer's files; None for the base's tokenizer.
            rows: The number of tokens for which the adapter has rows.
            chat_template: See ``TokenizerKey``.

        Raises:
            InvalidRequestError: The files cannot be read, or there are tokens without a row.
        """
        if files is None:
            self.get(("", 0, chat_template))
        else:
            self.get((files.digest, rows, chat_template), lambda: files)

    def __contains__(self, key: TokenizerKey) -> bool:
        """Whether a tokenizer is in memory."""
        with self._lock:
            return key in self._kept

    def find(self, key: TokenizerKey) -> Tokenizer | None:
        """Return the tokenizer if it is in memory, and mark it as used; otherwise None."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def get(self, key: TokenizerKey, read: Callable[[], TokenizerFiles] | None = None) -> Tokenizer:
        """Return the tokenizer, reading it if it is not in memory.

        Args:
            key: See ``TokenizerKey``.
            read: Reads the tokenizer's files; None for the base's tokenizer, which is in memory.

        Raises:
            InvalidRequestError: The tokenizer or its chat template cannot be read.
            OutOfMemoryError, StorageFullError, StorageFailedError, UnavailableError: The server
                cannot read any tokenizer now.
            TurretError: The error that ``read`` raises.
        """
        if key == BASE_TOKENIZER:
            return self._base
        found = self.find(key)
        if found is None:
            digest, rows, chat_template = key
            if chat_template:
                plain = self.get((digest, rows, ""), read)
                found = plain.with_template(OwnTemplate.from_json(chat_template))
                if found is not plain:
                    found.check_template()
            else:
                assert read is not None
                found = self._read(read().files, rows)
            with self._lock:
                # Another thread may have read it meanwhile: keep and return the first one.
                found = self._kept.setdefault(key, found)
                while len(self._kept) > MAX_KEPT:
                    self._kept.popitem(last=False)
        return found

    def _read(self, files: Mapping[str, bytes], rows: int) -> Tokenizer:
        with reporting_disk_faults():
            folder = Path(tempfile.mkdtemp(prefix="turret-tokenizer-"))
        try:
            # The folder belongs to the server, so disk errors say nothing about the adapter's
            # files.
            with reporting_disk_faults(), LACK_OF_MEMORY_IS_REPORTED:
                for name, data in files.items():
                    (folder / name).write_bytes(data)
                (folder / _CONFIG).write_text(json.dumps(self._guesses()))
                numbers = self._reduce(folder)
                # The base's end tokens come from its generation config, which the adapter's folder
                # lacks.
                tokenizer = Tokenizer.load(folder, self._base.eos_token_ids, rows, self._base)
        except InvalidRequestError as error:
            ((_, text),) = error.violations
            raise _invalid(text.params["problem"], folder) from None
        except TurretError:
            raise
        except Exception as error:
            # Any type of exception is possible, even from Rust. All of them are about the content
            # of the files.
            found = (part for part in error.args if isinstance(part, Text))
            raise _invalid(next(found, str(error)), folder) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        for token, number in numbers.items():
            if tokenizer.number_of(token) != number:
                found = tokenizer.number_of(token)
                raise InvalidRequestError(
                    say("TOKEN_NUMBER_TAKEN", token=token[:60], number=number, found=found)
                )
        known = self._base.beyond(self._base.num_rows)
        for token, number in tokenizer.beyond(rows).items():
            # Some published tokenizers have more tokens than their models have rows, so accept the
            # base's own tokens without a row.
            if known.get(token) != number:
                raise InvalidRequestError(
                    say("TOKEN_WITHOUT_ROW", token=token[:60], number=number, rows=rows)
                )
        return tokenizer

    def _reduce(self, folder: Path) -> dict[str, int]:
        """Compare a ``tokenizer.json`` with the base's, then remove the vocabulary from it.

        Returns:
            The added tokens with their ids.
        """
        child = Confined(
            _PROGRAM,
            cpu_seconds=CPU_SECONDS,
            max_bytes=MAX_BYTES,
            max_answer_bytes=_MAX_ANSWER_BYTES,
            packages=("tokenizers",),
        )
        try:
            found = child.ask_one(("describe", str(folder / TOKENIZER_FILE)), "TOKENIZER_UNREAD")
            if self._expected is None:
                self._expected = self._parts_of_base(child, folder)
        finally:
            child.close()
        for part, digest in found["digests"].items():
            if digest not in {expected[part] for expected in self._expected}:
                raise ValueError(say("TOKENIZER_DIFFERS", part=part))
        file = found["file"]
        numbers: dict[str, int] = {token["content"]: token["id"] for token in file["added_tokens"]}
        if any(len(token) > MAX_TOKEN_CHARS for token in numbers):
            raise ValueError(say("ADDED_TOKEN_TOO_LONG", most=MAX_TOKEN_CHARS))
        texts = _texts_of_configs(folder)
        if isinstance(file["model"]["vocab"], dict):
            # The tokenizer's rules for text around a prompt need the ids of these tokens.
            file["model"]["vocab"] = {**self._named(texts), **numbers}
        (folder / TOKENIZER_FILE).write_text(json.dumps(file))
        return numbers

    def _parts_of_base(self, child: Confined, folder: Path) -> list[dict[str, str]]:
        """Digests of the base's tokenizer, as transformers builds it and as its file has it."""
        made = folder / "base.json"
        made.write_text(self._base.serialized())
        files = [made, self._config.with_name(TOKENIZER_FILE)]
        found = (
            child.ask_one(("describe", str(file)), "TOKENIZER_UNREAD")
            for file in files
            if file.exists()
        )
        return [each["digests"] for each in found]

    def _named(self, texts: Iterable[str]) -> dict[str, int]:
        """Tokens of the base that are among the texts."""
        numbers = {text: self._base.number_of(text) for text in texts}
        return {text: number for text, number in numbers.items() if number is not None}

    def _guesses(self) -> dict[str, object]:
        try:
            config = json.loads(self._config.read_text())
        except (OSError, ValueError):
            return {}
        return {key: config[key] for key in _GUESSED if key in config}


def _texts_of_configs(folder: Path) -> set[str]:
    """The texts in the adapter's config files, except for chat templates.

    Raises:
        ValueError: There are too many, or one is too long.
    """
    texts: set[str] = set()
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists():
            content = json.loads((folder / name).read_text())
            if isinstance(content, dict):
                content.pop("chat_template", None)
            each_text(content, texts.add)
    if len(texts) > MAX_TEXTS:
        raise ValueError(say("TOO_MANY_ENTRIES", most=MAX_TEXTS, found=len(texts)))
    if any(len(text) > MAX_TOKEN_CHARS for text in texts):
        raise ValueError(say("ADDED_TOKEN_TOO_LONG", most=MAX_TOKEN_CHARS))
    return texts


def _invalid(problem: str, folder: Path) -> InvalidRequestError:
    """The error for files that are not a tokenizer."""
    if not isinstance(problem, Text):
        # Libraries name the temporary folder.
        problem = problem.replace(str(folder), "the folder")
    return InvalidRequestError(say("TOKENIZER_INVALID", problem=problem))
