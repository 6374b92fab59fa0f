"""Every method on the embedded SmolLM2, against PEFT's forward on the weights served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_harness import EngineHarness, make_request
from method_builders import load_adapter, make_config, save_adapter
from method_oracle import check_greedy, check_score, oracle_logprobs, prompt_of
from tiny_models import load_oracle, served_weights

METHODS: dict[str, dict[str, Any]] = {
    "dora": {"r": 8},
    "loha": {"r": 8, "alpha": 8},
    "lokr": {"r": 8, "alpha": 8},
    "ia3": {},
    "adalora": {"init_r": 8},
    "vera": {"r": 32},
    "prefix_tuning": {"num_virtual_tokens": 20},
    "prompt_tuning": {"num_virtual_tokens": 20},
    "p_tuning": {"num_virtual_tokens": 20},
}


@pytest.mark.slow
async def test_scores_and_answers_are_pefts(tmp_path: Path) -> None:
    model = load_oracle(None, served_weights(None, torch.float32))
    for seed, (method, keys) in enumerate(METHODS.items()):
        # Thirty layers add up: a smaller change than on two.
        save_adapter(model, make_config(method, **keys), tmp_path / method, seed=seed, strength=0.1)
    prompt = prompt_of(21)
    plain = oracle_logprobs(model, prompt)
    async with EngineHarness.start(None, tmp_path, adapters=list(METHODS)) as harness:
        for method in METHODS:
            oracle = load_adapter(model, tmp_path / method)
            assert (oracle_logprobs(oracle, prompt) - plain).abs().max() > 0.05, method
            scored = await harness.run(make_request(prompt, method, score=True))
            check_score(scored, oracle, prompt, method)
            answer = await harness.run(make_request(prompt, method, max_tokens=3))
            check_greedy(answer, oracle, prompt, method)
