"""Adapters that change the embedding or the head, compared with PEFT, alone and in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import edit_config, edit_tensors
from builders.methods import make_config, save_adapter
from method_oracle import check_methods, check_mixes, prompt_of, serve, twin
from said import fields_of, says
from servers.engine_harness import EngineHarness, make_request

from turret.server.adapters.adapter import Source
from turret.server.adapters.loader import AdapterLoader
from turret.server.errors import AdapterCheckpointError, BudgetExceededError
from turret.server.models.describe import describe_base
from turret.server.models.loader import load_decoder
from turret.server.models.model_source import resolve_model

Q = {"target_modules": ["q_proj"]}
SOME = list(range(60, 140))
ALIKE: dict[str, Any] = {"lm_head": [3, 70, 9], "embed_tokens": [3, 70, 9]}
APART: dict[str, Any] = {"lm_head": [3, 70, 9], "embed_tokens": [101, *range(40, 80)]}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("lora", {**Q, "modules_to_save": ["embed_tokens"]}),
    "head": ("loha", {**Q, "modules_to_save": ["lm_head"]}),
    "both": ("dora", {**Q, "modules_to_save": ["lm_head", "model.embed_tokens"]}),
    "both-tied": ("lora", {**Q, "modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    "tokens": ("lora", {**Q, "trainable_token_indices": SOME}),
    "tokens-head": ("rslora", {**Q, "trainable_token_indices": {"lm_head": SOME}}),
    "tokens-alike": ("adalora", {**Q, "trainable_token_indices": ALIKE}),
    "tokens-apart": ("lora", {**Q, "trainable_token_indices": APART}),
    "tokens-only": ("trainable_tokens", {"token_indices": SOME[::-1]}),
    "lora-embedding": ("lora", {"target_modules": ["embed_tokens"]}),
    "lora-head": ("rslora", {"target_modules": ["q_proj", "lm_head"]}),
    "lora-both": ("lora", {"target_modules": r".*(v_proj|embed_tokens|lm_head)"}),
    "lora-tied": (
        "lora",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "dora-both": ("dora", {"target_modules": ["k_proj", "embed_tokens", "lm_head"]}),
    "loha-head": ("loha", {"target_modules": ["q_proj", "lm_head"]}),
    "lokr-head": ("lokr", {"target_modules": ["q_proj", "lm_head"]}),
    "ia3-head": (
        "ia3",
        {"target_modules": ["q_proj", "lm_head"], "feedforward_modules": ["lm_head"]},
    ),
    "ia3-logits": ("ia3", {"target_modules": ["lm_head"], "feedforward_modules": []}),
    "vera-head": ("vera", {"target_modules": ["q_proj", "lm_head"]}),
    "prompt-head": ("prompt_tuning", {"modules_to_save": ["lm_head"]}),
    "prefix-both": ("prefix_tuning", {"modules_to_save": ["lm_head", "embed_tokens"]}),
}
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "prefix": ("prefix_tuning", {"num_virtual_tokens": 7}),
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
async def test_scores_and_answers_match_peft(architecture: str, tmp_path: Path) -> None:
    """Llama has separate matrices for embedding and head; in qwen2 they are tied."""
    await check_methods(architecture, tmp_path, VARIANTS)


def save_all(architecture: str, root: Path) -> None:
    for seed, (name, (method, keys)) in enumerate({**VARIANTS, **PLAIN}.items()):
        save_adapter(twin(architecture).model, make_config(method, **keys), root / name, seed=seed)


MIXES: list[list[tuple[str, float]]] = [
    [("embedding", 0.5), ("tokens", -0.75), ("lora-embedding", 1.5)],
    [("head", 0.25), ("lora-head", 1.0), ("lokr-head", -0.5)],
    [("lora", 1.0), ("both", 0.5), ("dora-both", 0.5)],
    [("tokens-apart", -1.0), ("tokens-only", 1.0), ("ia3-head", 0.5)],
    [("both", 0.0), ("lora", 0.0)],
    [("prefix", 1.0), ("tokens", 0.5)],
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_each_request_gets_the_bits_it_gets_alone(dtype: str, tmp_path: Path) -> None:
    save_all("qwen2", tmp_path)
    names = [*VARIANTS, *PLAIN]
    mixes = [[(name, 1.0)] for name in names] + MIXES + [[], []]
    requests = []
    for number, mix in enumerate(mixes):
        prompt = prompt_of((3, 70, 11, 29)[number % 4], number)
        requests.append(make_request(prompt, *mix, max_tokens=4, score=number % 5 == 0))
    base = [number for number, mix in enumerate(mixes) if not mix]
    zero = next(number for number, mix in enumerate(mixes) if mix and mix[0][1] == 0.0)
    folder = twin("qwen2").folder
    async with EngineHarness.start(folder, dtype=dtype) as harness:
        untouched = [await harness.run(requests[number]) for number in base]
        plain = await harness.run(make_request(requests[zero].prompt_token_ids, max_tokens=4))
    async with EngineHarness.start(folder, tmp_path, dtype=dtype, adapters=names) as harness:
        together = await harness.run_together_and_alone(requests)
        # The reversed order shows differences that the prefix cache would hide.
        backwards = await harness.run_all(requests[::-1])
    assert [a.bits for a in backwards[::-1]] == [a.bits for a in together]
    assert [together[number].bits for number in base] == [answer.bits for answer in untouched]
    assert together[zero].bits == plain.bits
    assert len({answer.bits for answer in together}) > len(requests) - 4


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
async def test_mixes_sum_what_peft_changes(architecture: str, tmp_path: Path) -> None:
    save_all(architecture, tmp_path)
    mixes = [mix for mix in MIXES if mix[0][0] != "prefix"]
    async with serve(architecture, tmp_path, adapters=[*VARIANTS, *PLAIN]) as harness:
        await check_mixes(harness, twin(architecture).model, tmp_path, mixes)


def load(root: Path, name: str = "a", **limits: Any) -> Any:
    """Loads an adapter on the llama twin, without an engine."""
    folder = twin("llama").folder
    source = resolve_model(folder, folder.parent / "cache" / "turret")
    decoder = load_decoder(source, dtype=torch.float32, device=torch.device("cpu"))
    settings = {"host_bytes": 1 << 24, "max_rank": 64, "find_source": None, **limits}
    loader = AdapterLoader(root, describe_base(decoder, source), **settings)
    return loader.lower(loader.read(Source(name, is_upload=False)))


def save(root: Path, method: str, **keys: Any) -> Path:
    save_adapter(twin("llama").model, make_config(method, **keys), root / "a")
    return root / "a"


EMBEDDING = "base_model.model.model.embed_tokens"


def edited(name: str, edit: Any) -> Any:
    return lambda tensors: {**tensors, name: edit(tensors[name]).contiguous()}


def test_only_rows_that_differ_are_kept(tmp_path: Path) -> None:
    directory = save(tmp_path, "lora", modules_to_save=["embed_tokens", "lm_head"], **Q)
    embedding = twin("llama").model.get_input_embeddings().weight.detach()
    changed = embedding.clone()
    changed[[4, 200]] += 0.5
    edit_tensors(directory, lambda tensors: {**tensors, f"{EMBEDDING}.weight": changed})
    tokens = load(tmp_path).operators.tokens
    assert tokens.embedding.ids.tolist() == [4, 200]
    assert torch.equal(tokens.embedding.values, changed[[4, 200]])
    assert tokens.head.ids is None
    assert tokens.head.values.shape == (258, 128)
    head = "base_model.model.lm_head.weight"
    plain = twin("llama").model.lm_head.weight.detach().clone()
    edit_tensors(
        directory, lambda tensors: {**tensors, f"{EMBEDDING}.weight": embedding, head: plain}
    )
    assert load(tmp_path).operators.tokens is None


@pytest.mark.parametrize(
    ("keys", "config", "names"),
    [
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save": None}, ["lm_head.weight"]),
        ({}, {"modules_to_save": ["lm_head"]}, ["lm_head.weight"]),
        (
            {"trainable_token_indices": [1, 2]},
            {"trainable_token_indices": None},
            ["model.embed_tokens.token_adapter.trainable_tokens_delta"],
        ),
        (
            {"trainable_token_indices": [1, 2]},
            {"trainable_token_indices": {"lm_head": [1, 2]}},
            ["model.embed_tokens.token_adapter.trainable_tokens_delta", "lm_head.token_adapter"],
        ),
        ({"trainable_token_indices": [1]}, {"trainable_token_indices": [1, 1]}, ["trainable"]),
        ({}, {"target_modules": ["q_proj", "embed_tokens"]}, ["embed_tokens.lora_embedding_A"]),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            {"target_modules": ["q_proj"]},
            ["model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B"],
        ),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            {"use_dora": True},
            ["embed_tokens.lora_magnitude_vector", "q_proj.lora_magnitude_vector"],
        ),
        ({}, {"modules_to_save": ["norm"], "a_new_key": 1}, ["modules_to_save", "a_new_key"]),
    ],
)
def test_config_and_tensors_must_agree(
    keys: dict[str, Any], config: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    edit_config(save(tmp_path, "lora", **{**Q, **keys}), **config)
    with pytest.raises(AdapterCheckpointError) as caught:
        load(tmp_path)
    fields = fields_of(caught.value)
    assert all(any(name in field for field in fields) for name in names), fields


def test_a_saved_base_matrix_must_equal_that_of_the_base(tmp_path: Path) -> None:
    directory = save(tmp_path, "lora", target_modules=["embed_tokens"])
    assert load(tmp_path).facts.target_modules == ("embed_tokens",)
    edit_tensors(directory, edited(f"{EMBEDDING}.base_layer.weight", lambda m: m + 1e-3))
    with pytest.raises(AdapterCheckpointError, check=says("CHANGED_BASE_WEIGHT")):
        load(tmp_path)


def test_budgets_count_the_vocabulary(tmp_path: Path) -> None:
    save(tmp_path, "lora", modules_to_save=["lm_head"], **Q)
    loaded = load(tmp_path)
    matrix = 258 * 128 * 4
    assert matrix < loaded.facts.bytes_host < 1.2 * matrix
    assert loaded.facts.target_modules == ("lm_head", "q_proj")
    with pytest.raises(BudgetExceededError, check=says("OVER_HOST_MEMORY")):
        load(tmp_path, host_bytes=loaded.facts.bytes_host - 1)
    save(tmp_path, "lora", target_modules=["embed_tokens"], r=6)
    assert load(tmp_path).facts.ranks == (6,)
    with pytest.raises(BudgetExceededError, check=says("RANK_OVER_LIMIT", rank=6, max_rank=5)):
        load(tmp_path, max_rank=5)
