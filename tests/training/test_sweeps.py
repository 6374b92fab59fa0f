"""Sweeps: the variants that settings make, their names, results and errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from builders.training import ended, tiny_variants, write_config
from command_modules import loaded_and_said_by
from said import says

from turret.server.basics.names import ADAPTER_NAME
from turret.training.in_process_engine import in_process_engines
from turret.training.run import RunFolder
from turret.training.settings.variants import read_variants
from turret.training.sweep import sweep
from turret.training.words import ConfigError, ConfigFileError, RunError, say

# The engine of a server trains in this dtype, whatever the processor.
DTYPE = "base.dtype=bfloat16"


def names_of(folder: Path, *overrides: str) -> list[str]:
    path = Path(write_config(folder, '{"text": "a"}'))
    outputs = [Path(each.config.run.output) for each in read_variants(path, overrides)]
    assert {output.parent for output in outputs} == {Path("run")}
    return [output.name for output in outputs]


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["method.rank=1,4"], ["rank-1", "rank-4"]),
        (["method.rank=[4]", "run.seed=3"], ["rank-4"]),
        (["method.name=lora, dora"], ["method-lora", "method-dora"]),
        (
            ["optimizer.learning_rate=1e-4,0.00010,3e-5"],
            ["learning_rate-0.0001", "learning_rate-3e-05"],
        ),
        (
            ["run.seed=[0, 1]", "data.packing=true,false"],
            [f"seed-{n}-packing-{on}" for n in (0, 1) for on in ("true", "false")],
        ),
        # A setting that is a list varies with a list of lists.
        (["method.targets=q_proj,v_proj", "run.seed=1,2"], ["seed-1", "seed-2"]),
        (
            ['method.targets=["attention"], ["q_proj", "v_proj"]'],
            ["targets-attention", "targets-q_proj-v_proj"],
        ),
        # Later overrides win, as for one run.
        (["run.seed=1,2", "run.seed=3"], ["seed-3"]),
    ],
)
def test_every_combination_of_values_is_a_variant(
    overrides: Sequence[str], names: list[str], tmp_path: Path
) -> None:
    assert names_of(tmp_path, *overrides) == names


def test_values_of_any_text_have_separate_names_that_servers_accept(tmp_path: Path) -> None:
    texts = ["Be nice, please.", "Be nice; please.", "../up", "x" * 300, "y" * 300 + "z"]
    found = names_of(tmp_path, "method.name=prompt_tuning", f"method.init_text={json.dumps(texts)}")
    assert len(set(found)) == len(texts)
    assert all(ADAPTER_NAME.fullmatch(name) and "/" not in name for name in found)


def test_a_variant_has_the_settings_and_the_title_of_its_config(tmp_path: Path) -> None:
    path = Path(write_config(tmp_path, '{"text": "a"}'))
    overrides = ["method.name=lora,dora", "optimizer.learning_rate=1e-4,1e-3"]
    last = read_variants(path, overrides)[-1]
    assert last.settings == {"method": "dora", "learning_rate": 1e-3}
    assert (last.config.method.name, last.config.optimizer.learning_rate) == ("dora", 1e-3)
    assert last.title == "method dora, learning rate 0.001"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--set", "run.output=a,b"), "--set run.output: "),
        (("--set", "run.seed=1,x"), "--set run.seed: "),
        (("--set", "run.sed=1,2"), "--set run.sed: "),
        (("--set", "optimizer.learning_rate=0.1,-1"), "--set optimizer.learning_rate: "),
        (("--set", "method.rank=2,100000"), "--set method.rank: "),
        (("--ranks", "2,4", "--set", "method.name=lora,ia3"), "--ranks: "),
        (("--set", "data.max_length=64,1000000"), "--set data.max_length: "),
        (("--set", "data.train=t.jsonl,u.jsonl"), "--set data.train: "),
        (("--set", "method.name=lora,vblora", "--server", "127.0.0.1:1"), "--set method.name: "),
    ],
)
def test_an_invalid_variant_is_rejected_before_torch_is_loaded(
    flags: Sequence[str], said: str, tmp_path: Path
) -> None:
    config = write_config(tmp_path, '{"text": "a"}', '{"text": "b"}')
    _, modules, err = loaded_and_said_by("train", "sweep", config, *flags)
    assert said in err
    assert "torch" not in modules


def test_every_data_file_must_have_validation_examples(tmp_path: Path) -> None:
    config = write_config(tmp_path, '{"text": "a"}', '{"text": "b"}')
    (tmp_path / "one.jsonl").write_text('{"text": "c"}\n')
    said = str(say("VALIDATION_EMPTY", path=tmp_path / "one.jsonl", found=1))
    assert said in ended("sweep", config, "--set", "data.train=t.jsonl,one.jsonl")


def test_a_sweep_compares_variants(tiny_llama: Path, tmp_path: Path) -> None:
    trained: list[str] = []

    @contextmanager
    def announce(title: str) -> Any:
        yield lambda row: trained.append(title) if row["kind"] == "step" else None

    def swept(*overrides: str) -> list[Any]:
        variants = tiny_variants(tmp_path, tiny_llama, DTYPE, "run.steps=2", *overrides)
        with in_process_engines() as open_engine:
            return sweep(variants, tmp_path, announce, open_engine)

    first = swept("method.rank=1,4")
    assert [result.settings for result in first] == [{"rank": 1}, {"rank": 4}]
    assert first[1].num_parameters == 4 * first[0].num_parameters
    assert first[0].relative_multiply_adds < first[1].relative_multiply_adds
    output = tmp_path / "sweep"
    rows = json.loads((output / "sweep.json").read_text())
    assert [row["validation_loss"] for row in rows] == [r.validation_loss for r in first]
    assert [row["rank"] for row in rows] == [1, 4]
    assert [row["output"] for row in rows] == [f"{output}/rank-1", f"{output}/rank-4"]
    assert "what_next" not in rows[0]
    assert f"--adapter-root {output}/rank-4 --preload rank-4=adapter" in first[1].what_next
    # The data is plain text, and the model has no chat template.
    assert "\nask it:    turret generate -a rank-4 'YOUR PROMPT'\n" in first[1].what_next
    assert "\nupdate it: turret adapters replace rank-4 adapter  (if " in first[1].what_next
    assert RunFolder(output / "rank-1").report.exists()
    # Finished variants are not trained again.
    again = swept("method.rank=1,4,2")
    assert again[:2] == first
    # Each variant has two steps. Those that are trained together have one progress bar.
    assert trained == ["sweep"] * 6
    # No variant is trained if one of them is invalid.
    with pytest.raises(ConfigError, check=says("RANK_TOO_HIGH", most=64)):
        swept("method.rank=3,65")
    with pytest.raises(RunError, check=says("RUN_DIFFERS")):
        swept("method.rank=3,4", "run.seed=5")
    assert not (output / "rank-3").exists()
    # VB-LoRA is trained by PEFT, alone, and the order of the results is that of the variants.
    trained.clear()
    mixed = swept("method.name=vblora,lora,ia3", "run.seed=0,1")
    assert [list(r.settings.values()) for r in mixed] == [
        [method, seed] for method in ("vblora", "lora", "ia3") for seed in (0, 1)
    ]
    methods = [RunFolder(Path(r.output)).read_facts()["config"]["method"]["name"] for r in mixed]
    assert methods == [result.settings["method"] for result in mixed]
    alone = [f"method vblora, seed {seed}" for seed in (0, 1)]
    assert trained == ["sweep"] * 8 + [alone[0]] * 2 + [alone[1]] * 2


def test_hopeless_variants_are_stopped_early(tiny_llama: Path, tmp_path: Path) -> None:
    trained: list[int] = []

    @contextmanager
    def announce(title: str) -> Any:
        yield lambda row: trained.append(row["step"]) if row["kind"] == "step" else None

    def swept(name: str, *overrides: str, stops_early: bool = True) -> list[Any]:
        more = ("run.steps=18", f"run.output={name}", "method.rank=4", *overrides)
        variants = tiny_variants(tmp_path, tiny_llama, DTYPE, *more)
        trained.clear()
        with in_process_engines() as open_engine:
            return sweep(variants, tmp_path, announce, open_engine, stops_early=stops_early)

    rates = "optimizer.learning_rate=1e-6,1e-2,1e-5,3e-3,1e-7"
    results = swept("early", rates)
    # Two of the five variants continue after 2 steps, and one of these continues after 6.
    assert [result.steps for result in results] == [2, 18, 2, 6, 2]
    assert results[1].validation_loss == min(result.validation_loss for result in results)
    names = ["step-00000002", "step-00000006"]
    for result, last in ((results[0], names[:1]), (results[3], names)):
        run = RunFolder(Path(result.output))
        assert not run.is_finished
        assert sorted(path.name for path in run.checkpoints.iterdir()) == last
    # The best one has the bytes of a run that never paused.
    (whole,) = swept("whole", "optimizer.learning_rate=[1e-2]", stops_early=False)
    files = [
        Path(each.output) / "adapter/adapter_model.safetensors" for each in (results[1], whole)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    # The same sweep trains nothing again. Without early stops, it trains the others to the end.
    before = [result.figures() for result in results]
    assert [result.figures() for result in swept("early", rates)] == before
    assert trained == []
    assert [each.steps for each in swept("early", rates, stops_early=False)] == [18] * 5


def test_the_output_is_one_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigFileError, check=says("ONE_VALUE_ONLY")):
        names_of(tmp_path, "run.output=a,b")
