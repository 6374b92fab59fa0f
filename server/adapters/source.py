"""Where the files of an adapter's generation are."""

from __future__ import annotations

from dataclasses import dataclass, field

from turret.server.basics.hub_id import HUB_SCHEME, HubId

# The two files of an adapter, as PEFT names them.
CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
# Files beside them if an adapter has its own tokens, with the most bytes of each. No other
# tokenizer files are read. The tokenizer.json of Gemma 3 has 33 MB.
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = {
    TOKENIZER_FILE: 64 << 20,
    TOKENIZER_CONFIG_FILE: 4 << 20,
    SPECIAL_TOKENS_FILE: 1 << 20,
    "added_tokens.json": 4 << 20,
    TEMPLATE_FILE: 256 << 10,
}
# A chat template and its special tokens are read from these, even if all tokens are the base's.
TEMPLATE_FILES = (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, TEMPLATE_FILE)
# ``turret train`` writes this file beside its adapters; reading it is optional.
PROVENANCE_FILE = "provenance.json"


@dataclass(frozen=True, slots=True)
class Source:
    """A directory with ``CONFIG_FILE`` and ``TENSORS_FILE``.

    Attributes:
        path: Relative to the adapter root, or to the state directory if ``is_upload``; or
            ``hub:org/name@commit``.
        is_upload: The server wrote the files itself and removes them when nobody needs them.
        adapter: The adapter's name, for an upload.
        task: Which of several tasks in the files is meant; None if not specified.
    """

    path: str
    is_upload: bool = False
    adapter: str = field(default="", compare=False)
    task: int | None = None

    @property
    def is_hub(self) -> bool:
        """Whether the files are those of a commit on the hub."""
        return not self.is_upload and self.path.startswith(HUB_SCHEME)

    @property
    def place(self) -> str:
        """The directory, relative to the one that the source's files are opened in."""
        if not self.is_hub:
            return self.path
        return HubId.parse(self.path.removeprefix(HUB_SCHEME)).snapshot

    @property
    def shown(self) -> str:
        """The path for messages, which must not show where the server keeps uploads."""
        return self.adapter or self.path
