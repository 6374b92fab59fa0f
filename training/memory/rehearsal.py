"""Measures a run's peak memory: two steps on its largest batch, in a process of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import torch

from turret.training.classifier import make_loss
from turret.training.errors import RunError
from turret.training.loss import make_optimizer, set_learning_rate
from turret.training.memory.estimate import largest_batches
from turret.training.memory.peak import peak_memory_bytes
from turret.training.settings.config_file import read_config, render_config
from turret.training.settings.resolve import Resolved, resolve
from turret.training.trainer import attach, trainable
from turret.training.words import Text, say

_STEPS = 2


def measure_peak(resolved: Resolved, scratch: Path) -> int:
    """Peak memory in bytes, of the kind that ``memory_peak`` reports.

    Args:
        resolved: The run, which writes nothing.
        scratch: An empty directory.

    Raises:
        RunError: The process failed, perhaps because memory ran out. The message has the last line
            that it printed.
    """
    config = scratch / "config.toml"
    config.write_text(render_config(resolved.config), encoding="utf-8")
    command = [sys.executable, "-m", "turret.training.memory.rehearsal", str(config)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RunError(_why_failed(done))
    return int(done.stdout)


def _why_failed(done: subprocess.CompletedProcess[str]) -> Text:
    if done.returncode == -signal.SIGKILL:
        # The system kills a process this way when memory runs out.
        return say("REHEARSAL_KILLED")
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return say("REHEARSAL_FAILED", problem=last)


def rehearse(config_file: Path) -> int:
    """Run the steps and the validation's largest batch here; returns the peak in bytes."""
    resolved = resolve(read_config(config_file), config_file.parent)
    config = resolved.config
    assert config.base.device is not None
    assert config.optimizer.learning_rate is not None
    model = attach(resolved)
    parameters = trainable(model)
    optimizer = make_optimizer(parameters.items(), config.optimizer)
    loss = make_loss(resolved, model)
    train, validation = largest_batches(resolved)
    model.train()
    for _ in range(_STEPS):
        for _ in range(min(2, config.run.gradient_accumulation)):
            (loss(train) / train.num_targets).backward()
        set_learning_rate(optimizer, config.optimizer.learning_rate)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    if validation is not None:
        with torch.no_grad():
            loss(validation)
    return peak_memory_bytes(config.base.device)


if __name__ == "__main__":
    print(rehearse(Path(sys.argv[1])))
