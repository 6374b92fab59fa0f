"""Python expressions for instructions that only compute: registers in, one register out.

``expression`` takes operands as Python text; names are those of ``numbers.py``.
"""

from __future__ import annotations

import itertools
import re

_COMPARE = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
_BITWISE = {"and": "&", "or": "|", "xor": "^"}
_ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_FLOAT = {
    "neg": "-{}", "abs": "np.abs({})", "ex2": "np.exp2({})", "lg2": "np.log2({})",
    "sqrt": "np.sqrt({})", "rcp": "f4(1) / {}", "rsqrt": "f4(1) / np.sqrt({})",
    "tanh": "np.tanh({})",
}  # fmt: skip
_ROUNDINGS = ("rn", "rz", "rzi", "rni", "rmi", "rpi", "rna")
_TO_WHOLE = {"rni": "np.rint", "rzi": "np.trunc", "rpi": "np.ceil", "rmi": "np.floor"}
# Common functions of three words in a ``lop3`` instruction, by their truth table of eight bits.
_FUNCTIONS = {
    eval(text, {"a": 0xF0, "b": 0xCC, "c": 0xAA}) & 0xFF: text
    for form in ("({0}a {3} {1}b) {4} {2}c", "{0}a {3} ({1}b {4} {2}c)")
    for signs in itertools.product(("~", ""), repeat=3)
    for joins in itertools.product("&|^", repeat=2)
    for text in (form.format(*signs, *joins),)
}
_HALVES = ("bf16", "f16", "bf16x2", "f16x2")


def bits_of(kind: str) -> int:
    """The width of a type in bits."""
    if kind.endswith("x2"):
        return 32
    return int(re.sub(r"\D", "", kind.replace("bf", "f")))


def constant(operand: str) -> int | None:
    """The number in an operand's text, or None for a register."""
    match = re.fullmatch(r"k\d+_(\d+)", operand)
    return None if match is None else int(match[1])


def expression(opcode: str, operands: list[str]) -> str:
    """The value of the destination.

    Args:
        opcode: The opcode with suffixes.
        operands: The sources.

    Raises:
        NotImplementedError: The opcode is unknown.
    """
    name, *parts = opcode.split(".")
    kind = parts[-1]
    if name == "cvt":
        return _convert(parts, operands)
    if name == "setp":
        return _compare(parts[0], kind, operands)
    if name == "selp":
        return f"np.where({operands[2]}, {operands[0]}, {operands[1]})"
    if name == "not":
        return f"~{operands[0]}"
    if name in _BITWISE:
        return f"{operands[0]} {_BITWISE[name]} {operands[1]}"
    if kind in _HALVES:
        return _half(name, kind, operands)
    if kind == "f32":
        return _float(name, parts, operands)
    return _integer(name, parts, operands)


def _view(operand: str, kind: str) -> str:
    if kind == "f32":
        return f"{operand}.view(f4)"
    return f"{operand}.view(i{bits_of(kind) // 8})" if kind[0] == "s" else operand


def _compare(test: str, kind: str, operands: list[str]) -> str:
    a, b = (_view(operand, kind) for operand in operands[:2])
    if kind == "f32":
        ordered = f"~(np.isnan({a}) | np.isnan({b}))"
        if test == "nan":
            return f"~({ordered})"
        if test == "num":
            return ordered
        if test.endswith("u") and test[:-1] in _COMPARE:
            return f"({a} {_COMPARE[test[:-1]]} {b}) | ~({ordered})"
        return f"({a} {_COMPARE[test]} {b}) & {ordered}"
    return f"{a} {_COMPARE[test]} {b}"


def _convert(parts: list[str], operands: list[str]) -> str:
    to, source = [p for p in parts if p not in (*_ROUNDINGS, "ftz", "sat", "satfinite")]
    a = operands[0]
    if to in ("bf16x2", "f16x2"):
        # The first source becomes the upper half.
        low, high = (f"to_half({x}.view(f4), {to!r})" for x in (operands[1], a))
        return f"pack({low}, {high})"
    if to in _HALVES and source == "f32":
        return f"to_half({a}.view(f4), {to!r})"
    if to == "f32" and source in _HALVES:
        return f"from_half({a}, {source!r}).view(u4)"
    rounded = next((_TO_WHOLE[p] for p in parts if p in _TO_WHOLE), "")
    if to == "f32":
        return f"{rounded}({_view(a, source)}).astype(f4).view(u4)"
    if source == "f32":
        return f"{rounded}({a}.view(f4)).astype(i8).astype(u{bits_of(to) // 8})"
    width = bits_of(to) // 8
    narrowed = f"{a}.astype({'i' if source[0] == 's' else 'u'}{bits_of(source) // 8})"
    if source[0] == "s":
        narrowed = f"{narrowed}.astype(i{width}).view(u{width})"
    return f"{narrowed}.astype(u{max(width, 2)})"


def _float(name: str, parts: list[str], operands: list[str]) -> str:
    if name == "fma":
        return f"fma({', '.join(operands)})"
    views = [f"{operand}.view(f4)" for operand in operands]
    if name in _FLOAT:
        value = _FLOAT[name].format(*views)
    elif name in _ARITHMETIC:
        value = f"{views[0]} {_ARITHMETIC[name]} {views[1]}"
    elif name in ("max", "min"):
        function = f"np.{name}imum" if "NaN" in parts else f"np.f{name}"
        value = f"{function}({', '.join(views)})"
    else:
        raise NotImplementedError(f"{name}.{'.'.join(parts)}")
    return f"({value}).view(u4)"


def _half(name: str, kind: str, operands: list[str]) -> str:
    def on(sources: list[str]) -> str:
        if name == "fma":
            a, b, c = (f"{s}.astype(f8)" for s in sources)
            return f"({a} * {b} + {c}).astype(f4)"
        if name == "neg":
            return f"-{sources[0]}"
        if name in ("max", "min"):
            return f"np.f{name}({', '.join(sources)})"
        if name in ("add", "sub", "mul"):
            return f"{sources[0]} {_ARITHMETIC[name]} {sources[1]}"
        raise NotImplementedError(f"{name}.{kind}")

    if not kind.endswith("x2"):
        return f"to_half({on([f'from_half({o}, {kind!r})' for o in operands])}, {kind!r})"
    low = on([f"from_half({o} & u4(0xFFFF), {kind!r})" for o in operands])
    high = on([f"from_half({o} >> u4(16), {kind!r})" for o in operands])
    return f"pack(to_half({low}, {kind!r}), to_half({high}, {kind!r}))"


def _integer(name: str, parts: list[str], operands: list[str]) -> str:
    kind = parts[-1]
    signed = kind[0] == "s"
    a, b, *rest = (*operands, "")
    if name == "lop3":
        return _logic(operands)
    if name == "prmt":
        return f"permute_bytes({', '.join(operands)})"
    if name == "popc":
        return f"np.bitwise_count({a}).astype(u4)"
    bits = bits_of(kind)
    if name in ("mul", "mad"):
        product = f"multiply({a}, {b}, {bits}, {parts[0]!r}, {signed})"
        return f"{product} + {rest[0]}" if name == "mad" else product
    if name in ("div", "rem"):
        return f"divide({a}, {b}, {bits}, {signed}, {name == 'rem'})"
    if name in ("add", "sub"):
        return f"{a} {_ARITHMETIC[name]} {b}"
    if name in ("shl", "shr"):
        return _shift(name, a, b, bits, signed)
    if name == "bfe":
        start, length = constant(b), constant(rest[0])
        if not signed and start is not None and length is not None and start + length <= 32:
            return f"({a} >> u4({start})) & u4({(1 << length) - 1})"
        return f"extract_bits({a}, {b}, {rest[0]}, {signed})"
    if name in ("min", "max"):
        chosen = f"np.{name}imum({_view(a, kind)}, {_view(b, kind)})"
        return f"{chosen}.view(u{bits // 8})"
    if name == "neg":
        return f"~{a} + u{bits // 8}(1)"
    if name == "abs":
        return f"np.abs({_view(a, kind)}).view(u{bits // 8})"
    raise NotImplementedError(f"{name}.{'.'.join(parts)}")


def _shift(name: str, value: str, count: str, bits: int, signed: bool) -> str:
    by = constant(count)
    if by is None or by >= bits:
        if name == "shl":
            return f"shift_left({value}, {count}, {bits})"
        return f"shift_right({value}, {count}, {bits}, {signed})"
    width = bits // 8
    if name == "shl":
        return f"{value} << u{width}({by})"
    if signed:
        return f"({value}.view(i{width}) >> i{width}({by})).view(u{width})"
    return f"{value} >> u{width}({by})"


def _logic(operands: list[str]) -> str:
    """``lop3``: any function of three bits."""
    a, b, c, table = *operands[:3], int(operands[3])
    found = _FUNCTIONS.get(table)
    if found is None:
        return f"logic({a}, {b}, {c}, {table})"
    return re.sub(r"[abc]", lambda match: {"a": a, "b": b, "c": c}[match[0]], found)
