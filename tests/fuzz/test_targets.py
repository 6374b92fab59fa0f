"""Arbitrary bytes and messages cause only known errors. ``make fuzz`` runs longer."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
from fuzz.corpus import VALID, encoded, seeds, valid
from fuzz.guided import ORDER
from fuzz.messages import messages_of
from fuzz.mutation import mutated
from fuzz.protocols import METHODS, PASS, PATHS, TRAINING_PATHS
from fuzz.targets import Broken, Targets, _within_budget, calls_of, opened
from google.protobuf.descriptor import MethodDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers.limits_of_bodies import posts


class Sent(bytes):
    """The input of a target, which hypothesis shows completely."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes: {bytes(self[:300])!r}…>"


NAMES = ORDER
# The numbers of inputs in every run. Each input of "folder" takes a whole load.
COUNTS = {"folder": 60, "message": 120, "http": 120, "bodies": 40, "training": 100}
EXAMPLES = 12


@pytest.fixture(scope="module")
def targets() -> Iterator[Targets]:
    with opened() as made:
        yield made


def test_every_target_and_every_path_has_seeds(targets: Targets) -> None:
    assert {name for name, _ in seeds()} == set(targets.by_name) == set(NAMES)
    assert set(PATHS) == {route.path for route in posts()}
    paths = {route.path for route in posts(has_training=True) if "{" not in route.path}
    assert set(TRAINING_PATHS) == {PASS, *paths} - set(PATHS)
    assert VALID["http"].keys() == set(PATHS)


def test_the_cost_of_an_input_is_bounded_by_its_size() -> None:
    """A quadratic parser once took half a minute for 64 kB."""

    def slow(data: bytes) -> None:
        end = time.process_time() + 3
        while time.process_time() < end:
            pass

    def large(data: bytes) -> None:
        # Far above the limit, because memory of earlier tests may be freed at the same time.
        assert len(bytearray(b"x") * (1 << 30)) > len(data)

    for target in (slow, large):
        with pytest.raises(Broken):
            _within_budget(target, b"x" * 1000)
    assert _within_budget(len, b"x" * 1000) is None


def test_seeds_break_nothing(targets: Targets) -> None:
    """The seeds are valid inputs, and inputs that once caused a failure."""
    for name, data in seeds():
        targets.by_name[name](data)


def test_valid_bodies_reach_the_handlers(targets: Targets) -> None:
    """Otherwise damaged bodies would be rejected for what all of them have in common."""
    for name, data in valid():
        if name == "http":
            assert targets._protocols.post(PATHS[data[0]], data[1:]) != 400, data
        if name == "training":
            assert set(targets._protocols.train(calls_of(data))) == {200}, data


@pytest.mark.parametrize("name", NAMES)
def test_damaged_seeds_break_nothing(targets: Targets, name: str) -> None:
    source = random.Random(5)
    corpus = [data for target, data in seeds() if target == name]
    for _ in range(COUNTS.get(name, 400)):
        data = mutated(source, corpus)
        try:
            targets.by_name[name](data)
        except Exception as error:
            error.add_note(f"{name}: {data!r}")
            raise


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_messages_of_any_content_break_nothing(targets: Targets, method: MethodDescriptor) -> None:
    """Messages are drawn from descriptors, which includes new fields."""
    most = 3 if method.client_streaming else 1

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(
        st.lists(messages_of(method.input_type), min_size=1, max_size=most).map(
            lambda messages: Sent(encoded(messages, method.name))
        )
    )
    def try_it(data: Sent) -> None:
        targets.message(data)

    try_it()
