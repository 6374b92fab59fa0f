"""Which paths are served."""

from __future__ import annotations

from servers.http_harness import http_harness


async def test_a_slash_at_the_end_of_a_path_makes_no_difference() -> None:
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
