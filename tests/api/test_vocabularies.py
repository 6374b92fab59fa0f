"""Tokenizers of adapters are read once, kept while in use, and released with the server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from servers.fakes import FakeTokenizer

from turret.server.adapters.adapter import AdapterRef, TokenizerFiles
from turret.server.api.vocabularies import Vocabularies, Vocabulary
from turret.server.constraints.matcher import KeptConstraints
from turret.server.models import own_tokenizers
from turret.server.models.own_tokenizers import OwnTokenizers
from turret.v1 import adapters_pb2


class Adapters:
    """An adapter for every name, each with its own tokenizer."""

    def __init__(self) -> None:
        self.read_names: list[str] = []
        self.may_read = threading.Event()
        self.may_read.set()

    def find(self, refs: Iterable[AdapterRef]) -> Any:
        name = next(iter(refs)).name
        facts = SimpleNamespace(tokenizer=f"digest of {name}", vocab_size=5)
        return SimpleNamespace(key=name, facts=facts), ""

    def read(self, adapter: Any) -> TokenizerFiles:
        self.read_names.append(adapter.key)
        assert self.may_read.wait(10)
        return TokenizerFiles({}, adapter.facts.tokenizer, 0)


class Closed:
    """A compiler that compiles nothing."""

    is_closed = False

    def __init__(self) -> None:
        self.kept = KeptConstraints()

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def adapters() -> Adapters:
    return Adapters()


@pytest.fixture
def vocabularies(adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> Vocabularies:
    monkeypatch.setattr(OwnTokenizers, "_read", lambda self, files, rows: FakeTokenizer())
    monkeypatch.setattr(own_tokenizers, "MAX_KEPT", 3)
    base: Any = FakeTokenizer()
    known: Any = adapters
    constraints: Any = Closed()
    own = OwnTokenizers(base, Path("config.json"))
    return Vocabularies(Vocabulary(base, constraints), known, own)


def weights(name: str) -> list[adapters_pb2.AdapterWeight]:
    return [adapters_pb2.AdapterWeight(name=name)]


async def test_concurrent_requests_read_a_tokenizer_once(
    adapters: Adapters, vocabularies: Vocabularies
) -> None:
    adapters.may_read.clear()
    asking = [asyncio.create_task(vocabularies.of(weights("a"))) for _ in range(5)]
    await asyncio.sleep(0)
    asking[0].cancel()
    adapters.may_read.set()
    cancelled, first, *others = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert isinstance(first, Vocabulary)
    assert others == [first] * 3
    assert adapters.read_names == ["a"]


async def test_slow_reads_delay_only_other_reads_and_take_turns(
    adapters: Adapters, vocabularies: Vocabularies
) -> None:
    adapters.may_read.clear()
    asking = [
        asyncio.create_task(vocabularies.of(weights(f"a{number}"), tenant=b"a"))
        for number in range(50)
    ]
    await asyncio.sleep(0)
    asking.append(asyncio.create_task(vocabularies.of(weights("b"), tenant=b"b")))
    # A task takes several turns of the event loop until its read waits for a thread.
    for _ in range(10):
        await asyncio.sleep(0)
    # Other work that blocks uses the loop's own threads.
    assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), 5) == 1
    adapters.may_read.set()
    await asyncio.gather(*asking)
    assert adapters.read_names.index("b") <= 4


async def test_reads_for_which_nobody_waits_are_not_made(
    adapters: Adapters, vocabularies: Vocabularies
) -> None:
    adapters.may_read.clear()
    asking = [asyncio.create_task(vocabularies.of(weights(name))) for name in "abcdde"]
    await asyncio.sleep(0)
    gone = [asking.pop(index) for index in (5, 3, 2)]
    for task in gone:
        task.cancel()
    await asyncio.wait(gone)
    # A tokenizer whose read was cancelled can be asked for again at once.
    asking.append(asyncio.create_task(vocabularies.of(weights("c"))))
    await asyncio.sleep(0)
    adapters.may_read.set()
    found = await asyncio.gather(*asking)
    assert [type(each) for each in found] == [Vocabulary] * 4
    assert sorted(adapters.read_names) == ["a", "b", "c", "d"]


async def test_an_error_reaches_every_caller_and_is_not_cached(
    adapters: Adapters, vocabularies: Vocabularies, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(adapter: Any) -> Any:
        raise OverflowError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(adapters, "read", fail)
        asking = [vocabularies.of(weights("a")) for _ in range(2)]
        faults = await asyncio.gather(*asking, return_exceptions=True)
        assert [str(fault) for fault in faults] == ["gone"] * 2
    assert (await vocabularies.of(weights("a"))).own is not None


async def test_the_most_recently_used_vocabularies_are_kept(
    adapters: Adapters, vocabularies: Vocabularies
) -> None:
    for name in "abcad":
        await vocabularies.of(weights(name))
    # The fourth tokenizer replaced b; this did not count as a use of the others.
    for name in "cad":
        await vocabularies.of(weights(name))
    await vocabularies.of(weights("e"))
    await vocabularies.of(weights("a"))
    assert adapters.read_names == ["a", "b", "c", "d", "e"]


async def test_all_vocabularies_share_one_budget_for_compiled_constraints(
    vocabularies: Vocabularies,
) -> None:
    base, first = await vocabularies.of([]), await vocabularies.of(weights("a"))
    assert first.kept is base.kept
    forgotten: list[Vocabulary] = []

    class Forgets(Closed):
        def forget(self) -> None:
            forgotten.append(first)

    first._constraints = Forgets()  # type: ignore[assignment]
    for name in "bcd":
        assert (await vocabularies.of(weights(name))).kept is base.kept
    assert forgotten == [first]


async def test_closing_closes_every_compiler(vocabularies: Vocabularies) -> None:
    base, own = await vocabularies.of([]), await vocabularies.of(weights("a"))
    compilers = [Closed(), Closed()]
    for vocabulary, compiler in zip((base, own), compilers, strict=True):
        vocabulary._constraints = compiler  # type: ignore[assignment]
    vocabularies.close()
    assert [compiler.is_closed for compiler in compilers] == [True, True]
