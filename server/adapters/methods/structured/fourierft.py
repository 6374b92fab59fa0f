"""FourierFT (arXiv 2405.03003): ``ΔW = s·Re F⁻¹(c)``, a few coefficients of a Fourier transform.

The places of the coefficients are drawn again from the seed, exactly as PEFT draws them. Every
coefficient is a wave over the whole weight, so the update is a dense one.
"""

from __future__ import annotations

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.dense import dense
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.lowering.sparse import place_drawer
from turret.server.adapters.peft_format.config.rules import (
    Irrelevant,
    Rules,
    Used,
    is_number,
    is_seed,
)
from turret.server.adapters.peft_format.config.selection_rules import (
    CONV1D_RULES,
    LAYER_RULES,
    SELECTION_RULES,
    START,
    bias_rules,
)
from turret.server.adapters.peft_format.module_checkpoint import (
    ModuleFormat,
    Roles,
    read_module_checkpoint,
)

_SPECTRUM, _SEED = "fourierft_spectrum", "random_loc_seed"
_COUNTED = Irrelevant("the tensors show how many coefficients there are")
_DRAWN = (
    "the places of the coefficients are not in the file; they were drawn again from"
    " random_loc_seed, as PEFT does"
)

FOURIERFT_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    **CONV1D_RULES,
    **bias_rules("fourier_only"),
    "scaling": Used(is_number),
    _SEED: Used(is_seed),
    "n_frequency": _COUNTED,
    "n_frequency_pattern": _COUNTED,
    "init_weights": START,
}


def _check(name: str, roles: Roles, module: BaseModule, _rank: int, findings: Findings) -> None:
    spectrum = roles.get(_SPECTRUM)
    size = module.in_features * module.out_features
    if spectrum is None or spectrum.ndim != 1 or not spectrum.numel():
        findings.add(f"{name}.{_SPECTRUM}", "must be a vector with at least one coefficient")
    elif len(spectrum) > size:
        findings.mismatch(f"{name}.{_SPECTRUM}", f"has {len(spectrum)} of {size} coefficients")


_FORMAT = ModuleFormat(
    rules=FOURIERFT_RULES,
    roles={f".{_SPECTRUM}": _SPECTRUM},
    check=_check,
    rank_key=None,
    bias_only="fourier_only",
    also_required=("scaling", _SEED),
)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    config = checkpoint.config
    found = read_module_checkpoint(checkpoint, base, _FORMAT, max_rank)
    draw, operators = place_drawer(config[_SEED]), {}
    for name, roles in found.modules.items():
        module = base.modules[name]
        # In fp32 as PEFT, which has no other transform.
        coefficients = torch.zeros(module.out_features, module.in_features)
        spectrum = roles[_SPECTRUM].to(torch.float32)
        places = draw(coefficients.numel(), len(spectrum))
        coefficients.view(-1)[places] = spectrum
        update = torch.fft.ifft2(coefficients).real * config["scaling"]
        operators[name] = dense(update, base.dtype)
    return finish(
        checkpoint, base, operators, found=found, warnings=(_DRAWN,), depends_on_base=False
    )


METHOD = Method("fourierft", {"FOURIERFT"}, FOURIERFT_RULES, lower, is_dense=lambda _config: True)
