"""The speed of a server beside a busy process, which with OpenMP would drop to a hundredth."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from checkout import ROOT
from transformers import AutoConfig

from turret.kernels.cpu.native import has_native_products
from turret.server.models.families import read_arch
from turret.server.models.model_source import resolve_model
from turret.server.models.sources.check import default_cache_dir

# The share is at least 0.5 on an idle machine, but tests run in parallel.
LEAST_SHARE = 0.15


@pytest.mark.long
@pytest.mark.skipif(not has_native_products(), reason="the product needs AVX512-BF16")
def test_one_request_keeps_a_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    neighbours = importlib.import_module("neighbours")
    model = resolve_model(None, default_cache_dir())
    arch = read_arch(AutoConfig.from_pretrained(model.files))
    loras = neighbours.write_random_loras(tmp_path, 1, rank=8, arch=arch, base_model=model.name)
    served = neighbours.Served(tmp_path, loras)
    try:
        served.rate([loras[0]], 8)
        alone = served.rate([loras[0]])
        with neighbours.busy_loop():
            beside = served.rate([loras[0]])
    finally:
        served.stop()
    assert beside > LEAST_SHARE * alone
