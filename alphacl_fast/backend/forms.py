"""How a sweep keeps exp(log f) in range; decided once for every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bundles import Form, PairFunction, RowScalars, Term, Weight, leading
from ..objectives import kind

#: Largest |log f − shift| for which a constant shift will do: n·e^±64 (n·e^±600) stays a normal
#: number.
CONSTANT_SHIFT_RANGE = {torch.float32: 64.0, torch.float64: 600.0}


def constant_shift(function: PairFunction) -> float | None:
    """The centre of log f's range if exp(log f − centre) stays in range for every pair, otherwise
    None.
    """
    if function.log_range is None:
        return None
    low, high = function.log_range
    return (
        (low + high) / 2 if (high - low) / 2 <= CONSTANT_SHIFT_RANGE[function.tau.dtype] else None
    )


def finite(shift: Tensor) -> Tensor:
    """The shift, with −inf (every pair of the row so far was excluded) replaced by 0."""
    return torch.where(shift > -torch.inf, shift, 0.0)


def rescale(shift: Tensor, sums: Tensor, new: Tensor) -> None:
    """Rescales sums that are relative to exp(shift) to exp(new); changes both in place."""
    sums *= (shift - finite(new)).exp()
    shift.copy_(new)


def of_row_sums(function: PairFunction, terms: tuple[Term, ...]) -> tuple[Form, float]:
    """The form of a `row_sums` sweep, and its constant shift (0 in the other forms)."""
    if leading(terms) == Term.T_MAX:
        return Form.T_MAX, 0.0
    if leading(terms) is None:
        return Form.PLAIN, 0.0
    shift = constant_shift(function)
    return (Form.ONLINE, 0.0) if shift is None else (Form.CONSTANT, shift)


def of_pair_grad(
    function: PairFunction, scalars: RowScalars, weight: Weight, terms: tuple[Term, ...]
) -> tuple[Form, float]:
    """The form of a `pair_grad` sweep, and its constant shift (0 in the plain form).

    With a constant shift g_ij = row_weight_i·exp(shift − shift_i)·exp(log f − shift): one factor
    per row.
    """
    shift = None
    if weight == Weight.F and not terms and scalars.shift is not None and kind(function.kind).log:
        shift = constant_shift(function)
    return (Form.PLAIN, 0.0) if shift is None else (Form.CONSTANT, shift)
