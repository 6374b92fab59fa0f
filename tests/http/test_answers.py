"""Chat and completions over HTTP: the client's answers."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from servers.fakes import FakeEngine, endless, failing, finish
from servers.http_harness import http_harness

from turret.server.api.access import MAX_AT_A_TIME
from turret.server.engine.scheduling.request import (
    FinishReason,
    Output,
    Request,
    TokenLogprob,
    TopLogprob,
)
from turret.server.errors import AdapterNotFoundError, QueueFullError
from turret.server.http import endpoint

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TURNS = [{"role": "user", "content": "hi"}]


async def test_a_whole_chat_answer() -> None:
    async with http_harness() as server:
        body = {"model": "sql", "messages": TURNS, "logprobs": True}
        answer = (await server.post(CHAT, body)).json()
        assert (answer["object"], answer["model"]) == ("chat.completion", "sql")
        (choice,) = answer["choices"]
        assert choice["message"] == {"role": "assistant", "content": "Hi", "refusal": None}
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
        tokens = choice["logprobs"]["content"]
        assert [(t["token"], t["logprob"], t["bytes"]) for t in tokens] == [
            ("H", -0.5, [72]),
            ("i", -0.25, [105]),
        ]
        assert answer["usage"] == {
            "prompt_tokens": 8,
            "completion_tokens": 2,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 1},
        }
        assert [use["name"] for use in answer["adapters_used"]] == ["sql"]
        assert await server.sample("turret_requests_total", adapter="other", code="OK") == 1
        assert await server.sample("turret_prompt_tokens_total", adapter="other") == 8


async def test_a_streamed_chat() -> None:
    async with http_harness() as server:
        body = {"model": "base", "messages": TURNS}
        *events, done = await server.events(CHAT, body)
        assert done == "[DONE]"
        deltas = [(e["choices"][0]["delta"], e["choices"][0]["finish_reason"]) for e in events]
        assert deltas == [
            ({"role": "assistant", "content": ""}, None),
            ({"content": "H"}, None),
            ({"content": "i"}, None),
            ({}, "stop"),
        ]
        assert all(e["object"] == "chat.completion.chunk" for e in events)
        assert len({e["id"] for e in events}) == 1
        assert not any("usage" in e for e in events)
        options = {"stream_options": {"include_usage": True}, "n": 2}
        *events, last, done = await server.events(CHAT, body | options)
        assert done == "[DONE]"
        assert all(e["usage"] is None for e in events)
        assert (last["choices"], last["usage"]["prompt_tokens"]) == ([], 8)
        assert last["usage"]["completion_tokens"] == 4
        assert {e["choices"][0]["index"] for e in events} == {0, 1}
        options["stream_options"]["continuous_usage_stats"] = True
        counted = [(CHAT, body, [1, 1, 2, 2]), (COMPLETIONS, {**body, "prompt": "ab"}, [1, 2])]
        for path, body, counts in counted:
            *events, last, _ = await server.events(path, body | options)
            for index in (0, 1):
                used = [e["usage"] for e in events if e["choices"][0]["index"] == index]
                assert [each["completion_tokens"] for each in used] == counts
            assert {e["usage"]["prompt_tokens"] for e in events} == {last["usage"]["prompt_tokens"]}


async def test_completions_take_four_kinds_of_prompts() -> None:
    async with http_harness() as server:
        for prompt, expected in (
            ("ab", [b"ab"]),
            (["ab", "c"], [b"ab", b"c"]),
            ([97, 98], [b"ab"]),
            ([[97], [98, 99]], [b"a", b"bc"]),
        ):
            server.engine.requests.clear()
            answer = await server.post(COMPLETIONS, {"model": "base", "prompt": prompt})
            assert [bytes(r.prompt_token_ids) for r in server.engine.requests] == expected
            choices = answer.json()["choices"]
            assert [c["index"] for c in choices] == list(range(len(expected)))
            assert [c["text"] for c in choices] == ["Hi"] * len(expected)
        for bad in (None, 3, [], [[]], [True], [1.5], [[-1]], ["a", 3], [{"a": 1}], ["a"] * 2049):
            refused = await server.refused(COMPLETIONS, {"model": "base", "prompt": bad})
            assert refused.status == 400
            assert (refused.param or "").startswith("prompt"), bad


async def test_the_first_of_n_answers_runs_first_and_each_has_its_own_seed() -> None:
    async with http_harness() as server:
        waiting = asyncio.Event()

        async def script(request: Request) -> AsyncIterator[Output]:
            if request.sampling.seed == 5:
                await waiting.wait()
            yield Output(text=str(request.sampling.seed), token_ids=(1,), finish=finish(request))

        server.engine.script = script
        body = {"model": "base", "prompt": ["a", "b"], "n": 3, "seed": 5}
        asking = asyncio.ensure_future(server.post(COMPLETIONS, body))
        await asyncio.wait_for(server.engine.submitted.wait(), 10)
        for _ in range(50):
            await asyncio.sleep(0)
        assert [r.sampling.seed for r in server.engine.requests] == [5, 5]
        waiting.set()
        answer = (await asking).json()
        assert [c["text"] for c in answer["choices"]] == ["5", "6", "7", "5", "6", "7"]
        assert answer["usage"]["prompt_tokens"] == 2
        assert answer["usage"]["completion_tokens"] == 12
        assert await server.sample("turret_requests_total", adapter="base", code="OK") == 1
        assert await server.sample("turret_prompt_tokens_total", adapter="base") == 6


async def test_a_list_of_prompts_does_not_fill_the_queue() -> None:
    async with http_harness() as server:
        running, most = 0, 0
        is_full = asyncio.Event()

        async def script(request: Request) -> AsyncIterator[Output]:
            nonlocal running, most
            running += 1
            most = max(most, running)
            # The answers begin one after the other.
            if running == MAX_AT_A_TIME:
                is_full.set()
            await is_full.wait()
            running -= 1
            yield Output(text="x", token_ids=(1,), finish=finish(request))

        server.engine.script = script
        body = {"model": "base", "prompt": ["a"] * (MAX_AT_A_TIME * 3)}
        answer = (await server.post(COMPLETIONS, body)).json()
        assert len(answer["choices"]) == MAX_AT_A_TIME * 3
        assert most == MAX_AT_A_TIME


async def test_echo_and_logprobs_of_a_prompt() -> None:
    async with http_harness() as server:
        body = {"model": "base", "prompt": "ab", "echo": True, "logprobs": 0, "max_tokens": 2}
        (choice,) = (await server.post(COMPLETIONS, body)).json()["choices"]
        assert choice["text"] == "abHi"
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == ["a", "b", "H", "i"]
        assert logprobs["token_logprobs"] == [None, -1.0, -0.5, -0.25]
        assert logprobs["top_logprobs"] == [None, {"b": -1.0}, {"H": -0.5}, {"i": -0.25}]
        assert logprobs["text_offset"] == [0, 1, 2, 3]
        *events, _ = await server.events(COMPLETIONS, body)
        assert "".join(e["choices"][0]["text"] for e in events) == "abHi"
        offsets = [o for e in events for o in e["choices"][0]["logprobs"]["text_offset"]]
        assert offsets == [0, 1, 2, 3]


async def test_a_request_for_no_tokens_scores_the_prompt() -> None:
    async with http_harness() as server:
        body = {"model": "sql", "prompt": ["ab", "c"], "echo": True, "logprobs": 1, "max_tokens": 0}
        answer = (await server.post(COMPLETIONS, body)).json()
        assert [r.score for r in server.engine.requests] == [True, True]
        assert [c["text"] for c in answer["choices"]] == ["ab", "c"]
        assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0]
        assert answer["choices"][0]["finish_reason"] == "length"
        server.engine.refuse = QueueFullError("full")
        assert (await server.refused(COMPLETIONS, body)).status == 429


async def test_a_large_answer_is_built_in_pieces_outside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The encoder holds the GIL, so it must not get thousands of answers at once."""
    encoded: list[tuple[str, int]] = []
    original = endpoint.dumps

    def dumps(value: Any) -> bytes:
        data = original(value)
        encoded.append((threading.current_thread().name, len(data)))
        return data

    monkeypatch.setattr(endpoint, "dumps", dumps)
    async with http_harness() as server:
        body = {"model": "base", "prompt": ["a b"] * 100, "max_tokens": 0, "echo": True}
        answer = await server.post("/v1/completions", body | {"logprobs": 1})
        assert len(answer.json()["choices"]) == 100
        whole = len(answer.content)
    assert max(size for _, size in encoded) < whole / 50
    assert threading.main_thread().name not in {name for name, _ in encoded}


async def test_tokens_are_named_by_their_ids_on_request() -> None:
    """Two tokens with the same text, such as parts of characters, stay distinct."""
    async with http_harness() as server:

        async def script(request: Request) -> AsyncIterator[Output]:
            top = (TopLogprob(7, "\ufffd", -1.0),)
            token = TokenLogprob(token_id=5, text="\ufffd", logprob=-2.0, top=top)
            both = (token, token)
            yield Output(text="", token_ids=(5, 5), logprobs=both, finish=finish(request))

        server.engine.script = script
        asked = {"model": "base", "return_tokens_as_token_ids": True}
        body = asked | {"messages": TURNS, "logprobs": True, "top_logprobs": 1}
        (choice,) = (await server.post(CHAT, body)).json()["choices"]
        token, _ = choice["logprobs"]["content"]
        assert (token["token"], token["top_logprobs"][0]["token"]) == ("token_id:5", "token_id:7")
        # Bytes and offsets are those of the text, not of the names.
        assert token["bytes"] is None
        body = asked | {"prompt": "ab", "logprobs": 1}
        (choice,) = (await server.post(COMPLETIONS, body)).json()["choices"]
        assert choice["logprobs"]["tokens"] == ["token_id:5"] * 2
        assert choice["logprobs"]["text_offset"] == [0, 1]
        top = {"token_id:7": -1.0, "token_id:5": -2.0}
        assert choice["logprobs"]["top_logprobs"] == [top, top]


async def test_an_infinite_logprob_is_a_valid_json_number() -> None:
    async with http_harness() as server:

        async def script(request: Request) -> AsyncIterator[Output]:
            top = (TopLogprob(1, "\ufffd", float("-inf")),)
            token = TokenLogprob(token_id=1, text="\ufffd", logprob=float("-inf"), top=top)
            yield Output(text="", token_ids=(1,), logprobs=(token,), finish=finish(request))

        server.engine.script = script
        body = {"model": "base", "messages": TURNS, "logprobs": True, "top_logprobs": 1}
        (choice,) = (await server.post(CHAT, body)).json()["choices"]
        (token,) = choice["logprobs"]["content"]
        assert (token["logprob"], token["bytes"]) == (-9999.0, None)
        assert token["top_logprobs"] == [{"token": "\ufffd", "logprob": -9999.0, "bytes": None}]


async def test_the_finish_reason_is_reported() -> None:
    async with http_harness() as server:
        for reason, stop, expected in (
            (FinishReason.LENGTH, None, ("length", None)),
            (FinishReason.STOP, "x", ("stop", "x")),
            (FinishReason.STOP, 3, ("stop", 3)),
        ):

            async def script(
                request: Request, reason: FinishReason = reason, stop: Any = stop
            ) -> AsyncIterator[Output]:
                yield Output(text="t", token_ids=(1,), finish=finish(request, reason, stop))

            server.engine.script = script
            for path in (CHAT, COMPLETIONS):
                body = {"model": "base", "messages": TURNS, "prompt": "a", "stop_token_ids": [3]}
                (choice,) = (await server.post(path, body)).json()["choices"]
                assert (choice["finish_reason"], choice["stop_reason"]) == expected
                events = await server.events(path, body)
                assert events[-2]["choices"][0]["finish_reason"] == expected[0]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_an_error_after_the_first_event_is_sent_as_an_event(path: str) -> None:
    async with http_harness() as server:
        body = {"model": "base", "messages": TURNS, "prompt": "a", "stream": True}
        server.engine.refuse = AdapterNotFoundError("no adapter")
        refused = await server.refused(path, body)
        assert (refused.status, refused.param) == (404, "model")
        server.engine.refuse = None
        server.engine.script = failing(QueueFullError("later"))
        *_, last = await server.events(path, body)
        assert last["error"]["code"] == "rate_limit_exceeded"
        for reason, status, code in (
            (FinishReason.DEADLINE, 504, "deadline_exceeded"),
            (FinishReason.CANCELLED, 503, "unavailable"),
        ):

            async def script(
                request: Request, reason: FinishReason = reason
            ) -> AsyncIterator[Output]:
                yield Output(text="t", token_ids=(1,))
                yield Output(text="t", token_ids=(1,), finish=finish(request, reason))

            server.engine.script = script
            refused = await server.refused(path, body | {"stream": False})
            assert (refused.status, refused.code) == (status, code)
            *_, last = await server.events(path, body)
            assert last["error"]["code"] == code


async def test_one_answer_that_fails_ends_the_others() -> None:
    async with http_harness() as server:

        async def script(request: Request) -> AsyncIterator[Output]:
            if bytes(request.prompt_token_ids) == b"bad":
                raise QueueFullError("full")
            async for output in endless(request):
                yield output

        server.engine.script = script
        body = {"model": "base", "prompt": ["a", "bad", "c"], "n": 2}
        assert (await server.refused(COMPLETIONS, body)).status == 429
        await server.settle()
        assert all(stream.cancelled.is_set() for stream in server.engine.streams)


def _left(engine: FakeEngine) -> int:
    return sum(not stream.cancelled.is_set() for stream in engine.streams)


async def test_a_client_that_disconnects_leaves_nothing_behind() -> None:
    """Fifty streams and whole answers are dropped before, during and after their first event."""
    source = random.Random(7)
    async with http_harness() as server:
        server.engine.script = endless
        host, _, port = server.server.address.rpartition(":")

        async def drop(index: int) -> None:
            body = (
                b'{"model":"base","prompt":"a","n":%d,"stream":%s,"messages":[{"role":"user",'
                b'"content":"a"}]}' % (source.choice((1, 1, 4)), source.choice((b"true", b"false")))
            )
            path = source.choice((CHAT, COMPLETIONS)).encode()
            head = b"POST %b HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\n" % path
            data = head + b"content-length: %d\r\n\r\n" % len(body) + body
            cut = source.choice((len(data), len(data), len(data) - 5))
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(data[:cut])
            await writer.drain()
            if cut == len(data) and b'"stream":true' in body:
                await reader.readuntil(b"data: ")
            for _ in range(source.randint(0, 20)):
                await asyncio.sleep(0)
            writer.transport.abort()

        await asyncio.wait_for(asyncio.gather(*map(drop, range(50))), 30)
        await asyncio.wait_for(server.settle(), 10)
        assert len(server.engine.streams) >= 25
        assert _left(server.engine) == 0
        assert await server.sample("turret_calls_total", protocol="http", code="CANCELLED") == 50
        assert await server.sample("turret_calls_total", protocol="http", code="OK") is None
        running = [t for t in asyncio.all_tasks() if "turret" in repr(t.get_coro())]
        assert not [t for t in running if "_answer" in repr(t) or "generate" in repr(t)]
