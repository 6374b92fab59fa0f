"""Which task an adapter is, where its files hold several."""

from __future__ import annotations

from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint


def check_task(checkpoint: AdapterCheckpoint, count_key: str, findings: Findings) -> int:
    """The task meant: the one named, or the only one there is.

    Args:
        checkpoint: As read.
        count_key: Config key of how many there are; a fault of its own is the rules' business.
        findings: Receives what is wrong; the result is then 0.
    """
    count = checkpoint.config.get(count_key)
    if not isinstance(count, int) or count_key in findings.fields:
        return 0
    if checkpoint.task is None and count > 1:
        why = (
            f"is required: the files hold the tasks 0 to {count - 1}, and an adapter is one of them"
        )
        findings.add("task", why)
    elif checkpoint.task is not None and checkpoint.task >= count:
        findings.add("task", f"is {checkpoint.task}, the files hold the tasks 0 to {count - 1}")
    else:
        return checkpoint.task or 0
    return 0


def task_warning(task: int, count: int) -> tuple[str, ...]:
    """What to say of an adapter that is one of several tasks."""
    return (f"is task {task} of the {count} in its files",) if count > 1 else ()
