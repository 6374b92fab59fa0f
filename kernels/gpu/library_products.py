"""Settings under which a library's product gives a row the same bits wherever it is.

Rows go to the library in pieces of one shape, so it takes one algorithm. What is left is how that
algorithm sums: a reduction that is cut among programs (split-K) may give a row bits that depend on
its place in the piece, and sums parts in the dtype of activations besides. Both are switched off.
``tests/kernels/test_library_products.py`` permutes rows on a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Rows and columns of a trial product: torch rejects products whose sums it cannot keep whole.
_TRIAL = 64


def keep_sums_whole(device: torch.device) -> bool:
    """Set torch up for the process, before the first product and before anything is captured.

    Args:
        device: Of the products; other than CUDA devices need no settings.

    Returns:
        Whether sums are never cut. Otherwise this version of torch takes no such setting; parts
        are summed in fp32.
    """
    if device.type != "cuda":
        return True
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = False
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        matmul.allow_bf16_reduced_precision_reduction = (False, False)
        matmul.allow_fp16_reduced_precision_reduction = (False, False)
        for dtype in (torch.bfloat16, torch.float16):
            trial = torch.zeros(_TRIAL, _TRIAL, dtype=dtype, device=device)
            F.linear(trial, trial)
    except (RuntimeError, TypeError):
        matmul.allow_bf16_reduced_precision_reduction = False
        matmul.allow_fp16_reduced_precision_reduction = False
        return False
    return True
