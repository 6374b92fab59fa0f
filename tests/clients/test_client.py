"""The Python clients with a server of canned answers behind the real protocol."""

from __future__ import annotations

import asyncio
import json
import math
import re
from datetime import UTC, datetime

import grpc
import pytest
from said import says
from servers.fake_turret import FOREVER, PEFT_FILES, FakeAdapters, FakeTurret, fake_turret

from turret.clients.aio import AsyncTurretClient
from turret.clients.client import AdapterWeight, TurretClient, TurretRpcError
from turret.clients.errors import FieldViolation
from turret.v1 import adapters_pb2


def test_generate_returns_every_field(client: TurretClient):
    answer = client.generate("a b", adapters=["sql", ("json", -0.5)], top_n=1, request_id="r-1")
    assert answer.text == "ab"
    assert (answer.finish_reason, answer.stop) == ("STOP", "END")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 2)
    assert [(u.name, u.weight) for u in answer.adapters_used] == [("sql", 1.0), ("json", -0.5)]
    assert (answer.timing.queue, answer.timing.ttft, answer.timing.total) == (0.0, 0.25, 1.5)
    assert answer.request_id == "r-1"
    assert answer.logprobs[0].logprob == -0.5
    assert [(t.token_id, t.text, t.logprob) for t in answer.logprobs[0].top] == [(6, "b", -1.0)]


def test_zero_is_sent_and_unset_is_not(client: TurretClient, server: FakeTurret):
    off = [("json", 0.0), AdapterWeight("sql", 0.0)]
    client.generate("a", adapters=off, temperature=0, min_tokens=0, ignore_eos=False)
    request = server.inference.requests[-1]
    assert request.sampling.HasField("temperature")
    assert request.stop.HasField("min_tokens")
    assert request.stop.HasField("ignore_eos")
    assert [a.HasField("weight") and a.weight for a in request.adapters] == [0.0, 0.0]
    client.generate("a", adapters="json", temperature=None)
    request = server.inference.requests[-1]
    for name in request.sampling.DESCRIPTOR.fields:
        assert name.name == "logit_bias" or not request.sampling.HasField(name.name)
    assert not request.stop.ListFields()
    assert not request.options.ListFields()
    assert not request.adapters[0].HasField("weight")
    assert not request.adapters[0].HasField("generation")


def test_tools_and_calls_reach_their_fields(client: TurretClient, server: FakeTurret):
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        ("user", "hi"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "r", "tool_call_id": "1"},
    ]
    client.chat(turns, tools=[{"type": "function", "function": function}])
    chat = server.inference.requests[-1].chat
    (tool,) = chat.tools
    assert (tool.name, tool.description, tool.parameters) == ("f", "d", '{"type": "object"}')
    (made,) = chat.messages[1].tool_calls
    assert (made.id, made.name, made.arguments) == ("1", "f", "{}")
    assert (chat.messages[2].role, chat.messages[2].tool_call_id) == ("tool", "1")


def test_rendering_options_reach_their_fields(client: TurretClient, server: FakeTurret) -> None:
    client.chat("hi", chat_template_kwargs={"enable_thinking": False}, add_generation_prompt=False)
    chat = server.inference.requests[-1].chat
    assert (json.loads(chat.chat_template_kwargs), chat.add_generation_prompt) == (
        {"enable_thinking": False},
        False,
    )
    client.chat("hi", continue_final_message=True, chat_template="{{ messages }}")
    chat = server.inference.requests[-1].chat
    assert chat.continue_final_message
    assert (chat.chat_template, chat.HasField("add_generation_prompt")) == ("{{ messages }}", False)


def test_every_option_reaches_its_field(client: TurretClient, server: FakeTurret):
    client.generate(
        [3, 4],
        adapters=[AdapterWeight("sql", 0.5, generation=1), adapters_pb2.AdapterWeight(name="json")],
        temperature=0.5,
        top_k=2,
        top_p=0.75,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=2**63,
        logit_bias={9: -1.0},
        max_tokens=4,
        min_tokens=1,
        stop=["x", "y"],
        stop_token_ids=[7],
        ignore_eos=True,
        include_stop=True,
        logprobs=True,
        top_n=3,
        echo=True,
        token_ids=True,
        request_id="r",
    )
    request = server.inference.requests[-1]
    s, stop, options = request.sampling, request.stop, request.options
    assert list(request.token_ids.ids) == [3, 4]
    assert (s.temperature, s.top_k, s.top_p, s.min_p) == (0.5, 2, 0.75, 0.25)
    assert (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) == (1.5, 0.5, -0.5)
    assert (s.seed, dict(s.logit_bias)) == (2**63, {9: -1.0})
    assert (stop.max_tokens, stop.min_tokens, list(stop.stop_strings)) == (4, 1, ["x", "y"])
    assert (list(stop.stop_token_ids), stop.ignore_eos, stop.include_stop) == ([7], True, True)
    assert (options.logprobs, options.top_n, options.echo, options.token_ids) == (
        True,
        3,
        True,
        True,
    )
    assert [(a.name, a.generation) for a in request.adapters] == [("sql", 1), ("json", 0)]


def test_chat_takes_text_pairs_and_mappings(client: TurretClient):
    assert client.chat("hi").text == "user:hi "
    turns = [{"role": "system", "content": "s"}, ("user", "u")]
    assert client.chat(turns).text == "system:s user:u "
    with client.chat_stream(turns) as stream:
        assert "".join(chunk.text for chunk in stream) == "system:s user:u "


def test_stream_ends_with_the_summary(client: TurretClient):
    chunks = list(client.generate_stream("a b c", adapters="sql"))
    assert "".join(chunk.text for chunk in chunks) == "abc"
    assert {(c.finish_reason, c.usage, c.timing) for c in chunks[:-1]} == {(None, None, None)}
    last = chunks[-1]
    assert (last.finish_reason, last.stop) == ("STOP", "END")
    assert last.usage is not None
    assert last.timing is not None
    assert last.adapters_used[0].name == "sql"


def test_closing_a_stream_cancels_the_request(client: TurretClient, server: FakeTurret):
    with client.generate_stream(FOREVER) as stream:
        assert next(stream).text == FOREVER
        assert next(stream).text == "."
        assert not server.inference.stream_ended.is_set()
    assert server.inference.stream_ended.wait(5)
    assert list(stream) == []
    stream.close()


def test_stream_has_a_deadline_only_on_request(client: TurretClient, server: FakeTurret):
    list(client.generate_stream("a"))
    assert server.inference.time_remaining is None
    with pytest.raises(TurretRpcError) as raised:
        list(client.generate_stream(FOREVER, timeout=0.2))
    assert raised.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert server.inference.stream_ended.wait(5)


def test_unary_deadline_defaults_to_the_clients(client: TurretClient, server: FakeTurret):
    client.generate("a")
    assert server.inference.time_remaining == pytest.approx(600, abs=5)
    client.generate("a", timeout=30)
    assert server.inference.time_remaining == pytest.approx(30, abs=5)
    client.generate("a", timeout=math.inf)
    assert server.inference.time_remaining is None


def test_an_error_has_the_details_that_the_server_sent(client: TurretClient):
    with pytest.raises(TurretRpcError) as raised:
        client.generate("a", adapters="nope")
    error = raised.value
    assert error.code == grpc.StatusCode.NOT_FOUND
    assert (error.reason, error.metadata) == ("ADAPTER_NOT_FOUND", {"adapters": "nope"})
    assert (error.violations, error.retry_delay, error.request_id) == ((), None, "r-7")
    assert str(error) == f"NOT_FOUND (ADAPTER_NOT_FOUND): {error.message}; {error.hint}"
    with pytest.raises(TurretRpcError) as raised:
        client.generate("a", top_p=2)
    assert raised.value.violations == (FieldViolation("top_p", "<= 1"),)
    assert raised.value.message == "top_p: <= 1"
    with pytest.raises(TurretRpcError) as raised:
        list(client.generate_stream("busy"))
    assert (raised.value.reason, raised.value.retry_delay) == ("QUEUE_FULL", 0.5)


def test_error_without_details_keeps_its_status(monkeypatch: pytest.MonkeyPatch):
    """An older server answers like this to an unknown call."""
    monkeypatch.delattr(FakeAdapters, "GetMergeState")
    with (
        fake_turret() as older,
        TurretClient(older.address) as client,
        pytest.raises(TurretRpcError) as raised,
    ):
        client.adapters.get_merge_state()
    assert raised.value.code == grpc.StatusCode.UNIMPLEMENTED
    assert raised.value.reason == ""


def test_token_is_sent_with_every_call(server: FakeTurret):
    with TurretClient(server.address, token="s3cret") as client:
        client.generate("a")
        assert server.inference.metadata["authorization"] == "Bearer s3cret"
        list(client.generate_stream("a"))
        assert server.inference.metadata["authorization"] == "Bearer s3cret"
    with TurretClient(server.address) as client:
        client.generate("a")
        assert "authorization" not in server.inference.metadata


def test_score_tokenize_and_model(client: TurretClient, server: FakeTurret):
    score = client.score("abc", adapters="sql", top_n=2)
    assert [token.logprob for token in score.tokens] == [None, -0.25, 0.0]
    assert score.logprob == -0.25
    assert server.inference.requests[-1].top_n == 2
    assert client.tokenize("ab").token_texts == ("a", "b")
    model = client.get_model()
    assert (model.name, model.vocab_size, model.methods) == ("tiny", 7, ("dora", "lora"))


def test_list_fetches_pages_as_needed(client: TurretClient, server: FakeTurret):
    for i in range(5):
        client.adapters.load(f"a{i}", "p")
    server.adapters.requests.clear()
    listing = client.adapters.list(page_size=3, method="lora", residency="host")
    assert next(listing).name == "a0"
    assert len(server.adapters.requests) == 1
    assert [adapter.name for adapter in listing] == ["a1", "a2", "a3", "a4", "json", "sql"]
    assert [request.page_token for request in server.adapters.requests] == ["", "3", "6"]
    for request in server.adapters.requests:
        assert request.method == "lora"
        assert request.residency == adapters_pb2.Adapter.HOST


def test_adapter_lifecycle(client: TurretClient, server: FakeTurret):
    adapter = client.adapters.load("new", "dir", pinned=True)
    assert (adapter.name, adapter.method, adapter.ranks) == ("new", "lora", (4, 8))
    assert (adapter.state, adapter.residency, adapter.pinned) == ("ACTIVE", "HOST", True)
    assert adapter.last_used_time is None
    server.adapters.adapters["new"].last_used_time.FromSeconds(0)
    assert client.adapters.get("new").last_used_time == datetime(1970, 1, 1, tzinfo=UTC)
    assert not client.adapters.unpin("new").pinned
    assert client.adapters.pin("new").pinned
    assert client.adapters.replace("new", "dir2").generation == 2
    back = client.adapters.rollback("new", expected_generation=2)
    assert (back.generation, back.kept_generations) == (1, (2,))
    assert server.adapters.requests[-1].expected_generation == 2
    client.adapters.unload("new", mode="force", drain_seconds=1.5)
    request = server.adapters.requests[-1]
    assert request.mode == adapters_pb2.UnloadAdapterRequest.FORCE
    assert request.timeout.ToMilliseconds() == 1500
    with pytest.raises(TurretRpcError, match="NOT_FOUND"):
        client.adapters.get("new")


def test_fuse_and_merge(client: TurretClient, server: FakeTurret):
    fusion = client.adapters.fuse("both", ["sql", ("json", 0.5)], combination="svd", rank=8)
    assert (fusion.adapter.name, fusion.relative_error) == ("both", 0.25)
    assert fusion.modules[0].module == "layers.0.q_proj"
    request = server.adapters.requests[-1]
    assert (request.combination, request.rank) == ("svd", 8)
    assert not request.HasField("energy")
    state = client.adapters.merge([("sql", 0.5)], precision="bf16")
    assert (state.active, state.precision, state.adapters[0].weight) == (True, "BF16", 0.5)
    assert state.merge_time == datetime(1970, 1, 2, tzinfo=UTC)
    assert (state.relative_error, state.update_error) == (0.125, 0.75)
    state = client.adapters.unmerge()
    assert (state.active, state.precision, state.merge_time) == (False, "", None)


def test_upload_sends_the_adapter_and_nothing_else(client, server, tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        client.adapters.upload("up", tmp_path / "no")
    assert raised.value.filename == str(tmp_path / "no")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, check=says("ADAPTER_FILES_MISSING")):
        client.adapters.upload("up", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name, data in PEFT_FILES.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "optimizer.pt").write_bytes(b"private")
    assert client.adapters.upload("up", tmp_path, replace=True).name == "up"
    assert server.adapters.files == PEFT_FILES
    assert server.adapters.requests[-1].replace


def test_export_is_all_or_nothing(client: TurretClient, server: FakeTurret, tmp_path):
    target = tmp_path / "deep" / "sql"
    server.adapters.garble = True
    with pytest.raises(ValueError, check=says("EXPORT_FILE_DAMAGED")):
        client.adapters.export("sql", target)
    with pytest.raises(TurretRpcError, match="NOT_FOUND"):
        client.adapters.export("nope", target)
    assert list(tmp_path.iterdir()) == []
    server.adapters.garble = False
    assert client.adapters.export("sql", target).name == "sql"
    assert {path.name: path.read_bytes() for path in target.iterdir()} == PEFT_FILES
    with pytest.raises(FileExistsError):
        client.adapters.export("sql", target)


async def test_aio_client_mirrors_the_synchronous_one(server: FakeTurret, tmp_path):
    async with AsyncTurretClient(server.address, token="t") as client:
        answer = await client.generate("a b", adapters=["sql"])
        assert (answer.text, answer.adapters_used[0].name) == ("ab", "sql")
        assert server.inference.metadata["authorization"] == "Bearer t"
        assert (await client.chat("hi")).text == "user:hi "
        assert (await client.score("abc")).logprob == -0.25
        assert (await client.tokenize("ab")).text == "ab"
        assert (await client.get_model()).name == "tiny"
        await client.adapters.load("a", "p")
        names = [adapter.name async for adapter in client.adapters.list(page_size=2)]
        assert names == ["a", "json", "sql"]
        await client.adapters.unload("a")
        await client.adapters.export("sql", tmp_path / "sql")
        assert (await client.adapters.upload("b", tmp_path / "sql")).name == "b"
        assert server.adapters.files == PEFT_FILES
        with pytest.raises(TurretRpcError) as raised:
            await client.generate("a", adapters="nope")
        assert raised.value.reason == "ADAPTER_NOT_FOUND"
        with pytest.raises(TurretRpcError, match="QUEUE_FULL"):
            async for _ in client.generate_stream("busy"):
                pass


async def test_aio_stream_is_cancelled_by_closing_and_by_its_task(server: FakeTurret):
    async with AsyncTurretClient(server.address) as client:
        async with client.generate_stream(FOREVER) as stream:
            assert (await anext(stream)).text == FOREVER
        assert await asyncio.to_thread(server.inference.stream_ended.wait, 5)
        assert [chunk async for chunk in stream] == []

        started = asyncio.Event()

        async def read() -> None:
            async for _ in client.chat_stream("x"):
                pass
            async for _ in client.generate_stream(FOREVER):
                started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.inference.stream_ended.wait, 5)


def test_every_rpc_has_a_method_in_both_clients():
    from turret.clients.aio import AsyncAdaptersClient
    from turret.clients.client import AdaptersClient

    for kind in (AdaptersClient, AsyncAdaptersClient):
        for rpc in adapters_pb2.DESCRIPTOR.services_by_name["Adapters"].methods_by_name:
            words = re.sub(r"(?<!^)(?=[A-Z])", "_", rpc).lower()
            name = words.split("_adapter")[0]
            assert callable(getattr(kind, name))
