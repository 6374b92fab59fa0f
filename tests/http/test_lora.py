"""Adapters managed over HTTP: fields of requests, and rejections."""

from __future__ import annotations

from typing import Any

import pytest
from servers.http_harness import http_harness

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
ADAPTER = {"lora_name": "a", "lora_path": "b"}


async def test_a_task_is_registered() -> None:
    async with http_harness() as server:
        assert (await server.post(LOAD, ADAPTER | {"task": 2})).status_code == 200
        assert server.registry.get("a").facts.digest == "digest of task 2 of b"
        again = ADAPTER | {"task": 3, "load_inplace": True}
        assert (await server.post(LOAD, again)).status_code == 200
        assert server.registry.get("a").facts.digest == "digest of task 3 of b"
        assert server.registry.get("a").generation == 2


async def test_a_repository_may_be_given_as_an_hf_uri() -> None:
    async with http_harness() as server:
        assert (await server.post(LOAD, ADAPTER | {"lora_path": "hf://org/a"})).status_code == 200
        assert server.registry.get("a").facts.digest.endswith("hub:org/a")


@pytest.mark.parametrize(
    ("path", "body", "violations"),
    [
        (LOAD, {}, {"lora_name": "required", "lora_path": "required"}),
        (LOAD, {"lora_name": "a"}, {"lora_path": "required"}),
        (LOAD, {"name": "a", "lora_path": "b"}, {"lora_name": "required"}),
        (LOAD, ADAPTER | {"task": "sql"}, {"task": "wrong_type"}),
        (LOAD, ADAPTER | {"load_inplace": True, "pinned": True}, {"pinned": "conflicts_with"}),
        (UNLOAD, {}, {"lora_name": "required"}),
        (UNLOAD, {"lora_name": 3}, {"lora_name": "wrong_type"}),
    ],
)
async def test_errors_name_missing_and_invalid_fields(
    path: str, body: dict[str, Any], violations: dict[str, str]
) -> None:
    async with http_harness() as server:
        refused = await server.refused(path, body)
        assert (refused.status, refused.violations) == (400, violations)
