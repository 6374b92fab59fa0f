"""Training of every method to the end: the server and PEFT compute the trained results."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from builders.training import REQUIRED, resolve_tiny, tiny_variants
from peft import PeftModel
from rich.console import Console
from said import says
from servers.engine_harness import EngineHarness, make_request

from turret.server.adapters.checkpoint.adapter_root import AdapterRoot
from turret.server.adapters.checkpoint.reader import read_checkpoint
from turret.server.adapters.methods.lower import lower_checkpoint
from turret.server.errors import BudgetExceededError
from turret.training.base_model import load_model, without_peft_warnings
from turret.training.batches import make_batch
from turret.training.engine import PeftEngine, attach, pad_token, trainable
from turret.training.loss import LossFunction, learning_rate, make_optimizer, set_learning_rate
from turret.training.methods import METHODS
from turret.training.plan import make_plan
from turret.training.run import read_metrics
from turret.training.run.progress import training_progress
from turret.training.serving_cost import served_base, serving_cost
from turret.training.settings import OptimizerConfig
from turret.training.settings.resolve import Resolved
from turret.training.sweep import sweep
from turret.training.trainer import Trainer, validation_loss
from turret.training.words import ConfigError

# Learned fusion is trained over other adapters, without PEFT; see test_fusion_training.py.
NAMES = tuple(name for name in METHODS if name != "learned_fusion")
EXACT = ("base.dtype=float32", "run.adapter_dtype=float32")
RATES = {"loha": 0.1, "ia3": 0.1, "prompt_tuning": 0.3}


@pytest.fixture(scope="module")
def runs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Resolved]:
    """Every method, trained for a few steps into ``runs/NAME``."""
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
            *REQUIRED.get(name, ()),
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
    # An untrained adapter changes nothing, unless it learns a prompt.
    assert validation[-1]["loss"] < 0.9 * validation[0]["loss"]
    steps = metrics_of(runs[name], "step")
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.fixture(scope="module")
def served(tiny_llama: Path, runs: dict[str, Resolved]) -> dict[str, float]:
    """The validation loss of every adapter in the server, and of the base (``""``)."""
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
def test_the_served_adapter_has_the_trained_loss(
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
    with torch.no_grad():
        found = validation_loss(
            lambda rows: loss(make_batch(rows, pad=pad, is_packed=False)).item(),
            resolved.dataset.validation,
            4,
        )
    trained = metrics_of(resolved, "validation")[-1]["loss"]
    assert found == pytest.approx(trained, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_predicts_the_size_of_the_file(runs: dict[str, Resolved], name: str):
    path = Path(runs[name].config.run.output) / "adapter" / "adapter_model.safetensors"
    cost = serving_cost(runs[name])
    assert cost.file_bytes == path.stat().st_size
    is_prefix = name == "prefix_tuning"
    is_soft = name in ("prompt_tuning", "p_tuning")
    assert (cost.num_soft_tokens, cost.num_prefix_positions) == (16 * is_soft, 16 * is_prefix)
    # Keys and values of 16 positions: 2 layers, 2 heads of 32, bfloat16.
    assert cost.cache_bytes == (16 * 2 * 2 * 2 * 32 * 2 if is_soft or is_prefix else 0)


# The modules in a layer of the tiny llama, [out, in].
SHAPES = [(128, 128), (64, 128), (64, 128), (128, 128), (192, 128), (192, 128), (128, 192)]
PRODUCTS = {
    "lora": sum(8 * (out + inner) for out, inner in SHAPES),
    "dora": sum(8 * (out + inner) + out for out, inner in SHAPES),
    # The rank is 6, because the server supports LoHa only for rank² < 64 · 128 / (64 + 128).
    "loha": sum(6 * 6 * (out + inner) for out, inner in SHAPES),
    "miss": sum(16 * (out + inner) for out, inner in SHAPES),
    "oft": sum(32 * inner for _, inner in SHAPES),
    "hra": sum(8 * (out + inner) for out, inner in SHAPES),
    "shira": sum(8 * (out + inner) for out, inner in SHAPES),
    "alora": sum(32 * (out + inner) for out, inner in SHAPES),
    "vblora": sum(4 * (out + inner) for out, inner in SHAPES),
    "ia3": 64 + 64 + 192,
    "prefix_tuning": 16 * 2 * 128,
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_plan_counts_products_per_token(runs: dict[str, Resolved], name: str):
    cost = serving_cost(runs[name])
    assert cost.multiply_adds == 2 * PRODUCTS[name]
    of_base = sum(out * inner for out, inner in SHAPES)
    assert cost.relative_multiply_adds == pytest.approx(PRODUCTS[name] / of_base)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["method.name=qlora"], "method.name"),
        (["method.name=ia3", "method.rank=4"], "method.rank"),
        (["method.name=loha", "method.rank=7"], "method.rank"),
        (["method.targets=c_attn"], "method.targets"),
        (["method.targets=['mlp', 'q_proj']"], "method.targets"),
        (
            ["method.name=ia3", "optimizer.lora_plus_ratio=4"],
            "optimizer.lora_plus_ratio",
        ),
        (["method.name=p_tuning", "data.packing=true"], "data.packing"),
        (["method.name=hra", "method.rank=3"], "method.rank"),
        (
            ["method.name=hra", "method.rank=130"],
            "method.rank",
        ),
        (
            ["method.name=miss", "method.targets=down_proj", "method.rank=193"],
            "method.rank",
        ),
        (["method.name=shira", "method.rank=43"], "method.rank"),
        (["method.name=alora"], "method.invocation"),
        (["method.invocation=x"], "method.invocation"),
        (
            ["method.name=alora", "method.invocation=:", "data.packing=true"],
            "data.packing",
        ),
        (
            ["method.name=alora", "method.invocation=:", "data.task=classification"],
            "data.task",
        ),
        (
            ["method.name=prefix_tuning", "run.gradient_checkpointing=true"],
            "run.gradient_checkpointing",
        ),
        (["data.max_length=513"], "data.max_length"),
    ],
)
def test_incompatible_settings_are_refused(
    tiny_llama: Path, tmp_path: Path, overrides: list[str], key: str
):
    with pytest.raises(ConfigError) as caught:
        resolve_tiny(tmp_path, tiny_llama, *overrides)
    assert [found for found, _ in caught.value.violations] == [key]


HIGHEST = [
    # The limits for k_proj, 128 → 64, q_proj, 128 → 128, and up_proj, 128 → 192.
    ("lora", "all-linear", "k_proj", 64),
    ("rslora", "mlp", "gate_proj", 128),
    ("dora", "['q_proj', 'o_proj']", "q_proj", 128),
    ("alora", "attention", "k_proj", 64),
    ("vblora", "all-linear", "k_proj", 64),
]


@pytest.mark.parametrize(("method", "targets", "module", "highest"), HIGHEST)
def test_a_rank_is_limited_by_the_smallest_module(
    tiny_llama: Path, tmp_path: Path, method: str, targets: str, module: str, highest: int
):
    keys = (f"method.name={method}", f"method.targets={targets}", *REQUIRED.get(method, ()))
    resolve_tiny(tmp_path, tiny_llama, *keys, f"method.rank={highest}")
    with pytest.raises(ConfigError) as caught:
        resolve_tiny(tmp_path, tiny_llama, *keys, f"method.rank={highest + 1}")
    ((field, text),) = caught.value.violations
    assert (field, text.reason) == ("method.rank", "RANK_TOO_HIGH")
    assert text.params == {
        "most": highest, "method": method, "module": module, "value": highest + 1
    }  # fmt: skip


def test_a_rank_is_checked_before_the_base_is_quantised(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """This holds even if the config leaves a size to transformers, so that torch is loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text())
    del config["num_key_value_heads"]
    (model / "config.json").write_text(json.dumps(config))
    too_high = says("RANK_TOO_HIGH", most=128)
    with pytest.raises(ConfigError, match=r"^method\.rank: ", check=too_high):
        resolve_tiny(tmp_path, model, "method.rank=129")
    variants = tiny_variants(tmp_path, model, "method.rank=2,129")
    with pytest.raises(ConfigError, match=r"^method\.rank: ", check=too_high):
        sweep(variants, tmp_path, training_progress, PeftEngine)
    assert not (tmp_path / "cache").exists()


# Limits above a server's 128, for down_proj, 192 → 128, and other modules of the tiny llama.
OVER = [
    ("miss", "down_proj", 160, 160),
    # The rotation has one block of 2 · 96 inputs.
    ("oft", "down_proj", 96, 192),
    # PEFT rounds 2 · 50 to the nearest divisor: 96 for 192, and 128 for 128.
    ("oft", "all-linear", 50, 128),
    ("oft", "all-linear", 90, 192),
    # The larger factors have at most 16 rows and columns; from half of that on, PEFT keeps them
    # whole.
    ("lokr", "all-linear", 8, 0),
    ("lokr", "all-linear", 7, 7),
    ("lokr", "down_proj", 200, 0),
    ("shira", "['q_proj']", 64, 0),
    ("ia3", "all-linear", None, 0),
]


@pytest.mark.parametrize(("method", "targets", "rank", "served"), OVER)
def test_the_suggested_serve_command_allows_the_rank(
    tiny_llama: Path, tmp_path: Path, method: str, targets: str, rank: int | None, served: int
):
    keys = [f"method.name={method}", f"method.targets={targets}", "run.steps=1"]
    keys += [] if rank is None else [f"method.rank={rank}"]
    resolved = resolve_tiny(tmp_path, tiny_llama, *keys)
    said: list[str] = []
    result = Trainer(resolved, lambda row: said.append(str(row.get("text")))).run()
    (command,) = (text for text in said if text.startswith("adapter written"))
    flag = f" --max-rank {served}" if served > 128 else ""
    assert f" --preload run=adapter{flag}\n" in command
    console = Console(width=200, file=io.StringIO(), highlight=False)
    make_plan(resolved).print(console)
    line = f"turret serve --max-rank {served} (default: 128)"
    assert isinstance(console.file, io.StringIO)
    assert (line in console.file.getvalue()) == (served > 128)
    # Use the server's own reader with its default limit, and with a limit that is too low by one.
    root = AdapterRoot(result.folder.path)
    checkpoint = read_checkpoint(root, "adapter", max_elements=1 << 30)
    lower_checkpoint(checkpoint, served_base(resolved.base), max(served, 128))
    if served:
        with pytest.raises(BudgetExceededError) as refused:
            lower_checkpoint(checkpoint, served_base(resolved.base), served - 1)
        assert refused.value.metadata["max_rank"] == str(served - 1)


def test_resolved_defaults_are_in_the_config(tiny_llama: Path, tmp_path: Path):
    overrides = ["optimizer.name=paged-adamw8bit", "method.targets=attention", "base.device=cpu"]
    resolved = resolve_tiny(tmp_path, tiny_llama, *overrides)
    config = resolved.config
    # Four steps of four rows.
    assert config.run.epochs == pytest.approx(16 / len(resolved.dataset.train), rel=5e-3)
    assert resolved.notes == ("paged-adamw8bit needs CUDA; adamw8bit is used instead",)
    assert config.optimizer.name == "adamw8bit"
    assert config.method.targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (config.method.rank, config.method.alpha) == (8, 16.0)
    assert (config.base.weights, config.optimizer.learning_rate) == ("nf4", 1e-3)


def test_blocks_that_divide_no_module_are_reported_in_one_note(tiny_llama: Path, tmp_path: Path):
    keys = ("method.name=oft", "method.targets=all-linear")
    assert resolve_tiny(tmp_path, tiny_llama, *keys, "method.rank=16").notes == ()
    assert resolve_tiny(tmp_path, tiny_llama, *keys, "method.rank=50").notes == (
        "method.rank 50 asks for blocks of 100 inputs, which do not divide all modules; the nearest"
        " that do are trained: 128 of 128, 96 of 192",
    )


def test_lora_plus_moves_b_faster(tiny_llama: Path, tmp_path: Path):
    """In its first step, AdamW moves every weight with a gradient by the learning rate."""
    resolved = resolve_tiny(tmp_path, tiny_llama, EXACT[0], "optimizer.lora_plus_ratio=16")
    config = resolved.config.optimizer
    model = attach(resolved)
    parameters = trainable(model)
    optimizer = make_optimizer(parameters.items(), config)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    set_learning_rate(optimizer, 1e-3)
    optimizer.step()
    for name, parameter in parameters.items():
        moved = (parameter - before[name]).abs().median().item()
        expected = 16e-3 if "lora_B" in name else 1e-3
        assert moved == pytest.approx(expected, rel=1e-2), name


def test_the_learning_rate_rises_and_falls():
    config = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert max(rates) == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.001


def test_the_adapter_names_its_base_and_no_directory(tiny_llama: Path, tmp_path: Path):
    override = ("method.name=prompt_tuning", "method.init_text=one word", "run.steps=1")
    resolved = resolve_tiny(tmp_path, tiny_llama, *override, "run.samples=0")
    folder = Trainer(resolved).run().folder.adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == resolved.base.source.name
    assert config["tokenizer_name_or_path"] == resolved.base.source.name
    for path in folder.glob("*.json"):
        assert str(tmp_path) not in path.read_text()
        assert "/cache/" not in path.read_text()
