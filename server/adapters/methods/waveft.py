"""WaveFT (arXiv 2505.12532): ``ΔW = s·T⁻¹(c)``, from a few coefficients of a wavelet transform.

The positions of the coefficients are drawn again from the seed, exactly as PEFT draws them. Each
coefficient changes only the entries that an outer product of two short filters covers (2 × 2 with
``db1``), so the update is sparse. Without ``use_idwt``, the coefficients are the entries
themselves.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *
from turret.server.adapters.methods.wavelets import WAVELETS, inverse_entries

_SPECTRUM = "waveft_spectrum"


def _check(m: Module) -> None:
    check_coefficients(m, _SPECTRUM)
    check_places(m)


def _operators(m: Module) -> Piece:
    spectrum, shape = m.exact(_SPECTRUM), (m.outputs, m.inputs)
    places = drawn_places(m, len(spectrum))
    rows, columns = places // m.inputs, places % m.inputs
    values = spectrum * m.config["scaling"]
    if m.config["use_idwt"]:
        family = m.config["wavelet_family"]
        rows, columns, values = inverse_entries(family, rows, columns, values, shape)
    return sparse(rows, columns, values, shape)


METHOD = LinearMethod(
    name="waveft",
    peft_types={"WAVEFT"},
    keys={
        "scaling": fault_of_number,
        "wavelet_family": fault_of_choice(*WAVELETS),
        "use_idwt": fault_of_bool,
        "random_loc_seed": fault_of_seed,
    },
    ignored={
        "n_frequency": IN_TENSORS,
        "n_frequency_pattern": IN_TENSORS,
        "proportional_parameters": IN_TENSORS,
    },
    bias=("waveft_only",),
    rank=None,
    required=("scaling", "wavelet_family", "use_idwt", "random_loc_seed"),
    tensors={_SPECTRUM: (extent(_SPECTRUM, 0),)},
    check=_check,
    operators=_operators,
)
