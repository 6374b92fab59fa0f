"""Reads the rows of the embedding and the head that an adapter changes."""

from __future__ import annotations

from turret.lazy_torch import torch
from turret.server.adapters.base import BaseVocabulary
from turret.server.adapters.checkpoint.findings import Findings
from turret.server.adapters.operators.vocabulary import VocabularyRows
from turret.server.words import say

# Rows compared at once: 8,192 rows of 4,096 numbers take 128 MB in fp32.
_ROWS_PER_BLOCK = 8192


def check_vocabulary(name: str, rows: int, base: BaseVocabulary, findings: Findings) -> bool:
    """Check that a matrix has one row per token of the base."""
    if rows == base.size:
        return True
    findings.mismatch(name, say("WRONG_COUNT", found=rows, what="tokens", expected=base.size))
    return False


def read_rows(
    name: str, tensor: torch.Tensor, ids: list[int], base: BaseVocabulary, findings: Findings
) -> VocabularyRows | None:
    """The trained rows of some tokens. The tensor has them in the order of the config's ids."""
    over = [i for i in ids if i >= base.size]
    if over:
        why = say("NOT_IN_RANGE", least=0, most=base.size - 1, value=over[0])
        findings.mismatch(name, why)
        return None
    if not findings.check_shape(name, tensor, (len(ids), base.embedding.shape[1])):
        return None
    order = torch.tensor(ids).argsort()
    values = tensor.index_select(0, order).to(base.embedding.dtype).contiguous()
    return _finite(name, VocabularyRows(torch.tensor(ids)[order], values), findings)


def read_matrix(
    name: str,
    tensor: torch.Tensor,
    base_matrix: torch.Tensor,
    base: BaseVocabulary,
    findings: Findings,
) -> VocabularyRows | None:
    """The rows of a whole matrix that differ from the base's; None if all are the same."""
    if tensor.ndim != 2:
        findings.add(name, say("WRONG_SHAPE", shape=list(tensor.shape), expected="2 dimensions"))
        return None
    if not check_vocabulary(name, tensor.shape[0], base, findings):
        return None
    if not findings.check_shape(name, tensor, tuple(base_matrix.shape)):
        return None
    ids = changed_rows(tensor, base_matrix)
    if not len(ids):
        return None
    # If most rows differ, selecting them costs more than it saves.
    if 2 * len(ids) > base.size:
        return _finite(name, VocabularyRows(None, _owned(tensor, base_matrix.dtype)), findings)
    values = tensor.index_select(0, ids).to(base_matrix.dtype).contiguous()
    return _finite(name, VocabularyRows(ids, values), findings)


def changed_rows(tensor: torch.Tensor, base_matrix: torch.Tensor) -> torch.Tensor:
    """Ids of the rows that differ if both matrices are cast to the coarser of their dtypes."""
    served = base_matrix.cpu()
    found = []
    for start in range(0, len(tensor), _ROWS_PER_BLOCK):
        mine, theirs = (m[start : start + _ROWS_PER_BLOCK] for m in (tensor, served))
        is_other = (mine.to(theirs.dtype) != theirs) & (mine != theirs.to(mine.dtype))
        found.append(is_other.any(dim=1).nonzero().squeeze(1) + start)
    return torch.cat(found)


def _owned(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy, because a view would keep all other tensors of the file in memory."""
    return tensor.to(dtype, copy=True).contiguous()


def _finite(name: str, rows: VocabularyRows, findings: Findings) -> VocabularyRows | None:
    if bool(torch.isfinite(rows.values).all()):
        return rows
    findings.add(name, say("NOT_FINITE", dtype=rows.values.dtype))
    return None
