"""Each invalid field is refused under its own name, with one reason."""

from __future__ import annotations

from typing import Any

import pytest
from servers.fakes import knows_tools
from servers.http_harness import TURNS, VALID, HttpHarness

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
ABSENT = object()
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = {"id": "1", "function": {"name": "f", "arguments": "[1]"}}
IMAGE = {"type": "image_url"}
LONG = "x" * 70_000
FORM: Any = {"type": "json_schema"}


def turn(role: Any = "user", **fields: Any) -> dict[str, Any]:
    """A conversation of one turn."""
    return {"messages": [{"role": role, **fields}]}


def item(role: Any = "user", **fields: Any) -> dict[str, Any]:
    return {"input": [{"role": role, **fields}]}


def tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", **fields}]}


def changed(path: str, change: dict[str, Any]) -> dict[str, Any]:
    """A valid body after a change."""
    body = VALID[path] | change
    return {name: value for name, value in body.items() if value is not ABSENT}


# Path → changes of a valid body, each with the field and the reason of its only error.
FAULTS: dict[str, list[tuple[dict[str, Any], str, str]]] = {
    CHAT: [
        ({"model": ABSENT}, "model", "required"),
        ({"model": 3}, "model", "wrong_type"),
        ({"model": "sql*101"}, "model", "not_a_weight"),
        ({"model": "json+sql*1000"}, "model", "not_a_weight"),
        ({"model": "json+sql*1e3"}, "model", "not_a_weight"),
        ({"model": "sql+sql"}, "model", "duplicate"),
        ({"model": "sql", "adapters": [{"name": "json"}]}, "adapters", "needs_base_model"),
        ({"adapters": ["sql"]}, "adapters[0]", "wrong_type"),
        ({"adapters": [{"weight": 1}]}, "adapters[0].name", "required"),
        ({"adapters": [{"nam": "sql"}]}, "adapters[0].nam", "unknown_field"),
        ({"adapters": [{"name": "sql", "x": 1}]}, "adapters[0].x", "unknown_field"),
        ({"adapters": [{"name": "sql", "wieght": 2}]}, "adapters[0].wieght", "unknown_field"),
        ({"adapters": [{"name": "a", "weight": 101}]}, "adapters[0].weight", "not_in_range"),
        ({"messages": ABSENT}, "messages", "required"),
        ({"messages": None, "prompt": "a"}, "messages", "required"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": ["hi"]}, "messages[0]", "wrong_type"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "required"),
        (turn("function", content="hi"), "messages[0].role", "not_supported_use"),
        (turn(content=3), "messages[0].content", "wrong_type"),
        (turn(), "messages[0].content", "required"),
        (turn(contents="hi"), "messages[0].contents", "unknown_field"),
        (turn("system", content=None), "messages[0].content", "required"),
        (turn("tool", tool_call_id="a"), "messages[0].content", "required"),
        (turn(content=[IMAGE]), "messages[0].content[0]", "not_text"),
        (turn("assistant", tool_calls=["x"]), "messages[0].tool_calls[0]", "wrong_type"),
        (
            turn("assistant", tool_calls=[CALL]),
            *("messages[0].tool_calls[0].arguments", "not_a_json_object"),
        ),
        (
            turn("tool", content="x", tool_call_id="1" * 65),
            *("messages[0].tool_call_id", "too_many_characters"),
        ),
        ({"tools": 3}, "tools", "wrong_type"),
        (tool(), "tools[0].function", "required"),
        (tool(type="retrieval", function={"name": "a"}), "tools[0].type", "not_one_of"),
        (tool(function={}), "tools[0].function.name", "required"),
        (tool(function={"name": "a b"}), "tools[0].name", "not_matching"),
        ({"tools": [CLOCK, CLOCK]}, "tools", "duplicate"),
        ({"tools": [CLOCK] * 129}, "tools", "too_many_entries"),
        ({"tools": [CLOCK], "tool_choice": "always"}, "tool_choice", "not_one_of"),
        ({"tool_choice": "required"}, "tool_choice", "needs_field"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            *("tool_choice", "unknown_tool"),
        ),
        (
            {"tools": [CLOCK], "guided_grammar": 'root ::= "a"'},
            *("guided_grammar", "gbnf_beside_tools"),
        ),
        ({"response_format": "json_object"}, "response_format", "wrong_type"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "not_one_of"),
        ({"response_format": FORM}, "response_format.json_schema.schema", "required"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex", "wrong_type"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "too_few_entries"),
        (
            {"structured_outputs": {"choice": ["a", ""]}},
            *("structured_outputs.choice", "holds_empty_string"),
        ),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            *("structured_outputs.structural_tag", "not_supported"),
        ),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json", "wrong_type"),
        ({"structured_outputs": {"schema": {}}}, "structured_outputs.schema", "unknown_field"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "several_constraints"),
        ({"guided_json": {}, "regex": "a"}, "regex", "several_constraints"),
        ({"guided_choice": ["x" * 40_000] * 2}, "guided_choice", "too_many_characters"),
        ({"guided_grammar": LONG}, "guided_grammar", "too_many_characters"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "not_supported"),
        ({"grammar": {"type": "regex", "value": "a"}}, "grammar", "wrong_type"),
        ({"choice": "a"}, "choice", "wrong_type"),
        ({"structural_tag": {}}, "structural_tag", "not_supported_use"),
        ({"modalities": ["text", "audio"]}, "modalities", "not_supported"),
        ({"use_beam_search": True}, "use_beam_search", "not_supported"),
        ({"top_logprobs": 2}, "top_logprobs", "needs_field"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "too_small"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "too_large"),
        ({"n": 0}, "n", "too_small"),
        ({"n": 129}, "n", "too_large"),
        ({"best_of": 2}, "best_of", "not_equal"),
        ({"stream": 1}, "stream", "wrong_type"),
        ({"temperature": "hot"}, "temperature", "wrong_type"),
        ({"temperature": True}, "temperature", "wrong_type"),
        ({"temperature": 1e300}, "temperature", "too_large"),
        ({"top_k": -2}, "top_k", "too_small"),
        ({"top_p": 0}, "top_p", "not_above"),
        ({"max_tokens": 1.5}, "max_tokens", "wrong_type"),
        ({"max_tokens": 0}, "max_tokens", "too_small"),
        ({"max_tokens": -1}, "max_tokens", "too_small"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "too_small"),
        ({"min_tokens": -1}, "min_tokens", "too_small"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens", "exceeds_field"),
        ({"min_tokens": 3, "max_completion_tokens": 2}, "min_tokens", "exceeds_field"),
        ({"seed": 1 << 64}, "seed", "too_large"),
        ({"stop": 3}, "stop", "wrong_type"),
        ({"stop": ["a", 3]}, "stop[1]", "wrong_type"),
        ({"stop": ["a", ""]}, "stop[1]", "empty"),
        ({"stop": ["a"] * 17}, "stop", "too_many_entries"),
        ({"stop": "a" * 257}, "stop[0]", "too_many_characters"),
        ({"cache_salt": "a" * 257}, "cache_salt", "too_many_characters"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "not_a_bias"),
        ({"logit_bias": {"1": 10**400}}, "logit_bias", "not_a_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "too_small"),
        ({"suffix": "x"}, "suffix", "not_supported"),
        ({"prompt_embeds": "x"}, "prompt_embeds", "not_supported"),
        ({"functions": "x"}, "functions", "not_supported_use"),
        ({"function_call": "x"}, "function_call", "not_supported_use"),
    ],
    COMPLETIONS: [
        ({"prompt": None, "messages": TURNS}, "prompt", "required"),
        ({"model": "+".join(f"m{n}" for n in range(65))}, "model", "too_many_entries"),
        ({"model": "sql" + " " * 100_000}, "model", "too_many_characters"),
        ({"model": "sql*0." + "0" * 100_000 + "1"}, "model", "too_many_characters"),
        ({"max_tokens": -1}, "max_tokens", "too_small"),
        ({"min_tokens": 17}, "min_tokens", "exceeds_field"),
        ({"logprobs": -1}, "logprobs", "too_small"),
        ({"logprobs": 21}, "logprobs", "too_large"),
        ({"guided_json": {"enum": ["x" * 100] * 700}}, "guided_json", "too_long"),
        ({"response_format": {"type": 3}}, "response_format.type", "not_one_of"),
        (
            {"response_format": {"type": "json_schema", "json_schema": 3}},
            *("response_format.json_schema", "wrong_type"),
        ),
        ({"suffix": "x"}, "suffix", "not_supported"),
        ({"prompt_embeds": "x"}, "prompt_embeds", "not_supported"),
        ({"functions": "x"}, "functions", "not_supported_use"),
        ({"function_call": "x"}, "function_call", "not_supported_use"),
    ],
    RESPONSES: [
        ({"model": ABSENT}, "model", "required"),
        ({"input": ABSENT}, "input", "required"),
        ({"input": None, "messages": TURNS}, "input", "required"),
        ({"input": []}, "input", "too_few_entries"),
        ({"input": 5}, "input", "wrong_type"),
        ({"input": ["a"]}, "input[0]", "wrong_type"),
        (item("tool", content="a"), "input[0].role", "not_one_of"),
        (item(3, content="a"), "input[0].role", "wrong_type"),
        (item(type="item_reference", id="msg_1"), "input[0].type", "nothing_stored"),
        (item(type="web_search_call", id="ws_1"), "input[0].type", "not_one_of"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c"}]},
            "input[0].output",
            "required",
        ),
        (item(content=[{"type": "input_image"}]), "input[0].content[0]", "not_text"),
        (item(), "input[0].content", "required"),
        ({"store": True}, "store", "not_supported"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not_supported"),
        ({"conversation": "conv_1"}, "conversation", "not_supported"),
        ({"background": True}, "background", "not_supported"),
        ({"prompt": {"id": "p"}}, "prompt", "not_supported_use"),
        ({"tools": [{"type": "web_search", "name": "a"}]}, "tools[0].type", "not_one_of"),
        (tool(), "tools[0].name", "required"),
        ({"tool_choice": "required"}, "tool_choice", "needs_field"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "unknown_tool"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.mode", "not_one_of"),
        ({"tool_choice": {"x": "x" * 20_000}}, "tool_choice", "too_long"),
        ({"truncation": "auto"}, "truncation", "not_supported"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "not_one_of"),
        ({"text": {"format": FORM}}, "text.format.schema", "required"),
        ({"text": {"format": FORM | {"schema": {"x": LONG}}}}, "text.format", "too_long"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort", "not_one_of"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata", "too_many_entries"),
        ({"metadata": {"a": "x" * 20_000}}, "metadata", "too_long"),
        ({"user": "x" * 600}, "user", "too_many_characters"),
        ({"n": 2}, "n", "too_large"),
        ({"max_output_tokens": 0}, "max_output_tokens", "too_small"),
        ({"max_tokens": 0}, "max_tokens", "too_small"),
        ({"min_tokens": 3, "max_output_tokens": 2}, "min_tokens", "exceeds_field"),
        ({"top_logprobs": 21}, "top_logprobs", "too_large"),
        ({"temperature": -1}, "temperature", "too_small"),
        ({"temperature": "hot"}, "temperature", "wrong_type"),
    ],
    "/detokenize": [({"tokens": "a"}, "tokens", "wrong_type")],
    LOAD: [
        ({"lora_path": ABSENT}, "lora_path", "required"),
        ({"lora_name": ABSENT, "name": "a"}, "lora_name", "required"),
        ({"task": "sql"}, "task", "wrong_type"),
        ({"load_inplace": True, "pinned": True}, "pinned", "conflicts_with"),
    ],
    UNLOAD: [
        ({"lora_name": ABSENT}, "lora_name", "required"),
        ({"lora_name": 3}, "lora_name", "wrong_type"),
    ],
}


@pytest.fixture
def has_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    knows_tools(monkeypatch)


@pytest.mark.parametrize(
    ("path", "change", "param", "code"),
    [(path, *fault) for path, faults in FAULTS.items() for fault in faults],
)
async def test_an_invalid_field_is_refused(
    path: str, change: dict[str, Any], param: str, code: str, http: HttpHarness, has_tools: None
) -> None:
    refused = await http.refused(path, changed(path, change))
    assert (refused.status, refused.param, refused.code) == (400, param, code)
    assert refused.violations == {param: code}
    assert len(refused.message) < 500
    assert http.engine.requests == []


# Fields of other servers and newer clients, and names similar to a field without being
# misspellings.
OTHERS = (
    *("user", "store", "metadata", "service_tier", "verbosity", "prompt_cache_key", "top_a"),
    *("top_n", "typical_p", "min_length", "rid", "k", "stop_token", "mirostat", "num_ctx"),
    *("samplers", "n_probs", "stop_regex", "separate_reasoning", "provider"),
)


@pytest.mark.parametrize(
    ("path", "body", "sent", "meant"),
    [
        (CHAT, {}, "max_token", "max_tokens"),
        (CHAT, {}, "temprature", "temperature"),
        (CHAT, {}, "steam", "stream"),
        (CHAT, {}, "maxTokens", "max_tokens"),
        (CHAT, {}, "topP", "top_p"),
        (CHAT, {}, "tool", "tools"),
        (CHAT, {}, "adapter", "adapters"),
        (CHAT, {}, "max_new_tokens", "max_tokens"),
        (COMPLETIONS, {}, "stops", "stop"),
        # Short names: swapped letters are a misspelling, another letter is not.
        (COMPLETIONS, {}, "sede", "seed"),
        (COMPLETIONS, {}, "stpo", "stop"),
        (COMPLETIONS, {}, "echoo", "echo"),
        (COMPLETIONS, {}, "respone_format", "response_format"),
        (RESPONSES, {}, "instruction", "instructions"),
        ("/v1/embeddings", {}, "dimension", "dimensions"),
        ("/classify", {}, "time_out", "timeout"),
        ("/tokenize", {}, "return_tokens_strs", "return_token_strs"),
        # Misspelt required fields.
        (CHAT, {"messages": ABSENT}, "message", "messages"),
        (CHAT, {"model": ABSENT}, "modle", "model"),
        (COMPLETIONS, {"prompt": ABSENT}, "promt", "prompt"),
        ("/v1/embeddings", {"input": ABSENT}, "inputs", "input"),
        # Fields of nested objects.
        (CHAT, {"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "json"),
        (COMPLETIONS, {"stream_options": {"include_usag": True}}, "stream_options.include_usag",
         "include_usage"),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schma": {}}}},
         "response_format.json_schema.schma", "schema"),
        (CHAT, {"response_format": {"type": "json_schema", "json_shema": {"schema": {}}}},
         "response_format.json_shema", "json_schema"),
        (CHAT, turn(contnt="a"), "messages[0].contnt", "content"),
        (CHAT, tool(functon={"name": "a"}), "tools[0].functon", "function"),
        (RESPONSES, {"text": {"format": FORM | {"name": "a", "shema": {}}}}, "text.format.shema",
         "schema"),
        (RESPONSES, {"input": [{"rol": "user", "content": "a"}]}, "input[0].rol", "role"),
    ],
)  # fmt: skip
async def test_a_misspelt_field_is_refused_and_the_right_one_named(
    path: str, body: dict[str, Any], sent: str, meant: str, http: HttpHarness
) -> None:
    if "." not in sent:
        body = body | {sent: 0}
    refused = await http.refused(path, changed(path, body))
    assert (refused.status, refused.param) == (400, sent)
    assert refused.violations == {sent: "unknown_field"}
    assert meant in refused.message


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_fields_of_other_servers_are_ignored(path: str, http: HttpHarness) -> None:
    body = VALID[path] | dict.fromkeys(OTHERS, 0.5)
    for more in (
        {},
        {"grammar": "", "json_object": False, "": 1, "_": 1},
        # Both fields were sent, so the unknown one is not a misspelling.
        {"temprature": 2, "temperature": 1, "models": []},
    ):
        answer = await http.post(path, body | more)
        assert answer.status_code == 200, answer.text
        assert http.engine.requests[-1].constraint is None


async def test_fields_of_other_servers_in_nested_objects_are_ignored(http: HttpHarness) -> None:
    turn = {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "name": "b"}
    body = {
        "messages": [{"role": "user", "content": "a", "contnt": 1}, turn | {"audio": None}],
        "structured_outputs": {"regex": "a+", "disable_fallback": True},
        "response_format": {"type": "text", "strict": True},
        "max_new_tokens": None,
        "max_tokens": 2,
    }
    answer = await http.post(CHAT, {"model": "base", **body})
    assert answer.status_code == 200, answer.text
    # Both fields were sent, so the unknown one is not a misspelling.
    answer = await http.post(CHAT, {"model": "base", **body, "max_new_tokens": 1})
    assert answer.status_code == 200, answer.text


async def test_one_answer_reports_every_error(http: HttpHarness) -> None:
    wrong = {"temperature": 3000, "max_tokens": -3, "top_p": 7, "min_token": 1, "stop": 5}
    refused = await http.refused(CHAT, {"model": "base", "messages": TURNS, **wrong})
    assert (refused.status, refused.param) == (400, "min_token")
    assert refused.violations.keys() == wrong.keys()
    for field in wrong:
        assert refused.message.count(f"{field}: ") == 1, field
    refused = await http.refused(LOAD, {})
    assert refused.violations.keys() == {"lora_name", "lora_path"}


async def test_values_of_responses_without_effect_are_accepted(http: HttpHarness) -> None:
    neutral = {"store": False, "previous_response_id": None, "conversation": None}
    neutral |= {"background": False, "prompt": None, "tools": [], "tool_choice": "auto"}
    neutral |= {"truncation": "disabled", "reasoning": {"effort": "low"}, "n": 1}
    for text in ({"format": {"type": "text"}}, {"format": None}):
        answer = await http.post(RESPONSES, VALID[RESPONSES] | neutral | {"text": text})
        assert answer.status_code == 200, answer.text
