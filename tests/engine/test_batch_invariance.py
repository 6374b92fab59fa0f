"""A request's tokens and logprobs have the same bits alone and in any batch.

Answers are compared with ``==``. They must not depend on the batch, the chunking of prompts, the
place of an adapter in the pack, preemption, the prefix cache or the number of threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.tiny_models import VOCAB_SIZE, save_tiny_model
from builders.random_adapters import ALL, AdapterSpec, arch_of, write_adapter
from servers.engine_harness import Answer, EngineHarness, make_request

from turret.kernels import cpu as native
from turret.kernels.rows import forget_choices, row_addmm_, row_linear, row_silu
from turret.server.adapters.adapter import AdapterRef
from turret.server.engine.scheduling.request import FinishReason, Request, SamplingParams

QV = ("q_proj", "v_proj")
SPECS = (
    AdapterSpec("lora1", 1, ("q_proj",)),
    AdapterSpec("lora2", 2, QV),
    AdapterSpec("rslora3", 3, ALL, is_rslora=True),
    AdapterSpec("dora4", 4, QV, is_dora=True),
    AdapterSpec("bias5", 5, ALL, has_bias=True),
    AdapterSpec("lora6", 6, ("o_proj", "down_proj")),
    AdapterSpec("dora7", 7, ALL, is_dora=True),
    AdapterSpec("rslora8", 8, QV, is_rslora=True),
    AdapterSpec("lora9", 9, ("gate_proj", "up_proj", "down_proj")),
    AdapterSpec("lora10", 10, ("k_proj",)),
    AdapterSpec("bias11", 11, QV, has_bias=True),
    AdapterSpec("lora12", 12),
    AdapterSpec("dora13", 13, ("o_proj",), is_dora=True),
    AdapterSpec("rslora14", 14, ALL, is_rslora=True),
    AdapterSpec("lora15", 15, QV),
    AdapterSpec("lora16", 16),
    # Two ranks far above the others.
    AdapterSpec("lora100", 100, QV),
    AdapterSpec("lora128", 128, ("q_proj", "o_proj")),
)
NAMES = tuple(spec.name for spec in SPECS)
# Prompt lengths around the boundaries of blocks (16), short segments (8) and attention tiles (128).
LENGTHS = (3, 9, 16, 17, 40, 70, 150, 1, 33, 130, 8, 64, 127, 12, 90, 5, 200, 31, 48, 129)
# Requests of the mixed batch that are cancelled after this many tokens.
CANCELLED = {3: 1, 9: 4, 15: 2}


def ref(name: str, weight: float = 1.0) -> AdapterRef:
    return AdapterRef(name=name, weight=weight)


MIXES: tuple[tuple[AdapterRef, ...], ...] = (
    *((ref(name),) for name in NAMES),
    (),
    (ref("lora12", 0.5), ref("dora7", -0.75), ref("bias5", 1.25)),
    (ref("rslora14", -1.0), ref("lora2")),
    (ref("lora16", 0.0),),
    (ref("lora1", 2.0), ref("lora128", 0.3)),
    (),
)


def prompt_of(number: int, length: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    generator = torch.Generator().manual_seed(1000 + number)
    return torch.randint(0, vocab_size, (length,), generator=generator).tolist()


def mixed_requests(max_tokens: int = 6, sampling: SamplingParams | None = None) -> list[Request]:
    changes: dict[str, Any] = {} if sampling is None else {"sampling": sampling}
    return [
        make_request(
            prompt_of(i, LENGTHS[i % len(LENGTHS)]), *mix, max_tokens=max_tokens, **changes
        )
        for i, mix in enumerate(MIXES)
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns (model directory, adapter root) by architecture; each is created once."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(architecture: str) -> tuple[Path, Path]:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            model = save_tiny_model(architecture, folder / "model")
            for seed, spec in enumerate(SPECS):
                write_adapter(folder / "adapters", arch_of(model), spec, seed)
            made[architecture] = model, folder / "adapters"
        return made[architecture]

    return make


@pytest.fixture
def threads() -> Iterator[Any]:
    """``threads(n)`` makes torch use n threads until the test ends."""

    def use(count: int) -> None:
        torch.set_num_threads(count)

    before = torch.get_num_threads()
    yield use
    use(before)


async def each_alone(
    model: Path | None, root: Path, requests: Sequence[Request], **options: Any
) -> list[Answer]:
    """The answers of separate engines, each with the prompt in one piece."""
    answers = []
    options = {"max_num_batched_tokens": 512, **options}
    for request in requests:
        names = [a.name for a in request.adapters]
        async with EngineHarness.start(model, root, adapters=names, **options) as harness:
            answers.append(await harness.run(request))
    return answers


async def in_company(harness: EngineHarness, requests: Sequence[Request]) -> list[Answer]:
    """The answers to requests that arrive in waves; some are cancelled midway."""
    begun = [asyncio.Event() for _ in requests]

    async def one(i: int) -> Answer:
        if i >= 6:
            await begun[i - 6].wait()

        def on_token(count: int) -> None:
            if count >= 1 + i % 3:
                begun[i].set()

        answer = await harness.run(requests[i], cancel_after=CANCELLED.get(i), on_token=on_token)
        begun[i].set()
        return answer

    return list(await asyncio.gather(*(one(i) for i in range(len(requests)))))


def assert_same(got: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Compare bit for bit; a cancelled answer is the beginning of the whole one."""
    for i, (one, other) in enumerate(zip(got, expected, strict=True)):
        label = f"request {i}"
        if one.finish.reason is FinishReason.CANCELLED:
            count = len(one.token_ids)
            assert count >= CANCELLED[i], label
            assert one.token_ids == other.token_ids[:count], label
            assert one.logprobs == other.logprobs[:count], label
            assert one.top == other.top[:count], label
        else:
            assert one.bits == other.bits, label


# Every architecture is combined with every dtype, and every dtype with every number of threads.
@pytest.mark.parametrize(
    ("architecture", "dtype", "num_threads"),
    [
        *(("llama", "float32", 1), ("llama", "bfloat16", 3), ("mistral", "float32", 3)),
        *(("mistral", "bfloat16", 1), ("qwen2", "float32", 1), ("qwen2", "bfloat16", 3)),
    ],
)
async def test_a_mixed_batch_answers_each_request_as_if_alone(
    tiny: Any, threads: Any, architecture: str, dtype: str, num_threads: int
) -> None:
    model, root = tiny(architecture)
    requests = mixed_requests()
    threads(num_threads)
    expected = await each_alone(model, root, requests, dtype=dtype)
    assert len({answer.bits for answer in expected}) == len(expected), "the adapters do nothing"
    async with EngineHarness.start(model, root, dtype=dtype, adapters=NAMES) as harness:
        got = await in_company(harness, requests)
    assert {i for i, a in enumerate(got) if a.finish.reason is FinishReason.CANCELLED}
    assert_same(got, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
async def test_the_torch_formulation_is_batch_invariant_too(
    tiny: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The torch formulation is used if the kernels were not compiled."""
    monkeypatch.setattr(native, "library", lambda: None)
    forget_choices()
    model, root = tiny("qwen2")
    requests = mixed_requests()
    expected = await each_alone(model, root, requests, dtype=dtype)
    async with EngineHarness.start(model, root, dtype=dtype, adapters=NAMES) as harness:
        got = await in_company(harness, requests)
    assert_same(got, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_scores_do_not_depend_on_the_batch(tiny: Any, dtype: str) -> None:
    model, root = tiny("qwen3")
    requests = [make_request(r.prompt_token_ids, *r.adapters, score=True) for r in mixed_requests()]
    expected = await each_alone(model, root, requests, dtype=dtype)
    async with EngineHarness.start(model, root, dtype=dtype, adapters=NAMES) as harness:
        got = await harness.run_all(requests)
    for one, other in zip(got, expected, strict=True):
        assert len(other.prompt_logprobs) == other.finish.usage.prompt_tokens
        assert one.bits == other.bits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_base_requests_keep_their_bits_when_adapters_are_loaded(
    tiny: Any, dtype: str
) -> None:
    model, root = tiny("llama")
    base = [make_request(prompt_of(i, n), max_tokens=6) for i, n in enumerate(LENGTHS)]
    async with EngineHarness.start(model, root, dtype=dtype) as harness:
        expected = await harness.run_all(base)
    async with EngineHarness.start(model, root, dtype=dtype, adapters=NAMES) as harness:
        mixed = [r for r in mixed_requests() if r.adapters]
        got = (await harness.run_all([*base, *mixed]))[: len(base)]
    assert [a.bits for a in got] == [a.bits for a in expected]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_preemption_leaves_answers_unchanged(
    tiny: Any, dtype: str, preempted: list[tuple[Any, int]]
) -> None:
    model, root = tiny("smollm3")
    requests = [r for r in mixed_requests(max_tokens=48) if len(r.prompt_token_ids) < 100]
    expected = await each_alone(model, root, requests, dtype=dtype)
    assert not preempted
    async with EngineHarness.start(
        model, root, dtype=dtype, adapters=NAMES, kv_cache_bytes=1 << 20
    ) as harness:
        got = await harness.run_all([*requests, *requests])
    assert preempted
    assert [a.bits for a in got] == [a.bits for a in expected] * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_prefix_cache_hit_gives_the_bits_of_a_miss(tiny: Any, dtype: str) -> None:
    model, root = tiny("mistral")
    mixes: list[tuple[AdapterRef, ...]] = [
        (),
        (ref("dora7"),),
        (ref("dora7", 0.5),),
        (ref("lora12"), ref("lora2", -1.0)),
        (ref("lora2", -1.0), ref("lora12")),
    ]
    async with EngineHarness.start(model, root, dtype=dtype, adapters=NAMES) as harness:
        for mix in mixes:
            prompt = prompt_of(7, 100)
            miss = await harness.run(make_request(prompt, *mix))
            # The prompt's blocks must not be found for another mix.
            assert miss.finish.usage.cached_tokens == 0
            hit = await harness.run(make_request(prompt, *mix))
            assert hit.finish.usage.cached_tokens == 96
            assert hit.bits == miss.bits
            longer = await harness.run(make_request([*prompt, 1, 2, 3], *mix))
            assert longer.finish.usage.cached_tokens >= 96
            (alone,) = await each_alone(
                model, root, [make_request([*prompt, 1, 2, 3], *mix)], dtype=dtype
            )
            assert longer.bits == alone.bits


async def test_a_seed_draws_the_same_tokens_alone_and_in_a_batch(tiny: Any) -> None:
    model, root = tiny("llama")
    sampling = SamplingParams(temperature=1.1, top_p=0.95, top_k=50, seed=11)
    requests = mixed_requests(max_tokens=12, sampling=sampling)
    expected = await each_alone(model, root, requests)
    async with EngineHarness.start(model, root, adapters=NAMES) as harness:
        assert_same(await in_company(harness, requests), expected)
    greedy = await each_alone(model, root, mixed_requests(max_tokens=12)[:4])
    assert [a.token_ids for a in greedy] != [a.token_ids for a in expected[:4]]


@pytest.mark.slow
async def test_the_embedded_model_is_batch_invariant_in_bfloat16(tmp_path: Path) -> None:
    arch = arch_of(None)
    for seed, spec in enumerate(SPECS):
        write_adapter(tmp_path, arch, spec, seed)
    requests = [
        make_request(prompt_of(i, LENGTHS[i % len(LENGTHS)], arch.vocab_size), *mix, max_tokens=4)
        for i, mix in enumerate(MIXES[::2])
    ]
    options: dict[str, Any] = {"dtype": "bfloat16", "adapters": NAMES}
    async with EngineHarness.start(None, tmp_path, **options) as harness:
        expected = [await harness.run(request) for request in requests]
    async with EngineHarness.start(None, tmp_path, **options) as harness:
        assert_same(await in_company(harness, requests), expected)


# The underlying operations, at their thresholds.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_addmm_ignores_other_rows_and_zero_ranks(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    for columns in (32, 64, 192, 1536):
        for rank in (8, 16, 64):
            for span in (rank, 96, 128):
                b, v = noise(span, columns), noise(40, rank)
                for start in {0, 8, (span - rank) // 16 * 8, span - rank}:
                    if start + rank > span:
                        continue
                    own = b[start : start + rank]
                    # Cancel the leading bits of the product, so that the result shows the last
                    # ones.
                    y = -(v.float() @ own.float()).to(dtype)
                    expected = y.clone()
                    row_addmm_(expected, v, own)
                    for rows in (1, 2, 3, 15, 16, 40):
                        wide = torch.zeros(rows, span, dtype=dtype)
                        wide[:, start : start + rank] = v[:rows]
                        got = y[:rows].clone()
                        row_addmm_(got, wide, b)
                        assert torch.equal(got, expected[:rows]), (columns, rank, span, start, rows)


@pytest.mark.parametrize("num_threads", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_linear_ignores_other_rows_and_other_adapters(
    dtype: torch.dtype, num_threads: int, threads: Any
) -> None:
    threads(num_threads)
    generator = torch.Generator().manual_seed(0)
    for inner in (64, 576, 1536):
        x = torch.randn(40, inner, generator=generator).to(dtype)
        a = torch.randn(264, inner, generator=generator).to(dtype)
        full = row_linear(x, a)
        for start, end in ((0, 8), (256, 264), (40, 64), (64, 104), (0, 264)):
            for rows in (1, 2, 7, 8, 9, 16, 33):
                got = row_linear(x[:rows], a[start:end])
                assert torch.equal(got, full[:rows, start:end]), (inner, start, rows)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_silu_ignores_other_rows(dtype: torch.dtype, num_threads: int, threads: Any) -> None:
    threads(num_threads)
    generator = torch.Generator().manual_seed(0)
    for width in (100, 1536, 8960):
        gate, _ = torch.randn(200, 2 * width, generator=generator).to(dtype).chunk(2, dim=-1)
        alone = torch.cat([row_silu(gate[i : i + 1]) for i in range(200)])
        for rows in (2, 7, 64, 200):
            assert torch.equal(row_silu(gate[:rows]), alone[:rows]), (width, rows)
