"""From embeddings to loss and gradient: the O(n·D) work around the two sweeps.

When the loss is a scalar, both sweeps run in the forward and the backward only scales; with
``reduction="none"`` the second sweep waits for the incoming row gradient. Derivation:
docs/mathematics.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native, ops
from .backend import cpu
from .bundles import PairFunction, Rows, RowScalars, Term, Weight, accumulation_dtype, leading
from .call import BoundCall, Guide, Layout, Loss, Need, SameId, without_autocast
from .objectives import (
    INFINITE_TAU,
    BatchNumbers,
    ClosedForm,
    Objective,
    RowSolution,
    RowStep,
    kind,
    newton,
)

# --- rows -----------------------------------------------------------------------------------------


class Features(NamedTuple):
    """The stacked views as the sweeps see them, with the rows' normalisation.

    Half-precision cosine rows stay raw, because rounding a normalised row would cost 1.7e-3 … 4e-2
    of the gradient; ``rows.scale`` then normalises the similarities.
    """

    rows: Rows  # f (2N, D), scale and bias (2N,)
    inv_norm: Tensor | None  # (2N,) 1/‖z‖ for cosine, 0 for an all-zero row; None otherwise

    @classmethod
    def make(cls, z: Tensor, similarity: str, center: Tensor | None = None) -> Features:
        """From the stacked views.

        ``center`` (D,) is subtracted from euclidean rows, by default their mean.
        """
        accumulate = accumulation_dtype(z.dtype)
        if similarity == "dot":
            return cls(Rows(z), None)
        wide = z.to(accumulate)
        if similarity == "euclidean":
            # t does not change under a common shift, but its float32 error does: 0.37 → 3e-6 at an
            # offset of 100.
            centered = wide - (wide.mean(0) if center is None else center)
            return cls(Rows(centered, None, centered.square().sum(1) / -2), None)
        # squares of the rows themselves could leave the range of the dtype
        largest = wide.abs().amax(1)
        zero = largest == 0
        safe = torch.where(zero, 1.0, largest)
        scaled = wide / safe.unsqueeze(1)
        norm = torch.where(zero, 1.0, torch.linalg.vector_norm(scaled, dim=1))
        inv_norm = torch.where(
            zero, 0.0, ((1 / norm) / safe).clamp(max=torch.finfo(accumulate).max)
        )
        if z.dtype == accumulate:
            return cls(Rows(scaled / norm.unsqueeze(1)), inv_norm)
        # products of extreme bfloat16 rows would leave the range of float32 (`NormalizedRows`)
        extreme = (largest < 2.0**-30) | ((largest >= 2.0**30) & largest.isfinite())
        exponent = (torch.frexp(safe).exponent - 1).clamp(-126, 126)
        lift = torch.where(extreme, torch.ldexp(torch.ones_like(safe), -exponent), 1.0)
        scale = torch.where(zero, 0.0, (1 / norm) / (safe * lift))
        return cls(Rows((wide * lift.unsqueeze(1)).to(z.dtype), scale), inv_norm)

    @classmethod
    def of_views(
        cls, z1: Tensor, z2: Tensor, call: BoundCall, center: Tensor | None = None
    ) -> tuple[Features, Tensor]:
        """Features of the stacked views and t⁺ (2N,); for ``center`` see `make`."""
        if call.similarity == "cosine" and ops.has(call.backend, "unit_rows"):
            f, scale, inv_norm, pos = ops.unit_rows(z1.detach(), z2.detach(), call.backend)
            # a rank without rows has the fields of the others: they determine its messages
            raw = z1.dtype != accumulation_dtype(z1.dtype)
            return cls(Rows(f, scale if raw else None), inv_norm), pos
        features = cls.make(torch.cat([z1, z2]), call.similarity, center)
        return features, positives(features.wide(), call.similarity)

    def wide(self) -> Tensor:
        """(2N, D) rows in the accumulation dtype, normalised for cosine."""
        f, scale = self.rows.f, self.rows.scale
        wide = f.to(accumulation_dtype(f.dtype))
        return wide if scale is None else wide * scale.unsqueeze(1)


def first(rows: Rows, count: int) -> Rows:
    """The first rows."""
    if count == rows.f.shape[0]:
        return rows
    return Rows._make([None if x is None else x[:count] for x in rows])


def positives(rows: Tensor, similarity: str) -> Tensor:
    """(2N,) t⁺ of every row of the stacked views (2N, D)."""
    a, b = rows.chunk(2)
    return ((a - b).square().sum(1) / -2 if similarity == "euclidean" else (a * b).sum(1)).repeat(2)


# --- the sweeps of one batch ----------------------------------------------------------------------


def pair_function(tau: Tensor, call: BoundCall) -> PairFunction:
    """The objective's pair kind with its parameters and the temperature that it sees."""
    objective, log_range = call.objective, None
    params = objective.params(call.c)
    if call.similarity == "cosine" and call.temperature is not None and kind(objective.kind).log:
        seen = call.temperature if objective.uses_temperature else 1.0
        log_range = ops.log_range(objective.kind, params, seen)
    return PairFunction(objective.kind, params, objective.kind_tau(tau), log_range)


class Sweeps:
    """One batch bound to its operators: the `Pairs` that an objective solves on, and the
    gradient sweep.
    """

    def __init__(
        self,
        rows: Rows,
        pos: Tensor,
        tau: Tensor,
        call: BoundCall,
        layout: Layout | None = None,
        same_id: SameId | None = None,
        guide: Guide | None = None,
        limit: Tensor | None = None,
    ) -> None:
        """``rows`` and ``pos`` may have more rows than the layout, which come behind.

        ``limit`` (anchors,): negatives with a larger t do not count. It is compared before
        log-weights, the bias of ``rows``, are added. None: the limit is ``pos`` + ``max_gap``.
        """
        self.layout = Layout.of(call, pos.shape[0] // 2) if layout is None else layout
        self.same_id, self.call, self.guided = same_id, call, guide is not None
        self.rows = first(call.objective.rows_of_sweeps(rows, tau), self.layout.rows)
        anchors = self.layout.anchors
        self.pos, self.tau = pos if len(pos) == anchors else pos[:anchors], tau
        self.divisor = call.divisor(pos.shape[0] // 2)
        self.function = pair_function(tau, call)
        weighted = limit is not None and rows.bias is not None
        if limit is None:
            limit = None if call.max_gap is None else self.pos + call.most_gap(self.pos.dtype)
        self.pairing = self.layout.pairing(same_id, limit, guide, weighted)
        # (anchors,) |Neg(i)| and whether it is 0, where not all negatives count; None: not known
        self._n_neg: Tensor | None = None
        self._empty: Tensor | None = None
        if same_id is not None and call.max_gap is None and guide is None:
            self._n_neg, self._empty = same_id.n_neg, same_id.empty

    @property
    def most_neg(self) -> int:
        return self.layout.n_neg

    @property
    def all_count(self) -> bool:
        """Whether every anchor has all negatives of the layout."""
        return self.same_id is None and self.call.max_gap is None and not self.guided

    @property
    def n_neg(self) -> int | Tensor:
        if self.all_count:
            return self.layout.n_neg
        if self._n_neg is None:
            self._count()
        return self._n_neg

    def _count(self) -> None:
        """Counts every anchor's negatives by a sweep in which each weighs exp(t/∞) = 1."""
        one = PairFunction("exp", (), torch.full_like(self.function.tau, INFINITE_TAU), (0.0, 0.0))
        _, count = self.row_sums((Term.SHIFT, Term.F), RowScalars(self.pos), one)
        self._n_neg, self._empty = count.clamp(min=1), count == 0

    def _find_empty(self, terms: tuple[Term, ...], sums: Tensor) -> None:
        """Finds the anchors without negatives, if they matter, from their first sums if these show
        it.
        """
        if self._empty is not None:
            return
        if self.call.objective.counts_negatives:
            self._count()
        elif leading(terms) == Term.T_MAX:
            self._empty = sums[0] == -torch.inf
        elif leading(terms) == Term.SHIFT:  # a sum of exponentials
            self._empty = sums[1] == 0

    def solve(self, objective: Objective, learn_tau: bool) -> RowSolution:
        """The solution of an objective; rows without negatives have loss and gradient 0."""
        solution = objective.solve(self, learn_tau)
        if self._empty is None or not objective.needs_negatives:
            return solution
        return weighted(solution, lambda x: torch.where(self._empty, 0.0, x), "loss")

    def sums(
        self,
        terms: tuple[Term, ...],
        *,
        shift: Tensor | None = None,
        argument_offset: Tensor | None = None,
        moment_origin: Tensor | None = None,
    ) -> Tensor:
        origin = self.pos if moment_origin is None else moment_origin
        sums = self.row_sums(
            terms, RowScalars(origin, shift=shift, argument_offset=argument_offset)
        )
        if self.all_count or not self.call.objective.needs_negatives:
            return sums
        self._find_empty(terms, sums)
        if self._empty is None:  # the empty sum, 0, gives the loss 0
            return sums
        # An empty sum becomes the sum over one pair with f = 1, where every formula is finite;
        # `solve` drops the result.
        head = int(leading(terms) is not None)
        largest = torch.where(sums[:head] == -torch.inf, 0.0, sums[:head])
        return torch.cat([largest, torch.where(self._empty, 1.0, sums[head:])])

    def row_sums(
        self, terms: tuple[Term, ...], scalars: RowScalars, function: PairFunction | None = None
    ) -> Tensor:
        """One `row_sums` sweep: (len(terms), anchors), of the objective's pair kind or another."""
        call, function = self.call, function or self.function
        return ops.row_sums(
            self.rows, self.pairing, function, scalars, terms, call.precision, call.backend
        )

    def grad(
        self, solution: RowSolution, terms: tuple[Term, ...], wanted: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient sweep of a solution, for the rows ``wanted`` = (low, high)."""
        scalars = RowScalars(*(getattr(solution, name) for name in RowScalars._fields))
        if scalars.moment_origin is None:
            scalars = scalars._replace(moment_origin=self.pos)
        return self.pair_grad(self.weight(solution), terms, scalars, wanted)

    def weight(self, solution: RowSolution) -> Weight:
        """By what a pair is weighed."""
        if self.call.objective.derivative:
            return Weight.DF
        return Weight.F if solution.baseline is None else Weight.F_PLUS_DF

    def pair_grad(
        self, weight: Weight, terms: tuple[Term, ...], scalars: RowScalars, wanted: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One `pair_grad` sweep."""
        if wanted[0] == wanted[1] and not terms:
            return self.nothing()
        call = self.call
        return ops.pair_grad(
            self.rows,
            self.pairing,
            self.function,
            scalars,
            weight,
            terms,
            wanted,
            call.precision,
            call.backend,
        )

    def nothing(self) -> tuple[Tensor, Tensor, Tensor]:
        """The empty result of a gradient sweep that is skipped."""
        return (self.pos.new_empty(0),) * 3

    def step(self, step: RowStep, *vectors: Tensor, **params: float) -> dict[str, Tensor]:
        tau, backend, anchors = self.function.tau, self.call.backend, self.layout.anchors
        values = tuple(params[name] for name in step.parameters)
        # without need a count costs a sweep, and a number of each anchor's own a compiled row step
        counted = self._n_neg is not None or self.call.objective.counts_negatives
        n_neg = self.n_neg if counted else self.layout.n_neg
        of_host = not any(isinstance(x, Tensor) for x in (n_neg, *values))
        if ops.has(backend, "row_step") and anchors and of_host:
            numbers = (tau, n_neg, self.divisor, anchors)
            outputs = ops.row_step(vectors, *numbers, step.name, values, backend).unbind(0)
        else:
            outputs = step(vectors, BatchNumbers(tau, n_neg, self.divisor), values)
        return dict(zip(step.outputs, outputs, strict=True))

    def apply(self, function: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return function(x), function.derivative(x)

    def newton(
        self,
        terms: tuple[Term, ...],
        origin: Tensor,
        start: tuple[Tensor, Tensor, Tensor],
        most: int,
        powers: Mapping[str, float],
    ) -> tuple[Tensor, Tensor]:
        low, high, y = start
        for _ in range(most):
            sums = self.sums(terms, shift=origin, argument_offset=y, moment_origin=origin)
            low, high, new, done = self.step(newton, *sums[:2], y, low, high, **powers).values()
            if self.all_done(done):  # reads a flag on the host once per sweep
                break
            y = new
        return y, sums

    def zeros(self) -> Tensor:
        return torch.zeros_like(self.pos)

    def stack(self, *vectors: Tensor) -> Tensor:
        return torch.stack(vectors)

    def mean_negative(self) -> Tensor:
        return self._mean(1, self.same_id)

    def moments(self) -> tuple[Tensor, Tensor]:
        return self._mean(1), self._mean(2)

    def _mean(self, power: int, same_id: SameId | None = None) -> Tensor:
        rows = Features(self.rows, None)
        return mean_negative(
            rows.wide(), self.rows.bias, self.layout, power, self.all_reduce_sum, same_id,
            every_row=self.call.ranks is None,
        )  # fmt: skip

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Σ over the rows held here → over all rows."""
        return x

    def all_done(self, done: Tensor) -> bool:
        return bool(done.all())


def weighted(solution: RowSolution, change: Callable[[Tensor], Tensor], *more: str) -> RowSolution:
    """A solution whose row weights, masses, τ gradients and ``more`` fields have been changed."""
    changed = {
        name: change(x)
        for name in ("row_weight", "mass", "dtau", *more)
        if (x := getattr(solution, name)) is not None
    }
    return replace(solution, **changed)


# --- constant α -----------------------------------------------------------------------------------


def mean_negative(
    rows: Tensor,
    bias: Tensor | None,
    layout: Layout,
    power: int = 1,
    all_reduce_sum: Callable[[Tensor], Tensor] = lambda x: x,
    same_id: SameId | None = None,
    *,
    every_row: bool = False,
) -> Tensor:
    """(anchors,) mean of t_ij^power over the negatives; differentiable.

    It costs O(n·D) for the first power and O(n·D²) for the second.

    Args:
        all_reduce_sum: adds a tensor up over the ranks: all their rows are negatives, ``rows``
            holds the rows of this one.
        same_id: rows with the anchor's id do not count (power 1 only); the mean is 0 where none is
            left.
        every_row: whether ``rows`` are all there are.
    """
    left, right = rows, rows
    if bias is not None:  # t_ij = ⟨[F_i, b_i, 1], [F_j, 1, b_j]⟩
        b, one = bias.unsqueeze(1), torch.ones_like(bias).unsqueeze(1)
        left, right = torch.cat([rows, b, one], 1), torch.cat([rows, one, b], 1)

    def total(a: Tensor, b: Tensor) -> Tensor:  # Σ_j over all rows of b
        if power == 2 and every_row and len(b) < b.shape[1]:
            return (a @ b.t()).square().sum(1)  # smaller than the matrix (D, D)
        # Not a @ Σb: its backward adds n equal numbers one after the other, which rounds in one
        # direction (1e-5 at n = 2,566).
        return (
            a * (all_reduce_sum(b.sum(0)) if power == 1 else a @ all_reduce_sum(b.t() @ b))
        ).sum(1)

    def own(a: Tensor, b: Tensor) -> Tensor:  # one excluded pair of each row
        return (a * b).sum(1).pow(power)

    if same_id is not None:
        every = slice(None)
        a, b = (
            (slice(layout.split), slice(layout.split, None)) if layout.rectangle else (every, every)
        )
        sums = [(left[a] * same_id.sums_with_other_ids(a, b, right[b])).sum(1)]
        if layout.rectangle and layout.anchors > layout.split:
            sums.append((left[b] * same_id.sums_with_other_ids(b, a, right[a])).sum(1))
        return torch.where(same_id.empty, 0.0, torch.cat(sums) / same_id.n_neg)
    if layout.rectangle:
        left_a, left_b = left.tensor_split([layout.split])
        right_a, right_b = right.tensor_split([layout.split])
        sums = total(left_a, right_b)
        if layout.partner:
            sums = sums - own(left_a, right_b)
        if layout.partner or not layout.rows:  # a rank without rows takes part in every all-reduce
            others = total(left_b, right_a) - own(left_b, right_a)
            sums = torch.cat([sums, others])[: layout.anchors]
        return sums / layout.n_neg
    sums = total(left, right) - own(left, right)
    if layout.partner:
        sums = sums - own(left, right.roll(layout.partner, 0))
    return sums / layout.n_neg


def closed_form(
    z1: Tensor,
    z2: Tensor,
    loss: Loss,
    layout: Layout,
    center: Tensor | None = None,
    all_reduce_sum: Callable[[Tensor], Tensor] = lambda x: x,
    same_id: SameId | None = None,
) -> Tensor:
    """(anchors,) losses of a constant-α objective by autograd through O(n·D) sums.

    For the arguments see `mean_negative`.
    """
    z = torch.cat([z1, z2])
    rows = unit_rows(z) if loss.similarity == "cosine" else z.to(accumulation_dtype(z.dtype))
    bias = None
    if loss.similarity == "euclidean":
        rows = rows - (rows.mean(0) if center is None else center)
        bias = rows.square().sum(1)[: layout.rows] / -2
    pos = positives(rows, loss.similarity)
    mean = mean_negative(rows[: layout.rows], bias, layout, 1, all_reduce_sum, same_id)
    return constant_alpha(loss.objective, mean - pos[: layout.anchors], layout, same_id)


def constant_alpha(
    objective: ClosedForm, mean_gap: Tensor, layout: Layout, same_id: SameId | None
) -> Tensor:
    """(anchors,) losses from the mean Δ over the negatives."""
    if same_id is None:
        return objective.weight(layout.n_neg) * mean_gap
    return torch.where(same_id.empty, 0.0, objective.weight(same_id.n_neg) * mean_gap)


# --- normalisation, differentiable ----------------------------------------------------------------


def through_normalization(d: Tensor, rows: Tensor, inv_norm: Tensor) -> Tensor:
    """dz = (dF − F⟨F, dF⟩)/‖z‖."""
    along = (rows * d).sum(1, keepdim=True)
    across = torch.addcmul(d, rows, along, value=-1)
    if torch.is_grad_enabled():  # the factors may be differentiated
        return across * inv_norm.unsqueeze(1)
    return across.mul_(inv_norm.unsqueeze(1))


class UnitRows(torch.autograd.Function):
    """(n, D) → rows of unit length in the accumulation dtype.

    Gradients stay finite for zero and for tiny rows.
    """

    @staticmethod
    def forward(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = Features.make(z, "cosine")
        rows = features.wide()
        # torch.compile loses the gradient of an output that is also saved
        return rows.clone(), rows, features.inv_norm

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.dtype = inputs[0].dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx, grad: Tensor | None, *of_saved: Tensor | None) -> Tensor | None:
        # torch.compile materialises absent gradients as zeros, and has no second derivatives
        if torch.compiler.is_compiling():
            return through_normalization(grad, *ctx.saved_tensors).to(ctx.dtype)
        if not first_derivative(grad, of_saved):
            return None
        # linear in ``grad``; a derivative in what was saved arrives here again, and raises
        return through_normalization(grad, *ctx.saved_tensors).to(ctx.dtype)


class _PlainUnitRows(native.PlainFunction):
    """`UnitRows` of plain tensors on a CPU."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, inv_norm = cpu.normalized(z)
        saved = rows.clone()  # the rows are the caller's
        UnitRows.setup_context(ctx, (z,), (rows, saved, inv_norm))
        return rows, saved, inv_norm

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *of_saved: Tensor | None) -> Tensor | None:
        if not first_derivative(grad, of_saved):
            return None
        if torch.is_grad_enabled() or not native.readable(grad):
            return UnitRows.backward(ctx, grad, *of_saved)
        return cpu.through_normalization(grad, *ctx.saved_tensors).to(ctx.dtype)


def unit_rows(z: Tensor) -> Tensor:
    """(n, D) rows of unit length in the accumulation dtype, differentiable."""
    if torch.compiler.is_compiling() or not native.readable(z):
        return UnitRows.apply(z)[0]
    if not (z.requires_grad and torch.is_grad_enabled()):
        return cpu.normalized(z)[0]
    return _PlainUnitRows.of_plain(z)[0]


# --- a batch from sums to gradients ---------------------------------------------------------------

_SOLVED = tuple(field.name for field in fields(RowSolution) if field.name != "loss")


class Saved(NamedTuple):
    """What a backward reads, with ``reduction="none"``: it runs the gradient sweep."""

    features: Features
    pos: Tensor  # t⁺ of all rows of the problem
    solution: RowSolution  # without its loss
    same_id: SameId | None
    guide: Guide | None = None

    def flatten(self) -> tuple[Tensor | None, ...]:
        """The number of entries is always the same.

        Each is a tensor of its own, because autograd tells outputs apart by identity.
        """
        tensors = (
            *self.features.rows,
            self.features.inv_norm,
            self.pos,
            *(getattr(self.solution, name) for name in _SOLVED),
            *(self.same_id or (None,) * len(SameId._fields)),
            *(self.guide or (None,) * len(Guide._fields)),
        )
        return tuple(None if x is None else x.view_as(x) for x in tensors)

    @classmethod
    def unflatten(cls, tensors: tuple[Tensor | None, ...]) -> Saved:
        rest = iter(tensors)
        features = Features(Rows._make(islice(rest, len(Rows._fields))), next(rest))
        pos, solution = (
            next(rest),
            RowSolution(**dict(zip(_SOLVED, islice(rest, len(_SOLVED)), strict=True))),
        )
        same_id = SameId._make(islice(rest, len(SameId._fields)))
        guide = Guide._make(rest)
        return cls(
            features, pos, solution,
            None if same_id.ids is None else same_id, None if guide.rows is None else guide,
        )  # fmt: skip


class Problem:
    """A batch, an objective and a temperature: solves the rows, then the gradient for given row
    weights.
    """

    def __init__(
        self,
        features: Features,
        pos: Tensor,
        tau: Tensor,
        call: BoundCall,
        same_id: SameId | None = None,
        sweeps: Sweeps | None = None,
        guide: Guide | None = None,
    ) -> None:
        self.features, self.pos, self.tau, self.call = features, pos, tau, call
        self.same_id, self.guide = same_id, guide
        self.n_first = pos.shape[0] // 2  # rows of the first view
        self.sweeps = sweeps or Sweeps(features.rows, pos, tau, call, same_id=same_id, guide=guide)

    @classmethod
    def of_views(
        cls,
        z1: Tensor,
        z2: Tensor,
        tau: Tensor,
        call: BoundCall,
        ids: Tensor | None = None,
        guide: Guide | None = None,
    ) -> Problem:
        """From embeddings (N, D), of this process or of one among several."""
        tau = tau.to(accumulation_dtype(z1.dtype))
        if call.ranks is not None:
            return call.ranks.problem(z1, z2, tau, call)
        same_id = SameId.of_views(ids, call, z1.shape[0], tau.dtype)
        return cls(*Features.of_views(z1, z2, call), tau, call, same_id, guide=guide)

    @classmethod
    def of_saved(cls, saved: Saved, tau: Tensor, call: BoundCall) -> Problem:
        tau = tau.to(saved.pos.dtype)
        if call.ranks is not None:
            return call.ranks.problem_of_saved(saved, tau, call)
        return cls(saved.features, saved.pos, tau, call, saved.same_id, guide=saved.guide)

    def saved(self, solution: RowSolution) -> Saved:
        return Saved(self.features, self.pos, solution, self.same_id, self.guide)

    def reduce(self, row_losses: Tensor) -> Tensor:
        """(anchors,) → what the caller receives."""
        return self.call.reduce(row_losses)

    def total(self, x: Tensor) -> Tensor:
        """Σ over the anchors of this process → over all anchors."""
        return x

    def solve(self, learn_tau: bool) -> RowSolution:
        objective = self.call.objective
        return self.sweeps.solve(objective, learn_tau and objective.tau_gradient == "rows")

    def loss_and_gradient(self, need: Need) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scalar loss, (dz1, dz2) in one tensor, dτ (None where not needed)."""
        objective = self.call.objective
        if objective.one_sweep:
            solution, dz, dtau = self._gradient(objective.start(self.sweeps), need, finish=True)
        else:
            solution, dz, dtau = self._gradient(self.solve(learn_tau=need.tau), need)
        return self.reduce(solution.loss), dz, dtau

    def gradient(
        self, solution: RowSolution, grad: Tensor, need: Need
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dz1, dz2) in one tensor and dτ for an incoming gradient of every row's loss."""
        c = self.call.of_anchors(grad.to(self.tau.dtype))
        return self._gradient(weighted(solution, lambda x: x * c), need)[1:]

    def _gradient(
        self, solution: RowSolution, need: Need, finish: bool = False
    ) -> tuple[RowSolution, Tensor | None, Tensor | None]:
        objective, n, rows = self.call.objective, self.n_first, self.features.rows.f.shape[0]
        views = slice(0 if need.z1 else n, rows if need.z2 else n)
        swept = self.sweeps.layout.rows  # one_view's z2 meets the pairs only through the positives
        low, high = min(views.start, swept), min(views.stop, swept)
        terms = objective.terms_of(need.tau) if finish else ()
        from_pairs = need.tau and objective.tau_gradient == "pairs"
        if from_pairs:
            terms = (*terms, Term.DTAU)
        df, weight_sums, sums = self.sweeps.grad(solution, terms, (low, high))
        if need.z1:
            objective.differentiate_rows(df, n, self.tau)
        if finish:
            solution = objective.finish(self.sweeps, solution, sums)
        dz = dtau = None
        if need.views:
            dz = self._to_views(df, solution.mass, weight_sums, slice(low, high), views)
        if need.tau:
            dtau = self.total(
                (solution.row_weight * sums[-1] if from_pairs else solution.dtau).sum(-1)
            )
        return solution, dz, dtau

    def _to_views(
        self, df: Tensor, q: Tensor, weight_sums: Tensor, used: slice, views: slice
    ) -> Tensor:
        """Gradient in some rows of the stacked views.

        It comes from the sweep's, of the rows ``used``, and through the positives, from the masses
        q (anchors,).
        """
        n, inv_norm = self.n_first, self.features.inv_norm
        d = df
        # the other rows receive only what comes through their positive
        if used.stop - used.start < 2 * n:
            d = self.tau.new_zeros(2 * n, self.features.rows.f.shape[1])
            d[used] = df.view(-1, d.shape[1])
        if inv_norm is not None and ops.has(self.call.backend, "unit_rows"):
            rows = self.features.rows
            ops.finish_rows(d, rows.f, rows.scale, inv_norm, q, self.call.backend)
            return d[views]
        # both anchors of a positive pair
        q = q.unsqueeze(1) if q.shape[0] == n else (q[:n] + q[n:]).unsqueeze(1)
        rows = self.features.wide()
        (f1, f2), (d1, d2) = rows.chunk(2), d.chunk(2)
        if self.call.similarity == "euclidean":
            d[used] -= weight_sums[used].unsqueeze(1) * rows[used]
            apart = q * (f1 - f2)
            d1 += apart
            d2 -= apart
            return d[views]
        d1.addcmul_(q, f2, value=-1)
        d2.addcmul_(q, f1, value=-1)
        return (d if inv_norm is None else through_normalization(d, rows, inv_norm))[views]


# --- autograd -------------------------------------------------------------------------------------

SECOND_DERIVATIVE = (
    "a second derivative of the loss was asked for (create_graph=True or "
    "torch.func), it has first ones only; a gradient can be differentiated in a weight of the "
    "loss, but only for alpha_cl_loss and siglip_loss with reduction 'mean' or 'sum' in eager mode"
)


def first_derivative(grad: Tensor | None, of_saved: tuple[Tensor | None, ...]) -> bool:
    """Whether a backward has something to do, given the gradients of its function's outputs.

    Raises RuntimeError if a saved tensor has a gradient: only a second derivative gives it one.
    """
    if any(x is not None for x in of_saved):
        raise RuntimeError(SECOND_DERIVATIVE)
    return grad is not None


def only_once(
    gradients: tuple[Tensor | None, ...], sources: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """``gradients``, made of ``sources`` without a graph: to differentiate them again is an
    error, not 0.
    """
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in sources)):
        return gradients
    floating = [x for x in sources if x is not None and x.is_floating_point()]
    return tuple(x if x is None else _OnlyOnce.apply(x, *floating) for x in gradients)


def for_each_gradient(
    run: Callable[[Tensor], tuple[Tensor | None, ...]], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """``run(grad)``, for one gradient after the other where ``grad`` holds several.

    That is the case with is_grads_batched, which batches in PyTorch's older way, and with
    torch.func.vmap.
    """
    older = torch._C._functorch.is_legacy_batchedtensor(grad)
    if not older and not torch._C._functorch.is_batchedtensor(grad):
        return run(grad)
    there: list[bool] = []

    def of_one(one: Tensor) -> tuple[Tensor, ...]:
        outputs = run(one)
        there[:] = [x is not None for x in outputs]
        return tuple(x for x in outputs if x is not None)

    if older:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        grads = torch._remove_batch_dim(grad, level, 1, 0)
        outputs = iter(
            [torch._add_batch_dim(x, 0, level) for x in _ForEachGradient.stacked(of_one, grads)]
        )
    else:
        outputs = iter(_ForEachGradient.apply(grad, of_one))
    return tuple(next(outputs) if is_there else None for is_there in there)


class _ForEachGradient(torch.autograd.Function):
    @staticmethod
    def forward(grad: Tensor, run: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return run(grad)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def vmap(info, in_dims, grads: Tensor, run: Callable[[Tensor], tuple[Tensor, ...]]):
        outputs = _ForEachGradient.stacked(run, grads.movedim(in_dims[0], 0))
        return outputs, (0,) * len(outputs)

    @staticmethod
    def stacked(run: Callable[[Tensor], tuple[Tensor, ...]], grads: Tensor) -> tuple[Tensor, ...]:
        """The outputs for gradients that lie one behind the other, likewise."""
        each = [run(one.contiguous()) for one in grads]
        return tuple(map(torch.stack, zip(*each, strict=True)))


class _OnlyOnce(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *sources: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise RuntimeError(SECOND_DERIVATIVE)


def views_of(dz: Tensor | None, need: Need) -> tuple[Tensor | None, Tensor | None]:
    """dz1 and dz2 of the gradient of the views that are needed, one below the other."""
    if dz is None or not (need.z1 and need.z2):
        return (dz if need.z1 else None), (dz if need.z2 else None)
    n = dz.shape[0] // 2
    return dz[:n], dz[n:]


class AlphaCLFunction(torch.autograd.Function):
    """(loss(z1, z2, τ), what the backward reads) through the sweeps; first derivatives only.

    Saved tensors are returned as extra outputs because torch.func requires a separate
    setup_context. A gradient that arrives at them belongs to a second derivative, which raises.
    """

    @staticmethod
    def forward(
        z1: Tensor,
        z2: Tensor,
        tau: Tensor,
        call: BoundCall,
        need: Need,
        ids: Tensor | None,
        guide: Guide | None = None,
    ) -> tuple[Tensor | None, ...]:
        alone = call.reduction == "none" and any(need)  # what the backward needs is returned
        served = not alone and native.serves(call, need, guide is not None)
        if served and native.plain(z1, z2):
            plan = native.prepared(call, z1, need)
            same_id = SameId.of_views(ids, call, len(z1), plan.wide)
            return native.loss_and_gradient(z1, z2, call, plan, same_id, guide)
        with without_autocast(z1.device):
            problem = Problem.of_views(z1, z2, tau, call, ids, guide)
            if not any(need):
                return (problem.reduce(problem.solve(learn_tau=False).loss),)
            if call.reduction == "none":
                solution = problem.solve(learn_tau=need.tau)
                return problem.reduce(solution.loss), *problem.saved(solution).flatten()
            return problem.loss_and_gradient(need)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        z1, _, tau, ctx.call, ctx.need, *_ = inputs
        ctx.dtypes, loss = (z1.dtype, tau.dtype), output[0]
        ctx.like_loss = partial(torch.zeros, loss.shape, dtype=loss.dtype, device=loss.device)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:], *([tau] if ctx.call.reduction == "none" else []))

    @staticmethod
    def backward(ctx, grad: Tensor | None, *of_saved: Tensor | None) -> tuple[Tensor | None, ...]:
        if not first_derivative(grad, of_saved):
            if ctx.call.ranks is None or ctx.call.reduction != "none":
                return (None,) * 7
            grad = ctx.like_loss()  # the other ranks wait for this one's part of their gradients
        tensors = ctx.saved_tensors  # once: a checkpoint makes them again for each reading
        with without_autocast(grad.device):
            if ctx.call.reduction == "none":
                run = partial(AlphaCLFunction._of_rows, ctx, tensors)
                dz, dtau = only_once(for_each_gradient(run, grad), (grad, *tensors))
            else:
                # float32 until it is scaled: a half-precision gradient of 1e-8 would vanish before
                # GradScaler sees it
                dz, dtau = scaled(tensors, grad, ctx.dtypes)
        return *views_of(dz, ctx.need), dtau, None, None, None, None

    @staticmethod
    @torch.no_grad()
    def _of_rows(ctx, tensors: Sequence[Tensor | None], grad: Tensor) -> tuple[Tensor | None, ...]:
        """(dz1, dz2) in one tensor and dτ, for the gradient of every loss."""
        *saved, tau = tensors
        saved = Saved.unflatten(saved)
        problem = Problem.of_saved(saved, tau, ctx.call)
        return in_dtypes(problem.gradient(saved.solution, grad, ctx.need), ctx.dtypes)


def scaled(
    gradients: Sequence[Tensor | None], grad: Tensor, dtypes: tuple[torch.dtype | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of a loss that is one number, times the incoming one.

    They are outputs of the function that saved them: a derivative of the product in ``grad`` is
    exact, and one in a gradient arrives at that function, which raises.
    """
    return in_dtypes([None if x is None else x * grad for x in gradients], dtypes)


def scaled_in_place(
    gradients: Sequence[Tensor | None], grad: Tensor, dtypes: tuple[torch.dtype | None, ...]
) -> tuple[Tensor | None, ...]:
    """As `scaled`, but overwrites the gradients. The host reads ``grad``, to skip a factor of 1."""
    factor, found = grad.item(), []
    for x, dtype in zip(gradients, dtypes, strict=True):
        if x is not None:
            x = x.detach() if factor == 1 else x.detach().mul_(grad)
            x = x if x.dtype is dtype else x.to(dtype)
        found.append(x)
    return tuple(found)


def in_dtypes(
    tensors: Sequence[Tensor | None], dtypes: tuple[torch.dtype | None, ...]
) -> tuple[Tensor | None, ...]:
    """The tensors that are there, each in its own dtype."""
    return tuple(
        x if x is None or x.dtype == dtype else x.to(dtype)
        for x, dtype in zip(tensors, dtypes, strict=True)
    )


# `Function.apply` asks for the signature at every call and would make a new one each time
AlphaCLFunction.forward.__signature__ = inspect.signature(AlphaCLFunction.forward)
