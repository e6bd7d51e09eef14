"""What a case computes: a function for each kind of call.

It takes a backend's name, "reference" for the truth in float64, and returns two lists of tensors
to compare: losses or sums, and gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from family import loss_and_grads, siglip_and_grads
from torch import Tensor

from alphacl_fast import loss_against, ops, siglip_loss
from alphacl_fast.bundles import (
    PairFunction,
    Pairing,
    Rows,
    RowScalars,
    Term,
    Weight,
    accumulation_dtype,
)
from alphacl_fast.objectives import KINDS

if TYPE_CHECKING:
    from .cases import Case

Views = tuple[Tensor, Tensor]
Results = tuple[list[Tensor], list[Tensor]]


def loss(case: Case, views: Views, backend: str, precision: str | None) -> Results:
    """The public loss, and the gradients of all that it learns."""
    options = dict(case.setting)
    if case.ids is not None:
        options["ids"] = torch.arange(case.pairs) % case.ids
    value, *gradients = loss_and_grads(
        *views, case.objective, case.options, tau=case.tau, backend=backend, precision=precision,
        **options,
    )  # fmt: skip
    return [value], gradients


def siglip(case: Case, views: Views, backend: str, precision: str | None) -> Results:
    """The same of `siglip_loss`, which learns a scale and a bias."""
    options = {**case.setting, "backend": backend, "precision": precision}
    value, *gradients = siglip_and_grads(siglip_loss, *views, 7.0, -5.0, **options)
    return [value], gradients


def every_length(case: Case, views: Views, backend: str, precision: str | None) -> Results:
    """The loss of rows whose lengths go from 2⁻¹⁰⁰ to 2¹⁰⁰, and the gradients times the lengths."""
    exponents = torch.linspace(-100, 100, case.pairs, dtype=torch.float64).round()
    lengths = 2.0 ** exponents.unsqueeze(1)
    lengths = lengths, lengths.flip(0)
    views = tuple((z * by).to(z.dtype) for z, by in zip(views, lengths, strict=True))
    value, (dz1, dz2, *others) = loss(case, views, backend, precision)
    scaled = [d.double() * by for d, by in zip((dz1, dz2), lengths, strict=True)]
    return value, [*scaled, *others]


def weighted_and_limited(case: Case, views: Views, backend: str, precision: str | None) -> Results:
    """The losses of given positives, whose negatives have log-weights and a largest gap.

    Every gradient. The truth is dense code.
    """
    z, y = _unit_rows(views, 2 * case.pairs, case.dtype).split(case.pairs)
    wide = accumulation_dtype(z.dtype)
    positive, weights = (torch.linspace(*ends, case.pairs, dtype=wide) for ends in _ENDS)
    t = z.double() @ y.double().t()
    gaps = (t - positive.double()[:, None]).flatten().sort()[0]
    # the edge lies in the widest of 400 intervals, so that rounding moves no pair over it
    near = gaps[len(gaps) // 2 :][:400]
    widest = near.diff().argmax()
    most = float(near[widest : widest + 2].mean())
    leaves = [x.requires_grad_() for x in (z, y, positive, weights)]
    if backend == "reference":
        exponents = (z @ y.t() - positive[:, None]) / case.tau + weights
        kept = exponents.masked_fill(t - positive.double()[:, None] > most, -torch.inf)
        losses = kept.exp().sum(1).log1p()
    else:
        losses = loss_against(
            *leaves[:3], temperature=case.tau, log_weights=weights, max_gap=most, backend=backend,
            precision=precision, reduction="none",
        )  # fmt: skip
    gradients = torch.autograd.grad((losses * torch.linspace(0.5, 1.5, case.pairs)).sum(), leaves)
    return [losses.detach()], [*gradients]


#: Of the positives, and of the log-weights, which reorder the terms.
_ENDS = (-0.2, 0.4), (2.0, -3.0)


# --- the operators alone --------------------------------------------------------------------------


def _unit_rows(views: Views, count: int, *dtypes: torch.dtype) -> Tensor:
    """The first rows of both views, of length 1 but for their rounding to each of the dtypes."""
    rows = torch.nn.functional.normalize(torch.cat(views).double(), dim=1)[:count]
    for dtype in (*dtypes, views[0].dtype):
        rows = rows.to(dtype)
    return rows


def rectangle(case: Case, views: Views, backend: str, precision: str | None) -> Results:
    """Both sweeps of two sides, all of whose pairs count, as the rows of two processes have them.

    Returns the log-sum-exp of every anchor over the other side, and the gradient of all rows.
    """
    f, split = _unit_rows(views, sum(case.sides), case.dtype), case.sides[0]
    anchors = len(f) if case.both else split
    gain = torch.linspace(0.5, 1.5, anchors, dtype=accumulation_dtype(f.dtype))
    return _rectangle_of(case, f, gain, backend, precision)


def weights_far_apart(case: Case, views: Views, backend: str, precision: str | None) -> Results:
    """The same of anchors whose weights range from 2⁻⁵⁰ to 2³⁰, and rise and fall again.

    Every row of the gradient is relative to the sum of its own weights.
    """
    f, split = _unit_rows(views, sum(case.sides), case.dtype), case.sides[0]
    anchors = len(f) if case.both else split
    place = torch.linspace(-1, 1, anchors, dtype=accumulation_dtype(f.dtype)).abs()
    gain = (30 - 80 * place).exp2()
    sums, (df,) = _rectangle_of(case, f, gain, backend, precision)
    _, (weights,) = _dense_rectangle(f.double(), split, gain.double(), case.tau, rows=False)
    return sums, [df / weights]


def rows_in_one_direction(case: Case, views: Views, backend: str, precision: str | None) -> Results:
    """A rectangle of rows that are nearly equal: roundings average out in a gradient, and what a
    product cuts off does not.
    """
    f = torch.nn.functional.normalize(1 + 0.2 * torch.cat(views)[: sum(case.sides)], dim=1)
    anchors = len(f) if case.both else case.sides[0]
    return _rectangle_of(case, f, f.new_ones(anchors), backend, precision)


def _rectangle_of(
    case: Case, f: Tensor, gain: Tensor, backend: str, precision: str | None
) -> Results:
    split, anchors = case.sides[0], len(gain)
    if backend == "reference":
        return _dense_rectangle(f, split, gain, case.tau)
    largest = 1.01 / case.tau
    function = PairFunction("exp", (), gain.new_tensor(case.tau), (-largest, largest))
    operands, scalars = (Rows(f), Pairing(split, 0, anchors), function), RowScalars(0 * gain)
    how = precision or "", backend
    shift, total = ops.row_sums(*operands, scalars, (Term.SHIFT, Term.F), *how)
    lse = shift + total.log()
    scalars = scalars._replace(row_weight=gain, shift=lse)
    df, *_ = ops.pair_grad(*operands, scalars, Weight.F, (), (0, len(f)), *how)
    return [lse], [df]


def _dense_rectangle(f: Tensor, split: int, gain: Tensor, tau: float, rows: bool = True) -> Results:
    """Without ``rows``: the sums of their weights in place of their gradients."""
    t = f[:split] @ f[split:].t() / tau
    lse = torch.cat([t.logsumexp(1), t.logsumexp(0)])[: len(gain)]
    g = (t - lse[:split, None]).exp() * gain[:split, None]
    if len(gain) > split:
        g += (t - lse[split:]).exp() * gain[split:]
    if not rows:
        return [lse], [torch.cat([g.sum(1), g.sum(0)]).unsqueeze(1)]
    return [lse], [torch.cat([g @ f[split:], g.t() @ f[:split]])]


def one_sum(case: Case, views: Views, backend: str, precision: str | None) -> Results:
    """The log-sum-exp of every row over all others and over the other view, with no other sum.

    Of exp(t/τ) or, where the objective is `alpha_direct`, of exp(−d⁴/τ), whose moment every
    objective wants too. The truth is `blocked`'s in float64.
    """
    f = _unit_rows(views, 2 * case.pairs, case.dtype)
    n, tau = len(f), f.new_tensor(case.tau, dtype=accumulation_dtype(f.dtype))
    kind, params, log_range = "exp", (), (-1.01 / case.tau, 1.01 / case.tau)
    if case.objective == "alpha_direct":
        kind, params, log_range = "power", (2.0, 2.0), (-9.1 / case.tau, 0.0)
    scalars, sums = RowScalars(tau.new_zeros(n)), []
    for pairing in (Pairing(0, n // 2, n), Pairing(n // 2, 0, n)):
        shift, total = ops.row_sums(
            Rows(f), pairing, PairFunction(kind, params, tau, log_range), scalars,
            (Term.SHIFT, Term.F), precision or "", "blocked" if backend == "reference" else backend,
        )  # fmt: skip
        sums.append(shift + total.log())
    return sums, []


#: Pair kinds with their parameters: each exponent for which a formula has a branch of its own, and
#: one without.
_KINDS = (
    ("exp", ()), ("gibbs", (2.0,)), ("hinge", (0.3,)), ("sigmoid", (2.0,)), ("square", ()),
    ("logistic", ()), *(("power", (2.0, q)) for q in (0.5, 1.0, 1.5, 2.0, 3.0)),
    *(("inverse", (2.0, q, 1.5)) for q in (0.5, 1.0, 1.5, 2.0, 3.0)),
    *(("gamma", (g,)) for g in (1.0, 2.0, 3.0)),
)  # fmt: skip


def every_kind(case: Case, views: Views, backend: str, precision: str | None) -> Results:
    """Both sweeps of every pair kind in every form, with all operands and terms: combinations that
    no objective asks for are among them. The truth is `blocked`'s in float64.
    """
    # every arithmetic multiplies bfloat16 numbers exactly, so no pair comes to lie beyond a kink
    f = _unit_rows(views, 2 * case.pairs, torch.bfloat16, case.dtype)
    generator, n = torch.Generator().manual_seed(1), len(f)
    vectors = torch.rand(7, n, generator=generator).to(accumulation_dtype(f.dtype))
    rows, pairing = Rows(f, vectors[0] + 0.5, -vectors[1]), Pairing(0, n // 2, n)
    how = precision or "", "blocked" if backend == "reference" else backend
    sums, gradients = [], []
    for name, params in _KINDS:
        offset = vectors[6] - 6 if name == "gamma" else vectors[6]  # gamma: arguments below 0
        scalars = RowScalars(*vectors[2:5], offset, vectors[5])
        function = PairFunction(name, params, vectors.new_tensor(case.tau))
        sums += _sums_in_every_form(rows, pairing, function, scalars, how)
        df, weights, terms = ops.pair_grad(
            rows, pairing, function, scalars, Weight.F_PLUS_DF, _terms(name), (0, n), *how
        )
        sums += [*terms]
        gradients += [df, weights]
    return sums, gradients


def _terms(kind: str) -> tuple[Term, ...]:
    """All terms that are sums, without the derivative in τ of a kind that does not depend on it."""
    all_but_tau = Term.DF_MOMENT, Term.F, Term.F_MOMENT, Term.DF
    return all_but_tau if KINDS[kind].dtau is None else (*all_but_tau, Term.DTAU)


def _sums_in_every_form(rows, pairing, function, scalars, how) -> list[Tensor]:
    operands = rows, pairing, function
    sums = [*ops.row_sums(*operands, scalars, _terms(function.kind), *how)]
    if function.kind == "exp":  # the largest similarity is no matter of the kind
        sums += [*ops.row_sums(*operands, scalars, (Term.T_MAX,), *how)]
    scalars = scalars._replace(shift=None)
    for log_range in (None, (-30.0, 30.0)) if KINDS[function.kind].log else ():
        operands = rows, pairing, function._replace(log_range=log_range)
        terms = Term.SHIFT, Term.F, Term.F_MOMENT
        shift, *others = ops.row_sums(*operands, scalars, terms, *how)
        sums += [x * shift.exp() for x in others]  # each backend chooses the shift
    return sums
