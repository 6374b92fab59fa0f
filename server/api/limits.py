"""The limits on requests: every text, list and byte field of the API, with its maximum size.

The checks themselves are where the fields are read; ``docs/security.md`` shows this table, and a
test compares it with the proto files and their comments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from turret.server.api.gate import Backend
from turret.server.constraints.grammar import MAX_CHOICES, MAX_CONSTRAINT_CHARS
from turret.server.engine.scheduling.request import (
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_TOP_N,
)

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
# time at every step or before the first step, and no client sends as many.
MAX_CHAT_MESSAGES = 4096
MAX_ROLE_CHARS = 64
MAX_TOOLS = MAX_TOOL_CALLS = 128
# Limit of all turns together: checking this many takes about 50 ms of the event loop.
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
# Label scores over all inputs of one call; each takes some hundred bytes.
MAX_LABEL_SCORES = 1 << 20
# Limit of Tokenize, which also accepts more than the model can read.
MAX_TOKENIZED = 1 << 17
MAX_PATH_CHARS = 1024
MAX_PAGE_TOKEN_CHARS = 256
# Limit on names of methods, combinations and files, and on hexadecimal digests.
MAX_WORD_CHARS = 64
MAX_UPLOAD_FILES = 7
MAX_TEMPLATE_CHARS = 1 << 18

_REQUESTS, _ADAPTERS = "server/api/inference_requests.py", "server/api/admin.py"
_MIX, _INPUTS = "server/api/violations.py", "server/api/inputs.py"
_UPLOADS, _FUSE = "server/api/uploads.py", "server/api/admin_messages.py"


@dataclass(frozen=True, slots=True)
class Limit:
    """The most that a field may hold.

    Attributes:
        field: ``Message.field``.
        most: The limit; the comment in the proto file has the same number.
        number: The number in ``most``, or None where the model sets it.
        checked_in: The file with the check.
    """

    field: str
    most: str
    number: int | None
    checked_in: str


def _chars(field: str, number: int, checked_in: str = _ADAPTERS) -> Limit:
    return Limit(field, f"{number} characters", number, checked_in)


def _entries(field: str, number: int, checked_in: str = _REQUESTS) -> Limit:
    return Limit(field, f"{number} entries", number, checked_in)


def _text(field: str) -> Limit:
    return Limit(field, "the characters that the model's context can hold", None, _REQUESTS)


_NAMED = (
    *("LoadAdapter", "ReplaceAdapter", "RollbackAdapter", "GetAdapter", "UnloadAdapter"),
    "PinAdapter",
)
LIMITS = (
    _text("GenerateRequest.prompt"),
    _text("ScoreRequest.prompt"),
    _text("TokenizeRequest.prompt"),
    _text("Input.prompt"),
    _entries("EmbedRequest.inputs", MAX_INPUTS, _INPUTS),
    _entries("ClassifyRequest.inputs", MAX_INPUTS, _INPUTS),
    _text("ChatMessage.content"),
    _chars("ChatMessage.role", MAX_ROLE_CHARS, _REQUESTS),
    _entries("Chat.messages", MAX_CHAT_MESSAGES),
    _entries("Chat.tools", MAX_TOOLS),
    Limit(
        "ChatMessage.tool_calls",
        f"{MAX_TOOL_CALLS} entries; {MAX_CHAT_TOOL_CALLS} in all turns together",
        MAX_TOOL_CALLS,
        _REQUESTS,
    ),
    *(
        _chars(field, MAX_TOOL_NAME_CHARS, _REQUESTS)
        for field in ("ChatMessage.tool_call_id", "ToolCall.id", "ToolCall.name", "Tool.name")
    ),
    _text("ToolCall.arguments"),
    _text("Tool.description"),
    _chars("Tool.parameters", MAX_CONSTRAINT_CHARS, _REQUESTS),
    _chars("Chat.chat_template", MAX_TEMPLATE_CHARS, "server/api/vocabularies.py"),
    _chars("Chat.chat_template_kwargs", MAX_CONSTRAINT_CHARS, _REQUESTS),
    Limit("TokenIds.ids", f"the model's context; {MAX_TOKENIZED} in Tokenize", None, _REQUESTS),
    Limit("GenerateRequest.answer_so_far", "the model's context", None, _REQUESTS),
    _entries("SamplingParams.logit_bias", MAX_LOGIT_BIASES),
    Limit(
        "StopConditions.stop_strings",
        f"{MAX_STOP_STRINGS} entries of {MAX_STOP_STRING_CHARS} characters",
        MAX_STOP_STRINGS,
        "server/engine/scheduling/request.py",
    ),
    _entries("StopConditions.stop_token_ids", MAX_STOP_TOKEN_IDS),
    *(
        _chars(f"GenerateRequest.{kind}", MAX_CONSTRAINT_CHARS, _REQUESTS)
        for kind in ("json_schema", "regex", "grammar")
    ),
    Limit(
        "Choice.texts",
        f"{MAX_CHOICES} entries, {MAX_CONSTRAINT_CHARS} characters",
        MAX_CHOICES,
        _REQUESTS,
    ),
    *(
        _entries(f"{message}.adapters", MAX_MIX_MEMBERS, _MIX)
        for message in (
            *("GenerateRequest", "ScoreRequest", "EmbedRequest", "ClassifyRequest"),
            "TokenizeRequest",
            *("FuseAdaptersRequest", "MergeAdaptersRequest"),
        )
    ),
    *(
        _chars(f"{message}.request_id", MAX_REQUEST_ID_CHARS, "server/api/call.py")
        for message in ("GenerateRequest", "ScoreRequest", "EmbedRequest", "ClassifyRequest")
    ),
    *(
        _chars(f"{message}.cache_salt", MAX_CACHE_SALT_CHARS, _REQUESTS)
        for message in ("GenerateRequest", "ScoreRequest", "EmbedRequest", "ClassifyRequest")
    ),
    _chars("AdapterWeight.name", MAX_NAME_CHARS, _MIX),
    *(_chars(f"{call}Request.name", MAX_NAME_CHARS) for call in _NAMED),
    _chars("SetAliasRequest.name", MAX_NAME_CHARS, _FUSE),
    _chars("AliasTarget.name", MAX_NAME_CHARS, _FUSE),
    _entries("SetAliasRequest.targets", MAX_ALIAS_TARGETS, _FUSE),
    _chars("DeleteAliasRequest.name", MAX_NAME_CHARS),
    _chars("UnpinAdapterRequest.name", MAX_NAME_CHARS),
    _chars("ExportAdapterRequest.name", MAX_NAME_CHARS),
    _chars("FuseAdaptersRequest.name", MAX_NAME_CHARS, _FUSE),
    _chars("FuseAdaptersRequest.combination", MAX_WORD_CHARS, _FUSE),
    _chars("FuseAdaptersRequest.majority_sign_method", MAX_WORD_CHARS, _FUSE),
    _chars("LoadAdapterRequest.path", MAX_PATH_CHARS),
    _chars("ReplaceAdapterRequest.path", MAX_PATH_CHARS),
    *(
        _chars(f"{message}.chat_template", MAX_TEMPLATE_CHARS, _UPLOADS)
        for message in ("LoadAdapterRequest", "ReplaceAdapterRequest", "UploadHeader")
    ),
    _chars("ListAdaptersRequest.page_token", MAX_PAGE_TOKEN_CHARS),
    _chars("ListAdaptersRequest.method", MAX_WORD_CHARS),
    _chars("UploadHeader.name", MAX_NAME_CHARS, _UPLOADS),
    _entries("UploadHeader.files", MAX_UPLOAD_FILES, _UPLOADS),
    _chars("FileInfo.path", MAX_WORD_CHARS, _UPLOADS),
    _chars("FileInfo.sha256", MAX_WORD_CHARS, _UPLOADS),
    _chars("FileChunk.path", MAX_WORD_CHARS, _UPLOADS),
    Limit("FileChunk.data", "1 MiB", 1, _UPLOADS),
)


@dataclass(frozen=True, slots=True)
class InputLimits:
    """Bounds of a prompt that follow from the model.

    Attributes:
        vocab_size: Token ids are below it.
        max_tokens: Most tokens of a prompt.
        max_chars: Longest text: more characters cannot be so few tokens.
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
