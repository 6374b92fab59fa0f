"""A cached block is found only by the weights that computed it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from builders.bases.tiny_models import save_tiny_model
from builders.random_adapters import AdapterSpec, arch_of, write_adapter
from hypothesis import given
from hypothesis import strategies as st
from servers.engine_harness import Answer, EngineHarness, make_request

from turret.server.adapters.adapter import AdapterRef, Mix
from turret.server.engine.scheduling.block_pool import MixKey, next_key, root_key
from turret.server.engine.scheduling.sequence import Sequence
from turret.server.engine.speculation import Drafter

uuids = st.text("0123456789abcdef", min_size=32, max_size=32) | st.sampled_from(
    ["0" * 32, "1" * 32, "01" * 16]
)
# Adding 0 turns -0.0 into 0.0.
weights = (st.floats(-100, 100, width=32) | st.sampled_from([0.0, 1.0, -1.0, 0.5])).map(
    lambda weight: weight + 0.0
)
members = st.tuples(uuids, st.integers(1, 1 << 40), weights)
mixes = st.lists(members, max_size=3).map(tuple)
blocks = st.lists(st.lists(st.integers(-1, 300_000), min_size=4, max_size=4), max_size=3)


def chain(base_generation: int, mix: MixKey, tokens: SequenceOf[SequenceOf[int]]) -> bytes:
    key = root_key(base_generation, mix)
    for block in tokens:
        key = next_key(key, block)
    return key


@given(mixes, mixes, st.integers(1, 3), st.integers(1, 3), blocks, blocks)
def test_only_equal_weights_and_tokens_share_keys(
    one: MixKey, other: MixKey, base: int, other_base: int, tokens: list, other_tokens: list
) -> None:
    same = (one, base, tokens) == (other, other_base, other_tokens)
    assert (chain(base, one, tokens) == chain(other_base, other, other_tokens)) == same


@given(mixes.filter(bool), st.data(), blocks)
def test_any_change_of_a_mix_changes_the_key(mix: tuple, data: st.DataObject, tokens: list) -> None:
    index = data.draw(st.integers(0, len(mix) - 1))
    uuid, generation, weight = mix[index]
    nearest = math.nextafter(weight, math.inf)
    changed = data.draw(
        st.sampled_from(
            [(uuid, generation + 1, weight), (uuid, generation, nearest), ("f" * 31, 1, weight)]
        )
    )
    for other in ((*mix[:index], changed, *mix[index + 1 :]), mix[:index] + mix[index + 1 :]):
        assert chain(1, mix, tokens) != chain(1, other, tokens)
    assert chain(1, mix, tokens) != chain(2, mix, tokens)
    if mix != mix[::-1]:
        assert chain(1, mix, tokens) != chain(1, mix[::-1], tokens)


@given(st.binary(min_size=1, max_size=64), st.binary(max_size=64), blocks.filter(bool))
def test_another_salt_changes_the_key(salt: bytes, other: bytes, tokens: list) -> None:
    keys = {next_key(root_key(1, ()), tokens[0], salt=each) for each in (salt, other)}
    assert len(keys) == len({salt, other})


def test_every_part_of_a_key_counts() -> None:
    mix = (("0" * 32, 1, 1.0),)
    flags = [(False, False), (False, True), (True, False), (True, True)]
    roots = {root_key(1, mix, is_long=long, is_first_pass=first) for long, first in flags}
    assert len(roots) == len(flags)
    changes = [(), ((1, mix),), ((2, mix),), ((1, ()),), ((1, mix), (2, ()))]
    assert len({next_key(b"", (1, 2, 3), each) for each in changes}) == len(changes)


@pytest.mark.parametrize(
    ("num_virtual", "num_preset", "num_shared"), [(0, 0, 0), (32, 32, 2), (32, 0, 2), (20, 0, 1)]
)
def test_blocks_before_the_text_are_shared_across_salts(
    num_virtual: int, num_preset: int, num_shared: int
) -> None:
    """The shared part is a prefix or soft tokens, up to the block in which the text begins."""

    def keys(salt: bytes) -> list[bytes]:
        request = make_request(PROMPT, salt=salt)
        mix = Mix(())
        sequence = Sequence(request, mix, 0.0, num_virtual=num_virtual, num_preset=num_preset)
        sequence.keys.append(root_key(1, ()))
        sequence.extend_keys(len(sequence.tokens), 16)
        return sequence.keys[1:]

    assert len(keys(b"")) == (num_virtual + len(PROMPT)) // 16
    for one, other in ((b"", b"a"), (b"a", b"b")):
        same = [mine == theirs for mine, theirs in zip(keys(one), keys(other), strict=True)]
        assert same == [index < num_shared for index in range(len(same))]


# Tests on a real engine.

PROMPT = tuple(range(60, 110))  # three full blocks


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[EngineHarness]:
    model = save_tiny_model("llama", tmp_path / "model")
    for seed, name in enumerate("abc"):
        spec = AdapterSpec(name, rank=4, strength=1.0)
        write_adapter(tmp_path / "adapters", arch_of(model), spec, seed=seed)
    async with EngineHarness.start(model, tmp_path / "adapters", adapters="abc") as harness:
        yield harness


def cached(answer: Answer) -> int:
    return answer.finish.usage.cached_tokens


async def test_nothing_is_shared_across_adapters_generations_and_mixes(
    engine: EngineHarness,
) -> None:
    mixes = [
        (),
        (AdapterRef(name="a"),),
        (AdapterRef(name="b"),),
        (AdapterRef(name="a", weight=0.5),),
        (AdapterRef(name="a"), AdapterRef(name="b")),
        (AdapterRef(name="b"), AdapterRef(name="a")),
        (AdapterRef(name="a"), AdapterRef(name="b", weight=-1.0)),
    ]
    first = [await engine.run(make_request(PROMPT, *mix)) for mix in mixes]
    assert [cached(answer) for answer in first] == [0] * len(mixes)
    again = [await engine.run(make_request(PROMPT, *mix)) for mix in mixes]
    assert all(cached(answer) >= 32 for answer in again)
    assert [answer.bits for answer in again] == [answer.bits for answer in first]


async def test_requests_with_other_salts_share_no_drafts_and_no_blocks(
    engine: EngineHarness,
) -> None:
    keys, bits = set(), set()
    draft = Drafter.draft

    def noted(drafter: Drafter, *arguments: Any) -> tuple[int, ...]:
        keys.add(drafter.memory_key)
        return draft(drafter, *arguments)

    with patch.object(Drafter, "draft", noted):
        for salt in (b"", b"alice", b"bob"):
            for found in (0, 48):
                answer = await engine.run(make_request(PROMPT, "a", salt=salt))
                assert cached(answer) == found
                bits.add(answer.bits)
    assert len(bits) == 1
    assert len(keys) == 3


async def test_a_replaced_adapter_never_answers_from_old_blocks(engine: EngineHarness) -> None:
    requests = {name: make_request(PROMPT, name) for name in "abc"}
    expected = {name: (await engine.run(request)).bits for name, request in requests.items()}
    assert len(set(expected.values())) == 3
    for path in ("b", "c", "a", "b"):
        engine.registry.replace("a", path)
        answer = await engine.run(make_request(PROMPT, "a"))
        assert (cached(answer), answer.bits) == (0, expected[path])
        again = await engine.run(make_request(PROMPT, "a"))
        assert cached(again) >= 32
        assert again.bits == expected[path]


async def test_a_name_loaded_again_never_answers_from_old_blocks(engine: EngineHarness) -> None:
    before = await engine.run(make_request(PROMPT, "a"))
    for path in ("b", "a"):
        engine.registry.unload("a")
        engine.registry.load("a", path)
        answer = await engine.run(make_request(PROMPT, "a"))
        assert cached(answer) == 0
        assert (answer.bits == before.bits) == (path == "a")


async def test_both_generations_share_a_batch(engine: EngineHarness) -> None:
    """The device holds both generations at once, each under its own key."""
    expected = {name: await engine.run(make_request(PROMPT, name, max_tokens=40)) for name in "ab"}
    old = await engine.engine.submit(make_request(PROMPT, "a", max_tokens=400))
    outputs = [await anext(aiter(old)) for _ in range(3)]
    engine.registry.replace("a", "b")
    assert engine.registry.get("a").in_flight == 1
    new = await engine.run(make_request(PROMPT, "a", max_tokens=40))
    assert engine.registry.get("a").in_flight == 1
    async for output in old:
        outputs.append(output)
    tokens = tuple(token for output in outputs for token in output.token_ids)
    assert tokens[:40] == expected["a"].token_ids
    assert new.bits == expected["b"].bits
    finish = outputs[-1].finish
    assert finish is not None
    assert finish.adapters_used[0].generation == 1
    assert new.finish.adapters_used[0].generation == 2
