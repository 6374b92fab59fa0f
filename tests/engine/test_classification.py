"""Adapters with a classification head, compared with transformers and PEFT, and in a batch."""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import edit_config, edit_tensors
from builders.methods import load_adapter, make_config, quiet, save_adapter
from method_oracle import check_within_peer, prompt_of, serve, twin
from safetensors.torch import load_file
from servers.engine_harness import Asked, EngineHarness, make_request
from transformers import AutoModelForSequenceClassification

from turret.server.adapters.adapter import MULTI_LABEL, REGRESSION, SINGLE_LABEL, AdapterRef
from turret.server.basics.work import Cancellation
from turret.server.engine.scheduling.request import Pooling
from turret.server.errors import AdapterCheckpointError, AdapterMismatchError, InvalidRequestError

CLASSIFY = Pooling(classifies=True)
# Method, changes to its config, labels.
ADAPTERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "lora": ("lora", {"r": 8, "lora_alpha": 12}, 3),
    "dora": ("dora", {"r": 4}, 2),
    "loha": ("loha", {"r": 4}, 5),
    "ia3": ("ia3", {}, 2),
    "prompt": ("prompt_tuning", {"num_virtual_tokens": 5}, 3),
    "one": ("lora", {"r": 2}, 1),
    "tokens": ("lora", {"r": 2, "modules_to_save": ["embed_tokens"]}, 3),
}
LENGTHS = (1, 17, 70)


def classifier_of(architecture: str, num_labels: int, dtype: torch.dtype = torch.float32) -> Any:
    """A model of transformers with a head, on the weights that turret serves."""
    causal = twin(architecture, dtype).model
    config = copy.deepcopy(causal.config)
    config.num_labels = num_labels
    config.pad_token_id = None
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(num_labels)
        model = AutoModelForSequenceClassification.from_config(config)
    model.model.load_state_dict(causal.model.state_dict())
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, tokens: list[int]) -> torch.Tensor:
    with quiet():
        return model(input_ids=torch.tensor([tokens])).logits[0].double()


def save(architecture: str, root: Path, name: str, seed: int = 1) -> Any:
    """Save an adapter with PEFT; returns its base, on which PEFT can load it."""
    method, keys, num_labels = ADAPTERS[name]
    base = classifier_of(architecture, num_labels)
    config = make_config(method, **{**keys, "task_type": "SEQ_CLS"})
    save_adapter(base, config, root / name, seed=seed)
    return base


def found_logits(answer: Any) -> torch.Tensor:
    return torch.tensor(answer.pooled, dtype=torch.float64)


@pytest.mark.parametrize("architecture", ["llama", pytest.param("qwen3", marks=pytest.mark.long)])
async def test_logits_are_those_of_transformers_and_peft(architecture: str, tmp_path: Path) -> None:
    bases = {name: save(architecture, tmp_path, name, i) for i, name in enumerate(ADAPTERS)}
    folder = twin(architecture).folder
    async with EngineHarness.start(
        folder, tmp_path, adapters=list(ADAPTERS), max_num_batched_tokens=48
    ) as harness:
        for name, base in bases.items():
            oracle = load_adapter(base, tmp_path / name)
            for length in LENGTHS:
                prompt = prompt_of(length, length)
                expected = logits_of(oracle, prompt)
                assert (expected - logits_of(base, prompt)).abs().max() > 0.01
                answer = await harness.run(make_request(prompt, name, pooling=CLASSIFY))
                torch.testing.assert_close(found_logits(answer), expected, rtol=1e-4, atol=1e-4)
                count = ADAPTERS[name][2]
                assert answer.head is not None
                assert answer.head.labels == tuple(f"LABEL_{i}" for i in range(count))
                assert answer.head.problem_type == (SINGLE_LABEL if count > 1 else MULTI_LABEL)


async def test_bfloat16_is_as_exact_as_peft(tmp_path: Path) -> None:
    exact_base = classifier_of("llama", 3, torch.bfloat16)
    for seed, name in enumerate(("lora", "dora")):
        method, keys, _ = ADAPTERS[name]
        config = make_config(method, **{**keys, "task_type": "SEQ_CLS"})
        save_adapter(exact_base, config, tmp_path / name, seed=seed, strength=0.3)
    half = copy.deepcopy(exact_base).to(torch.bfloat16)
    prompts = [prompt_of(length, length) for length in range(60, 200, 5)]
    ours, theirs = [], []
    async with serve(
        twin("llama", torch.bfloat16), tmp_path, dtype="bfloat16", adapters=["lora", "dora"]
    ) as harness:
        for name in ("lora", "dora"):
            exact, peer = (load_adapter(base, tmp_path / name) for base in (exact_base, half))
            requests = [make_request(prompt, name, pooling=CLASSIFY) for prompt in prompts]
            for prompt, answer in zip(prompts, await harness.run_all(requests), strict=True):
                expected = logits_of(exact, prompt)
                ours.append(found_logits(answer) - expected)
                theirs.append(logits_of(peer, prompt) - expected)
    check_within_peer(ours, theirs, "logits")


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
async def test_logits_have_the_bits_that_they_have_alone(dtype: str, tmp_path: Path) -> None:
    for seed, name in enumerate(ADAPTERS):
        save("llama", tmp_path, name, seed)
    method, keys, _ = ADAPTERS["lora"]
    save_adapter(twin("llama").model, make_config(method, **keys), tmp_path / "causal", seed=9)
    requests = []
    for number in range(24):
        name = list(ADAPTERS)[number % len(ADAPTERS)]
        prompt = prompt_of((3, 70, 40)[number % 3], number)
        mix: list[Asked] = [name]
        if number % 8 == 3:
            mix = [("causal", 0.5), (name, 1.0 if name == "prompt" else 2.0)]
        requests.append(make_request(prompt, *mix, pooling=CLASSIFY))
        requests.append(make_request(prompt, "causal", max_tokens=6))
    folder = twin("llama").folder
    options: dict[str, Any] = {"dtype": dtype, "adapters": [*ADAPTERS, "causal"]}
    async with EngineHarness.start(
        folder, tmp_path, max_num_batched_tokens=512, **options
    ) as harness:
        alone = [await harness.run(request) for request in requests]
    assert len({answer.bits for answer in alone}) == len(alone)
    async with EngineHarness.start(
        folder, tmp_path, max_num_batched_tokens=24, max_num_seqs=8, **options
    ) as harness:
        together = await harness.run_all(requests)
    assert [answer.bits for answer in together] == [answer.bits for answer in alone]


async def test_each_kind_of_adapter_takes_its_own_requests(tmp_path: Path) -> None:
    for name in ("lora", "one"):
        save("llama", tmp_path, name)
    method, keys, _ = ADAPTERS["lora"]
    save_adapter(twin("llama").model, make_config(method, **keys), tmp_path / "causal")
    async with serve("llama", tmp_path, adapters=["lora", "one", "causal"]) as harness:
        refused: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
            (("lora",), {}, "ADAPTER_CLASSIFIES"),
            (("lora", "causal"), {"score": True}, "ADAPTER_CLASSIFIES"),
            ((), {"pooling": CLASSIFY}, "HEAD_MISSING"),
            (("causal",), {"pooling": CLASSIFY}, "HEAD_MISSING"),
            (("lora", "one"), {"pooling": CLASSIFY}, "INVALID_REQUEST"),
        ]
        for names, change, reason in refused:
            with pytest.raises(InvalidRequestError) as error:
                await harness.run(make_request([5, 6, 7], *names, **change))
            assert error.value.reason == reason
            assert [path for path, _ in error.value.violations] == ["adapters"]
        assert all(info.in_flight == 0 for info in harness.registry.list())
        vector = await harness.run(make_request([5, 6, 7], "lora", pooling=Pooling()))
        assert vector.head is None
        with pytest.raises(InvalidRequestError, match="classifier"):
            await merged(harness, "lora")


async def merged(harness: EngineHarness, name: str) -> None:
    refs = (AdapterRef(name=name),)
    await asyncio.to_thread(harness.merger.merge, refs, None, Cancellation())


LABELS = {"0": "negative", "1": "neutral", "2": "positive"}


async def load(root: Path) -> Any:
    async with serve("llama", root, adapters=["lora"]) as harness:
        return await harness.run(make_request([5, 6, 7], "lora", pooling=CLASSIFY))


async def test_labels_come_from_the_config(tmp_path: Path) -> None:
    base = save("llama", tmp_path, "lora")
    back = {label: int(index) for index, label in LABELS.items()}
    edit_config(
        tmp_path / "lora", id2label=LABELS, label2id=back, num_labels=3, problem_type=MULTI_LABEL
    )
    head = (await load(tmp_path)).head
    assert head.labels == tuple(LABELS.values())
    assert head.problem_type == MULTI_LABEL
    edit_config(tmp_path / "lora", id2label=None, num_labels=None, problem_type=REGRESSION)
    head = (await load(tmp_path)).head
    assert (head.labels, head.problem_type) == (tuple(LABELS.values()), REGRESSION)
    # PEFT can still read the files.
    assert logits_of(load_adapter(base, tmp_path / "lora"), [5, 6]).shape == (3,)


@pytest.mark.parametrize("form", ["raw", "classifier", "bias"])
async def test_other_spellings_of_the_heads_keys_are_read(form: str, tmp_path: Path) -> None:
    save("llama", tmp_path, "lora")
    plain = await load(tmp_path)
    key = "base_model.model.score.weight"
    assert key in load_file(tmp_path / "lora" / "adapter_model.safetensors")

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weight = tensors.pop(key)
        start = "base_model.model."
        if form == "raw":
            tensors[f"{start}score.original_module.weight"] = torch.zeros_like(weight)
            tensors[f"{start}score.modules_to_save.default.weight"] = weight
        elif form == "classifier":
            tensors[f"{start}classifier.weight"] = weight
        else:
            tensors |= {key: weight, f"{start}score.bias": torch.tensor([1.0, -2.0, 0.5])}
        return tensors

    edit_tensors(tmp_path / "lora", change)
    found = await load(tmp_path)
    shift = torch.tensor([1.0, -2.0, 0.5] if form == "bias" else [0.0] * 3, dtype=torch.float64)
    torch.testing.assert_close(found_logits(found) - found_logits(plain), shift, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "id2label"),
        ({"id2label": {"0": "a", "1": "a", "2": "c"}}, "id2label"),
        ({"id2label": {"0": "a", "1": 7, "2": "c"}}, "id2label"),
        ({"id2label": ["a", "b", "c"]}, "id2label"),
        ({"id2label": LABELS, "label2id": {"a": 0, "b": 1, "c": 2}}, "label2id"),
        ({"label2id": {"a": "0"}}, "label2id"),
        ({"num_labels": 4}, "num_labels"),
        ({"problem_type": "ranking"}, "problem_type"),
        ({"task_type": "CAUSAL_LM"}, "modules_to_save"),
        ({"task_type": "TOKEN_CLS"}, "task_type"),
        ({"modules_to_save": ["score", "norm"]}, "modules_to_save"),
    ],
)
async def test_a_config_that_does_not_fit_is_refused_by_name(
    changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    save("llama", tmp_path, "lora")
    edit_config(tmp_path / "lora", **changes)
    with pytest.raises(AdapterCheckpointError) as error:
        await load(tmp_path)
    assert field in {name for name, _ in error.value.violations}


@pytest.mark.parametrize(
    ("key", "shape", "kind"),
    [
        ("score.weight", None, AdapterCheckpointError),
        ("score.weight", (3, 32), AdapterMismatchError),
        ("score.weight", (3,), AdapterCheckpointError),
        ("score.weight", (0, 64), AdapterCheckpointError),
        ("score.bias", (4,), AdapterCheckpointError),
        ("classifier.weight", (3, 64), AdapterCheckpointError),
        ("score.dense.weight", (64, 64), AdapterCheckpointError),
    ],
)
async def test_a_head_that_does_not_fit_is_refused_by_name(
    key: str, shape: tuple[int, ...] | None, kind: type[Exception], tmp_path: Path
) -> None:
    save("llama", tmp_path, "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert set(config["modules_to_save"]) >= {"score", "classifier"}

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = f"base_model.model.{key}"
        tensors.pop(name, None)
        return tensors if shape is None else {**tensors, name: torch.ones(shape)}

    edit_tensors(tmp_path / "lora", change)
    with pytest.raises(kind):
        await load(tmp_path)
