"""Training runs that use the server's engine in the process of the command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from builders.training import REQUIRED, resolve_tiny, write_jsonl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from turret.training.base_model import find_base
from turret.training.engine import PeftEngine
from turret.training.in_process_engine import InProcessEngine, in_process_engines
from turret.training.run import read_metrics
from turret.training.settings import render_config
from turret.training.trainer import Trainer

EXACT = ("base.dtype=bfloat16", "run.adapter_dtype=float32")
LONG = ("run.steps=40", "run.validate_every=7", "run.checkpoint_every=10")


def train(folder: Path, model: Path, output: str, *overrides: str, **how: bool) -> Path:
    """Train; returns the run's directory."""
    resolved = resolve_tiny(folder, model, *EXACT, f"run.output={output}", *overrides)
    with in_process_engines() as open_engine:
        return Trainer(resolved, open_engine=open_engine).run(**how).folder.path


def adapter_bytes(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "adapter").iterdir())}


def without_times(run: Path) -> list[dict[str, Any]]:
    skipped = ("seconds", "memory_bytes")
    rows = read_metrics(run / "metrics.jsonl")
    return [{key: row[key] for key in row if key not in skipped} for row in rows]


def test_one_seed_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    first = adapter_bytes(train(tmp_path, tiny_llama, "first", "method.name=dora"))
    assert first == adapter_bytes(train(tmp_path, tiny_llama, "second", "method.name=dora"))
    other = adapter_bytes(train(tmp_path, tiny_llama, "third", "method.name=dora", "run.seed=1"))
    assert first["adapter_model.safetensors"] != other["adapter_model.safetensors"]


_KILLED_AT_27 = """
import itertools, os, signal, sys
from turret.server.cli import main
from turret.training.in_process_engine import InProcessEngine
optimize, steps = InProcessEngine._optimize, itertools.count(1)
def counting(self, adam):
    if next(steps) == 27:
        os.kill(os.getpid(), signal.SIGKILL)
    return optimize(self, adam)
InProcessEngine._optimize = counting
sys.exit(main(sys.argv[1:]))
"""


def test_samples_end_at_the_context(tiny_llama: Path, tmp_path: Path) -> None:
    """A sample may be twice as long as its reference, but not longer than the model's context."""
    model = find_base(tiny_llama)
    length = model.arch.max_model_len
    words = "word " * length
    ids = model.tokenizer.encode(words, add_special_tokens=False)[: length - 3]
    row = {"prompt": model.tokenizer.decode(ids), "completion": "x"}
    write_jsonl(tmp_path / "train.jsonl", [row] * 8)
    run = train(tmp_path, tiny_llama, "full", f"data.max_length={length}", "run.steps=1")
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples
    assert adapter_bytes(run)


def test_a_killed_run_resumes_with_the_same_result(tiny_llama: Path, tmp_path: Path) -> None:
    expected = train(tmp_path, tiny_llama, "whole", *LONG)
    resolved = resolve_tiny(tmp_path, tiny_llama, *EXACT, "run.output=killed", *LONG)
    config = tmp_path / "killed.toml"
    config.write_text(render_config(resolved.config), encoding="utf-8")
    killed = tmp_path / "killed"
    arguments = ["train", "run", str(config)]
    died = subprocess.run([sys.executable, "-c", _KILLED_AT_27, *arguments], check=False)
    assert died.returncode == -signal.SIGKILL
    assert '"step": 26,' in (killed / "metrics.jsonl").read_text()
    assert not (killed / "adapter").exists()
    # The process may have been killed while it wrote a checkpoint.
    (killed / "checkpoints" / "step-00000099.partial").mkdir()
    command = [sys.executable, "-m", "turret.server.cli", *arguments, "--resume"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert adapter_bytes(killed) == adapter_bytes(expected)
    assert without_times(killed) == without_times(expected)
    names = sorted(path.name for path in (expected / "checkpoints").iterdir())
    assert names == ["step-00000020", "step-00000030"]


def test_an_interrupted_run_resumes_with_the_same_result(tiny_llama: Path, tmp_path: Path) -> None:
    """TensorBoard shows the resumed run only once: its steps replace those after the checkpoint."""

    def interrupt(row: dict[str, Any]) -> None:
        if row.get("step") == 26:
            raise KeyboardInterrupt

    expected = train(tmp_path, tiny_llama, "whole", *LONG)
    settings = (*LONG, "run.report_to=tensorboard")
    resolved = resolve_tiny(tmp_path, tiny_llama, *EXACT, "run.output=stopped", *settings)
    with pytest.raises(KeyboardInterrupt), in_process_engines() as open_engine:
        Trainer(resolved, interrupt, open_engine).run()
    resumed = train(tmp_path, tiny_llama, "stopped", *settings, resume=True)
    assert adapter_bytes(resumed) == adapter_bytes(expected)
    assert without_times(resumed) == without_times(expected)
    events = EventAccumulator(str(resumed / "tensorboard"))
    events.Reload()
    steps = [row for row in without_times(resumed) if row["kind"] == "step"]
    losses = [(each.step, each.value) for each in events.Scalars("train/loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in steps]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_its_exit_code(
    tiny_llama: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    more = ("run.steps=1000", "run.checkpoint_every=5", "run.batch_size=16")
    resolved = resolve_tiny(tmp_path, tiny_llama, *EXACT, "run.output=run", *more)
    config, run = tmp_path / "run.toml", tmp_path / "run"
    config.write_text(render_config(resolved.config), encoding="utf-8")
    command = [sys.executable, "-m", "turret.server.cli", "train", "run", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or '"step": 7,' not in metrics.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(kind)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + kind
    assert "--resume" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("overrides", "is_peft"),
    [
        ((), False),
        (("method.name=rslora", "data.packing=true"), False),
        (("method.name=prompt_tuning",), False),
        (("method.name=alora", *REQUIRED["alora"]), True),
        (("base.dtype=float32",), True),
        (("method.dropout=0.1",), True),
        (("base.weights=full",), True),
        (("optimizer.lora_plus_ratio=4",), True),
        (("optimizer.name=adamw8bit",), True),
        (("run.gradient_checkpointing=true",), True),
    ],
)
def test_peft_trains_what_the_engine_does_not(
    overrides: Sequence[str], is_peft: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    resolved = resolve_tiny(tmp_path, tiny_llama, *EXACT, *overrides)
    with in_process_engines() as open_engine:
        engine = open_engine(resolved)
        assert type(engine) is (PeftEngine if is_peft else InProcessEngine)
        engine.close()


def test_the_limits_of_a_server_do_not_apply(tiny_llama: Path, tmp_path: Path) -> None:
    """A rank above a server's limit can be trained, and the report has its answers."""
    more = ("method.name=miss", "method.targets=down_proj", "method.rank=160", "run.steps=1")
    run = train(tmp_path, tiny_llama, "run", *more)
    assert len((run / "samples.jsonl").read_text().splitlines()) == 2
