"""The bodies of requests, one model for each endpoint."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from turret.server.api import limits
from turret.server.http.fields import (
    ITEM_PARTS,
    UINT32,
    Body,
    ClosedBody,
    ClosedSchema,
    Content,
    Count,
    Function,
    Int,
    ItemContent,
    Number,
    Prompts,
    Schema,
    StopTexts,
    StopTokenIds,
    Texts,
    TokenIds,
    ignored,
    not_one_of,
    short,
    text_of,
    text_or_list,
    unsupported,
    wrong_at,
    wrong_type,
)
from turret.server.words import say

# OpenAI's limits.
MAX_ANSWERS = 128
MAX_METADATA = 16
# Longer than any request runs.
MAX_TIMEOUT_SECONDS = 30 * 86400.0
# The default of OpenAI's API for completions.
DEFAULT_MAX_TOKENS = 16

_PARALLEL = "Whether the answer may have several calls. true by default, unless calls are forced."
_CONSTRAINT = "A constraint that the answer must match. A request can have one."


def names_with(main: str, top_n: str = "", chat: str = "") -> dict[str, str]:
    """A request's names for fields of turret.v1.

    The fields of the messages for sampling, stop conditions and conversations are at the request's
    top level.

    Args:
        main: The field with the prompt, the conversation or the inputs.
        top_n: The field with the number of most likely tokens to report.
        chat: The field with the conversation, if it is not ``main``.
    """
    return {
        **dict.fromkeys(("sampling.", "stop.", "chat."), ""),
        "stop.stop_strings": "stop",
        "stop.include_stop": "include_stop_str_in_output",
        **dict.fromkeys(("input", "inputs", "token_ids.ids"), main),
        **dict.fromkeys(("chat", "chat.messages"), chat or main),
        **dict.fromkeys(("top_n", "options.top_n"), top_n),
    }


class MixMember(ClosedBody):
    """An adapter of a mix."""

    name: str
    weight: Number | None = Field(None, description="From -100 to 100; 1 by default.")
    generation: Int | None = Field(None, ge=0, le=(1 << 64) - 1)


class Asking(Body):
    """Fields of every request that runs on adapters."""

    model: str = Field(
        description="The base model's name, `base`, an adapter, or a mix such as `sql+json*-0.5`."
    )
    adapters: list[MixMember] = Field(
        [], max_length=limits.MAX_MIX_MEMBERS, description="The mix, if `model` names the base."
    )
    cache_salt: str = Field(
        "",
        max_length=limits.MAX_CACHE_SALT_CHARS,
        description="Only requests with the same salt share cached prefixes.",
    )
    timeout: Number | None = Field(
        None, gt=0, le=MAX_TIMEOUT_SECONDS, description="Seconds until the request is cancelled."
    )

    structural_tag: Any = unsupported(instead="another constraint")
    guided_whitespace_pattern: Any = unsupported()
    use_beam_search: Any = unsupported(False)
    length_penalty: Any = unsupported(1, 1.0)
    prompt_logprobs: Any = unsupported(instead="echo with logprobs")
    truncate_prompt_tokens: Any = unsupported()
    allowed_token_ids: Any = unsupported(instead="logit_bias or a constraint")
    bad_words: Any = unsupported([], instead="logit_bias or a constraint")
    logits_processors: Any = unsupported([])
    skip_special_tokens: Any = unsupported(True)
    return_token_ids: Any = unsupported(False)
    priority: Any = unsupported(0)
    lora: Any = unsupported([], instead="model")
    lora_path: Any = unsupported(instead="model")
    suffix: Any = unsupported("")
    prompt_embeds: Any = unsupported()
    functions: Any = unsupported([], instead="tools")
    function_call: Any = unsupported("none", "auto", instead="tool_choice")


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
_EFFORT = "Sets the template's variables `reasoning_effort` and `enable_thinking` (false for none)."
_RENDERING = ("chat_template", "chat_template_kwargs", "reasoning_effort", "continue_final_message")
Variables = Annotated[dict[str, Any], short(limits.MAX_CONSTRAINT_CHARS)]


class ChatOnly(Body):
    """Fields of conversations, in addition to those of ``Asking``."""

    chat_template_kwargs: Variables = Field(
        {}, description="Variables for the chat template, such as `enable_thinking`."
    )
    reasoning_effort: Effort | None = Field(None, description=_EFFORT)
    add_generation_prompt: bool | None = Field(
        None,
        description="Whether the prompt ends with the beginning of the assistant's turn. true by"
        " default, unless continue_final_message.",
    )
    continue_final_message: bool = Field(
        False, description="Whether the answer continues the last message."
    )

    modalities: Any = unsupported(["text"])
    audio: Any = unsupported()
    prediction: Any = unsupported()
    web_search_options: Any = unsupported()
    chat_template: str = Field(
        "",
        max_length=limits.MAX_TEMPLATE_CHARS,
        description="A Jinja template to use instead. Requires --trust-request-chat-template.",
    )
    documents: Any = unsupported([], instead="chat_template_kwargs")

    @property
    def effort(self) -> str | None:
        """The reasoning effort."""
        return self.reasoning_effort


class StreamOptions(Body):
    include_usage: bool = Field(
        default=False, description="Whether the last event contains the usage."
    )
    continuous_usage_stats: bool = Field(
        default=False, description="Whether all events contain it, as counted so far."
    )


class StructuredOutputs(ClosedBody):
    """vLLM's form of a constraint."""

    json_: Schema | None = Field(None, alias="json", description="A JSON schema.")
    json_object: bool = Field(False, description="Any JSON object.")
    regex: str | None = None
    grammar: str | None = Field(None, description="Lark or GBNF.")
    choice: Texts | None = Field(None, min_length=1, max_length=limits.MAX_CHOICES)
    disable_fallback: Any = ignored()
    structural_tag: Any = unsupported(False)
    whitespace_pattern: Any = unsupported(False)
    disable_any_whitespace: Any = unsupported(False)
    disable_additional_properties: Any = unsupported(False)


class JsonSchema(Body):
    name: Any = None
    schema_: ClosedSchema = Field(alias="schema")


class ResponseFormat(Body):
    """OpenAI's form of a constraint."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise wrong_at(say("REQUIRED"), "json_schema", "schema")
        return self


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise wrong_at(wrong_type("an object", value))
    if len(value) > limits.MAX_LOGIT_BIASES:
        raise wrong_at(say("TOO_MANY_ENTRIES", most=limits.MAX_LOGIT_BIASES, found=len(value)))
    for key, bias in value.items():
        is_id = key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) <= UINT32
        if not is_id or type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise wrong_at(say("NOT_A_BIAS", token=key[:10]))
    return {int(key): bias for key, bias in value.items()}


class Generating(Asking):
    """Fields of every request for an answer."""

    temperature: Number | None = Field(None, ge=0, le=100, description="0 is greedy.")
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Count | None = Field(None, ge=-1, description="0 and -1 are off.")
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = Field(None, ge=0.01, le=100, description="1 is off.")
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    seed: Int | None = Field(
        None,
        ge=-(1 << 63),
        le=(1 << 64) - 1,
        description="With n answers, answer i uses seed + i.",
    )
    logit_bias: Annotated[
        dict[int, float],
        PlainValidator(
            _biases,
            json_schema_input_type=Annotated[
                dict[str, float], Field(max_length=limits.MAX_LOGIT_BIASES)
            ],
        ),
    ] = Field(
        {}, description="Token ids, and the numbers to add to their logits, from -100 to 100."
    )
    n: Int = Field(1, ge=1, le=MAX_ANSWERS, description="Answers to each prompt.")
    best_of: Int | None = Field(None, ge=1, le=MAX_ANSWERS, description="Must equal n.")
    max_tokens: Count | None = Field(None, ge=1)
    max_completion_tokens: Count | None = Field(
        None, ge=1, description="OpenAI's newer name for max_tokens."
    )
    min_tokens: Count = Field(0, ge=0)
    stop: StopTexts = Field(
        [], max_length=limits.MAX_STOP_STRINGS, description="Texts that end the answer."
    )
    stop_token_ids: StopTokenIds = Field([])
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    include_stop: bool = False
    return_tokens_as_token_ids: bool = Field(
        False, description="Call the tokens of `logprobs` `token_id:ID`, as vLLM does."
    )
    stream: bool = Field(False, description="Send server-sent events instead of one answer.")
    stream_options: StreamOptions = Field(default_factory=StreamOptions)

    response_format: ResponseFormat | None = Field(None, description=_CONSTRAINT)
    structured_outputs: StructuredOutputs | None = Field(None, description=_CONSTRAINT)
    guided_json: Schema | None = None
    guided_json_object: bool = False
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: Texts | None = Field(None, min_length=1, max_length=limits.MAX_CHOICES)
    json_object: bool = False
    json_schema: Schema | None = None
    regex: str | None = None
    grammar: str | None = None
    ebnf: str | None = None
    choice: Texts | None = Field(None, min_length=1, max_length=limits.MAX_CHOICES)

    @model_validator(mode="after")
    def _sends_every_answer(self) -> Generating:
        if self.best_of not in (None, self.n):
            raise wrong_at(say("NOT_EQUAL", other="n", expected=self.n), "best_of")
        return self


# Conversations.


class CalledFunction(Body):
    name: str = ""
    arguments: str = Field("", description="A JSON object, as text.")


class ToolCall(Body):
    id: str = ""
    type: Any = "function"
    function: CalledFunction


class Message(Body):
    """A turn of a conversation."""

    role: str = Field(description="A role of the chat template; `developer` is `system`.")
    content: Content | None = Field(None, description="Optional for the assistant.")
    name: Any = ignored()
    tool_calls: list[ToolCall] = Field([], max_length=limits.MAX_TOOL_CALLS, fail_fast=True)
    tool_call_id: str = ""
    function_call: Any = unsupported({}, "", instead="tool_calls")

    @model_validator(mode="after")
    def _is_complete(self) -> Message:
        if self.role == "function":
            instead = '"tool" instead of "function"'
            raise wrong_at(say("NOT_SUPPORTED_USE", instead=instead), "role")
        # Answers that consist only of calls or reasoning have no content, and clients send them
        # back without it.
        if self.content is None and self.role != "assistant":
            raise wrong_at(say("REQUIRED"), "content")
        return self


Messages = Annotated[list[Message], Field(max_length=limits.MAX_CHAT_MESSAGES)]
Parameters = Annotated[dict[str, Any], short(limits.MAX_CONSTRAINT_CHARS)]


class FunctionTool(Body):
    name: str
    description: str = ""
    parameters: Parameters = Field({}, description="A JSON schema of the arguments.")
    strict: Any = Field(None, description="Forced calls always match the schema.")


class _Typed(Body):
    type: Function


class Tool(_Typed):
    function: FunctionTool


class FlatTool(FunctionTool, _Typed):
    """A tool in the form of the Responses API."""


def _choice_of_tools(value: Any) -> Any:
    if value in ("none", "auto", "required") or isinstance(value, dict):
        return value
    raise wrong_at(not_one_of(value, "none, auto, required, a function, allowed_tools"))


ToolChoice = Annotated[
    str | dict[str, Any],
    PlainValidator(
        _choice_of_tools,
        json_schema_input_type=Literal["none", "auto", "required"] | dict[str, Any],
    ),
    short(16 << 10),
]


class WithTools(Body):
    """The tools that an answer may call."""

    tools: list[Tool] = Field([], max_length=limits.MAX_TOOLS)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool | None = Field(None, description=_PARALLEL)


class ChatRequest(Generating, ChatOnly, WithTools):
    """Asks for the answer to a conversation."""

    names: ClassVar = names_with("messages", "top_logprobs")

    messages: Messages
    logprobs: bool = False
    top_logprobs: Int | None = Field(
        None, ge=0, le=limits.MAX_TOP_LOGPROBS, description="Requires logprobs."
    )
    echo: Any = unsupported(False)
    add_special_tokens: Any = unsupported(False)
    user: Any = ignored()
    metadata: Any = ignored()
    store: Any = ignored()

    @model_validator(mode="after")
    def _has_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise wrong_at(say("NEEDS_FIELD", other="logprobs"), "top_logprobs")
        return self


class CompletionRequest(Generating):
    """Asks for a continuation of each prompt."""

    names: ClassVar = names_with("prompt", "logprobs")

    prompt: Prompts
    echo: bool = False
    logprobs: Int | None = Field(None, ge=0, le=limits.MAX_TOP_LOGPROBS)
    max_tokens: Count | None = Field(
        None, ge=0, description=f"{DEFAULT_MAX_TOKENS} by default; 0 scores the prompt."
    )
    max_completion_tokens: Count | None = Field(None, ge=0)
    tools: Any = unsupported([], instead="/v1/chat/completions")
    add_special_tokens: Any = unsupported(True, instead="token ids")
    user: Any = ignored()


class InputsRequest(Asking, ChatOnly):
    """A request about texts, token ids, or one conversation."""

    names: ClassVar = names_with("input")

    input: Prompts | None = Field(None, description="Either input or messages is required.")
    messages: Messages | None = Field(None, description="One conversation.")
    echo: Any = unsupported(False)
    tools: Any = unsupported([])
    add_special_tokens: bool | None = None
    user: Any = ignored()

    @model_validator(mode="after")
    def _has_one_input(self) -> InputsRequest:
        _check_input(self, "input")
        return self


class EmbeddingsRequest(InputsRequest):
    """Asks for vectors."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Int | None = Field(None, ge=0, le=UINT32)
    pooling: Literal["last", "mean"] | None = None
    normalize: bool | None = Field(None, description="true by default.")


class ClassifyRequest(InputsRequest):
    """Asks for labels."""


class TokenizeRequest(Asking, ChatOnly, WithTools):
    """Asks for the tokens of a text, or of a conversation as the chat template renders it."""

    names: ClassVar = names_with("prompt", chat="messages")

    model: str | None = Field(None, description="The base model's tokenizer by default.")  # type: ignore[assignment]
    prompt: str | None = Field(None, description="Either prompt or messages is required.")
    messages: Messages | None = None
    return_token_strs: bool = False
    echo: Any = unsupported(False)
    add_special_tokens: bool | None = Field(
        None, description="Whether a prompt gets the tokenizer's special tokens; true by default."
    )

    @model_validator(mode="after")
    def _has_one_input(self) -> TokenizeRequest:
        _check_input(self, "prompt")
        if self.messages is None and self.tools:
            raise wrong_at(say("NEEDS_FIELD", other="messages"), "tools")
        return self


class DetokenizeRequest(Asking):
    """Asks for the text of tokens."""

    names: ClassVar = names_with("tokens")

    model: str | None = Field(None, description="The base model's tokenizer by default.")  # type: ignore[assignment]
    tokens: TokenIds


def _check_input(body: InputsRequest | TokenizeRequest, name: str) -> None:
    """Reject a request unless it has exactly one input, and only the fields for its kind."""
    is_chat, is_text = body.messages is not None, getattr(body, name) is not None
    if is_chat and is_text:
        raise wrong_at(say("CONFLICTS_WITH", other="messages"), name)
    if not is_chat and not is_text:
        raise wrong_at(say("REQUIRED"), name)
    for field in () if is_chat else _RENDERING:
        if getattr(body, field):
            raise wrong_at(say("NEEDS_FIELD", other="messages"), field)
    # The chat template writes special tokens itself, and a text that is embedded or labelled always
    # gets them.
    is_free = is_text and isinstance(body, TokenizeRequest)
    if not is_free and body.add_special_tokens not in (None, is_text):
        raise wrong_at(say("NOT_SUPPORTED"), "add_special_tokens")


# The Responses API.


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    name: str | None = None
    strict: bool | None = None
    description: str | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise wrong_at(say("REQUIRED"), "schema")
        return self


class TextOptions(Body):
    format: Annotated[TextFormat, short(limits.MAX_CONSTRAINT_CHARS)] | None = None
    verbosity: Any = ignored()


class Reasoning(Body):
    effort: Effort | None = Field(default=None, description=_EFFORT)
    summary: Any = ignored()


def _item_text(value: Any, place: str) -> str:
    if value is None:
        raise wrong_at(say("REQUIRED"), place)
    return text_of(value, ITEM_PARTS, place)


class Item(Body):
    """An item of a conversation: a message, a call of a function, or its output."""

    type: str = "message"
    role: str | None = None
    content: ItemContent = None
    call_id: str = ""
    name: str = ""
    arguments: str = ""
    output: ItemContent = None

    @model_validator(mode="after")
    def _is_complete(self) -> Item:
        if self.type == "message":
            roles = ("user", "assistant", "system", "developer")
            if self.role is None:
                raise wrong_at(say("REQUIRED"), "role")
            if self.role not in roles:
                raise wrong_at(not_one_of(self.role, ", ".join(roles)), "role")
            self.content = _item_text(self.content, "content")
        elif self.type == "function_call_output":
            self.output = _item_text(self.output, "output")
        elif self.type == "item_reference":
            raise wrong_at(say("NOTHING_STORED"), "type")
        elif self.type not in ("function_call", "function_call_output", "reasoning"):
            kinds = "message, function_call, function_call_output"
            raise wrong_at(not_one_of(self.type, kinds), "type")
        return self


_Items = Annotated[list[Item], Field(min_length=1, max_length=limits.MAX_CHAT_MESSAGES)]
ShortText = Annotated[str, Field(max_length=512)]


class ResponseRequest(Generating, ChatOnly, WithTools):
    """Asks for the answer to a conversation, which is not stored."""

    names: ClassVar = names_with("input", "top_logprobs") | dict.fromkeys(
        ("stop.max_tokens", "max_tokens"), "max_output_tokens"
    )

    input: Annotated[
        _Items, text_or_list("items", lambda text: {"role": "user", "content": text}, _Items)
    ]
    instructions: str | None = None
    max_output_tokens: Count | None = Field(None, ge=1)
    n: Int = Field(1, ge=1, le=1)
    include: Texts = Field([], max_length=MAX_METADATA)
    top_logprobs: Int | None = Field(None, ge=0, le=limits.MAX_TOP_LOGPROBS)
    metadata: Annotated[dict[str, Any], short(16 << 10)] = Field({}, max_length=MAX_METADATA)
    text: TextOptions = Field(default_factory=TextOptions)
    reasoning: Reasoning = Field(default_factory=Reasoning)
    tools: list[FlatTool] = Field([], max_length=limits.MAX_TOOLS)  # type: ignore[assignment]
    user: ShortText | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    store: Any = unsupported(False)
    previous_response_id: Any = unsupported()
    conversation: Any = unsupported()
    background: Any = unsupported(False)
    prompt: Any = unsupported(instead="input")
    truncation: Any = unsupported("disabled")
    context_management: Any = unsupported([])
    moderation: Any = unsupported()
    echo: Any = unsupported(False)
    add_special_tokens: Any = unsupported(False)

    @property
    def effort(self) -> str | None:
        return self.reasoning.effort or self.reasoning_effort


# Anthropic's Messages API.

_MAX_BLOCKS = 2 * limits.MAX_CHAT_MESSAGES


class Block(Body):
    """A part of a turn. Reasoning of earlier turns is left out of the prompt."""

    type: str
    text: str | None = None
    id: str = ""
    name: str = ""
    input: Parameters = Field({}, description="The arguments of a call.")
    tool_use_id: str = ""
    content: Any = Field("", description="The result of a call: a string, or text blocks.")

    @model_validator(mode="after")
    def _is_text(self) -> Block:
        if self.type == "text" and self.text is None:
            raise wrong_at(say("REQUIRED"), "text")
        if self.type == "tool_result":
            self.content = text_of(self.content, ("text",), "content")
        elif self.type in ("image", "document"):
            raise wrong_at(say("NOT_TEXT"))
        elif self.type not in ("text", "tool_use", "thinking", "redacted_thinking"):
            kinds = "text, tool_use, tool_result, thinking"
            raise wrong_at(not_one_of(self.type, kinds), "type")
        return self


_Blocks = Annotated[list[Block], Field(max_length=limits.MAX_CHAT_MESSAGES, fail_fast=True)]


class Turn(Body):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        _Blocks, text_or_list("blocks", lambda text: {"type": "text", "text": text}, _Blocks)
    ]


def _few_blocks(value: Any) -> Any:
    """Limit the number of blocks in all turns together, before the first block is read."""
    turns = value if isinstance(value, list) else []
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
    found = sum(len(content) for content in contents if isinstance(content, list))
    if found > _MAX_BLOCKS:
        raise wrong_at(say("TOO_MANY_ENTRIES", most=_MAX_BLOCKS, found=found))
    return value


class MessageTool(FunctionTool):
    """A tool that the client runs."""

    type: Literal["custom"] | None = None
    parameters: Parameters = Field(
        {}, alias="input_schema", description="A JSON schema of the arguments."
    )


class MessageToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"] = "auto"
    name: str = ""
    disable_parallel_tool_use: bool | None = None

    @property
    def choice(self) -> Any:
        """The choice in the format of OpenAI's APIs."""
        if self.type == "tool":
            return {"type": "function", "name": self.name}
        return "required" if self.type == "any" else self.type


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Any = ignored()
    display: Any = ignored()


class OutputConfig(Body):
    effort: Literal[Effort, "max"] | None = None
    format: Annotated[TextFormat, short(limits.MAX_CONSTRAINT_CHARS)] | None = None


class CountRequest(Asking, ChatOnly):
    """Asks for the number of tokens in a conversation."""

    names: ClassVar = names_with("messages")

    messages: Annotated[list[Turn], BeforeValidator(_few_blocks)] = Field(
        min_length=1, max_length=limits.MAX_CHAT_MESSAGES
    )
    system: Content | None = None
    tools: list[MessageTool] = Field([], max_length=limits.MAX_TOOLS)
    tool_choice: MessageToolChoice = Field(default_factory=MessageToolChoice)
    thinking: Thinking | None = Field(
        None, description="Sets the template's variable `enable_thinking`."
    )
    output_config: OutputConfig = Field(default_factory=OutputConfig)
    metadata: Any = ignored()
    service_tier: Any = ignored()
    cache_control: Any = ignored()
    container: Any = unsupported()
    mcp_servers: Any = unsupported([])
    context_management: Any = unsupported({})

    @model_validator(mode="after")
    def _thinks_as_asked(self) -> CountRequest:
        if self.thinking is not None:
            thinks = self.thinking.type != "disabled"
            self.chat_template_kwargs = {"enable_thinking": thinks, **self.chat_template_kwargs}
        return self

    @property
    def effort(self) -> str | None:
        return self.output_config.effort or self.reasoning_effort


class MessagesRequest(CountRequest, Generating):
    """Asks for the answer to a conversation."""

    names: ClassVar = names_with("messages") | {"stop.stop_strings": "stop_sequences"}

    max_tokens: Count | None = Field(ge=1)
    stop_sequences: StopTexts = Field([], max_length=limits.MAX_STOP_STRINGS)
    n: Int = Field(1, ge=1, le=1)


# Adapters, with vLLM's fields.


class AdapterName(Body):
    names: ClassVar = {"name": "lora_name", "path": "lora_path"}
    lora_name: str


class LoadAdapter(AdapterName):
    lora_path: str = Field(description="A directory below --adapter-root.")
    load_inplace: bool = Field(False, description="Whether to replace an adapter of this name.")
    pinned: bool = Field(False, description="Whether to keep the adapter in memory.")
    task: Int | None = Field(None, ge=0, le=UINT32, description="One of several tasks.")
    chat_template: str = Field(
        "",
        max_length=limits.MAX_TEMPLATE_CHARS,
        description="A Jinja template to use instead of the one in the adapter's files.",
    )

    @model_validator(mode="after")
    def _pins_new_adapters(self) -> LoadAdapter:
        if self.load_inplace and self.pinned:
            raise wrong_at(say("CONFLICTS_WITH", other="load_inplace"), "pinned")
        return self
