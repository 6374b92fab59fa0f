"""The likeliest token is torch's argmax, of all tokens or of a mask's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from turret.kernels import cpu as native
from turret.kernels.likeliest import likeliest_tokens

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=[False, True], ids=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(native, "library", lambda: None)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 127, 128, 129, 256, 1000, 4099])
def test_the_likeliest_token_is_torchs_argmax(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    for _ in range(20):
        wide = torch.randn(6, vocab + 3, generator=generator)
        logits = wide[:, :vocab]
        assert torch.equal(likeliest_tokens(logits), logits.argmax(-1))
        rows = torch.tensor([4, 1, 4])
        assert torch.equal(likeliest_tokens(logits, rows), logits[rows].argmax(-1))
        # With many equal logits, the first one counts.
        coarse = (2 * logits).round()
        assert torch.equal(likeliest_tokens(coarse), coarse.argmax(-1))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "values",
    [
        [-INF] * 200,
        [NAN] * 200,
        [0.0] * 150 + [NAN] + [INF] * 60,
        [INF] * 130 + [NAN] * 2,
        [-INF] * 140 + [-1e30],
        [-0.0, 0.0] * 70,
        [INF] * 140,
    ],
)
def test_odd_values_are_as_in_torch(values: list[float]) -> None:
    logits = torch.tensor([values, values[::-1]])
    assert torch.equal(likeliest_tokens(logits), logits.argmax(-1))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 259, 1000])
def test_only_tokens_in_the_mask_are_chosen(vocab: int) -> None:
    generator = np.random.default_rng(vocab)
    logits = torch.from_numpy(generator.normal(size=(5, vocab)).round(1).astype(np.float32))
    before, rows = logits.clone(), torch.tensor([3, 0])
    for num_words in (1, (vocab + 31) // 32, (vocab + 31) // 32 + 1):
        for _ in range(20):
            words = generator.integers(-(2**31), 2**31, (2, num_words), dtype=np.int32)
            words &= generator.integers(-(2**31), 2**31, (2, num_words), dtype=np.int32)
            words[0, ::2] = 0
            bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").astype(bool)
            allowed = torch.zeros(2, vocab, dtype=torch.bool)
            width = min(vocab, bits.shape[1])
            allowed[:, :width] = torch.from_numpy(bits[:, :width])
            expected = logits[rows].masked_fill(~allowed, -INF).argmax(-1)
            found = likeliest_tokens(logits, rows, torch.from_numpy(words))
            assert torch.equal(found, expected)
    assert torch.equal(logits, before)


def test_every_library_finds_the_same_token() -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    rows, found = torch.arange(3), torch.empty(3, dtype=torch.int64)
    for isa in native.usable_isas():
        native.load(isa).turret_likeliest(
            logits.data_ptr(), 1000, 1000, rows.data_ptr(), 3, 0, 0, found.data_ptr()
        )
        assert torch.equal(found, logits.argmax(-1)), isa
