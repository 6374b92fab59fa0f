"""Files with several tasks, one of which is chosen when the adapter is registered."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import (
    apply_operators,
    base_of,
    linear_modules,
    lower_adapter,
    read_adapter,
    tiny_llama,
)
from builders.methods import ALL, drawing, load_adapter, make_config, quiet, save_adapter
from hypothesis import given
from hypothesis import strategies as st
from method_oracle import check_score, found_scores, prompt_of, serve, twin
from servers.engine_harness import make_request

from turret.server.adapters.adapter import AdapterRef
from turret.server.adapters.base import BaseModel
from turret.server.adapters.checkpoint import AdapterCheckpoint
from turret.server.adapters.methods.lower import lower_checkpoint
from turret.server.adapters.state_dir import SavedRegistration
from turret.server.errors import AdapterCheckpointError, AdapterExistsError
from turret.server.words import Text, say

TASKS = 3


class _OfTask(torch.nn.Module):
    """A PEFT model that runs one task."""

    def __init__(self, model: Any, task: int) -> None:
        super().__init__()
        self._model, self._task = model, task

    def forward(self, input_ids: torch.Tensor) -> Any:
        with quiet():
            return self._model(input_ids=input_ids, task_ids=torch.tensor([self._task]))


def refusal(checkpoint: AdapterCheckpoint) -> list[tuple[str, Text]]:
    with pytest.raises(AdapterCheckpointError) as caught:
        lower_checkpoint(checkpoint, base_of(tiny_llama()))
    return list(caught.value.violations)


@pytest.mark.parametrize("method", ["poly", "multitask_prompt"])
async def test_each_task_is_what_peft_computes(method: str, tmp_path: Path) -> None:
    base = twin("qwen2")
    save_adapter(base.model, make_config(method), tmp_path / "a", seed=3)
    prompt = prompt_of(29)
    async with serve(base, tmp_path) as harness:
        plain = await harness.run(make_request(prompt, score=True))
        rows = [found_scores(plain)]
        for task in range(TASKS):
            name = f"task-{task}"
            info = harness.registry.load(name, "a", task=task)
            assert info.facts.warnings[-1] == say("IS_TASK", task=task, count=TASKS)
            oracle = _OfTask(load_adapter(base.model, tmp_path / "a"), task)
            answer = await harness.run(make_request(prompt, name, score=True))
            check_score(answer, oracle, prompt, f"{method} {task}")
            rows.append(found_scores(answer))
        with pytest.raises(AdapterExistsError):
            harness.registry.load("task-0", "a", task=1)
        again = harness.registry.load("task-0", "a", task=0)
        assert again.generation == 1
        assert harness.registry.replace("task-0", "a", task=1).generation == 2
    # All tasks differ from each other and from the base.
    for i, one in enumerate(rows):
        for other in rows[:i]:
            assert (one - other).abs().max() > 0.05


@functools.cache
def small() -> tuple[Any, BaseModel]:
    built = tiny_llama(attention_bias=True, dtype=torch.float64)
    return built, base_of(built)


@drawing(20)
@given(
    counts=st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 2, 4])),
    rank=st.integers(1, 9),
    targets=st.lists(st.sampled_from(ALL), min_size=1, unique=True),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_drawn_polys_compute_what_peft_computes(
    counts: tuple[int, int, int], rank: int, targets: list[str], seed: int
) -> None:
    plain, base = small()
    keys = dict(zip(("n_tasks", "n_skills", "n_splits"), counts, strict=True))
    task = seed % keys["n_tasks"]
    with tempfile.TemporaryDirectory() as folder:
        config = make_config("poly", **keys, r=rank, target_modules=targets)
        oracle = save_adapter(plain, config, Path(folder) / "a", seed=seed, share=True).eval()
        _, lowered = lower_checkpoint(read_adapter(Path(folder)).of_task(task), base)
    moved = 0
    for path, operators in lowered.operators.modules.items():
        linear = linear_modules(plain)[path]
        x = torch.randn(1, 5, linear.in_features, dtype=torch.float64)
        module = oracle.get_submodule(f"base_model.model.{path}")
        expected = module(x, task_ids=torch.tensor([task]))
        found = apply_operators(linear, [(operators, 1.0)], x)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        moved += bool((found - linear(x)).abs().max() > 1e-3)
    assert moved == 2 * len(targets)


@drawing(20)
@given(tasks=st.integers(1, 4), rank=st.integers(1, 5), tokens=st.integers(1, 9))
def test_drawn_prompts_match_their_task(tasks: int, rank: int, tokens: int) -> None:
    plain, base = small()
    keys = {"num_tasks": tasks, "num_ranks": rank, "num_virtual_tokens": tokens}
    task = (rank + tokens) % tasks
    with tempfile.TemporaryDirectory() as folder:
        config = make_config("multitask_prompt", **keys)
        oracle = save_adapter(plain, config, Path(folder) / "a", share=True).eval()
        _, lowered = lower_checkpoint(read_adapter(Path(folder)).of_task(task), base)
    with torch.no_grad():
        expected = oracle.get_prompt(batch_size=1, task_ids=torch.tensor([task]))[0]
    assert lowered.operators.soft_prompt is not None
    found = lowered.operators.soft_prompt.soft_tokens
    assert found is not None
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-6, atol=1e-6)


def test_a_task_is_part_of_the_digest(tmp_path: Path) -> None:
    save_adapter(tiny_llama(), make_config("poly"), tmp_path / "a")
    checkpoint = read_adapter(tmp_path)
    digests = {checkpoint.of_task(task).digest for task in (None, 0, 1, 2)}
    assert len(digests) == 4
    assert checkpoint.of_task(1).digest == checkpoint.of_task(1).digest


@pytest.mark.parametrize("method", ["poly", "multitask_prompt"])
def test_a_task_must_be_named_if_there_are_several(method: str, tmp_path: Path) -> None:
    save_adapter(tiny_llama(), make_config(method), tmp_path / "a")
    checkpoint = read_adapter(tmp_path)
    assert refusal(checkpoint) == [("task", say("MISSING_TASK", most=2))]
    outside = say("NOT_IN_RANGE", least=0, most=2, value=3)
    assert refusal(checkpoint.of_task(3)) == [("task", outside)]


def test_the_only_task_need_not_be_named(tmp_path: Path) -> None:
    base = base_of(tiny_llama())
    save_adapter(tiny_llama(), make_config("poly", n_tasks=1), tmp_path / "a")
    assert lower_adapter(tmp_path, base).warnings == ()
    lower_checkpoint(read_adapter(tmp_path).of_task(0), base)


def test_asking_for_a_task_of_an_adapter_without_tasks_fails(tmp_path: Path) -> None:
    save_adapter(tiny_llama(), make_config("lora"), tmp_path / "a")
    ((field, why),) = refusal(read_adapter(tmp_path).of_task(0))
    assert (field, why.reason) == ("task", "NO_TASKS")


async def test_a_task_survives_a_restart(tmp_path: Path) -> None:
    base = twin("qwen2")
    save_adapter(base.model, make_config("poly"), tmp_path / "root" / "a", seed=3)
    async with serve(base, tmp_path / "root") as harness:
        harness.registry.load("poly", "a", task=2)
        adapter = harness.registry.acquire([AdapterRef(name="poly")]).members[0][0]
        saved = SavedRegistration(
            name=adapter.name,
            uuid=adapter.uuid,
            generation=adapter.generation,
            pinned=False,
            source=adapter.source,
            facts=adapter.facts,
        )
    assert SavedRegistration.from_json(saved.to_json()).source.task == 2
    broken = saved.to_json().replace(b'"task": 2', b'"task": "2"')
    with pytest.raises(ValueError, match="task"):
        SavedRegistration.from_json(broken)
