"""The number of replicas for a load."""

from __future__ import annotations

from typing import Any

# Metrics that replicas report to Serve, which passes the latest values to ``policy``.
WAITING = "waiting"
RUNNING = "running"
# Add a replica if more sequences than this wait per replica on average.
MOST_WAITING = 4
# Remove a replica if the others would have fewer sequences than this on average.
FEW = 4


def wanted(num_replicas: int, waiting: float, running: float) -> int:
    """The number of replicas for a load; it changes by at most one at a time.

    The use of the processor does not matter, because a replica with a single sequence already uses
    all of it. Replicas with little to do may also be removed while sequences wait: a new sequence
    always waits for the end of the current step.

    Args:
        num_replicas: The current number of replicas.
        waiting: Waiting sequences, on all replicas together.
        running: Running sequences, on all replicas together.
    """
    if waiting > MOST_WAITING * num_replicas:
        return num_replicas + 1
    if waiting + running < FEW * (num_replicas - 1):
        return num_replicas - 1
    return num_replicas


def policy(context: Any) -> tuple[int, dict[str, Any]]:
    """Serve's form of ``wanted`` (``ray.serve.config.AutoscalingContext``)."""
    reported = context.aggregated_metrics or {}
    waiting = sum((reported.get(WAITING) or {}).values())
    running = sum((reported.get(RUNNING) or {}).values())
    number = wanted(max(context.current_num_replicas, 1), waiting, running)
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(least, min(most, number)), {WAITING: waiting, RUNNING: running}
