"""Errors of ``turret train`` before torch is loaded, and its messages when it is stopped."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.training import ended, write_config
from checkout import ROOT
from command_modules import loaded_and_said_by
from safetensors.numpy import save_file
from said import says
from transformers import AutoConfig

from turret.server.models.decoding import Projections
from turret.server.models.families import FAMILIES, read_arch
from turret.server.models.sources.check import found_in
from turret.server.models.sources.model_directory import read_config
from turret.training.run import RunFolder, checkpoint_path
from turret.training.verbs import _how_a_sweep_goes_on, _read, with_errors
from turret.training.words import RunError, say


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ['{"prompt": "a", "completion": "b"}'] * 2,
            lambda path: say("LABEL_COUNT", path=path, found=1, least=2, most=4096),
        ),
        (['{"text": "a"}'], lambda path: f"{path}:1: text: {say('NO_LABEL')}"),
    ],
)
def test_data_without_labels_is_rejected_before_torch_is_loaded(
    lines: list[str], said: Any, tmp_path: Path
):
    config = write_config(tmp_path, *lines)
    err = ended("run", config, "--set", "data.task=classification")
    assert err == f"error: {said(tmp_path / 't.jsonl')}\n"


def test_a_rank_that_is_too_large_is_rejected_before_torch_is_loaded(tmp_path: Path):
    config = write_config(tmp_path, '{"prompt": "a", "completion": "b"}')
    limits = {"most": 192, "value": 100000, "module": "k_proj"}
    said = f"error: --rank: {say('RANK_TOO_HIGH', method='lora', **limits)}\n"
    assert ended("run", config, "--rank", "100000") == said


def test_paths_in_flags_are_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Paths in the file and in ``--set`` are relative to the file."""
    config = write_config(tmp_path / "there", '{"prompt": "a", "completion": "b"}')
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    _, _, err = loaded_and_said_by("train", "run", config, "--train", "no.jsonl")
    missing = {"why": "No such file or directory", "path": tmp_path / "here" / "no.jsonl"}
    assert f"error: --train: {say('FILE_UNREADABLE', **missing)}\n" in err
    _, _, err = loaded_and_said_by("train", "run", config, "--set", "data.train=no.jsonl")
    missing |= {"path": tmp_path / "there" / "no.jsonl"}
    meant = f"{tmp_path}/there/t.jsonl"
    said = say("FILE_UNREADABLE", closest=meant, **missing)
    assert f"error: --set data.train: {said}\n" in err
    (tmp_path / "here" / "taken").touch()
    _, _, err = loaded_and_said_by("train", "run", config, "--output", "taken")
    assert f"error: {tmp_path}/here/taken {say('FOLDER_IS_A_FILE')}" in err
    # A model that is not a path here may be on the hub.
    (tmp_path / "here" / "base").mkdir()
    _, _, err = loaded_and_said_by("train", "run", config, "--model", "base")
    assert f"{tmp_path}/here/base" in err


def write_mixture(folder: Path) -> Path:
    """Write the parts of a base that are read before torch is loaded, with narrow experts."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    layers = {"num_hidden_layers": 2, "mlp_only_layers": [], "decoder_sparse_step": 1}
    folder.mkdir(parents=True)
    config = {"model_type": "qwen3_moe", **sizes, **heads, **experts, **layers}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").touch()
    save_file({"a": np.zeros(1, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("place", ["directory", "hub"])
@pytest.mark.parametrize("how", [("run", "--rank", "25"), ("sweep", "--ranks", "2,25")])
def test_a_rank_is_checked_before_a_mixture_is_loaded_or_fetched(
    how: tuple[str, ...], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = write_config(tmp_path, '{"text": "a"}', '{"text": "b"}')
    model = str(tmp_path / "mixture")
    if place == "directory":
        write_mixture(tmp_path / "mixture")
    else:
        model = "acme/mixture"
        repository = tmp_path / "hub" / "models--acme--mixture"
        write_mixture(repository / "snapshots" / ("a" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    verb, *flags = how
    limits = {"most": 24, "value": 25, "module": "gate_proj"}
    said = f"error: {flags[0]}: {say('RANK_TOO_HIGH', method='lora', **limits)}\n"
    assert ended(verb, config, "--model", model, *flags) == said


@pytest.mark.parametrize("context", [8192, 300])
def test_a_length_beyond_the_context_is_rejected_before_torch_is_loaded(
    context: int, tmp_path: Path
):
    """Tested with the bundled model and with a directory."""
    config = write_config(tmp_path, '{"prompt": "a", "completion": "b"}')
    flags = ["--set", "data.max_length=8193"]
    if context == 300:
        model = write_mixture(tmp_path / "mixture")
        said = read_config(model) | {"max_position_embeddings": context}
        (model / "config.json").write_text(json.dumps(said))
        flags += ["--model", str(model)]
    text = say("EXCEEDS_CONTEXT", most=context, value=8193)
    assert ended("plan", config, *flags) == f"error: --set data.max_length: {text}\n"


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_truncated_weights_are_rejected_before_torch_is_loaded(verb: str, tmp_path: Path):
    config = write_config(tmp_path, '{"prompt": "a", "completion": "b"}')
    weights = write_mixture(tmp_path / "mixture") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    err = ended(verb, config, "--model", str(weights.parent), "--rank", "2")
    assert err.startswith(f"error: --model: {weights} ")
    assert err.count("\n") == 1


def test_unsupported_targets_in_a_mixture_are_rejected_before_torch_is_loaded(tmp_path: Path):
    config = write_config(tmp_path, '{"prompt": "a", "completion": "b"}')
    model = str(write_mixture(tmp_path / "mixture"))
    for targets, name in (("mlp", "gate_proj"), ("gate", '"gate"'), ("q_proj,qate", '"qate"')):
        flags = ("--method", "dora", "--set", f"method.targets={targets}")
        err = ended("run", config, "--model", model, *flags)
        assert err.startswith("error: --set method.targets: ")
        assert name in err


@pytest.mark.parametrize("model_type", FAMILIES)
def test_modules_derived_from_a_config_match_the_model(model_type: str):
    config = AutoConfig.for_model(model_type)
    if model_type == "granitemoehybrid":
        config.layer_types = ["attention"] * config.num_hidden_layers
        config.num_local_experts, config.shared_intermediate_size = 0, 1000
    config.tie_word_embeddings = False
    if FAMILIES[model_type].experts is not None:
        # Every third layer has an MLP, if the family supports that.
        config.mlp_only_layers, config.decoder_sparse_step = [1, 4, 7], 1
    said = config.to_dict()
    # Families differ in the default width of a head.
    for told in (said, {key: value for key, value in said.items() if key != "head_dim"}):
        arch = read_arch(type(config).from_dict(told))
        expected = Projections(**{f.name: getattr(arch, f.name) for f in fields(Projections)})
        assert found_in(told, "model").projections() == expected
    del said["num_key_value_heads"]
    assert found_in(said, "model").projections() is None


def test_a_missing_extra_is_reported_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name)
    )
    with pytest.raises(RunError, check=says("NOT_INSTALLED", packages="peft")):
        _read(argparse.Namespace())


@pytest.mark.parametrize("verb", ["plan", "sweep"])
def test_plan_and_sweep_print_before_they_load_torch(verb: str, tmp_path: Path):
    config = write_config(tmp_path, '{"text": "a"}', '{"text": "b"}')
    # Loading torch ends the process, so that only earlier output is visible.
    stop = (
        "import sys; from turret.server import cli\n"
        "class Stop:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch': sys.exit(7)\n"
        "sys.meta_path.insert(0, Stop())\n"
        f"sys.exit(cli.main(['train', {verb!r}, {config!r}]))"
    )
    done = run_python(stop)
    ranks = "a run for each rank (2, 4, 8, 16, 32); use --ranks to choose others\n"
    said = f"{ranks if verb == 'sweep' else ''}{verb}: starting  0 s\n"
    assert (done.returncode, done.stderr) == (7, said)


def test_an_interrupted_run_reports_where_it_can_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = RunFolder(tmp_path)

    def stop(args: argparse.Namespace) -> None:
        args.how_to_go_on = run.how_to_go_on
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    def said() -> str:
        assert with_errors(stop)(argparse.Namespace()) == 143
        return capsys.readouterr().err

    assert said() == "stopped\n"
    go_on = f"`turret train run {run.config} --resume`"
    for every, why in (
        (0, "no checkpoint is written (run.checkpoint_every is 0)"),
        (200, "no checkpoint is written (run.checkpoint_every is 200, run.steps 150)"),
        (50, "the first checkpoint is written after step 50 (run.checkpoint_every)"),
    ):
        run.write_facts({"config": {"run": {"checkpoint_every": every, "steps": 150}}})
        assert said() == f"stopped; {why}, so {go_on} starts at step 0\n"
    run.checkpoints.mkdir()
    for step in (50, 100):
        checkpoint_path(run.checkpoints, step).touch()
    assert said() == f"stopped; {go_on} continues from step 100\n"
    run.adapter.mkdir()
    writes = f"`turret train report {run.path}` writes it without samples"
    assert said() == f"stopped; the adapter is complete, but its report is missing; {writes}\n"
    with pytest.raises(RunError) as refused:
        run.check(resume=True, overwrite=False)
    assert says("RUN_WITHOUT_REPORT", command=f"turret train report {run.path}")(refused.value)
    run.report.touch()
    # The report describes half of the run, before the adapter existed.
    os.utime(run.report, (1, 1))
    assert said() == f"stopped; the adapter is complete, but its report is missing; {writes}\n"
    run.report.touch()
    assert said() == "stopped\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_closed_output_pipe_is_not_an_error(tmp_path: Path):
    program = (
        "import os, sys\n"
        "from turret.server.cli import main\n"
        "reader, writer = os.pipe()\n"
        "os.close(reader)\n"
        "os.dup2(writer, 1)\n"
        "sys.stdout.reconfigure(line_buffering=True)\n"
        f"sys.argv[1:] = ['train', 'init', {str(tmp_path / 'train.toml')!r}]\n"
        "sys.exit(main())\n"
    )
    done = run_python(program)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_sweep_is_refused_before_the_first_rank(tmp_path: Path):
    config = write_config(tmp_path, '{"text": "a"}', '{"text": "b"}')
    last = RunFolder(tmp_path / "run" / "rank-4")
    last.path.mkdir(parents=True)
    last.write_facts({"server": "localhost:1"})
    words = ("sweep", config, "--ranks", "2,4")
    command = f"turret train run {last.path}/config.toml --resume --server localhost:1"
    assert str(say("RUN_ELSEWHERE", path=last.path, how="with", command=command)) in ended(*words)
    RunFolder(tmp_path / "run").write_facts({})
    assert str(say("OUTPUT_IS_A_RUN", path=tmp_path / "run")) in ended(*words)


def test_an_interrupted_sweep_suggests_the_same_command_if_it_can_resume(tmp_path: Path):
    two, four, eight = (tmp_path / f"rank-{rank}" for rank in (2, 4, 8))
    assert _how_a_sweep_goes_on([two, four]) == ""
    run = RunFolder(four)
    run.checkpoints.mkdir(parents=True)
    assert _how_a_sweep_goes_on([two, four]) == ""
    checkpoint_path(run.checkpoints, 50).touch()
    assert _how_a_sweep_goes_on([two, four]).startswith("the same command continues")
    assert _how_a_sweep_goes_on([two, eight]) == ""


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_libraries_load_ends_the_process(kind: signal.Signals, code: int):
    stop = (
        "import os, signal, time\n"
        "from turret.server.command.entry import ending_at_interrupts, raising_terminated\n"
        "with raising_terminated(), ending_at_interrupts('stopped; and so on'):\n"
        f"    os.kill(os.getpid(), {int(kind)})\n"
        "    time.sleep(10)\n"
    )
    done = run_python(stop)
    assert (done.returncode, done.stderr) == (code, "\nstopped; and so on\n")


def test_only_a_name_written_as_an_id_is_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A path that is joined with a file's folder may look like an id."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = write_config(Path("acme"), '{"text": "a"}')
    own = Path("acme/own.toml")
    own.write_text('[base]\nmodel = "my-model"\n[data]\ntrain = "t.jsonl"\n')
    for words, place in (
        ((str(own),), "acme/my-model"),
        ((config, "--set", "base.model=my-model"), "acme/my-model"),
        ((config, "--model", "my-model"), "my-model"),
        ((config, "--model", "./org/name"), "org/name"),
    ):
        code, modules, err = loaded_and_said_by("train", "run", *words)
        assert code == 1
        assert f"{tmp_path}/{place} " in err
        assert not modules & {"torch", "huggingface_hub"}
    _, _, err = loaded_and_said_by("train", "run", config, "--model", "org/name")
    assert "org/name" in err


def test_the_data_are_read_before_the_hub_is_asked(tmp_path: Path):
    config = write_config(tmp_path, '{"messages": []}')
    code, modules, err = loaded_and_said_by("train", "plan", config, "--model", "org/name")
    assert code == 1
    assert err == f"error: {tmp_path}/t.jsonl:1: messages: {say('EMPTY')}\n"
    assert not modules & {"torch", "huggingface_hub"}


@pytest.mark.parametrize(
    ("lines", "flags"), [(1, ()), (3, ("--set", "data.validation_fraction=0"))]
)
def test_a_sweep_without_validation_data_is_rejected_before_torch_is_loaded(
    lines: int, flags: tuple[str, ...], tmp_path: Path
):
    config = write_config(tmp_path, *(f'{{"text": "{line}"}}' for line in range(lines)))
    said = str(say("VALIDATION_EMPTY", path=tmp_path / "t.jsonl", found=lines))
    assert said in ended("sweep", config, *flags)
