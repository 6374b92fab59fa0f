"""A library that breaks the guarantee is detected before it is used, and answers stay equal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders.bases.tiny_models import VOCAB_SIZE, save_tiny_model
from builders.random_adapters import ALL, AdapterSpec, arch_of, write_adapter
from planted_libraries import LIBRARIES, plant
from servers.engine_harness import Answer, EngineHarness, make_request

from turret.kernels import cpu as native
from turret.kernels.rows import (
    cancelling,
    choices,
    forget_choices,
    row_addmm_,
    row_linear,
    table_product,
)
from turret.server.models.weights import nf4_cpu
from turret.server.models.weights.nf4 import Nf4Weight, PackedLinear, nf4_linear

pytestmark = pytest.mark.usefixtures("torch_only")


@pytest.fixture
def torch_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Disable the compiled kernels, and forget all trials."""
    monkeypatch.setattr(native, "library", lambda: None)
    forget_choices()
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    forget_choices()


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_planted_library_breaks_the_promise(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    plant(monkeypatch, library)
    x, w = cancelling(40, 48, 192, torch.float32)
    whole = F.linear(x, w)
    counts = (1, 3, 8, 17)
    assert not all(torch.equal(F.linear(x[:n], w), whole[:n]) for n in counts) or not torch.equal(
        F.linear(x[1:9], w), whole[1:9]
    )


@pytest.mark.parametrize(
    ("library", "threads"), [*((name, 1) for name in LIBRARIES), ("others with two threads", 2)]
)
def test_products_keep_their_bits(
    library: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(threads)
    plant(monkeypatch, library)
    x, w = cancelling(40, 80, 192, torch.float32)
    alone = torch.cat([row_linear(x[i : i + 1], w) for i in range(40)])
    for first, last in ((0, 40), (0, 8), (3, 19), (7, 40), (39, 40)):
        got = row_linear(x[first:last], w)
        assert torch.equal(got, alone[first:last]), (first, last)
    assert (alone - x @ w.T).abs().max() < 1e-3
    v, b = torch.randn(20, 32), torch.randn(32, 48)
    own = torch.zeros(20, 48)
    row_addmm_(own, v, b)
    for rows in (1, 7, 20):
        got = torch.zeros(rows, 48)
        row_addmm_(got, v[:rows], b)
        assert torch.equal(got, own[:rows])
    x, table = torch.randn(9, 12, 64), torch.randn(9, 64, 32)
    alone = torch.cat([table_product(x[i : i + 1], table[i : i + 1]) for i in range(9)])
    assert torch.equal(table_product(x, table), alone)
    assert torch.equal(table_product(x[:, 5:], table), alone[:, 5:])


def test_the_reported_choice_describes_each_library(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = cancelling(4, 80, 192, torch.float32)
    found = {}
    for library in LIBRARIES:
        with monkeypatch.context() as patched:
            plant(patched, library)
            forget_choices()
            row_linear(x, w)
            found[library] = choices()["linear"]
    assert found["others for 8 rows than for 16"] == "16 rows or more"
    assert found["others for odd places"] == "one row at a time"
    assert found["others for rows in company"] == "4 rows or more"
    assert found["others every time"] == "ordered sums"


SPECS = (
    AdapterSpec("lora8", 8, ALL),
    AdapterSpec("dora3", 3, ("q_proj", "v_proj"), is_dora=True),
    AdapterSpec("lora20", 20, ("o_proj", "down_proj")),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("planted")
    model = save_tiny_model("qwen3", folder / "model")
    for seed, spec in enumerate(SPECS):
        write_adapter(folder / "adapters", arch_of(model), spec, seed)
    return model, folder / "adapters"


async def answers(tiny: tuple[Path, Path], *, together: bool) -> list[Answer]:
    generator = torch.Generator().manual_seed(0)
    names = [spec.name for spec in SPECS]
    requests = [
        make_request(torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist(), *mix)
        for n, mix in zip((3, 20, 33, 9), ([names[0]], names[1:], [names[2]], []), strict=True)
    ]
    options: dict[str, Any] = {"max_num_batched_tokens": 24, "max_num_seqs": 8}
    async with EngineHarness.start(*tiny, adapters=names, **options) as harness:
        if together:
            return await harness.run_all(requests)
        return [await harness.run(request) for request in requests]


first, *others = LIBRARIES


@pytest.mark.parametrize(
    "library",
    [first, *(pytest.param(name, marks=pytest.mark.long) for name in others)],
)
async def test_answers_match_those_given_alone(
    library: str, tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2 if "threads" in library else 1)
    plant(monkeypatch, library)
    alone = await answers(tiny, together=False)
    assert [a.bits for a in await answers(tiny, together=True)] == [a.bits for a in alone]
    assert len({a.bits for a in alone}) == len(alone)


async def test_answers_differ_without_the_trial(
    tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine test above can fail: here, every trial passes."""
    plant(monkeypatch, "others for 8 rows than for 16")
    monkeypatch.setattr("turret.kernels.rows._keeps_rows", lambda *_: True)
    alone = await answers(tiny, together=False)
    assert [a.bits for a in await answers(tiny, together=True)] != [a.bits for a in alone]


def test_a_quantised_product_that_breaks_the_promise_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not nf4_cpu.has_library_product(torch.device("cpu")):
        pytest.skip("bitsandbytes has no product for this processor")
    gemv = nf4_cpu._gemv

    def spoilt(x: torch.Tensor, *weight: Any) -> torch.Tensor:
        found = gemv(x, *weight)
        return found if x.shape[0] >= 16 else found * 1.01

    weight = Nf4Weight.quantize(torch.randn(64, 192))
    linear = nf4_linear([weight], torch.bfloat16, torch.device("cpu"))
    assert isinstance(linear, PackedLinear)
    x = torch.randn(40, 192).to(torch.bfloat16)
    monkeypatch.setattr(nf4_cpu, "_gemv", spoilt)
    whole = linear(x)
    assert linear.formulation() == "bitsandbytes 16 rows or more"
    for rows in (1, 3, 8, 17):
        assert torch.equal(linear(x[:rows]), whole[:rows])
