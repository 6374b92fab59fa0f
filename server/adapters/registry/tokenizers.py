"""Which adapters have a tokenizer or a chat template of their own, and the tokenizer's files."""

from __future__ import annotations

from collections.abc import Iterable

from turret.server.adapters.adapter import Adapter
from turret.server.adapters.chat_template import template_of
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
        """Have the tokenizers and templates of adapters that are loaded from now on checked."""
        self._loader.check_tokenizer = check

    def find(self, names: Iterable[str]) -> tuple[Adapter | None, str]:
        """The adapter of a mix that has its own tokenizer, and the mix's ``template_of``.

        Names that are not there are passed over. Nothing is held: a name may stand for another
        generation when its request is submitted.
        """
        found = [r.current for name in names if (r := self._table.get(name)) is not None]
        own = next((adapter for adapter in found if adapter.facts.tokenizer), None)
        return own, template_of(adapter.facts for adapter in found)

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
