"""Conversions."""

from __future__ import annotations

import numpy as np

from .faults import Unsupported
from .opcodes import DTYPES, PARAMETERS, Modifiers, opcode
from .parse import Register
from .scalar import canonical, flushed

_FLOATS = ("f16", "bf16", "f32", "f64")
_TO_INTEGERS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to nearest even, as bits."""
    bits = x.view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return np.where(np.isnan(x), np.uint32(0x7FFF), nearest >> np.uint32(16)).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_f16(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def from_f16(bits: np.ndarray) -> np.ndarray:
    return canonical(bits.view(np.float16).astype(np.float32))


def to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 rounded to nearest, ties away from zero, as bits."""
    nearest = x.view(np.uint32) + np.uint32(0x1000) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), nearest)


def to_integer(x: np.ndarray, dtype: np.dtype, source_bits: int) -> np.ndarray:
    """Whole floats as integers: what is out of range becomes the nearest one.

    NaN becomes 0, and of or to 64 bits the middle of the range (PTX ISA, cvt).
    """
    info = np.iinfo(dtype)
    wide = source_bits == 64 or info.bits == 64
    nan = (info.min if info.min else 1 << info.bits - 1) if wide else 0
    clipped = [
        nan if v != v else info.min if v <= info.min else info.max if v >= info.max else int(v)
        for v in x.tolist()
    ]
    return np.array(clipped, dtype)


@opcode("cvt")
def convert(m, modifiers: Modifiers, instruction):
    if modifiers.left[-2:] in (["bf16x2", "f32"], ["f16x2", "f32"]):
        return _packed(m, modifiers, instruction)
    source = modifiers.kind()
    target = modifiers.kind()
    if target == "tf32":
        modifiers.need("rna")
        out, x = m.value(instruction.operands[0], "b32"), m.value(instruction.operands[1], source)
        return lambda: m.put(out, to_tf32(x))
    compute = _conversion(modifiers, target, source)
    out, x = (
        _operand(m, instruction.operands[0], target),
        _operand(m, instruction.operands[1], source),
    )
    narrow = DTYPES[source]
    if x.dtype != narrow:  # a byte lies in a register of 16 bits
        return lambda: m.put(out, compute(x.view(np.uint16).astype(np.uint8).view(narrow)))
    return lambda: m.put(out, compute(x))


def _operand(m, operand, kind: str) -> np.ndarray:
    if kind in ("u8", "s8") and isinstance(operand, Register) and operand.bytes == 2:
        return m.value(operand, kind[0] + "16")
    return m.value(operand, kind)


def _conversion(modifiers: Modifiers, target: str, source: str):
    dtype, bits = DTYPES[target], 8 * DTYPES[source].itemsize
    if source not in _FLOATS and target not in _FLOATS:
        return lambda x: x.astype(dtype)
    if source not in _FLOATS:
        if target not in ("f32", "f64"):
            raise Unsupported(modifiers.text)
        modifiers.need("rn")
        return lambda x: x.astype(dtype)
    if target not in _FLOATS:
        if source not in ("f32", "f64"):
            raise Unsupported(modifiers.text)
        how = _TO_INTEGERS[modifiers.need(*_TO_INTEGERS)]
        ftz = modifiers.one("ftz")
        return lambda x: to_integer(how(flushed(x) if ftz else x), dtype, bits)
    return _between_floats(modifiers, target, source)


def _between_floats(modifiers: Modifiers, target: str, source: str):
    if (source, target) == ("f32", "f32"):
        return _within_float32(modifiers)
    if (source, target) == ("f64", "f64"):
        how = _TO_INTEGERS[modifiers.need(*_TO_INTEGERS)]
        return lambda x: canonical(how(x))
    if (source, target) in (("f16", "f32"), ("bf16", "f32")):
        return from_f16 if source == "f16" else from_bf16
    if (source, target) == ("f32", "f64"):
        return lambda x: canonical(x.astype(np.float64))
    modifiers.need("rn")
    if (source, target) == ("f64", "f32"):
        return lambda x: canonical(x.astype(np.float32))
    if source == "f32":
        return to_f16 if target == "f16" else to_bf16
    raise Unsupported(modifiers.text)


def _within_float32(modifiers: Modifiers):
    how, ftz = modifiers.one(*_TO_INTEGERS), modifiers.one("ftz")
    saturate = modifiers.one("sat")
    if not (how or ftz or saturate):
        raise Unsupported(modifiers.text)

    def compute(x: np.ndarray) -> np.ndarray:
        x = flushed(x) if ftz else x
        x = _TO_INTEGERS[how](x) if how else x
        if saturate:
            x = np.where(x > 0, np.minimum(x, np.float32(1)), np.float32(0))
        return canonical(np.array(x))

    return compute


def _packed(m, modifiers: Modifiers, instruction):
    """Two floats in one register, the first operand in the upper half."""
    modifiers.kind("f32")
    narrow = to_bf16 if modifiers.kind("bf16x2", "f16x2") == "bf16x2" else to_f16
    modifiers.need("rn")
    out = m.value(instruction.operands[0], "b32")
    high, low = (m.value(a, "f32") for a in instruction.operands[1:])
    upper = np.uint32(16)
    return lambda: m.put(out, narrow(high).astype(np.uint32) << upper | narrow(low))


@opcode("cvta")
def convert_address(m, modifiers: Modifiers, instruction):
    """Addresses of global memory are generic ones; parameters have a window of their own."""
    modifiers.one("to")
    space = modifiers.need("global", "param")
    kind = modifiers.kind("u64")
    out, x = (m.value(a, kind) for a in instruction.operands)
    offset = np.uint64(PARAMETERS if space == "param" else 0)
    return lambda: m.put(out, x + offset)
