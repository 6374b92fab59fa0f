"""The adapters of a request, by model or by a list, and rejections of both."""

from __future__ import annotations

from typing import Any

import pytest
from servers.http_harness import TURNS, VALID, HttpHarness, Refused

from turret.server.adapters.adapter import AdapterRef
from turret.server.engine.scheduling.request import Request
from turret.server.errors import AdapterNotFoundError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}


async def asked(server: HttpHarness, **body: Any) -> Request:
    """Send a conversation, which must be answered; returns the engine's request."""
    answer = await server.post(CHAT, {"messages": TURNS, **body})
    assert answer.status_code == 200, answer.text
    return server.engine.requests[-1]


@pytest.mark.parametrize(
    ("model", "refs"),
    [
        ("base", ()),
        ("fake", ()),
        ("sql", (("sql", 1.0),)),
        ("fake:sql", (("sql", 1.0),)),
        ("base:sql*0.5", (("sql", 0.5),)),
        ("sql+json*-0.5", (("sql", 1.0), ("json", -0.5))),
        ("a*.5 + b*2.", (("a", 0.5), ("b", 2.0))),
        ("fake:base", (("base", 1.0),)),
    ],
)
async def test_a_model_is_a_mix(
    model: str, refs: tuple[tuple[str, float], ...], http: HttpHarness
) -> None:
    request = await asked(http, model=model)
    assert request.adapters == tuple(AdapterRef(name=n, weight=w) for n, w in refs)


async def test_a_model_may_be_a_generation(http: HttpHarness) -> None:
    request = await asked(http, model="fake:sql@2+json@7*-0.5")
    assert request.adapters == (
        AdapterRef(name="sql", generation=2),
        AdapterRef(name="json", generation=7, weight=-0.5),
    )
    for model in ("sql@", "sql@x", "sql@-1", "@1", "sql@18446744073709551616"):
        refused = await http.refused(CHAT, {"messages": TURNS, "model": model})
        assert (refused.status, refused.code) == (404, "model_not_found"), model


async def test_adapters_may_be_given_as_objects(http: HttpHarness) -> None:
    adapters = [{"name": "sql"}, {"name": "json", "weight": -0.5, "generation": 2}]
    request = await asked(http, model="fake", adapters=adapters)
    assert request.adapters == (
        AdapterRef(name="sql"),
        AdapterRef(name="json", weight=-0.5, generation=2),
    )
    for model in ("", "sql+", "+sql", "+*2", "other:sql", "x" * 999):
        refused = await http.refused(CHAT, {"messages": TURNS, "model": model})
        assert (refused.status, refused.code) == (404, "model_not_found"), model
        assert refused.param == "model"


async def test_errors_in_a_mix_are_reported_for_the_field_model(http: HttpHarness) -> None:
    for model, code in (
        ("sql*x", "not_a_weight"),
        ("sql*", "not_a_weight"),
        ("sql*1e1", "not_a_weight"),
        ("a*1*2", "not_a_weight"),
        ("sql+json+sql", "duplicate"),
    ):
        refused = await http.refused(CHAT, {"messages": TURNS, "model": model})
        assert (refused.status, refused.param, refused.code) == (400, "model", code)
        looked_up = Refused.of(await http.client.get(f"/v1/models/{model}"))
        assert (looked_up.status, looked_up.param, looked_up.code) == (400, "model", code)
    both = await http.refused(CHAT, {"messages": TURNS, "model": "a*x", "temperature": "hot"})
    assert both.violations == {"model": "not_a_weight", "temperature": "wrong_type"}


@pytest.mark.parametrize(
    ("model", "meant"),
    [("FAKE", "fake"), ("sql=2", "sql+json*-0.5")],
)
async def test_a_model_is_suggested_for_an_unknown_one(
    model: str, meant: str, http: HttpHarness
) -> None:
    asked_for = await http.refused(CHAT, {"messages": TURNS, "model": model})
    looked_up = Refused.of(await http.client.get(f"/v1/models/{model}"))
    for refused in (asked_for, looked_up):
        assert (refused.status, refused.code) == (404, "model_not_found")
        assert meant in refused.message


async def test_a_missing_adapter_is_reported_for_the_field_that_names_it(http: HttpHarness) -> None:
    typed = {"model": "base", "adapters": [{"name": "sql", "generation": 9}]}
    http.engine.refuse = AdapterNotFoundError("adapter 'sql' has no generation 9")
    paths = (CHAT, COMPLETIONS, "/v1/responses", "/v1/embeddings", "/classify")
    bodies = [(path, VALID[path]) for path in paths] + [("/v1/embeddings", {"messages": TURNS})]
    for path, body in bodies:
        assert (await http.refused(path, body | typed)).param == "adapters", path
        assert (await http.refused(path, body | {"model": "sql"})).param == "model", path


async def test_adapters_of_another_kind_are_reported_for_their_field(http: HttpHarness) -> None:
    for path in (CHAT, COMPLETIONS, "/v1/responses", "/v1/embeddings", "/classify", "/tokenize"):
        for adapters in ("sql", {"sql": 1}, 0, False):
            refused = await http.refused(path, VALID[path] | {"adapters": adapters})
            assert (refused.status, refused.param) == (400, "adapters"), path
            assert refused.code == "wrong_type"


async def test_a_refused_request_is_counted_for_the_adapters_that_it_names(
    http: HttpHarness,
) -> None:
    http.metrics.adapter_registered("sql")
    labels = {"code": "INVALID_ARGUMENT"}
    for path, body in (
        (CHAT, {"messages": TURNS, "temperature": -1}),
        (CHAT, {"messages": TURNS, "temperature": "hot"}),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}),
    ):
        assert (await http.refused(path, {"model": "sql"} | body)).status == 400
    assert await http.sample("turret_requests_total", adapter="sql", **labels) == 3
    # The adapter of this request is unknown.
    answer = await http.client.post(CHAT, content="{", headers=JSON)
    assert answer.status_code == 400
    assert await http.sample("turret_calls_total", protocol="http", **labels) == 4
    assert await http.sample("turret_requests_total", adapter="base", **labels) is None


async def test_a_mix_is_not_a_listed_model(http: HttpHarness) -> None:
    for name in ("sql+json*-0.5", "base:sql*2"):
        refused = Refused.of(await http.client.get(f"/v1/models/{name}"))
        assert (refused.status, refused.code) == (404, "model_not_found")
        assert "/sql " in refused.message
