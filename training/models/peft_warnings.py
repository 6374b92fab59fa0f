"""What PEFT makes its libraries warn of, about which a user can do nothing.

It calls transformers by names that transformers has deprecated, makes sparse tensors without
saying whether their places be checked (SHiRA's are drawn inside the weight), and says of every
module that OFT's blocks are of another size there, which a note has said once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_DEPRECATED = ("is_gradient_checkpointing", "past_key_values")


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Hide those warnings within the block."""
    with warnings.catch_warnings():
        for name in _DEPRECATED:
            warnings.filterwarnings("ignore", f".*{name}.*", FutureWarning)
        warnings.filterwarnings("ignore", "Invalid `oft_block_size`", UserWarning)
        warnings.filterwarnings("ignore", "Sparse invariant checks", UserWarning)
        yield
