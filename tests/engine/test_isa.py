"""The compiled kernels of every instruction set keep a row's bits, and ``TURRET_ISA`` selects one.

A library for a lower set runs on any better processor, so lower sets are tested as well.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.bases.tiny_models import VOCAB_SIZE, save_tiny_model
from builders.random_adapters import ALL, AdapterSpec, arch_of, write_adapter
from servers.engine_harness import EngineHarness, make_request

from turret.kernels import cpu as native
from turret.kernels.cpu.isas import ISAS
from turret.kernels.rows import row_addmm_, row_exp_, row_linear, row_product, table_product
from turret.server.models.decoding.layer_ops import KvCache

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")

SPECS = (
    AdapterSpec("lora8", 8, ALL),
    AdapterSpec("dora3", 3, ("q_proj", "v_proj"), is_dora=True),
    AdapterSpec("lora20", 20, ("o_proj", "down_proj"), has_bias=True),
)


@pytest.fixture(params=[isa for isa in ISAS if isa in native.usable_isas()])
def isa(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Use one instruction set during a test."""
    library = native.load(request.param)
    monkeypatch.setattr(native, "library", lambda: library)
    return request.param


@pytest.fixture(params=[1, 2, 3, 4])
def threads(request: Any) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("isa")
    model = save_tiny_model("qwen3", folder / "model")
    for seed, spec in enumerate(SPECS):
        write_adapter(folder / "adapters", arch_of(model), spec, seed)
    return model, folder / "adapters"


def spoil(cache: KvCache, blocks: Sequence[int]) -> None:
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_answers_match_those_given_alone(
    tiny: tuple[Path, Path],
    isa: str,
    threads: int,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    names = [spec.name for spec in SPECS]
    mixes = ([names[0]], names[1:], [], [names[2]], [names[1]])
    requests = [
        make_request(
            torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist(), *mix, max_tokens=4
        )
        for n, mix in zip((3, 20, 33, 9, 1), mixes, strict=True)
    ]
    options: dict[str, Any] = {"max_num_batched_tokens": 24, "max_num_seqs": 8, "dtype": dtype}
    async with EngineHarness.start(*tiny, adapters=names, **options) as harness:
        alone = [(await harness.run(request)).bits for request in requests]
    assert len(set(alone)) == len(alone)
    # The kernels must not read positions that no sequence wrote.
    monkeypatch.setattr(KvCache, "clear", spoil)
    async with EngineHarness.start(*tiny, adapters=names, **options) as harness:
        assert [answer.bits for answer in await harness.run_all(requests)] == alone


async def test_the_log_lists_the_implementations_in_use(
    tiny: tuple[Path, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def said() -> dict[str, str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "turret"):
            async with EngineHarness.start(*tiny):
                pass
        (record,) = [r for r in caplog.records if r.message == "model loaded"]
        return record.fields  # type: ignore[attr-defined]

    native_fields = await said()
    assert native_fields["isa"] == native.isa()
    assert native_fields["products"] == native_fields["head"] == "native"
    assert native_fields["attention"] == "native"
    monkeypatch.setattr(native, "library", lambda: None)
    fields = await said()
    assert "isa" not in fields
    assert fields["products"].startswith("torch ")
    assert fields["head"].startswith("torch ")
    assert fields["attention"].startswith("torch ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_keep_their_bits(isa: str, dtype: torch.dtype) -> None:
    for inner, columns in ((64, 48), (200, 33), (577, 100)):
        x, w = torch.randn(40, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        whole = row_linear(x, w)
        exact = x.double() @ w.double().T
        assert (whole - exact).norm() / exact.norm() < (1e-6 if dtype == torch.float32 else 5e-3)
        y = -(x.float() @ w.float().T).to(dtype)
        added = y.clone()
        for start in range(0, inner, 128):
            part = slice(start, start + 128)
            row_addmm_(added, x[:, part], w.T[part].contiguous())
        for first, last in ((0, 1), (5, 9), (3, 40), (38, 40)):
            assert torch.equal(row_linear(x[first:last], w), whole[first:last])
            assert torch.equal(row_linear(x[first:last], w[3:20]), whole[first:last, 3:20])
            got = y[first:last].clone()
            for start in range(0, inner, 128):
                part = slice(start, start + 128)
                row_addmm_(got, x[first:last, part], w.T[part].contiguous())
            assert torch.equal(got, added[first:last])


def test_every_isa_with_fused_multiply_add_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, w, table = torch.randn(9, 7, 100), torch.randn(9, 33, 100), torch.randn(9, 100, 40)
    found = []
    for isa in native.usable_isas():
        if isa != "baseline":
            library = native.load(isa)
            monkeypatch.setattr(native, "library", lambda library=library: library)
            exponential = row_exp_(x[0].clone())
            found.append(torch.cat([*map(torch.flatten, (
                row_product(x, w), table_product(x, table), exponential))]))  # fmt: skip
    for other in found[1:]:
        assert torch.equal(other, found[0])


def chosen() -> str:
    """The instruction set that a new process would use."""
    found = native.library.__wrapped__()
    assert found is not None
    return str(found.isa)


def test_the_variable_limits_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = native.usable_isas()
    for wanted in ISAS:
        monkeypatch.setenv("TURRET_ISA", wanted)
        expected = [i for i in usable if ISAS.index(i) <= ISAS.index(wanted)][-1]
        assert chosen() == expected
    monkeypatch.setenv("TURRET_ISA", "avx9")
    with pytest.raises(ValueError, match=r"TURRET_ISA is 'avx9', not one of baseline, avx2"):
        native.library.__wrapped__()
    monkeypatch.delenv("TURRET_ISA")
    assert chosen() == usable[-1]


def test_a_library_that_does_not_load_is_skipped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    best, load = native.usable_isas()[-1], native.load
    if best == "baseline":
        pytest.skip("there is only one library")

    def broken(isa: str) -> Any:
        if isa == best:
            raise OSError("truncated")
        return load(isa)

    monkeypatch.setattr(native, "load", broken)
    assert chosen() == native.usable_isas()[-2]
    assert "do not load: truncated" in caplog.text
