"""A tokenizer's patterns: known ones take linear time, others run in a child process."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from turret.server.api.inference_requests import input_token_ids
from turret.server.api.limits import InputLimits
from turret.server.basics import work
from turret.server.errors import InvalidRequestError
from turret.server.models import encoder as encoders
from turret.server.models import tokenizer
from turret.server.models.encoder import KNOWN, LLAMA3, Encoder
from turret.v1 import inference_pb2

# A run of `a` is matched again from each position, to its end and back twice.
SLOW = "a*a*b|."
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def backend_with(pattern: str) -> Tokenizer:
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(ALPHABET))}, []))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


@pytest.mark.parametrize("pattern", sorted(KNOWN))
@pytest.mark.parametrize(
    "piece", ["a", "A", "Aa", "1", " ", "\n", " \n", "!", "'s", "é", "a ", "  x"]
)
def test_known_patterns_take_linear_time(pattern: str, piece: str):
    encoder = Encoder(backend_with(pattern))
    assert not encoder.is_confined

    def seconds(size: int) -> float:
        texts = [(piece * size)[:size] + "~"]
        begun = time.thread_time()
        encoder.encode(texts)
        return time.thread_time() - begun

    seconds(1_000)
    short, long = (min(seconds(size) for _ in range(2)) for size in (4_000, 64_000))
    # Sixteen times the text: quadratic time would be 256 times as long.
    assert long < 80 * short + 0.05


@pytest.mark.parametrize("pattern", [SLOW, r"\d+", ".", "(a+)+$"])
def test_other_patterns_give_the_same_ids_in_a_child(pattern: str):
    backend = backend_with(pattern)
    backend.add_special_tokens(["<s>"])
    bos = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    encoder = Encoder(backend)
    assert encoder.is_confined
    texts = ["to be, or 2 be", "", "aaab é \U0001f600", "a\n\nb"]
    for special in (False, True):
        expected = [one.ids for one in backend.encode_batch(texts, add_special_tokens=special)]
        assert encoder.encode(texts, add_special_tokens=special) == expected


def test_normalizer_patterns_are_checked_but_plain_strings_are_not():
    backend = backend_with(LLAMA3)
    backend.normalizer = normalizers.Sequence([normalizers.Replace("a", "b")])
    assert not Encoder(backend).is_confined
    backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex(SLOW), "b")])
    assert Encoder(backend).is_confined


@pytest.mark.skipif(sys.platform != "linux", reason="other allocators keep other memory")
def test_memory_of_long_texts_is_returned():
    backend, text, together = backend_with(LLAMA3), "a b " * 75_000, threading.Barrier(4)
    encoder, process = Encoder(backend), psutil.Process()

    def encode(_: int) -> int:
        # Keep each thread busy, so that all of them allocate.
        together.wait()
        return len(encoder.encode([text])[0])

    with ThreadPoolExecutor(4) as pool:
        work.return_free_memory()
        before = process.memory_info().rss
        assert set(pool.map(encode, range(8))) == {300_000}
        assert (process.memory_info().rss - before) >> 20 < 100


@pytest.fixture
def slow_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tokenizer.Tokenizer:
    backend_with(SLOW).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(encoders, "CPU_SECONDS", 1.0)
    return tokenizer.Tokenizer.load(tmp_path, frozenset(), len(ALPHABET))


async def test_a_slow_text_is_rejected_and_others_continue(slow_tokenizer: tokenizer.Tokenizer):
    limits = InputLimits(vocab_size=len(ALPHABET), max_tokens=8192, max_chars=8192)

    async def ids(text: str) -> list[int]:
        request = inference_pb2.GenerateRequest(prompt=text)
        return await input_token_ids(request, slow_tokenizer, limits, b"")

    assert len(await ids("abc")) == 3
    longest, last = 0.0, time.monotonic()

    async def neighbour() -> None:
        nonlocal longest, last
        while True:
            await asyncio.sleep(0.01)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()

    watching = asyncio.create_task(neighbour())
    with pytest.raises(InvalidRequestError) as refused:
        await ids("a" * 4000)
    watching.cancel()
    assert refused.value.args[0].reason == "TEXT_NOT_ENCODED"
    assert longest < 0.5
    assert len(await ids("abc")) == 3
