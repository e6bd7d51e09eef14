"""Every opcode of the PTX interpreter against a few lines of plain Python.

Integers are Python's, floats are fractions (ptx/floats.py).
"""

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from ptx import opcodes
from ptx.faults import Fault, Unsupported
from ptx.floats import BF16, F16, F32, F64, decode, encode, is_nan
from ptx.machine import Machine
from ptx.parse import parse

F32_EDGES = [
    0x00000000, 0x80000000, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF,
    0xFFFFFFFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x00000001, 0x807FFFFF, 0x00800000, 0x40490FDB, 0x4B800001,
    0x33800001, 0xC2F70000, 0x3F808000, 0x3F818000, 0x3F801000, 0x3F803000, 0x477FF000, 0x33000000,
]  # fmt: skip
F64_EDGES = [
    0, 1 << 63, 0x3FF0000000000000, 0xBFF8000000000000, 0x7FF0000000000000, 0xFFF0000000000000,
    0x7FF0000000000001, 0x7FFFFFFFFFFFFFFF, 0x7FEFFFFFFFFFFFFF, 1, 0x000FFFFFFFFFFFFF,
    0x3FF0000010000000, 0x3FF0000030000000, 0x47EFFFFFF0000000, 0x3810000000000000,
    0x369FFFFFFFFFFFFF, 0x43E0000000000000, 0xC3E0000000000000, 0x41DFFFFFFFC00000,
    0x41F0000000000000, 0xBFE0000000000000, 0x400921FB54442D18,
]  # fmt: skip
U32_EDGES = [0, 1, 2, 3, 31, 32, 33, 63, 64, 255, 256, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
             0xFFFFFFFE, 0x12345678]  # fmt: skip
U64_EDGES = [0, 1, 5, 31, 32, 63, 64, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1,
             2**64 - 2, 0x0123456789ABCDEF]  # fmt: skip
U16_EDGES = [0, 1, 2, 15, 16, 17, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0xFFFE]
EDGES = {
    "f32": F32_EDGES, "f64": F64_EDGES, "16": U16_EDGES, "32": U32_EDGES, "64": U64_EDGES,
    "pred": [0, 1], "f16": [0, 0x8000, 0x3C00, 0xBC01, 0x7C00, 0xFC00, 0x7C01, 0x7FFF, 1, 0x83FF],
    "bf16": [0, 0x8000, 0x3F80, 0xBF81, 0x7F80, 0xFF80, 0x7F81, 0x7FFF, 1, 0x807F],
}  # fmt: skip
BITS = {"f32": 32, "f64": 64, "f16": 16, "bf16": 16, "pred": 16}
FORMS = {"f32": F32, "f64": F64, "f16": F16, "bf16": BF16}

#: Opcodes that a test of this file has run: the last test needs to have all others in its process.
met = set()
pytestmark = pytest.mark.xdist_group("ptx_opcodes")


def machine(body, declarations, parameters, threads=32, shared=16, blocks=1):
    """A kernel of 64-bit parameters p0, p1, …; registers besides %r, %rd, %p, %h are declared."""
    listed = ", ".join(f".param .u64 p{k}" for k in range(parameters))
    text = f"""
.version 8.0
.target sm_90a
.extern .shared .align 16 .b8 smem[];
.visible .entry kernel({listed})
.reqntid {threads}
{{
.reg .pred %p<9>; .reg .b16 %h<20>; .reg .b32 %r<90>; .reg .b64 %rd<20>; .reg .f64 %fd<9>;
{declarations}
{body}
ret;
}}
"""
    made = Machine(parse(text, "kernel"), shared, blocks)
    for instruction in made.kernel.instructions:
        met.add(opcodes.Modifiers(instruction).name)
    return made


def run(body, inputs, outputs, declarations="", threads=32, shared=16):
    """Runs a block; the arrays are the parameters, and ``outputs`` those that it may write."""
    made = machine(body, declarations, len(inputs), threads, shared)
    for k, array in enumerate(inputs):
        made.memory.add(array.ctypes.data, array.nbytes, f"p{k}", k in outputs)
    made.parameters.view(np.uint64)[:] = [array.ctypes.data for array in inputs]
    made.run([(0, 0)], (1, 1))
    return made


def width(kind):
    return BITS.get(kind) or int(kind.lstrip("bus"))


def apply(text, kinds, out, rows):
    """The bits of the result of one instruction, for rows of operands' bits."""
    threads = -(-len(rows) // 32) * 32
    rows = [*rows, *[rows[0]] * (threads - len(rows))]
    arrays = [
        np.array(column, f"u{width(kind) // 8}")
        for kind, column in zip(kinds, zip(*rows, strict=True), strict=True)
    ]
    arrays.append(np.zeros(threads, f"u{width(out) // 8}"))
    lines, declared = ["mov.u32 %r0, %tid.x;"], []
    for k, kind in enumerate([*kinds, out]):
        bits = width(kind)
        lines += [f"ld.param.u64 %rd{k}, [p{k}];", f"mul.wide.u32 %rd10, %r0, {bits // 8};"]
        lines += [f"add.s64 %rd{k}, %rd{k}, %rd10;"]
        declared.append(f".reg .b{bits} %x{k};" + (f" .reg .pred %q{k};" if kind == "pred" else ""))
        if k < len(kinds):
            lines.append(f"ld.global.b{bits} %x{k}, [%rd{k}];")
            if kind == "pred":
                lines.append(f"setp.ne.s16 %q{k}, %x{k}, 0;")
    names = [f"%q{k}" if kind == "pred" else f"%x{k}" for k, kind in enumerate([*kinds, out])]
    lines.append(text.format(*names[:-1], out=names[-1]) + ";")
    last = len(kinds)
    if out == "pred":
        lines.append(f"selp.b16 %x{last}, 1, 0, %q{last};")
    lines.append(f"st.global.b{width(out)} [%rd{last}], %x{last};")
    run("\n".join(lines), arrays, {last}, "\n".join(declared), threads)
    return arrays[-1].tolist()


def rows_of(kinds, most=512):
    """All combinations of edge values, or some of them with random numbers in between."""
    values = [EDGES[kind if kind in EDGES else kind.lstrip("bus")] for kind in kinds]
    everything = list(itertools.product(*values))
    generator = random.Random(0)
    if len(everything) > most:
        everything = generator.sample(everything, most)
    return everything + [
        tuple(generator.getrandbits(1 if k == "pred" else width(k)) for k in kinds)
        for _ in range(64)
    ]


def check(text, kinds, out, plain, rows=None):
    rows = rows or rows_of(kinds)
    for row, found in zip(rows, apply(text, kinds, out, rows), strict=False):
        assert found == plain(*row), (text, [hex(x) for x in row], hex(found), hex(plain(*row)))


def signed(x, bits):
    return x - (1 << bits) if x >> bits - 1 else x


# --- integers -------------------------------------------------------------------------------------


def towards_zero(x, y):
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


BINARY = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "min": min,
    "max": max,
    "mul.lo": lambda x, y: x * y,
    "div": lambda x, y: towards_zero(x, y),
    "rem": lambda x, y: x - y * towards_zero(x, y),
}


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "s16", "u16"])
@pytest.mark.parametrize("name", BINARY)
def test_integer_arithmetic(name, kind):
    bits = width(kind)
    value = (lambda x: signed(x, bits)) if kind[0] == "s" else (lambda x: x)
    rows = rows_of([kind, kind])
    if name in ("div", "rem"):
        rows = [row for row in rows if row[1]]
    check(
        f"{name}.{kind} {{out}}, {{0}}, {{1}}", [kind, kind], kind,
        lambda x, y: BINARY[name](value(x), value(y)) & (1 << bits) - 1, rows,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32"])
def test_products_of_twice_the_width(kind):
    bits = width(kind)
    value = (lambda x: signed(x, bits)) if kind[0] == "s" else (lambda x: x)
    wide = f"{kind[0]}{2 * bits}"
    mask = (1 << 2 * bits) - 1
    check(f"mul.wide.{kind} {{out}}, {{0}}, {{1}}", [kind, kind], wide,
          lambda x, y: value(x) * value(y) & mask)  # fmt: skip
    check(f"mad.wide.{kind} {{out}}, {{0}}, {{1}}, {{2}}", [kind, kind, wide], wide,
          lambda x, y, z: value(x) * value(y) + z & mask)  # fmt: skip
    check(f"mul.hi.{kind} {{out}}, {{0}}, {{1}}", [kind, kind], kind,
          lambda x, y: (value(x) * value(y) & mask) >> bits)  # fmt: skip
    check(f"mad.lo.{kind} {{out}}, {{0}}, {{1}}, {{2}}", [kind] * 3, kind,
          lambda x, y, z: x * y + z & (1 << bits) - 1)  # fmt: skip


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_sign_of_integers(kind):
    bits = width(kind)
    check(f"neg.{kind} {{out}}, {{0}}", [kind], kind, lambda x: -x & (1 << bits) - 1)
    check(f"abs.{kind} {{out}}, {{0}}", [kind], kind,
          lambda x: abs(signed(x, bits)) & (1 << bits) - 1)  # fmt: skip


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits):
    kind, mask = f"b{bits}", (1 << bits) - 1
    check(f"and.{kind} {{out}}, {{0}}, {{1}}", [kind, kind], kind, lambda x, y: x & y)
    check(f"or.{kind} {{out}}, {{0}}, {{1}}", [kind, kind], kind, lambda x, y: x | y)
    check(f"xor.{kind} {{out}}, {{0}}, {{1}}", [kind, kind], kind, lambda x, y: x ^ y)
    check(f"not.{kind} {{out}}, {{0}}", [kind], kind, lambda x: ~x & mask)
    check("not.pred {out}, {0}", ["pred"], "pred", lambda x: 1 - x)
    check("xor.pred {out}, {0}, {1}", ["pred", "pred"], "pred", lambda x, y: x ^ y)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts(bits):
    mask = (1 << bits) - 1
    kinds = [f"b{bits}", "u32"]
    check(f"shl.b{bits} {{out}}, {{0}}, {{1}}", kinds, f"b{bits}",
          lambda x, n: x << min(n, 64) & mask)  # fmt: skip
    check(f"shr.u{bits} {{out}}, {{0}}, {{1}}", kinds, f"b{bits}", lambda x, n: x >> min(n, 64))
    check(f"shr.s{bits} {{out}}, {{0}}, {{1}}", kinds, f"b{bits}",
          lambda x, n: signed(x, bits) >> min(n, 64) & mask)  # fmt: skip


def test_funnel_shifts():
    kinds = ["b32"] * 3
    for how, count in (("wrap", lambda n: n & 31), ("clamp", lambda n: min(n, 32))):
        check(f"shf.l.{how}.b32 {{out}}, {{0}}, {{1}}, {{2}}", kinds, "b32",
              lambda low, high, n, count=count:
              ((high << 32 | low) << count(n) >> 32) & 2**32 - 1)  # fmt: skip
        check(f"shf.r.{how}.b32 {{out}}, {{0}}, {{1}}, {{2}}", kinds, "b32",
              lambda low, high, n, count=count:
              (high << 32 | low) >> count(n) & 2**32 - 1)  # fmt: skip


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind):
    bits = width(kind)

    def extract(x, at, count):
        at, count = at & 255, count & 255
        sign = x >> min(at + count - 1, bits - 1) & 1 if kind[0] == "s" and count else 0
        found = [x >> at + k & 1 if k < count and at + k < bits else sign for k in range(bits)]
        return sum(bit << k for k, bit in enumerate(found))

    def insert(x, y, at, count):
        at, count = at & 255, count & 255
        for k in range(count):
            if at + k < bits:
                y = y & ~(1 << at + k) | (x >> k & 1) << at + k
        return y

    check(f"bfe.{kind} {{out}}, {{0}}, {{1}}, {{2}}", [kind, "u32", "u32"], kind, extract)
    check(f"bfi.b{bits} {{out}}, {{0}}, {{1}}, {{2}}, {{3}}", [kind, kind, "u32", "u32"], kind,
          insert)  # fmt: skip


def test_moves_and_selections():
    check("mov.b32 {out}, {0}", ["b32"], "b32", lambda x: x)
    check("mov.f32 {out}, 0f7F800001", ["b32"], "b32", lambda x: 0x7F800001)
    check("mov.u32 {out}, -3", ["b32"], "b32", lambda x: 2**32 - 3)
    check("mov.b64 {out}, {{{0}, {1}}}", ["b32", "b32"], "b64", lambda x, y: y << 32 | x)
    check("mov.b32 {out}, {{{0}, {1}}}", ["b16", "b16"], "b32", lambda x, y: y << 16 | x)
    check("mov.b64 {{_, {out}}}, {0}", ["b64"], "b32", lambda x: x >> 32)
    check("selp.f32 {out}, {0}, {1}, {2}", ["b32", "b32", "pred"], "b32",
          lambda x, y, p: x if p else y)  # fmt: skip
    check("copysign.f32 {out}, {0}, {1}", ["f32", "f32"], "f32",
          lambda s, x: s & 2**31 | x & 2**31 - 1)  # fmt: skip


COMPARISONS = {
    "eq": lambda x, y: x == y, "ne": lambda x, y: x != y, "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y, "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y,
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(name):
    for kind in ("s16", "s32", "u32", "s64", "u64"):
        bits = width(kind)
        value = (lambda x, b=bits: signed(x, b)) if kind[0] == "s" else (lambda x: x)
        check(f"setp.{name}.{kind} {{out}}, {{0}}, {{1}}", [kind, kind], "pred",
              lambda x, y, value=value: int(COMPARISONS[name](value(x), value(y))))  # fmt: skip
    for kind in ("f32", "f64"):
        for unordered in ("", "u"):

            def plain(x, y, kind=kind, unordered=unordered):
                x, y = decode(x, FORMS[kind]), decode(y, FORMS[kind])
                either = is_nan(x) or is_nan(y)
                return int(bool(unordered) if either else COMPARISONS[name](x, y))

            check(
                f"setp.{name}{unordered}.{kind} {{out}}, {{0}}, {{1}}", [kind, kind], "pred", plain
            )


def test_comparisons_of_nan():
    for name, wanted in (("nan", True), ("num", False)):
        check(f"setp.{name}.f32 {{out}}, {{0}}, {{1}}", ["f32", "f32"], "pred",
              lambda x, y, wanted=wanted: int(
                  (is_nan(decode(x, F32)) or is_nan(decode(y, F32))) == wanted))  # fmt: skip


# --- floats ---------------------------------------------------------------------------------------


def flush(bits):
    return bits & 2**31 if not bits & 0x7F800000 else bits


def arithmetic(compute, kind, mode="rn", ftz=False):
    """compute(*numbers) rounded once; signs of zeros and what infinities give are IEEE's."""

    def plain(*row):
        numbers = [decode(flush(x) if ftz else x, FORMS[kind]) for x in row]
        special = [x for x in numbers if isinstance(x, float) and x]
        exact = Fraction(0)
        with np.errstate(all="ignore"):
            signs = [x if x in special or not x else math.copysign(1, x) for x in numbers]
            result = float(compute(*map(np.float64, signs)))
        if not special and not (math.isinf(result) or is_nan(result)):
            exact = compute(*map(Fraction, numbers))
        bits = encode(exact or result, FORMS[kind], mode)
        return flush(bits) if ftz else bits

    return plain


ARITHMETIC = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
}


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", ARITHMETIC)
def test_float_arithmetic(name, kind):
    plain = arithmetic(ARITHMETIC[name], kind)
    check(f"{name}.{kind} {{out}}, {{0}}, {{1}}", [kind, kind], kind, plain)
    check(f"{name}.rn.{kind} {{out}}, {{0}}, {{1}}", [kind, kind], kind, plain)


def test_flushed_arithmetic():
    check("mul.ftz.f32 {out}, {0}, {1}", ["f32", "f32"], "f32",
          arithmetic(lambda x, y: x * y, "f32", ftz=True))  # fmt: skip
    check("add.rn.ftz.f32 {out}, {0}, {1}", ["f32", "f32"], "f32",
          arithmetic(lambda x, y: x + y, "f32", ftz=True))  # fmt: skip
    check("abs.ftz.f32 {out}, {0}", ["f32"], "f32",
          lambda x: F32.nan if is_nan(decode(x, F32)) else flush(x) & 2**31 - 1)  # fmt: skip


def in_both_halves(plain):
    """The function of 64-bit operands whose halves are operands of ``plain``."""

    def both(*row):
        low, high = (plain(*(x >> shift & 0xFFFFFFFF for x in row)) for shift in (0, 32))
        return low | high << 32

    return both


def pairs_of(rows):
    """64-bit operands: one row in the lower halves, the one before it in the upper halves."""
    return [
        tuple(x | y << 32 for x, y in zip(row, before, strict=True))
        for row, before in zip(rows, [rows[-1], *rows], strict=False)
    ]


@pytest.mark.parametrize("name", ARITHMETIC)
def test_two_floats_at_once(name):
    plain = in_both_halves(arithmetic(ARITHMETIC[name], "f32"))
    flushing = in_both_halves(arithmetic(ARITHMETIC[name], "f32", ftz=True))
    rows = pairs_of(rows_of(["f32"] * 2))
    check(f"{name}.f32x2 {{out}}, {{0}}, {{1}}", ["b64"] * 2, "b64", plain, rows)
    check(f"{name}.rn.ftz.f32x2 {{out}}, {{0}}, {{1}}", ["b64"] * 2, "b64", flushing, rows)


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode):
    finite = [row for row in rows_of(["f32"] * 3) if all(
        x & 0x7F800000 not in (0, 0x7F800000) for x in row)]  # fmt: skip
    for name, compute in ARITHMETIC.items():

        def plain(x, y, compute=compute):
            exact = compute(decode(x, F32), decode(y, F32))
            return encode(exact, F32, mode)

        rows = [row[:2] for row in finite
                if compute(decode(row[0], F32), decode(row[1], F32))
                and exponents_near(row[:2])]  # fmt: skip
        check(f"{name}.{mode}.f32 {{out}}, {{0}}, {{1}}", ["f32", "f32"], "f32", plain, rows)


def exponents_near(row):
    """A sum of such numbers is exact in float64."""
    low, high = sorted(x >> 23 & 255 for x in row)
    return high - low < 28


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_division_and_roots(kind):
    form = FORMS[kind]

    division = arithmetic(lambda x, y: x / y, kind)
    one = encode(Fraction(1), form)
    check(f"div.rn.{kind} {{out}}, {{0}}, {{1}}", [kind, kind], kind, division)
    check(f"rcp.rn.{kind} {{out}}, {{0}}", [kind], kind, lambda x: division(one, x))

    def root(x):
        value = decode(x, form)
        if is_nan(value) or value < 0:
            return form.nan
        if isinstance(value, float) or value == 0:
            return x
        scale = 4 ** (max(0, 1200 - value.numerator.bit_length() + value.denominator.bit_length()))
        scaled = Fraction(math.isqrt(value.numerator * scale // value.denominator * 4), 2)
        return encode(scaled / Fraction(math.isqrt(scale)), form)

    check(f"sqrt.rn.{kind} {{out}}, {{0}}", [kind], kind, root)


def float64_holds(row):
    numbers = [decode(x, F32) for x in row]
    if not all(isinstance(x, Fraction) for x in numbers):
        return True
    exact = numbers[0] * numbers[1] + numbers[2]
    return abs(exact) < 2**1000 and Fraction(float(exact)) == exact


def test_fused_multiply_add():
    def fma(x, y, z):
        return x * y + z

    # Other sums are rounded twice, to float64 and to float32.
    rows = [row for row in rows_of(["f32"] * 3, 1024) if float64_holds(row)]
    check("fma.rn.f32 {out}, {0}, {1}, {2}", ["f32"] * 3, "f32", arithmetic(fma, "f32"), rows)
    both = in_both_halves(arithmetic(fma, "f32"))
    check("fma.rn.f32x2 {out}, {0}, {1}, {2}", ["b64"] * 3, "b64", both, pairs_of(rows))
    rows = [row for row in rows_of(["f64"] * 3, 1024)
            if all(0x200 < (x >> 52 & 0x7FF) < 0x5F0 for x in row)]  # fmt: skip
    generator = random.Random(1)
    one = 0x3FF << 52
    rows += [
        tuple(x + generator.getrandbits(50) for x in (one, one, one | 1 << 63)) for _ in range(200)
    ]
    check("fma.rn.f64 {out}, {0}, {1}, {2}", ["f64"] * 3, "f64", arithmetic(fma, "f64"), rows)


@pytest.mark.parametrize("name", ["min", "max"])
def test_extremes(name):
    pick = min if name == "min" else max

    def plain(x, y, keeps_nan):
        a, b = decode(x, F32), decode(y, F32)
        if is_nan(a) or is_nan(b):
            both = is_nan(a) and is_nan(b)
            return F32.nan if keeps_nan or both else y if is_nan(a) else x
        if a == b:  # -0 is smaller than +0
            return max(x, y) if name == "min" else min(x, y)
        return x if pick(a, b) == a else y

    check(f"{name}.f32 {{out}}, {{0}}, {{1}}", ["f32", "f32"], "f32",
          lambda x, y: plain(x, y, False))  # fmt: skip
    check(f"{name}.NaN.f32 {{out}}, {{0}}, {{1}}", ["f32", "f32"], "f32",
          lambda x, y: plain(x, y, True))  # fmt: skip


def test_sign_of_floats():
    for kind, top in (("f32", 2**31), ("f64", 2**63)):

        def negated(x, form=FORMS[kind], top=top):
            return form.nan if is_nan(decode(x, form)) else x ^ top

        def magnitude(x, form=FORMS[kind], top=top):
            return form.nan if is_nan(decode(x, form)) else x & top - 1

        check(f"neg.{kind} {{out}}, {{0}}", [kind], kind, negated)
        check(f"abs.{kind} {{out}}, {{0}}", [kind], kind, magnitude)


APPROXIMATE = {
    "ex2.approx.ftz": lambda x: np.exp2(x),
    "ex2.approx": lambda x: np.exp2(x),
    "lg2.approx": lambda x: np.log2(x),
    "rcp.approx.ftz": lambda x: 1 / x,
    "rsqrt.approx": lambda x: 1 / np.sqrt(x),
    "sqrt.approx.ftz": lambda x: np.sqrt(x),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_instructions(name):
    rows = rows_of(["f32"])
    found = apply(f"{name}.f32 {{out}}, {{0}}", ["f32"], "f32", rows)
    for (x,), bits in zip(rows, found, strict=False):
        x = flush(x) if "ftz" in name else x
        with np.errstate(all="ignore"):
            value = float(APPROXIMATE[name](np.uint32(x).view(np.float32).astype(np.float64)))
        wanted = encode(value if value == 0 or not math.isfinite(value) else Fraction(value), F32)
        wanted = flush(wanted) if "ftz" in name else wanted
        assert abs((bits & 2**31 - 1) - (wanted & 2**31 - 1)) <= 1, (name, hex(x), hex(bits))
        assert bits >> 31 == wanted >> 31 or wanted == F32.nan


def test_other_quotients():
    check("div.full.f32 {out}, {0}, {1}", ["f32", "f32"], "f32", lambda x, y: 0x40000000,
          [(0x40800000, 0x40000000)] * 32)  # fmt: skip
    check("rcp.approx.ftz.f64 {out}, {0}", ["f64"], "f64", lambda x: 0x3FD5555500000000,
          [(0x4008000000000000,)] * 32)  # fmt: skip


# --- conversions ----------------------------------------------------------------------------------

ROUNDINGS = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("mode", ROUNDINGS)
@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("target", ["s32", "u32", "s64", "u64"])
def test_floats_to_integers(target, source, mode):
    bits = width(target)
    low = -(1 << bits - 1) if target[0] == "s" else 0
    high = low + (1 << bits) - 1

    def plain(x):
        value = decode(x, FORMS[source])
        if is_nan(value):
            return 1 << bits - 1 if 64 in (bits, width(source)) else 0
        if isinstance(value, float) and value:
            return (high if value > 0 else low) & (1 << bits) - 1
        return min(max(ROUNDINGS[mode](Fraction(value)), low), high) & (1 << bits) - 1

    check(f"cvt.{mode}.{target}.{source} {{out}}, {{0}}", [source], target, plain)


def test_integers_to_floats():
    for source in ("s32", "u32", "s64", "u64", "u16", "s16"):
        for target in ("f32", "f64"):

            def plain(x, source=source, target=target):
                value = signed(x, width(source)) if source[0] == "s" else x
                return encode(Fraction(value), FORMS[target])

            check(f"cvt.rn.{target}.{source} {{out}}, {{0}}", [source], target, plain)


def test_integers_to_integers():
    for source, target in itertools.permutations(["s16", "u16", "s32", "u32", "s64", "u64"], 2):

        def plain(x, source=source, target=target):
            value = signed(x, width(source)) if source[0] == "s" else x
            return value & (1 << width(target)) - 1

        check(f"cvt.{target}.{source} {{out}}, {{0}}", [source], target, plain)


def test_floats_to_floats():
    narrowing = [("f64", "f32"), ("f32", "f16"), ("f32", "bf16")]
    for source, target in narrowing:
        check(f"cvt.rn.{target}.{source} {{out}}, {{0}}", [source], target,
              lambda x, s=source, t=target: encode(decode(x, FORMS[s]), FORMS[t]))  # fmt: skip
    for source, target in [("f32", "f64"), ("f16", "f32")]:
        check(f"cvt.{target}.{source} {{out}}, {{0}}", [source], target,
              lambda x, s=source, t=target: encode(decode(x, FORMS[s]), FORMS[t]))  # fmt: skip
    check("cvt.f32.bf16 {out}, {0}", ["bf16"], "f32", lambda x: x << 16)
    for kind in ("bf16", "f16"):
        check(f"cvt.rn.{kind}x2.f32 {{out}}, {{0}}, {{1}}", ["f32", "f32"], "b32",
              lambda x, y, form=FORMS[kind]: encode(decode(x, F32), form) << 16
              | encode(decode(y, F32), form))  # fmt: skip


def test_tf32():
    def plain(x):
        if is_nan(decode(x, F32)):
            return F32.nan
        if x & 2**31 - 1 == 0x7F800000:
            return x
        return x + 0x1000 & 0xFFFFE000  # ties away from zero: the exponent takes the carry

    check("cvt.rna.tf32.f32 {out}, {0}", ["f32"], "b32", plain)


@pytest.mark.parametrize("mode", ROUNDINGS)
def test_whole_floats(mode):
    for kind in ("f32", "f64"):
        form = FORMS[kind]

        def plain(x, form=form):
            value = decode(x, form)
            if isinstance(value, float):
                return encode(value, form)
            whole = ROUNDINGS[mode](value)
            return encode(Fraction(whole), form) | x & 1 << form.bits - 1

        check(f"cvt.{mode}.{kind}.{kind} {{out}}, {{0}}", [kind], kind, plain)


def test_saturation():
    def plain(x):
        value = decode(flush(x), F32)
        if is_nan(value) or value <= 0:
            return 0
        return encode(value, F32) if value < 1 else 0x3F800000

    check("cvt.ftz.sat.f32.f32 {out}, {0}", ["f32"], "f32", plain)


# --- what is not known ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "frobnicate.b32 %r1, %r2", "add.sat.s32 %r1, %r2, %r3", "add.cc.s32 %r1, %r2, %r3",
        "mul.lo.f32 %r1, %r2, %r3", "setp.lt.b32 %p1, %r1, %r2",
        "setp.lt.and.s32 %p1, %r1, %r2, %p2", "ld.local.b32 %r1, [%rd1]",
        "ld.global.volatile.b32 %r1, [%rd1]", "cvt.rn.satfinite.bf16.f32 %h1, %r1",
        "fma.f64.rn %fd1, %fd1, %fd2, %fd3", "add.rz.f64 %fd1, %fd1, %fd2",
        "add.s32 %r1, %rd1, %r2", "shfl.sync.up.b32 %r1|%p1, %r2, 1, 0, -1",
        "mma.sync.aligned.m16n8k16.row.row.f32.bf16.bf16.f32 {%r1,%r2,%r3,%r4}, {%r5,%r6,%r7,%r8}, "
        "{%r9,%r10}, {%r1,%r2,%r3,%r4}", "cp.async.cg.shared.global [%r1], [%rd1], 8",
        "bar.red.popc.u32 %r1, 0, %p1", "shl.b32 %r1, %r2, 0f00000000",
        "ld.param.u64 %rd1, [p0], 1", "max.f32x2 %rd1, %rd2, %rd3",
    ],
)  # fmt: skip
def test_unknown_opcodes_modifiers_and_operands_are_errors(text):
    with pytest.raises(Unsupported):
        machine(f"{text};", "", 1)


def test_an_unknown_modifier_is_an_error_where_nothing_executes_it():
    """Also where the same opcode has been understood before, with other modifiers or operands."""
    for text in (
        "add.sat.s32 %r1, %r2, %r3",
        "add.s32 %r1, %rd1, %r2",
        "shl.b32 %r1, %r2, 0f00000000",
    ):
        with pytest.raises(Unsupported):
            machine(f"add.s32 %r1, %r2, %r3; shl.b32 %r1, %r2, 1; ret; {text};", "", 1)


# --- memory, lanes and matrices -------------------------------------------------------------------

#: %rd1 and %rd2 point to this thread's 16 bytes of p0 and p1, %r1 to its 16 bytes of shared memory.
PLACES = """
mov.u32 %r0, %tid.x; ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1];
mul.wide.u32 %rd3, %r0, 16; add.s64 %rd1, %rd1, %rd3; add.s64 %rd2, %rd2, %rd3;
mov.u32 %r1, smem; mad.lo.s32 %r1, %r0, 16, %r1;
"""


def words(threads=32, seed=0):
    """(threads, 4) words for the threads, and an output of the same shape."""
    generator = np.random.default_rng(seed)
    given = generator.integers(0, 2**32, (threads, 4), np.uint32)
    return given, np.zeros_like(given)


def through(body, threads=32, shared=4096, given=None):
    """What a block writes to p1 where p0 holds random words; and those, and the machine."""
    source, out = words(threads)
    source = source if given is None else given
    made = run(PLACES + body, [source, out], {1}, "", threads, shared)
    return source, out, made


LOAD = "ld.global.v4.b32 {%r2,%r3,%r4,%r5}, [%rd1]; "
KEEP = "st.global.v4.b32 [%rd2], {%r2,%r3,%r4,%r5};"
TO_SHARED = "st.shared.v4.b32 [%r1], {%r2,%r3,%r4,%r5}; "


def test_loads_and_stores():
    given, out, made = through(LOAD + TO_SHARED + "ld.shared.v2.b64 {%rd4,%rd5}, [%r1]; "
                               "st.global.v2.b64 [%rd2], {%rd4,%rd5};")  # fmt: skip
    assert (given == out).all()
    assert not made.hazards
    given, out, _ = through(
        "ld.global.u16 %r2, [%rd1+2]; ld.global.s16 %r3, [%rd1]; ld.global.nc.b32 %r4, [%rd1+4]; "
        "mov.u32 %r5, 7; " + KEEP
    )
    assert (out[:, 0] == given[:, 0] >> 16).all()
    assert (out[:, 1].view(np.int32) == given[:, 0].astype(np.uint16).view(np.int16)).all()
    assert (out[:, 2] == given[:, 1]).all()


def test_single_bytes_of_shared_memory():
    """They are read where at least two were written at once."""
    body = (
        LOAD + "mov.b32 {%h1,%h2}, %r2; st.shared.v2.b8 [%r1], {%h1,%h2}; "
        "ld.shared.u8 %r3, [%r1]; ld.shared.s8 %r4, [%r1+1]; ld.shared.u8 %r5, [%r1+FROM]; " + KEEP
    )
    given, out, made = through(body.replace("FROM", "0"))
    halves_of_words = given[:, :1].copy().view(np.uint16)
    low_bytes = halves_of_words.astype(np.uint8)
    assert (out[:, 1] == low_bytes[:, 0]).all()
    assert (out[:, 2].view(np.int32) == low_bytes[:, 1].view(np.int8)).all()
    assert not made.hazards
    _, _, made = through(body.replace("FROM", "2"))
    assert any("nobody wrote" in text for text in made.hazards)
    with pytest.raises(Fault, match="single bytes"):
        through(LOAD + "st.shared.b8 [%r1], %h1; " + KEEP)


def test_predicates_leave_lanes_alone():
    given, out, made = through(LOAD + "setp.lt.u32 %p1, %r0, 5; @%p1 mov.u32 %r2, 9; "
                               "@!%p1 add.s32 %r2, %r2, 1; " + KEEP)  # fmt: skip
    assert (out[:5, 0] == 9).all()
    assert (out[5:, 0] == given[5:, 0] + np.uint32(1)).all()
    assert made.coverage().all()


def test_branches_part_and_meet():
    body = (
        LOAD
        + """
and.b32 %r6, %r0, 3; mov.u32 %r7, 0;
again: setp.eq.s32 %p1, %r6, 0; @%p1 bra done;
add.s32 %r7, %r7, 10; sub.s32 %r6, %r6, 1; bra.uni again;
done: bar.warp.sync -1; brx.idx %r6, table;
table: .branchtargets zero, one;
one: mov.u32 %r7, 1;
zero: mov.u32 %r2, %r7;
"""
    )
    _, out, made = through(body + KEEP)
    assert out[:, 0].tolist() == [10 * (k % 4) for k in range(32)]
    assert not made.coverage().all()


def test_shuffles():
    given, out, _ = through(LOAD + "shfl.sync.bfly.b32 %r2|%p1, %r2, 5, 31, -1; "
                            "and.b32 %r6, %r0, 7; shfl.sync.idx.b32 %r3, %r3, %r6, 31, -1; "
                            "elect.sync _|%p2, -1; selp.b32 %r4, 1, 0, %p2; " + KEEP)  # fmt: skip
    for k in range(32):
        assert out[k, 0] == given[k ^ 5, 0]
        assert out[k, 1] == given[k & 7, 1]
        assert out[k, 2] == (k == 0)


def test_votes():
    """Of two warps, one has a lane where the predicate holds."""
    body = LOAD + "setp.eq.u32 %p1, %r0, 40; vote.sync.any.pred %p2, %p1, -1; "
    _, out, _ = through(body + "selp.b32 %r2, 1, 0, %p2; " + KEEP, 64)
    assert out[:, 0].tolist() == [0] * 32 + [1] * 32


def test_addresses():
    given, out, _ = through("cvta.to.global.u64 %rd4, %rd1; ld.global.v4.b32 {%r2,%r3,%r4,%r5}, "
                            "[%rd4]; " + KEEP)  # fmt: skip
    assert (given == out).all()


def test_asynchronous_copies():
    copy = "cp.async.cg.shared.global [%r1], [%rd1], 16, 6; cp.async.ca.shared.global [%r1+512], "
    body = copy + "[%rd1], 8; cp.async.commit_group; cp.async.wait_group 0; "
    read = "ld.shared.v2.b32 {%r2,%r3}, [%r1]; ld.shared.v2.b32 {%r4,%r5}, [%r1+512]; "
    given, out, made = through(body + read + KEEP)
    assert (out[:, 0] == given[:, 0]).all()
    assert (out[:, 1] == given[:, 1] & np.uint32(0xFFFF)).all()
    assert (out[:, 2:] == given[:, :2]).all()
    assert not made.hazards
    _, _, made = through(copy + "[%rd1], 8; cp.async.commit_group; " + read + KEEP)
    assert any("copy under way" in hazard for hazard in made.hazards)


def test_barriers_and_fences():
    other = "xor.b32 %r6, %r0, 32; mov.u32 %r7, smem; mad.lo.s32 %r7, %r6, 16, %r7; "
    read = other + "ld.shared.v4.b32 {%r2,%r3,%r4,%r5}, [%r7]; "
    given, out, made = through(
        LOAD + TO_SHARED + "fence.proxy.async.shared::cta; bar.sync 0; " + read + KEEP, 64
    )
    assert (out == np.roll(given, 32, axis=0)).all()
    assert not made.hazards
    for barrier in ("", "bar.warp.sync -1; "):
        _, _, made = through(LOAD + TO_SHARED + barrier + read + KEEP, 64)
        assert any("race: reads what another warp wrote" in hazard for hazard in made.hazards)
    for name in ("barrier.sync 1, 64", "barrier.cta.sync.aligned 0", "barrier.sync.aligned 0"):
        _, _, made = through(LOAD + TO_SHARED + f"{name}; " + read + KEEP, 64)
        assert not made.hazards


def test_a_lane_that_reads_what_another_wrote():
    other = "xor.b32 %r6, %r0, 1; mov.u32 %r7, smem; mad.lo.s32 %r7, %r6, 16, %r7; "
    read = other + "ld.shared.v4.b32 {%r2,%r3,%r4,%r5}, [%r7]; " + KEEP
    _, _, made = through(LOAD + TO_SHARED + read)
    assert any("race in a warp" in hazard for hazard in made.hazards)
    _, _, made = through(LOAD + TO_SHARED + "bar.warp.sync -1; " + read)
    assert not made.hazards


#: Every thread of a block gets its opposite's words and adds the block's number; blocks from number
#: FIRST on store it.
BLOCKS = """
mov.u32 %r20, %ctaid.x; mad.lo.s32 %r21, %r20, 64, %r0; mul.wide.u32 %rd3, %r21, 16;
ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1];
add.s64 %rd1, %rd1, %rd3; add.s64 %rd2, %rd2, %rd3; setp.ge.u32 %p1, %r20, FIRST;
xor.b32 %r6, %r0, 32; mov.u32 %r7, smem; mad.lo.s32 %r7, %r6, 16, %r7;
"""


@pytest.mark.parametrize("first", [0, 1])
def test_blocks_side_by_side(first):
    """Three blocks, all at once in a machine for four, or one after another: each has shared memory
    and barriers of its own, and a race is one within a block.
    """
    read = "ld.shared.v4.b32 {%r2,%r3,%r4,%r5}, [%r7]; add.u32 %r2, %r2, %r20; @%p1 "
    for barrier, hazard in (("bar.sync 0; ", ""), ("", "race: reads what another warp wrote")):
        body = (
            PLACES + BLOCKS.replace("FIRST", str(first)) + LOAD + TO_SHARED + barrier + read + KEEP
        )
        for side_by_side in (4, 1):
            given, out = words(3 * 64)[0], np.zeros((3 * 64, 4), np.uint32)
            made = machine(body, "", 2, 64, 1024, side_by_side)
            for k, array in enumerate((given, out)):
                made.memory.add(array.ctypes.data, array.nbytes, f"p{k}", k == 1)
            made.parameters.view(np.uint64)[:] = given.ctypes.data, out.ctypes.data
            for _ in range(2):  # the second time nothing of the first is left
                for k in range(0, 3, side_by_side):
                    some = [(x, 0) for x in range(k, min(k + side_by_side, 3))]
                    made.run(some, (3, 1))
            opposite = np.roll(given.reshape(3, 64, 4), 32, axis=1)
            opposite[:, :, 0] += np.arange(3, dtype=np.uint32)[:, None]
            opposite[:first] = 0
            assert (out == opposite.reshape(-1, 4)).all()
            assert [*made.hazards] == [] if not hazard else hazard in str(made.hazards)


FAULTS = {
    "out of bounds": LOAD + "st.global.b32 [%rd2+16], %r2;",
    "misaligned": LOAD + "ld.global.v2.b32 {%r2,%r3}, [%rd1+4];",
    "writes to p0": LOAD + "st.global.b32 [%rd1], %r2;",
    "shared memory out of bounds": "ld.shared.b32 %r2, [%r1+4096];",
    "shared memory misaligned: 8 bytes": "ld.shared.v2.b32 {%r2,%r3}, [%r1+4];",
    "shared memory misaligned: 4 bytes": LOAD + "st.shared.b32 [%r1+2], %r2;",
    "shared memory misaligned: 16 bytes": "cp.async.cg.shared.global [%r1+8], [%rd1], 16;",
    "cp.async from a misaligned address": "cp.async.ca.shared.global [%r1], [%rd1+2], 4;",
    "cp.async of 8 bytes reads 12": "cp.async.ca.shared.global [%r1], [%rd1], 8, 12;",
    "executed by 16 lanes only": LOAD + "setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 "
    "%r2|%p2, %r2, 1, 31, -1;",
    "deadlock": LOAD + "setp.lt.u32 %p1, %r0, 16; @%p1 bra over; shfl.sync.bfly.b32 %r2|%p2, %r2, "
    "1, 31, -1; bra.uni over; over: bar.warp.sync -1;",
    "lanes have left": LOAD + "setp.lt.u32 %p1, %r0, 16; @%p1 ret; shfl.sync.bfly.b32 %r2|%p2, "
    "%r2, 1, 31, -1;",
    "does not come to an end": "again: bra.uni again;",
}


@pytest.mark.parametrize("text", FAULTS)
def test_faults(text, monkeypatch):
    monkeypatch.setattr("ptx.machine.MOST_TURNS", 100)
    body = FAULTS[text] + (KEEP if "KEEP" in text else "")
    with pytest.raises(Fault, match=text):
        through(body)


def test_hazards_of_shared_memory():
    _, _, made = through("ld.shared.b32 %r2, [%r1];")
    assert any("nobody wrote" in hazard for hazard in made.hazards)
    _, _, made = through(LOAD + "mov.u32 %r7, smem; st.shared.b32 [%r7], %r2;")
    assert any("different values to one place" in hazard for hazard in made.hazards)


MBARRIER = """
mov.u32 %r8, smem; setp.eq.s32 %p3, %r0, 0; add.s32 %r8, %r8, 2048;
@%p3 mbarrier.init.shared::cta.b64 [%r8], 32; @%p3 fence.mbarrier_init.release.cluster;
bar.sync 0; setp.lt.u32 %p4, %r0, 32; @%p4 bra wait;
"""


def test_mbarriers():
    """Warp 1 waits for warp 0 to arrive, and then reads what that has written."""
    body = (
        LOAD
        + "setp.lt.u32 %p4, %r0, 32; "
        + MBARRIER.replace("wait;", "write;")
        + """
{ .reg .pred done; waiting: mbarrier.try_wait.parity.shared::cta.b64 done, [%r8], 0;
@!done bra waiting; }
sub.s32 %r1, %r1, 512; ld.shared.v4.b32 {%r2,%r3,%r4,%r5}, [%r1]; bra.uni end;
write: st.shared.v4.b32 [%r1], {%r2,%r3,%r4,%r5};
mbarrier.arrive.shared::cta.b64 _, [%r8];
end:
"""
    )
    given, out, made = through(body + KEEP, 64)
    assert (out[32:] == given[:32]).all()
    assert not made.hazards
    _, _, made = through(body.replace("@!done bra waiting;", "") + KEEP, 64)
    assert any("race" in hazard for hazard in made.hazards)
    with pytest.raises(Fault, match="deadlock"):
        through(body.replace("mbarrier.arrive.shared::cta.b64 _, [%r8];", "") + KEEP, 64)


def test_an_mbarrier_tells_of_a_phase_what_came_before_its_end():
    """Warp 0 writes after the first phase and half of its lanes arrive for the second one. Warp 1
    waits for the first phase alone, so it may not read what was written then.
    """
    body = (
        LOAD
        + MBARRIER.replace("wait;", "write;")
        + """
{ .reg .pred done; waiting: mbarrier.try_wait.parity.shared::cta.b64 done, [%r8], 0;
@!done bra waiting; }
sub.s32 %r1, %r1, 512; ld.shared.v4.b32 {%r2,%r3,%r4,%r5}, [%r1]; bra.uni end;
write: mbarrier.arrive.shared::cta.b64 _, [%r8];
st.shared.v4.b32 [%r1], {%r2,%r3,%r4,%r5};
setp.lt.u32 %p5, %r0, 16; @%p5 mbarrier.arrive.shared::cta.b64 _, [%r8];
end:
"""
    )
    _, _, made = through(body + KEEP, 64)
    assert any("race: reads what another warp wrote" in hazard for hazard in made.hazards)


def halves(array):
    """bfloat16 numbers of 16 bits as float64."""
    return (array.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def small_bf16(shape, seed=0):
    """Random bits of small whole numbers."""
    numbers = np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)
    return (numbers.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(transposed):
    """Lane 4g + t has elements 2t and 2t + 1 of row g of every matrix."""
    trans = ".trans" if transposed else ""
    body = LOAD + TO_SHARED + "bar.warp.sync -1; ldmatrix.sync.aligned.m8n8.x4" + trans
    given, out, made = through(body + ".shared.b16 {%r2,%r3,%r4,%r5}, [%r1]; " + KEEP)
    matrices = given.view(np.uint16).reshape(4, 8, 8)
    for q, lane, e in itertools.product(range(4), range(32), range(2)):
        row, column = lane // 4, 2 * (lane % 4) + e
        wanted = matrices[q][column][row] if transposed else matrices[q][row][column]
        assert out[lane].view(np.uint16)[2 * q + e] == wanted
    assert not made.hazards
    store = "stmatrix.sync.aligned.m8n8.x4" + trans + ".shared.b16 [%r1], {%r2,%r3,%r4,%r5}; "
    load = "ldmatrix.sync.aligned.m8n8.x4" + trans + ".shared.b16 {%r2,%r3,%r4,%r5}, [%r1]; "
    given, out, made = through(LOAD + store + "bar.warp.sync -1; " + load + KEEP)
    assert (given == out).all()
    assert not made.hazards


def fragment(matrix, lane, register, e, rows):
    """Element e of a register of operand A: rows g (+ 8), then columns further to the right."""
    row = lane // 4 + 8 * (register % rows)
    return matrix[row][2 * (lane % 4) + e + 8 * (register // rows)]


def test_mma_bf16():
    a, b = halves(small_bf16((16, 16), 1)), halves(small_bf16((8, 16), 2))
    bits = [small_bf16((16, 16), 1), small_bf16((8, 16), 2)]
    left = np.array([[[fragment(bits[0], lane, r, e, 2) for e in (0, 1)] for r in range(4)]
                     for lane in range(32)], np.uint16)  # fmt: skip
    right = np.array([[[bits[1][lane // 4][2 * (lane % 4) + e + 8 * r] for e in (0, 1)]
                       for r in range(2)] for lane in range(32)], np.uint16)  # fmt: skip
    out = np.zeros((32, 4), np.float32)
    body = (
        PLACES
        + LOAD
        + """
ld.param.u64 %rd5, [p2]; mul.wide.u32 %rd6, %r0, 8; add.s64 %rd5, %rd5, %rd6;
ld.global.v2.b32 {%r6,%r7}, [%rd5]; mov.b32 %r10, 0f3F800000;
mov.b32 %r11, %r10; mov.b32 %r12, %r10; mov.b32 %r13, %r10;
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
{%r2,%r3,%r4,%r5}, {%r2,%r3,%r4,%r5}, {%r6,%r7},
{%r10,%r11,%r12,%r13};
"""
        + KEEP
    )
    run(body, [np.ascontiguousarray(left).view(np.uint32), out, np.ascontiguousarray(right)], {1})
    product = 1 + a @ b.T
    for lane, register in itertools.product(range(32), range(4)):
        row, column = lane // 4 + 8 * (register // 2), 2 * (lane % 4) + register % 2
        assert out[lane][register] == product[row][column]


def for_each(names, parameter, bits, text):
    """``text`` for every register in ``names`` and the place of its number among those of a thread
    in a parameter (threads, registers).
    """
    step = bits // 8
    begin = (
        f"ld.param.u64 %rd9, [p{parameter}]; mul.wide.u32 %rd10, %r0, {len(names) * step}; "
        "add.s64 %rd9, %rd9, %rd10; "
    )
    return begin + "".join(
        text.format(name=name, place=f"[%rd9+{k * step}]") for k, name in enumerate(names)
    )


#: Shapes of mma.sync by the type of its operands, as (rows, depth).
MMA = [
    ("f16", 16, 16),
    ("tf32", 16, 8),
    *(("f64", *s) for s in ((8, 4), (16, 4), (16, 8), (16, 16))),
]


@pytest.mark.parametrize(("kind", "rows", "depth"), MMA)
def test_other_shapes_of_mma(kind, rows, depth):
    """Lane 4g + t holds rows g (and g + 8). Of every four elements of K it has the one with number
    t, of eight elements of float16 those with numbers 2t and 2t + 1.
    """
    generator, pair = np.random.default_rng(3), 2 if kind == "f16" else 1
    a, b, c = (
        generator.integers(-4, 5, s).astype(float) for s in ((rows, depth), (8, depth), (rows, 8))
    )
    high = rows // 8  # blocks of eight rows

    def operand(matrix, lane, blocks):
        rows_of_lane = range(lane // 4, 8 * blocks, 8)
        steps = range(pair * (lane % 4), depth, 4 * pair)
        return [matrix[row][k + e] for k in steps for row in rows_of_lane for e in range(pair)]

    def sums(matrix, lane):
        first = 2 * (lane % 4)
        return [matrix[row][first + e] for row in range(lane // 4, rows, 8) for e in (0, 1)]

    def by_lane(held, matrix, dtype, *rest):
        return np.array([held(matrix, lane, *rest) for lane in range(32)], dtype)

    stored = {"f16": np.float16, "tf32": np.float32, "f64": np.float64}[kind]
    total, wide, bits = ("f64", np.float64, 64) if kind == "f64" else ("f32", np.float32, 32)
    given = [
        by_lane(operand, a, stored, high),
        by_lane(operand, b, stored, 1),
        by_lane(sums, c, wide),
    ]
    out = np.zeros_like(given[2])
    counts = [array[0].nbytes * 8 // bits for array in given]
    operands = [[f"%{x}{k}" for k in range(n)] for x, n in zip("abc", counts, strict=True)]
    read, write = (
        f"ld.global.b{bits} {{name}}, {{place}}; ",
        f"st.global.b{bits} {{place}}, {{name}}; ",
    )
    x, y, z = ("{" + ", ".join(names) + "}" for names in operands)
    shape = f"m{rows}n8k{depth}.row.col.{total}.{kind}.{kind}.{total}"
    body = "".join(
        ["mov.u32 %r0, %tid.x; "]
        + [for_each(names, k, bits, read) for k, names in enumerate(operands)]
        + [f"mma.sync.aligned.{shape} {z}, {x}, {y}, {z}; ", for_each(operands[2], 3, bits, write)]
    )
    declared = "".join(f".reg .b{bits} {name}; " for names in operands for name in names)
    run(body, [*given, out], {3}, declared)
    assert (out == by_lane(sums, c + a @ b.T, wide)).all()


WGMMA = """
and.b32 %r20, %r0, 31; mov.b32 %r30, 0; mov.b32 %r31, 0; mov.b32 %r32, 0; mov.b32 %r33, 0;
mov.u32 %r9, smem; shr.u32 %r9, %r9, 4; cvt.u64.u32 %rd7, %r9; DESCRIPTOR
fence.proxy.async.shared::cta; bar.sync 0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
{%r30,%r31,%r32,%r33}, %rd8, %rd9, 0, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
st.global.v4.b32 [%rd2], {%r30,%r31,%r32,%r33};
"""


def test_wgmma_without_swizzle():
    """A (64, 16) and B (8, 16) in shared memory: blocks of 8 × 8 of 128 bytes each."""
    a, b = small_bf16((64, 16), 1), small_bf16((8, 16), 2)
    blocks = [m.reshape(-1, 8, 2, 8).transpose(0, 2, 1, 3).ravel() for m in (a, b)]
    image = np.concatenate([*blocks, np.zeros(2048 - 1152, np.uint16)])
    given = image.view(np.uint32).reshape(256, 4)
    fields = 128 >> 4 << 16 | 256 >> 4 << 32  # to the next block along K, and along M or N
    descriptor = f"or.b64 %rd8, %rd7, {fields}; add.s64 %rd9, %rd8, {2048 >> 4};"
    body = LOAD + TO_SHARED + WGMMA.replace("DESCRIPTOR", descriptor)
    _, out, made = through(body, 256, 4096, given)  # two warpgroups compute the same
    product = halves(a) @ halves(b).T
    values = out.view(np.float32)
    for thread, e in itertools.product(range(256), range(4)):
        row = 16 * (thread // 32 % 4) + thread % 32 // 4 + 8 * (e // 2)
        assert values[thread][e] == product[row][2 * (thread % 4) + e % 2]
    assert not made.hazards
    for removed, hazard in (
        ("fence.proxy.async.shared::cta; ", "no fence.proxy.async"),
        ("wgmma.fence.sync.aligned;\n", "without a fence since its registers were used"),
        ("wgmma.wait_group.sync.aligned 0;", "touches accumulators of a wgmma under way"),
        ("wgmma.commit_group.sync.aligned; ", "touches accumulators of a wgmma under way"),
    ):
        _, _, made = through(body.replace(removed, ""), 256, 4096, given)
        assert any(hazard in text for text in made.hazards), removed


def swizzled(matrix):
    """Rows of 32, 64 or 128 bytes, eight of them a group: a row's 16-byte chunks are exchanged by
    the number of the row's 128-byte line.
    """
    rows, chunks = len(matrix), matrix.shape[1] // 8
    image = np.zeros((rows, chunks, 8), np.uint16)
    for row, chunk in itertools.product(range(rows), range(chunks)):
        line = row * chunks // 8
        image[row, chunk ^ line % chunks] = matrix[row, 8 * chunk : 8 * chunk + 8]
    return image.ravel()


#: Fills a block's shared memory with 96 bytes from each thread, reads what is an operand in
#: registers, and multiplies. Parameters: image, output, operand.
SWIZZLED = """
mov.u32 %r0, %tid.x; mov.u32 %r1, smem; mad.lo.s32 %r2, %r0, BYTES, %r1;
ld.param.u64 %rd1, [p0]; mul.wide.u32 %rd4, %r0, BYTES; add.s64 %rd1, %rd1, %rd4;
ld.param.u64 %rd2, [p1]; mul.wide.u32 %rd4, %r0, OUTPUT; add.s64 %rd2, %rd2, %rd4;
ld.param.u64 %rd3, [p2]; mul.wide.u32 %rd4, %r0, 16; add.s64 %rd3, %rd3, %rd4;
ld.global.v4.b32 {%r20,%r21,%r22,%r23}, [%rd3]; COPY START
shr.u32 %r9, %r1, 4; cvt.u64.u32 %rd7, %r9; or.b64 %rd8, %rd7, FIELDS; add.s64 %rd9, %rd8, SECOND;
setp.ne.s32 add, ADD, 0; fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.SHAPE.f32.bf16.bf16 {SUMS}, FIRST, %rd9, add, 1, 1, LAYOUTS;
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; KEEP
"""


def swizzled_product(columns, transposed, in_registers):
    """The text of a kernel for operands whose rows have 16, 32 or 64 elements."""
    count = (columns if transposed else 8) // 2  # registers of sums
    mode = {64: 1, 32: 2, 16: 3}[columns]
    fields = (
        mode << 62 | 16 * columns >> 4 << 32 | 1 << 16
    )  # groups of eight rows follow each other
    sums = [f"%c{k}" for k in range(count)]
    copy = "".join(
        f"ld.global.v4.b32 {{%r4,%r5,%r6,%r7}}, [%rd1+{k}]; "
        f"st.shared.v4.b32 [%r2+{k}], {{%r4,%r5,%r6,%r7}}; "
        for k in range(0, 96, 16)
    )
    texts = {
        "BYTES": 96, "OUTPUT": 4 * count, "COPY": copy, "FIELDS": fields - (fields >> 63 << 64),
        "START": "".join(f"mov.f32 {x}, 0f3F800000; " for x in sums), "SECOND": 8 * columns,
        "ADD": in_registers, "SHAPE": f"m64n{2 * count}k16", "SUMS": ",".join(sums),
        "FIRST": "{%r20,%r21,%r22,%r23}" if in_registers else "%rd8",
        "LAYOUTS": transposed if in_registers else f"0, {transposed}",
        "KEEP": "".join(f"st.global.f32 [%rd2+{4 * k}], {x}; " for k, x in enumerate(sums)),
    }  # fmt: skip
    body = SWIZZLED
    for name, text in texts.items():
        body = body.replace(name, str(text))
    return body, ".reg .pred add; " + "".join(f".reg .f32 {x}; " for x in sums)


@pytest.mark.parametrize("columns", [16, 32, 64], ids="swizzle{}".format)
@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("in_registers", [0, 1])
def test_wgmma_with_swizzle(columns, transposed, in_registers):
    """A (64, 16) in shared memory, or in registers, where sums begin at 1; B (8, 16), or (16, N)
    transposed.
    """
    a, b = small_bf16((64, columns), 1), small_bf16((16 if transposed else 8, columns), 2)
    image = np.concatenate([swizzled(a), swizzled(b)])
    image = np.pad(image, (0, 128 * 48 - len(image)))
    places = [*itertools.product(range(4), (0, 1))]
    held = np.array([[fragment(a[16 * (t // 32) :], t % 32, r, e, 2) for r, e in places]
                     for t in range(128)])  # fmt: skip
    out = np.zeros((128, (columns if transposed else 8) // 2), np.float32)
    body, declared = swizzled_product(columns, transposed, in_registers)
    made = run(body, [image, out, held], {1}, declared, 128, 128 * 96)
    assert not made.hazards
    right = halves(b) if transposed else halves(b)[:, :16].T
    product = halves(a)[:, :16] @ right + in_registers
    for thread, k in itertools.product(range(128), range(out.shape[1])):
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (k // 2 % 2)
        assert out[thread][k] == product[row][8 * (k // 4) + 2 * (thread % 4) + k % 2]


def test_registers_of_a_warpgroup():
    through("setmaxnreg.inc.sync.aligned.u32 240; setmaxnreg.dec.sync.aligned.u32 24;", 128)
    with pytest.raises(Unsupported):
        through("setmaxnreg.inc.sync.aligned.u32 250;", 128)


def test_every_opcode_is_met():
    """Except opcodes that need a whole kernel: test_ptx.py runs tensor copies, which need a map."""
    for body in ("exit;", "add.rn.f32 %r1, %r2, %r3; not.b16 %h1, %h2;"):
        machine(body, "", 1)
    with_a_map = {
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes",
        "mbarrier.arrive.expect_tx.shared::cta.b64",
    }
    assert {*opcodes.TABLE} - met == with_a_map
