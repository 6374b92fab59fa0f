"""A program that trains, saves and samples with the client ``tinker``.

The program runs in a process of its own, where another version of the client may be installed. It
prints the received results as JSON.

Usage: tinker_client.py BASE_URL MODEL
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
import tinker  # type: ignore[import-not-found]
from tinker import types  # type: ignore[import-not-found]

TOKENS = [5, 6, 7, 8, 5, 6]


def datum(tokens: list[int], **inputs: Any) -> types.Datum:
    arrays = {"target_tokens": np.array([*tokens[1:], tokens[0]], np.int64)}
    arrays |= {name: np.array(values, np.float32) for name, values in inputs.items()}
    tensors = {name: types.TensorData.from_numpy(array) for name, array in arrays.items()}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=tensors)


def result(promise: Any) -> Any:
    """The result of a method: a future in newer versions, and sometimes the value in older ones."""
    return promise.result() if hasattr(promise, "result") else promise


def logprobs(output: Any) -> list[list[float]]:
    return [each["logprobs"].tolist() for each in output.loss_fn_outputs]


def train(client: Any, steps: int) -> list[float]:
    """Losses of steps on one sequence; pass and step are sent together."""
    losses = []
    data = [datum(TOKENS, weights=[1.0] * 6), datum(TOKENS[:3], weights=[1.0] * 3)]
    for _ in range(steps):
        passed = client.forward_backward(data, "cross_entropy")
        stepped = client.optim_step(types.AdamParams(learning_rate=0.1))
        losses.append(passed.result().metrics["loss:sum"])
        assert stepped.result() is not None
    return losses


def failure(work: Any) -> list[str]:
    """The class and the text of an error of the client."""
    try:
        result(work())
    except tinker.TinkerError as error:
        return [type(error).__name__, str(error)]
    raise AssertionError("this did not fail")


def main(url: str, model: str) -> dict[str, Any]:
    service = tinker.ServiceClient(base_url=url, api_key="tml-test")
    found: dict[str, Any] = {"version": tinker.__version__}
    rest = service.create_rest_client()
    capable = result(
        (rest if hasattr(rest, "get_server_capabilities") else service).get_server_capabilities()
    )
    found["models"] = [each.model_name for each in capable.supported_models]
    client = result(
        service.create_lora_training_client(
            base_model=model, rank=4, seed=1, train_unembed=False, user_metadata={"job": "test"}
        )
    )
    info = client.get_info()
    found["info"] = [info.model_data.model_name, info.lora_rank, info.is_lora]
    # Chunks: the client cuts this list, and sends the first part last.
    client.holder._client_config = client.holder._client_config.model_copy(
        update={"fwdbwd_max_chunk_len": 2}
    )
    many = [datum(TOKENS[: 2 + index % 4]) for index in range(9)]
    found["many"] = [len(each) for each in logprobs(client.forward(many, "cross_entropy").result())]
    found["losses"] = train(client, 5)
    scored = client.forward([datum(TOKENS)], "cross_entropy").result()
    found["scored"] = logprobs(scored)[0]
    # Other losses.
    q = found["scored"]
    for loss in ("importance_sampling", "ppo", "cispo", "dro"):
        asked = datum(TOKENS, logprobs=q, advantages=[1.0, -1.0, 0.5, 0.0, 1.0, 1.0])
        config = {"beta": 0.2} if loss == "dro" else None
        output = client.forward([asked], loss, config).result()
        found[loss] = output.metrics["loss:sum"]
    if "torch" in sys.modules:
        import torch

        def custom(data: Any, values: Any) -> Any:
            total = -torch.stack([each.mean() for each in values]).sum()
            return total, {"nll:sum": float(total)}

        output = client.forward_backward_custom([datum(TOKENS)], custom).result()
        found["custom"] = output.metrics["nll:sum"]
        client.optim_step(types.AdamParams(learning_rate=0.0)).result()
    # Checkpoints.
    saved = client.save_state("first", ttl_seconds=7200).result().path
    found["saved"] = saved
    for_sampling = client.save_weights_for_sampler("first").result().path
    found["taken"] = failure(lambda: client.save_state("first"))
    again = result(service.create_training_client_from_state_with_optimizer(saved))
    found["same"] = train(again, 2) == train(client, 2)
    fresh = result(service.create_training_client_from_state(saved))
    found["fresh"] = logprobs(fresh.forward([datum(TOKENS)], "cross_entropy").result())[0]
    # Samples.
    prompt = types.ModelInput.from_ints(TOKENS)
    params = types.SamplingParams(max_tokens=4, temperature=0.7, seed=3, stop=["z"], top_k=5)
    samplers = {
        "base": result(service.create_sampling_client(base_model=model)),
        "path": result(service.create_sampling_client(model_path=for_sampling)),
        "weights": result(service.create_sampling_client(model_path=saved)),
        "own": result(client.save_weights_and_get_sampling_client()),
    }
    found["samples"] = {}
    for name, sampler in samplers.items():
        answer = sampler.sample(prompt=prompt, num_samples=3, sampling_params=params).result()
        found["samples"][name] = [
            [each.stop_reason, list(each.tokens), list(each.logprobs or ())]
            for each in answer.sequences
        ]
    found["prompt"] = result(samplers["own"].compute_logprobs(prompt))
    answer = (
        samplers["own"]
        .sample(
            prompt=prompt,
            num_samples=1,
            sampling_params=types.SamplingParams(max_tokens=1, stop=[]),
            include_prompt_logprobs=True,
            topk_prompt_logprobs=2,
        )
        .result()
    )
    found["top"] = len(answer.topk_prompt_logprobs or ())
    # Unsupported calls, and calls with errors.
    bad = datum(TOKENS, weights=[1.0, float("nan"), 1.0, 1.0, 1.0, 1.0])
    found["nan"] = failure(lambda: client.forward_backward([bad], "cross_entropy"))
    short = datum(TOKENS, weights=[1.0])
    found["short"] = failure(lambda: client.forward([short], "cross_entropy"))
    outside = datum([1, 1 << 30])
    found["outside"] = failure(lambda: client.forward([outside], "cross_entropy"))
    found["loss"] = failure(lambda: client.forward([datum(TOKENS)], "gspo"))
    found["base_model"] = failure(
        lambda: service.create_lora_training_client(base_model="other", rank=4)
    )
    found["method"] = failure(
        lambda: service.create_lora_training_client(
            base_model=model, rank=4, user_metadata={"turret.method": "nothing"}
        )
    )
    found["missing"] = failure(
        lambda: service.create_sampling_client(model_path=saved.replace("first", "none"))
    )
    # The client still works after all these.
    found["last"] = train(client, 1)
    # Lists.
    runs = result(rest.list_training_runs())
    found["runs"] = [[each.training_run_id, each.lora_rank] for each in runs.training_runs]
    listed = result(rest.list_checkpoints(client.model_id)).checkpoints
    found["checkpoints"] = sorted(each.checkpoint_id for each in listed)
    found["expires"] = sum(each.expires_at is not None for each in listed)
    result(rest.set_checkpoint_ttl_from_tinker_path(for_sampling, 3600))
    result(rest.delete_checkpoint_from_tinker_path(saved))
    listed = result(rest.list_user_checkpoints()).checkpoints
    found["after"] = [each.checkpoint_id for each in listed]
    found["rank"] = result(rest.get_weights_info_by_tinker_path(for_sampling)).lora_rank
    if hasattr(rest, "get_checkpoint_archive_url_from_tinker_path"):
        url = result(rest.get_checkpoint_archive_url_from_tinker_path(for_sampling)).url
        found["archive"] = url
    if hasattr(client, "save_weights_external"):
        external = client.save_weights_external("out").result().path
        urls = result(rest.get_external_weights_urls(external)).urls
        found["files"] = urls
    found["async"] = asyncio.run(waited(client))
    if hasattr(service, "close"):
        result(service.close("success"))
    return found


async def waited(client: Any) -> int:
    """The number of outputs of an awaited result."""
    promise = client.forward([datum(TOKENS)], "cross_entropy")
    output = await promise
    return len(output.loss_fn_outputs)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
