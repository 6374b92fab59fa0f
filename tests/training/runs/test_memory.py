"""The memory estimate compared with the measured peak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.bases.tiny_models import BOS, EOS, VOCAB_SIZE, tiny_tokenizer
from builders.training import REQUIRED, resolve_tiny, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM

from turret.training.engine import attach, trainable
from turret.training.memory import LiveBytes, _why_failed, estimate_memory
from turret.training.methods import METHODS

NAMES = tuple(name for name in METHODS if name != "learned_fusion")


def test_live_bytes_count_only_referenced_tensors():
    with LiveBytes() as live:
        x = torch.zeros(100, device="meta", requires_grad=True)
        y = x * 2
        view = y.view(10, 10)[0]
        view.add_(1)
        assert live.live == 800
        del y
        assert live.live == 800
        del view
        assert live.live == 400
        kept = x.exp().sin()  # exp's result is kept for the backward pass
        assert live.live == 1200
        kept.sum().backward()
        del kept
        # x and its gradient.
        assert live.live == 800
    assert live.peak >= 1600


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_an_estimate(tiny_llama: Path, tmp_path: Path, name: str):
    changes = (f"method.name={name}", "optimizer.name=adamw8bit", *REQUIRED.get(name, ()))
    resolved = resolve_tiny(tmp_path, tiny_llama, *changes)
    small = estimate_memory(resolved)
    count = sum(parameter.numel() for parameter in trainable(attach(resolved)).values())
    assert (small.num_parameters, small.adapter) == (count, 6 * count)
    large = estimate_memory(resolve_tiny(tmp_path, tiny_llama, *changes, "run.batch_size=16"))
    gradients = 4 * count
    # Four times the rows take four times the activations, but the same gradients.
    assert 2 * (small.step - gradients) < large.step - gradients < 5 * small.step


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "hidden", "inner", "layers"),
    [
        # The engine trains at most 512 tokens at a time.
        ("bfloat16", 1024, 4096, 10),
        # PEFT trains in float32.
        ("float32", 512, 1024, 6),
    ],
)
def test_the_estimate_is_near_the_peak(
    dtype: str,
    hidden: int,
    inner: int,
    layers: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """The model and its step need a considerable part of the memory of the process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", [{"text": "x" * 250}] * 8)
    file = tmp_path / "train.toml"
    file.write_text(
        f'[base]\nmodel = "model"\ndtype = "{dtype}"\ndevice = "cpu"\n'
        '[data]\ntrain = "train.jsonl"\nvalidation_fraction = 0\n'
    )
    command = [sys.executable, "-m", "turret.server.cli", "train", "plan", str(file)]
    command += ["--measure", "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stderr == b""
    plan = json.loads(done.stdout)
    memory, peak = plan["memory"], plan["measured_peak"]
    assert memory["total"] - memory["process"] > memory["process"] / 2
    assert dtype != "float32" or memory["step"] > memory["process"] / 2
    assert memory["total"] == pytest.approx(peak, rel=0.2)
    # Also compare the model's own share, without the process.
    own = peak - memory["process"]
    assert memory["total"] - memory["process"] == pytest.approx(own, rel=0.3)
    assert plan["data"] == {"examples": 8, "tokens": 8 * 251, "rows": 8, "validation_rows": 0}
    assert plan["config"]["base"]["dtype"] == dtype
    assert plan["served"]["file_bytes"] > 0


@pytest.mark.parametrize(
    ("code", "reason", "params"),
    [
        ("import os; os.kill(os.getpid(), 9)", "REHEARSAL_KILLED", {}),
        ("raise SystemExit('no room')", "REHEARSAL_FAILED", {"problem": "no room"}),
        ("raise SystemExit(3)", "REHEARSAL_FAILED", {"problem": "exit code 3"}),
    ],
)
def test_a_measurement_that_fails_gives_the_reason(code: str, reason: str, params: dict[str, str]):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    text = _why_failed(done)
    assert (text.reason, text.params) == (reason, params)
