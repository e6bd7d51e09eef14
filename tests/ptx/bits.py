"""Moves, selections, comparisons, logic and shifts."""

from __future__ import annotations

import numpy as np

from .faults import Unsupported
from .opcodes import DTYPES, Modifiers, opcode
from .parse import Immediate, Vector

_SIZES = ("b16", "b32", "b64")
_COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@opcode("mov")
def move(m, modifiers: Modifiers, instruction):
    kind = modifiers.kind()
    to, source = instruction.operands
    if isinstance(to, Vector) or isinstance(source, Vector):
        return _pack(m, kind, to, source)
    out, value = m.value(to, kind), m.value(source, kind)
    if kind != "pred":
        bits = f"b{8 * out.itemsize}"  # a NaN keeps its bits
        out, value = out.view(DTYPES[bits]), value.view(DTYPES[bits])
    return lambda: m.put(out, value)


def _pack(m, kind: str, to, source):
    """Between a register and its halves or quarters; the lowest bits come first."""
    whole, parts = (source, to.parts) if isinstance(to, Vector) else (to, source.parts)
    size = 8 * DTYPES[kind].itemsize
    each = size // len(parts)
    if f"b{each}" not in _SIZES:
        raise Unsupported(f"mov of {len(parts)} parts of {kind}")
    narrow = DTYPES[f"b{each}"]
    whole = m.value(whole, f"b{size}")
    values = [None if x is None else m.value(x, f"b{each}") for x in parts]
    if isinstance(to, Vector):

        def unpack() -> None:
            split = whole.copy().view(narrow).reshape(-1, len(parts))
            for k, value in enumerate(values):
                if value is not None:
                    m.put(value, split[:, k])

        return unpack

    def pack() -> None:
        m.put(whole, np.stack(values, axis=1).view(whole.dtype)[:, 0])

    return pack


@opcode("selp")
def select(m, modifiers: Modifiers, instruction):
    kind = modifiers.kind()
    out, x, y = (m.value(a, kind) for a in instruction.operands[:3])
    chosen = m.value(instruction.operands[3], "pred")
    bits = DTYPES[f"b{8 * out.itemsize}"]
    out, x, y = out.view(bits), x.view(bits), y.view(bits)
    return lambda: m.put(out, np.where(chosen, x, y))


@opcode("setp")
def compare(m, modifiers: Modifiers, instruction):
    kind = modifiers.kind()
    floats = kind in ("f32", "f64")
    names = [*_COMPARISONS, *(f"{name}u" for name in _COMPARISONS), "num", "nan"]
    name = modifiers.need(*(names if floats else [*_COMPARISONS, *_UNSIGNED_NAMES]))
    ftz = modifiers.one("ftz")
    if (kind[0] == "b" and name not in ("eq", "ne")) or ftz:
        raise Unsupported(modifiers.text)
    out = m.value(instruction.operands[0], "pred")
    x, y = (m.value(a, kind) for a in instruction.operands[1:3])
    if name in ("num", "nan"):
        wanted = name == "nan"
        return lambda: m.put(out, (np.isnan(x) | np.isnan(y)) == wanted)
    unordered = floats and len(name) == 3
    test = _COMPARISONS[name[:2] if unordered else _UNSIGNED_NAMES.get(name, name)]
    if unordered:  # true where a side is NaN
        return lambda: m.put(out, test(x, y) | np.isnan(x) | np.isnan(y))
    if floats and name == "ne":
        return lambda: m.put(out, test(x, y) & ~(np.isnan(x) | np.isnan(y)))
    return lambda: m.put(out, test(x, y))


@opcode("and", "or", "xor", "not")
def logic(m, modifiers: Modifiers, instruction):
    kind = modifiers.kind("pred", *_SIZES)
    out, *inputs = (m.value(a, kind) for a in instruction.operands)
    compute = {
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    }[modifiers.name]  # fmt: skip
    return lambda: m.put(out, compute(*inputs))


@opcode("shl", "shr")
def shift(m, modifiers: Modifiers, instruction):
    """Counts beyond the width shift everything out, or leave the sign."""
    kind = modifiers.kind(*(_SIZES if modifiers.name == "shl" else (
        *_SIZES, "u16", "u32", "u64", "s16", "s32", "s64")))  # fmt: skip
    out, x = (m.value(a, kind) for a in instruction.operands[:2])
    count = m.value(instruction.operands[2], "u32")
    bits = 8 * out.itemsize
    move_by = np.left_shift if modifiers.name == "shl" else np.right_shift
    signed = kind[0] == "s"
    if isinstance(instruction.operands[2], Immediate) and count[0] < bits:
        by = x.dtype.type(count[0])
        return lambda: m.put(out, move_by(x, by))

    def run() -> None:
        near = np.minimum(count, np.uint32(bits - 1)).astype(x.dtype)
        values = move_by(x, near)
        if not signed:
            values = np.where(count >= bits, x.dtype.type(0), values)
        m.put(out, values)

    return run


@opcode("shf")
def funnel(m, modifiers: Modifiers, instruction):
    kind = modifiers.kind("b32")
    side, wrap = modifiers.need("l", "r"), modifiers.need("wrap", "clamp") == "wrap"
    out, low, high, count = (m.value(a, kind) for a in instruction.operands)

    def run() -> None:
        by = (count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        values = both << by >> np.uint64(32) if side == "l" else both >> by
        m.put(out, values.astype(np.uint32))

    return run


@opcode("bfe")
def extract_field(m, modifiers: Modifiers, instruction):
    kind = modifiers.kind("u32", "s32", "u64", "s64")
    out, x = (m.value(a, kind) for a in instruction.operands[:2])
    begin, length = (m.value(a, "u32") for a in instruction.operands[2:])
    bits, signed = 8 * out.itemsize, kind[0] == "s"

    def run() -> None:
        at, count = (v.astype(np.int64) & 255 for v in (begin, length))
        have = np.clip(bits - at, 0, count)  # bits that lie within the register
        above = _ones(have, bits) ^ _ones(np.full(m.threads, bits), bits)
        value = x.view(above.dtype)
        field = np.where(have > 0, value >> np.minimum(at, bits - 1).astype(value.dtype), 0)
        field &= _ones(have, bits)
        if signed:
            last = np.minimum(at + count - 1, bits - 1) % bits
            sign = (value >> last.astype(value.dtype) & value.dtype.type(1)).astype(bool)
            field |= np.where(sign & (count > 0), above, 0)
        m.put(out, field.view(out.dtype))

    return run


def _ones(count: np.ndarray, bits: int) -> np.ndarray:
    """Registers whose lowest bits, so many as ``count`` says, are ones; all if it is larger."""
    dtype = np.dtype(f"u{bits // 8}")
    near = np.minimum(count, bits - 1).astype(dtype)
    ones = (dtype.type(1) << near) - dtype.type(1)
    return np.where(count >= bits, dtype.type(2**bits - 1), ones)


@opcode("bfi")
def insert_field(m, modifiers: Modifiers, instruction):
    kind = modifiers.kind("b32", "b64")
    out, x, y = (m.value(a, kind) for a in instruction.operands[:3])
    begin, length = (m.value(a, "u32") for a in instruction.operands[3:])
    bits = 8 * out.itemsize

    def run() -> None:
        at, count = (v.astype(np.int64) & 255 for v in (begin, length))
        near = np.minimum(at, bits - 1).astype(x.dtype)
        mask = np.where(at < bits, _ones(count, bits) << near, 0).astype(x.dtype)
        m.put(out, y & ~mask | x << near & mask)

    return run


@opcode("copysign")
def copy_sign(m, modifiers: Modifiers, instruction):
    """The sign of the first operand, the rest of the second."""
    kind = modifiers.kind("f32", "f64")
    bits = "b32" if kind == "f32" else "b64"
    out, sign, rest = (m.value(a, bits) for a in instruction.operands)
    top = out.dtype.type(1 << 8 * out.itemsize - 1)
    return lambda: m.put(out, sign & top | rest & ~top)
