"""Adapters that are trained by the engine that serves them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from method_oracle import prompt_of, twin
from safetensors.torch import load_file, save_file
from servers.engine_harness import EngineHarness, make_request

from turret.server.adapters.adapter import TENSORS_FILE, AdapterRef
from turret.server.adapters.leases import Leases
from turret.server.adapters.operators.adapter_operators import AdapterOperators
from turret.server.adapters.operators.vocabulary import HEAD
from turret.server.engine.scheduling.request import SamplingParams
from turret.server.engine.step.runner import Runner, StepResult
from turret.server.errors import (
    AdapterCheckpointError,
    BudgetExceededError,
    InvalidRequestError,
    UnavailableError,
)
from turret.server.training import METHODS, AdamParams, Datum, LearnerConfig, Published, service
from turret.server.training import learner as learner_module
from turret.server.training.learner import num_bytes
from turret.server.training.service import TrainingService
from turret.server.training.training_pass import TrainingPass

ADAM = AdamParams(learning_rate=3e-2)


@contextlib.asynccontextmanager
async def started(
    tmp_path: Path, dtype: str = "bfloat16", **options: Any
) -> AsyncIterator[tuple[EngineHarness, TrainingService]]:
    folder = twin("llama", getattr(torch, dtype)).folder
    async with EngineHarness.start(
        folder, dtype=dtype, state_dir=tmp_path / "state", training=True, **options
    ) as harness:
        training = harness.backend.training
        assert training is not None
        yield harness, training


def learned(tokens: Sequence[int]) -> Datum:
    """A text whose every token is learned."""
    return Datum(
        tokens[:-1],
        {
            "target_tokens": torch.tensor(tokens[1:]),
            "weights": torch.ones(len(tokens) - 1),
        },
    )


def texts(seed: int, count: int = 6) -> list[list[int]]:
    return [prompt_of(20 + 9 * n, seed + n) for n in range(count)]


@pytest.mark.parametrize("method", METHODS)
async def test_a_trained_adapter_is_served_with_the_bits_of_its_training(
    method: str, tmp_path: Path
) -> None:
    data = [learned(text) for text in texts(1)]
    async with started(tmp_path) as (harness, training):
        learner = await training.create(
            LearnerConfig(method=method, rank=4, seed=1, unembed=method == "lora")
        )
        losses = []
        for _ in range(8):
            found = await training.pass_over(learner, data, "cross_entropy", {})
            losses.append(sum(float(each.losses.sum()) for each in found))
            # A new soft prompt is far from the prompts that the model knows.
            rate = 0.3 if method == "prompt_tuning" else 1e-2
            await training.step(learner, AdamParams(learning_rate=rate))
        assert losses[-1] < 0.95 * losses[0], losses
        await training.publish(learner, "new")
        found = await training.pass_over(learner, data, "cross_entropy", {}, is_forward_only=True)
        for datum, each, text in zip(data, found, texts(1), strict=True):
            answer = await harness.run(make_request(text, "new", score=True))
            assert answer.prompt_logprobs[1:] == tuple(each.logprobs.tolist()), len(datum.tokens)


@pytest.mark.usefixtures("coarse_tiles")
async def test_adapters_are_trained_and_served_on_the_gpu_path(tmp_path: Path) -> None:
    """Two adapters train at once, each with the bytes that it has alone."""
    data = [learned(text) for text in texts(1, count=2)]

    async def trained(*seeds: int) -> list[dict[str, torch.Tensor]]:
        state = tmp_path / "-".join(map(str, seeds))
        async with started(state, "float32", gpu=True) as (harness, training):
            learners = [await training.create(LearnerConfig(rank=4, seed=n)) for n in seeds]
            losses = []
            for _ in range(3):
                passes = [training.pass_over(n, data, "cross_entropy", {}) for n in learners]
                found = await asyncio.gather(*passes)
                losses.append(sum(float(each.losses.sum()) for each in found[0]))
                for learner in learners:
                    await training.step(learner, ADAM)
            assert losses[-1] < 0.95 * losses[0]
            await training.publish(learners[0], "new")
            found = await training.pass_over(
                learners[0], data, "cross_entropy", {}, is_forward_only=True
            )
            answer = await harness.run(make_request(texts(1)[0], "new", score=True))
            expected = pytest.approx(found[0].logprobs.tolist(), abs=1e-3)
            assert answer.prompt_logprobs[1:] == expected
            for number, learner in enumerate(learners):
                (state / str(number)).mkdir()
                await training.save(learner, state / str(number), with_optimizer=False)
            return [load_file(state / str(n) / TENSORS_FILE) for n in range(len(seeds))]

    together = await trained(1, 2)
    (alone,) = await trained(2)
    assert alone.keys() == together[1].keys()
    for name, tensor in alone.items():
        assert torch.equal(tensor, together[1][name]), name


async def test_a_sampled_token_has_the_logprob_of_training(tmp_path: Path) -> None:
    async with started(tmp_path) as (harness, training):
        learner = await training.create(LearnerConfig(rank=4, seed=1))
        await training.pass_over(learner, [learned(prompt_of(30))], "cross_entropy", {})
        await training.step(learner, ADAM)
        await training.publish(learner, "new")
        prompt = prompt_of(12, 5)
        sampling = SamplingParams(temperature=1.0, seed=3)
        answer = await harness.run(make_request(prompt, "new", max_tokens=20, sampling=sampling))
        whole = [*prompt, *answer.token_ids]
        (found,) = await training.pass_over(
            learner, [learned(whole)], "cross_entropy", {}, is_forward_only=True
        )
        assert found.logprobs[len(prompt) - 1 :].tolist() == list(answer.logprobs)


async def train(training: TrainingService, method: str, seed: int, folder: Path) -> bytes:
    """Train a new adapter; returns the bytes of its file."""
    config = LearnerConfig(method=method, rank=4, seed=seed, unembed=method == "lora")
    learner = await training.create(config)
    for _ in range(2):
        data = [learned(text) for text in texts(seed)]
        await training.pass_over(learner, data, "cross_entropy", {})
        await training.step(learner, ADAM)
    await asyncio.to_thread(folder.mkdir)
    await training.save(learner, folder, with_optimizer=True)
    return (folder / "adapter_model.safetensors").read_bytes()


async def test_other_adapters_change_no_byte_of_the_result(tmp_path: Path) -> None:
    methods = list(enumerate(("lora", "dora", "ia3", "prompt_tuning")))
    # There is no room for two adapters, so requests evict those in training.
    async with started(tmp_path, adapter_device_bytes=60_000) as (harness, training):
        alone = [await train(training, method, n, tmp_path / method) for n, method in methods]
        for name in ("a", "b"):
            learner = await training.create(LearnerConfig(rank=2))
            await training.publish(learner, name)
        is_over = asyncio.Event()

        async def ask() -> int:
            count = 0
            while not is_over.is_set():
                request = make_request(prompt_of(9), "ab"[count % 2], max_tokens=3)
                await harness.run(request)
                count += 1
            return count

        asking = asyncio.create_task(ask())
        together = await asyncio.gather(
            *(train(training, method, n, tmp_path / f"{method}2") for n, method in methods)
        )
        is_over.set()
        assert await asking > 3
    assert alone == list(together)


async def test_a_resumed_adapter_ends_with_the_same_bytes(tmp_path: Path) -> None:
    data = [learned(text) for text in texts(2)]
    half, whole, resumed = (tmp_path / name for name in ("half", "whole", "resumed"))
    for folder in (half, whole, resumed):
        folder.mkdir()

    async def go_on(training: TrainingService, learner: int) -> None:
        await training.pass_over(learner, data, "cross_entropy", {})
        await training.step(learner, ADAM)

    async with started(tmp_path) as (_, training):
        first = await training.create(LearnerConfig(rank=4, seed=1))
        await go_on(training, first)
        await training.save(first, half, with_optimizer=True)
        await go_on(training, first)
        await training.save(first, whole, with_optimizer=True)
        second = await training.create(LearnerConfig(rank=4, seed=2))
        await training.load(second, half, with_optimizer=True)
        await go_on(training, second)
        await training.save(second, resumed, with_optimizer=True)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


async def test_a_checkpoint_that_is_replaced_while_it_is_read_is_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = learner_module.load_file
    first, second, loaded = (tmp_path / name for name in ("first", "second", "loaded"))
    for folder in (first, second, loaded):
        folder.mkdir()

    def replaced_after(path: Path) -> dict[str, torch.Tensor]:
        tensors = read(path)
        if second.exists():
            first.rename(tmp_path / "gone")
            second.rename(first)
        return tensors

    async with started(tmp_path) as (_, training):
        learner = await training.create(LearnerConfig(rank=4, seed=1))
        for folder in (first, second):
            await training.pass_over(learner, [learned(texts(2)[0])], "cross_entropy", {})
            await training.step(learner, ADAM)
            await training.save(learner, folder, with_optimizer=True)
        monkeypatch.setattr(learner_module, "load_file", replaced_after)
        await training.load(learner, first, with_optimizer=True)
        await training.save(learner, loaded, with_optimizer=True)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (loaded / name).read_bytes() == (tmp_path / "gone" / name).read_bytes()


async def test_requests_run_within_a_pass(tmp_path: Path) -> None:
    async with started(tmp_path) as (harness, training):
        learner = await training.create(LearnerConfig(rank=4, seed=1))
        alone = await harness.run(make_request(prompt_of(9), max_tokens=40))
        ended: list[str] = []

        async def train() -> None:
            data = [learned(prompt_of(200, n)) for n in range(12)]
            await training.pass_over(learner, data, "cross_entropy", {})
            ended.append("training")

        async def ask() -> None:
            answer = await harness.run(make_request(prompt_of(9), max_tokens=40))
            assert answer.token_ids == alone.token_ids
            assert answer.logprobs == alone.logprobs
            ended.append("request")

        await asyncio.gather(train(), *(ask() for _ in range(3)))
        assert ended[-1] == "training", ended


async def test_work_that_cannot_be_interrupted_gets_no_more_than_its_share(tmp_path: Path) -> None:
    async with started(tmp_path) as (harness, _):
        begun: list[float] = []

        def work(between: Callable[[], None]) -> None:
            begun.append(time.monotonic())
            time.sleep(0.1)

        async def train() -> None:
            while True:
                await asyncio.wrap_future(harness.backend.engine.run_background(work))

        training = [asyncio.ensure_future(train()) for _ in range(2)]
        start = time.monotonic()
        await harness.run(make_request(prompt_of(9), max_tokens=200))
        seconds = time.monotonic() - start
        for each in training:
            each.cancel()
        # The work that waits when the request arrives runs before it.
        assert 0.1 * sum(each > start + 0.1 for each in begun) < 0.15 * seconds + 0.2


async def test_a_pass_that_fails_fails_no_other_adapter(tmp_path: Path) -> None:
    text = prompt_of(20)
    inputs = {"logprobs": torch.zeros(19), "advantages": torch.ones(19)}
    faulty = Datum(text[:-1], {"target_tokens": torch.tensor(text[1:]), **inputs})
    async with started(tmp_path) as (_, training):
        learners = [await training.create(LearnerConfig(rank=4, seed=n)) for n in range(3)]
        fine = [training.pass_over(n, [learned(text)], "cross_entropy", {}) for n in learners[1:]]
        # torch cannot convert this number to float32, and raises an error.
        fault = training.pass_over(learners[0], [faulty], "ppo", {"clip_high_threshold": 1e308})
        failed, *found = await asyncio.gather(fault, *fine, return_exceptions=True)
        assert isinstance(failed, RuntimeError)
        for learner, result in zip(learners[1:], found, strict=True):
            assert isinstance(result, list), result
            assert (await training.step(learner, ADAM))["grad_norm"] > 0.0


async def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    text = prompt_of(20)
    async with started(tmp_path) as (_, training):
        learner = await training.create(LearnerConfig(rank=4, seed=1))
        data, huge = learned(text), learned(text)
        huge.inputs["weights"].fill_(3e38)
        before = await training.pass_over(learner, [data], "cross_entropy", {})
        expected = await training.step(learner, AdamParams(learning_rate=0.0))
        for given in ([huge], [data, huge]):
            await training.pass_over(learner, given, "cross_entropy", {})
            with pytest.raises(InvalidRequestError):
                await training.step(learner, ADAM)
        after = await training.pass_over(learner, [data], "cross_entropy", {})
        assert torch.equal(after[0].losses, before[0].losses)
        assert await training.step(learner, ADAM) == expected


async def test_weights_that_are_not_finite_change_nothing(tmp_path: Path) -> None:
    """Neither a step that would cause such weights nor a checkpoint with them changes any."""
    data, folders = [learned(prompt_of(20))], (tmp_path / name for name in "abcdefgh")
    growing = AdamParams(learning_rate=1e4, weight_decay=1e4)
    async with started(tmp_path) as (_, training):
        config = LearnerConfig(method="prompt_tuning", rank=4, seed=1)
        learner = await training.create(config)

        async def saved() -> bytes:
            folder = next(folders)
            await asyncio.to_thread(folder.mkdir)
            await training.save(learner, folder, with_optimizer=False)
            return (folder / TENSORS_FILE).read_bytes()

        async def grow() -> None:
            for _ in range(7):
                before.append(await saved())
                await training.pass_over(learner, data, "cross_entropy", {})
                await training.step(learner, growing)

        before: list[bytes] = []
        with pytest.raises(AdapterCheckpointError):
            await grow()
        assert await saved() == before[-1]
        # The gradients of the failed step are gone.
        assert (await training.step(learner, AdamParams(learning_rate=0.0)))["grad_norm"] == 0.0
        tensors = load_file(tmp_path / "a" / TENSORS_FILE)
        tensors["prompt_embeddings"][0] = math.nan
        save_file(tensors, tmp_path / "a" / TENSORS_FILE)
        with pytest.raises(AdapterCheckpointError):
            await training.load(learner, tmp_path / "a", with_optimizer=False)
        assert await saved() == before[-1]


async def test_a_step_without_a_gradient_changes_nothing(tmp_path: Path) -> None:
    adam = AdamParams(learning_rate=1e-2, weight_decay=0.1)
    folders = [tmp_path / name for name in ("before", "after")]
    async with started(tmp_path) as (_, training):
        learner = await training.create(LearnerConfig(rank=4, seed=1))
        await training.pass_over(learner, [learned(prompt_of(20))], "cross_entropy", {})
        assert (await training.step(learner, adam))["grad_norm"] > 0.0
        for folder in folders:
            folder.mkdir()
            await training.save(learner, folder, with_optimizer=True)
            assert await training.step(learner, adam) == {"grad_norm": 0.0}
    for name in (TENSORS_FILE, "optimizer.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


async def test_weights_that_the_serving_dtype_does_not_have_change_nothing(tmp_path: Path) -> None:
    data = [learned(prompt_of(20))]
    async with started(tmp_path, "float16") as (_, training):
        learner = await training.create(LearnerConfig(rank=4, seed=1))
        before = await training.pass_over(learner, data, "cross_entropy", {})
        with pytest.raises(AdapterCheckpointError) as caught:
            # The weights would become finite numbers that float16 does not have.
            await training.step(learner, AdamParams(learning_rate=1e4, weight_decay=1e4))
        assert [field for field, _ in caught.value.violations] == [TENSORS_FILE]
        after = await training.pass_over(learner, data, "cross_entropy", {})
        assert torch.equal(after[0].logprobs, before[0].logprobs)
        assert (await training.step(learner, ADAM))["grad_norm"] > 0.0


@pytest.mark.parametrize("method", ["lora", "dora", "lokr", "ia3", "oft", "prompt_tuning"])
async def test_published_operators_are_those_of_the_files(method: str, tmp_path: Path) -> None:
    """The operators stay the same in later steps, and are read again with the same bits."""

    def bits(operators: AdapterOperators | None) -> list[torch.Tensor]:
        assert operators is not None
        modules = [*operators.modules.values(), operators.head, operators.soft_prompt]
        return [tensor for each in modules if each is not None for tensor in each.tensors()]

    data = [learned(prompt_of(20))]
    async with started(tmp_path) as (harness, training):
        registry = harness.backend.registry
        learner = await training.create(
            LearnerConfig(method=method, rank=4, seed=1, unembed=method == "lora")
        )
        published: list[Published] = []
        for _ in range(2):
            await training.pass_over(learner, data, "cross_entropy", {})
            await training.step(learner, ADAM)
            published.append(await training.publish(learner, "new"))
            assert await training.publish(learner, "new") == published[-1], "the same content"
        assert [each.generation for each in published] == [1, 2]
        adapter = registry.find(AdapterRef(name="new"))
        assert adapter is not None
        first = [tensor.clone() for tensor in bits(adapter.operators)]
        assert first
        await training.pass_over(learner, data, "cross_entropy", {})
        await training.step(learner, ADAM)
        with registry.export("new") as export:
            # Reading all chunks also checks the digests of the files.
            assert sum(len(data) for _, data in export.chunks()) == published[-1].size
        loaded = registry.reread(adapter, registry.base)
        for found in (bits(adapter.operators), bits(loaded.operators)):
            assert len(found) == len(first)
            assert all(map(torch.equal, found, first))
        assert adapter.facts.bytes_disk == published[-1].size
        assert adapter.facts.ranks == loaded.ranks


async def test_publishing_that_fails_keeps_the_state_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise BudgetExceededError("no room")

    async with started(tmp_path) as (harness, training):
        learner = await training.create(LearnerConfig(rank=4, seed=1))
        await training.publish(learner, "new")
        await asyncio.to_thread(harness.backend.registry.pin, "new")
        before = sorted((tmp_path / "state").rglob("*"))
        await training.pass_over(learner, [learned(prompt_of(20))], "cross_entropy", {})
        await training.step(learner, ADAM)
        monkeypatch.setattr(Leases, "set_pinned", fail)
        with pytest.raises(BudgetExceededError):
            await training.publish(learner, "new")
        assert sorted((tmp_path / "state").rglob("*")) == before
        await harness.run(make_request(prompt_of(9), "new", max_tokens=1))


async def test_an_adapter_that_is_too_large_is_not_published(tmp_path: Path) -> None:
    async with started(tmp_path) as (harness, training):
        learner = await training.create(LearnerConfig(rank=4, seed=1))
        harness.backend.registry._loader._host_bytes = 1
        with pytest.raises(BudgetExceededError):
            await training.publish(learner, "new")
        assert not harness.backend.registry.list()


async def test_adapters_of_samplers_do_not_survive_a_restart(tmp_path: Path) -> None:
    name = f"training/{'a1' * 16}/0"
    async with started(tmp_path) as (harness, training):
        learner = await training.create(LearnerConfig(rank=4, seed=1))
        folder = tmp_path / "saved"
        folder.mkdir()
        await training.save(learner, folder, with_optimizer=False)
        await training.publish(learner, name)
        await training.serve(folder, f"{name}/1")
        await harness.run(make_request(prompt_of(9), f"{name}/1", max_tokens=1))
        files = tmp_path / "state" / "files"
        assert len(list(files.iterdir())) == 2
    async with started(tmp_path) as (harness, _):
        assert not harness.backend.registry.list()
        assert not list(files.iterdir())


async def test_the_pass_of_a_dropped_adapter_ends(tmp_path: Path) -> None:
    async with started(tmp_path) as (_, training):
        learner = await training.create(LearnerConfig(rank=4, seed=1))
        data = [learned(prompt_of(200, n)) for n in range(1000)]
        passed = asyncio.ensure_future(training.pass_over(learner, data, "cross_entropy", {}))
        await asyncio.sleep(0)
        async with asyncio.timeout(30):
            await training.drop(learner)
            with pytest.raises(UnavailableError):
                await passed


async def test_a_step_that_fails_within_a_pass_ends_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, failed = Runner.run, []

    def fail_once(runner: Runner, step: Any, meanwhile: Any) -> StepResult:
        if not failed:
            failed.append(step)
            raise RuntimeError("planted")
        return run(runner, step, meanwhile)

    begun, asked = threading.Event(), threading.Event()

    class Waiting(TrainingPass):
        def backward(self, grad: torch.Tensor) -> None:
            begun.set()
            asked.wait(30)
            super().backward(grad)

    monkeypatch.setattr(service, "TrainingPass", Waiting)

    async def train_and_ask() -> None:
        async with started(tmp_path) as (harness, training):
            learner = await training.create(LearnerConfig(rank=4, seed=1))
            data = [learned(prompt_of(20))]
            work = asyncio.create_task(training.pass_over(learner, data, "cross_entropy", {}))
            await asyncio.to_thread(begun.wait)
            monkeypatch.setattr(Runner, "run", fail_once)
            asking = asyncio.create_task(harness.run(make_request(prompt_of(9))))
            await asyncio.sleep(0.2)
            asked.set()
            found = await asyncio.gather(work, asking, return_exceptions=True)
            assert [type(each) for each in found] == [UnavailableError, UnavailableError]

    with pytest.raises(AssertionError, match="the engine failed"):
        await train_and_ask()


async def test_an_unsupported_adapter_is_refused(tmp_path: Path) -> None:
    async with started(tmp_path) as (_, training):
        for changes, field in (
            ({"method": "mystery"}, "method"),
            ({"rank": 0}, "rank"),
            # The server could not serve this rank.
            ({"rank": 129}, "rank"),
            ({"attention": False, "mlp": False}, "train_attn"),
        ):
            with pytest.raises(InvalidRequestError) as caught:
                await training.create(LearnerConfig(**{"rank": 4, **changes}))
            assert caught.value.violations[0][0] == field


async def test_the_scale_and_the_modules_can_be_chosen(tmp_path: Path) -> None:
    async with started(tmp_path) as (_, training):
        learner = await training.create(
            LearnerConfig(rank=4, seed=1, alpha=2.0, targets=("down_proj", "q_proj"))
        )
        await training.save(learner, tmp_path, with_optimizer=False)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (config["lora_alpha"], config["r"]) == (2.0, 4)
        assert config["target_modules"] == ["down_proj", "q_proj"]
        names = load_file(tmp_path / "adapter_model.safetensors")
        assert {name.split(".")[-3] for name in names} == {"down_proj", "q_proj"}
        for config, field in (
            (LearnerConfig(rank=4, alpha=0.0), "alpha"),
            (LearnerConfig(rank=4, alpha=math.nan), "alpha"),
            (LearnerConfig(rank=4, targets=("q_proj", "nothing")), "targets[1]"),
        ):
            with pytest.raises(InvalidRequestError) as caught:
                await training.create(config)
            assert [name for name, _ in caught.value.violations] == [field]


async def test_prompts_and_texts_must_fit_the_context(tmp_path: Path) -> None:
    async with started(tmp_path) as (harness, training):
        most = harness.backend.model_info.max_model_len
        learner = await training.create(LearnerConfig(method="prompt_tuning", rank=4, seed=1))
        data = [learned(prompt_of(9)), learned(prompt_of(most - 2))]
        with pytest.raises(InvalidRequestError) as caught:
            await training.pass_over(learner, data, "cross_entropy", {})
        assert [name for name, _ in caught.value.violations] == ["data[1]"]


async def test_an_empty_pass_ends(tmp_path: Path) -> None:
    async with started(tmp_path) as (_, training):
        learner = await training.create(LearnerConfig(rank=4, seed=1))
        assert await training.pass_over(learner, [], "cross_entropy", {}) == []
        assert (await training.step(learner, ADAM))["grad_norm"] == 0.0


async def test_the_memory_of_adapters_is_limited_and_shared(tmp_path: Path) -> None:
    async with started(tmp_path) as (harness, training):
        config, base = LearnerConfig(rank=4), harness.registry.base
        modules = [path for path in base.modules if path != HEAD]
        one = num_bytes(LearnerConfig(rank=4), modules, base)
        count = 4 * sum(each.in_features + each.out_features for p, each in base.modules.items())
        assert 32 * count / 2 < one < 40 * count
        assert isinstance(training, service.TrainingService)
        training._max_bytes = 4 * one
        asked = (training.create(config, owner) for owner in ("a", "a", "a", "b"))
        *of_a, of_b = await asyncio.gather(*asked, return_exceptions=True)
        # Their sizes are computed at the same time, so any of the three may be the last one.
        made = [each for each in of_a if isinstance(each, int)]
        assert len(made) == 2
        assert [type(each) for each in of_a].count(BudgetExceededError) == 1
        assert isinstance(of_b, int)
        with pytest.raises(BudgetExceededError):
            await training.create(LearnerConfig(rank=9), "c")
        await training.drop(made[0])
        await training.create(config, "a")


async def test_the_memory_of_an_adapter_is_computed_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def computed(*arguments: Any) -> int:
        threads.append(threading.current_thread())
        return num_bytes(*arguments)

    monkeypatch.setattr(service, "num_bytes", computed)
    async with started(tmp_path) as (_, training):
        await training.create(LearnerConfig(rank=4))
    assert threads[0] is not threading.current_thread()


async def test_metrics_report_the_cost_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def value(name: str, **labels: str) -> float:
        found = metrics.registry.get_sample_value(f"turret_training_{name}", labels)
        assert found is not None
        return found

    def size(kind: str) -> float:
        return value("bytes", kind=kind)

    seen: list[tuple[float, float]] = []

    class Seen(TrainingPass):
        def backward(self, grad: torch.Tensor) -> None:
            seen.append((size("activations"), value("queued_tokens")))
            super().backward(grad)

    monkeypatch.setattr(service, "TrainingPass", Seen)
    for name in ("PASS_TOKENS", "CHUNK_TOKENS"):
        monkeypatch.setattr(service, name, 20)
    async with started(tmp_path) as (harness, training):
        metrics, base = harness.metrics, harness.registry.base
        learner = await training.create(LearnerConfig(rank=4, seed=1))
        modules = [path for path in base.modules if path != HEAD]
        assert value("adapters") == 1
        assert size("adapters") == num_bytes(LearnerConfig(rank=4), modules, base)
        before = value("seconds_total")
        start = time.monotonic()
        data = [learned(prompt_of(21, n)) for n in range(3)]
        await training.pass_over(learner, data, "cross_entropy", {})
        assert 0.0 < value("seconds_total") - before < time.monotonic() - start
        await training.step(learner, ADAM)
        assert [queued for _, queued in seen] == [40, 20, 0]
        # The input and the result of each projection, for each token.
        inputs = sum(base.modules[path].in_features for path in modules)
        assert all(20 * 2 * inputs < kept < 20 * 8 * inputs for kept, _ in seen)
        assert (size("activations"), value("queued_tokens")) == (0, 0)
        assert (value("tokens_total"), value("steps_total")) == (60, 1)
        await training.drop(learner)
        assert (value("adapters"), size("adapters")) == (0, 0)


async def test_owners_take_turns_and_then_their_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[TrainingPass] = []

    class Counted(TrainingPass):
        def backward(self, grad: torch.Tensor) -> None:
            passes.append(self)
            super().backward(grad)

    monkeypatch.setattr(service, "TrainingPass", Counted)
    for name in ("PASS_TOKENS", "CHUNK_TOKENS"):
        monkeypatch.setattr(service, name, 20)
    async with started(tmp_path) as (_, training):

        async def train(owner: str, length: int, count: int) -> int:
            learner = await training.create(LearnerConfig(rank=1, seed=1), owner)
            ready.append(owner)
            if len(ready) == 6:
                begin.set()
            await begin.wait()
            data = [learned(prompt_of(length, n)) for n in range(count)]
            await training.pass_over(learner, data, "cross_entropy", {})
            return len(passes)

        ready: list[str] = []
        begin = asyncio.Event()
        many = [train("many", 21, 4) for _ in range(4)]
        *ends, long, one = await asyncio.gather(*many, train("long", 81, 4), train("one", 21, 4))
        # While "long" trains one sequence, each of the others trains four. So while "one" trains
        # its four, "many" trains four and "long" one.
        assert one <= 4 + 4 + 1
        # Before the last of "long" ends, "many" has trained twelve, and "one" all of its four.
        assert long >= 4 + 12 + 4
        # The adapters of an owner take turns, too: when one of "many" ends, the others have at most
        # one sequence left.
        assert min(ends) >= 4 + 3 * 3


async def test_soft_tokens_count_as_tokens_of_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    class Counted(TrainingPass):
        def forward(self) -> None:
            super().forward()
            rows.append(len(self.hidden))

    monkeypatch.setattr(service, "TrainingPass", Counted)
    async with started(tmp_path) as (_, training):
        learner = await training.create(LearnerConfig(method="prompt_tuning", rank=60, seed=1))
        # With its soft tokens, a pair of these sequences fits a chunk, and four chunks a pass.
        data = [learned([1, 2])] * 20
        results = await training.pass_over(learner, data, "cross_entropy", {})
        assert len(results) == len(data)
        assert rows == [8 * 61, 8 * 61, 4 * 61]


async def test_a_full_disk_is_reported_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(tmp_path) as (_, training):
        learner = await training.create(LearnerConfig(rank=4, seed=1))
        await training.pass_over(learner, [learned(prompt_of(20))], "cross_entropy", {})
        await training.step(learner, ADAM)
        for name in (learner_module.TENSORS_FILE, learner_module.OPTIMIZER_FILE):
            folder = tmp_path / name
            folder.mkdir()
            (folder / name).symlink_to("/dev/full")
            with pytest.raises(OSError, match="No space") as caught:
                await training.save(learner, folder, with_optimizer=True)
            assert caught.value.errno == errno.ENOSPC
