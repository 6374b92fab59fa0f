"""Lloyd's k-means as scikit-learn runs it: the same start, steps and end, and so the same clusters.

AdaMSS clusters the rows of a weight so, with ``KMeans(init="random", n_init=1, max_iter=10)``, and
writes down how many rows each cluster has and not which.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float32]
_Labels = npt.NDArray[np.int64]
_MAX_STEPS = 10
_TOLERANCE = 1e-4
_CHUNK = 256


def cluster_rows(rows: npt.ArrayLike, count: int, seed: int) -> _Labels:
    """The cluster of every row, ``[n]``.

    Args:
        rows: ``[n, features]``.
        count: Clusters, at most n.
        seed: Of the rows that clusters start from.
    """
    x = np.array(rows, dtype=np.float32, order="C")
    tolerance = np.mean(np.var(x, axis=0)) * _TOLERANCE
    x -= x.mean(axis=0)
    # scikit-learn draws with weights, which takes other numbers than a draw without.
    weights = np.ones(len(x), dtype=np.float32)
    draw = np.random.RandomState(seed)
    starts = draw.choice(len(x), size=count, replace=False, p=weights / weights.sum())
    centers, labels = x[starts], np.full(len(x), -1, dtype=np.int64)
    for _ in range(_MAX_STEPS):
        nearest = _nearest(x, centers)
        moved = _means(x, nearest, centers)
        shift = float((np.linalg.norm(moved - centers, axis=1) ** 2).sum())
        centers = moved
        if np.array_equal(nearest, labels):
            return labels
        if shift <= tolerance:
            break
        labels = nearest
    return _nearest(x, centers)


def _nearest(x: _Floats, centers: _Floats) -> _Labels:
    squares = (centers * centers).sum(axis=1)
    parts = (x[start : start + _CHUNK] for start in range(0, len(x), _CHUNK))
    return np.concatenate([(squares - 2 * part @ centers.T).argmin(axis=1) for part in parts])


def _means(x: _Floats, labels: _Labels, before: _Floats) -> _Floats:
    """New centers; a cluster without rows takes over the row that is farthest from its own."""
    sums = np.zeros_like(before)
    np.add.at(sums, labels, x)
    sizes = np.bincount(labels, minlength=len(before)).astype(np.float32)
    empty = np.flatnonzero(sizes == 0)
    if len(empty):
        distances = ((x - before[labels]) ** 2).sum(axis=1)
        farthest = np.argpartition(distances, -len(empty))[: -len(empty) - 1 : -1]
        for cluster, row in zip(empty, farthest, strict=True):
            sums[labels[row]] -= x[row]
            sizes[labels[row]] -= 1
            sums[cluster], sizes[cluster] = x[row], 1
    sums /= sizes[:, None]
    return sums
