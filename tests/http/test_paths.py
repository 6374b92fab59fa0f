"""Served and unknown paths."""

from __future__ import annotations

import pytest
from servers.http_harness import http_harness

from turret.server.words import say


async def test_a_trailing_slash_is_ignored() -> None:
    async with http_harness() as server:
        assert (
            await server.post("/v1/load_lora_adapter/", {"lora_name": "a", "lora_path": "b"})
        ).status_code == 200
        for path in ("/v1/models/", "/health/"):
            plain = await server.client.get(path.rstrip("/"))
            answer = await server.client.get(path)
            assert (answer.status_code, answer.json()) == (200, plain.json())
        assert (await server.post("/v1/completions/", {})).status_code == 400
        answer = await server.post("/v1/nix/", {})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/v1/chat/compeltions", "/v1/chat/completions"),
        ("/chat/completons", "/v1/chat/completions"),
        ("/V1/chat/completions", "/v1/chat/completions"),
        ("/v1/responces", "/v1/responses"),
        ("/v1/load_lora_adaptor", "/v1/load_lora_adapter"),
        # Paths of other servers.
        *((path, "") for path in ("/v1/threads", "/v1/moderations", "/v1/rerank", "/api/chat")),
        ("/v1/" + "x" * 50, ""),
    ],
)
async def test_the_closest_path_is_suggested(path: str, meant: str) -> None:
    async with http_harness() as server:
        refused = await server.refused(path, {})
        assert (refused.status, refused.code) == (404, "unknown_url")
        text = say("UNKNOWN_URL", method="POST", path=path)
        if meant:
            text = say("UNKNOWN_URL", method="POST", path=path, closest=meant)
        assert refused.message == text
