"""The Tinker API on the engine: a sampler's log probabilities are those of training, bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from method_oracle import prompt_of, twin
from servers.engine_harness import EngineHarness
from servers.http_harness import http_harness
from servers.tinker_tenant import Tenant, pass_of, sample_of

from turret.v1 import tinker_pb2

STEP = {"learning_rate": 1e-2}


def losses_of(data: bytes) -> tuple[float, bytes]:
    """The sum of the losses, and the bits of the log probabilities."""
    result = tinker_pb2.TinkerPassResult.FromString(data)
    return result.metrics["loss:sum"], result.loss_fn_outputs[0].fields["logprobs"].data


async def test_a_model_is_trained_sampled_saved_and_resumed(tmp_path: Path) -> None:
    import torch

    folder, state = twin("llama", torch.bfloat16).folder, tmp_path / "state"
    async with EngineHarness.start(
        folder, dtype="bfloat16", state_dir=state, training=True
    ) as harness:
        parts = {"backend": harness.backend, "training": state / "training"}
        async with http_harness(**parts) as http:
            http.client.timeout = 60
            await _train(Tenant(http.client, {}), harness)
        assert harness.registry.list() == []


async def _train(one: Tenant, harness: EngineHarness) -> None:
    await one.begin()
    model_id = await one.model(lora_config={"rank": 4, "seed": 1, "train_unembed": False})
    text = prompt_of(24, 1)
    losses, number = [], 1
    for _ in range(4):
        losses.append(losses_of(await one.run(pass_of(model_id, number, tokens=text)))[0])
        step = {"model_id": model_id, "seq_id": number + 1, "adam_params": STEP}
        await one.done("/optim_step", step)
        number += 2
    assert losses[-1] < 0.9 * losses[0]
    save = {"model_id": model_id, "seq_id": number, "sampling_session_seq_id": 0}
    made = await one.done("/save_weights_for_sampler", save)
    path = (await one.save(model_id, number + 1, "a"))["path"]
    await _check_hidden(one, harness)
    sampler_ids = [made["sampling_session_id"], await one.sampler(1, model_path=path)]
    found = []
    for sampler_id in sampler_ids:
        params = {"max_tokens": 6, "seed": 5, "stop": []}
        asked = sample_of(sampler_id, tokens=text, prompt_logprobs=True, sampling_params=params)
        data = await one.done("/asample", asked)
        found.append(tinker_pb2.TinkerSamples.FromString(data))
    assert found[0].sequences == found[1].sequences
    tokens = np.frombuffer(found[0].sequences[0].tokens, "<i4").tolist()
    whole = pass_of(model_id, number + 2, tokens=[*text, *tokens], forward_only=True)
    _, trained = losses_of(await one.run(whole))
    # The first token has no log probability, and the last target is not one of the tokens.
    sampled = found[0].prompt_logprobs[4:] + found[0].sequences[0].logprobs
    assert trained[: len(sampled)] == sampled
    load = {"session_id": one.session, "model_seq_id": 1, "path": path, "optimizer": True}
    again = (await one.done("/load_weights", load))["model_id"]
    results = []
    for each, first in ((model_id, number + 3), (again, 1)):
        await one.run(pass_of(each, first, tokens=text))
        step = {"model_id": each, "seq_id": first + 1, "adam_params": STEP}
        await one.done("/optim_step", step)
        results.append(losses_of(await one.run(pass_of(each, first + 2, tokens=text))))
    assert results[0] == results[1]
    assert len(harness.registry.list()) == 2
    await one.ask(f"/sessions/{one.session}/finish", {})


async def _check_hidden(one: Tenant, harness: EngineHarness) -> None:
    """Check that others learn nothing about a sampler's adapter, which they may use by name."""
    (name,) = (info.name for info in harness.registry.list())
    listed = (await one.client.get("/v1/models")).json()["data"]
    assert len(listed) == 1
    seen = (await one.client.get("/console/state", params={"find": "training"})).json()
    assert seen["adapters"] == {"shown": [], "matching": 0, "total": 0}
    # The error for an unknown name suggests similar ones.
    similar = {"model": f"{name}0", "prompt": "a"}
    answer = await one.client.post("/v1/completions", json=similar)
    assert answer.status_code == 404
    assert answer.text.count(name) == answer.text.count(f"{name}0")
