"""How many replicas a load needs."""

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

    Never by the processor's use: a replica that computes one sequence uses all of it. Some
    sequence waits in many a moment, for the step that is computed when it comes: that no line is
    ever seen is too much to ask of replicas that have little to do.

    Args:
        num_replicas: There are now.
        waiting: Sequences that wait, on all of them.
        running: Sequences that run, on all of them.
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
