"""C3A (arXiv 2407.19342): an update of circulant blocks, ``Δ(x)_m = Σ_n w_mn ⋆ x_n / in``.

Each block of ``b × b`` entries is one kernel of ``b`` values, shifted by one position per row. PEFT
divides by the number of inputs.
"""

from __future__ import annotations

from turret.server.adapters.methods.kit import *

_KERNEL = "c3a_kernel"
# For larger blocks, the transforms would cost more than a product with the full blocks.
MAX_BLOCK_SIZE = 2048


def _block_size(m: Module) -> int:
    """The module's block size: the one of the config's sizes that matches its tensor."""
    sizes = {m.config["block_size"], *(m.config.get("block_size_pattern") or {}).values()}
    size = m.extent(_KERNEL, 2)
    if size in sizes and size <= MAX_BLOCK_SIZE:
        return size
    known = ", ".join(map(str, sorted(sizes)))
    wanted = known if size not in sizes else f"at most {MAX_BLOCK_SIZE}"
    m.fault(_KERNEL, say("WRONG_COUNT", found=size, what="rows in a block", expected=wanted))
    raise StopChecks


_SIZE = Dim(_block_size)

METHOD = LinearMethod(
    name="c3a",
    peft_types={"C3A"},
    keys={"block_size": fault_of_rank, "block_size_pattern": fault_of_rank_pattern},
    bias=("c3a_only",),
    rank=None,
    required=("block_size",),
    tensors={_KERNEL: (OUT / _SIZE, IN / _SIZE, _SIZE)},
    operators=lambda m: Circulant(m.exact(_KERNEL) / m.inputs),
)
