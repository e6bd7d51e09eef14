"""Floats by plain arithmetic on fractions: what the opcodes are tested against."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple


class Format(NamedTuple):
    bits: int
    mantissa: int  # bits of it that are stored
    bias: int

    @property
    def nan(self) -> int:
        return (1 << self.bits - 1) - 1


F16, BF16 = Format(16, 10, 15), Format(16, 7, 127)
F32, F64 = Format(32, 23, 127), Format(64, 52, 1023)
TF32 = Format(32, 10, 127)  # its 13 low bits are zeros
#: The NaN that a GPU writes, by its bytes. Tricks with bits lose it first: 0x1000 more is -0.
NAN = {2: 0x7FFF, 4: 0x7FFFFFFF, 8: 0x7FFFFFFFFFFFFFFF}


def decode(bits: int, form: Format) -> Fraction | float:
    """A finite number as a fraction; infinities, NaN and −0 as floats."""
    sign = -1 if bits >> form.bits - 1 else 1
    exponent = bits >> form.mantissa & (1 << form.bits - 1 - form.mantissa) - 1
    fraction = bits & (1 << form.mantissa) - 1
    if exponent == (1 << form.bits - 1 - form.mantissa) - 1:
        return math.nan if fraction else sign * math.inf
    if not exponent and not fraction:
        return Fraction(0) if sign > 0 else -0.0
    if exponent:
        fraction += 1 << form.mantissa
    power = max(exponent, 1) - form.bias - form.mantissa
    return sign * Fraction(fraction) * Fraction(2) ** power


def encode(value: Fraction | float, form: Format, mode: str = "rn", shift: int = 0) -> int:
    """The bits of a number rounded to nearest even (rn), away at ties (rna), or rz, rm, rp.

    ``shift``: zeros that follow the mantissa in the result (TF32).
    """
    if isinstance(value, float):
        if math.isnan(value):
            return form.nan
        if math.isinf(value) or value == 0:
            exponent = (1 << form.bits - 1 - form.mantissa - shift) - 1 if value else 0
            sign = int(math.copysign(1, value) < 0)
            return (sign << form.bits - 1) | exponent << form.mantissa + shift
        value = Fraction(value)
    sign, size = int(value < 0), abs(value)
    if not size:
        return 0
    power = size.numerator.bit_length() - size.denominator.bit_length()
    while Fraction(2) ** power > size:
        power -= 1
    while Fraction(2) ** (power + 1) <= size:
        power += 1
    power = max(power, 1 - form.bias)
    unit = Fraction(2) ** (power - form.mantissa)
    whole, rest = divmod(size, unit)
    up = {
        "rn": rest * 2 > unit or (rest * 2 == unit and whole % 2),
        "rna": rest * 2 >= unit,
        "rz": False,
        "rm": bool(rest and sign),
        "rp": bool(rest and not sign),
    }[mode]
    whole += bool(up)
    bits = (power + form.bias - 1 << form.mantissa) + int(whole)
    largest = (1 << form.bits - 1 - form.mantissa - shift) - 1 << form.mantissa
    if bits >= largest:
        infinite = mode in ("rn", "rna") or mode == ("rm" if sign else "rp")
        bits = largest if infinite else largest - 1
    return (bits << shift) | sign << form.bits - 1


def is_nan(value) -> bool:
    return isinstance(value, float) and math.isnan(value)
