"""Tokenizers that adapters bring, the latest used of them in memory."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

from turret.server.adapters.tokenizer_files import TokenizerFiles
from turret.server.basics.counted import counted
from turret.server.errors import InvalidRequestError
from turret.server.models.tokenizer import Tokenizer

# A tokenizer of 150,000 tokens takes some 100 MB. Requests that run keep theirs beyond that.
MAX_KEPT = 8
_CONFIG = "config.json"
# What of the base's config helps to read a tokenizer.
_GUESSED = ("model_type",)


class OwnTokenizers:
    """Reads tokenizers from their files. Thread-safe; reading takes up to seconds.

    Args:
        base: The base's tokenizer.
        config: The base's ``config.json``: where a tokenizer does not say of which class it is, it
            is of the model's.
    """

    def __init__(self, base: Tokenizer, config: Path) -> None:
        self._base = base
        self._config = config
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], Tokenizer] = OrderedDict()

    def check(self, files: TokenizerFiles, rows: int) -> None:
        """Read a tokenizer, and keep it for the first request.

        Args:
            files: Its files.
            rows: How many tokens the adapter has rows for.

        Raises:
            ValueError: It cannot be read, or has tokens without a row.
        """
        try:
            self.get(files.digest, rows, lambda: files)
        except InvalidRequestError as error:
            raise ValueError(error.message) from None

    def __contains__(self, key: tuple[str, int]) -> bool:
        """Whether the tokenizer of such a digest and number of rows is in memory."""
        with self._lock:
            return key in self._kept

    def find(self, digest: str, rows: int) -> Tokenizer | None:
        """The tokenizer, if it is in memory; it counts as used."""
        with self._lock:
            found = self._kept.get((digest, rows))
            if found is not None:
                self._kept.move_to_end((digest, rows))
            return found

    def get(self, digest: str, rows: int, read: Callable[[], TokenizerFiles]) -> Tokenizer:
        """The tokenizer; read, if it is not in memory.

        Raises:
            InvalidRequestError: It cannot be read.
            TurretError: What ``read`` raises.
        """
        found = self.find(digest, rows)
        if found is None:
            found = self._read(read().files, rows)
            with self._lock:
                # Another thread may have read it meanwhile: who asks next gets the same as before.
                found = self._kept.setdefault((digest, rows), found)
                while len(self._kept) > MAX_KEPT:
                    self._kept.popitem(last=False)
        return found

    def _read(self, files: Mapping[str, bytes], rows: int) -> Tokenizer:
        folder = Path(tempfile.mkdtemp(prefix="turret-tokenizer-"))
        try:
            for name, data in files.items():
                (folder / name).write_bytes(data)
            (folder / _CONFIG).write_text(json.dumps(self._guesses()))
            # The base's ends are those of its generation config, which the adapter's folder lacks.
            tokenizer = Tokenizer.load(folder, self._base.eos_token_ids, rows)
        except InvalidRequestError as error:
            raise InvalidRequestError(error.message.replace(str(folder), "the folder")) from None
        except Exception as error:
            # Of many kinds, and some come out of Rust: all are about what the files say.
            why = f"is no usable tokenizer: {error}".replace(str(folder), "the folder")
            raise InvalidRequestError(why) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        known = self._base.beyond(self._base.num_rows)
        for token, number in tokenizer.beyond(rows).items():
            # Some published tokenizers have more tokens than their models have rows.
            if known.get(token) != number:
                raise InvalidRequestError(
                    f"has the token {token!r:.60} with number {number}, the adapter has rows for"
                    f" {counted(rows, 'token')}"
                )
        return tokenizer

    def _guesses(self) -> dict[str, object]:
        try:
            config = json.loads(self._config.read_text())
        except (OSError, ValueError):
            return {}
        return {key: config[key] for key in _GUESSED if key in config}
