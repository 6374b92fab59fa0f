"""``turret model repair``: its adapter makes a quantised model answer as its files would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders.bases.mixed_checkpoints import UNSLOTH, save_4bit
from builders.bases.tiny_models import save_tiny_model
from peft import PeftModel

from turret.server.cli import main
from turret.training.base_model import Weights, find_base, load_model, without_peft_warnings

# The highest rank: each module limits it to what its shape allows.
_FULL = 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repair")
    save_tiny_model("llama", folder / "model")
    (folder / "text").write_text("Some words of a language. " * 100)
    return folder


def _repair(folder: Path, model: str, rank: int) -> tuple[int, Path]:
    made = folder / f"rank-{rank}"
    flags = ("--text", str(folder / "text"), "--rank", str(rank), "--output", str(made), "--quiet")
    return main(["model", "repair", str(folder / model), *flags]), made


def test_a_larger_rank_reduces_the_quantisation_error(folder: Path) -> None:
    base = find_base(folder / "model")
    ids = torch.arange(3, 60)[None]

    def logits(weights: Weights, adapter: Path | None = None) -> torch.Tensor:
        model = load_model(base, weights, torch.float32, "cpu").eval()
        if adapter is not None:
            with without_peft_warnings():
                model = PeftModel.from_pretrained(model, str(adapter)).eval()
        with torch.no_grad(), without_peft_warnings():
            return model(ids).logits

    exact = logits("full")
    errors = [float((logits("nf4-dense") - exact).norm())]
    for rank in (8, _FULL):
        code, made = _repair(folder, "model", rank)
        assert code == 0
        provenance = json.loads((made / "provenance.json").read_text())
        assert provenance["base"]["digest"] == base.source.digest
        errors.append(float((logits("nf4-dense", made) - exact).norm()))
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < 0.01 * errors[0]


def test_a_4_bit_model_has_nothing_to_repair(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_4bit(folder / "model", folder / "mixed", UNSLOTH)
    code, made = _repair(folder, "mixed", 4)
    assert code == 1
    assert not made.exists()
    assert str(folder / "mixed") in capsys.readouterr().err
