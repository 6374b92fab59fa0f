"""Where the heads of a step's rows go, for kernels that store them beside their own work."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turret.kernels.gpu.shared.contract import check_contiguous, check_float, check_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class KvWrite:
    """How a layer turns heads, and where it stores keys and values.

    Attributes:
        cos: ``[num_rows, pairs]`` fp32, contiguous; ``2 · pairs`` features of a head rotate.
        sin: Same shape.
        kv_slots: ``block · block_size + offset`` per row, ``[num_rows]`` int64, each at most once.
        k_cache: The layer's keys, ``[num_blocks, block_size, kv_heads, head_dim]``, contiguous.
        v_cache: Its values, same shape and dtype.
        is_interleaved: Whether neighbouring features make a pair, not (i, i + pairs).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    kv_slots: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    is_interleaved: bool = False

    @property
    def kv_heads(self) -> int:
        return self.k_cache.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k_cache.shape[3]

    @property
    def pairs(self) -> int:
        return self.cos.shape[1]

    @property
    def is_partial(self) -> bool:
        """Whether some features of a head do not rotate."""
        return 2 * self.pairs != self.head_dim

    def num_heads(self, width: int) -> int:
        """Heads of queries among ``width`` columns of queries, keys and values."""
        return width // self.head_dim - 2 * self.kv_heads

    def divides(self, columns: int) -> bool:
        """Whether tiles with this many columns hold whole heads."""
        return columns % self.head_dim == 0

    def empty_queries(self, num_rows: int, width: int) -> torch.Tensor:
        """Allocate the queries, ``[num_rows, num_heads, head_dim]``."""
        shape = num_rows, self.num_heads(width), self.head_dim
        return torch.empty(shape, dtype=self.k_cache.dtype, device=self.k_cache.device)

    def rows(self, start: int, stop: int) -> KvWrite:
        """The same for some rows only."""
        return KvWrite(
            cos=self.cos[start:stop],
            sin=self.sin[start:stop],
            kv_slots=self.kv_slots[start:stop],
            k_cache=self.k_cache,
            v_cache=self.v_cache,
            is_interleaved=self.is_interleaved,
        )

    def check(self, num_rows: int, width: int) -> None:
        """Raise ValueError unless this many rows and columns are supported."""
        if width % self.head_dim or self.num_heads(width) < 1:
            raise ValueError(
                f"qkv has {width} columns; a multiple of {self.head_dim} is needed, over "
                f"{2 * self.kv_heads * self.head_dim}"
            )
        for name, values in (("cos", self.cos), ("sin", self.sin)):
            check_float(name, values, torch.float32)
            check_shape(name, values, num_rows, self.pairs)
            check_contiguous(name, values)
        if 2 * self.pairs > self.head_dim:
            raise ValueError(f"cos is for {2 * self.pairs} features; a head has {self.head_dim}")
        check_shape("kv_slots", self.kv_slots, num_rows)
        check_shape("v_cache", self.v_cache, *self.k_cache.shape)
        check_float("v_cache", self.v_cache, self.k_cache.dtype)
        check_contiguous("k_cache", self.k_cache)
        check_contiguous("v_cache", self.v_cache)
