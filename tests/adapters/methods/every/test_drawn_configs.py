"""Random configs that PEFT accepts, for every method; results are compared with PEFT's modules.

Each function that has the name of a method, or of one of its ``FORMS``, draws a config for it.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import apply_operators, base_of, linear_modules, lower_adapter, tiny_llama
from builders.methods import ALL, drawing, load_adapter, make_config, quiet, save_adapter
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.config import BdLoraConfig
from transformers import LlamaForCausalLM

from turret.server.adapters.base import BaseModel
from turret.server.adapters.methods import frod as frod_method
from turret.server.adapters.methods.wavelets import WAVELETS
from turret.server.adapters.operators.adapter_operators import ModuleOperators

FEW = 8
ALPHAS = [1, 3, 8, 2.5]


Draw = Callable[[st.SearchStrategy[Any]], Any]


@functools.cache
def model() -> tuple[LlamaForCausalLM, BaseModel]:
    built = tiny_llama(attention_bias=True, dtype=torch.float64)
    return built, base_of(built)


def selection(draw: Draw, *, layers: bool = True, exclude: bool = True) -> dict[str, Any]:
    """Target keys in one of PEFT's forms."""
    some = draw(st.lists(st.sampled_from(ALL), min_size=1, max_size=7, unique=True))
    kind, layer = draw(st.integers(0, 4)), draw(st.integers(0, 1))
    if kind == 0:
        return {"target_modules": "all-linear"}
    if kind == 1:
        return {"target_modules": rf".*\.layers\.{layer}\..*({'|'.join(some)})"}
    exact = [f"model.layers.{layer}.mlp.{draw(st.sampled_from(ALL[4:]))}"] if kind == 2 else []
    keys: dict[str, Any] = {"target_modules": [*exact, *some]}
    if layers and draw(st.booleans()):
        keys["layers_to_transform"] = draw(st.sampled_from([0, 1, [1], [0, 1]]))
        if draw(st.booleans()):
            keys["layers_pattern"] = draw(st.sampled_from(["layers", ["h", "layers"]]))
    elif exclude and len(some) > 1 and draw(st.booleans()):
        others = [["layers.0.self_attn.q_proj"], r".*\.0\.mlp\.up_proj"]
        keys["exclude_modules"] = draw(st.sampled_from([[some[0]], *others]))
    return keys


def patterns(draw: Draw, largest: int) -> dict[str, Any]:
    """PEFT uses the first matching key, but sorts the keys when it saves them."""
    keys: dict[str, Any] = {}
    names = ["^model.layers.0.mlp.gate_proj", r"layers\.1\..*", r"mlp\.(up|down)_proj", "q_proj"]
    for key, values in (
        ("rank_pattern", st.integers(1, largest)),
        ("alpha_pattern", st.sampled_from(ALPHAS)),
    ):
        chosen = draw(st.lists(st.sampled_from(names), max_size=2, unique=True))
        if chosen:
            keys[key] = {name: draw(values) for name in sorted(chosen)}
    return keys


def bias(draw: Draw, only: str) -> dict[str, Any]:
    return {"bias": draw(st.sampled_from(["none", "none", "all", only]))}


def ranks(draw: Draw, largest: int) -> int:
    return draw(st.integers(1, largest))


def lora(draw: Draw, *, lora_bias: bool = True) -> dict[str, Any]:
    keys = {"r": ranks(draw, 9), "lora_alpha": draw(st.sampled_from(ALPHAS))}
    keys["lora_bias"] = lora_bias and draw(st.booleans())
    return {**selection(draw), **keys, **patterns(draw, 9), **bias(draw, "lora_only")}


def dora(draw: Draw) -> dict[str, Any]:
    return lora(draw, lora_bias=False)


def loha(draw: Draw) -> dict[str, Any]:
    # Up to this rank, every module of the model is cheaper in rank space than dense.
    keys = {"r": ranks(draw, 4), "alpha": draw(st.sampled_from(ALPHAS))}
    return {**selection(draw), **keys, **patterns(draw, 4)}


def lokr(draw: Draw) -> dict[str, Any]:
    keys = {"r": ranks(draw, 12), "alpha": draw(st.sampled_from(ALPHAS))}
    keys["decompose_both"] = draw(st.booleans())
    keys["decompose_factor"] = draw(st.sampled_from([-1, 2, 4, 8]))
    return {**selection(draw), **keys, **patterns(draw, 12)}


def ia3(draw: Draw) -> dict[str, Any]:
    keys = selection(draw, layers=False, exclude=False)
    targets = keys["target_modules"]
    if isinstance(targets, list):
        chosen = st.lists(st.sampled_from(targets), unique=True)
    else:
        chosen = st.sampled_from([r".*\.(down|up)_proj", targets])
    return {**keys, "feedforward_modules": draw(chosen)}


def adalora(draw: Draw) -> dict[str, Any]:
    keys = {"init_r": draw(st.integers(2, 9)), "lora_alpha": draw(st.sampled_from([1, 8, 32]))}
    return {**selection(draw), **keys, **bias(draw, "lora_only")}


def vera(draw: Draw) -> dict[str, Any]:
    keys = {"r": ranks(draw, 24), "save_projection": draw(st.booleans())}
    keys["projection_prng_key"] = draw(st.integers(0, 1 << 20))
    return {**selection(draw, exclude=False), **keys, **bias(draw, "vera_only")}


def alora(draw: Draw) -> dict[str, Any]:
    tokens = draw(st.lists(st.integers(0, 90), min_size=1, max_size=4))
    keys = {"use_rslora": draw(st.booleans()), "lora_bias": draw(st.booleans())}
    keys["lora_alpha"] = draw(st.sampled_from([1, 3, 2.5]))
    return {**selection(draw), "r": ranks(draw, 9), "alora_invocation_tokens": tokens, **keys}


def bd_lora(draw: Draw) -> dict[str, Any]:
    blocks = draw(st.sampled_from([1, 2, 4]))
    a, b = ["o_proj", "down_proj"], ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    names = {"target_modules_bd_a": a, "target_modules_bd_b": b}
    if draw(st.booleans()):
        names = {"target_modules_bd_a": [*b, *a[:1]], "target_modules_bd_b": None}
    config = BdLoraConfig(**names, nblocks=blocks, match_strict=False)
    rank = blocks * ranks(draw, 3)
    return {**selection(draw), "r": rank, "use_bdlora": config, **bias(draw, "lora_only")}


def kasa(draw: Draw) -> dict[str, Any]:
    return {**selection(draw), "r": ranks(draw, 9), **bias(draw, "lora_only")}


def vblora(draw: Draw) -> dict[str, Any]:
    vectors = draw(st.sampled_from([8, 16, 300]))
    kept = draw(st.booleans())
    keys = {"num_vectors": vectors, "vector_length": draw(st.sampled_from([8, 16, 32]))}
    keys |= {"topk": draw(st.integers(2 if kept else 1, 4)), "save_only_topk_weights": kept}
    return {**selection(draw), "r": ranks(draw, 6), **keys, **bias(draw, "vblora_only")}


def unilora(draw: Draw) -> dict[str, Any]:
    keys = {"theta_d_length": draw(st.sampled_from([1, 7, 64, 999, 1 << 16]))}
    keys |= {"proj_seed": draw(st.integers(0, 1 << 20)), "save_indices": draw(st.booleans())}
    chosen = selection(draw, exclude=False)
    return {**chosen, "r": ranks(draw, 6), **keys, **bias(draw, "unilora_only")}


def tinylora(draw: Draw) -> dict[str, Any]:
    keys = {"u": draw(st.integers(1, 9)), "weight_tying": draw(st.sampled_from([0.0, 0.3, 0.5, 1]))}
    keys |= {"projection_seed": draw(st.integers(0, 99)), "save_projection": draw(st.booleans())}
    chosen = selection(draw, exclude=False)
    return {**chosen, "r": ranks(draw, 6), **keys, **bias(draw, "tinylora_only")}


def delora(draw: Draw) -> dict[str, Any]:
    keys = {"r": ranks(draw, 9), **bias(draw, "delora_only")}
    if draw(st.booleans()):
        # The order is that in which PEFT saves the keys.
        keys["rank_pattern"] = {r"layers\.1\..*": ranks(draw, 9), "q_proj": ranks(draw, 9)}
    return {**selection(draw), **keys}


def miss(draw: Draw) -> dict[str, Any]:
    keys = {"init_weights": draw(st.sampled_from([True, False, "mini"]))}
    keys["mini_r"] = draw(st.sampled_from([1, 2, 8]))
    return {**selection(draw), "r": ranks(draw, 32), **keys, **bias(draw, "MiSS_only")}


def pvera(draw: Draw) -> dict[str, Any]:
    keys = {"save_projection": draw(st.booleans()), "projection_prng_key": draw(st.integers(0, 99))}
    chosen = selection(draw, exclude=False)
    return {**chosen, "r": ranks(draw, 24), **keys, **bias(draw, "pvera_only")}


def gralora(draw: Draw) -> dict[str, Any]:
    blocks = draw(st.sampled_from([1, 2, 4]))
    keys = {"gralora_k": blocks, "r": blocks * ranks(draw, 3), "hybrid_r": draw(st.integers(0, 3))}
    keys["alpha"] = draw(st.sampled_from([1, 3, 64]))
    return {**selection(draw, exclude=False), **keys, **bias(draw, "gralora_only")}


def hra(draw: Draw) -> dict[str, Any]:
    keys = {"r": ranks(draw, 12), "apply_GS": draw(st.booleans())}
    return {**selection(draw), **keys, **bias(draw, "hra_only")}


def oft(draw: Draw) -> dict[str, Any]:
    size = draw(st.integers(2, 40))
    by_size = draw(st.booleans())
    keys = {"oft_block_size": size if by_size else 0, "r": 0 if by_size else size}
    keys |= {"block_share": draw(st.booleans()), "coft": draw(st.booleans())}
    keys |= {"eps": draw(st.sampled_from([6e-5, 0.5, 3.0]))}
    keys["use_cayley_neumann"] = draw(st.booleans())
    keys["num_cayley_neumann_terms"] = draw(st.integers(1, 7))
    return {**selection(draw), **keys, **bias(draw, "oft_only")}


def boft(draw: Draw) -> dict[str, Any]:
    size = draw(st.sampled_from([1, 2, 4, 8, 32]))
    by_size = draw(st.booleans())
    keys = {"boft_block_size": size if by_size else 0, "boft_block_num": 0 if by_size else size}
    keys["boft_n_butterfly_factor"] = draw(st.integers(1, 3))
    return {**selection(draw), **keys, **bias(draw, "boft_only")}


def road(draw: Draw) -> dict[str, Any]:
    keys = {"variant": draw(st.sampled_from(["road_1", "road_2", "road_4"]))}
    keys["group_size"] = draw(st.sampled_from([2, 4, 8, 16, 32]))
    return {**selection(draw, layers=False, exclude=False), **keys}


def c3a(draw: Draw) -> dict[str, Any]:
    keys: dict[str, Any] = {"block_size": draw(st.sampled_from([1, 2, 4, 8, 16, 32]))}
    if draw(st.booleans()):
        keys["block_size_pattern"] = {"q_proj": 64, r"layers\.1\..*up_proj": 8}
    return {**selection(draw, exclude=False), **keys, **bias(draw, "c3a_only")}


def hira(draw: Draw) -> dict[str, Any]:
    keys: dict[str, Any] = {"r": ranks(draw, 9)}
    if draw(st.booleans()):
        # The order is that in which PEFT saves the keys.
        keys["rank_pattern"] = {r"layers\.1\..*": ranks(draw, 9), "q_proj": ranks(draw, 9)}
    return {**selection(draw), **keys}


def deft(draw: Draw) -> dict[str, Any]:
    keys = {"r": ranks(draw, 40), "para": draw(st.booleans())}
    keys["decomposition_method"] = draw(st.sampled_from(["relu", "qr"]))
    keys["alpha"] = draw(st.sampled_from([None, 1, 6]))
    return {**selection(draw), **keys, **bias(draw, "deft_only")}


def shira(draw: Draw) -> dict[str, Any]:
    keys = {"r": ranks(draw, 10), "random_seed": draw(st.sampled_from([None, 3]))}
    return {**selection(draw, layers=False, exclude=False), **keys}


def supertuning(draw: Draw) -> dict[str, Any]:
    keys: dict[str, Any] = {"sparsity": draw(st.sampled_from([0.0, 0.5, 0.99, 0.9995]))}
    keys |= {"select_top": draw(st.booleans()), "r": draw(st.sampled_from([None, 1, 4]))}
    if keys["r"] is not None:
        keys["lora_alpha"] = draw(st.sampled_from([None, 1, 6.5]))
    return {**selection(draw, layers=False, exclude=False), **keys}


def waveft(draw: Draw) -> dict[str, Any]:
    keys = {"n_frequency": draw(st.sampled_from([1, 7, 500])), "scaling": draw(st.floats(-9, 9))}
    keys |= {"wavelet_family": draw(st.sampled_from(WAVELETS)), "use_idwt": draw(st.booleans())}
    keys |= {"random_loc_seed": draw(st.integers(0, 9)), **bias(draw, "waveft_only")}
    keys["proportional_parameters"] = draw(st.booleans())
    if draw(st.booleans()):
        keys["n_frequency_pattern"] = {"q_proj": 11, r"layers\.1\..*": 40}
    return {**selection(draw), **keys}


def fourierft(draw: Draw) -> dict[str, Any]:
    keys = {
        "n_frequency": draw(st.sampled_from([1, 7, 500])),
        "scaling": draw(st.floats(-300, 300)),
    }
    keys |= {"random_loc_seed": draw(st.integers(0, 9)), **bias(draw, "fourier_only")}
    if draw(st.booleans()):
        keys["n_frequency_pattern"] = {"q_proj": 11, r"layers\.1\..*": 40}
    return {**selection(draw), **keys}


def randlora(draw: Draw) -> dict[str, Any]:
    keys = {"save_projection": draw(st.booleans()), "projection_prng_key": draw(st.integers(0, 99))}
    keys["sparse"], keys["very_sparse"] = draw(st.booleans()), draw(st.booleans())
    keys["randlora_alpha"] = draw(st.sampled_from([1, 16, 640]))
    chosen = selection(draw, exclude=False)
    return {**chosen, "r": ranks(draw, 70), **keys, **bias(draw, "randlora_only")}


def osf(draw: Draw) -> dict[str, Any]:
    keys: dict[str, Any] = {"effective_rank": draw(st.sampled_from([None, 1, 20, 0.9, 1.0, 999]))}
    if draw(st.booleans()):
        keys["rank_pattern"] = {"q_proj": 11, r"layers\.1\..*": 0.25}
    return {**selection(draw, layers=False, exclude=False), **keys}


def frod(draw: Draw) -> dict[str, Any]:
    keys = {"sparse_rate": draw(st.sampled_from([0.0, 0.01, 0.2]))}
    keys |= {"projection_prng_key": draw(st.integers(0, 99)), "progressbar": False}
    keys["regularization_alpha"] = draw(st.sampled_from([1e-3, 0.1]))
    return {**selection(draw, exclude=False), **keys, **bias(draw, "frod_only")}


def bat(draw: Draw) -> dict[str, Any]:
    keys = {"init_weights": "bat", "r": draw(st.sampled_from([1, 2, 8, 32]))}
    return {**selection(draw), **keys, **bias(draw, "MiSS_only")}


def peanut(draw: Draw) -> dict[str, Any]:
    keys = {"r": ranks(draw, 9), "depth": draw(st.integers(0, 3))}
    keys["act_fn"] = draw(st.sampled_from(["relu", "gelu", "silu", "tanh", "sigmoid", "linear"]))
    return {**selection(draw), **keys, "scaling": draw(st.sampled_from([1.0, 0.5, -2.0]))}


def glora(draw: Draw) -> dict[str, Any]:
    keys = {"config_A_B": draw(st.sampled_from(["lora", "vector", "constant", "none"]))}
    keys["config_C"] = draw(st.sampled_from(["lora", "vector", "none"]))
    keys["config_D_E"] = draw(st.sampled_from(["vector", "constant", "none"]))
    return {**selection(draw, layers=False, exclude=False), "r": ranks(draw, 6), **keys}


def beft(draw: Draw) -> dict[str, Any]:
    return selection(draw, layers=False, exclude=False)


DRAWN: dict[str, Callable[[Draw], dict[str, Any]]] = {
    one.__name__: one
    for one in (
        *(lora, dora, loha, lokr, ia3, adalora, vera, alora, bd_lora, kasa, vblora, unilora),
        *(tinylora, delora, miss, pvera, gralora, hra, deft, peanut, glora, beft, oft, boft),
        *(road, c3a, hira, shira, supertuning, waveft, fourierft, randlora, osf, frod, bat),
    )
} | {"rslora": lora}
# The drawn names are methods, or forms of methods.
FORMS = {"bat": "miss"}


@torch.no_grad()
def check_modules(method: str, keys: dict[str, Any], seed: int) -> int:
    """Compare every module's output with PEFT's; returns the number of changed modules."""
    plain, base = model()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "a"
        config = make_config(FORMS.get(method, method), **keys)
        # KaSA changes the base's own weights, and a trained bias is the base's own.
        leaves_base = method != "kasa" and keys.get("bias", "none") == "none"
        oracle = save_adapter(plain, config, directory, seed=seed, share=leaves_base).eval()
        if method == "adalora":
            # Ranks are pruned as the adapter is saved.
            oracle = load_adapter(plain, directory)
        lowered = lower_adapter(Path(folder), base)
    moved = 0
    for path, linear in linear_modules(plain).items():
        operators = lowered.operators.modules.get(path, ModuleOperators())
        generator = torch.Generator().manual_seed(len(path))
        x = torch.randn(1, 5, linear.in_features, generator=generator, dtype=torch.float64)
        module, told = oracle.get_submodule(f"base_model.model.{path}"), {}
        if method == "alora" and not isinstance(module, torch.nn.Linear):
            # The first token on which the adapter acts, counted from the end.
            told["alora_offsets"] = [5]
        with quiet():
            expected = module(x, **told)
        found = apply_operators(linear, [(operators, 1.0)], x)
        error = float((found - expected).abs().max() / expected.abs().max())
        # PEFT computes some steps in fp32 regardless of the model's dtype, such as a QR, which
        # bounds the accuracy.
        assert error < 2e-6, (keys, path, error)
        moved += bool((found - linear(x)).abs().max() > 1e-3)
    return moved


@pytest.mark.parametrize("num_examples", [FEW, pytest.param(50, marks=pytest.mark.long)])
@pytest.mark.parametrize("method", DRAWN)
def test_drawn_configs_compute_what_peft_computes(
    method: str, num_examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    # Two layers make FRoD's V ill-conditioned; disable the rejection to compare these cases, too.
    monkeypatch.setattr(frod_method, "_MOST_NOISE", float("inf"))

    @drawing(num_examples)
    @given(data=st.data(), seed=st.integers(0, 99))
    def check(data: st.DataObject, seed: int) -> None:
        moved.append(check_modules(method, DRAWN[method](data.draw), seed))

    check()
    # The adapters must have an effect.
    assert len(moved) >= num_examples
    assert sum(moved) > len(moved)


@drawing(FEW)
@given(
    targets=st.lists(
        st.sampled_from(["input_layernorm", "layers.1.post_attention_layernorm", "model.norm"]),
        min_size=1,
        unique=True,
    ),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_drawn_norms_are_the_gains_of_the_modules_they_feed(targets: list[str], seed: int) -> None:
    plain, base = model()
    with tempfile.TemporaryDirectory() as folder:
        config = make_config("ln_tuning", target_modules=targets)
        oracle = save_adapter(plain, config, Path(folder) / "a", seed=seed, share=True).eval()
        operators = lower_adapter(Path(folder), base).operators
    x = torch.randn(5, 64, dtype=torch.float64)
    fed = {"lm_head": operators.head} | dict(operators.modules)
    for path, norm in base.norms.items():
        before, after = (
            plain.get_submodule(path)(x),
            oracle.get_submodule(f"base_model.model.{path}")(x),
        )
        for name in norm.feeds:
            module = fed.get(name)
            gain = None if module is None else module.input_gain
            found = before if gain is None else before * gain.double()
            torch.testing.assert_close(found, after, rtol=1e-6, atol=1e-6)
    assert any(module is not None for module in fed.values())
