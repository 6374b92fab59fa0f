"""Whether an adapter's tensors hold NaN or Inf, told from their bits, without torch."""

from __future__ import annotations

from turret.server.adapters.checkpoint.adapter_root import AdapterDirectory
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.checkpoint.no_adapter import NOT_FINITE
from turret.server.adapters.checkpoint.safetensors_header import SafetensorsHeader
from turret.server.adapters.source import TENSORS_FILE

# Of each dtype: that of its bits, and those of the exponent, all of which are set in NaN and Inf.
_EXPONENTS = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}


def check_finite(
    directory: AdapterDirectory, header: SafetensorsHeader, findings: Findings, most_bytes: int
) -> int:
    """Refuse tensors that are not finite, if all of them are no more than ``most_bytes``.

    Returns:
        How many bytes were read.

    Raises:
        AdapterCheckpointError: Names those tensors.
    """
    num_bytes = header.entries[-1].end if header.entries else 0
    if not 0 < num_bytes <= most_bytes:
        return 0
    # Loaded here: most starts look at no adapter, and the command's help at none.
    import numpy as np

    with directory.open_file(TENSORS_FILE) as file:
        file.seek(len(header.raw))
        data = file.read(num_bytes)
    for entry in header.entries:
        if entry.dtype not in _EXPONENTS or entry.end > len(data):
            continue
        kind, mask = _EXPONENTS[entry.dtype]
        bits = np.frombuffer(data, kind, entry.num_elements, entry.begin)
        exponent = bits.dtype.type(mask)
        if np.any((bits & exponent) == exponent):
            findings.add(entry.name, NOT_FINITE)
    findings.raise_if_any()
    return num_bytes
