"""OFT and BOFT in forms that the installed PEFT does not create."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.adapters import base_of, edit_config, edit_tensors, lower_adapter, tiny_llama
from builders.methods import load_adapter, make_config, save_adapter
from peft.tuners.boft.layer import BOFTLayer

from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.input_blocks import InputBlocks

Q = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}"
WIDTH, SIZE = 64, 8
# Python does not convert text with this many digits to a number.
_NO_VERSION = "9" * 5000 + ".0"


def lowered(root: Path) -> ModuleOperators:
    model = tiny_llama(dtype=torch.float64)
    return lower_adapter(root, base_of(model)).operators.modules[Q]


def matrix(operators: ModuleOperators) -> torch.Tensor:
    """``R``, ``[in, in]``."""
    turned = operators.get(InputBlocks)
    assert turned is not None
    blocks = turned.blocks
    return torch.eye(WIDTH) + torch.block_diag(*blocks.expand(WIDTH // blocks.shape[1], -1, -1))


def save(root: Path, method: str, **changes: Any) -> Path:
    config = make_config(method, target_modules=[Q], **changes)
    save_adapter(tiny_llama(), config, root / "a")
    return root / "a"


def noise(*shape: int) -> torch.Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(4))


def skew_of(triangle: torch.Tensor) -> torch.Tensor:
    """The skew-symmetric matrix, filled row by row as in PEFT."""
    q = torch.zeros(len(triangle), SIZE, SIZE, dtype=torch.float64)
    values = iter(triangle.double().T)
    for i in range(SIZE):
        for j in range(i + 1, SIZE):
            q[:, i, j] = next(values)
    return q - q.transpose(1, 2)


@pytest.mark.parametrize(
    "version", ["0.17.1", "0.18.0.dev0@abc", None, _NO_VERSION], ids=lambda v: str(v)[:9]
)
@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 6])
def test_the_series_is_that_of_the_peft_version_used_in_training(
    terms: int, version: str | None, tmp_path: Path
) -> None:
    folder = save(tmp_path, "oft", num_cayley_neumann_terms=terms)
    edit_config(folder, peft_version=... if version is None else version)
    is_old = version in ("0.17.1", None, _NO_VERSION)
    tensors: dict[str, torch.Tensor] = {}
    edit_tensors(folder, tensors.update)
    q = skew_of(tensors[f"{KEY}.oft_R.weight"])
    expected = torch.eye(SIZE, dtype=torch.float64)
    if is_old:
        expected = expected + sum(2 * torch.matrix_power(q, n) for n in range(1, terms))
    elif terms > 2:
        last = max(terms - 1, 3)
        expected = expected + sum(2 * torch.matrix_power(q, n) for n in range(1, last))
        expected = expected + torch.matrix_power(q, last)
    elif terms == 2:
        expected = expected + 2 * q
    error = (matrix(lowered(tmp_path)) - torch.block_diag(*expected.expand(8, -1, -1))).abs()
    assert error.max() < 1e-12


@pytest.mark.parametrize("share", [False, True])
def test_full_matrices_and_a_gain_match_peft_0_14(share: bool, tmp_path: Path) -> None:
    folder = save(tmp_path, "oft", block_share=share)
    saved, scale = noise(1 if share else 8, SIZE, SIZE), 1 + noise(WIDTH, 1)
    edit_config(folder, peft_version=..., use_cayley_neumann=..., num_cayley_neumann_terms=...)
    edit_tensors(folder, lambda _: {f"{KEY}.oft_r": saved, f"{KEY}.oft_s": scale})
    operators = lowered(tmp_path)
    q = 0.5 * (saved.double() - saved.double().transpose(1, 2))
    eye = torch.eye(SIZE, dtype=torch.float64)
    # oft/layer.py of PEFT 0.15, _cayley_batch.
    expected = torch.linalg.solve(eye + q, eye - q, left=False).expand(8, -1, -1)
    assert operators.gain is not None
    assert torch.equal(operators.gain, scale.flatten())
    assert (matrix(operators) - torch.block_diag(*expected)).abs().max() < 1e-12


def test_full_matrices_are_projected_with_the_number_of_outputs(tmp_path: Path) -> None:
    folder = save(tmp_path, "oft", coft=True, eps=0.004)
    saved, scale = noise(8, SIZE, SIZE), 1 + noise(WIDTH, 1)
    edit_config(folder, peft_version=..., use_cayley_neumann=...)
    edit_tensors(folder, lambda _: {f"{KEY}.oft_r": saved, f"{KEY}.oft_s": scale})
    limit = 0.004 * 8 * 8 / 8**0.5
    norms = saved.double().flatten(1).norm(dim=1)[:, None, None]
    assert bool((norms > limit).all())
    near = saved.double() * limit / norms
    q = 0.5 * (near - near.transpose(1, 2))
    eye = torch.eye(SIZE, dtype=torch.float64)
    expected = torch.linalg.solve(eye + q, eye - q, left=False)
    assert (matrix(lowered(tmp_path)) - torch.block_diag(*expected)).abs().max() < 1e-12


@pytest.mark.parametrize(("factors", "size"), [(1, 4), (2, 4), (3, 4), (4, 8), (2, 2), (5, 4)])
def test_butterfly_factors_are_multiplied_out(factors: int, size: int, tmp_path: Path) -> None:
    """Compare with PEFT's permutations, which PEFT itself creates only with its CUDA extension."""
    folder = save(tmp_path, "boft", boft_block_size=size, boft_n_butterfly_factor=factors)
    saved = noise(factors, WIDTH // size, size, size)
    edit_tensors(folder, lambda tensors: {**tensors, f"{KEY}.boft_R": saved})
    layer: Any = object.__new__(BOFTLayer)
    expected = torch.eye(WIDTH, dtype=torch.float64)
    for number, factor in enumerate(saved.double()):
        order = BOFTLayer.block_butterfly_perm(
            layer, WIDTH, WIDTH // size // 2**number, size // 2, factors - 1
        )
        moved = BOFTLayer.perm2mat(layer, order).double()
        blocks = torch.block_diag(*BOFTLayer.cayley_batch(layer, factor.float()).double())
        expected = moved @ blocks @ moved.T @ expected
    assert (matrix(lowered(tmp_path)) - expected).abs().max() < 2e-6


def test_boft_matches_peft_without_its_cuda_extension(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.float64)
    save_adapter(model, make_config("boft", boft_n_butterfly_factor=3), tmp_path / "a")
    oracle = load_adapter(model, tmp_path / "a")
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    module = oracle.get_submodule(f"base_model.model.{Q}")
    operators = lowered(tmp_path)
    assert operators.gain is not None
    with torch.no_grad():
        found = (x @ matrix(operators).double()) @ model.get_parameter(f"{Q}.weight").T
        found = found * operators.gain.double()
        assert (found - copy.deepcopy(module)(x)).abs().max() < 1e-6
