"""Inconsistent files of single methods; each error names the fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import (
    assert_alike,
    base_of,
    edit_config,
    edit_tensors,
    lower_adapter,
    save_tiny,
    tiny_llama,
)
from said import fields_of, says
from transformers.activations import ACT2FN

from turret.server.adapters.methods import METHODS
from turret.server.adapters.methods.peanut import ACTIVATIONS, activation
from turret.server.errors import AdapterCheckpointError, AdapterMismatchError

Q = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}"
Tensors = dict[str, torch.Tensor]


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: value}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: t for key, t in tensors.items() if not key.endswith(name)}


PROMPT = "base_model.model.model.layers.1.self_attn.adaption_prompt"
GATE = "base_model.model.model.layers.0.self_attn.adaption_gate"
ZEROS = f"{KEY}.glora_A.zeros"
ONES, FROD = torch.ones(64, 31), "base_model.frod"
FROD_V, FROD_Q = f"{FROD}_V.mlp_up_proj", f"{FROD}_V.self_attn_q_proj"
FROD_PLACES, FROD_SIZE = f"{FROD}_s_indices.mlp_up_proj", f"{FROD}_s_size.mlp_up_proj"
RANDLORA_B, UNILORA_A = "base_model.randlora_B", f"{KEY}.unilora_indices_A"
SHIRA, SUPERTUNING = f"{KEY}.shira_indices", f"{KEY}.supertuning_indices"
TOPK, SAVED = {"save_only_topk_weights": True, "topk": 3}, {"save_indices": True}
ON_Q, ON_TWO = {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "up_proj"]}
SMALLEST = {"boft_block_size": 1, "boft_n_butterfly_factor": 2}
OF_WEIGHTS = {"target_modules": [], "target_parameters": ["q_proj.weight"]}
PARAMETERS, MODULES = "target_parameters", "target_modules"
WHOLE = {
    f"{KEY}.osf_svd_params.{name}": torch.ones(64, *more)
    for name, more in {"U_low": [64], "V_low": [64], "S_low": []}.items()
}
HEAD, EMBEDDING = "base_model.model.lm_head", "base_model.model.model.embed_tokens.lora_embedding"
INDICES, NORM_BIAS = f"{KEY}.vblora_logits_A_topk_indices", "base_model.model.model.norm.bias"
OF_Q = {"rank_pattern": {r".*q_proj\.weight": 5}}


def picks(index: int) -> torch.Tensor:
    """Indices of VB-LoRA's vectors, all equal."""
    return torch.full((3, 4, 3), index, dtype=torch.uint8)


# A method's config, an edit of the tensors or changes of the config, and the reported field.
BROKEN: dict[str, dict[str, tuple[dict[str, Any], Any, str]]] = {
    "vblora": {
        "index past the bank": (TOPK, put(INDICES, picks(16)), "topk_indices"),
        "a vector twice": (TOPK, put(INDICES, picks(0)), "topk_indices"),
        "indices that are no integers": (TOPK, put(INDICES, torch.zeros(3, 4, 3)), "topk_indices"),
        "more than there are": ({}, {"topk": 17}, "topk"),
        "another bank": ({}, {"num_vectors": 17}, "vblora"),
    },
    "unilora": {
        "index past the values": (SAVED, put(UNILORA_A, torch.full((3, 64), 64)), UNILORA_A[17:]),
        "another length": ({}, {"theta_d_length": 65}, "unilora_theta_d"),
        "nothing chosen": ({}, {"target_modules": ["nowhere"]}, "target_modules"),
        "indices that are announced": (ON_Q, SAVED, "unilora_indices_A"),
    },
    "tinylora": {
        "other groups": ({}, {"weight_tying": 0.5}, "tinylora_v"),
        "matrices that are to be drawn": ({}, {"save_projection": False}, "tinylora_P"),
        "share": ({}, {"weight_tying": 1.5}, "weight_tying"),
    },
    "miss": {
        "a bat's blocks": ({"init_weights": "bat"}, {"r": 16}, "miss_block"),
        "no bat": ({}, {"init_weights": "bat"}, "miss_block"),
        "a start that is none": ({}, {"init_weights": "rat"}, "init_weights"),
        "another start": ({}, {"init_weights": "mini", "mini_r": 4}, "miss_block"),
    },
    "fourierft": {
        "nothing": ({}, put(f"{KEY}.fourierft_spectrum", torch.zeros(0)), "fourierft_spectrum"),
        "no seed": ({}, {"random_loc_seed": ...}, "random_loc_seed"),
    },
    "randlora": {
        "another rank": ({}, {"r": 9}, "randlora_lambda"),
        "bases larger than any weight": ({"r": 513, **ON_TWO}, {}, "r"),
        "a basis of its own": ({}, put(f"{KEY}.randlora_A", torch.zeros(8, 1, 128)), "randlora_A"),
        "another basis": ({}, put(RANDLORA_B, torch.zeros(128, 16, 9)), RANDLORA_B),
        "bases that are to be drawn": ({}, {"save_projection": False}, "base_model.randlora_A"),
    },
    "osf": {"other vectors": ({}, put(f"{KEY}.osf_svd_params.U_low", ONES), "U_low")},
    "frod": {
        "V of the base": ({}, {"save_projection": False}, "save_projection"),
        "another kind's V": ({}, put(FROD_Q, torch.eye(64)), FROD_Q),
        "a V less": ({}, without(FROD_V), FROD_V),
        "a V that is none": ({}, put(FROD_V, torch.zeros(64, 64)), FROD_V),
        "places outside": ({}, put(FROD_PLACES, torch.full((2, 40), 64)), "frod_s_indices"),
        "places that are none": ({}, put(FROD_PLACES, torch.zeros(2, 40)), "frod_s_indices"),
        "a size of many": ({}, put(FROD_SIZE, torch.full((3,), 64)), "frod_s_size"),
        "noise": ({"target_modules": ["k_proj"]}, {}, "base_model.frod_V"),
    },
    "pvera": {"sampled": ({}, {"sample_at_inference": True}, "sample_at_inference")},
    "gralora": {
        "blocks": ({}, {"gralora_k": 3}, "r"),
        "whole part": ({}, {"hybrid_r": 0}, "gralora_A_general.weight"),
    },
    "hra": {"no direction": ({}, put(f"{KEY}.hra_u", torch.zeros(64, 4)), "hra_u")},
    "deft": {"nothing to fill": ({}, {"para": True}, "deft_R")},
    "peanut": {
        "activation": ({}, {"act_fn": "hardtanh"}, "act_fn"),
        "depth": ({}, {"depth": 0}, "peanut_encoders.0.weight"),
    },
    "glora": {
        "another rank": ({"config_A_B": "lora"}, {"r": 5}, "glora_A.Xd"),
        "another path": ({"config_A_B": "lora"}, {"config_A_B": "vector"}, "glora_A.X"),
        "zeros": ({"config_A_B": "none"}, put(ZEROS, torch.ones(64, 64)), "glora_A.zeros"),
        "biases": ({}, {"bias": "all"}, "bias"),
    },
    "oft": {
        "another size": ({}, {"oft_block_size": 16}, "oft_R.weight"),
        "both sizes": ({}, {"r": 8}, "oft_block_size"),
        "shared": ({"block_share": True}, {"block_share": False}, "oft_R.weight"),
        "no terms": ({}, {"num_cayley_neumann_terms": ...}, "num_cayley_neumann_terms"),
        "endless terms": ({}, {"num_cayley_neumann_terms": 1 << 31}, "num_cayley_neumann_terms"),
        "nothing to project by": ({"coft": True}, {"eps": ...}, "eps"),
        "a gain alone": ({}, put(f"{KEY}.oft_s", torch.ones(64, 1)), "oft_r"),
        "before 0.14": ({}, {"oft_block_size": ...}, "oft_block_size"),
    },
    "boft": {
        "another size": ({}, {"boft_block_size": 8}, "boft_R"),
        "both sizes": ({}, {"boft_block_num": 8}, "boft_block_size"),
        "factors": ({}, put(f"{KEY}.boft_R", torch.zeros(2, 16, 4, 4)), "boft_R"),
        "odd halves": (SMALLEST, put(f"{KEY}.boft_R", torch.zeros(2, 64, 1, 1)), "boft_R"),
    },
    "road": {
        "another variant": ({}, {"variant": "road_2"}, "road_theta"),
        "a variant that is none": ({}, {"variant": "road_3"}, "variant"),
        "odd groups": ({}, {"group_size": 7}, "group_size"),
        "no angles": ({}, without(f"{KEY}.road_theta"), "road_theta"),
    },
    "c3a": {
        "another size": ({}, {"block_size": 8}, "c3a_kernel"),
        "not a kernel": ({}, put(f"{KEY}.c3a_kernel", torch.zeros(4, 16)), "c3a_kernel"),
    },
    "hira": {
        "another rank": ({}, {"r": 5}, "hira_A"),
        "another rank of a module": ({}, {"r": 5, "rank_pattern": {"q_proj": 3}}, "hira_A"),
        "half": ({}, without(f"{KEY}.hira_B"), "hira_B"),
    },
    "ln_tuning": {
        "norms of heads": ({}, {"target_modules": ["q_proj"]}, "target_modules"),
        "left out": ({}, {"target_modules": ["norm"]}, "input_layernorm"),
    },
    "shira": {
        "place past the inputs": ({}, put(SHIRA, torch.full((2, 3 * 128), 64)), "shira_indices"),
        "places between": ({}, put(SHIRA, torch.full((2, 3 * 128), 0.5)), "shira_indices"),
    },
    "supertuning": {
        "places to be found": ({}, {"save_precomputed_indices": False}, "save_precomputed_indices"),
        "fewer places": ({}, put(SUPERTUNING, torch.zeros(3).int()), "supertuning_indices"),
        "factors that are announced": ({}, {"r": 2}, "supertuning_lora_A.weight"),
    },
    "waveft": {
        "wavelet": ({}, {"wavelet_family": "coif5"}, "wavelet_family"),
        "seed": ({}, {"random_loc_seed": 1.5}, "random_loc_seed"),
    },
    "adaption_prompt": {
        "no length": ({}, {"adapter_len": ...}, "adapter_len"),
        "another length": ({}, {"adapter_len": 6}, PROMPT[17:]),
        "no layers": ({}, {"adapter_layers": 0}, "adapter_layers"),
        "another module": ({}, {"target_modules": "mlp"}, "target_modules"),
        "an unknown key": ({}, {"adapter_gate": 1}, "adapter_gate"),
        "no gate": ({}, without(GATE), GATE[17:]),
        "no prompt": ({}, without(PROMPT), PROMPT[17:]),
        "a wide gate": ({}, put(GATE, torch.ones(2)), GATE[17:]),
        "another tensor": ({}, put(f"{GATE}_bias", torch.ones(1)), "adaption_gate_bias"),
        "another place": ({}, put(GATE.replace("s.0", "s.01"), torch.ones(1)), "layers.01"),
    },
    # Parts that would act before the invocation.
    "alora": {
        "no invocation": ({}, {"alora_invocation_tokens": []}, "alora_invocation_tokens"),
        "a negative token": ({}, {"alora_invocation_tokens": [-1]}, "alora_invocation_tokens"),
        "a fraction": ({}, {"alora_invocation_tokens": [1.0]}, "alora_invocation_tokens"),
        "a truth value": ({}, {"alora_invocation_tokens": [True]}, "alora_invocation_tokens"),
        "biases": ({}, {"bias": "all"}, "bias"),
        "a saved head": ({}, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        "rows": ({}, {"trainable_token_indices": [3]}, "trainable_token_indices"),
        "velora": ({}, {"velora_config": {"scale": 1.0}}, "alora_invocation_tokens"),
        "dora": ({}, {"use_dora": True}, "alora_invocation_tokens"),
        "parameters": ({}, {"target_parameters": ["q_proj.weight"]}, "alora_invocation_tokens"),
    },
    "lora": {
        "only A": ({}, without(f"{KEY}.lora_B.weight"), f"{Q}.lora_B.weight"),
        "only B": ({}, without(f"{KEY}.lora_A.weight"), f"{Q}.lora_A.weight"),
        "a module missing": ({}, lambda t: {n: x for n, x in t.items() if KEY not in n}, Q),
        "a magnitude": ({}, put(f"{KEY}.lora_magnitude_vector", torch.ones(64)), "magnitude"),
        "a bias": ({}, put(f"{KEY}.lora_B.bias", torch.ones(64)), f"{Q}.lora_B.bias"),
        "an embedding": ({}, put(f"{EMBEDDING}_A", torch.ones(4, 97)), "lora_embedding_A"),
        "a head": ({}, put(f"{HEAD}.lora_A.weight", torch.ones(4, 64)), "lm_head.lora_A.weight"),
        "a whole head": ({}, put(f"{HEAD}.weight", torch.ones(97, 64)), "lm_head.weight"),
        "a base weight": ({}, put(f"{KEY}.base_layer.weight", torch.ones(64, 64)), "base_layer"),
        "a norm's bias": ({}, put(NORM_BIAS, torch.ones(64)), "model.norm.bias"),
        "an unknown tensor": ({}, put(f"{KEY}.lora_C.weight", torch.ones(4)), f"{Q}.lora_C.weight"),
        "three dimensions": ({}, put(f"{KEY}.lora_A.weight", torch.ones(4, 8, 8)), f"{Q}.lora_A"),
        "a rank": ({}, put(f"{KEY}.lora_A.weight", torch.ones(5, 64)), f"{Q}.lora_A.weight"),
        "an alpha": ({}, put(f"{KEY}.alpha", torch.ones(1)), f"{Q}.alpha"),
        "parameters of experts": (OF_WEIGHTS, {"target_parameters": ["experts.up"]}, PARAMETERS),
        "a bias as parameter": (OF_WEIGHTS, {"target_parameters": ["q_proj.bias"]}, PARAMETERS),
        "a module and its parameter": (OF_WEIGHTS, {"target_modules": ["q_proj"]}, MODULES),
        "a pattern and its parameter": (OF_WEIGHTS, {"target_modules": r".*\.q_proj"}, MODULES),
        # PEFT matches the pattern with the parameter's name.
        "a parameter's rank": (OF_WEIGHTS, OF_Q, f"{Q}.lora_A"),
        "an excluded parameter": (OF_WEIGHTS, {"exclude_modules": ["q_proj"]}, "exclude_modules"),
        "biases alongside a parameter": (OF_WEIGHTS, {"bias": "lora_only"}, "bias"),
        "no parameters": (OF_WEIGHTS, {"target_parameters": []}, MODULES),
        "integers": ({}, put(f"{KEY}.lora_A.weight", torch.ones(4, 64).int()), "lora_A"),
    },
}


# The same for files that do not fit the base.
UNFIT: dict[str, dict[str, tuple[dict[str, Any], Any, str]]] = {
    "adaption_prompt": {
        "fewer layers": ({}, {"adapter_layers": 1}, "model.layers.0.self_attn"),
        "more layers than there are": ({}, {"adapter_layers": 3}, "adapter_layers"),
        "another width": ({}, put(PROMPT, torch.ones(1, 5, 32)), PROMPT[17:]),
        "a layer past the last": ({}, put(GATE.replace("0", "7"), torch.ones(1)), "model.layers.7"),
    },
    "vblora": {"vectors": ({"vector_length": 8}, {"vector_length": 48, "r": 128}, "q_proj")},
    "gralora": {"blocks": ({"gralora_k": 4}, {"gralora_k": 128, "r": 128}, "q_proj")},
    "osf": {"a whole weight": ({}, lambda tensors: {**tensors, **WHOLE}, "osf_svd_params")},
    "frod": {"another width": ({}, put(FROD_V, torch.eye(63)), FROD_V)},
}
CASES = [
    pytest.param(kind, method, *case, id=f"{method}: {name}")
    for table, kind in ((BROKEN, AdapterCheckpointError), (UNFIT, AdapterMismatchError))
    for method, cases in table.items()
    for name, case in cases.items()
]


@pytest.mark.parametrize(("kind", "method", "changes", "edit", "named"), CASES)
def test_an_error_names_the_inconsistent_field(
    kind: Any, method: str, changes: dict[str, Any], edit: Any, named: str, tmp_path: Path
) -> None:
    directory = save_tiny(tmp_path, method, **changes)
    if edit:
        lower_adapter(tmp_path, base_of(tiny_llama()))
    if isinstance(edit, dict):
        edit_config(directory, **edit)
    else:
        edit_tensors(directory, edit)
    with pytest.raises(kind) as caught:
        lower_adapter(tmp_path, base_of(tiny_llama()))
    fields = fields_of(caught.value)
    assert any(named in field for field in fields), fields


def test_a_norm_of_zeros_has_no_gain(tmp_path: Path) -> None:
    save_tiny(tmp_path, "ln_tuning")
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = 0.0
    with pytest.raises(AdapterMismatchError, check=says("ZERO_BASE_WEIGHT")):
        lower_adapter(tmp_path, base_of(model))


def test_an_old_bone_adapter_loads_as_miss(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "miss", r=6)
    base = base_of(tiny_llama())
    before = lower_adapter(tmp_path, base)
    edit_config(directory, peft_type="BONE", mini_r=..., miss_dropout=...)
    edit_tensors(
        directory, lambda t: {n.replace("miss_block", "bone_block"): x for n, x in t.items()}
    )
    assert_alike(lower_adapter(tmp_path, base), before)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_match_transformers(name: str) -> None:
    x = torch.linspace(-8, 8, 97)
    torch.testing.assert_close(activation(name)(x), ACT2FN[name](x))


def test_nearly_equal_reflections_lose_nothing_to_rounding(tmp_path: Path) -> None:
    """Training starts from pairs of equal reflections, which cancel out."""
    model = tiny_llama(dtype=torch.float64)
    directory = save_tiny(tmp_path, "hra", r=4, target_modules=["q_proj"])

    def pair(tensors: Tensors) -> Tensors:
        generator = torch.Generator().manual_seed(1)
        for tensor in tensors.values():
            noise = torch.randn(64, 2, generator=generator)
            tensor[:, 1::2] = tensor[:, ::2] + 0.003 * noise
        return tensors

    edit_tensors(directory, pair)
    exact = lower_adapter(tmp_path, base_of(model)).operators.modules[Q].low_rank
    rounded = lower_adapter(tmp_path, base_of(model, dtype=torch.bfloat16)).operators.modules[Q]
    assert exact is not None
    assert rounded.low_rank is not None
    change = exact.b.T @ exact.a
    error = rounded.low_rank.b.double().T @ rounded.low_rank.a.double() - change
    assert error.norm() < 0.005 * change.norm()


def test_only_index_tensors_may_be_integers() -> None:
    with_integers = {name for name, method in METHODS.items() if method.integers}
    assert with_integers == {"vblora", "unilora", "shira", "supertuning", "frod"}
