"""The limits on texts, lists and bytes in requests.

The code that reads a field checks its limit. The comments in the proto files state the same limits,
and a test exceeds each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from turret.server.adapters.adapter import MAX_WEIGHT as MAX_WEIGHT
from turret.server.api.gate import Backend
from turret.server.constraints.grammar import MAX_CHOICES as MAX_CHOICES
from turret.server.constraints.grammar import MAX_CONSTRAINT_CHARS as MAX_CONSTRAINT_CHARS
from turret.server.engine.scheduling.request import MAX_STOP_STRING_CHARS as MAX_STOP_STRING_CHARS
from turret.server.engine.scheduling.request import MAX_STOP_STRINGS as MAX_STOP_STRINGS
from turret.server.engine.scheduling.request import MAX_TOP_N

if TYPE_CHECKING:
    from turret.server.api.vocabularies import Vocabulary

# Size of a gRPC message: enough for the longest prompt of a model with a context of a million
# tokens. Uploads are chunked.
MAX_MESSAGE_BYTES = 4 << 20
# Longer mixes are rejected before their names are looked up.
MAX_MIX_MEMBERS = 64
MAX_ALIAS_TARGETS = 16
MAX_NAME_CHARS = 128
# Limits on turns of a chat and on entries of logit_bias and of stop_token_ids. Each entry costs
# time at every step or before the first one, and no client needs this many.
MAX_CHAT_MESSAGES = 4096
MAX_ROLE_CHARS = 64
MAX_TOOLS = MAX_TOOL_CALLS = 128
# Limit for all turns together. Checking this many blocks the event loop for about 50 ms.
MAX_CHAT_TOOL_CALLS = 8192
MAX_TOOL_NAME_CHARS = 64
MAX_LOGIT_BIASES = 1024
MAX_STOP_TOKEN_IDS = 1024
# Alternatives to the sampled token whose log probabilities are returned.
MAX_TOP_LOGPROBS = MAX_TOP_N
MAX_REQUEST_ID_CHARS = 128
MAX_CACHE_SALT_CHARS = 256
# Inputs of one call, and numbers in all the vectors of its answer (32 MiB).
MAX_INPUTS = 2048
MAX_EMBEDDING_NUMBERS = 8 << 20
# Numbers in one message of EmbedStream (2 MiB).
MAX_STREAMED_NUMBERS = 1 << 19
# Label scores over all inputs of one call. Each takes a few hundred bytes.
MAX_LABEL_SCORES = 1 << 20
# Limit of Tokenize, which also accepts more than the model can read.
MAX_TOKENIZED = 1 << 17
MAX_PATH_CHARS = 1024
MAX_PAGE_TOKEN_CHARS = 256
# Limit on names of methods, combinations and files, and on hexadecimal digests.
MAX_WORD_CHARS = 64
MAX_UPLOAD_FILES = 7
MAX_TEMPLATE_CHARS = 1 << 18


@dataclass(frozen=True, slots=True)
class InputLimits:
    """Bounds of a prompt that follow from the model.

    Attributes:
        vocab_size: Token ids must be less than this.
        max_tokens: Maximum number of tokens of a prompt.
        max_chars: Maximum number of characters; a longer text always has more tokens than that.
    """

    vocab_size: int
    max_tokens: int
    max_chars: int

    @classmethod
    def of(cls, backend: Backend, vocabulary: Vocabulary) -> InputLimits:
        """The limits of the served model, for a request that uses a vocabulary."""
        info, tokenizer = backend.model_info, vocabulary.tokenizer
        most = info.max_model_len
        size = info.vocab_size if vocabulary.own is None else tokenizer.vocab_size
        return cls(size, most, most * tokenizer.longest_token)

    def for_tokenize(self) -> InputLimits:
        """The limits of ``Tokenize``: the same on text, but higher on tokens."""
        return InputLimits(self.vocab_size, max(self.max_tokens, MAX_TOKENIZED), self.max_chars)
