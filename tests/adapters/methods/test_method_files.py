"""Inconsistent files of single methods; each error names the fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import (
    base_of,
    edit_config,
    edit_tensors,
    lower_adapter,
    refusal_of,
    tiny_llama,
)
from builders.methods import make_config, save_adapter
from said import says
from transformers.activations import ACT2FN

from turret.server.adapters.methods import METHODS
from turret.server.adapters.methods.transforms.peanut import ACTIVATIONS, activation
from turret.server.errors import AdapterMismatchError

Q = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}"
Tensors = dict[str, torch.Tensor]


def save(root: Path, method: str, **changes: Any) -> Path:
    save_adapter(tiny_llama(), make_config(method, **changes), root / "a")
    return root / "a"


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: value}


ONES, FROD_V = torch.ones(64, 31), "base_model.frod_V.mlp_up_proj"
TOPK = {"save_only_topk_weights": True, "topk": 3}
INDICES = f"{KEY}.vblora_logits_A_topk_indices"
# A method, its config, an edit of the tensors or changes of the config, and the reported field.
BROKEN: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "vblora: index past the bank": (
        "vblora",
        TOPK,
        put(INDICES, torch.full((3, 4, 3), 16, dtype=torch.uint8)),
        "topk_indices",
    ),
    "vblora: a vector twice": (
        "vblora",
        TOPK,
        put(INDICES, torch.zeros(3, 4, 3, dtype=torch.uint8)),
        "topk_indices",
    ),
    "vblora: indices that are no integers": (
        "vblora",
        TOPK,
        put(INDICES, torch.zeros(3, 4, 3)),
        "topk_indices",
    ),
    "vblora: more than there are": ("vblora", {}, {"topk": 17}, "topk"),
    "vblora: another bank": ("vblora", {}, {"num_vectors": 17}, "vblora"),
    "unilora: index past the values": (
        "unilora",
        {"save_indices": True},
        put(f"{KEY}.unilora_indices_A", torch.full((3, 64), 64)),
        "unilora_indices_A",
    ),
    "unilora: another length": ("unilora", {}, {"theta_d_length": 65}, "unilora_theta_d"),
    "unilora: nothing chosen": ("unilora", {}, {"target_modules": ["nowhere"]}, "target_modules"),
    "unilora: indices that are announced": (
        "unilora",
        {"target_modules": ["q_proj"]},
        {"save_indices": True},
        "unilora_indices_A",
    ),
    "tinylora: other groups": ("tinylora", {}, {"weight_tying": 0.5}, "tinylora_v"),
    "tinylora: matrices that are to be drawn": (
        "tinylora",
        {},
        {"save_projection": False},
        "tinylora_P",
    ),
    "tinylora: share": ("tinylora", {}, {"weight_tying": 1.5}, "weight_tying"),
    "miss: a bat's blocks": ("miss", {"init_weights": "bat"}, {"r": 16}, "miss_block"),
    "miss: no bat": ("miss", {}, {"init_weights": "bat"}, "miss_block"),
    "miss: a start that is none": ("miss", {}, {"init_weights": "rat"}, "init_weights"),
    "fourierft: nothing": (
        "fourierft",
        {},
        put(f"{KEY}.fourierft_spectrum", torch.zeros(0)),
        "fourierft_spectrum",
    ),
    "fourierft: no seed": ("fourierft", {}, {"random_loc_seed": ...}, "random_loc_seed"),
    "randlora: another rank": ("randlora", {}, {"r": 9}, "randlora_lambda"),
    "randlora: bases larger than any weight": (
        "randlora",
        {"r": 513, "target_modules": ["q_proj", "up_proj"]},
        {},
        "r",
    ),
    "randlora: a basis of its own": (
        "randlora",
        {},
        put(f"{KEY}.randlora_A", torch.zeros(8, 1, 128)),
        "randlora_A",
    ),
    "randlora: another basis": (
        "randlora",
        {},
        put("base_model.randlora_B", torch.zeros(128, 16, 9)),
        "base_model.randlora_B",
    ),
    "randlora: bases that are to be drawn": (
        "randlora",
        {},
        {"save_projection": False},
        "base_model.randlora_A",
    ),
    "osf: other vectors": ("osf", {}, put(f"{KEY}.osf_svd_params.U_low", ONES), "U_low"),
    "frod: V of the base": ("frod", {}, {"save_projection": False}, "save_projection"),
    "frod: another kind's V": (
        "frod",
        {},
        put("base_model.frod_V.self_attn_q_proj", torch.eye(64)),
        "base_model.frod_V.self_attn_q_proj",
    ),
    "frod: a V less": (
        "frod",
        {},
        lambda tensors: {n: t for n, t in tensors.items() if n != FROD_V},
        FROD_V,
    ),
    "frod: a V that is none": ("frod", {}, put(FROD_V, torch.zeros(64, 64)), FROD_V),
    "frod: places outside": (
        "frod",
        {},
        put("base_model.frod_s_indices.mlp_up_proj", torch.full((2, 40), 64)),
        "frod_s_indices",
    ),
    "frod: places that are none": (
        "frod",
        {},
        put("base_model.frod_s_indices.mlp_up_proj", torch.zeros(2, 40)),
        "frod_s_indices",
    ),
    "frod: a size of many": (
        "frod",
        {},
        put("base_model.frod_s_size.mlp_up_proj", torch.full((3,), 64)),
        "frod_s_size",
    ),
    "frod: noise": ("frod", {"target_modules": ["k_proj"]}, {}, "base_model.frod_V"),
    "miss: another start": ("miss", {}, {"init_weights": "mini", "mini_r": 4}, "miss_block"),
    "pvera: sampled": ("pvera", {}, {"sample_at_inference": True}, "sample_at_inference"),
    "gralora: blocks": ("gralora", {}, {"gralora_k": 3}, "r"),
    "gralora: whole part": ("gralora", {}, {"hybrid_r": 0}, "gralora_A_general.weight"),
    "hra: no direction": ("hra", {}, put(f"{KEY}.hra_u", torch.zeros(64, 4)), "hra_u"),
    "deft: nothing to fill": ("deft", {}, {"para": True}, "deft_R"),
    "peanut: activation": ("peanut", {}, {"act_fn": "hardtanh"}, "act_fn"),
    "peanut: depth": ("peanut", {}, {"depth": 0}, "peanut_encoders.0.weight"),
    "glora: another rank": ("glora", {"config_A_B": "lora"}, {"r": 5}, "glora_A.Xd"),
    "glora: another path": ("glora", {"config_A_B": "lora"}, {"config_A_B": "vector"}, "glora_A.X"),
    "oft: another size": ("oft", {}, {"oft_block_size": 16}, "oft_R.weight"),
    "oft: both sizes": ("oft", {}, {"r": 8}, "oft_block_size"),
    "oft: shared": ("oft", {"block_share": True}, {"block_share": False}, "oft_R.weight"),
    "oft: no terms": ("oft", {}, {"num_cayley_neumann_terms": ...}, "num_cayley_neumann_terms"),
    "oft: nothing to project by": ("oft", {"coft": True}, {"eps": ...}, "eps"),
    "oft: a gain alone": ("oft", {}, put(f"{KEY}.oft_s", torch.ones(64, 1)), "oft_r"),
    "oft: before 0.14": ("oft", {}, {"oft_block_size": ...}, "oft_block_size"),
    "boft: another size": ("boft", {}, {"boft_block_size": 8}, "boft_R"),
    "boft: both sizes": ("boft", {}, {"boft_block_num": 8}, "boft_block_size"),
    "boft: factors": ("boft", {}, put(f"{KEY}.boft_R", torch.zeros(2, 16, 4, 4)), "boft_R"),
    "boft: odd halves": (
        "boft",
        {"boft_block_size": 1, "boft_n_butterfly_factor": 2},
        put(f"{KEY}.boft_R", torch.zeros(2, 64, 1, 1)),
        "boft_R",
    ),
    "road: another variant": ("road", {}, {"variant": "road_2"}, "road_theta"),
    "road: a variant that is none": ("road", {}, {"variant": "road_3"}, "variant"),
    "road: odd groups": ("road", {}, {"group_size": 7}, "group_size"),
    "road: no angles": (
        "road",
        {},
        lambda tensors: {n: t for n, t in tensors.items() if n != f"{KEY}.road_theta"},
        "road_theta",
    ),
    "c3a: another size": ("c3a", {}, {"block_size": 8}, "c3a_kernel"),
    "c3a: not a kernel": ("c3a", {}, put(f"{KEY}.c3a_kernel", torch.zeros(4, 16)), "c3a_kernel"),
    "hira: another rank": ("hira", {}, {"r": 5}, "hira_A"),
    "hira: another rank of a module": (
        "hira",
        {},
        {"r": 5, "rank_pattern": {"q_proj": 3}},
        "hira_A",
    ),
    "hira: half": (
        "hira",
        {},
        lambda tensors: {n: t for n, t in tensors.items() if n != f"{KEY}.hira_B"},
        "hira_B",
    ),
    "glora: zeros": (
        "glora",
        {"config_A_B": "none"},
        put(f"{KEY}.glora_A.zeros", torch.ones(64, 64)),
        "glora_A.zeros",
    ),
    "glora: biases": ("glora", {}, {"bias": "all"}, "bias"),
    "ln_tuning: norms of heads": (
        "ln_tuning",
        {},
        {"target_modules": ["q_proj"]},
        "target_modules",
    ),
    "ln_tuning: left out": ("ln_tuning", {}, {"target_modules": ["norm"]}, "input_layernorm"),
    "shira: place past the inputs": (
        "shira",
        {},
        put(f"{KEY}.shira_indices", torch.full((2, 3 * 128), 64)),
        "shira_indices",
    ),
    "shira: places between": (
        "shira",
        {},
        put(f"{KEY}.shira_indices", torch.full((2, 3 * 128), 0.5)),
        "shira_indices",
    ),
    "supertuning: places to be found": (
        "supertuning",
        {},
        {"save_precomputed_indices": False},
        "save_precomputed_indices",
    ),
    "supertuning: fewer places": (
        "supertuning",
        {},
        put(f"{KEY}.supertuning_indices", torch.zeros(3, dtype=torch.int32)),
        "supertuning_indices",
    ),
    "supertuning: factors that are announced": (
        "supertuning",
        {},
        {"r": 2},
        "supertuning_lora_A.weight",
    ),
    "waveft: wavelet": ("waveft", {}, {"wavelet_family": "coif5"}, "wavelet_family"),
    "waveft: seed": ("waveft", {}, {"random_loc_seed": 1.5}, "random_loc_seed"),
    "lora: integers": ("lora", {}, put(f"{KEY}.lora_A.weight", torch.ones(4, 64).int()), "lora_A"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_error_names_the_inconsistent_field(kind: str, tmp_path: Path) -> None:
    method, changes, edit, named = BROKEN[kind]
    directory = save(tmp_path, method, **changes)
    if isinstance(edit, dict):
        edit_config(directory, **edit)
    else:
        edit_tensors(directory, edit)
    fields = [field for field, _ in refusal_of(tmp_path).violations]
    assert any(named in field for field in fields), fields


@pytest.mark.parametrize(
    ("method", "changes"), [("vblora", {"vector_length": 8}), ("gralora", {"r": 4, "gralora_k": 4})]
)
def test_pieces_must_fit_the_base(method: str, changes: dict[str, Any], tmp_path: Path) -> None:
    directory = save(tmp_path, method, **changes)
    lower_adapter(tmp_path, base_of(tiny_llama()))
    key = "vector_length" if method == "vblora" else "gralora_k"
    edit_config(directory, **{key: 48 if method == "vblora" else 128, "r": 128})
    with pytest.raises(AdapterMismatchError, check=says("NOT_DIVISIBLE")):
        lower_adapter(tmp_path, base_of(tiny_llama()))


def test_tails_and_v_matrices_must_fit_the_base(tmp_path: Path) -> None:
    values = f"{KEY}.osf_svd_params."
    whole = {f"{values}{name}": torch.ones(64, 64) for name in ("U_low", "V_low")}
    whole[f"{values}S_low"] = torch.ones(64)
    edits: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
        "osf": (lambda tensors: tensors | whole, "WRONG_COUNT"),
        "frod": (put(FROD_V, torch.eye(63)), "WRONG_SHAPE"),
    }
    for method, (edit, reason) in edits.items():
        edit_tensors(save(tmp_path / method, method), edit)
        with pytest.raises(AdapterMismatchError, check=says(reason)):
            lower_adapter(tmp_path / method, base_of(tiny_llama()))


def test_a_norm_of_zeros_has_no_gain(tmp_path: Path) -> None:
    save(tmp_path, "ln_tuning")
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = 0.0
    with pytest.raises(AdapterMismatchError, check=says("ZERO_BASE_WEIGHT")):
        lower_adapter(tmp_path, base_of(model))


def test_an_old_bone_adapter_loads_as_miss(tmp_path: Path) -> None:
    directory = save(tmp_path, "miss", r=6)
    base = base_of(tiny_llama())
    before = lower_adapter(tmp_path, base).operators.modules
    edit_config(directory, peft_type="BONE", mini_r=..., miss_dropout=...)
    edit_tensors(
        directory, lambda t: {n.replace("miss_block", "bone_block"): x for n, x in t.items()}
    )
    after = lower_adapter(tmp_path, base).operators.modules
    assert before.keys() == after.keys()
    for name, module in before.items():
        pairs = zip(module.tensors(), after[name].tensors(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_match_transformers(name: str) -> None:
    x = torch.linspace(-8, 8, 97)
    torch.testing.assert_close(activation(name)(x), ACT2FN[name](x))


def test_nearly_equal_reflections_lose_nothing_to_rounding(tmp_path: Path) -> None:
    """Training starts from pairs of equal reflections, which cancel out."""
    model = tiny_llama(dtype=torch.float64)
    directory = save(tmp_path, "hra", r=4, target_modules=["q_proj"])

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
