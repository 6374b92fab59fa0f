"""Constrained requests on a real engine: their answers, and no effect on other requests."""

from __future__ import annotations

import ctypes
import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.bases.tiny_models import EOS, VOCAB_SIZE, save_tiny_model
from builders.constraints import compiled, make_tokenizer
from builders.facts import mix_of
from said import says
from servers.engine_harness import GREEDY, EngineHarness, make_request

from turret.kernels import cpu as native
from turret.kernels.likeliest import apply_token_mask
from turret.server.constraints.matcher import STACK_BYTES, Constraint, Matcher
from turret.server.engine.scheduling.request import FinishReason, SamplingParams, StopConditions
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.step.runner import Pooler, TorchExecutor
from turret.server.engine.step.sampler import LateMask, Masks, Sampler, TokenMask
from turret.server.errors import InvalidRequestError

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "count": {"type": "integer", "maximum": 99}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
PROMPT = list(range(40, 60))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("constraints") / "model")


@pytest.fixture(scope="module")
def schema() -> Constraint:
    return compiled("json_schema", json.dumps(SCHEMA))


def stop(max_tokens: int = 200, **changes: Any) -> StopConditions:
    return StopConditions(max_tokens=max_tokens, **changes)


def constrained(constraint: Constraint, **changes: Any) -> Any:
    return make_request(PROMPT, constraint=constraint, **{"stop": stop(), **changes})


async def test_answers_match_the_constraint_with_any_sampling_parameters(
    model: Path, schema: Constraint
) -> None:
    drawn = SamplingParams(temperature=1.5, seed=3, top_k=20, top_p=0.9, repetition_penalty=1.3)
    pushed = SamplingParams(temperature=0.7, seed=4, logit_bias={EOS: 100.0, 5: -100.0})
    flat = SamplingParams(temperature=100.0, seed=5, min_p=0.0, presence_penalty=2.0)
    async with EngineHarness.start(model) as harness:
        requests = [constrained(schema, sampling=s) for s in (GREEDY, drawn, pushed, flat)]
        for answer in await harness.run_all(requests):
            value = json.loads(answer.text)
            assert value["kind"] in ("cat", "dog")
            assert value["count"] <= 99
            assert answer.finish.reason is FinishReason.STOP
            assert answer.token_ids[-1] == EOS
        # One seed gives one answer in any batch, and different seeds give different answers.
        crowd = [constrained(schema, sampling=drawn), *requests, make_request(PROMPT)]
        first, *_ = await harness.run_all(crowd)
        alone = await harness.run(constrained(schema, sampling=drawn))
        assert first.bits == alone.bits
        other = SamplingParams(temperature=1.5, seed=8, top_k=20, top_p=0.9)
        assert (await harness.run(constrained(schema, sampling=other))).bits != alone.bits


async def test_others_get_the_same_bits_beside_constrained_requests(
    model: Path, schema: Constraint
) -> None:
    free = [make_request([i, *PROMPT], max_tokens=30) for i in range(4)]
    free.append(make_request(PROMPT, max_tokens=30, sampling=SamplingParams(seed=1)))
    async with EngineHarness.start(model) as harness:
        alone = [await harness.run(request) for request in free]
        crowd = [constrained(schema), *free, constrained(compiled("regex", "[a-f]{60}"))]
        together = await harness.run_all(crowd)
        for mine, other in zip(alone, together[1:-1], strict=True):
            assert mine.bits == other.bits


async def test_logprobs_ignore_the_constraint(model: Path, schema: Constraint) -> None:
    async with EngineHarness.start(model) as harness:
        answer = await harness.run(constrained(schema))
        scored = await harness.run(make_request([*PROMPT, *answer.token_ids], score=True))
        assert answer.logprobs == scored.prompt_logprobs[len(PROMPT) :]
        # The likeliest tokens are reported even if they are forbidden.
        likeliest = [top[0][0] for top in answer.top]
        assert likeliest != list(answer.token_ids)


@pytest.mark.parametrize(
    ("regex", "conditions", "text", "reason"),
    [
        ("a{3}", {}, "aaa", FinishReason.STOP),
        # The end token is drawn where nothing else is allowed, regardless of options for end
        # tokens.
        ("a{3}", {"ignore_eos": True}, "aaa", FinishReason.STOP),
        ("a{3}", {"min_tokens": 50}, "aaa", FinishReason.STOP),
        ("a{0,5}", {"ignore_eos": True}, "aaaaa", FinishReason.STOP),
        ("a{0,9}", {"min_tokens": 9}, "aaaaaaaaa", FinishReason.STOP),
        ("a*", {"ignore_eos": True, "max_tokens": 7}, "aaaaaaa", FinishReason.LENGTH),
        ("", {"min_tokens": 3}, "", FinishReason.STOP),
        # Other stop conditions may cut an incomplete answer.
        ("a{9}", {"max_tokens": 4}, "aaaa", FinishReason.LENGTH),
        ("abcdef", {"stop_strings": ("de",)}, "abc", FinishReason.STOP),
        ("abcdef", {"stop_strings": ("bc",), "min_tokens": 5}, "abcdef", FinishReason.STOP),
        ("abcdef", {"stop_strings": ("cd",), "include_stop": True}, "abcd", FinishReason.STOP),
    ],
)
async def test_constrained_answers_end_for_the_expected_reason(
    model: Path, regex: str, conditions: dict[str, Any], text: str, reason: FinishReason
) -> None:
    # A forbidden token must not be drawn because of a bias.
    push = SamplingParams(temperature=0.0, logit_bias={EOS: 100.0})
    wanted = stop(**{"max_tokens": 60, **conditions})
    async with EngineHarness.start(model) as harness:
        request = constrained(compiled("regex", regex), stop=wanted, sampling=push)
        answer = await harness.run(request)
        assert (answer.text, answer.finish.reason) == (text, reason)


async def test_a_stop_token_is_allowed_before_min_tokens_if_nothing_else_is(model: Path) -> None:
    constraint = compiled("regex", "ab+c")
    (b,) = make_tokenizer().encode("b")
    wanted = stop(max_tokens=20, min_tokens=6, stop_token_ids=frozenset({b}))
    async with EngineHarness.start(model) as harness:
        answer = await harness.run(constrained(constraint, stop=wanted))
        # After "a", only "b" is allowed. Then "c" is drawn, because another "b" would stop the
        # answer too early.
        assert answer.text == "abc"


async def test_preemption_keeps_the_state_of_the_constraint(
    model: Path, preempted: list[tuple[Any, int]]
) -> None:
    long = compiled("regex", "([a-c]{9}-){9}")
    sampling = [SamplingParams(seed=i, temperature=2.0) for i in range(12)]
    requests = [
        make_request([i, *range(60)], constraint=long, stop=stop(), sampling=sampling[i])
        for i in range(12)
    ]
    async with EngineHarness.start(model, kv_cache_bytes=1 << 20) as harness:
        together = await harness.run_all(requests)
    assert max(count for _, count in preempted) > 0, (
        "no answer was interrupted after its first token"
    )
    assert all(re.fullmatch("([a-c]{9}-){9}", answer.text) for answer in together)
    async with EngineHarness.start(model) as harness:
        assert (await harness.run(requests[3])).bits == together[3].bits


async def test_a_resumed_answer_continues_its_constraint(model: Path, schema: Constraint) -> None:
    sampling = SamplingParams(seed=7, temperature=1.5)
    async with EngineHarness.start(model) as harness:
        whole = await harness.run(constrained(schema, sampling=sampling))
        for count in (1, 5, len(whole.token_ids) - 1):
            begun = whole.token_ids[:count]
            rest = await harness.run(constrained(schema, sampling=sampling, answer_so_far=begun))
            assert (*begun, *rest.token_ids) == whole.token_ids
        begun = (*whole.token_ids[:3], whole.token_ids[0])
        with pytest.raises(InvalidRequestError, check=says("TOKEN_FORBIDDEN", index=3)):
            await harness.run(constrained(schema, sampling=sampling, answer_so_far=begun))


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(seed=2)], ids=["greedy", "drawn"])
async def test_a_recomputed_step_draws_the_same_tokens(
    model: Path, schema: Constraint, monkeypatch: pytest.MonkeyPatch, sampling: SamplingParams
) -> None:
    request = constrained(schema, sampling=sampling)
    async with EngineHarness.start(model) as harness:
        expected = await harness.run(request)
        calls = []
        run = TorchExecutor.run

        def failing(self: TorchExecutor, step: Any) -> Any:
            calls.append(step)
            if len(calls) % 3 == 2:
                raise torch.OutOfMemoryError("planted")
            return run(self, step)

        monkeypatch.setattr(TorchExecutor, "run", failing)
        assert (await harness.run(request)).bits == expected.bits
        assert len(calls) > 10
        monkeypatch.undo()
        # Pooling fails after the draw.
        pool, num_failed = Pooler.pool, 0

        def failing_late(self: Pooler, *args: Any) -> Any:
            nonlocal num_failed
            calls.append(args)
            if len(calls) % 3 == 2:
                num_failed += 1
                raise torch.OutOfMemoryError("planted")
            return pool(self, *args)

        monkeypatch.setattr(Pooler, "pool", failing_late)
        assert (await harness.run(request)).bits == expected.bits
        assert num_failed > 3


async def test_skipping_masks_changes_no_answer(
    model: Path, schema: Constraint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most greedy answers need few masks; all answers are the same as with all masks."""
    pushed = SamplingParams(temperature=0.0, logit_bias={EOS: 4.0, 30: 3.0, 97: 2.0})
    shaped = SamplingParams(temperature=0.0, repetition_penalty=1.4, presence_penalty=1.0)
    (b,) = make_tokenizer().encode("b")
    ends = stop(40, min_tokens=9, ignore_eos=True, stop_token_ids=frozenset({b}))
    constraints = [
        schema, compiled("regex", "[a-f]{2,9}z?"), compiled("json_object"),
        compiled("regex", "(abba|abc)+<tag>"), compiled("choice", "abcdef", "abxyz"),
    ]  # fmt: skip
    requests = [
        constrained(constraint, sampling=sampling, stop=condition)
        for constraint in constraints
        for sampling in (GREEDY, pushed, shaped)
        for condition in (stop(40), ends)
    ]
    requests.append(constrained(schema, sampling=SamplingParams(seed=1)))
    made: list[bool] = []
    make = LateMask.make

    def counted(self: LateMask, fresh: Any = ()) -> Any:
        made.append(True)
        return make(self, fresh)

    monkeypatch.setattr(LateMask, "make", counted)
    async with EngineHarness.start(model) as harness:
        late = [answer.bits for answer in await harness.run_all(requests)]
    num_late = len(made)
    made.clear()
    monkeypatch.setattr(Sampler, "takes_late_masks", False)
    async with EngineHarness.start(model) as harness:
        early = [answer.bits for answer in await harness.run_all(requests)]
    assert late == early
    assert 0 < num_late < len(made)


async def test_the_engines_stack_is_large_enough_for_nested_rules(
    model: Path, schema: Constraint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nested rules are evaluated recursively, for greedy answers on the engine's own thread."""
    sizes: dict[str, int] = {}
    advance = Matcher.try_advance

    def noted(self: Matcher, token_id: int, withheld: Any = ()) -> int | None:
        sizes[threading.current_thread().name] = stack_bytes()
        return advance(self, token_id, withheld)

    monkeypatch.setattr(Matcher, "try_advance", noted)
    async with EngineHarness.start(model) as harness:
        await harness.run(constrained(schema))
    assert sizes == {"engine": pytest.approx(STACK_BYTES, rel=0.01)}


def stack_bytes() -> int:
    """The stack size of the calling thread."""
    library = ctypes.CDLL(None)
    library.pthread_self.restype = ctypes.c_void_p
    attributes = ctypes.create_string_buffer(256)
    address, size = ctypes.c_void_p(), ctypes.c_size_t()
    me = ctypes.c_void_p(library.pthread_self())
    assert library.pthread_getattr_np(me, attributes) == 0
    library.pthread_attr_getstack(attributes, ctypes.byref(address), ctypes.byref(size))
    library.pthread_attr_destroy(attributes)
    return size.value


async def test_a_constraint_that_cannot_be_followed_ends_only_its_own_request(model: Path) -> None:
    # The grammar has many alternatives only from the second character on.
    names = [f"B{i}" for i in range(2100)]
    rules = [f"{name}: /[b-y]{{1,9}}{name}/" for name in names]
    wide = compiled("grammar", "\n".join([f"start: /a/ ({' | '.join(names)})", *rules]))
    async with EngineHarness.start(model) as harness:
        beside = make_request(PROMPT, max_tokens=20)
        alone = await harness.run(beside)
        failing = constrained(wide, sampling=GREEDY)
        with pytest.raises(InvalidRequestError, check=says("CONSTRAINT_TOO_COMPLEX")):
            await harness.run(failing)
        assert (await harness.run(beside)).bits == alone.bits


def test_a_panic_of_the_library_does_not_end_the_engine(
    schema: Constraint, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        pass

    def panic(self: Constraint) -> Any:
        raise Panic

    monkeypatch.setattr(Constraint, "matcher", panic)
    sequence = Sequence(constrained(schema), mix_of(""), 0.0)
    masks = Masks(frozenset({EOS}))
    masks.begin([sequence])
    (mask,) = masks.take().values()
    assert isinstance(mask, TokenMask)
    assert mask.error is not None
    assert mask.error.reason == "INTERNAL"
    assert masks.take() == {}
    masks = Masks(frozenset({EOS}), is_late=True)
    masks.begin([sequence])
    (late,) = masks.take().values()
    assert isinstance(late, LateMask)
    assert late.settle(5) is None
    mask = late.make()
    assert mask.error is not None
    assert mask.error.reason == "INTERNAL"


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, VOCAB_SIZE, 1000])
def test_the_kernel_changes_only_its_own_rows(
    vocab: int, by_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_torch:
        monkeypatch.setattr(native, "library", lambda: None)
    generator = np.random.default_rng(0)
    for num_words in (1, 2, (vocab + 31) // 32, (vocab + 31) // 32 + 1):
        logits = torch.randn(5, vocab)
        before, rows = logits.clone(), [3, 0]
        words = generator.integers(-(2**31), 2**31, (2, num_words), dtype=np.int32)
        # Mask words that allow all tokens or none.
        words[:, ::3], words[:, 1::3] = -1, 0
        apply_token_mask(logits, torch.tensor(rows), torch.from_numpy(words))
        for row in (1, 2, 4):
            assert torch.equal(logits[row], before[row])
        for row, mask in zip(rows, words, strict=True):
            for token in range(vocab):
                word = token // 32
                is_allowed = word < num_words and bool(int(mask[word]) >> (token % 32) & 1)
                expected = float(before[row, token]) if is_allowed else float("-inf")
                assert float(logits[row, token]) == expected
