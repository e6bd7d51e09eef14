"""The table of opcodes, and how an instruction's modifiers are read.

A builder receives the machine, the modifiers and the instruction, and returns a function without
arguments, which executes the instruction for the threads of `machine.mask`. It is called once for
an instruction of a kernel; so is everything that can be refused about one. A builder that leaves a
modifier unread has not understood the instruction: that is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .faults import Unsupported
from .parse import Instruction

_SCALARS = {
    "pred": np.bool_, "u8": np.uint8, "b8": np.uint8, "s8": np.int8,
    "u16": np.uint16, "b16": np.uint16, "s16": np.int16, "f16": np.uint16, "bf16": np.uint16,
    "u32": np.uint32, "b32": np.uint32, "s32": np.int32, "f32": np.float32,
    "f16x2": np.uint32, "bf16x2": np.uint32, "tf32": np.uint32,
    "u64": np.uint64, "b64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
DTYPES = {name: np.dtype(scalar) for name, scalar in _SCALARS.items()}

#: Where the parameters of a kernel are as generic addresses.
PARAMETERS = 0x5_0000_0000

#: Who must execute an instruction together.
ALONE, WARP, WARPGROUP = 0, 1, 2


@dataclass
class Opcode:
    build: Callable
    together: int  # ALONE, WARP or WARPGROUP
    control: bool  # it decides where its threads go on: `build` returns a `Control`


class Control:
    """An instruction after which threads may go on elsewhere, or may not go on yet."""

    def ready(self, mask: np.ndarray) -> np.ndarray:
        """Which of the threads that are here can execute it."""
        return mask

    def run(self, at: int) -> int | None:
        """Executes instruction number ``at``; returns where the threads go on.

        None: they have been told one by one.
        """
        raise NotImplementedError


TABLE: dict[str, Opcode] = {}


def opcode(*names: str, together: int = ALONE, control: bool = False) -> Callable:
    """Registers a builder for opcodes, which are the longest beginnings of an instruction."""

    def register(build: Callable) -> Callable:
        for name in names:
            TABLE[name] = Opcode(build, together, control)
        return build

    return register


@functools.cache
def _name(text: str) -> str | None:
    """The opcode of the table that an instruction's text begins with; the longest."""
    parts = text.split(".")
    names = (".".join(parts[:k]) for k in range(len(parts), 0, -1))
    return next((name for name in names if name in TABLE), None)


class Modifiers:
    """What stands after an opcode, which a builder takes piece by piece."""

    def __init__(self, instruction: Instruction) -> None:
        self.text = instruction.opcode
        name = _name(self.text)
        if name is None:
            raise Unsupported(f"opcode {instruction.text}")
        self.name, self.left = name, self.text[len(name) + 1 :].split(".")
        if self.text == name:
            self.left.clear()

    def one(self, *names: str) -> str:
        """The modifier among ``names`` that is there, "" if none is."""
        for name in names:
            if name in self.left:
                self.left.remove(name)
                return name
        return ""

    def need(self, *names: str) -> str:
        """The same, where one must be there."""
        found = self.one(*names)
        if not found:
            raise Unsupported(f"{self.text} has none of {', '.join(names)}")
        return found

    def kind(self, *allowed: str) -> str:
        """The last modifier, which is a type."""
        if not self.left or self.left[-1] not in (allowed or DTYPES):
            raise Unsupported(f"type of {self.text}")
        return self.left.pop()

    def end(self) -> None:
        if self.left:
            raise Unsupported(f"modifier {'.'.join(self.left)} of {self.text}")
