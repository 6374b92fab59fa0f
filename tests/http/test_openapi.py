"""The OpenAPI document matches the server's behaviour, and its page works offline."""

from __future__ import annotations

import re
from typing import Any

import httpx2
import jsonschema
from servers.http_harness import TURNS, VALID, HttpHarness, Refused, http_harness
from servers.rpc_harness import tokens_of

# A request for each documented path that has a body, in the order of an adapter's life.
BODIES = {
    **VALID,
    "/v1/chat/completions": {"model": "sql", "messages": TURNS, "logprobs": True},
    "/v1/completions": {"model": "base", "prompt": ["a", [1, 2]], "logprobs": 1, "n": 2},
    "/v1/responses": {"model": "base", "input": TURNS},
    "/v1/messages": {"model": "base", "max_tokens": 4, "messages": TURNS, "system": "a"},
}
ARCHIVE_PATH = "/v1/upload_lora_adapter"


def check(answer: httpx2.Response, operation: dict[str, Any], document: dict[str, Any]) -> None:
    """Compare an answer with the operation's schema for its status."""
    kind = answer.headers["content-type"].partition(";")[0]
    schema = operation["responses"][str(answer.status_code)]["content"][kind]["schema"]
    if kind == "application/json":
        jsonschema.validate(answer.json(), {**schema, "components": document["components"]})


async def test_each_answer_and_error_has_the_documented_form(http: HttpHarness) -> None:
    document = (await http.client.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    asked = set()
    # The order is that of an adapter's life cycle.
    for path in (*BODIES, *document["paths"]):
        for method, operation in document["paths"][path].items():
            if (path, method) in asked:
                continue
            asked.add((path, method))
            url = path.replace("{model}", "base")
            if method == "get":
                answer = await http.client.get(url)
            elif path == ARCHIVE_PATH:
                # The fake registry takes no uploads, but a refusal is documented as well.
                kind = {"content-type": "application/x-tar"}
                answer = await http.client.post(f"{url}?lora_name=A+", headers=kind)
                assert answer.status_code == 400
                check(answer, operation, document)
                continue
            else:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                whole = {**schema, "components": document["components"]}
                jsonschema.validate(BODIES[path], whole)
                answer = await http.post(url, BODIES[path])
                refused = await http.post(url, {"lora_name": 3, "model": 3})
                assert refused.status_code == 400
                check(refused, operation, document)
            assert answer.status_code == 200, (path, answer.text)
            check(answer, operation, document)
    assert len(asked) == 22


async def test_unsupported_fields_are_marked(http: HttpHarness) -> None:
    document = (await http.client.get("/openapi.json")).json()
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    refused = {name for name, field in fields.items() if field.get("deprecated")}
    assert {"audio", "functions", "prompt_logprobs", "use_beam_search"} <= refused
    assert not refused & {"messages", "model", "tools", "temperature"}
    assert fields["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 100}


async def test_operations_that_need_a_role_document_their_token() -> None:
    async with http_harness(tokens=tokens_of("a")) as server:
        document = (await server.client.get("/openapi.json")).json()
        assert document["paths"]["/v1/models"]["get"]["security"] == [{"token": []}]
        assert "security" not in document["paths"]["/health"]["get"]
        assert (await server.client.get("/docs")).status_code == 200
    async with http_harness() as server:
        document = (await server.client.get("/openapi.json")).json()
        assert "securitySchemes" not in document["components"]


async def test_the_page_loads_nothing_from_elsewhere(http: HttpHarness) -> None:
    page = await http.client.get("/docs")
    assert "http:" not in page.text
    assert "https:" not in page.text
    assert "script-src 'self'" in page.headers["content-security-policy"]
    for name in ("swagger-ui.css", "swagger-ui-bundle.js", "start.js"):
        assert f"/docs/{name}" in page.text
        assert (await http.client.get(f"/docs/{name}")).status_code == 200
    for name in ("redoc.standalone.js", "..%2fcore.py"):
        refused = Refused.of(await http.client.get(f"/docs/{name}"))
        assert (refused.status, refused.code) == (404, "unknown_url")


async def test_bounds_of_numbers_are_those_of_json_schema(http: HttpHarness) -> None:
    answer = await http.client.get("/openapi.json")
    fields = answer.json()["components"]["schemas"]["ChatRequest"]["properties"]
    number = next(each for each in fields["top_logprobs"]["anyOf"] if each["type"] == "integer")
    assert (number["minimum"], number["maximum"]) == (0, 20)
    # Pydantic's own words, which no client knows.
    assert not re.search('"(ge|gt|le|lt)":', answer.text)
