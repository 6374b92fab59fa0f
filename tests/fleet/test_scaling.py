"""The number of replicas, by the length of the queues."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from turret.fleet.serving.scaling import policy, wanted


@pytest.mark.parametrize(
    ("num_replicas", "waiting", "running", "number"),
    [
        (1, 0, 64, 1),  # a full replica without a queue suffices
        (1, 4, 64, 1),
        (1, 5, 64, 2),
        (3, 12, 0, 3),
        (3, 13, 0, 4),
        (3, 0, 8, 3),
        (3, 0, 7, 2),
        # A sequence that waits for the current step is not a queue.
        (3, 0.4, 6, 2),
        (3, 1, 7, 3),
        (3, 8, 0, 3),
        (1, 0, 0, 1),
    ],
)
def test_a_replica_is_added_while_queues_are_long(
    num_replicas: int, waiting: float, running: float, number: int
) -> None:
    assert wanted(num_replicas, waiting, running) == number


def test_the_bounds_of_ray_serve_are_respected() -> None:
    context = SimpleNamespace(
        aggregated_metrics={"waiting": {"r0": 30.0, "r1": 4.0}, "running": {"r0": 9.0}},
        current_num_replicas=2,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=2,
    )
    assert policy(context) == (2, {"waiting": 34.0, "running": 9.0})
    context.capacity_adjusted_max_replicas = 8
    assert policy(context)[0] == 3
    context.aggregated_metrics = None
    assert policy(context)[0] == 1
