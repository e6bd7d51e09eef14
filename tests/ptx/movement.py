"""Loads and stores."""

from __future__ import annotations

import numpy as np

from .faults import Unsupported
from .memory import Shared
from .opcodes import DTYPES, Modifiers, opcode
from .parse import Address, Immediate, Register, Symbol, Vector

_HINTS = (
    "nc", "L1::evict_last", "L1::evict_first", "L1::no_allocate", "L2::128B", "L2::64B", "L2::256B"
)  # fmt: skip


def address(m, operand: Address, kind: str):
    """A function that returns the addresses of all threads, as ``kind`` (u32 or u64)."""
    base = operand.base
    dtype = DTYPES[kind]
    if isinstance(base, Symbol):
        place = m.kernel.parameters.get(base.name, Shared.BASE)
        constant = np.full(m.threads, place + operand.offset, dtype)
        return lambda: constant
    if isinstance(base, Immediate):
        constant = np.full(m.threads, int(base.text, 0) + operand.offset, dtype)
        return lambda: constant
    found = m.value(base, "u64" if base.bytes == 8 else "u32")
    offset = dtype.type(operand.offset & (1 << 8 * dtype.itemsize) - 1)
    if found.dtype == dtype:
        return (lambda: found + offset) if operand.offset else (lambda: found)
    return lambda: found.astype(dtype) + offset


class _Target:
    """A register that takes loaded values, wider ones with a sign where the type has one."""

    def __init__(self, m, register: Register | None, kind: str) -> None:
        self.m, self.sink = m, register is None
        if self.sink:
            return
        self.dtype = DTYPES[kind]
        self.register = m.register(register)
        if self.register.dtype == bool or self.register.itemsize < self.dtype.itemsize:
            raise Unsupported(f"{kind} into {register.name}")
        signed = self.dtype.kind == "i"
        self.wide = self.register.view(f"{'i' if signed else 'u'}{self.register.itemsize}")

    def put(self, bits: np.ndarray) -> None:
        """``bits``, of the executing threads or of all, are unsigned, of the type's width."""
        if not self.sink:
            values = bits.view(f"i{bits.itemsize}") if self.dtype.kind == "i" else bits
            self.wide[self.m.index] = values


def _parts(operand) -> tuple:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _shape(modifiers: Modifiers, parts: tuple) -> None:
    count = {"": 1, "v2": 2, "v4": 4}[modifiers.one("v2", "v4")]
    if count != len(parts):
        raise Unsupported(f"{modifiers.text} of {len(parts)} registers")


@opcode("ld")
def load(m, modifiers: Modifiers, instruction):
    kind = modifiers.kind()
    space = modifiers.need("param", "global", "shared")
    if space == "global":
        while modifiers.one(*_HINTS):
            pass
    to, source = instruction.operands[:2]
    if len(instruction.operands) > 2:
        raise Unsupported(instruction.text)
    targets = [_Target(m, part, kind) for part in _parts(to)]
    _shape(modifiers, targets)
    each, count = DTYPES[kind].itemsize, len(targets)
    if space == "param" and isinstance(source.base, Symbol):
        return _parameter(m, source, targets, each)
    where = address(m, source, "u32" if space == "shared" else "u64")
    fetch = {"param": _parameters(m), "global": m.memory.load, "shared": m.shared.load}[space]

    def run() -> None:
        values = fetch(where()[m.index], each, count)
        for k, target in enumerate(targets):
            target.put(values[:, k])

    return run


def _parameter(m, source: Address, targets: list[_Target], each: int):
    """A load from the same place for all threads."""
    begin, size = m.kernel.parameters[source.base.name] + source.offset, each * len(targets)
    if begin < 0 or begin + size > len(m.parameters) or begin % size:
        raise m.fault("parameter out of bounds or misaligned")
    values = m.parameters[begin : begin + size].view(f"u{each}")

    def run() -> None:
        for target, value in zip(targets, values, strict=True):
            target.put(value)

    return run


def _parameters(m):
    def fetch(at: np.ndarray, each: int, count: int) -> np.ndarray:
        at = at.astype(np.int64)
        if at.max() + each * count > len(m.parameters) or (at % (each * count)).any():
            raise m.fault("parameter out of bounds or misaligned")
        places = at[:, None] + np.arange(each * count)
        return np.ascontiguousarray(m.parameters[places]).view(f"u{each}")

    return fetch


@opcode("st")
def store(m, modifiers: Modifiers, instruction):
    kind = modifiers.kind()
    space = modifiers.need("global", "shared")
    if space == "global":
        while modifiers.one(*_HINTS):
            pass
    parts = _parts(instruction.operands[1])
    _shape(modifiers, parts)
    each = DTYPES[kind].itemsize
    sources = [_source(m, part, each) for part in parts]
    where = address(m, instruction.operands[0], "u32" if space == "shared" else "u64")
    write = m.memory.store if space == "global" else m.shared.store
    dtype = np.dtype(f"u{each}")

    def run() -> None:
        index = m.index
        values = np.stack([source[index] for source in sources], axis=1).astype(dtype)
        write(where()[index], values)

    return run


def _source(m, operand, each: int) -> np.ndarray:
    """The bits that are stored: a register may be wider than the type."""
    if isinstance(operand, Register):
        register = m.register(operand)
        if register.dtype == bool or register.itemsize < each:
            raise Unsupported(f"{operand.name} as {each} bytes")
        return register
    return m.value(operand, f"b{8 * each}")
