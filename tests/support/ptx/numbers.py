"""Bits and numbers: registers hold unsigned integers, which operations interpret as needed.

A register is an array over the threads of a CTA, or a scalar if all threads have the same value.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
# An array or a numpy scalar.
Value = Any

UNSIGNED = {8: u1, 16: u2, 32: u4, 64: u8}
SIGNED = {8: i1, 16: i2, 32: i4, 64: i8}


def from_bf16(bits: Value) -> Value:
    """The fp32 values of bf16 bits."""
    return (bits.astype(u4) << u4(16)).view(f4)


def to_bf16(value: Value) -> Value:
    """The bf16 bits nearest to fp32 values, ties to even."""
    bits = np.asarray(value, dtype=f4).view(u4)
    rounded = (bits.astype(u8) + u8(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u8(16)
    return np.where((bits & u4(0x7FFFFFFF)) > u4(0x7F800000), u8(0x7FFF), rounded).astype(u2)


def from_fp16(bits: Value) -> Value:
    """The fp32 values of fp16 bits."""
    return bits.astype(u2).view(f2).astype(f4)


def to_fp16(value: Value) -> Value:
    """The fp16 bits nearest to fp32 values."""
    return np.asarray(value, dtype=f4).astype(f2).view(u2)


def from_half(bits: Value, kind: str) -> Value:
    """fp32 values of ``bf16`` or ``f16`` bits."""
    return from_bf16(bits) if kind.startswith("bf16") else from_fp16(bits)


def to_half(value: Value, kind: str) -> Value:
    """``bf16`` or ``f16`` bits of fp32 values."""
    return to_bf16(value) if kind.startswith("bf16") else to_fp16(value)


def pack(low: Value, high: Value) -> Value:
    """Two 16-bit values in 32 bits."""
    return low.astype(u4) | (high.astype(u4) << u4(16))


def fma(a: Value, b: Value, c: Value) -> Value:
    """``a b + c`` in fp32, rounded to 53 bits before the last rounding."""
    return (a.view(f4).astype(f8) * b.view(f4) + c.view(f4)).astype(f4).view(u4)


def shift_left(value: Value, count: Value, bits: int) -> Value:
    """Shift left; the result is zero if the count reaches the width."""
    kind = UNSIGNED[bits]
    shifted = value << np.minimum(count, u4(bits - 1)).astype(kind)
    return np.where(count >= u4(bits), kind(0), shifted)


def shift_right(value: Value, count: Value, bits: int, signed: bool) -> Value:
    """Shift right, filling with copies of the sign or with zeros."""
    kind, clamped = UNSIGNED[bits], np.minimum(count, u4(bits - 1))
    if signed:
        return (value.view(SIGNED[bits]) >> clamped.astype(SIGNED[bits])).view(kind)
    return np.where(count >= u4(bits), kind(0), value >> clamped.astype(kind))


def permute_bytes(a: Value, b: Value, selector: Value) -> Value:
    """``prmt``: four of the eight bytes of ``b : a``, or copies of their sign."""
    if np.ndim(a) == 0 and np.ndim(b) == 0 and np.ndim(selector):
        return _by_selector(int(a), int(b))[selector & u4(0xFFFF)]
    return _permuted(a, b, selector)


@functools.lru_cache(64)
def _by_selector(a: int, b: int) -> np.ndarray:
    """The result of each selector for two words of a lookup table."""
    return _permuted(u4(a), u4(b), np.arange(1 << 16, dtype=u4))


def _permuted(a: Value, b: Value, selector: Value) -> Value:
    both = a.astype(u8) | (b.astype(u8) << u8(32))
    result = u8(0)
    for i in range(4):
        pick = (selector.astype(u8) >> u8(4 * i)) & u8(15)
        byte = (both >> ((pick & u8(7)) << u8(3))) & u8(255)
        byte = np.where(pick & u8(8), (byte >> u8(7)) * u8(255), byte)
        result = result | (byte << u8(8 * i))
    return result.astype(u4)


def logic(a: Value, b: Value, c: Value, table: int) -> Value:
    """``lop3``: any function of three bits."""
    result = u4(0)
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


def extract_bits(value: Value, start: Value, length: Value, signed: bool) -> Value:
    """``bfe``: a field of at most 32 bits, sign-extended if ``signed``."""
    begin, size = start.astype(u8) & u8(255), length.astype(u8) & u8(255)
    mask = (u8(1) << np.minimum(size, u8(63))) - u8(1)
    field = (value.astype(u8) >> np.minimum(begin, u8(63))) & mask
    if signed:
        sign = (field >> np.where(size > u8(0), size - u8(1), u8(0))) & u8(1)
        field = np.where(sign == u8(1), field | ~mask, field)
    return field.astype(u4)


def divide(a: Value, b: Value, bits: int, signed: bool, remainder: bool) -> Value:
    """Truncating division; division by zero gives all ones, as on the device."""
    kind = SIGNED[bits] if signed else UNSIGNED[bits]
    x, y = a.view(kind).astype(i8), b.view(kind).astype(i8)
    safe = np.where(y == 0, i8(1), y)
    quotient = np.sign(x) * np.sign(safe) * (np.abs(x) // np.abs(safe))
    result = x - quotient * safe if remainder else quotient
    return np.where(y == 0, i8(-1), result).astype(kind).view(UNSIGNED[bits])


def multiply(a: Value, b: Value, bits: int, part: str, signed: bool) -> Value:
    """The ``lo``, ``hi`` or ``wide`` part of a product of ``bits``-bit integers."""
    if bits == 64:
        if part != "lo":
            raise NotImplementedError(f"mul.{part} of 64 bits")
        return a * b
    if signed:
        product = (a.view(SIGNED[bits]).astype(i8) * b.view(SIGNED[bits]).astype(i8)).view(u8)
    else:
        product = a.astype(u8) * b.astype(u8)
    if part == "hi":
        product = product >> u8(bits)
    return product.astype(UNSIGNED[2 * bits if part == "wide" else bits])
