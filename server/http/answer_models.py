"""The bodies of answers, for the OpenAPI document. A test compares them with real answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Violation(Answer):
    param: str = Field(description="A field of the request.")
    code: str = Field(description="The reason, for programs.")
    message: str


class Error(Answer):
    message: str = Field(description="The message, for people; its wording may change.")
    type: str
    param: str | None = Field(description="The first invalid field.")
    code: str = Field(description="The reason, for programs.")
    violations: list[Violation] = Field([], description="All invalid fields.")


class Failure(Answer):
    """An error in the form of OpenAI's API."""

    error: Error


class AdapterUse(Answer):
    name: str
    generation: int
    digest: str
    weight: float
    cold_start: bool = Field(description="Whether the request waited for the adapter to load.")
    load_ms: float


class CachedTokens(Answer):
    cached_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class InputUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class _Headed(Answer):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    adapters_used: list[AdapterUse]


class _Generated(_Headed):
    usage: Usage


class _Choice(Answer):
    index: int
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None = Field(
        description="The stop string or token that ended the answer."
    )


class AssistantMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    tool_calls: list[dict[str, Any]] = []


class ChatChoice(_Choice):
    message: AssistantMessage


class ChatCompletion(_Generated):
    choices: list[ChatChoice]


class TextChoice(_Choice):
    text: str


class Completion(_Generated):
    choices: list[TextChoice]


class Response(BaseModel):
    """OpenAI's response object. It also repeats fields of the request, which are not listed."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "in_progress", "failed"]
    model: str
    output: list[dict[str, Any]] = Field(description="Items: message, reasoning, function_call.")
    usage: dict[str, Any] | None
    adapters_used: list[AdapterUse]


class MessageUsage(Answer):
    input_tokens: int = Field(description="Tokens of the prompt that were not cached.")
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Message(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]] = Field(description="Blocks: text, thinking, tool_use.")
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage
    adapters_used: list[AdapterUse]


class TokenCount(Answer):
    input_tokens: int


class AnthropicFailure(Answer):
    """An error in the form of Anthropic's API, with the additional fields of OpenAI's form."""

    type: Literal["error"]
    error: Error
    request_id: str


class Embedding(Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(Answer):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: InputUsage
    adapters_used: list[AdapterUse]


class Labels(Answer):
    index: int
    label: str
    labels: list[str]
    probs: list[float] = Field(description="The probability of each label, in the head's order.")
    num_classes: int


class Classification(_Headed):
    object: Literal["list"]  # type: ignore[assignment]
    data: list[Labels]
    usage: InputUsage


class Tokens(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Answer):
    prompt: str


class TokenizerInfo(BaseModel):
    """The tokenizer. Fields that are not listed here are special tokens, such as ``eos_token``."""

    model_config = ConfigDict(extra="allow")
    tokenizer_class: str
    chat_template: str | None


class AliasTarget(Answer):
    name: str
    generation: int
    weight: float


class ModelCard(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None = None
    aliases: list[str] = []
    digest: str | None = None
    method: str | None = None
    generation: int | None = None
    residency: str | None = None
    targets: list[AliasTarget] | None = Field(None, description="What an alias stands for.")


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelCard]


class Health(Answer):
    status: Literal["ok"]


class Version(Answer):
    version: str
