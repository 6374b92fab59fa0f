"""PTX text of one kernel as a list of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Instruction:
    """One statement.

    Attributes:
        opcode: The opcode with its dotted suffixes.
        operands: The operands as written, with whole vectors ``{…}`` and addresses ``[…]``.
        guard: The predicate register that decides per thread, or None.
        negated: Whether threads run if the guard is false.
    """

    opcode: str
    operands: tuple[str, ...]
    guard: str | None = None
    negated: bool = False

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".strip()


@dataclass(frozen=True, slots=True)
class Program:
    """A kernel.

    Attributes:
        instructions: The instructions in order.
        labels: The index of the instruction after each label.
        parameters: The names of the kernel's parameters, in order.
        num_threads: The number of threads of a CTA.
        types: The type (``b32``, ``pred`` …) by register name, or by prefix of numbered registers.
    """

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    parameters: tuple[str, ...]
    num_threads: int
    types: dict[str, str]

    def type_of(self, register: str) -> str:
        """The declared type of a register.

        Raises:
            KeyError: The register is not declared.
        """
        if register in self.types:
            return self.types[register]
        return self.types[register.rstrip("0123456789")]

    def is_register(self, operand: str) -> bool:
        """Whether an operand names a declared register."""
        return operand in self.types or operand.rstrip("0123456789") in self.types


def split_operands(text: str) -> tuple[str, ...]:
    """Split at commas outside of brackets."""
    found, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += character
    return tuple([*found, current.strip()] if current.strip() else found)


def parse(ptx: str) -> Program:
    """Read Triton's PTX of a module with one kernel.

    Raises:
        ValueError: The text has no kernel.
    """
    text = re.sub(r"//[^\n]*", "", ptx)
    entry = re.search(r"\.entry\s+[\w$]+\s*\((.*?)\)\s*((?:\.\w+[^\n{]*\s*)*)\{", text, re.S)
    if entry is None:
        raise ValueError("no kernel")
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", entry.group(2))
    if threads is None:
        raise ValueError("the number of threads is not fixed")
    parameters = tuple(re.findall(r"(\w+_param_\d+)", entry.group(1)))
    body = text[entry.end() :].split("$L__func_end0")[0]
    body = re.sub(r"\.(?:loc|pragma)[^\n]*", "", body)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    types: dict[str, str] = {}
    for statement in body.split(";"):
        rest = statement.strip()
        # Scopes of inline assembly, and labels. An instruction never begins with a brace.
        while match := re.match(r"([{}])|([\w$]+):", rest):
            if match.group(2):
                labels[match.group(2)] = len(instructions)
            rest = rest[match.end() :].strip()
        if rest.startswith(".reg"):
            _, kind, names = rest.split(None, 2)
            types.update((re.sub(r"<\d+>$", "", n), kind[1:]) for n in split_operands(names))
        elif rest:
            instructions.append(_instruction(rest))
    return Program(tuple(instructions), labels, parameters, int(threads.group(1)), types)


def _instruction(text: str) -> Instruction:
    guard = re.match(r"@(!?)(%?\w+)\s+", text)
    rest = text[guard.end() :] if guard else text
    opcode, *operands = rest.split(None, 1)
    return Instruction(
        opcode,
        split_operands(operands[0]) if operands else (),
        guard.group(2) if guard else None,
        bool(guard and guard.group(1)),
    )
