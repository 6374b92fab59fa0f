"""PTX as a Python function over numpy arrays, with local variables for registers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import CodeType, TracebackType
from typing import Any

import numpy as np
from ptx import numbers, opcodes
from ptx.cta import Cta
from ptx.fault import Fault
from ptx.numbers import Value
from ptx.program import Instruction, Program, split_operands

_SPECIAL = {"%laneid": "cta.laneid"}
_NOTHING = ("fence.acq_rel", "bar.warp", "wgmma.fence")


class Translation:
    """A program that can be run on a CTA.

    The program becomes a Python function like this one. A register (``r_…``) is an array over the
    threads, and the name of a constant contains its bits and its value::

        def kernel(cta):
         block = 0
         while True:
          if block == 0:
           r_r1 = cta.tid
           r_rd2 = multiply(r_r1, k32_4, 32, 'wide', False)
           r_p1 = r_r1.view(i4) < k32_64.view(i4)
           block = 1
          if block == 1:
           r_r2, = cta.load('global', r_rd2, (4, 1), r_p1, [cta.never_written(32)])
           if cta.taken(r_p1): block = 1; continue
           return
          return
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._written: set[str] = set()
        # All registers that an instruction writes.
        self._destinations = {
            register
            for instruction in program.instructions
            if instruction.operands
            for register in re.findall(r"%?\w+", instruction.operands[0])
        }
        self._constants: dict[str, Value] = {}
        self._lines: list[str] = []
        # The instruction that each line of the function comes from.
        self._origin: dict[int, Instruction] = {}
        self._write()
        self._function = self._compile()

    def run(self, cta: Cta) -> None:
        """Execute from the first instruction to the end.

        Raises:
            Fault: The program broke a rule; the message names the instruction.
        """
        try:
            self._function(cta)
            cta.finish()
        except NameError as error:
            raise Fault(f"a register is read before it is written{self._where(error)}") from error
        except Fault as error:
            raise Fault(f"{error}{self._where(error)}") from error

    def _where(self, error: BaseException) -> str:
        trace: TracebackType | None = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_name == "kernel":
                return f" [{self._origin.get(trace.tb_lineno)}]"
            trace = trace.tb_next
        return ""

    def _compile(self) -> Callable[[Cta], None]:
        code: CodeType = compile("\n".join(self._lines), "<ptx>", "exec")
        names: dict[str, Any] = {"np": np, **vars(numbers), **self._constants}
        exec(code, names)
        return names["kernel"]

    # Structure: blocks in order; a number selects the next one.

    def _write(self) -> None:
        program = self._program
        starts = {0, *program.labels.values()}
        blocks = {at: number for number, at in enumerate(sorted(starts))}
        self._blocks = {name: blocks[at] for name, at in program.labels.items()}
        self._lines = ["def kernel(cta):", " block = 0", " while True:"]
        done = 0
        for at, instruction in enumerate(program.instructions):
            if at in blocks:
                self._lines += [f"   block = {blocks[at]}"] if at else []
                self._lines.append(f"  if block == {blocks[at]}:")
            if at < done:
                continue
            products = self._products(at, starts)
            done = at + max(1, len(products))
            lines = [self._multiply(products)] if products else self._statements(instruction)
            for line in lines:
                self._lines.append(f"   {line}")
                self._origin[len(self._lines)] = instruction
        self._lines.append("  return")

    def _products(self, first: int, starts: set[int]) -> list[Instruction]:
        """Consecutive independent ``mma`` instructions, which can be computed at once."""
        found: list[Instruction] = []
        written: set[str] = set()
        for at, instruction in enumerate(self._program.instructions[first:], start=first):
            read = {r for o in instruction.operands[1:] for r in self._vector(o)}
            if (
                not instruction.opcode.startswith("mma.")
                or instruction.guard is not None
                or (found and (at in starts or instruction.opcode != found[0].opcode))
                or read & written
            ):
                break
            found.append(instruction)
            written.update(self._vector(instruction.operands[0]))
        return found

    def _multiply(self, products: list[Instruction]) -> str:
        parts = products[0].opcode.split(".")
        if "m16n8k16" not in parts:
            raise NotImplementedError(str(products[0]))
        operands = [
            f"({', '.join(self._list(o) for o in product.operands[1:4])})" for product in products
        ]
        written = tuple(r for product in products for r in self._vector(product.operands[0]))
        # A later product may write registers that an earlier one read or wrote.
        return self._assign_all(written, f"cta.multiply([{', '.join(operands)}], {parts[-2]!r})")

    # Operands

    def _register(self, name: str) -> str:
        return name.replace("%", "r_") if name.startswith("%") else f"s_{name}"

    def _operand(self, text: str, bits: int) -> str:
        if self._program.is_register(text):
            return self._register(text)
        if text in _SPECIAL:
            return _SPECIAL[text]
        if match := re.fullmatch(r"%(tid|ctaid|nctaid)\.([xyz])", text):
            axis = "xyz".index(match[2])
            if match[1] == "tid":
                return "cta.tid" if axis == 0 else "u4(0)"
            return f"cta.{match[1]}[{axis}]"
        if text == "global_smem":
            return f"u{bits // 8}(0)"
        if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
            return self._constant(int(match[1], 16), 32)
        if bits == 1:
            return f"np.bool_({int(text, 0) != 0})"
        return self._constant(int(text.rstrip("U"), 0), bits)

    def _packed(self, text: str, bits: int) -> str:
        """An operand that is packed together with others.

        For irrelevant bytes, compilers pack registers that nothing writes.
        """
        if self._program.is_register(text) and text not in self._destinations:
            return f"cta.never_written({bits})"
        return self._operand(text, bits)

    def _constant(self, value: int, bits: int) -> str:
        """The name of a constant, which contains its value; see ``opcodes.constant``."""
        value &= (1 << bits) - 1
        name = f"k{bits}_{value}"
        self._constants[name] = numbers.UNSIGNED[bits](value)
        return name

    def _bits(self, register: str) -> int:
        kind = self._program.type_of(register)
        return 1 if kind == "pred" else opcodes.bits_of(kind)

    def _address(self, text: str) -> str:
        match = re.fullmatch(r"\[\s*(\S+?)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
        if match is None:
            raise NotImplementedError(f"address {text}")
        base, offset = self._operand(match[1], 64), int(match[2] or "0", 0)
        if self._program.is_register(match[1]) and self._bits(match[1]) == 32:
            return f"({base}.astype(i8) + {offset})" if offset else base
        return f"({base} + {self._constant(offset, 64)})" if offset else base

    @staticmethod
    def _vector(text: str) -> tuple[str, ...]:
        return split_operands(text.strip("{} "))

    def _list(self, text: str, bits: int = 32) -> str:
        return f"[{', '.join(self._operand(o, bits) for o in self._vector(text))}]"

    def _guard(self, instruction: Instruction) -> str:
        if instruction.guard is None:
            return "None"
        name = self._register(instruction.guard)
        return f"~{name}" if instruction.negated else name

    # Statements

    def _assign(self, register: str, value: str, guard: str) -> str:
        if register == "_":
            return value
        name = self._register(register)
        if guard != "None":
            bits = self._bits(register)
            old = name if name in self._written else "np.bool_(False)"
            if name not in self._written and bits > 1:
                old = f"cta.never_written({bits})"
            value = f"np.where({guard}, {value}, {old})"
        self._written.add(name)
        return f"{name} = {value}"

    def _assign_all(self, registers: tuple[str, ...], value: str) -> str:
        names = [self._register(r) for r in registers]
        self._written.update(names)
        return f"{', '.join(names)}, = {value}"

    def _old(self, registers: tuple[str, ...]) -> str:
        values = [
            self._register(r)
            if self._register(r) in self._written
            else f"cta.never_written({self._bits(r)})"
            for r in registers
        ]
        return f"[{', '.join(values)}]"

    def _statements(self, ins: Instruction) -> Iterator[str]:
        name, _, rest = ins.opcode.partition(".")
        if ins.opcode.startswith(_NOTHING):
            yield "pass"
        elif name == "bra":
            jump = f"block = {self._blocks[ins.operands[0]]}; continue"
            yield jump if ins.guard is None else f"if cta.taken({self._guard(ins)}): {jump}"
        elif name == "ret":
            yield "return" if ins.guard is None else f"if cta.taken({self._guard(ins)}): return"
        elif name in ("bar", "barrier"):
            yield "cta.barrier()"
        elif name == "fence":
            yield "cta.shared.fence()"
        elif name in ("ld", "st"):
            yield self._memory(ins, name, rest)
        elif name == "cp":
            yield self._copy(ins)
        elif name == "atom":
            yield self._atomic(ins)
        elif name in ("ldmatrix", "stmatrix", "wgmma"):
            if ins.guard is not None:
                raise NotImplementedError(f"{ins}: guarded")
            yield self._matrix(ins, name)
        elif name == "mov":
            yield from self._move(ins)
        else:
            yield self._compute(ins, name)

    def _compute(self, ins: Instruction, name: str) -> str:
        to, *sources = ins.operands
        kinds = ins.opcode.split(".")
        if name == "shfl":
            value, source = (self._operand(o, 32) for o in sources[:2])
            shuffled = f"cta.shuffle({value}, {source}, {kinds[2]!r})"
            return self._assign(to.split("|")[0], shuffled, self._guard(ins))
        if name == "redux":
            value, mask = (self._operand(o, 32) for o in sources)
            reduced = f"cta.reduce_warps({value}, {mask}, {kinds[2]!r}, {kinds[3][0] == 's'})"
            return self._assign(to, reduced, self._guard(ins))
        bits = 1 if kinds[-1] == "pred" else opcodes.bits_of(kinds[-1])
        widths = [bits] * len(sources)
        if name in ("shl", "shr"):
            widths[1] = 32
        elif name == "selp":
            widths[2] = 1
        elif name == "mad" and "wide" in kinds:
            widths[2] = 2 * bits
        texts = [self._operand(o, w) for o, w in zip(sources, widths, strict=True)]
        if name == "prmt":
            texts[:2] = (self._packed(o, 32) for o in sources[:2])
        if name == "lop3":
            texts[3] = str(int(sources[3].rstrip("U"), 0))
        return self._assign(to, opcodes.expression(ins.opcode, texts), self._guard(ins))

    def _move(self, ins: Instruction) -> Iterator[str]:
        to, source = ins.operands
        guard, kind = self._guard(ins), ins.opcode.split(".")[-1]
        bits = 1 if kind == "pred" else opcodes.bits_of(kind)
        if to.startswith("{"):
            registers = self._vector(to)
            width = bits // len(registers)
            text = self._operand(source, bits)
            for i, register in enumerate(registers):
                part = f"({text} >> u{bits // 8}({i * width})).astype(u{width // 8})"
                yield self._assign(register, part, guard)
        elif source.startswith("{"):
            parts = self._vector(source)
            width = bits // len(parts)
            terms = [
                f"({self._packed(p, width)}.astype(u{bits // 8}) << u{bits // 8}({i * width}))"
                for i, p in enumerate(parts)
            ]
            yield self._assign(to, " | ".join(terms), guard)
        else:
            yield self._assign(to, self._operand(source, bits), guard)

    def _memory(self, ins: Instruction, name: str, rest: str) -> str:
        parts = rest.split(".")
        kind = parts[-1]
        if parts[0] == "param":
            match = re.fullmatch(r"\[(\w+)\]", ins.operands[1])
            if match is None:
                raise NotImplementedError(str(ins))
            number, bits = self._program.parameters.index(match[1]), self._bits(ins.operands[0])
            value = f"cta.arguments[{number}]"
            if kind[0] == "s" and bits > opcodes.bits_of(kind):
                value = f"int(i{opcodes.bits_of(kind) // 8}(u4({value})))"
            return self._assign(
                ins.operands[0], f"u{bits // 8}({value} & {(1 << bits) - 1})", self._guard(ins)
            )
        space = next(p for p in parts if p.startswith(("global", "shared"))).split("::")[0]
        size = opcodes.bits_of(kind) // 8
        registers_at, address_at = (0, 1) if name == "ld" else (1, 0)
        registers = self._vector(ins.operands[registers_at])
        address, guard = self._address(ins.operands[address_at]), self._guard(ins)
        if name == "st":
            values = self._list(ins.operands[registers_at], max(16, 8 * size))
            return f"cta.store({space!r}, {address}, {values}, {size}, {guard})"
        old = "None" if guard == "None" else self._old(registers)
        loaded = f"cta.load({space!r}, {address}, ({size}, {len(registers)}), {guard}, {old})"
        width = self._bits(registers[0]) // 8
        if kind[0] == "s" and width > size:
            if guard != "None":
                raise NotImplementedError(f"{ins}: guarded and signed")
            widen = f"x.astype(u{size}).view(i{size}).astype(i{width}).view(u{width})"
        else:
            widen = f"x.astype(u{width})"
        return self._assign_all(
            registers, loaded if width == size else f"[{widen} for x in {loaded}]"
        )

    def _atomic(self, ins: Instruction) -> str:
        parts, (to, address, value) = ins.opcode.split("."), ins.operands
        semantics = next((p for p in parts if p in ("relaxed", "acq_rel")), None)
        if semantics is None or not {"global", "gpu", "add", "u32"} <= set(parts):
            raise NotImplementedError(str(ins))
        (old,) = self._old((to,)).strip("[]").split(", ")[:1]
        arguments = f"{self._address(address)}, {self._operand(value, 32)}, {self._guard(ins)}"
        self._written.add(self._register(to))
        return f"{self._register(to)} = cta.add_to_word({arguments}, {old}, {semantics!r})"

    def _copy(self, ins: Instruction) -> str:
        if "commit_group" in ins.opcode:
            return "cta.shared.commit_copies()"
        if "wait" in ins.opcode:
            return f"cta.shared.wait_copies({ins.operands[0] if ins.operands else 0})"
        to, source, size, *held = ins.operands
        text = self._operand(held[0], 32) if held else f"u4({size})"
        to, source = self._address(to), self._address(source)
        return f"cta.copy({to}, {source}, {int(size, 0)}, {text}, {self._guard(ins)})"

    def _matrix(self, ins: Instruction, name: str) -> str:
        parts, operands = ins.opcode.split("."), ins.operands
        transposed = "trans" in parts
        if name == "ldmatrix":
            registers = self._vector(operands[0])
            address = self._address(operands[1])
            loaded = f"cta.load_matrices({address}, {len(registers)}, {transposed})"
            return self._assign_all(registers, loaded)
        if name == "stmatrix":
            address, values = self._address(operands[0]), self._list(operands[1])
            return f"cta.store_matrices({address}, {values}, {transposed})"
        return self._group(ins, parts)

    def _group(self, ins: Instruction, parts: list[str]) -> str:
        if parts[1] == "commit_group":
            return "cta.shared.commit_products()"
        if parts[1] == "wait_group":
            return f"cta.shared.wait_products({ins.operands[0]})"
        shape = re.search(r"m64n(\d+)k16", ins.opcode)
        d, a, b, scale, *rest = ins.operands
        if shape is None or rest[:2] != ["1", "1"]:
            raise NotImplementedError(str(ins))
        in_registers = a.startswith("{")
        transposed = [r == "1" for r in rest[2:]]
        if in_registers:
            transposed.insert(0, False)
        left = self._list(a) if in_registers else self._operand(a, 64)
        options = f"({parts[-1]!r}, {shape[1]}, {transposed[0]}, {transposed[1]}"
        options += f", {self._operand(scale, 1)})"
        registers = self._vector(d)
        # Without an initial sum, the registers may be unwritten.
        before = f"[u4(0)] * {len(registers)}" if scale == "0" else self._list(d)
        value = f"cta.multiply_group({left}, {self._operand(b, 64)}, {before}, {options})"
        return self._assign_all(registers, value)
