"""Which adapters have a tokenizer of their own, and its files."""

from __future__ import annotations

from collections.abc import Iterable

from turret.server.adapters.adapter import Adapter
from turret.server.adapters.registry.name_table import NameTable
from turret.server.adapters.residency.loader import AdapterLoader, CheckTokenizer
from turret.server.adapters.residency.lost_files import changed, lost
from turret.server.adapters.tokenizer_files import TokenizerFiles
from turret.server.errors import AdapterCheckpointError


class AdapterTokenizers:
    """Thread-safe."""

    def __init__(self, table: NameTable, loader: AdapterLoader) -> None:
        self._table = table
        self._loader = loader

    def check_with(self, check: CheckTokenizer) -> None:
        """Have the tokenizers of adapters that are loaded from now on checked."""
        self._loader.check_tokenizer = check

    def find(self, names: Iterable[str]) -> Adapter | None:
        """The first of some adapters that has one; names that are not there are passed over.

        Nothing is held: a name may stand for another generation when its request is submitted.
        """
        for name in names:
            registration = self._table.get(name)
            if registration is not None and registration.current.facts.tokenizer:
                return registration.current
        return None

    def read(self, adapter: Adapter) -> TokenizerFiles:
        """The files of an adapter that has one; blocks.

        Raises:
            AdapterChangedError: They have changed since the adapter was loaded, or are gone.
        """
        try:
            files = self._loader.read_tokenizer(adapter.source)
        except AdapterCheckpointError as error:
            raise lost(adapter.name, adapter.source, error) from None
        digest = "" if files is None else files.digest
        if files is None or digest != adapter.facts.tokenizer:
            raise changed(adapter.name, adapter.source, adapter.facts.tokenizer, digest)
        return files
