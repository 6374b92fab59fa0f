"""WaveFT (arXiv 2505.12532): ``ΔW = s·W⁻¹(c)``, a few coefficients of a wavelet transform.

The places of the coefficients are drawn again from the seed, exactly as PEFT draws them. A
coefficient is an outer product of two filters: of length 2 for ``db1``, so the update is sparse.
Without ``use_idwt`` the coefficients are the entries themselves.
"""

from __future__ import annotations

from typing import Any

import torch

from turret.server.adapters.base import BaseModel, BaseModule
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.reader import AdapterCheckpoint
from turret.server.adapters.lowering.finish import finish
from turret.server.adapters.lowering.lowered import Lowered, Method
from turret.server.adapters.lowering.sparse import check_width, place_drawer, sparse_of
from turret.server.adapters.lowering.wavelets import WAVELETS, inverse_entries
from turret.server.adapters.operators.adapter_operators import ModuleOperators
from turret.server.adapters.operators.updates import Sparse
from turret.server.adapters.peft_format.config.rules import (
    Irrelevant,
    Rules,
    Used,
    is_bool,
    is_number,
    is_one_of,
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

_SPECTRUM, _SEED = "waveft_spectrum", "random_loc_seed"
_COUNTED = Irrelevant("the tensors show how many coefficients there are")
_DRAWN = (
    "the places of the coefficients are not in the file; they were drawn again from"
    " random_loc_seed, as PEFT does"
)

WAVEFT_RULES: Rules = {
    **SELECTION_RULES,
    **LAYER_RULES,
    **CONV1D_RULES,
    **bias_rules("waveft_only"),
    "scaling": Used(is_number),
    "wavelet_family": Used(is_one_of(*WAVELETS)),
    "use_idwt": Used(is_bool),
    _SEED: Used(is_seed),
    "n_frequency": _COUNTED,
    "n_frequency_pattern": _COUNTED,
    "proportional_parameters": _COUNTED,
    "init_weights": START,
}


def _check(name: str, roles: Roles, module: BaseModule, _rank: int, findings: Findings) -> None:
    spectrum = roles.get(_SPECTRUM)
    size = module.in_features * module.out_features
    if spectrum is None or spectrum.ndim != 1 or not spectrum.numel():
        findings.add(f"{name}.{_SPECTRUM}", "must be a vector with at least one coefficient")
    elif len(spectrum) > size:
        findings.mismatch(f"{name}.{_SPECTRUM}", f"has {len(spectrum)} of {size} coefficients")
    else:
        check_width(name, module, findings)


_FORMAT = ModuleFormat(
    rules=WAVEFT_RULES,
    roles={f".{_SPECTRUM}": _SPECTRUM},
    check=_check,
    rank_key=None,
    bias_only="waveft_only",
    also_required=("scaling", "wavelet_family", "use_idwt", _SEED),
)


def lower(
    checkpoint: AdapterCheckpoint, base: BaseModel, max_rank: int | None = None, *_: object
) -> Lowered:
    found = read_module_checkpoint(checkpoint, base, _FORMAT, max_rank)
    draw, operators = place_drawer(checkpoint.config[_SEED]), {}
    for name, roles in found.modules.items():
        module = base.modules[name]
        places = draw(module.out_features * module.in_features, len(roles[_SPECTRUM]))
        entries = _entries(roles[_SPECTRUM], places, checkpoint.config, module, base.dtype)
        operators[name] = ModuleOperators(sparse=entries)
    return finish(
        checkpoint, base, operators, found=found, warnings=(_DRAWN,), depends_on_base=False
    )


def _entries(
    spectrum: torch.Tensor,
    places: torch.Tensor,
    config: Any,
    module: BaseModule,
    dtype: torch.dtype,
) -> Sparse:
    shape = (module.out_features, module.in_features)
    rows, columns = places // shape[1], places % shape[1]
    values = spectrum.double() * config["scaling"]
    if config["use_idwt"]:
        family = config["wavelet_family"]
        rows, columns, values = inverse_entries(family, rows, columns, values, shape)
    return sparse_of(rows, columns, values, module, dtype)


METHOD = Method("waveft", {"WAVEFT"}, WAVEFT_RULES, lower)
