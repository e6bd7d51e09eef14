"""Arithmetic of integers and floats.

A float result that is NaN is the hardware's NaN, 0x7fffffff. The approximate instructions (ex2,
lg2, rcp.approx, …) are computed in float64 and rounded.
"""

from __future__ import annotations

import numpy as np

from .faults import Unsupported
from .opcodes import DTYPES, Modifiers, opcode

SMALLEST = np.float32(2.0**-126)  # of the normal floats
_ROUNDINGS = ("rn", "rz", "rm", "rp")


def canonical(values: np.ndarray) -> np.ndarray:
    """The same floats, in place, with every NaN as the hardware makes it."""
    if values.size and np.isnan(values.ravel().dot(values.ravel())):
        _canonical_nan(values)
    return values


_NANS = {4: (np.uint32, np.uint32(0x7FFFFFFF)), 8: (np.uint64, np.uint64(2**63 - 1))}


def _canonical_nan(values: np.ndarray) -> None:
    bits, nan = _NANS[values.itemsize]
    np.copyto(values.view(bits), nan, where=values != values)


def flushed(values: np.ndarray) -> np.ndarray:
    """Subnormal float32 numbers become zeros of their sign."""
    return np.where(np.abs(values) < SMALLEST, np.copysign(np.float32(0), values), values)


def rounded(exact: np.ndarray, mode: str) -> np.ndarray:
    """float64 numbers rounded to float32 towards zero, down (rm) or up (rp)."""
    nearest = exact.astype(np.float32)
    back = nearest.astype(np.float64)
    low, high = np.float32(-np.inf), np.float32(np.inf)
    down, up = np.nextafter(nearest, low), np.nextafter(nearest, high)
    if mode == "rn":
        return nearest
    if mode == "rz":
        too_far = np.abs(back) > np.abs(exact)
        return np.where(too_far, np.nextafter(nearest, np.float32(0)), nearest)
    return np.where(back > exact, down, nearest) if mode == "rm" else np.where(
        back < exact, up, nearest
    )  # fmt: skip


def fma64(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x·y + z of float64, the product split into two numbers without error (Dekker)."""
    product = x * y
    big = np.float64(2**27 + 1)
    xh, yh = big * x - (big * x - x), big * y - (big * y - y)
    xl, yl = x - xh, y - yh
    error = ((xh * yh - product) + xh * yl + xl * yh) + xl * yl
    total = product + z
    back = total - product
    rest = (product - (total - back)) + (z - back)
    result = total + (rest + error)
    return np.where(np.isfinite(result), result, total)


def _fma32(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    # A product of two float32 numbers is exact in float64. The sum is rounded twice, which differs
    # from once about every 2^29-th time.
    return (x.astype(np.float64) * y + z).astype(np.float32)


def _minimum(x, y):
    # −0 counts as smaller than +0
    return np.where(x == y, np.where(np.signbit(x), x, y), np.fmin(x, y))


def _maximum(x, y):
    return np.where(x == y, np.where(np.signbit(x), y, x), np.fmax(x, y))


def _min_nan(x, y):
    return np.where(np.isnan(x) | np.isnan(y), x + y, _minimum(x, y))


def _max_nan(x, y):
    return np.where(np.isnan(x) | np.isnan(y), x + y, _maximum(x, y))


_FLOAT = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative,
    "abs": np.abs, "sqrt": np.sqrt, "min": _minimum, "max": _maximum,
}  # fmt: skip


def _approximate(name: str):
    functions = {
        "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt,
        "rsqrt": lambda x: 1 / np.sqrt(x),
    }  # fmt: skip
    return lambda x: functions[name](x.astype(np.float64)).astype(np.float32)


def _upper_half_of_reciprocal(x: np.ndarray) -> np.ndarray:
    bits = np.reciprocal(x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)
    return bits.view(np.float64)


def floating(m, destination, kind: str, compute, operands, ftz: bool = False):
    """A function that gives ``destination`` the floats compute(*operands)."""
    out = m.value(destination, kind)
    inputs = [m.value(x, kind) for x in operands]

    def run() -> None:
        values = compute(*map(flushed, inputs)) if ftz else compute(*inputs)
        square = values.dot(values)
        if square != square:
            _canonical_nan(values)
        m.put(out, flushed(values) if ftz else values)

    return run


def _float_function(modifiers: Modifiers, kind: str):
    name = modifiers.name
    if name in ("ex2", "lg2"):
        modifiers.need("approx")
        return _approximate(name)
    if name == "rsqrt" or (name in ("rcp", "sqrt", "div") and kind == "f32"):
        how = (
            modifiers.need("approx", "full", "rn") if name != "rsqrt" else modifiers.need("approx")
        )
        if how != "rn" and name != "div":
            return _approximate(name)
        return np.reciprocal if name == "rcp" else _FLOAT[name]
    if name == "rcp":  # of float64 its first 20 bits
        if modifiers.one("approx"):
            return _upper_half_of_reciprocal
        modifiers.need("rn")
        return np.reciprocal
    if name in ("min", "max"):
        nan = modifiers.one("NaN")
        return {"min": _min_nan, "max": _max_nan}[name] if nan else _FLOAT[name]
    if name in ("abs", "neg"):
        return _FLOAT[name]
    mode = modifiers.one(*_ROUNDINGS) or "rn"
    if mode != "rn":
        if kind == "f64":
            raise Unsupported(f"{modifiers.text}: directed rounding of float64")
        exact = _FLOAT.get(name, lambda x, y, z: x * y + z)
        return lambda *x: rounded(exact(*(v.astype(np.float64) for v in x)), mode)
    if name == "fma":
        return _fma32 if kind == "f32" else fma64
    return _FLOAT[name]


@opcode("add", "sub", "min", "max", "abs", "neg", "div", "mul", "fma", "sqrt", "rcp", "rsqrt",
        "ex2", "lg2")  # fmt: skip
def arithmetic(m, modifiers: Modifiers, instruction):
    kind = modifiers.kind("f32", "f64", "f32x2", "s16", "u16", "s32", "u32", "s64", "u64")
    out, *operands = instruction.operands
    if kind == "f32x2":
        return _two_floats(m, modifiers, out, operands)
    if kind not in ("f32", "f64"):
        return _integer(m, modifiers, kind, out, operands)
    ftz = bool(modifiers.one("ftz"))
    if ftz and kind == "f64":
        if modifiers.name != "rcp":
            raise Unsupported(modifiers.text)
        ftz = False  # the one form that float64 has
    return floating(m, out, kind, _float_function(modifiers, kind), operands, ftz)


def _two_floats(m, modifiers: Modifiers, destination, operands):
    """The same for each half of 64 bits, which sm_100 and later architectures compute."""
    if modifiers.name not in ("add", "sub", "mul", "fma"):
        raise Unsupported(modifiers.text)
    ftz = bool(modifiers.one("ftz"))
    compute = _float_function(modifiers, "f32")
    out, inputs = m.value(destination, "b64"), [m.value(x, "b64") for x in operands]

    def run() -> None:
        halves = [x.view(np.float32) for x in inputs]
        values = canonical(compute(*map(flushed, halves)) if ftz else compute(*halves))
        m.put(out, (flushed(values) if ftz else values).view(np.uint64))

    return run


# --- integers -------------------------------------------------------------------------------------


def divided(x: np.ndarray, y: np.ndarray, remainder: bool) -> np.ndarray:
    """Division towards zero; by zero the quotient has all bits set."""
    unsigned = np.dtype(f"u{x.itemsize}")
    magnitudes = [np.where(v < 0, np.negative(v), v).view(unsigned) for v in (x, y)]
    zero = y == 0
    divisor = np.where(zero, unsigned.type(1), magnitudes[1])
    quotient = magnitudes[0] // divisor
    quotient = np.where((x < 0) != (y < 0), np.negative(quotient), quotient).view(x.dtype)
    if remainder:
        return np.where(zero, x, x - quotient * y)
    return np.where(zero, np.invert(x.dtype.type(0)), quotient)


def _integer_function(name: str):
    return {
        "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
        "neg": np.negative, "abs": np.abs, "mul": np.multiply,
        "div": lambda x, y: divided(x, y, False), "rem": lambda x, y: divided(x, y, True),
        "mad": lambda x, y, z: x * y + z,
    }.get(name)  # fmt: skip


def _integer(m, modifiers: Modifiers, kind: str, destination, operands):
    compute = _integer_function(modifiers.name)
    if compute is None:
        raise Unsupported(modifiers.text)
    if modifiers.name in ("mul", "mad"):
        how = modifiers.need("lo", "wide", "hi")
        if how != "lo":
            return _double_width(m, modifiers, how, kind, destination, operands)
    out, inputs = m.value(destination, kind), [m.value(x, kind) for x in operands]
    return lambda: m.put(out, compute(*inputs))


def _double_width(m, modifiers: Modifiers, how: str, kind: str, destination, operands):
    """Products of twice the width, or their upper half."""
    wider = {"16": "32", "32": "64"}.get(kind[1:])
    if wider is None or (how == "hi" and modifiers.name == "mad"):
        raise Unsupported(modifiers.text)
    wide = kind[0] + wider
    x, y = (m.value(operand, kind) for operand in operands[:2])
    dtype, shift = DTYPES[wide], int(kind[1:])
    if how == "hi":
        out = m.value(destination, kind)
        by = dtype.type(shift)
        return lambda: m.put(out, (x.astype(dtype) * y >> by).astype(out.dtype))
    out = m.value(destination, wide)
    if modifiers.name == "mul":
        return lambda: m.put(out, x.astype(dtype) * y)
    z = m.value(operands[2], wide)
    return lambda: m.put(out, x.astype(dtype) * y + z)


@opcode("rem", "mad")
def integer(m, modifiers: Modifiers, instruction):
    kind = modifiers.kind("s16", "u16", "s32", "u32", "s64", "u64")
    out, *operands = instruction.operands
    return _integer(m, modifiers, kind, out, operands)
