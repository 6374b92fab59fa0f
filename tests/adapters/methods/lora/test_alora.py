"""aLoRA on a real engine: PEFT's results, reuse of the base's blocks, equal bits, rejections."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import (
    base_of,
    edit_config,
    edit_tensors,
    lower_adapter,
    read_adapter,
    refusal_of,
    save_tiny,
    tiny_llama,
)
from builders.methods import load_adapter, make_config, save_adapter
from builders.mixes.fuse import Fusions, model
from method_oracle import (
    MAX_TOKENS,
    check_close,
    check_score,
    mixed_oracle,
    oracle_logprobs,
    prompt_of,
    quiet,
    serve,
    twin,
)
from said import fields_of, says
from servers.engine_harness import make_request

from turret.kernels import cpu as native
from turret.server.adapters.adapter import Source
from turret.server.adapters.component import Component, ComponentRef
from turret.server.adapters.lowering import check_fusable
from turret.server.adapters.state_dir import SavedRegistration
from turret.server.engine.scheduling.request import SamplingParams
from turret.server.engine.scheduling.scheduler import Scheduler
from turret.server.engine.scheduling.sequence import Step
from turret.server.errors import AdapterCheckpointError, AdapterMismatchError, InvalidRequestError

ONE, TWO = [70, 71], [72]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "one": ("alora", {"alora_invocation_tokens": ONE, "lora_bias": True}),
    "two": (
        "alora",
        {
            "alora_invocation_tokens": TWO,
            "r": 9,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"],
        },
    ),
    "lora": ("lora", {}),
    "dora": ("dora", {}),
    "prefix": ("prefix_tuning", {"num_virtual_tokens": 21}),
    "prompt": ("prompt_tuning", {"num_virtual_tokens": 7}),
}
# The position of the invocation; in some texts, the adapter does not act.
PLACES: dict[str, list[int]] = {
    "amid": [*range(3, 20), *ONE, *range(30, 45)],
    "twice": [1, *ONE, *range(3, 17), *ONE, 5],
    "first": [*ONE, *range(3, 40)],
    "last": [*range(3, 30), *ONE],
    "at a block's end": [*range(3, 18), *ONE, *range(4, 20)],
    "at a block's start": [*range(3, 19), *ONE, *range(4, 20)],
    "alone": ONE,
    "absent": [*range(3, 20), 71, 70],
    "broken off": [*range(3, 9), 70],
}
MIXES: list[list[tuple[str, float]]] = [
    [("one", 1.0)],
    [("two", 1.0)],
    [("one", 0.5), ("lora", 0.7)],
    [("two", -0.5), ("dora", 0.4), ("one", 1.2)],
    [("one", 0.0)],
    [("prefix", 1.0), ("one", 1.0)],
    [("two", 0.6), ("prompt", 1.0)],
    [],
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alora")
    for seed, (name, (method, changes)) in enumerate(ADAPTERS.items()):
        save_adapter(twin("qwen2").model, make_config(method, **changes), folder / name, seed=seed)
    return folder


def start(root: Path, **options: Any) -> Any:
    return serve("qwen2", root, adapters=list(ADAPTERS), **options)


def text_of(number: int) -> list[int]:
    """Random text with both invocations, one of them twice."""
    first, rest = prompt_of((3, 11, 29, 70)[number % 4], number), prompt_of(9 + number, number + 50)
    return [*ONE, *first, *ONE, *rest[:5], *TWO, *rest[5:]]


@torch.no_grad()
def peft_greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and logprobs by PEFT, which searches for the invocation only in the prompt."""
    with quiet():
        found = model.generate(
            input_ids=torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
    logprobs = [row[0].log_softmax(-1) for row in found.logits]
    tokens = found.sequences[0, len(prompt) :].tolist()
    return tokens, [float(row[token]) for row, token in zip(logprobs, tokens, strict=True)]


@pytest.mark.parametrize("name", ["one", "two"])
async def test_scores_and_answers_match_peft(name: str, root: Path) -> None:
    oracle = load_adapter(twin("qwen2").model, root / name)
    plain = twin("qwen2").model
    wanted = ONE if name == "one" else TWO
    async with start(root, max_num_batched_tokens=24, max_num_seqs=8) as harness:
        assert harness.registry.get(name).facts.method == "alora"
        for place, text in PLACES.items():
            # The invocation of the other adapter is a single token.
            prompt = text if name == "one" else [72 if t == 70 else t for t in text if t != 71]
            scored = await harness.run(make_request(prompt, name, score=True))
            if len(prompt) > 1:
                check_score(scored, oracle, prompt, f"score, {place}")
            tokens, logprobs = peft_greedy(oracle, prompt, MAX_TOKENS)
            answer = await harness.run(make_request(prompt, name, max_tokens=MAX_TOKENS))
            assert list(answer.token_ids) == tokens, place
            check_close([p for p in answer.logprobs if p is not None], logprobs, place)
            rows = oracle_logprobs(oracle, prompt) - oracle_logprobs(plain, prompt)
            acts = any(prompt[i : i + len(wanted)] == wanted for i in range(len(prompt)))
            # Without this, an adapter without effect would pass every comparison.
            assert (rows.abs().max() > 0.05) == acts


async def test_generated_invocations_change_nothing(root: Path) -> None:
    """The answer is forced to contain the invocation; PEFT searches only the prompt."""
    oracle = load_adapter(twin("qwen2").model, root / "two")
    prompt, forced = PLACES["amid"], {72: 100.0}
    request = make_request(
        prompt, "two", max_tokens=4, sampling=SamplingParams(temperature=0.0, logit_bias=forced)
    )
    async with start(root) as harness:
        absent = await harness.run(request)
        present = await harness.run(replace(request, prompt_token_ids=(*TWO, *prompt)))
        for answer in (absent, present):
            assert answer.token_ids == (72,) * 4
        start_at_first = len(prompt) + len(TWO) + 2
        # PEFT cannot be told that no adapter acts, so compare with the base's own logits.
        for answer, row in (
            (absent, last_logits(twin("qwen2").model, [*prompt, 72, 72])),
            (present, last_logits(oracle, [*TWO, *prompt, 72, 72], [start_at_first])),
        ):
            assert answer.logprobs[2] == pytest.approx(float(row.log_softmax(-1)[72]), abs=1e-4)
    assert absent.logprobs[2] != pytest.approx(present.logprobs[2], abs=0.01)


@torch.no_grad()
def last_logits(model: Any, tokens: list[int], offsets: list[int] | None = None) -> torch.Tensor:
    """The logits of the last token.

    ``offsets`` is the number of tokens at the end on which an adapter acts.
    """
    told = {} if offsets is None else {"alora_offsets": offsets}
    with quiet():
        return model(input_ids=torch.tensor([tokens]), **told).logits[0, -1]


def windows_of(prompt: list[int]) -> dict[str, dict[str, Any]]:
    """For each aLoRA, the number of tokens from its last invocation on."""
    found = {}
    for name, wanted in (("one", ONE), ("two", TWO)):
        start = max(i for i in range(len(prompt)) if prompt[i : i + len(wanted)] == wanted)
        found[name] = {"alora_offsets": [len(prompt) - start]}
    return found


async def test_each_member_of_a_mix_contributes_from_its_own_start(root: Path) -> None:
    async with start(root) as harness:
        for number, mix in enumerate(MIXES[:5]):
            prompt = [3, *text_of(number)]
            oracle = mixed_oracle(twin("qwen2").model, root, mix, **windows_of(prompt))
            answer = await harness.run(make_request(prompt, *mix, score=True))
            check_score(answer, oracle, prompt, f"{mix}")


def requests_of(max_tokens: int = 6) -> list[Any]:
    requests = []
    for number, mix in enumerate([*MIXES, *MIXES]):
        requests.append(make_request(text_of(number), *mix, max_tokens=max_tokens))
    return requests


@pytest.mark.parametrize("formulation", ["float32", "bfloat16", "bfloat16 by torch"])
async def test_bits_do_not_depend_on_neighbours_chunks_preemption_cache_or_resumption(
    formulation: str,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    preempted: list[tuple[Any, int]],
) -> None:
    dtype, _, by_torch = formulation.partition(" ")
    if by_torch:
        monkeypatch.setattr(native, "library", lambda: None)
    # The compiled kernels take a second for all requests; torch takes a minute.
    requests = requests_of(40) if formulation == "bfloat16" else requests_of(20)[:8]
    num_blocks = 31 if formulation == "bfloat16" else 17
    alone = []
    async with start(root, dtype=dtype, max_num_batched_tokens=256) as harness:
        for request in requests:
            # Start with an empty prefix cache.
            harness.engine._loop._scheduler.blocks.forget_cached()
            alone.append(await harness.run(request))
    scarce: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 19}
    async with start(root, dtype=dtype, **scarce) as harness:
        # Leave room for only a few requests.
        harness.leave_blocks(num_blocks)
        together = await harness.run_all(requests)
        again = await harness.run_all(requests)
        rest = await harness.run_all(
            [
                replace(request, answer_so_far=one.token_ids[:3])
                for request, one in zip(requests, alone, strict=True)
            ]
        )
    assert preempted
    for request, one, *others, last in zip(requests, alone, together, again, rest, strict=True):
        assert [other.bits for other in others] == [one.bits] * 2, request.adapters
        assert last.token_ids == one.token_ids[3:], request.adapters
        assert last.logprobs == one.logprobs[3:], request.adapters
    assert len({answer.bits for answer in alone}) > len(alone) // 2


async def test_after_a_base_conversation_only_the_invocation_is_computed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost of the first token compared with that of a plain LoRA, counted in tokens."""
    computed: list[int] = []
    schedule = Scheduler.schedule

    def counted(self: Scheduler, *args: Any) -> Step:
        step = schedule(self, *args)
        computed.append(sum(item.num_new for item in step.scheduled))
        return step

    async with start(root, max_num_batched_tokens=512) as harness:
        said = prompt_of(420)
        answer = await harness.run(make_request(said, max_tokens=60))
        monkeypatch.setattr(Scheduler, "schedule", counted)
        conversation = [*said, *answer.token_ids, *ONE]
        answers, costs = {}, {}
        for name in ("one", "lora"):
            computed.clear()
            answers[name] = await harness.run(make_request(conversation, name, max_tokens=1))
            costs[name] = sum(computed)
        usage = answers["one"].finish.usage
        assert len(conversation) - len(ONE) == 480
        # The base has computed all tokens but its last one; a block has 16.
        assert usage.cached_tokens == (len(conversation) - len(ONE) - 1) // 16 * 16
        assert costs["one"] == len(conversation) - usage.cached_tokens <= 16 + len(ONE)
        assert costs["lora"] == len(conversation)
        assert costs["lora"] / costs["one"] > 25
        # The base and other aLoRAs find the blocks before the invocation.
        for names in ((), ("two",)):
            later = await harness.run(make_request([*conversation[:-2], 72, 1], *names))
            assert later.finish.usage.cached_tokens == 480 > usage.cached_tokens


# Files of an aLoRA: rejections, stored properties, and unsupported combinations.


def test_the_embedding_and_unknown_tokens_are_refused(tmp_path: Path) -> None:
    # PEFT does not create an aLoRA on the embedding.
    config = make_config("lora", target_modules=["q_proj", "embed_tokens"])
    save_adapter(tiny_llama(), config, tmp_path / "a")
    edit_config(tmp_path / "a", alora_invocation_tokens=[7])
    (why,) = refusal_of(tmp_path).violations
    assert why[0] == "target_modules"
    directory = save_tiny(tmp_path, "alora", target_modules=["q_proj"])
    size = base_of(tiny_llama()).vocabulary.size
    edit_config(directory, alora_invocation_tokens=[1, size])
    with pytest.raises(AdapterMismatchError) as caught:
        raise refusal_of(tmp_path)
    assert fields_of(caught.value) == ["alora_invocation_tokens"]
    edit_tensors(directory, lambda tensors: {n: t for n, t in tensors.items() if "lora_A" in n})
    fields = fields_of(refusal_of(tmp_path))
    assert {field.rpartition(".lora_")[2] for field in fields} == {"B.weight"}


def test_an_alora_can_be_neither_fused_nor_a_component(tmp_path: Path) -> None:
    fusions = Fusions(tmp_path)
    fusions.add("lora")
    fusions.add("activated", "alora")
    for how in ("exact", "svd"):
        with pytest.raises(InvalidRequestError, check=says("NOT_FUSABLE", adapter="activated")):
            fusions.fuse({"activated": 1.0, "lora": 1.0}, how=how)
    fusions.root.joinpath("activated").rename(fusions.root / "a")
    operators = lower_adapter(fusions.root, base_of(model())).operators
    component = Component(ComponentRef("activated", "0" * 64), "alora", operators, (4,))
    with pytest.raises(AdapterCheckpointError, check=says("UNFIT_COMPONENT", method="alora")):
        check_fusable([component], "fusion")
    fusions.close()


def test_the_window_of_an_alora_survives_a_restart(tmp_path: Path) -> None:
    facts = lower_adapter(save_tiny(tmp_path, "alora").parent, base_of(tiny_llama())).facts(
        read_adapter(tmp_path), "alora"
    )
    assert facts.invocation == (7,)
    saved = SavedRegistration(
        name="a", uuid="u", generation=1, pinned=False, source=Source("a"), facts=facts
    )
    assert SavedRegistration.from_json(saved.to_json()) == saved
