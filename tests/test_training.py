"""Training of every method, to the end: what was trained is what the server and PEFT compute."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from engine_harness import EngineHarness, make_request
from peft import PeftModel
from training_builders import resolve_tiny

from turret.training.base_model import load_model
from turret.training.loss import LossFunction
from turret.training.methods import METHODS
from turret.training.peft_warnings import without_peft_warnings
from turret.training.resolve import Resolved
from turret.training.run_folder import read_metrics
from turret.training.trainer import Trainer, pad_token, validation_loss

# Learned fusion is trained over others' results, and is not PEFT's: test_fusion_training.py.
NAMES = tuple(name for name in METHODS if name != "learned_fusion")
EXACT = ("base.dtype=float32", "run.adapter_dtype=float32")
RATES = {"loha": 0.1, "ia3": 0.1, "prompt_tuning": 0.3}


@pytest.fixture(scope="module")
def runs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Resolved]:
    """Every method trained for a few steps, each into ``runs/NAME``."""
    folder = tmp_path_factory.mktemp("runs")
    resolved = {}
    for name in NAMES:
        rate = RATES.get(name, 0.02)
        resolved[name] = resolve_tiny(
            folder,
            tiny_llama,
            *EXACT,
            f"method.name={name}",
            f"run.output={name}",
            f"optimizer.learning_rate={rate}",
        )
        Trainer(resolved[name]).run()
    return resolved


def metrics_of(resolved: Resolved, kind: str) -> list[dict]:
    path = Path(resolved.config.run.output) / "metrics.jsonl"
    return [row for row in read_metrics(path) if row["kind"] == kind]


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss(runs: dict[str, Resolved], name: str):
    validation = metrics_of(runs[name], "validation")
    assert [row["step"] for row in validation] == [0, 2, 4]
    # Before training an adapter changes nothing, but for those that learn a prompt.
    assert validation[-1]["loss"] < 0.9 * validation[0]["loss"]
    steps = metrics_of(runs[name], "step")
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.fixture(scope="module")
def served(tiny_llama: Path, runs: dict[str, Resolved]) -> dict[str, float]:
    """Validation loss of every adapter as the server computes it, and of the base (``""``)."""
    root = Path(next(iter(runs.values())).config.run.output).parent
    return asyncio.run(score_all(tiny_llama, root, runs))


async def score_all(model: Path, root: Path, runs: dict[str, Resolved]) -> dict[str, float]:
    losses = {}
    async with EngineHarness.start(model, root) as harness:
        for name in NAMES:
            harness.registry.load(name, f"{name}/adapter")
        for name in ("", *NAMES):
            requests, asked = [], []
            for (example,) in runs[name or "lora"].dataset.validation:
                adapters = [name] if name else []
                requests.append(make_request(example.tokens, *adapters, score=True))
                asked += example.learned
            answers = await harness.run_all(requests)
            logprobs = [logprob for answer in answers for logprob in answer.prompt_logprobs]
            pairs = zip(asked, logprobs, strict=True)
            wanted = [logprob for learned, logprob in pairs if learned and logprob is not None]
            losses[name] = -sum(wanted) / len(wanted)
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_what_is_served_is_what_was_trained(
    runs: dict[str, Resolved], served: dict[str, float], name: str
):
    trained = metrics_of(runs[name], "validation")[-1]["loss"]
    assert served[name] == pytest.approx(trained, rel=1e-4)
    assert served[name] < 0.95 * served[""]


@pytest.mark.parametrize("name", NAMES)
def test_peft_reads_the_adapter(runs: dict[str, Resolved], name: str):
    resolved = runs[name]
    base = load_model(resolved.base, "nf4-dense", torch.float32, "cpu")
    with without_peft_warnings():
        model = PeftModel.from_pretrained(base, f"{resolved.config.run.output}/adapter").eval()
    loss = LossFunction(model, base.get_output_embeddings(), "cpu")
    pad = pad_token(resolved.base.tokenizer)
    found = validation_loss(loss, resolved.dataset.validation, 4, pad)
    trained = metrics_of(resolved, "validation")[-1]["loss"]
    assert found == pytest.approx(trained, rel=1e-4)
