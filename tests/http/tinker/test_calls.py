"""The Tinker API over HTTP: rejections, retries, sessions, owners and limits."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import os
import random
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pytest
from fuzz.mutation import mutated
from psutil import Process
from servers.fakes import MODEL_INFO, endless
from servers.http_harness import HttpHarness, http_harness
from servers.table_training import TableTraining
from servers.tinker_tenant import API, LORA, PROTOBUF, Pass, Tenant, pass_of, sample_of, tensor

from turret.server.api import checkpoints
from turret.server.api import tenants as sessions
from turret.server.api.access import MessageMemory, Shares, TokenTable
from turret.server.api.checkpoints import Checkpoints
from turret.server.api.futures import Future, Futures, Result
from turret.server.api.tenants import Tenants
from turret.server.errors import InvalidRequestError, QueueFullError, TrainingNotFoundError
from turret.server.http.tinker import listing, wire
from turret.server.http.tinker import sessions as handlers
from turret.server.training import MAX_SEQUENCE_TOKENS, LearnerConfig
from turret.v1 import tinker_pb2


@dataclass
class Served(Tenant):
    """A client and the server that it uses. The server's adapters are tables of logits."""

    server: HttpHarness = field(kw_only=True)
    tables: TableTraining = field(kw_only=True)

    @property
    def tenants(self) -> Tenants:
        """The sessions and checkpoints of all clients."""
        assert self.server.server._tenants is not None
        return self.server.server._tenants


@contextlib.asynccontextmanager
async def tenant(folder: Path, **settings: Any) -> AsyncIterator[Served]:
    """A tenant, whose session has begun if it needs no token; see ``Services``."""
    tables = TableTraining(MODEL_INFO.vocab_size)
    async with http_harness(trainer=tables, training=folder, **settings) as server:
        found = Served(server.client, {}, server=server, tables=tables)
        if "tokens" not in settings:
            await found.begin()
        yield found


def names_in(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Served]:
    async with tenant(tmp_path) as found:
        yield found


async def test_the_routes_exist_only_with_training(http: HttpHarness) -> None:
    assert (await http.client.get(f"{API}/healthz")).status_code == 404


async def test_invalid_sequences_fail_at_once(one: Served) -> None:
    model_id = await one.model()

    def changed(**inputs: tinker_pb2.TinkerTensor | None) -> tinker_pb2.TinkerPass:
        message = pass_of(model_id, 0)
        for name, value in inputs.items():
            if value is None:
                del message.data[0].loss_fn_inputs[name]
            else:
                message.data[0].loss_fn_inputs[name].CopyFrom(value)
        return message

    def with_tokens(data: bytes) -> tinker_pb2.TinkerPass:
        message = pass_of(model_id, 0)
        message.data[0].model_input[0].encoded_text.tokens = data
        return message

    many = pass_of(model_id, 0)
    many.data.extend(Pass.Datum() for _ in range(5000))
    chunks = pass_of(model_id, 0)
    chunks.data[0].model_input.extend(Pass.Chunk() for _ in range(5000))
    image = pass_of(model_id, 0)
    image.data[0].model_input.add()
    settings = pass_of(model_id, 0)
    settings.loss_fn_config_v2["beta"].text = "much"
    unknown = pass_of(model_id, 0)
    unknown.loss_fn_config_v2["beta"].number = 1.0
    sparse = tinker_pb2.TinkerTensor(dtype=tinker_pb2.TinkerTensor.FLOAT32, shape=[3])
    sparse.sparse_csr.values = b"\0" * 12
    nothing = pass_of(model_id, 0)
    del nothing.data[:]
    bad = {
        "short": changed(weights=tensor([1.0])),
        "nan": changed(weights=tensor([1.0, float("nan"), 1.0])),
        "infinite": changed(weights=tensor([1.0, float("inf"), 1.0])),
        "no targets": changed(target_tokens=None),
        "wrong type": changed(target_tokens=tensor([1.0, 2.0, 3.0])),
        "a matrix": changed(weights=tensor([1.0, 1.0, 1.0], shape=[3, 1])),
        "another shape": changed(weights=tensor([1.0, 1.0, 1.0], shape=[4])),
        "sparse": changed(weights=sparse),
        "a target outside": changed(target_tokens=tensor([1, 2, MODEL_INFO.vocab_size], "i8")),
        "a negative target": changed(target_tokens=tensor([1, 2, -1], "i8")),
        "an unknown input": changed(mask=tensor([1.0, 1.0, 1.0])),
        "a token outside": with_tokens(np.array([1, 2, 1 << 20], "<i4").tobytes()),
        "half a token": with_tokens(b"12345"),
        "no tokens": with_tokens(b""),
        "too long": with_tokens(b"\0" * 4 * (MODEL_INFO.max_model_len + 1)),
        "an unknown loss": pass_of(model_id, 0, loss_fn="gspo"),
        "no inputs of the loss": pass_of(model_id, 0, loss_fn="ppo"),
        "too many": many,
        "too many chunks": chunks,
        "an image": image,
        "a text as a setting": settings,
        "a setting of another loss": unknown,
        "nothing": nothing,
    }
    for number, (name, message) in enumerate(bad.items(), start=1):
        message.seq_id = number
        said = await one.run(message)
        assert isinstance(said, dict), name
        assert said["category"] == "user", name
        assert len(said["error"]) < 20_000, name
    assert one.tables.learners[1].calls == []
    assert isinstance(await one.run(pass_of(model_id, len(bad) + 1)), bytes)
    assert one.tables.learners[1].calls == ["pass 1"]


def test_a_sequence_may_not_be_longer_than_the_gradient_of_attention_allows() -> None:
    info = replace(MODEL_INFO, max_model_len=2 * MAX_SEQUENCE_TOKENS)
    for length, is_served in ((MAX_SEQUENCE_TOKENS, True), (MAX_SEQUENCE_TOKENS + 1, False)):
        message = pass_of("any", 1, tokens=[1] * length)
        if is_served:
            (datum,) = wire.read_pass(message.SerializeToString(), info).data
            assert len(datum.tokens) == length
            continue
        with pytest.raises(InvalidRequestError) as caught:
            wire.read_pass(message.SerializeToString(), info)
        assert caught.value.violations[0][0] == "data[0].model_input"


async def test_loss_weights_default_to_one(one: Served) -> None:
    model_id = await one.model()
    message = pass_of(model_id, 1)
    with_weights = await one.run(message)
    del message.data[0].loss_fn_inputs["weights"]
    message.seq_id = 2
    assert await one.run(message) == with_weights
    found = tinker_pb2.TinkerPassResult.FromString(with_weights)
    losses = np.frombuffer(found.loss_fn_outputs[0].fields["elementwise_loss"].data, "<f4")
    assert found.metrics["loss:sum"] == pytest.approx(float(losses.sum()), rel=1e-6)


def test_parts_of_a_pass_are_counted_before_they_are_parsed() -> None:
    entry = b"\x0a\x05%05x\x12\x00"
    entries = [bytes((len(entry % 0),)) + entry % number for number in range(350_000)]
    inputs = b"".join(b"\x12" + each for each in entries)
    size = bytes((len(inputs) & 127 | 128, len(inputs) >> 7 & 127 | 128))
    size += bytes((len(inputs) >> 14 & 127 | 128, len(inputs) >> 21))
    for body in (
        b"".join(b"\x3a" + each for each in entries),
        b"\x1a\x00" * 2_000_000,
        b"\x1a" + size + inputs,
    ):
        seconds = []
        for _ in range(3):
            start = time.thread_time()
            wire.read_address(body)
            with pytest.raises(InvalidRequestError) as refused:
                wire.read_pass(b"\x22\x0dcross_entropy" + body, MODEL_INFO)
            seconds.append(time.thread_time() - start)
            assert "TOO_MANY_ENTRIES" in {text.reason for _, text in refused.value.violations}
        assert min(seconds) < 0.25


async def test_a_pass_with_any_body_is_answered(tmp_path: Path) -> None:
    rng = random.Random(0)
    async with tenant(tmp_path) as one:
        model_id = await one.model()
        statuses = set()
        for number in range(1, 120):
            data = pass_of(model_id, number).SerializeToString()
            answer = await one.send("/forward_backward", mutated(rng, [data]))
            statuses.add(answer.status_code)
            assert answer.status_code in (200, 400, 404, 410), answer.text
        assert {200, 400} <= statuses
        assert not [each for each in one.server.services.failures if each.code == "INTERNAL"]


async def test_a_pass_is_refused_by_its_media_type_and_size(one: Served) -> None:
    model_id = await one.model()
    data = pass_of(model_id, 1).SerializeToString()
    for headers in (
        {"content-type": "application/json"},
        {**PROTOBUF, "content-encoding": "zstd"},
    ):
        url = f"{API}/forward_backward"
        answer = await one.server.client.post(url, content=data, headers=headers)
        assert answer.status_code == 415
    assert (await one.send("/forward_backward", bytes(5 << 20))).status_code == 413
    assert (await one.send("/forward_backward", b"\xff")).status_code == 400
    none = pass_of(model_id, 0).SerializeToString()
    assert (await one.send("/forward_backward", none)).status_code == 400


async def test_a_repeated_command_runs_once(one: Served) -> None:
    model_id = await one.model()
    body = {"session_id": one.session, "model_seq_id": 0, "base_model": "base"}
    again = await one.ask("/create_model", {**body, "lora_config": LORA})
    assert (await one.result(again))["model_id"] == model_id
    assert len(one.tables.learners) == 1
    step = {"model_id": model_id, "seq_id": 2, "adam_params": {"learning_rate": 0.1}}
    data = pass_of(model_id, 1).SerializeToString()
    # The step arrives first, and waits.
    stepped = await one.ask("/optim_step", step)
    passed = [await one.ask("/forward_backward", data) for _ in range(3)]
    assert stepped == await one.ask("/optim_step", step)
    results = [await one.result(each) for each in passed]
    assert results[0] == results[1] == results[2]
    assert (await one.result(stepped))["metrics"].keys() == {"grad_norm"}
    assert one.tables.learners[1].calls == ["pass 1", "step"]


async def test_an_invalid_step_fails_at_once(one: Served) -> None:
    model_id = await one.model()
    for number, adam in enumerate(
        ({"learning_rate": -1}, {"learning_rate": 1e38}, {"beta1": 1}, {"eps": 0}, None),
        start=1,
    ):
        step = {"model_id": model_id, "seq_id": number, "adam_params": adam}
        assert (await one.done("/optim_step", step))["category"] == "user"
    step = {"model_id": model_id, "seq_id": 6, "adam_params": {}}
    assert "metrics" in await one.done("/optim_step", step)
    for wrong in (0, -1, None, "1", 1 << 40, True, 2.0):
        answer = await one.send("/optim_step", step | {"seq_id": wrong})
        assert answer.status_code == 400, wrong
    assert (await one.send("/optim_step", step | {"model_id": 3})).status_code == 400
    assert (await one.send("/optim_step", step | {"model_id": "x:train:0"})).status_code == 404


async def test_a_slow_result_is_polled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "POLL_SECONDS", 0.05)
    async with tenant(tmp_path) as one:
        model_id = await one.model()
        one.tables.may_run.clear()
        promise = await one.ask("/forward_backward", pass_of(model_id, 1).SerializeToString())
        answer = await one.send("/retrieve_future", {"request_id": promise["request_id"]})
        assert answer.status_code == 408
        assert answer.json()["type"] == "try_again"
        one.tables.may_run.set()
        monkeypatch.undo()
        assert isinstance(await one.result(promise), bytes)
        assert (await one.send("/retrieve_future", {"request_id": "none"})).status_code == 410


async def test_a_failed_model_leaves_nothing_behind(one: Served) -> None:
    body = {"session_id": one.session, "model_seq_id": 0, "base_model": "base"}
    body |= {"lora_config": LORA, "user_metadata": {"turret.method": "nothing"}}
    promise = await one.ask("/create_model", body)
    assert (await one.result(promise))["category"] == "user"
    assert await one.ask("/create_model", body) == promise
    await one.tenants.sessions.close()
    assert one.tenants.sessions.models("") == []
    step = {"model_id": promise["model_id"], "seq_id": 1, "adam_params": {}}
    assert (await one.send("/optim_step", step)).status_code == 404
    for wrong in (
        {"base_model": "other"},
        {"user_metadata": {"turret.metod": "dora"}},
        {"lora_config": None},
        {"lora_config": {"rank": 0}},
        {"optimizer_config": {"type": "dimuon"}},
        {"session_id": "none"},
    ):
        answer = await one.send("/create_model", body | wrong)
        assert answer.status_code in (400, 404, 410), wrong


async def test_a_silent_session_ends_with_its_models_and_samplers(
    one: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_id = await one.model()
    save = {"model_id": model_id, "seq_id": 1, "sampling_session_seq_id": 0}
    made = await one.done("/save_weights_for_sampler", save)
    follow = save | {"seq_id": 2, "sampling_session_seq_id": 1, "kind": "inflight"}
    await one.done("/save_weights_for_sampler", follow)
    assert len(one.tables.published) == 2
    await one.ask("/session_heartbeat", {"session_id": one.session})
    one.tenants.sessions.sweep()
    assert len(one.tables.learners) == 1
    monkeypatch.setattr(sessions, "SESSION_SECONDS", -1.0)
    one.tenants.sessions.sweep()
    await one.tenants.sessions.close()
    assert (one.tables.learners, one.tables.published) == ({}, {})
    answer = await one.send("/session_heartbeat", {"session_id": one.session})
    assert answer.status_code == 410
    sample = sample_of(made["sampling_session_id"])
    assert (await one.send("/asample", sample)).status_code == 404


async def test_samples_are_retrieved_once_and_can_be_cancelled(one: Served) -> None:
    sampler = await one.sampler()
    asked = sample_of(sampler, num_samples=3, prompt_logprobs=True, topk_sample_logprobs=2)
    promise = await one.ask("/asample", asked)
    assert promise == await one.ask("/asample", asked)
    assert len(promise["sample_sequence_ids"]) == 3
    found = tinker_pb2.TinkerSamples.FromString(await one.result(promise))
    assert len(one.server.engine.requests) == 3
    assert [np.frombuffer(each.tokens, "<i4").tolist() for each in found.sequences] == [
        [72, 105]
    ] * 3
    prompt = np.frombuffer(found.prompt_logprobs, "<f4")
    assert np.isnan(prompt[0])
    assert prompt[1:].tolist() == [-1.0, -2.0]
    last = sample_of(sampler, seq_id=1, prompt_logprobs=True, prompt_logprobs_last_n=1)
    found = tinker_pb2.TinkerSamples.FromString(await one.done("/asample", last))
    prompt = np.frombuffer(found.prompt_logprobs, "<f4")
    assert np.isnan(prompt[:2]).all()
    assert prompt[2] == -2.0
    one.server.engine.script = endless
    promise = await one.ask("/asample", sample_of(sampler, seq_id=2))
    await one.ask("/cancel_future", {"request_id": promise["request_id"]})
    assert (await one.result(promise))["category"] == "server"
    assert one.server.engine.streams[-1].cancelled.is_set()


async def test_samples_cancelled_before_they_begin_hold_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tenant(tmp_path, shares=Shares(messages=MessageMemory(20 << 10))) as one:
        futures, sampler = one.tenants.futures, await one.sampler()

        def begin(owner: str, request_id: str) -> Future:
            future = Futures.begin(futures, owner, request_id)
            # A call to cancel_future may run before the new task.
            asyncio.get_running_loop().call_soon(future.cancel)
            return future

        monkeypatch.setattr(futures, "begin", begin)
        for number in range(4):
            promise = await one.ask("/asample", sample_of(sampler, seq_id=number))
            assert (await one.result(promise))["category"] == "server"


async def test_samplers_whose_clients_disconnected_end_with_their_sessions(one: Served) -> None:
    path = (await one.save(await one.model(), 1, "x", "_for_sampler"))["path"]
    one.tables.may_serve.clear()
    making = asyncio.ensure_future(one.sampler(model_path=path))
    assert await asyncio.to_thread(one.tables.serving.wait, 60)
    making.cancel()
    await asyncio.wait([making])
    # Meanwhile, the server notices that the client is gone.
    for _ in range(5):
        await one.ask("/session_heartbeat", {"session_id": one.session})
    one.tables.may_serve.set()
    # The client's files are written one after another.
    await one.sampler(1, model_path=path)
    assert len(one.tables.published) == 2
    await one.ask(f"/sessions/{one.session}/finish", {})
    await one.tenants.sessions.close()
    assert not one.tables.published


async def test_samples_that_wait_for_the_queue_take_a_bounded_amount_of_memory(
    tmp_path: Path,
) -> None:
    async with tenant(tmp_path, shares=Shares(messages=MessageMemory(200 << 10))) as one:
        one.server.engine.refuse = QueueFullError("planted")
        sampler = await one.sampler()
        asked = [sample_of(sampler, seq_id=number) for number in range(40)]
        found = [(await one.send("/asample", each)).status_code for each in asked]
        accepted = found.index(429)
        assert 10 < accepted < 30
        assert found == [200] * accepted + [429] * (40 - accepted)
        await one.ask("/cancel_future", {"request_id": f"{sampler}:0"})
        await one.result({"request_id": f"{sampler}:0"})
        await one.ask("/asample", asked[-1])
        one.server.engine.refuse = None


async def test_the_last_failures_have_no_private_names(one: Served) -> None:
    model_id = await one.model()
    name = f"training/{one.session}/0"
    await one.save(model_id, 1, None, "_for_sampler", sampling_session_seq_id=0, kind="inflight")
    assert name in one.tables.published
    wrong = {"model": name, "prompt": "a", "temperature": -1}
    assert (await one.client.post("/v1/completions", json=wrong)).status_code == 400
    asked = {"tinker_path": f"tinker://{model_id}/weights/x"}
    assert (await one.send("/weights_info", asked)).status_code == 404
    outside = {"chunks": [{"type": "encoded_text", "tokens": [MODEL_INFO.vocab_size]}]}
    sample = sample_of(f"{one.session}:sample:0", prompt=outside)
    assert (await one.done("/asample", sample))["category"] == "user"
    failures = list(one.server.services.failures)
    assert [each.reason for each in failures] == [
        "INVALID_REQUEST",
        "TRAINING_NOT_FOUND",
        "INVALID_REQUEST",
    ]
    assert one.session not in str(failures)


async def test_changes_of_one_checkpoint_at_a_time_leave_its_files_whole(
    one: Served, tmp_path: Path
) -> None:
    path = (await one.save(await one.model(), 1, "x"))["path"]
    run, kind, name = path.removeprefix("tinker://").split("/")
    place = f"/training_runs/{run}/checkpoints/{kind}/{name}"
    bodies = [{"ttl_seconds": number} for number in (None, 10**8, None, 10**4, 10**7)]
    asked = [one.send(f"{place}/ttl", body, verb="PUT") for body in bodies]
    assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * 5
    kept = one.tenants.checkpoints.find("", path)
    assert Checkpoints(tmp_path).find("", path) == kept
    gone = one.send(place, verb="DELETE")
    found = await asyncio.gather(
        gone, one.tenants.checkpoints.expire_at(kept, None), return_exceptions=True
    )
    assert isinstance(found[0], httpx2.Response)
    assert found[0].status_code == 200
    assert not one.tenants.checkpoints.owned("")
    with pytest.raises(TrainingNotFoundError):
        await one.tenants.checkpoints.expire_at(kept, None)


async def test_results_count_towards_the_memory_of_messages(tmp_path: Path) -> None:
    async with tenant(tmp_path, shares=Shares(messages=MessageMemory(200 << 10))) as one:
        futures, found = one.tenants.futures, []
        for number, size in enumerate((100 << 10, 300 << 10, 100 << 10)):
            future = futures.begin("", f"{number}")
            futures.settle(future, Result(bytes(size)))
            answer = await one.send("/retrieve_future", {"request_id": future.request_id})
            found.append(answer.status_code)
        assert found == [200, 429, 200]


async def test_stops_and_settings_reach_the_engine(one: Served) -> None:
    sampler = await one.sampler(base_model="fake")
    for number, (stop, expected) in enumerate(
        (
            (None, ((), frozenset(), False)),
            ([], ((), frozenset(), True)),
            ("a", (("a",), frozenset(), False)),
            (["a", "b"], (("a", "b"), frozenset(), False)),
            ([4, 5], ((), frozenset((4, 5)), False)),
        )
    ):
        params = {"max_tokens": 3, "stop": stop, "seed": -1, "top_k": -1, "temperature": 0.5}
        asked = sample_of(sampler, seq_id=number, sampling_params=params)
        await one.done("/asample", asked)
        request = one.server.engine.requests[-1]
        found = request.stop
        assert (found.stop_strings, found.stop_token_ids, found.ignore_eos) == expected
        assert (request.sampling.seed, request.sampling.top_k) == ((1 << 64) - 1, 0)
    bad: list[dict[str, Any]] = [
        {"sampling_params": {"stop": 3}},
        {"sampling_params": {"stop": ["a", 3]}},
        {"sampling_params": {"stop": [""]}},
        {"sampling_params": {"stop": ["a"] * 100}},
        {"num_samples": 0},
        {"num_samples": 100_000},
        {"topk_prompt_logprobs": 1000},
        {"prompt_alt_tokens_k": 2},
        {"target_prompt_logprobs": {"data": [1], "dtype": "int64"}},
        {"record_stability_info": True},
        {"prompt_logprobs_last_n": 3, "prompt_logprobs": True},
        {"prompt": {"chunks": [{"type": "image", "data": "x"}]}},
        {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [-1]}]}},
    ]
    for changes in bad:
        answer = await one.send("/asample", sample_of(sampler, seq_id=99, **changes))
        assert answer.status_code == 400, changes
    outside = {"chunks": [{"type": "encoded_text", "tokens": [MODEL_INFO.vocab_size]}]}
    promise = await one.ask("/asample", sample_of(sampler, seq_id=98, prompt=outside))
    assert (await one.result(promise))["category"] == "user"


async def test_each_token_sees_only_its_own_objects(tmp_path: Path) -> None:
    trains = frozenset(("training",))
    tokens = TokenTable([("tml-a", trains), ("tml-b", trains), ("tml-c", frozenset(("admin",)))])
    async with tenant(tmp_path, tokens=tokens) as anybody:
        assert (await anybody.send("/create_session", {})).status_code == 401
        c = Tenant(anybody.client, {"x-api-key": "tml-c"})
        assert (await c.send("/create_session", {})).status_code == 403
        a, b = (Tenant(anybody.client, {"x-api-key": f"tml-{name}"}) for name in "ab")
        await a.begin()
        await b.begin()
        model_id = await a.model()
        save = {"model_id": model_id, "seq_id": 1, "path": "mine"}
        promise = await a.ask("/save_weights", save)
        path = (await a.result(promise))["path"]
        sampler_id = await a.sampler()
        asked = {"request_id": promise["request_id"]}
        assert (await b.send("/retrieve_future", asked)).status_code == 410
        assert (await b.send("/session_heartbeat", {"session_id": a.session})).status_code == 410
        assert (await b.send("/get_info", {"model_id": model_id})).status_code == 404
        assert (await b.send("/weights_info", {"tinker_path": path})).status_code == 404
        assert (await b.send("/asample", sample_of(sampler_id))).status_code == 404
        theft = {"session_id": b.session, "sampling_session_seq_id": 0, "model_path": path}
        assert (await b.send("/create_sampling_session", theft)).status_code == 404
        load = {"session_id": b.session, "model_seq_id": 0, "path": path, "optimizer": True}
        assert (await b.send("/load_weights", load)).status_code == 404
        url = f"/training_runs/{model_id}/checkpoints/weights/mine"
        for verb, end, body in (
            ("DELETE", "", None),
            ("PUT", "/ttl", {"ttl_seconds": 5000}),
            ("GET", "/archive", None),
        ):
            answer = await b.send(f"{url}{end}", body, verb=verb)
            assert answer.status_code == 404, verb
        assert (await b.ask("/checkpoints", verb="GET"))["checkpoints"] == []
        assert (await b.ask("/training_runs", verb="GET"))["training_runs"] == []
        listed = await a.ask("/checkpoints", verb="GET")
        assert [each["tinker_path"] for each in listed["checkpoints"]] == [path]
        await a.ask(url, verb="DELETE")
        assert (await a.ask("/checkpoints", verb="GET"))["checkpoints"] == []


async def test_names_of_checkpoints_are_checked(tmp_path: Path) -> None:
    async with tenant(tmp_path / "training") as one:
        model_id = await one.model()
        for number, name in enumerate(
            ("../a", "a/b", "..", ".", "", "a\0", "x" * 65, "-"), start=1
        ):
            said = await one.save(model_id, number, name)
            if name:
                assert said["category"] == "user", name
        assert names_in(tmp_path, "*") == ["training"]
        # The largest number that a model may have is a part of its checkpoints' paths.
        assert "path" in await one.save(await one.model((1 << 31) - 1), 1, "a")
        for path in (
            "tinker://../../x/weights/a",
            f"tinker://{model_id}/weights/../a",
            "/etc/passwd",
        ):
            answer = await one.send("/weights_info", {"tinker_path": path})
            assert answer.status_code == 404


async def test_limits_on_sessions_models_and_samplers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MAX_SESSIONS", "MAX_MODELS", "MAX_SAMPLERS"):
        monkeypatch.setattr(sessions, name, 2)
    async with tenant(tmp_path) as one:
        await one.begin()
        assert (await one.send("/create_session", {})).status_code == 429
        model_id = await one.model(0)
        await one.model(1)
        body = {"session_id": one.session, "model_seq_id": 2, "base_model": "base"}
        assert (await one.send("/create_model", body | {"lora_config": LORA})).status_code == 429
        made = []
        for number in range(4):
            save = {"model_id": model_id, "seq_id": 1 + number, "sampling_session_seq_id": number}
            result = await one.done("/save_weights_for_sampler", save)
            made.append(result["sampling_session_id"])
        # The least recently used samplers made room, and their adapters are gone.
        await one.tenants.sessions.close()
        assert len(one.tables.published) == 2
        for sampler, status in zip(made, (404, 404, 200, 200), strict=True):
            assert (await one.send("/asample", sample_of(sampler))).status_code == status
        # A sampler with the number of another one replaces it.
        for number, kind in enumerate(("snapshot", "inflight"), start=5):
            save = {"model_id": model_id, "seq_id": number, "sampling_session_seq_id": 3}
            await one.done("/save_weights_for_sampler", {**save, "kind": kind})
        await one.tenants.sessions.close()
        assert len(one.tables.published) == 2
        await one.done("/unload_model", {"model_id": model_id})
        assert (await one.send("/create_model", body | {"lora_config": LORA})).status_code == 200
        await one.ask(f"/sessions/{one.session}/finish", {"reason": {"type": "success"}})
        await one.tenants.sessions.close()
        assert (one.tables.learners, one.tables.published) == ({}, {})


async def test_a_token_fills_no_more_than_its_share_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken() -> int:
        return sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())

    def usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=room - taken())

    tokens = TokenTable((name, frozenset(("training",))) for name in ("a", "b"))
    async with tenant(tmp_path, tokens=tokens) as server:
        a, b = (Tenant(server.client, {"authorization": f"Bearer {name}"}) for name in ("a", "b"))
        await a.begin()
        await b.begin()
        mine, other = await a.model(), await b.model()
        path = (await a.save(mine, 1, "first", "_external"))["path"]
        room = 20 * taken()
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", usage)
        # The token's share is five times the first checkpoint: two checkpoints, and samplers, of
        # which one always uses the newest weights.
        refused = []
        for number in range(2, 10):
            if number == 2:
                said = await a.save(mine, number, "second", "_external")
            else:
                kind = "inflight" if number == 3 else "snapshot"
                sampler = {"sampling_session_seq_id": number, "kind": kind}
                said = await a.save(mine, number, None, "_for_sampler", **sampler)
            refused.append(said.get("category"))
        assert refused[:4] == [None] * 4
        assert refused[6:] == ["user"] * 2
        body = {"session_id": a.session, "sampling_session_seq_id": 99, "model_path": path}
        assert (await a.send("/create_sampling_session", body)).status_code == 400
        assert "path" in await b.save(other, 1, "first", "_external")


async def test_samplers_of_a_token_are_written_one_after_another(
    one: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is checked against the token's share of the disk after the previous ones are counted."""
    path = (await one.save(await one.model(), 1, "a", "_external"))["path"]
    serve, used = one.tables.serve, list[int]()
    sessions_of = one.tenants.sessions

    async def slow(*args: Any) -> Any:
        used.append(sessions_of.bytes_by_owner[""])
        await asyncio.sleep(0)
        return await serve(*args)

    monkeypatch.setattr(one.tables, "serve", slow)
    await asyncio.gather(*(one.sampler(number, model_path=path) for number in range(4)))
    assert used == [number * used[1] for number in range(4)]
    assert used[1] > 0


async def test_waiting_passes_take_no_more_memory_than_their_bodies(one: Served) -> None:
    message = pass_of(await one.model(), 1, tokens=[1])
    del message.data[0].loss_fn_inputs["weights"]
    message.data.extend([message.data[0]] * 1023)
    sent, before = 0, 0
    # Without its predecessor, no command runs.
    for number in range(2, 130):
        message.seq_id = number
        body = message.SerializeToString()
        await one.ask("/forward_backward", body)
        if number == 10:
            before = Process().memory_info().rss
        sent += len(body) if number > 10 else 0
    assert Process().memory_info().rss - before < 2 * sent + (16 << 20)


async def test_waiting_commands_keep_no_ignored_field(one: Served) -> None:
    body = {"model_id": await one.model(), "adam_params": {}, "type": ["optim_step"] * 200_000}
    before = 0
    # Without its predecessor, no command runs.
    for number in range(2, 80):
        await one.ask("/optim_step", body | {"seq_id": number})
        if number == 10:
            before = Process().memory_info().rss
    assert Process().memory_info().rss - before < 32 << 20


async def test_a_session_that_ends_while_a_sampler_is_created_leaves_none(
    one: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_id = await one.model()
    training = one.tables
    path = (await one.save(model_id, 1, "a"))["path"]
    kept = one.session
    for make in ("publish", "serve"):
        await one.begin()
        number, is_making, may_end = int(make == "serve"), asyncio.Event(), asyncio.Event()
        plain = getattr(training, make)

        async def slow(*args: Any, is_making=is_making, may_end=may_end, plain=plain) -> int:
            is_making.set()
            await may_end.wait()
            return await plain(*args)

        monkeypatch.setattr(training, make, slow)
        if make == "publish":
            body = {"model_id": await one.model(), "seq_id": 1, "sampling_session_seq_id": 0}
            asked = one.send("/save_weights_for_sampler", body)
        else:
            body = {"session_id": one.session, "sampling_session_seq_id": 0}
            asked = one.send("/create_sampling_session", body | {"model_path": path})
        asking = asyncio.ensure_future(asked)
        await is_making.wait()
        await one.ask(f"/sessions/{one.session}/finish", {})
        may_end.set()
        answer = await asking
        assert answer.status_code == (410 if number else 200)
        await one.tenants.sessions.close()
        assert training.published == {}, make
    one.session = kept


@pytest.mark.parametrize("make", ["serve", "load"])
async def test_a_checkpoint_that_is_removed_while_it_is_read_is_not_found(
    make: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tenant(tmp_path) as one:
        model = {"model_id": await one.model()}
        save = model | {"seq_id": 1, "path": "a"}
        path = (await one.done("/save_weights", save))["path"]
        training = one.tables
        plain, is_reading, may_read = getattr(training, make), asyncio.Event(), asyncio.Event()

        async def slow(*args: Any, **options: Any) -> Any:
            is_reading.set()
            await may_read.wait()
            return await plain(*args, **options)

        monkeypatch.setattr(training, make, slow)
        if make == "serve":
            body = {"session_id": one.session, "sampling_session_seq_id": 0, "model_path": path}
            reading = asyncio.ensure_future(one.send("/create_sampling_session", body))
        else:
            body = model | {"seq_id": 2, "path": path, "optimizer": True}
            reading = asyncio.ensure_future(one.send("/load_weights", body))
        await is_reading.wait()
        run = path.removeprefix("tinker://").partition("/")[0]
        await one.ask(f"/training_runs/{run}/checkpoints/weights/a", verb="DELETE")
        may_read.set()
        answer = await reading
        if make == "serve":
            assert answer.status_code == 404
        else:
            assert (await one.result(answer.json()))["category"] == "user"


async def test_checkpoints_outlive_the_server(tmp_path: Path) -> None:
    async with tenant(tmp_path) as one:
        model_id = await one.model()
        await one.run(pass_of(model_id, 1))
        path = (await one.save(model_id, 2, "a", user_metadata={"k": "v"}))["path"]
        await one.save(model_id, 3, "b", ttl_seconds=1)
        before = await one.run(pass_of(model_id, 4, forward_only=True))
    # An unfinished checkpoint, and files of somebody else.
    (tmp_path / "incoming" / "x").mkdir()
    (tmp_path / "y" / "weights" / "z").mkdir(parents=True)
    (tmp_path / "y" / "weights" / "z" / "checkpoint.json").write_text("{}")
    await asyncio.sleep(1.0)
    async with tenant(tmp_path) as one:
        (listed,) = (await one.ask("/checkpoints", verb="GET"))["checkpoints"]
        assert (listed["tinker_path"], listed["user_metadata"]) == (path, {"k": "v"})
        load = {"session_id": one.session, "model_seq_id": 7, "path": path, "optimizer": True}
        loaded = await one.done("/load_weights", load)
        assert loaded["model_id"] == f"{one.session}:train:7"
        info = await one.ask("/get_info", {"model_id": loaded["model_id"]})
        assert info["lora_rank"] == 4
        after = await one.run(pass_of(loaded["model_id"], 1, forward_only=True))
        assert after == before
        await one.tenants.checkpoints.sweep()
        assert names_in(tmp_path, "*/weights/*") == ["a", "z"]
        other = [Checkpoints(tmp_path).find("", path).config]
        assert other == [LearnerConfig(rank=4, seed=1, unembed=True)]
        assert names_in(tmp_path, "incoming/*") == []


async def test_the_removal_of_expired_checkpoints_spares_those_saved_meanwhile(
    one: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_id = await one.model()
    for number, name in enumerate(("a", "b"), start=1):
        await one.save(model_id, number, name, ttl_seconds=1)
    await asyncio.sleep(1.0)
    is_removing, may_remove = asyncio.Event(), threading.Event()
    loop, discard = asyncio.get_running_loop(), one.tenants.checkpoints._discard

    def slow(folder: Path) -> None:
        if folder.name == "a":
            loop.call_soon_threadsafe(is_removing.set)
            may_remove.wait()
        discard(folder)

    monkeypatch.setattr(one.tenants.checkpoints, "_discard", slow)
    removing = asyncio.ensure_future(one.tenants.checkpoints.sweep())
    await is_removing.wait()
    path = (await one.save(model_id, 3, "b"))["path"]
    may_remove.set()
    await removing
    (listed,) = (await one.ask("/checkpoints", verb="GET"))["checkpoints"]
    assert listed["tinker_path"] == path
    assert names_in(tmp_path, "*/weights/*") == ["b"]


async def test_the_number_of_checkpoints_is_limited_with_expired_paths_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "MAX_CHECKPOINTS", 1)
    async with tenant(tmp_path) as one:
        model_id = await one.model()
        results = []
        for number, name in enumerate(("a", "b", "a"), start=1):
            more: dict[str, Any] = {"ttl_seconds": 1} if number == 1 else {}
            results.append(await one.save(model_id, number, name, **more))
            await asyncio.sleep(1.0 if number == 1 else 0.0)
        assert ["error" in result for result in results] == [False, False, True]
        assert results[-1]["category"] == "user"


async def test_a_checkpoint_that_a_full_disk_keeps_is_removed_later(
    one: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_id = await one.model()
    for number, name in enumerate(("a", "b", "c"), start=1):
        more: dict[str, Any] = {} if name == "c" else {"ttl_seconds": 1}
        await one.save(model_id, number, name, **more)
    await asyncio.sleep(1.0)
    discard = one.tenants.checkpoints._discard

    def full(folder: Path) -> None:
        if folder.name != "b":
            raise OSError(errno.ENOSPC, "full")
        discard(folder)

    monkeypatch.setattr(one.tenants.checkpoints, "_discard", full)
    url = f"/training_runs/{model_id}/checkpoints/weights/c"
    refused = await one.send(url, verb="DELETE")
    assert refused.json()["error"]["code"] == "storage_full"
    await one.tenants.checkpoints.sweep()
    assert names_in(tmp_path, "*/weights/*") == ["a", "c"]
    assert sum(one.tenants.checkpoints.bytes_by_owner.values()) > 0
    monkeypatch.undo()
    # A full disk has no room for a new directory, but a removal needs none.
    monkeypatch.setattr(os, "mkdir", lambda *_: full(tmp_path))
    assert len((await one.ask("/checkpoints", verb="GET"))["checkpoints"]) == 1
    await one.ask(url, verb="DELETE")
    await one.tenants.checkpoints.sweep()
    assert names_in(tmp_path, "*/weights/*") == []


async def test_the_wall_clock_ends_no_link_and_no_checkpoint(
    one: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = (await one.save(await one.model(), 1, "a", "_external", ttl_seconds=3600))["path"]
    url = f"/training_runs/{path.split('/')[2]}/checkpoints/external_weights/a"
    link = (await one.ask(f"{url}/archive", verb="GET"))["url"]
    now = time.time
    for ahead in (86_400, -86_400):
        monkeypatch.setattr(time, "time", lambda ahead=ahead: now() + ahead)
        assert (await one.client.get(link)).status_code == 200
        (listed,) = (await one.ask("/checkpoints", verb="GET"))["checkpoints"]
        assert listed["tinker_path"] == path
        # The time to live counts from now, whatever the clock shows.
        await one.ask(f"{url}/ttl", {"ttl_seconds": 3600}, verb="PUT")
    monkeypatch.setattr(time, "time", now)
    assert len((await one.ask("/checkpoints", verb="GET"))["checkpoints"]) == 1


async def test_a_command_whose_model_is_unloaded_is_no_fault_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reading, go, read = threading.Event(), threading.Event(), wire.read_pass

    def slow(*given: Any) -> Any:
        reading.set()
        go.wait(60)
        return read(*given)

    monkeypatch.setattr(wire, "read_pass", slow)
    async with tenant(tmp_path) as one:
        model_id = await one.model()
        promise = await one.ask("/forward_backward", pass_of(model_id, 1).SerializeToString())
        assert await asyncio.to_thread(reading.wait, 60)
        await one.done("/unload_model", {"model_id": model_id})
        go.set()
        assert (await one.result(promise))["category"] == "user"
    assert "internal error" not in caplog.text


async def test_a_crash_while_a_checkpoint_is_replaced_loses_none(
    one: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_id = await one.model()
    path = (await one.save(model_id, 1, "a"))["path"]
    move, left = checkpoints.move_directory, [0]

    def crash(source: Path, target: Path) -> None:
        if not left[0]:
            raise OSError("the process was killed")
        left[0] -= 1
        move(source, target)

    for number_of_moves in range(2):
        left[0] = number_of_moves
        monkeypatch.setattr(checkpoints, "move_directory", crash)
        said = await one.save(model_id, 2 + number_of_moves, "a", overwrite=True)
        monkeypatch.undo()
        assert said["category"] == "server"
        assert Checkpoints(tmp_path).find("", path).path == path
        assert names_in(tmp_path, "*/weights/*") == ["a"]
    await one.save(model_id, 4, "a", overwrite=True)
    assert names_in(tmp_path, "*/weights/*") == ["a"]


@pytest.mark.parametrize("change", ["ttl", "delete"])
async def test_a_checkpoint_that_is_saved_during_another_change_is_kept(
    one: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    model_id = await one.model()
    path = (await one.save(model_id, 1, "a", user_metadata={"is": "old"}))["path"]
    is_changing, may_change = asyncio.Event(), threading.Event()
    loop, number_of_changes = asyncio.get_running_loop(), [0]
    where, name = (checkpoints, "replace_file")
    if change == "delete":
        where, name = (one.tenants.checkpoints, "_discard")
    real = getattr(where, name)

    def slow(*given: Any) -> Any:
        number_of_changes[0] += 1
        if number_of_changes[0] == 1:
            loop.call_soon_threadsafe(is_changing.set)
            may_change.wait(60)
        return real(*given)

    monkeypatch.setattr(where, name, slow)
    url = f"/training_runs/{path.split('/')[2]}/checkpoints/weights/a"
    verb, body = ("PUT", {"ttl_seconds": 60}) if change == "ttl" else ("DELETE", None)
    url += "/ttl" if change == "ttl" else ""
    changing = asyncio.ensure_future(one.ask(url, body, verb=verb))
    await is_changing.wait()
    new = {"is": "new"}
    saving = asyncio.ensure_future(one.save(model_id, 2, "a", overwrite=True, user_metadata=new))
    # Without a lock, the new checkpoint is in its place before the other change continues.
    await asyncio.wait([saving], timeout=0.5)
    may_change.set()
    await asyncio.gather(changing, saving)
    for found in (one.tenants.checkpoints, Checkpoints(tmp_path)):
        assert (found.find("", path).metadata, found.find("", path).expires) == (new, None)


async def test_links_cannot_be_changed_and_end_with_their_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = TokenTable([("a", frozenset(("training",)))])
    async with tenant(tmp_path, tokens=tokens) as anybody:
        one, client = Tenant(anybody.client, {"x-api-key": "a"}), anybody.client
        await one.begin()
        path = (await one.save(await one.model(), 1, "c", "_external"))["path"]
        url = f"/training_runs/{path.split('/')[2]}/checkpoints/external_weights/c"
        link = (await one.ask(f"{url}/archive", verb="GET"))["url"]
        files = (await one.ask(f"{url}/external_weights_urls", verb="GET"))["urls"]
        for good in (link, *files.values()):
            assert (await client.get(good)).status_code == 200
        start, _, secret = link.rpartition("/")
        data = base64.urlsafe_b64decode(secret)
        changed = [bytes([*data[:at], data[at] ^ 1, *data[at + 1 :]]) for at in range(len(data))]
        sent = [
            base64.urlsafe_b64encode(each).decode() for each in (b"", b"a", data[:-1], *changed)
        ]
        for bad in ("a", "%ff", secret[:-1], *sent):
            assert (await client.get(f"{start}/{bad}")).status_code == 404, bad
        monkeypatch.setattr(listing, "_LINK_SECONDS", -1.0)
        late = (await one.ask(f"{url}/archive", verb="GET"))["url"]
        assert (await client.get(late)).status_code == 404
        # Downloads hold open files, so their number is limited.
        with monkeypatch.context() as patch:
            patch.setattr(listing, "MAX_EXPORTS", 0)
            assert (await client.get(link)).status_code == 429
        await one.ask(url, verb="DELETE")
        assert (await client.get(link)).status_code == 404


async def test_a_pass_of_many_sequences_keeps_their_order(one: Served) -> None:
    model_id = await one.model()
    message = pass_of(model_id, 1)
    for length in (1, 5, 2):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.arange(length).astype("<i4").tobytes()
        targets = tensor(list(range(length)), "i8")
        datum.loss_fn_inputs["target_tokens"].CopyFrom(targets)
    found = tinker_pb2.TinkerPassResult.FromString(await one.run(message))
    (record,) = found.loss_fn_outputs
    assert record.num_datums == 4
    offsets = np.frombuffer(record.fields["logprobs"].offsets, "<i8")
    assert (np.diff(offsets) // 4).tolist() == [3, 1, 5, 2]
