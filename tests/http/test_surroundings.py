"""Handling that all HTTP requests share: access, limits, errors, ids, shutdown."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from checkout import ROOT
from servers.fakes import endless
from servers.http_harness import HttpHarness, Refused, http_harness

from turret.server import errors
from turret.server.api.access import MAX_AT_A_TIME, SERVICE_ROLES, TokenTable
from turret.server.basics.codes import Code
from turret.server.config import ListenConfig
from turret.server.http.endpoint import BODY_SECONDS, MAX_BODY_BYTES
from turret.server.http.fields import MAX_PROMPTS
from turret.server.http.refusals import STEPS, TABLE, refusal_of, renamed_path
from turret.server.http.request_models import MAX_ANSWERS
from turret.server.http.routes import ROUTES
from turret.server.words import say

TOKENS = TokenTable(
    [
        ("ask", frozenset({"inference"})),
        ("rule", frozenset({"admin"})),
        ("watch", frozenset({"metrics"})),
    ]
)
PROMPT = {"model": "base", "prompt": "a"}
COMPLETIONS = "/v1/completions"


def test_every_code_has_a_status() -> None:
    assert TABLE.keys() == set(Code)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    for kind in (kind for kind in kinds if issubclass(kind, errors.TurretError)):
        refusal = refusal_of(kind("why"))
        assert refusal.status == TABLE[refusal.code].status
        is_shown = refusal.code is not Code.INTERNAL
        assert refusal.body["error"]["message"].startswith("why") == is_shown
    assert "secret" not in str(refusal_of(ValueError("secret")).body)


@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (errors.QueueFullError("x"), 429, "rate_limit_exceeded", "1"),
        (errors.BudgetExceededError("x"), 429, "budget_exceeded", None),
        (errors.AdapterNotFoundError("x"), 404, "model_not_found", None),
        (errors.AdapterUnloadedError("x"), 409, "adapter_unloaded", None),
        (errors.PromptTooLongError("x"), 400, "context_length_exceeded", None),
        (errors.UnavailableError("x", retry_after_seconds=7.4), 503, "unavailable", "7"),
        (errors.DeadlineExceededError("x"), 504, "deadline_exceeded", None),
    ],
)
async def test_an_error_of_the_engine_becomes_a_status(
    error: errors.TurretError, status: int, code: str, retry: str | None, http: HttpHarness
) -> None:
    http.engine.refuse = error
    refused = await http.refused(COMPLETIONS, PROMPT)
    assert (refused.status, refused.code) == (status, code)
    assert refused.headers.get("retry-after") == retry
    assert refused.headers["x-should-retry"] == ("false" if retry is None else "true")
    counted = refusal_of(error).code.name
    assert await http.sample("turret_requests_total", adapter="base", code=counted) == 1
    assert await http.sample("turret_calls_total", protocol="http", code=counted) == 1


async def test_a_bug_is_reported_only_in_the_log(
    caplog: pytest.LogCaptureFixture, http: HttpHarness
) -> None:
    http.engine.refuse = RuntimeError("secret")
    refused = await http.refused(COMPLETIONS, PROMPT)
    assert (refused.status, refused.code) == (500, "internal")
    assert "secret" not in refused.message
    assert any(r.exc_info and "secret" in str(r.exc_info[1]) for r in caplog.records)


async def test_errors_use_the_field_names_of_the_client(http: HttpHarness) -> None:
    body = {"temperature": -3, "stop": [""], "logprobs": 21, "model": "base", "prompt": "a"}
    refused = await http.refused(COMPLETIONS, body)
    assert (refused.status, refused.kind) == (400, "invalid_request_error")
    assert refused.violations == {
        "temperature": "too_small",
        "stop[0]": "empty",
        "logprobs": "too_large",
    }
    assert renamed_path("stop.stop_strings[2]", {"stop.": "", "stop.stop_strings": "stop"}) == (
        "stop[2]"
    )


async def test_a_role_gives_access_only_to_its_paths() -> None:
    asks: list[tuple[str, Any]] = [
        (COMPLETIONS, PROMPT),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "a"}),
        ("/metrics", None),
        ("/v1/models", None),
        ("/health", None),
    ]
    statuses = {
        "ask": [200, 403, 403, 200, 200],
        "rule": [403, 200, 403, 403, 200],
        "watch": [403, 403, 200, 403, 200],
        "other": [401, 401, 401, 401, 200],
        "": [401, 401, 401, 401, 200],
    }
    async with http_harness(tokens=TOKENS) as server:
        for token, expected in statuses.items():
            headers = {"authorization": f"Bearer {token}"} if token else {}
            seen = []
            for path, body in asks:
                method = "GET" if body is None else "POST"
                answer = await server.client.request(method, path, json=body, headers=headers)
                seen.append(answer.status_code)
                if answer.status_code == 401:
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert Refused.of(answer).code == "invalid_api_key"
            assert seen == expected, token


@pytest.mark.parametrize("sent", [None, "Bearer other", "ask", "Basic ask", "Bearer"])
async def test_a_missing_token_is_reported_with_how_to_send_one(sent: str | None) -> None:
    async with http_harness(tokens=TOKENS) as server:
        headers = {} if sent is None else {"authorization": sent}
        refused = await server.refused(COMPLETIONS, PROMPT, headers)
        assert (refused.status, refused.code) == (401, "invalid_api_key")
        assert refused.message.endswith(STEPS["UNAUTHENTICATED"])


async def test_no_byte_of_an_unauthorised_request_is_read() -> None:
    async with http_harness(tokens=TOKENS) as server:
        answer = await server.client.post(COMPLETIONS, content=b"no json")
        assert answer.status_code == 401


async def test_a_request_has_the_id_that_was_sent(
    caplog: pytest.LogCaptureFixture, http: HttpHarness
) -> None:
    with caplog.at_level(logging.INFO, "turret"):
        answer = await http.post(COMPLETIONS, PROMPT, {"x-request-id": "r-1"})
        await http.settle()
    assert answer.headers["x-request-id"] == "r-1"
    assert answer.json()["id"] == "cmpl-r-1"
    assert http.engine.requests[0].request_id == "r-1"
    made = (await http.post(COMPLETIONS, PROMPT)).headers["x-request-id"]
    assert len(made) == 32
    refused = await http.refused(COMPLETIONS, {}, {"x-request-id": "r-2"})
    assert refused.headers["x-request-id"] == "r-2"
    (line,) = [r for r in caplog.records if r.message == "call finished"]
    fields = line.__dict__["fields"]
    assert (fields["method"], fields["code"]) == ("POST /v1/completions", "OK")


async def test_every_answer_has_an_id_and_keeps_a_valid_one_of_the_client() -> None:
    listen = ListenConfig(http_address="127.0.0.1:0", http_cors_origin=("https://a.example",))
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with http_harness(listen=listen) as server:
        for method, path, headers, status in (
            ("GET", "/v1/nix", {}, 404),
            ("OPTIONS", COMPLETIONS, {}, 405),
            ("DELETE", COMPLETIONS, {}, 405),
            ("OPTIONS", COMPLETIONS, preflight, 200),
            ("GET", "/health", {"host": "evil.example"}, 421),
            ("GET", "/health", {}, 200),
        ):
            sent = {**headers, "x-request-id": "i" * 128}
            answer = await server.client.request(method, path, headers=sent)
            assert (answer.status_code, answer.headers["x-request-id"]) == (status, "i" * 128)
            for unusable in ("i" * 129, "", "\xe9"):
                encoded = [*headers.items(), ("x-request-id", unusable.encode("latin-1"))]
                answer = await server.client.request(method, path, headers=encoded)
                assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"]), unusable


async def test_a_body_has_limits(http: HttpHarness) -> None:
    send = http.client.post
    json_type = {"content-type": "application/json"}

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(MAX_BODY_BYTES // 65536 + 1):
            yield b" " * 65536

    contents: list[Any] = [b" " * (MAX_BODY_BYTES + 1), parts()]
    for content in contents:
        refused = Refused.of(await send(COMPLETIONS, content=content, headers=json_type))
        assert (refused.status, refused.code) == (413, "request_too_large")
    text = {"content-type": "text/plain"}
    refused = Refused.of(await send(COMPLETIONS, content=json.dumps(PROMPT), headers=text))
    assert (refused.status, refused.code) == (415, "unsupported_media_type")
    assert http.engine.requests == []


async def test_unknown_paths_and_methods_get_the_same_form_of_error() -> None:
    async with http_harness() as server:
        refused = await server.refused("/v1/nothing", {})
        assert (refused.status, refused.code) == (404, "unknown_url")
        answer = await server.client.get(COMPLETIONS)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert answer.json()["error"]["code"] == "unknown_url"
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            assert (await server.refused(path, {})).status == 400
    apart = ListenConfig(http_address="127.0.0.1:0", admin_address="127.0.0.1:0")
    async with http_harness(listen=apart) as server:
        body = {"lora_name": "a", "lora_path": "a"}
        for path in ("/v1/load_lora_adapter", "/v1/pin_lora_adapter"):
            refused = await server.refused(path, body)
            assert (refused.status, refused.code) == (404, "unknown_url")


async def test_a_closed_gate_is_reported_by_calls_and_health() -> None:
    async with http_harness(serving=False) as server:
        answer = await server.client.get("/health")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        for path in ("/v1/chat/completions", COMPLETIONS, "/tokenize", "/detokenize"):
            refused = await server.refused(path, PROMPT)
            assert (refused.status, refused.code) == (503, "server_starting"), path


async def test_a_page_of_another_origin_needs_permission() -> None:
    asked = {
        "origin": "https://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    async with http_harness(tokens=TOKENS) as server:
        answer = await server.client.options(COMPLETIONS, headers=asked)
        assert "access-control-allow-origin" not in answer.headers
    listen = ListenConfig(http_address="127.0.0.1:0", http_cors_origin=("https://a.example",))
    async with http_harness(tokens=TOKENS, listen=listen) as server:
        answer = await server.client.options(COMPLETIONS, headers=asked)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        other = asked | {"origin": "https://b.example"}
        answer = await server.client.options(COMPLETIONS, headers=other)
        assert "access-control-allow-origin" not in answer.headers
        sent = {"origin": "https://a.example", "authorization": "Bearer ask"}
        answer = await server.post(COMPLETIONS, PROMPT, sent)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"


async def test_a_timeout_is_the_deadline_of_the_request(http: HttpHarness) -> None:
    before = asyncio.get_running_loop().time()
    await http.post(COMPLETIONS, PROMPT | {"timeout": 2.5})
    (request,) = http.engine.requests
    assert request.deadline is not None
    assert 2.4 < request.deadline - before < 2.5 + 5
    for bad in (0, -1, 1e300, "1"):
        refused = await http.refused(COMPLETIONS, PROMPT | {"timeout": bad})
        assert (refused.status, refused.param) == (400, "timeout")


def test_the_page_names_every_path_field_and_status() -> None:
    page = (ROOT / "docs" / "openai.md").read_text()
    for route in ROUTES:
        path = route.path.replace("{model:path}", "{model}")
        if path in ("/console/{file}", "/docs/{file}"):
            # The page loads its own files.
            continue
        assert f"{route.method} {path}`" in page, path
        role = SERVICE_ROLES.get(route.service, "none")
        (line,) = [line for line in page.splitlines() if f"{route.method} {path}`" in line]
        assert line.split("|")[2].strip() == role, path
    for row in TABLE.values():
        if row.status not in (200, 499):
            assert f"| {row.status} | `{row.kind}` |" in page, row
    assert f"`n` is at most {MAX_ANSWERS}" in page
    assert f"a list of prompts at most {MAX_PROMPTS} long" in page.replace("\n", " ")
    assert f"{MAX_AT_A_TIME} at a time" in page
    assert (MAX_BODY_BYTES, BODY_SECONDS) == (4 << 20, 60)


async def test_a_shutdown_waits_briefly_and_then_ends_running_requests(http: HttpHarness) -> None:
    http.engine.script = endless
    asking = asyncio.ensure_future(http.post(COMPLETIONS, PROMPT))
    await asyncio.wait_for(http.engine.submitted.wait(), 10)
    await asyncio.wait_for(http.server.stop(0.1), 10)
    assert http.engine.streams[0].cancelled.is_set()
    assert await http.sample("turret_calls_total", protocol="http", code="CANCELLED") == 1
    refused = Refused.of(await asking)
    assert (refused.status, refused.code) == (503, "unavailable")


async def test_a_trailing_slash_is_ignored(http: HttpHarness) -> None:
    assert (
        await http.post("/v1/load_lora_adapter/", {"lora_name": "a", "lora_path": "b"})
    ).status_code == 200
    for path in ("/v1/models/", "/health/"):
        plain = await http.client.get(path.rstrip("/"))
        answer = await http.client.get(path)
        assert (answer.status_code, answer.json()) == (200, plain.json())
    assert (await http.post("/v1/completions/", {})).status_code == 400
    answer = await http.post("/v1/nix/", {})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/v1/chat/compeltions", "/v1/chat/completions"),
        ("/chat/completons", "/v1/chat/completions"),
        ("/V1/chat/completions", "/v1/chat/completions"),
        ("/v1/responces", "/v1/responses"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/completions", COMPLETIONS),
        ("/v1/model", "/v1/models"),
        ("/v1/classify", "/classify"),
        ("/v1/load_lora_adaptor", "/v1/load_lora_adapter"),
        # Paths of other servers.
        *((path, "") for path in ("/v1/threads", "/v1/moderations", "/v1/rerank", "/api/chat")),
        ("/v1/" + "x" * 50, ""),
    ],
)
async def test_the_closest_path_is_suggested(path: str, meant: str, http: HttpHarness) -> None:
    refused = await http.refused(path, {})
    assert (refused.status, refused.code) == (404, "unknown_url")
    text = say("UNKNOWN_URL", method="POST", path=path)
    if meant:
        text = say("UNKNOWN_URL", method="POST", path=path, closest=meant)
    assert refused.message == text
