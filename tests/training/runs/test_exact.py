"""Settings and events that must not change a result, such as packing and a kill."""

from __future__ import annotations

import argparse
import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.training import resolve_tiny, write_words
from command_modules import loaded_and_said_by
from said import says
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from turret.training import engine
from turret.training.base_model import find_base, load_model
from turret.training.batches import make_batch, pack_rows
from turret.training.fusion import adapter_digest
from turret.training.loss import HEAD_ROWS, LossFunction
from turret.training.run import RunFolder, read_metrics
from turret.training.settings import render_config
from turret.training.trainer import Trainer
from turret.training.verbs import with_errors
from turret.training.words import RunError, say

EXACT = "base.dtype=float32"


def train(folder: Path, model: Path, output: str, *overrides: str, **how: bool) -> Path:
    """Train; returns the run's directory."""
    resolved = resolve_tiny(folder, model, EXACT, f"run.output={output}", *overrides)
    return Trainer(resolved).run(**how).folder.path


def adapter_bytes(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "adapter").iterdir())}


def steps_of(run: Path) -> list[dict[str, Any]]:
    rows = read_metrics(run / "metrics.jsonl")
    return [row for row in rows if row["kind"] == "step"]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "smollm3"])
def test_packed_examples_do_not_attend_to_each_other(
    architecture: str, tmp_path: Path, tiny_model: Any
):
    model_folder = tiny_model(architecture)
    resolved = resolve_tiny(tmp_path, model_folder, "data.loss_on=all")
    examples = [example for (example,) in resolved.dataset.train]
    model = load_model(find_base(model_folder), "full", torch.float32, "cpu")
    loss = LossFunction(model, model.get_output_embeddings(), "cpu")
    packed = make_batch(pack_rows(examples, 64), pad=0, is_packed=True)
    assert packed.tokens.shape[0] < len(examples) / 2
    alone = [make_batch([(example,)], pad=0, is_packed=False) for example in examples]
    with torch.no_grad():
        assert loss(packed).item() == pytest.approx(sum(loss(b).item() for b in alone), rel=1e-5)
        # The results differ if the examples attend to each other.
        together = make_batch(pack_rows(examples, 64), pad=0, is_packed=False)
        assert loss(together).item() != pytest.approx(loss(packed).item(), rel=1e-3)


def test_computing_the_head_in_pieces_gives_the_same_gradient(tiny_llama: Path, tmp_path: Path):
    resolved = resolve_tiny(tmp_path, tiny_llama, "data.loss_on=all")
    model = load_model(resolved.base, "full", torch.float32, "cpu")
    embedding = model.get_input_embeddings().weight.requires_grad_()
    examples = [row[0] for row in resolved.dataset.train] * 6
    batch = make_batch([(example,) for example in examples], pad=0, is_packed=False)
    assert batch.num_targets > HEAD_ROWS
    loss = LossFunction(model, model.get_output_embeddings(), "cpu")(batch)
    loss.backward()
    found, embedding.grad = embedding.grad, None
    whole = model(input_ids=batch.tokens, use_cache=False).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(whole, batch.targets.flatten(), reduction="sum")
    expected.backward()
    assert found is not None
    assert embedding.grad is not None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found, embedding.grad, rtol=1e-4, atol=1e-4)


def test_accumulation_and_checkpointing_do_not_change_the_gradient(
    tiny_llama: Path, tmp_path: Path
):
    whole = steps_of(train(tmp_path, tiny_llama, "whole", "run.batch_size=8"))
    split = ("run.batch_size=2", "run.gradient_accumulation=4")
    again = "run.gradient_checkpointing=true"
    for output, overrides in (("split", split), ("again", ("run.batch_size=8", again))):
        steps = steps_of(train(tmp_path, tiny_llama, output, *overrides))
        for ours, theirs in zip(steps, whole, strict=True):
            for key in ("loss", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3), (output, key)
            assert ours["tokens"] == theirs["tokens"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_seed_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path, dtype: str):
    settings = (f"base.dtype={dtype}", "method.dropout=0.2", "method.name=dora")
    first = adapter_bytes(train(tmp_path, tiny_llama, "first", *settings))
    assert first == adapter_bytes(train(tmp_path, tiny_llama, "second", *settings))
    other = adapter_bytes(train(tmp_path, tiny_llama, "third", *settings, "run.seed=1"))
    assert first["adapter_model.safetensors"] != other["adapter_model.safetensors"]


def without_times(run: Path) -> list[dict[str, Any]]:
    skipped = ("seconds", "memory_bytes")
    rows = read_metrics(run / "metrics.jsonl")
    return [{key: row[key] for key in row if key not in skipped} for row in rows]


# Rank 32, because bitsandbytes uses 8-bit states only for at least 4096 elements.
LONG = (
    *("method.dropout=0.2", "method.rank=32"),
    *("run.steps=60", "run.validate_every=7", "run.checkpoint_every=10"),
)


def _has_step(run: Path, number: int) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and f'"step": {number},' in metrics.read_text()


def test_a_killed_run_resumes_with_the_same_result(tiny_llama: Path, tmp_path: Path):
    settings = (*LONG, "optimizer.name=adamw8bit")
    expected = train(tmp_path, tiny_llama, "whole", *settings)
    resolved = resolve_tiny(tmp_path, tiny_llama, EXACT, "run.output=killed", *settings)
    config = tmp_path / "killed.toml"
    config.write_text(render_config(resolved.config), encoding="utf-8")
    command = [sys.executable, "-m", "turret.server.cli", "train", "run", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed = tmp_path / "killed"
    while not _has_step(killed, 36):
        assert process.poll() is None, "it ended before"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "adapter").exists()
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    resumed = train(tmp_path, tiny_llama, "killed", *settings, resume=True)
    assert adapter_bytes(resumed) == adapter_bytes(expected)
    assert without_times(resumed) == without_times(expected)
    names = [path.name for path in sorted((resumed / "checkpoints").iterdir())]
    assert names == ["step-00000040.pt", "step-00000050.pt"]


def test_an_interrupted_run_resumes_with_the_same_result(tiny_llama: Path, tmp_path: Path):
    """TensorBoard shows the resumed run only once: its steps replace those after the checkpoint."""

    def interrupt(row: dict[str, Any]) -> None:
        if row.get("step") == 36:
            raise KeyboardInterrupt

    expected = train(tmp_path, tiny_llama, "whole", *LONG)
    settings = (*LONG, "run.report_to=tensorboard")
    resolved = resolve_tiny(tmp_path, tiny_llama, EXACT, "run.output=stopped", *settings)
    with pytest.raises(KeyboardInterrupt):
        Trainer(resolved, interrupt).run()
    resumed = train(tmp_path, tiny_llama, "stopped", *settings, resume=True)
    assert adapter_bytes(resumed) == adapter_bytes(expected)
    assert without_times(resumed) == without_times(expected)
    events = EventAccumulator(str(resumed / "tensorboard"))
    events.Reload()
    losses = [(each.step, each.value) for each in events.Scalars("train/loss")]
    steps = steps_of(resumed)
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in steps]
    assert "eval/loss" in events.Tags()["scalars"]


def test_a_directory_is_neither_overwritten_nor_mixed_up(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = train(tmp_path, tiny_llama, "run")
    with pytest.raises(RunError, check=says("RUN_WITHOUT_REPORT")):
        train(tmp_path, tiny_llama, "run")
    before = adapter_bytes(run)
    # Other files stay: another run below the directory, and a user's file.
    for name in ("next/adapter", "other"):
        (run / name).mkdir(parents=True)
        (run / name / "notes.txt").touch()
    (run / "notes.txt").touch()
    (run / "adapter" / "old").touch()
    train(tmp_path, tiny_llama, "run", "run.seed=1", overwrite=True)
    assert adapter_bytes(run) != before
    kept = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {"next/adapter/notes.txt", "other/notes.txt", "notes.txt"} <= kept
    assert "adapter/old" not in kept
    shutil.rmtree(run / "adapter")
    with pytest.raises(RunError, check=says("RUN_UNFINISHED")):
        train(tmp_path, tiny_llama, "run", "run.seed=1")
    command = f"turret train run {run}/config.toml --resume"
    found = say("DIFFERENCE", key="method.dropout", before="0.0", after="0.1")
    differ = says("RUN_SETTINGS_DIFFER", found=found, command=command)
    with pytest.raises(RunError, check=differ):
        train(tmp_path, tiny_llama, "run", "run.seed=1", "method.dropout=0.1", resume=True)
    write_words(tmp_path / "train.jsonl", count=23)
    with pytest.raises(RunError, check=lambda error: say("EXAMPLES_CHANGED") in str(error)):
        train(tmp_path, tiny_llama, "run", "run.seed=1", resume=True)
    with pytest.raises(RunError, check=says("NO_RUN_TO_RESUME")):
        train(tmp_path, tiny_llama, "other", resume=True)
    write_words(tmp_path / "train.jsonl")
    facts = json.loads((run / "run.json").read_text())
    digest, facts["base"]["digest"] = facts["base"]["digest"], "0"
    (run / "run.json").write_text(json.dumps(facts))
    changed = say("DIGEST_CHANGED", key="base.digest")
    # Before the base is loaded.
    monkeypatch.setattr(engine, "attach", None)
    with pytest.raises(RunError, check=says("RUN_DIFFERS", found=changed)):
        train(tmp_path, tiny_llama, "run", "run.seed=1", resume=True)
    facts["base"]["digest"], facts["versions"]["torch"] = digest, "1.0"
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(RunError, match=r"versions\.torch"):
        train(tmp_path, tiny_llama, "run", "run.seed=1", resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    for overwrite in (False, True):
        with pytest.raises(RunError, check=says("OUTPUT_NOT_EMPTY")):
            train(tmp_path, tiny_llama, "mine", overwrite=overwrite)


def test_the_provenance_describes_data_base_and_versions(tiny_llama: Path, tmp_path: Path):
    run = train(tmp_path, tiny_llama, "run", "run.seed=5")
    facts = json.loads((run / "adapter" / "provenance.json").read_text())
    base = find_base(tiny_llama)
    weights = facts["base"].pop("weights")
    assert facts["base"] == {"name": base.source.name, "digest": base.source.digest}
    assert facts["adapter"] == {"digest": adapter_digest(run / "adapter")}
    assert weights["q_proj"] == {"4-bit": base.arch.num_layers}
    full = train(tmp_path, tiny_llama, "full", "base.weights=full") / "adapter"
    made = json.loads((full / "provenance.json").read_text())["base"]
    assert made["weights"]["q_proj"] == {"16-bit": base.arch.num_layers}
    assert len(facts["data"]["digest"]) == 64
    assert facts["data"]["num_examples"] == 22
    assert facts["seed"] == facts["config"]["run"]["seed"] == 5
    assert facts["config"]["method"]["rank"] == 8
    assert facts["config"]["data"]["train"] == "train.jsonl"
    assert {"turret", "torch", "transformers", "peft", "bitsandbytes"} <= facts["versions"].keys()
    assert str(tmp_path) not in json.dumps(facts)
    assert str(tmp_path) not in (run / "adapter" / "adapter_config.json").read_text()


def test_a_full_disk_is_reported_before_training(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=2000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, check=says("RUN_DISK_FULL", free=2000)):
        train(tmp_path, tiny_llama, "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_is_reported_with_how_to_resume(capsys: pytest.CaptureFixture[str]):
    def fill(args: argparse.Namespace) -> None:
        args.how_to_go_on = lambda: "--resume goes on from step 5"
        raise OSError(errno.ENOSPC, "No space left on device", "adapter_model.safetensors")

    assert with_errors(fill)(argparse.Namespace()) == 1
    assert capsys.readouterr().err == (
        "error: adapter_model.safetensors: No space left on device; --resume goes on from step 5\n"
    )


# The directory of a run: exclusive use, and messages about it.


def test_two_runs_do_not_write_into_one_directory(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    (tmp_path / "t.toml").write_text('[data]\ntrain = "t.jsonl"\n')
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    with run.held():
        with pytest.raises(RunError, check=says("RUN_IN_USE")), run.held():
            pass
        code, modules, err = loaded_and_said_by("train", "run", str(tmp_path / "t.toml"))
        assert code == 1
        assert err == f"error: {say('RUN_IN_USE', path=run.path)}\n"
        assert "torch" not in modules
        run.write_facts({})
    with run.held():
        assert run.facts.exists()


def test_a_failed_run_leaves_no_directory(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), run.held():
        raise ZeroDivisionError
    assert not run.path.exists()
    run.path.mkdir()
    with run.held():
        pass
    assert run.path.exists()


def test_only_the_files_of_a_run_are_overwritten(tmp_path: Path):
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    (there / "adapter").mkdir(parents=True)
    (there / "run.json").touch()
    (there / "notes.txt").touch()
    (elsewhere / "step-00000001.pt").mkdir(parents=True)
    (there / "checkpoints").symlink_to(elsewhere)
    (tmp_path / "run").symlink_to(there)
    RunFolder(tmp_path / "run").clear()
    assert [path.name for path in there.iterdir()] == ["notes.txt"]
    assert (elsewhere / "step-00000001.pt").exists()


def test_an_interrupted_removal_of_a_run_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = RunFolder(tmp_path)
    run.write_facts({})
    run.report.touch()
    for path in (run.checkpoints, run.adapter):
        path.mkdir()

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        run.clear()
    monkeypatch.undo()
    run.check(resume=False, overwrite=True)
    run.clear()
    assert not any(tmp_path.iterdir())
