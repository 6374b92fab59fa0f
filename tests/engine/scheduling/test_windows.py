"""The positions from which adapters with an invocation act, without a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from builders.sequences import BLOCK_SIZE, make_scheduler, sequence_of
from hypothesis import given
from hypothesis import strategies as st

from turret.server.engine.scheduling.sequence import Sequence, last_occurrence, stages_of

tokens = st.lists(st.integers(0, 2) | st.sampled_from([0xD800, 0xFEFF, 0x10FFFF]), max_size=12)


@given(tokens, tokens.filter(bool))
def test_the_last_occurrence_matches_a_plain_search(text: list[int], wanted: list[int]):
    starts = [i for i in range(len(text)) if text[i : i + len(wanted)] == wanted]
    assert last_occurrence(text, wanted) == (starts[-1] if starts else None)
    assert last_occurrence([*text, *wanted], wanted) == len(text)


@dataclass(frozen=True)
class Named:
    name: str
    invocation: tuple[int, ...] = ()


@dataclass(frozen=True)
class Names:
    """A mix with its members' names as the key."""

    members: tuple[tuple[Named, float], ...]

    @property
    def key(self) -> tuple[tuple[str, int, float], ...]:
        return tuple((adapter.name, 1, weight) for adapter, weight in self.members)

    def part(self, members: Any) -> Names:
        return Names(tuple(members))


def names(*adapters: Named) -> Any:
    return Names(tuple((adapter, 1.0) for adapter in adapters))


LORA, FIVE, PAIR = Named("lora"), Named("five", (5,)), Named("pair", (6, 7))


def stages(prompt: list[int], *adapters: Named, num_virtual: int = 0) -> list[tuple[int, str]]:
    found = stages_of(names(*adapters), tuple(prompt), num_virtual)
    return [(s.start, " ".join(name for name, _, _ in s.mix.key)) for s in found]


def test_each_member_acts_from_its_own_invocation_on_in_the_order_of_the_request() -> None:
    assert stages([5, 6, 7], LORA) == [(0, "lora")]
    assert stages([1, 5, 1, 5, 2], FIVE) == [(0, ""), (3, "five")]
    assert stages([1, 2], FIVE, LORA) == [(0, "lora")]
    assert stages([5], FIVE) == [(0, ""), (0, "five")]
    prompt = [1, 6, 7, 1, 5]
    both = [(0, "lora"), (1, "pair lora"), (4, "pair lora five")]
    assert stages(prompt, PAIR, LORA, FIVE) == both
    assert stages(prompt, PAIR, FIVE, num_virtual=8) == [(0, ""), (9, "pair"), (12, "pair five")]
    assert stages([6, 7], PAIR, Named("same", (6,))) == [(0, ""), (0, "pair same")]
    # The prompt ends with only the beginning of the invocation.
    assert stages([1, 6], PAIR) == [(0, "")]


def sequence(prompt: list[int], *adapters: Named, so_far: tuple[int, ...] = ()) -> Sequence:
    return sequence_of(prompt, mix=names(*adapters), so_far=so_far)


def chunks(scheduler: Any, added: Sequence) -> list[tuple[int, str]]:
    """The chunks until the first token: their lengths and adapters."""
    scheduler.add(added)
    found = []
    while added.num_computed < len(added.tokens):
        step = scheduler.schedule()
        (item,) = step.scheduled
        found.append((item.num_new, " ".join(name for name, _, _ in added.active_mix.key)))
        scheduler.complete(step)
    scheduler.finish(added)
    return found


def test_a_chunk_ends_where_an_adapter_begins_and_the_rest_is_shared_with_the_base() -> None:
    scheduler = make_scheduler()
    base, more = list(range(8, 18)), [6, 7, 1]
    assert chunks(scheduler, sequence([*base, *more], PAIR)) == [(10, ""), (3, "pair")]
    # Blocks before the invocation belong to the base, for any adapter.
    assert chunks(scheduler, sequence([*base, 3, 3])) == [(4, "")]
    assert chunks(scheduler, sequence([*base, 5, 1], FIVE)) == [(2, ""), (2, "five")]
    # The block in which the invocation begins is not shared.
    again = sequence([*base, *more], PAIR)
    assert chunks(scheduler, again) == [(1, "pair")]
    assert again.num_cached == 3 * BLOCK_SIZE
    assert chunks(scheduler, sequence([*base, *more])) == [(5, "")]
    assert chunks(scheduler, sequence([*base, *more], LORA, PAIR)) == [
        (10, "lora"),
        (3, "lora pair"),
    ]


def test_generated_tokens_invoke_no_adapter() -> None:
    scheduler = make_scheduler()
    assert chunks(scheduler, sequence([1, 2, 3], PAIR, so_far=(6, 7, 1))) == [(6, "")]
    resumed = sequence([1, 6, 7], PAIR, so_far=(6, 7, 1))
    assert chunks(scheduler, resumed) == [(1, ""), (5, "pair")]
