"""Answers with drafts have the same bits as answers that are drawn token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders.bases.tiny_models import ARCHITECTURES, OTHER_ARCHITECTURES, VOCAB_SIZE
from builders.method_kinds import KINDS
from builders.methods import make_config, save_adapter
from builders.mixes.fusions import save_fusion
from method_oracle import prompt_of, serve, twin
from servers.engine_harness import Answer, make_request
from servers.planted_drafts import PlantedDrafts

from turret.kernels import cpu as native
from turret.server.adapters.adapter import AdapterRef
from turret.server.engine.scheduling.request import Request, SamplingParams
from turret.server.engine.step import Placed, StepRows, runner
from turret.server.engine.step.sampler import Adjustment, Sampler

MAX_TOKENS = 24
SAMPLING = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, seed=5),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9, seed=6),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.4),
    SamplingParams(temperature=1.2, min_p=0.02, presence_penalty=0.7, seed=7),
    SamplingParams(temperature=0.9, logit_bias={7: 4.0, 9: -3.0}, seed=8),
)
METHODS = [*KINDS, "fusion"]
# One method for each operator and each place of action.
FEW = [
    *("lora", "rslora", "dora", "alora", "loha", "lokr", "ia3", "ln_tuning", "oft", "road", "c3a"),
    *("hira", "shira", "prefix_tuning", "prompt_tuning", "trainable_tokens", "fusion"),
]
OF_SEVERAL_TASKS = ("poly", "multitask_prompt")


async def answers(
    root: Path,
    names: Sequence[str],
    requests: Sequence[Request],
    *,
    architecture: str = "qwen2",
    max_num_seqs: int = 8,
    **options: Any,
) -> tuple[list[Answer], float, float]:
    """The answers in one batch, and the numbers of checked and of accepted draft tokens."""
    async with serve(
        architecture,
        root,
        adapters=[name for name in names if name not in OF_SEVERAL_TASKS],
        max_num_seqs=max_num_seqs,
        **options,
    ) as harness:
        for name in set(OF_SEVERAL_TASKS) & set(names):
            harness.registry.load(name, name, task=1)
        found = await harness.run_all(requests)
    # Wait until the engine's thread has counted its last step.
    value = harness.metrics.registry.get_sample_value
    prefix = "turret_spec_decode_num_"
    counts = [value(f"{prefix}{kind}_tokens_total") for kind in ("draft", "accepted")]
    return found, counts[0] or 0.0, counts[1] or 0.0


def requests_of(names: Sequence[str]) -> list[Request]:
    """Requests for every method, mixes and the base, with the kinds of sampling in turn."""
    mixes = [*([AdapterRef(name=name)] for name in names), [], [], []]
    return [
        make_request(
            # An activated LoRA acts from token 7 on.
            [*prompt_of((3, 11, 29, 50)[number % 4], number), 7, 1],
            *mix,
            max_tokens=MAX_TOKENS - number % 5,
            sampling=SAMPLING[number % len(SAMPLING)],
        )
        for number, mix in enumerate(mixes)
    ]


async def check(
    root: Path,
    names: Sequence[str],
    requests: Sequence[Request],
    dtype: str,
    architecture: str = "qwen2",
) -> None:
    options: Any = {"architecture": architecture, "dtype": dtype}
    plain, num_draft, _ = await answers(root, names, requests, speculation="off", **options)
    assert num_draft == 0
    known = {
        request.prompt_token_ids: answer.token_ids
        for request, answer in zip(requests, plain, strict=True)
    }
    drafts = PlantedDrafts(known, VOCAB_SIZE)
    with drafts.planted():
        checked, num_draft, num_accepted = await answers(root, names, requests, **options)
    for request, one, other in zip(requests, plain, checked, strict=True):
        assert one.bits == other.bits, [ref.name for ref in request.adapters]
        assert replace(one.finish.usage, cached_tokens=0) == other.finish.usage
    # The last scheduled draft has no result yet; all tokens of a correct draft are accepted.
    assert num_draft == drafts.num_draft
    assert num_accepted == drafts.num_right
    assert num_draft > num_accepted > sum(map(len, known.values())) / 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapters of a few methods."""
    return save(tmp_path_factory.mktemp("adapters"), FEW)


def save(folder: Path, names: Sequence[str]) -> Path:
    for seed, name in enumerate(KINDS):
        if name in names:
            save_adapter(twin("qwen2").model, make_config(name), folder / name, seed=seed)
    targets = ["q_proj", "v_proj", "down_proj"]
    save_fusion(twin("qwen2").model, folder, "fusion", ("lora", "rslora"), targets)
    return folder


async def test_methods_in_one_batch(root: Path) -> None:
    await check(root, FEW, requests_of(FEW), "bfloat16")


@pytest.mark.long
@pytest.mark.parametrize("formulation", ["float32", "bfloat16", "bfloat16 by torch"])
async def test_every_method_in_one_batch(
    formulation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, _, by_torch = formulation.partition(" ")
    if by_torch:
        monkeypatch.setattr(native, "library", lambda: None)
    await check(save(tmp_path, METHODS), METHODS, requests_of(METHODS), dtype)


@pytest.mark.parametrize(
    "architecture",
    [
        name if name in ("gemma3_text", "olmoe") else pytest.param(name, marks=pytest.mark.long)
        for name in (*ARCHITECTURES, *OTHER_ARCHITECTURES)
    ],
)
async def test_every_family(architecture: str, tmp_path: Path) -> None:
    """Several positions per step with windows, soft caps, experts, and frequencies by length."""
    save_adapter(twin(architecture).model, make_config("lora"), tmp_path / "lora")
    requests = [
        make_request(prompt_of(length, number), *names, max_tokens=MAX_TOKENS, sampling=sampling)
        for number, (length, names, sampling) in enumerate(
            [(20, [], SAMPLING[0]), (55, ["lora"], SAMPLING[1]), (124, ["lora"], SAMPLING[0])]
        )
    ]
    await check(tmp_path, ["lora"], requests, "bfloat16", architecture)


async def test_repeated_requests_are_drafted_from_memory(root: Path) -> None:
    """With the real drafters, earlier answers are correct drafts and save steps."""
    requests = requests_of(["lora", "dora"])
    plain, _, _ = await answers(root, ["lora", "dora"], requests, speculation="off")
    drafted: dict[str, float] = {}
    for speculation in ("auto", "prompt"):
        twice, _, drafted[speculation] = await answers(
            root, ["lora", "dora"], [*requests, *requests], speculation=speculation, max_num_seqs=1
        )
        assert [one.bits for one in twice] == [one.bits for one in plain] * 2
    assert drafted["auto"] > sum(len(one.token_ids) for one in plain) / 4
    assert drafted["auto"] > drafted["prompt"]


_next, _apply, _add = Sampler._uniform, Adjustment.apply, StepRows.add


def _accept_anything(run: Any) -> bool:
    return len(run.tokens) <= len(run.item.draft)


def _add_late(rows: StepRows, place: Placed, block_size: int, blocks_at: int) -> None:
    """Plant a fault: the positions of draft tokens are one too high."""
    _add(rows, place, block_size, blocks_at)
    for index in range(len(rows.positions) - len(place.item.draft), len(rows.positions)):
        rows.positions[index] += 1


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (runner._Run, "goes_on", property(_accept_anything)),
        (Sampler, "_uniform", lambda self, sequence, ahead=0: _next(self, sequence)),
        (Adjustment, "apply", lambda self, row, drawn=(): _apply(self, row)),
        (StepRows, "add", _add_late),
    ],
)
async def test_a_planted_fault_is_detected(
    root: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, broken: Any
) -> None:
    requests = requests_of(["lora", "dora"])
    plain, _, _ = await answers(root, ["lora", "dora"], requests, speculation="off")
    known = {r.prompt_token_ids: a.token_ids for r, a in zip(requests, plain, strict=True)}
    monkeypatch.setattr(owner, name, broken)
    with PlantedDrafts(known, VOCAB_SIZE).planted():
        checked, _, _ = await answers(root, ["lora", "dora"], requests)
    assert [one.bits for one in checked] != [one.bits for one in plain]
