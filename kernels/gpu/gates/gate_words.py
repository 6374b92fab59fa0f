"""How a gated adapter is scored in a module: words in a table by slot, which kernels read.

What a score begins with lies in memory of the adapter's own, and is found by its address: however
different adapters are, a step launches the same. A slot's words of a slice, int64::

    asked@ · keys@ · kind · vectors · top_k · temperature (fp32 bits) · module · 0
"""

from __future__ import annotations

import struct

WORDS = 8
# Positions of the words.
ASKED, KEYS, KIND, VECTORS, TOP_K, TEMPERATURE, MODULE = range(7)
# Kinds of gates. A module without a gate has NONE, and its components have no ranks.
NONE, QUERY, PROTOTYPE, TOLD = range(4)

Words = tuple[int, int, int, int, int, int, int, int]
NO_WORDS: Words = (0, 0, 0, 0, 0, 0, 0, 0)


def query_words(query: int, keys: int, d_k: int) -> Words:
    """Words of the gate ``softmax_k(q · (Wk B_k) v_k)``.

    Args:
        query: Where ``Wq`` lies, ``[d_k, in]``, serving dtype. As all addresses a multiple of 16.
        keys: Where ``(Wk B)ᵀ`` of all components lies, ``[ranks, d_k]`` fp32.
        d_k: Length of a query.
    """
    return (query, keys, QUERY, d_k, 0, 0, 0, 0)


def prototype_words(prototypes: int, components: int, top_k: int, temperature: float) -> Words:
    """Words of the gate ``softmax over top_k of |P x| / T``.

    Args:
        prototypes: Where ``P`` lies, ``[components, in]`` fp32.
        components: How many compete.
        top_k: How many of them share a row's weight, at least 1.
        temperature: What similarities are divided by, above 0.

    Raises:
        ValueError: ``top_k`` or ``temperature`` is not.
    """
    if top_k < 1 or temperature <= 0.0:
        raise ValueError(f"top_k is {top_k} and temperature {temperature}; both are above 0")
    (bits,) = struct.unpack("<i", struct.pack("<f", temperature))
    return (prototypes, 0, PROTOTYPE, components, top_k, bits, 0, 0)


def told_words(module: int) -> Words:
    """Words of gates from a first pass; ``module`` is the index among its router's modules."""
    return (0, 0, TOLD, 0, 0, 0, module, 0)
