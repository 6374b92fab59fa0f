"""Files that hold several tasks: an adapter is one of them, chosen when it is registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import base_of, lower_adapter, read_adapter, tiny_llama
from builders.methods import load_adapter, make_config, quiet, save_adapter
from method_oracle import check_close, oracle_logprobs, prompt_of, twin
from servers.engine_harness import EngineHarness, make_request

from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.methods import lower_checkpoint
from turret.server.adapters.ref import AdapterRef
from turret.server.adapters.state.saved_registration import SavedRegistration
from turret.server.errors import AdapterCheckpointError, AdapterExistsError

TASKS = 3


class _OfTask(torch.nn.Module):
    """A PEFT model that is asked for one task."""

    def __init__(self, model: Any, task: int) -> None:
        super().__init__()
        self._model, self._task = model, task

    def forward(self, input_ids: torch.Tensor) -> Any:
        with quiet():
            return self._model(input_ids=input_ids, task_ids=torch.tensor([self._task]))


def refusal(checkpoint: AdapterCheckpoint) -> list[tuple[str, str]]:
    with pytest.raises(AdapterCheckpointError) as caught:
        lower_checkpoint(checkpoint, base_of(tiny_llama()))
    return list(caught.value.violations)


@pytest.mark.parametrize("method", ["poly", "multitask_prompt"])
async def test_each_task_is_what_peft_computes(method: str, tmp_path: Path) -> None:
    base = twin("qwen2")
    save_adapter(base.model, make_config(method), tmp_path / "a", seed=3)
    prompt = prompt_of(29)
    async with EngineHarness.start(base.folder, tmp_path) as harness:
        plain = await harness.run(make_request(prompt, score=True))
        rows = [[p for p in plain.prompt_logprobs if p is not None]]
        for task in range(TASKS):
            name = f"task-{task}"
            info = harness.registry.load(name, "a", task=task)
            assert info.facts.warnings[-1] == f"is task {task} of the {TASKS} in its files"
            oracle = _OfTask(load_adapter(base.model, tmp_path / "a"), task)
            answer = await harness.run(make_request(prompt, name, score=True))
            expected = oracle_logprobs(oracle, prompt)
            found = [p for p in answer.prompt_logprobs if p is not None]
            wanted = [float(expected[i, token]) for i, token in enumerate(prompt[1:])]
            check_close(found, wanted, f"{method} {task}")
            rows.append(found)
        with pytest.raises(AdapterExistsError):
            harness.registry.load("task-0", "a", task=1)
        again = harness.registry.load("task-0", "a", task=0)
        assert again.generation == 1
        assert harness.registry.replace("task-0", "a", task=1).generation == 2
    # No task is like another, or like no adapter.
    for i, one in enumerate(rows):
        for other in rows[:i]:
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.05


def test_a_task_is_part_of_the_digest(tmp_path: Path) -> None:
    save_adapter(tiny_llama(), make_config("poly"), tmp_path / "a")
    checkpoint = read_adapter(tmp_path)
    digests = {checkpoint.of_task(task).digest for task in (None, 0, 1, 2)}
    assert len(digests) == 4
    assert checkpoint.of_task(1).digest == checkpoint.of_task(1).digest


@pytest.mark.parametrize("method", ["poly", "multitask_prompt"])
def test_a_task_must_be_named_where_there_are_several(method: str, tmp_path: Path) -> None:
    save_adapter(tiny_llama(), make_config(method), tmp_path / "a")
    checkpoint = read_adapter(tmp_path)
    ((field, why),) = refusal(checkpoint)
    assert (field, "0 to 2" in why) == ("task", True)
    ((field, why),) = refusal(checkpoint.of_task(3))
    assert (field, "is 3" in why) == ("task", True)


def test_the_only_task_need_not_be_named(tmp_path: Path) -> None:
    base = base_of(tiny_llama())
    save_adapter(tiny_llama(), make_config("poly", n_tasks=1), tmp_path / "a")
    assert lower_adapter(tmp_path, base).warnings == ()
    lower_checkpoint(read_adapter(tmp_path).of_task(0), base)


def test_an_adapter_without_tasks_is_none(tmp_path: Path) -> None:
    save_adapter(tiny_llama(), make_config("lora"), tmp_path / "a")
    ((field, why),) = refusal(read_adapter(tmp_path).of_task(0))
    assert (field, "no tasks" in why) == ("task", True)


async def test_a_task_survives_a_restart(tmp_path: Path) -> None:
    base = twin("qwen2")
    save_adapter(base.model, make_config("poly"), tmp_path / "root" / "a", seed=3)
    async with EngineHarness.start(base.folder, tmp_path / "root") as harness:
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
    with pytest.raises(ValueError, match="task is no int"):
        SavedRegistration.from_json(broken)
