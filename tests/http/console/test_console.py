"""The parts of the console: its files, its state, pins, and access."""

from __future__ import annotations

import re
from typing import Any

import pytest
from checkout import ROOT
from servers.fakes import failing
from servers.http_harness import HttpHarness, Refused, http_harness
from servers.rpc_harness import tokens_of

from turret.server.adapters.adapter import AdapterRef
from turret.server.api.access import TokenTable
from turret.server.api.call import MAX_FAILURES, MAX_MESSAGE_CHARS
from turret.server.basics.work import Cancellation
from turret.server.config import ListenConfig
from turret.server.errors import ResourceError
from turret.server.http.console import MAX_ADAPTERS

STATIC = ROOT / "server" / "http" / "static"
ASK: Any = {"model": "base", "prompt": "a"}
ROLES = ("inference", "admin", "metrics")


async def state_of(http: HttpHarness, token: str = "", find: str = "") -> dict[str, Any]:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    answer = await http.client.get("/console/state", params={"find": find}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_the_page_loads_only_its_own_files_and_scripts(http: HttpHarness) -> None:
    page = await http.client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = re.findall(r'(?:href|src)="([^"#]+)"', page.text)
    assert len(named) >= 3
    for name in named:
        assert name.startswith("console/")
        found = await http.client.get(f"/{name}")
        assert found.status_code == 200
        assert found.content == (STATIC / name.removeprefix("console/")).read_bytes()
        policy = found.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert found.headers["x-content-type-options"] == "nosniff"
        tag = {"if-none-match": found.headers["etag"]}
        again = await http.client.get(f"/{name}", headers=tag)
        assert (again.status_code, again.content) == (304, b"")
    for path in ("nothing.js", "page.py", "%2e%2e%2fpage.py", "..%5cpage.py"):
        lost = await http.client.get(f"/console/{path}")
        assert (lost.status_code, lost.json()["error"]["code"]) == (404, "unknown_url")


def test_no_script_inserts_markup_or_contacts_another_server() -> None:
    sources = {path.name: path.read_text() for path in STATIC.iterdir()}
    assert len(sources) > 5
    for name, text in sources.items():
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in text, name
        urls = set(re.findall(r"https?://[^\s\"']+", text))
        assert urls <= {"http://www.w3.org/2000/svg"}, name
        assert len(text.splitlines()) <= 400, name


async def test_without_configured_tokens_everyone_sees_everything(http: HttpHarness) -> None:
    http.registry.load("cold", "cold")
    http.registry.load("sql", "sql", pinned=True)
    http.metrics.adapter_registered("sql")
    http.metrics.first_token(0.5, ["sql"])
    http.metrics.inter_token(0.25, ["sql"])
    http.metrics.inter_token(0.25)
    for phase, seconds, num_tokens in (("decode", 0.5, 1), ("mixed", 1.5, 9)):
        http.metrics.step_seconds.labels(phase).observe(seconds)
        http.metrics.step_tokens.observe(num_tokens)
    http.metrics.sequences(waiting=1, running=2)
    http.metrics.kv_blocks(free=3, used=4, cached=1)
    http.metrics.request_finished(["sql"], "OK")
    http.metrics.request_finished(["sql"], "INVALID_ARGUMENT")
    http.metrics.adapter_bytes.labels("device").set(7)
    state = await state_of(http)
    assert state["roles"] == sorted((*ROLES, "training"))
    assert state["model"]["name"] == "fake"
    assert state["failures"] == []
    adapters = state["adapters"]
    assert (adapters["matching"], adapters["total"]) == (2, 2)
    cold, sql = adapters["shown"]
    assert (cold["name"], cold["residency"], cold["pinned"]) == ("cold", "disk", False)
    assert (sql["ranks"], sql["method"], sql["pinned"]) == ([4, 8], "lora", True)
    figures = state["figures"]
    assert figures["first_token"] == {"sum": 0.5, "count": 1}
    assert figures["inter_token"] == {"sum": 0.5, "count": 2}
    assert figures["step"] == {"sum": 2.0, "count": 2}
    assert figures["sequences"] == {"waiting": 1, "running": 2}
    assert figures["kv_blocks"] == {"free": 3, "used": 4, "cached": 1}
    assert figures["adapter_bytes"] == {"device": 7}
    assert figures["traffic"]["sql"] == {"requests": 2, "errors": 1, "tokens": 2}
    assert figures["traffic"]["base"]["tokens"] == 1


async def test_each_role_sees_what_other_paths_show_it() -> None:
    tokens = TokenTable([(role, frozenset({role})) for role in ROLES])
    async with http_harness(tokens=tokens) as http:
        http.registry.load("sql", "sql")
        for sent in ({}, {"authorization": "Bearer wrong"}):
            refused = Refused.of(await http.client.get("/console/state", headers=sent))
            assert (refused.status, refused.code) == (401, "invalid_api_key")
        assert (await http.client.get("/")).status_code == 200
        asks, rules, watches = [await state_of(http, role) for role in ROLES]
    models = {"name", "method", "generation", "residency"}
    assert asks["adapters"]["shown"][0].keys() == models
    assert (asks["figures"], asks["failures"]) == (None, None)
    assert rules["adapters"]["shown"][0].keys() > models
    assert (rules["figures"], rules["failures"], rules["model"]) == (None, [], None)
    assert (watches["adapters"], watches["failures"], watches["model"]) == (None, None, None)
    assert watches["figures"]["sequences"] == {}


async def test_a_merge_is_shown_only_to_admins() -> None:
    tokens = TokenTable([(role, frozenset({role})) for role in ROLES])
    async with http_harness(tokens=tokens) as http:
        assert (await state_of(http, "admin"))["merged"] is None
        refs = (AdapterRef(name="sql"), AdapterRef(name="json", weight=0.5))
        http.merger.merge(refs, "BF16", Cancellation())
        asks, rules, watches = [(await state_of(http, role))["merged"] for role in ROLES]
        http.merger.unmerge(Cancellation())
        assert (await state_of(http, "admin"))["merged"] is None
    assert rules == {"mix": "sql@3=1, json@3=0.5", "precision": "bf16", "base_generation": 2}
    assert asks is watches is None


async def test_administration_is_served_only_at_the_admin_address() -> None:
    listen = ListenConfig(http_address="127.0.0.1:0", admin_address="127.0.0.1:1")
    async with http_harness(listen=listen) as http:
        http.registry.load("sql", "sql")
        state = await state_of(http)
        for verb in ("pin", "unpin"):
            answer = await http.post(f"/v1/{verb}_lora_adapter", {"lora_name": "sql"})
            assert answer.status_code == 404
    assert state["manages_adapters"] is False
    assert "pinned" not in state["adapters"]["shown"][0]
    assert state["failures"] is None


async def test_a_thousand_adapters_are_searched_on_the_server(http: HttpHarness) -> None:
    for number in range(1000):
        http.registry.load(f"a{number:04}", "x")
    everything = (await state_of(http))["adapters"]
    found = (await state_of(http, find=" A099 "))["adapters"]
    nothing = (await state_of(http, find="<script>"))["adapters"]
    assert (len(everything["shown"]), everything["matching"]) == (MAX_ADAPTERS, 1000)
    assert [row["name"] for row in found["shown"]] == [f"a099{n}" for n in range(10)]
    assert (nothing["matching"], nothing["total"]) == (0, 1000)


async def test_the_latest_failures_are_listed_with_their_ids(http: HttpHarness) -> None:
    await http.post("/v1/completions", {**ASK, "temperature": -1}, {"x-request-id": "mine"})
    http.engine.script = failing(ResourceError("x" * 9000))
    await http.post("/v1/completions", {**ASK, "model": "sql"})
    http.engine.script = failing(RuntimeError("a secret"))
    await http.post("/v1/completions", ASK)
    await http.settle()
    bug, full, wrong = (await state_of(http))["failures"]
    assert (wrong["request_id"], wrong["reason"]) == ("mine", "INVALID_REQUEST")
    assert wrong["message"].startswith("temperature: ")
    assert (wrong["method"], wrong["protocol"]) == ("POST /v1/completions", "http")
    assert (full["code"], full["adapters"]) == ("RESOURCE_EXHAUSTED", ["sql"])
    assert len(full["message"]) == MAX_MESSAGE_CHARS
    assert (bug["code"], bug["reason"]) == ("INTERNAL", "INTERNAL")
    for _ in range(MAX_FAILURES + 5):
        await http.post("/v1/completions", {**ASK, "temperature": -1})
    await http.settle()
    assert len((await state_of(http))["failures"]) == MAX_FAILURES


async def test_a_rejected_view_of_the_console_is_not_listed_as_a_failure() -> None:
    """Otherwise, a page that is open on a stopping server would displace relevant errors."""
    async with http_harness(serving=False) as http:
        refused = Refused.of(await http.client.get("/console/state"))
        assert refused.status == 503
        await http.settle()
        assert not http.services.failures


async def test_adapters_are_pinned_and_unpinned(http: HttpHarness) -> None:
    http.registry.load("sql", "sql")
    said = await http.post("/v1/pin_lora_adapter", {"lora_name": "sql"})
    assert said.text == "Success: LoRA adapter 'sql' pinned."
    assert http.registry.get("sql").pinned
    await http.post("/v1/unpin_lora_adapter", {"lora_name": "sql"})
    assert not http.registry.get("sql").pinned
    for verb in ("pin", "unpin", "unload"):
        path = f"/v1/{verb}_lora_adapter"
        missing = await http.refused(path, {"lora_name": "nothing"})
        assert (missing.status, missing.param) == (404, "lora_name")
    wrong = await http.refused("/v1/unpin_lora_adapter", {"lora_name": "No Name"})
    assert (wrong.status, wrong.param) == (400, "lora_name")


NAMES = ("localhost", "LOCALHOST.", "a.localhost:80", "127.0.0.1:8000", "[::1]:8000", "10.0.0.7")
OTHERS = ("evil.example", "127.0.0.1.evil.example:80", "localhost.evil.example", "[evil]", "1.2.3")


@pytest.mark.parametrize(
    "path", ["/", "/v1/models", "/console/state", "/nothing", "/docs", "/openapi.json"]
)
async def test_a_rebound_host_name_is_rejected(path: str, http: HttpHarness) -> None:
    for name in NAMES:
        answer = await http.client.get(path, headers={"host": name})
        assert answer.status_code != 421, name
    for name in OTHERS:
        refused = Refused.of(await http.client.get(path, headers={"host": name}))
        assert (refused.status, refused.code) == (421, "unknown_host"), name


async def test_configured_host_names_are_accepted() -> None:
    listen = ListenConfig(http_address="127.0.0.1:0", http_allowed_host=("turret.example",))
    for tokens in (None, tokens_of("a")):
        async with http_harness(listen=listen, tokens=tokens) as http:
            for name, status in (("Turret.example:1", 200), ("evil.example", 421)):
                answer = await http.client.get("/health", headers={"host": name})
                assert answer.status_code == status
    listen = ListenConfig(http_address="127.0.0.1:0", http_allowed_host=("*",))
    async with http_harness(listen=listen) as http:
        answer = await http.client.get("/health", headers={"host": "evil.example"})
        assert answer.status_code == 200


async def test_with_tokens_any_host_name_is_accepted() -> None:
    """A page under another name has no token, so names in a cluster need not be configured."""
    async with http_harness(tokens=tokens_of("a")) as http:
        answer = await http.client.get("/v1/models", headers={"host": "turret.svc"})
        assert answer.status_code == 401


def test_allowed_hosts_must_be_names() -> None:
    for wrong in ("https://a", "a:80", "", "-a"):
        with pytest.raises(ValueError, match="http_allowed_host"):
            ListenConfig(http_address="127.0.0.1:0", http_allowed_host=(wrong,))
    with pytest.raises(ValueError, match="http_allowed_host"):
        ListenConfig(http_allowed_host=("a",))
