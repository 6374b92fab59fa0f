"""Runs that a server trains: results, resuming, a server that stops, sweeps, and errors."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.training import ended, resolve_tiny, tiny_variants, write_config
from checkout import ROOT
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from said import says
from servers.server_under_test import ServerUnderTest, start_server

from turret.clients.client import TurretClient
from turret.clients.errors import TurretRpcError
from turret.server.api.tenants import MAX_MODELS
from turret.server.training import METHODS
from turret.training import in_process_engine
from turret.training.base_model import load_model, without_peft_warnings
from turret.training.batches import make_batch
from turret.training.engine import PeftEngine, pad_token
from turret.training.in_process_engine import in_process_engines
from turret.training.loss import LossFunction
from turret.training.run import read_metrics
from turret.training.server_engine import ServerEngine
from turret.training.settings import build_config, render_config
from turret.training.settings.checks import check_served
from turret.training.settings.resolve import Resolved, resolve
from turret.training.sweep import sweep
from turret.training.trainer import Trainer, validation_loss
from turret.training.words import ConfigError, RunError, say

EXACT = ("base.dtype=float32", "run.adapter_dtype=float32")
# At 0.1, the steps of LoHa amplify differences of 1e-7 a thousandfold.
RATES = {"loha": 0.03, "ia3": 0.1}


@contextlib.contextmanager
def training_server(folder: Path, model: Path, *flags: str) -> Iterator[ServerUnderTest]:
    folder.mkdir(exist_ok=True)
    flags = ("--model", str(model), "--dtype", "float32", *flags)
    # Derived files are alongside the model, as for the runs in this process.
    cache = {"XDG_CACHE_HOME": str(model.parent / "cache")}
    with start_server(folder, *flags, environment=cache) as server:
        yield server


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerUnderTest]:
    folder = tmp_path_factory.mktemp("server")
    flags = ("--training", "--state-dir", str(folder / "state"))
    with training_server(folder, tiny_llama, *flags) as running:
        yield running


def opener(server: ServerUnderTest) -> Any:
    connect = partial(TurretClient, server.address)
    return partial(ServerEngine, address=server.address, connect=connect)


def resolved_on(
    server: ServerUnderTest, folder: Path, model: Path, output: str, *overrides: str
) -> Resolved:
    """A run of ``resolve_tiny`` for a server."""
    local = resolve_tiny(folder, model, *EXACT, f"run.output={output}", *overrides)
    config = replace(local.config, base=replace(local.config.base, device=None))
    with TurretClient(server.address) as client:
        return resolve(config, folder, client.get_model())


def adapter_bytes(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "adapter").iterdir())}


def losses_of(run: Path, kind: str) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == kind]


def left_on(server: ServerUnderTest) -> tuple[int, int]:
    """How many models and checkpoints are on a server."""
    with TurretClient(server.address) as client:
        return len(client.training.list_models()), len(client.training.list_checkpoints())


def starting_as(server: ServerUnderTest, resolved: Resolved, folder: Path) -> Any:
    """Opens engines in this process that start from the tensors of a server."""
    folder.mkdir()
    exact = replace(resolved.config.run, adapter_dtype="float32")
    resolved = replace(resolved, config=replace(resolved.config, run=exact))
    with contextlib.closing(opener(server)(resolved)) as engine:
        engine.write(folder)

    class SameStart(PeftEngine):
        def __init__(self, resolved: Resolved) -> None:
            super().__init__(resolved)
            set_peft_model_state_dict(self._model, load_file(folder / "adapter_model.safetensors"))

    return SameStart


def loss_by_peft(resolved: Resolved, adapter: Path) -> float:
    """The validation loss of an adapter that PEFT has loaded, in float32."""
    base = load_model(resolved.base, "nf4-dense", torch.float32, "cpu")
    with without_peft_warnings():
        model = PeftModel.from_pretrained(base, str(adapter)).eval()
    loss = LossFunction(model, base.get_output_embeddings(), "cpu")
    pad = pad_token(resolved.base.tokenizer)
    with torch.no_grad():
        return validation_loss(
            lambda rows: loss(make_batch(rows, pad=pad, is_packed=False)).item(),
            resolved.dataset.validation,
            4,
        )


@pytest.mark.parametrize("method", METHODS)
def test_training_on_a_server_matches_local_training(
    server: ServerUnderTest, tiny_llama: Path, tmp_path: Path, method: str
) -> None:
    more = (f"method.name={method}", f"optimizer.learning_rate={RATES.get(method, 0.02)}")
    more += ("optimizer.weight_decay=0.01", "run.gradient_accumulation=2", "data.loss_on=all")
    resolved = resolved_on(server, tmp_path, tiny_llama, "served", *more)
    same_start = starting_as(server, resolved, tmp_path / "start")
    here = resolve_tiny(tmp_path, tiny_llama, *EXACT, "run.output=here", *more)
    runs = (
        Trainer(resolved, open_engine=opener(server)).run(),
        Trainer(here, open_engine=same_start).run(),
    )
    theirs, ours = (run.folder for run in runs)
    for kind in ("step", "validation"):
        found, expected = losses_of(theirs.path, kind), losses_of(ours.path, kind)
        assert found == pytest.approx(expected, rel=1e-4), kind
    assert losses_of(theirs.path, "validation")[-1] < 0.95 * losses_of(theirs.path, "validation")[0]
    counts = [folder.read_facts()["num_parameters"] for folder in (theirs, ours)]
    assert counts[0] == counts[1]
    # PEFT reads the adapter, and computes what the server reported.
    mean = loss_by_peft(resolved, theirs.adapter)
    assert mean == pytest.approx(losses_of(theirs.path, "validation")[-1], rel=1e-4)
    samples = [json.loads(line) for line in theirs.samples.read_text().splitlines()]
    expected = [json.loads(line) for line in ours.samples.read_text().splitlines()]
    assert [each["before"] for each in samples] == [each["before"] for each in expected]
    provenance = json.loads((theirs.adapter / "provenance.json").read_text())
    assert provenance["adapter"]["digest"]
    assert "server" not in provenance
    assert left_on(server) == (0, 0)


@pytest.mark.parametrize("method", METHODS)
def test_the_engine_in_this_process_gives_the_bytes_of_a_server(
    server: ServerUnderTest,
    tiny_llama: Path,
    tmp_path: Path,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The server computes in float32.
    monkeypatch.setattr(in_process_engine, "has_native", lambda dtype, device: True)
    more = (f"method.name={method}", f"optimizer.learning_rate={RATES.get(method, 0.02)}")
    more += ("run.gradient_accumulation=2", "data.packing=true") if method == "lora" else ()
    served = resolved_on(server, tmp_path, tiny_llama, "served", *more)
    theirs = Trainer(served, open_engine=opener(server)).run().folder
    here = resolve_tiny(tmp_path, tiny_llama, *EXACT, "run.output=here", *more)
    with in_process_engines() as open_engine:
        ours = Trainer(here, open_engine=open_engine).run().folder
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (ours.adapter / name).read_bytes() == (theirs.adapter / name).read_bytes(), name
    assert ours.samples.read_text() == theirs.samples.read_text()
    for kind in ("step", "validation"):
        assert losses_of(ours.path, kind) == pytest.approx(losses_of(theirs.path, kind), rel=1e-6)
    assert [path.suffix for path in ours.checkpoints.iterdir()] == [""]


@pytest.mark.long
def test_training_the_bundled_model_on_a_server_matches_local_training(tmp_path: Path) -> None:
    lines = (ROOT / "examples/data/headline.train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:60]))
    run = {"steps": 16, "batch_size": 4, "validate_every": 4, "checkpoint_every": 0, "samples": 0}
    tables = {"data": {"train": "train.jsonl", "validation_fraction": 0.2}, "run": run}
    here = resolve(build_config(tables, ["run.output=here"]), tmp_path)
    with start_server(tmp_path, "--training", "--state-dir", str(tmp_path / "state")) as server:
        with TurretClient(server.address) as client:
            served = client.get_model()
        resolved = resolve(build_config(tables, ["run.output=served"]), tmp_path, served)
        theirs = Trainer(resolved, open_engine=opener(server)).run().folder
        same_start = starting_as(server, resolved, tmp_path / "start")
    ours = Trainer(here, open_engine=same_start).run().folder
    # Two runs of the same start differ by the rounding of bfloat16.
    found, expected = (losses_of(folder.path, "validation") for folder in (theirs, ours))
    assert found == pytest.approx(expected, abs=0.03)
    assert found[-1] < 0.7 * found[0]
    assert loss_by_peft(resolved, theirs.adapter) == pytest.approx(found[-1], abs=0.03)


class Stopped(Exception):
    pass


def stopping_at(step: int) -> Any:
    def listen(row: dict[str, Any]) -> None:
        if row.get("step") == step:
            raise Stopped

    return listen


def test_a_resumed_run_ends_with_the_same_bytes(
    server: ServerUnderTest, tiny_llama: Path, tmp_path: Path
) -> None:
    more = ("run.steps=8", "run.validate_every=3", "run.checkpoint_every=2", "method.rank=4")
    opened = opener(server)
    whole = resolved_on(server, tmp_path, tiny_llama, "whole", *more)
    expected = adapter_bytes(Trainer(whole, open_engine=opened).run().folder.path)
    resolved = resolved_on(server, tmp_path, tiny_llama, "run", *more)
    with pytest.raises(Stopped):
        Trainer(resolved, stopping_at(7), opened).run()
    assert left_on(server) == (0, 2)
    folder = Trainer(resolved, open_engine=opened).run(resume=True).folder
    assert adapter_bytes(folder.path) == expected
    steps = [row["step"] for row in read_metrics(folder.metrics) if row["kind"] == "step"]
    assert steps == list(range(1, 9))
    assert left_on(server) == (0, 0)


def test_a_run_resumes_only_where_it_began(
    server: ServerUnderTest, tiny_llama: Path, tmp_path: Path
) -> None:
    resolved = resolved_on(server, tmp_path, tiny_llama, "run")
    with pytest.raises(Stopped):
        Trainer(resolved, stopping_at(3), opener(server)).run()
    folder = Trainer(resolved)._folder
    assert f"--resume --server {server.address}" in folder.how_to_go_on()
    with pytest.raises(RunError, check=says("RUN_ELSEWHERE")):
        folder.check_place(is_served=False)
    folder.check_place(is_served=True)
    # Overwriting a run also deletes its checkpoints on the server.
    assert left_on(server) == (0, 1)
    Trainer(resolved, open_engine=opener(server)).run(overwrite=True)
    assert left_on(server) == (0, 0)


def test_a_run_survives_the_end_of_its_server(tiny_llama: Path, tmp_path: Path) -> None:
    flags = ("--training", "--state-dir", str(tmp_path / "state"))
    more = ("run.steps=60", "run.checkpoint_every=5", "run.samples=1")
    resolved = resolve_tiny(tmp_path, tiny_llama, *EXACT, "run.output=run", *more)
    config, run = tmp_path / "run.toml", tmp_path / "run"
    settings = replace(resolved.config, base=replace(resolved.config.base, device=None))
    config.write_text(render_config(settings), encoding="utf-8")
    with training_server(tmp_path / "first", tiny_llama, *flags) as server:
        pipe = subprocess.PIPE
        program = [sys.executable, "-m", "turret.server.cli", "train", "run", str(config)]
        program += ["--server", server.address]
        process = subprocess.Popen(program, stdout=pipe, stderr=pipe, text=True)
        while not (run / "metrics.jsonl").exists() or losses_of(run, "step")[12:] == []:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert f"--resume --server {server.address}" in err
    with training_server(tmp_path / "second", tiny_llama, *flags) as server:
        again = resolved_on(server, tmp_path, tiny_llama, "run", *more)
        Trainer(again, open_engine=opener(server)).run(resume=True)
        whole = resolved_on(server, tmp_path, tiny_llama, "whole", *more)
        expected = Trainer(whole, open_engine=opener(server)).run().folder.path
        assert adapter_bytes(run) == adapter_bytes(expected)
        assert left_on(server) == (0, 0)


@contextlib.contextmanager
def unannounced(title: str) -> Iterator[Any]:
    yield lambda row: None


def test_a_sweep_trains_all_variants_at_once(
    server: ServerUnderTest, tiny_llama: Path, tmp_path: Path
) -> None:
    seen: list[str] = []
    # The first passes of all variants wait for each other.
    all_begun = threading.Barrier(4, timeout=60.0)

    def counting(resolved: Resolved) -> Any:
        engine = opener(server)(resolved)
        seen.append(resolved.config.run.output)
        backward = engine.backward

        def begin(parts: Any) -> float:
            engine.backward = backward
            all_begun.wait()
            return backward(parts)

        engine.backward = begin
        return engine

    with TurretClient(server.address) as client:
        served = client.get_model()
    varied = ("method.name=lora,dora", "optimizer.learning_rate=1e-3,2e-3")
    variants = tiny_variants(tmp_path, tiny_llama, "run.steps=4", *varied)
    results = sweep(variants, tmp_path, unannounced, counting, served)
    assert [result.settings["method"] for result in results] == ["lora", "lora", "dora", "dora"]
    assert len(seen) == 4
    assert left_on(server) == (0, 0)
    # An adapter has the bytes that it has when it is trained alone.
    config = replace(variants[3].config, run=replace(variants[3].config.run, output="alone"))
    resolved = resolve(config, tmp_path, served)
    run = Trainer(resolved, open_engine=opener(server)).run().folder.path
    assert adapter_bytes(run) == adapter_bytes(Path(results[3].output))
    # Finished variants are not trained again.
    seen.clear()
    again = sweep(variants, tmp_path, unannounced, counting, served)
    assert seen == []
    assert [each.figures() for each in again] == [each.figures() for each in results]


def test_a_sweep_may_have_more_variants_than_a_server_trains(
    server: ServerUnderTest, tiny_llama: Path, tmp_path: Path
) -> None:
    with TurretClient(server.address) as client:
        served = client.get_model()
    seeds = list(range(MAX_MODELS + 2))
    more = ("run.steps=1", "run.samples=0", f"run.seed={seeds}", "data.validation_fraction=0.05")
    variants = tiny_variants(tmp_path, tiny_llama, *more)
    results = sweep(variants, tmp_path, unannounced, opener(server), served)
    assert [result.settings["seed"] for result in results] == seeds
    assert left_on(server) == (0, 0)


def test_a_failed_variant_stops_the_others(
    server: ServerUnderTest, tiny_llama: Path, tmp_path: Path
) -> None:
    with TurretClient(server.address) as client:
        served = client.get_model()

    def failing(resolved: Resolved) -> Any:
        engine = opener(server)(resolved)
        if resolved.config.method.rank == 2:
            engine.backward = lambda parts: float("nan")
        return engine

    variants = tiny_variants(tmp_path, tiny_llama, "method.rank=1,2", "run.steps=100000")
    with pytest.raises(RunError, check=says("LOSS_NOT_FINITE")):
        sweep(variants, tmp_path, unannounced, failing, served)
    assert left_on(server) == (0, 0)


def test_settings_that_a_server_lacks_are_all_reported_at_once(
    tiny_llama: Path, tmp_path: Path
) -> None:
    overrides = ("base.weights=full", "base.device=cpu", "method.name=vblora", "method.dropout=0.1")
    overrides += ("data.max_length=4096", "optimizer.name=adamw8bit")
    config = build_config({"data": {"train": "t.jsonl"}}, overrides)
    with pytest.raises(ConfigError) as caught:
        check_served(config)
    named = [violation[0] for violation in caught.value.violations]
    assert named == [
        *("base.weights", "method.name", "method.dropout", "optimizer.name"),
        *("data.max_length", "base.device"),
    ]
    check_served(build_config({"data": {"train": "t.jsonl"}}))
    path = write_config(tmp_path / "early", '{"text": "a"}')
    err = ended("run", path, "--server", "127.0.0.1:1", "--method", "vblora")
    assert "--method: " in err
    assert "NOT_REACHED" in ended("run", path, "--server", "127.0.0.1:1")


def test_a_server_without_training_or_with_another_base_is_an_error(
    server: ServerUnderTest, tiny_llama: Path, tmp_path: Path
) -> None:
    path = write_config(tmp_path / "early", '{"text": "a"}')
    with training_server(tmp_path / "serving", tiny_llama) as other:
        err = ended("run", path, "--server", other.address)
        assert say("SERVER_DOES_NOT_TRAIN", address=other.address) in err
    local = resolve_tiny(tmp_path, tiny_llama, *EXACT)
    config = replace(local.config, base=replace(local.config.base, device=None))
    with TurretClient(server.address) as client:
        served = client.get_model()
    with pytest.raises(ConfigError, check=says("OTHER_BASE_SERVED")):
        resolve(config, tmp_path, replace(served, digest="0" * 64))
    with pytest.raises(ConfigError) as caught:
        resolve(config, tmp_path, replace(served, dtype="bfloat16"))
    assert caught.value.violations[0][0] == "base.dtype"


def test_a_call_that_the_server_rejects_ends_the_run(
    server: ServerUnderTest, tiny_llama: Path, tmp_path: Path
) -> None:
    resolved = resolved_on(server, tmp_path, tiny_llama, "run", "method.rank=8")
    method = replace(resolved.config.method, rank=500)
    resolved = replace(resolved, config=replace(resolved.config, method=method))
    with pytest.raises(TurretRpcError) as caught:
        Trainer(resolved, open_engine=opener(server)).run()
    assert [each.field for each in caught.value.violations] == ["rank"]
    assert not (tmp_path / "run").exists()
