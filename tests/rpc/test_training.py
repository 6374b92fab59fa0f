"""The Training service over gRPC: its calls, owners, errors, and the bits of the Tinker API."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest
from method_oracle import prompt_of, twin
from psutil import Process
from servers.engine_harness import EngineHarness
from servers.fakes import MODEL_INFO
from servers.http_harness import http_harness
from servers.rpc_harness import Harness, bearer, failure_of, harness
from servers.table_training import TableTraining
from servers.tinker_tenant import Tenant, pass_of

from turret.clients import requests
from turret.clients.aio import AsyncTurretClient
from turret.clients.client import TurretClient
from turret.clients.errors import InvalidArgumentError, NotFoundError
from turret.clients.requests import TrainingDatum
from turret.server.api import futures
from turret.server.api import tenants as sessions
from turret.server.api import training as service
from turret.server.api.access import TokenTable
from turret.v1 import inference_pb2, tinker_pb2
from turret.v1 import training_pb2 as pb

Code = grpc.StatusCode
TOKENS = [1, 2, 3]
ROLES = {"ann": ["training"], "bob": ["training"], "eve": ["inference", "admin"]}
TABLE = TokenTable([(name, frozenset(roles)) for name, roles in ROLES.items()])


def new(**config: Any) -> pb.CreateModelRequest:
    return pb.CreateModelRequest(config=pb.TrainingConfig(**{"rank": 4, "seed": 1, **config}))


def asked(model: pb.TrainedModel, tokens: Sequence[int] = TOKENS, **more: Any) -> Any:
    """A pass over one sequence, whose tokens predict the following ones."""
    datum = pb.TrainingDatum(token_ids=tokens, target_ids=[*tokens[1:], tokens[0]])
    values = {"data": [datum], "loss": "cross_entropy", **more}
    return pb.ForwardBackwardRequest(model_id=model.model_id, **values)


def step(model: pb.TrainedModel, **more: Any) -> pb.OptimStepRequest:
    return pb.OptimStepRequest(model_id=model.model_id, **{"learning_rate": 1e-2, **more})


def called(token: str) -> dict[str, Any]:
    return {"metadata": bearer(token)}


@contextlib.asynccontextmanager
async def serving(folder: Path, **options: Any) -> AsyncIterator[tuple[Harness, TableTraining]]:
    tables = TableTraining(MODEL_INFO.vocab_size)
    async with harness(trainer=tables, training=folder, **options) as server:
        yield server, tables


async def test_without_training_the_service_is_unimplemented(server: Harness) -> None:
    assert (await failure_of(server.training.CreateModel(new()))).code is Code.UNIMPLEMENTED


async def test_a_model_is_trained_saved_published_and_deleted(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, tables):
        stub = server.training
        model = await stub.CreateModel(new())
        assert (model.config.method, model.config.rank, model.config.seed) == ("lora", 4, 1)
        assert (model.config.train_attn, model.config.train_mlp) == (True, True)
        losses = []
        for _ in range(3):
            passed = await stub.ForwardBackward(asked(model))
            losses.append(passed.loss)
            (result,) = passed.results
            assert passed.loss == pytest.approx(sum(result.losses))
            assert [-loss for loss in result.losses] == list(result.logprobs)
            stepped = await stub.OptimStep(step(model))
            assert stepped.grad_norm > 0
        assert losses[2] < losses[1] < losses[0]
        (only,) = tables.learners.values()
        assert only.calls == ["pass 1", "step"] * 3
        await stub.ForwardBackward(asked(model, forward_only=True))
        assert only.calls[-1] == "forward 1"

        saved = await stub.SaveCheckpoint(
            pb.SaveCheckpointRequest(model_id=model.model_id, name="a")
        )
        assert saved.has_optimizer
        assert saved.config == model.config
        assert (await stub.ListCheckpoints(pb.ListCheckpointsRequest())).checkpoints == [saved]
        again = await stub.CreateModel(new(seed=2))
        load = pb.LoadCheckpointRequest(model_id=again.model_id, path=saved.path, optimizer=True)
        await stub.LoadCheckpoint(load)
        first, second = [
            (await stub.ForwardBackward(asked(each))).results[0] for each in (model, again)
        ]
        assert first == second
        publish = pb.PublishModelRequest(model_id=model.model_id)
        await stub.PublishModel(publish)
        published = await stub.PublishModel(publish)
        assert published.adapter in tables.published
        assert published.generation == 2

        listed = await stub.ListModels(pb.ListModelsRequest())
        assert list(listed.models) == [model, again]
        await stub.DeleteModel(pb.DeleteModelRequest(model_id=model.model_id))
        await server.services.tenants.sessions.close()  # type: ignore[union-attr]
        assert (list(tables.learners), tables.published) == ([2], {})
        assert (await failure_of(stub.OptimStep(step(model)))).code is Code.NOT_FOUND
        await stub.DeleteCheckpoint(pb.DeleteCheckpointRequest(path=saved.path))
        failure = await failure_of(
            stub.DeleteCheckpoint(pb.DeleteCheckpointRequest(path=saved.path))
        )
        assert (failure.code, failure.reason) == (Code.NOT_FOUND, "TRAINING_NOT_FOUND")


async def test_invalid_input_is_reported_by_field_and_changes_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, tables):
        stub = server.training
        model = await stub.CreateModel(new())

        def datum(**fields: Any) -> list[pb.TrainingDatum]:
            given = {"token_ids": TOKENS, "target_ids": TOKENS, **fields}
            return [pb.TrainingDatum(**given)]

        long = [1] * (MODEL_INFO.max_model_len + 1)
        outside = [1, 2, MODEL_INFO.vocab_size]
        nan, inf = float("nan"), float("inf")
        sampled = {"logprobs": [0.0] * 3, "advantages": [1.0] * 3}
        bad: list[tuple[dict[str, Any], str]] = [
            ({"data": []}, "data"),
            ({"data": datum() * 1025}, "data"),
            ({"loss": "gspo"}, "loss"),
            ({"loss_config": {"beta": 1.0}}, "loss_config.beta"),
            (
                {"loss": "dro", "data": datum(**sampled), "loss_config": {"beta": nan}},
                "loss_config.beta",
            ),
            ({"data": datum(token_ids=[])}, "data[0].token_ids"),
            ({"data": datum(token_ids=long, target_ids=long)}, "data[0].token_ids"),
            ({"data": datum(token_ids=outside)}, "data[0].token_ids[2]"),
            ({"data": datum(target_ids=outside)}, "data[0].target_ids[2]"),
            ({"data": datum(target_ids=[1, 2])}, "data[0].target_ids"),
            ({"data": datum(weights=[1.0])}, "data[0].weights"),
            ({"data": datum(weights=[1.0, nan, 1.0])}, "data[0].weights"),
            ({"loss": "ppo"}, "data[0].logprobs"),
            ({"data": [*datum(), *datum(weights=[inf] * 3)]}, "data[1].weights"),
        ]
        for changes, field in bad:
            failure = await failure_of(stub.ForwardBackward(asked(model, **changes)))
            assert (failure.code, set(failure.violations)) == (Code.INVALID_ARGUMENT, {field})
        for changes, field in (
            ({"learning_rate": -1.0}, "learning_rate"),
            ({"learning_rate": nan}, "learning_rate"),
            ({"beta1": 1.0}, "beta1"),
            ({"eps": 0.0}, "eps"),
            ({"grad_clip_norm": -1.0}, "grad_clip_norm"),
        ):
            failure = await failure_of(stub.OptimStep(step(model, **changes)))
            assert (failure.code, set(failure.violations)) == (Code.INVALID_ARGUMENT, {field})
        save = pb.SaveCheckpointRequest(model_id=model.model_id, name="../a")
        assert set((await failure_of(stub.SaveCheckpoint(save))).violations) == {"name"}
        failure = await failure_of(stub.CreateModel(new(method="mystery")))
        assert all(field.startswith("config.") for field in failure.violations)
        failure = await failure_of(stub.CreateModel(new(targets=["q_proj"] * 65)))
        assert set(failure.violations) == {"config.targets"}
        (only,) = tables.learners.values()
        assert only.calls == []


async def test_a_token_needs_the_role_and_sees_only_its_own(tmp_path: Path) -> None:
    async with serving(tmp_path, tokens=TABLE) as (server, _):
        stub = server.training
        assert (await failure_of(stub.CreateModel(new()))).code is Code.UNAUTHENTICATED
        refused = stub.CreateModel(new(), **called("eve"))
        assert (await failure_of(refused)).code is Code.PERMISSION_DENIED
        model = await stub.CreateModel(new(), **called("ann"))
        save = pb.SaveCheckpointRequest(model_id=model.model_id, name="a")
        saved = await stub.SaveCheckpoint(save, **called("ann"))
        export = pb.ExportCheckpointRequest(path=saved.path)
        for call in (
            stub.ForwardBackward(asked(model), **called("bob")),
            stub.DeleteModel(pb.DeleteModelRequest(model_id=model.model_id), **called("bob")),
            stub.DeleteCheckpoint(pb.DeleteCheckpointRequest(path=saved.path), **called("bob")),
            anext(aiter(stub.ExportCheckpoint(export, **called("bob")))),
        ):
            assert (await failure_of(call)).code is Code.NOT_FOUND
        assert not (await stub.ListModels(pb.ListModelsRequest(), **called("bob"))).models
        listed = await stub.ListCheckpoints(pb.ListCheckpointsRequest(), **called("bob"))
        assert not listed.checkpoints


async def test_exceeded_quotas_are_errors_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MAX_MODELS", 1)
    monkeypatch.setattr(futures, "MAX_COMMANDS", 1)
    async with serving(tmp_path) as (server, tables):
        stub = server.training
        model = await stub.CreateModel(new())
        failure = await failure_of(stub.CreateModel(new()))
        assert (failure.code, failure.reason) == (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert list((await stub.ListModels(pb.ListModelsRequest())).models) == [model]
        save = pb.SaveCheckpointRequest(model_id=model.model_id, name="a")
        export = pb.ExportCheckpointRequest(path=(await stub.SaveCheckpoint(save)).path)
        assert [part async for part in stub.ExportCheckpoint(export)]
        monkeypatch.setattr(service, "MAX_EXPORTS", 0)
        failure = await failure_of(anext(aiter(stub.ExportCheckpoint(export))))
        assert failure.code is Code.RESOURCE_EXHAUSTED
        tables.may_run.clear()
        # The first call runs and the second waits, so the third is rejected.
        calls = [asyncio.ensure_future(stub.ForwardBackward(asked(model))) for _ in range(3)]
        rejected, left = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        failure = await failure_of(rejected.pop())
        assert failure.code is Code.RESOURCE_EXHAUSTED
        tables.may_run.set()
        await asyncio.gather(*left)
        (only,) = tables.learners.values()
        assert only.calls == ["save", "pass 1", "pass 1"]


async def test_waiting_passes_take_no_more_memory_than_their_bytes(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, tables):
        stub, grown = server.training, list[int]()
        for count in (1, 1, 1024):
            model = await stub.CreateModel(new())
            datum = pb.TrainingDatum(token_ids=[1], target_ids=[1])
            message = asked(model, data=[datum] * count)
            before = Process().memory_info().rss
            tables.may_run.clear()
            calls = [stub.ForwardBackward(message) for _ in range(300)]
            (one,) = server.services.tenants.sessions.models("")  # type: ignore[union-attr]
            while one.log.next_number <= 300:
                await stub.ListModels(pb.ListModelsRequest())
            grown.append(Process().memory_info().rss - before)
            await stub.DeleteModel(pb.DeleteModelRequest(model_id=model.model_id))
            tables.may_run.set()
            await asyncio.gather(*calls, return_exceptions=True)
        # The first calls allocate memory that later ones reuse or return to the system.
        assert grown[2] - max(grown[1], 0) < 3 * 300 * message.ByteSize() + (8 << 20)


async def test_commands_whose_clients_disconnected_keep_no_message(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, tables):
        stub = server.training
        model = await stub.CreateModel(new())
        tables.may_run.clear()
        passing = asyncio.ensure_future(stub.ForwardBackward(asked(model)))
        named = {"model_id": model.model_id}
        for call, field in (
            (stub.SaveCheckpoint(pb.SaveCheckpointRequest(**named, name="n" * 257)), "name"),
            (stub.LoadCheckpoint(pb.LoadCheckpointRequest(**named, path="p" * 257)), "path"),
        ):
            assert list((await failure_of(call)).violations) == [field]
        # A field that the server does not know, with 1 MiB.
        unknown = b"\xfa\x7f\x80\x80\x40" + bytes(1 << 20)
        plain = pb.SaveCheckpointRequest(**named, name="n").SerializeToString()
        message = pb.SaveCheckpointRequest.FromString(plain + unknown)
        (one,) = server.services.tenants.sessions.models("")  # type: ignore[union-attr]
        before = 0
        for count in range(120):
            number = one.log.next_number
            call = stub.SaveCheckpoint(message)
            while one.log.next_number == number:
                await stub.ListModels(pb.ListModelsRequest())
            call.cancel()
            if count == 20:
                before = Process().memory_info().rss
        assert Process().memory_info().rss - before < 32 << 20
        tables.may_run.set()
        await passing


async def test_a_call_whose_client_disconnected_runs_to_its_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, tables):
        stub = server.training
        model = await stub.CreateModel(new())
        tables.may_run.clear()
        call = stub.ForwardBackward(asked(model))
        await asyncio.sleep(0.2)
        call.cancel()
        stepping = asyncio.ensure_future(stub.OptimStep(step(model)))
        await asyncio.sleep(0.1)
        tables.may_run.set()
        assert (await stepping).grad_norm > 0
        (only,) = tables.learners.values()
        assert only.calls == ["pass 1", "step"]


async def test_an_idle_model_is_dropped_but_not_one_with_an_open_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "IDLE_SECONDS", 0.3)
    monkeypatch.setattr(service, "_LOOK_SECONDS", 0.02)
    async with serving(tmp_path) as (server, tables):
        tenants = server.services.tenants
        assert tenants is not None
        stub = server.training
        model = await stub.CreateModel(new())
        tables.may_run.clear()
        passing = asyncio.ensure_future(stub.ForwardBackward(asked(model)))
        await asyncio.sleep(0.6)
        tenants.sessions.sweep()
        tables.may_run.set()
        assert (await passing).results
        await asyncio.sleep(0.4)
        tenants.sessions.sweep()
        assert (await failure_of(stub.OptimStep(step(model)))).code is Code.NOT_FOUND
        await tenants.sessions.close()
        assert not tables.learners


async def test_both_protocols_give_the_same_bits_and_share_checkpoints(tmp_path: Path) -> None:
    import torch

    folder, state = twin("llama", torch.bfloat16).folder, tmp_path / "state"
    async with (
        EngineHarness.start(folder, dtype="bfloat16", state_dir=state, training=True) as engine,
        harness(backend=engine.backend, training=state / "training") as server,
        http_harness(fakes=server, serving=False) as http,
    ):
        http.client.timeout = 60
        await _compare(server, Tenant(http.client, {}))


async def _compare(server: Harness, tinker: Tenant) -> None:
    stub, text = server.training, prompt_of(24, 1)
    await tinker.begin()
    lora = {"rank": 4, "seed": 1, "train_unembed": False}
    other = await tinker.model(lora_config=lora)
    model = await stub.CreateModel(new())
    adam = {"learning_rate": 1e-2}
    for number in range(1, 5, 2):
        found = await tinker.run(pass_of(other, number, tokens=text))
        fields = tinker_pb2.TinkerPassResult.FromString(found).loss_fn_outputs[0].fields
        (result,) = (await stub.ForwardBackward(asked(model, text))).results
        assert np.array(result.logprobs, "<f4").tobytes() == fields["logprobs"].data
        assert np.array(result.losses, "<f4").tobytes() == fields["elementwise_loss"].data
        body = {"model_id": other, "seq_id": number + 1, "adam_params": adam}
        metrics = (await tinker.done("/optim_step", body))["metrics"]
        assert (await stub.OptimStep(step(model))).grad_norm == metrics["grad_norm"]
    tenants = server.services.tenants
    assert tenants is not None
    saved = await stub.SaveCheckpoint(pb.SaveCheckpointRequest(model_id=model.model_id, name="a"))
    path = (await tinker.save(other, 5, "b"))["path"]
    files = [
        (tenants.checkpoints.folder(tenants.checkpoints.find("", each)) / name).read_bytes()
        for each in (saved.path, path)
        for name in ("adapter_model.safetensors", "optimizer.safetensors")
    ]
    assert files[:2] == files[2:]
    # Each protocol continues from what the other has saved, but does not know the other's models.
    await stub.LoadCheckpoint(
        pb.LoadCheckpointRequest(model_id=model.model_id, path=path, optimizer=True)
    )
    load = {"model_id": other, "seq_id": 6, "path": saved.path, "optimizer": True}
    assert (await tinker.done("/load_weights", load))["path"] == saved.path
    assert (
        await failure_of(stub.OptimStep(pb.OptimStepRequest(model_id=other)))
    ).code is Code.NOT_FOUND
    body = {"model_id": model.model_id, "seq_id": 1, "adam_params": adam}
    assert (await tinker.send("/optim_step", body)).status_code == 404

    published = await stub.PublishModel(pb.PublishModelRequest(model_id=model.model_id))
    scored = inference_pb2.ScoreRequest(token_ids=inference_pb2.TokenIds(ids=text))
    scored.adapters.add(name=published.adapter, generation=published.generation)
    tokens = (await server.inference.Score(scored)).tokens
    (result,) = (await stub.ForwardBackward(asked(model, text, forward_only=True))).results
    assert [token.logprob for token in tokens[1:]] == list(result.logprobs[:-1])
    await stub.DeleteModel(pb.DeleteModelRequest(model_id=model.model_id))
    await tenants.sessions.close()
    assert (await failure_of(server.inference.Score(scored))).code is Code.NOT_FOUND


async def test_the_python_clients_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_MOST_TOKENS", 5)
    monkeypatch.setattr(service, "_PIECE_BYTES", 100)
    data = [TrainingDatum([1, 2, 3], [2, 3, 1]), TrainingDatum([4, 5], [5, 4], weights=[0.5, 1.0])]
    async with serving(tmp_path) as (server, tables):

        def blocking() -> list[Any]:
            with TurretClient(server.rpc.address) as client:
                training = client.training
                made = training.create_model(rank=4, seed=1, alpha=8.0, targets=["q_proj"])
                assert (made.config.alpha, made.config.targets) == (8.0, ("q_proj",))
                passed = training.forward_backward(made.model_id, data * 2)
                stepped = training.optim_step(made.model_id, learning_rate=1e-2)
                saved = training.save_checkpoint(made.model_id, "a")
                assert training.list_checkpoints() == (saved,)
                training.load_checkpoint(made.model_id, saved.path)
                training.export_checkpoint(saved.path, tmp_path / "out")
                written = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
                (folder,) = tmp_path.glob("**/weights/a")
                names = ("adapter_config.json", "adapter_model.safetensors")
                assert written == {name: (folder / name).read_bytes() for name in names}
                with pytest.raises(FileExistsError):
                    training.export_checkpoint(saved.path, tmp_path / "out")
                member = training.publish_model(made.model_id)
                assert (member.name in tables.published, member.generation) == (True, 1)
                training.delete_checkpoint(saved.path)
                assert training.list_models() == (made,)
                training.delete_model(made.model_id)
                with pytest.raises(NotFoundError):
                    training.optim_step(made.model_id, learning_rate=1e-2)
                return [made.config, passed, stepped]

        async def asynchronous() -> list[Any]:
            async with AsyncTurretClient(server.rpc.address) as client:
                training = client.training
                made = await training.create_model(rank=4, seed=1, alpha=8.0, targets=["q_proj"])
                passed = await training.forward_backward(made.model_id, data * 2)
                stepped = await training.optim_step(made.model_id, learning_rate=1e-2)
                with pytest.raises(InvalidArgumentError):
                    await training.optim_step(made.model_id, learning_rate=-1.0)
                wrongs: list[Any] = [[[1]], "abc", [TrainingDatum(cast("Any", ["a"]), [1])]]
                for wrong in wrongs:
                    with pytest.raises(TypeError):
                        await training.forward_backward(made.model_id, wrong)
                return [made.config, passed, stepped]

        found = await asyncio.to_thread(blocking)
        config, passed, _ = found
        assert (config.rank, config.seed, config.method) == (4, 1, "lora")
        assert len(passed.results) == 4
        assert passed.results[:2] == passed.results[2:]
        assert passed.results[1].losses[0] == pytest.approx(-0.5 * passed.results[1].logprobs[0])
        assert passed.loss == pytest.approx(sum(sum(each.losses) for each in passed.results))
        assert await asynchronous() == found
        (left,) = tables.learners.values()
        # Five tokens fit into a request.
        assert left.calls == ["pass 2", "pass 2", "step"]
