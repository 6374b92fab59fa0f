"""Checks that wrappers make on the host: shapes, dtypes, strides, never values on the device."""

from __future__ import annotations

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_float(name: str, tensor: torch.Tensor, like: torch.dtype | None = None) -> None:
    """Require fp16, bf16 or fp32, or exactly ``like``.

    Raises:
        ValueError: Another dtype.
    """
    if like is not None and tensor.dtype != like:
        raise ValueError(f"{name} is {tensor.dtype}; {like} is needed")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} is {tensor.dtype}; fp16, bf16 or fp32 is needed")


def check_shape(name: str, tensor: torch.Tensor, *shape: int) -> None:
    """Require a shape; -1 stands for any size.

    Raises:
        ValueError: Another shape.
    """
    actual = tuple(tensor.shape)
    fits = len(actual) == len(shape) and all(
        want in (-1, have) for have, want in zip(actual, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} is {list(actual)}; {list(shape)} is needed (-1: any)")


def check_rows(name: str, tensor: torch.Tensor) -> None:
    """Require that the last dimension is contiguous.

    Raises:
        ValueError: It is not.
    """
    if tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {tensor.stride(-1)} in its last dimension; 1 is needed"
        )


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Require a contiguous tensor.

    Raises:
        ValueError: It is not.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: strides {tensor.stride()}")


def check_length(name: str, tensor: torch.Tensor, count: int) -> None:
    """Require a number of elements.

    Raises:
        ValueError: It has another.
    """
    if tensor.numel() != count:
        raise ValueError(f"{name} has {tensor.numel()} elements; {count} are needed")
