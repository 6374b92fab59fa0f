"""FourierFT (arXiv 2405.03003): ``ΔW = s·Re F⁻¹(c)``, from a few Fourier coefficients ``c``.

The positions of the coefficients are drawn again from the seed, exactly as PEFT draws them. Every
coefficient is a wave over the whole weight, so the update is dense.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_SPECTRUM = "fourierft_spectrum"


def _operators(m: Module) -> Piece:
    # Compute in fp32 like PEFT, which supports no other dtype here.
    coefficients = torch.zeros(m.outputs, m.inputs)
    spectrum = m.tensors[_SPECTRUM].to(torch.float32)
    coefficients.view(-1)[drawn_places(m, len(spectrum))] = spectrum
    return Dense(torch.fft.ifft2(coefficients).real * m.config["scaling"])


METHOD = LinearMethod(
    name="fourierft",
    peft_types={"FOURIERFT"},
    keys={"scaling": fault_of_number, "random_loc_seed": fault_of_seed},
    ignored={"n_frequency": IN_TENSORS, "n_frequency_pattern": IN_TENSORS},
    bias=("fourier_only",),
    rank=None,
    required=("scaling", "random_loc_seed"),
    tensors={_SPECTRUM: (extent(_SPECTRUM, 0),)},
    check=lambda m: check_coefficients(m, _SPECTRUM),
    is_dense=always,
    operators=_operators,
)
