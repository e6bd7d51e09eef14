"""From embeddings to loss and gradient: what lies between the user's tensors and the two sweeps. All of it is O(n·D).

When the loss is a scalar, both sweeps run in the forward and the backward only scales; with ``reduction="none"`` the
second sweep waits for the incoming row gradient. Derivation: docs/mathematics.md.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .objectives import ROW_STEPS, ClosedForm, Objective, Rows, RowScalars
from .objectives import kind as lookup


@dataclass(frozen=True)
class Call:
    """Everything about a loss but its tensors, already validated."""

    objective: Objective
    similarity: str
    negatives: str
    symmetric: bool
    reduction: str
    backend: str
    tau: float | None = None  # the temperature where its value is known on the host
    precision: str = ""  # of float32 products; "" follows torch
    group: Any = None  # of processes, each of which holds a part of the batch (`distributed.Group`)

    @property
    def c(self) -> float:
        """d² = c − t."""
        return 0.0 if self.similarity == "euclidean" else 1.0

    def anchors(self, n_pairs: int) -> int:
        """Anchors of the sweeps: symmetric cross_view has those of both towers."""
        both = self.negatives == "two_view" or (self.negatives == "cross_view" and self.symmetric)
        return 2 * n_pairs if both else n_pairs

    def reduce(self, row_losses: Tensor) -> Tensor:
        """(anchors,) → () or one value per anchor; symmetric cross_view averages the two directions."""
        half = self.negatives == "cross_view" and self.symmetric
        if self.reduction == "none":
            return row_losses.view(2, -1).mean(0) if half else row_losses
        if self.reduction == "mean":
            return row_losses.mean()
        return row_losses.sum() / 2 if half else row_losses.sum()

    def divisor(self, n_pairs: int) -> int:
        """Of the sum of all row losses: the reduced loss, where that is one number."""
        if self.reduction == "none":
            return 1
        if self.reduction == "mean":
            return self.anchors(n_pairs)
        return 2 if self.negatives == "cross_view" and self.symmetric else 1


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast is off; one that costs nothing where it is off already."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


_NOTHING = contextlib.nullcontext()


class Features:
    """The stacked views as the sweeps see them, with the rows' normalisation.

    Attributes:
        f: (2N, D) rows for the matrix products. Half-precision cosine rows stay raw, for rounding a normalised row would
            cost 1.7e-3 … 4e-2 of the gradient; ``scale`` then normalises the similarities.
        scale: (2N,) or None; bias: (2N,) or None, so that t_ij = scale_i·scale_j·⟨f_i, f_j⟩ + bias_i + bias_j.
        inv_norm: (2N,) 1/‖z‖ for cosine, 0 for an all-zero row; None otherwise.
    """

    def __init__(self, f: Tensor, scale: Tensor | None, bias: Tensor | None, inv_norm: Tensor | None) -> None:
        self.f, self.scale, self.bias, self.inv_norm = f, scale, bias, inv_norm

    @classmethod
    def make(cls, z: Tensor, similarity: str, center: Tensor | None = None) -> Features:
        """Of the stacked views; ``center`` (D,) is subtracted from euclidean rows, by default their mean."""
        accumulate = accumulation_dtype(z.dtype)
        if similarity == "dot":
            return cls(z, None, None, None)
        wide = z.to(accumulate)
        if similarity == "euclidean":
            # t does not change under a common shift, but its float32 error does: 0.37 → 3e-6 at an offset of 100.
            centered = wide - (wide.mean(0) if center is None else center)
            return cls(centered, None, centered.square().sum(1) / -2, None)
        largest = wide.abs().amax(1)  # squares of the rows themselves could leave the range of the dtype
        zero = largest == 0
        safe = torch.where(zero, 1.0, largest)
        scaled = wide / safe.unsqueeze(1)
        norm = torch.where(zero, 1.0, torch.linalg.vector_norm(scaled, dim=1))
        inv_norm = torch.where(zero, 0.0, ((1 / norm) / safe).clamp(max=torch.finfo(accumulate).max))
        if z.dtype == accumulate:
            return cls(scaled / norm.unsqueeze(1), None, None, inv_norm)
        return cls(z, inv_norm, None, inv_norm)

    def rows(self) -> Tensor:
        """(2N, D) rows in the accumulation dtype, normalised for cosine."""
        rows = self.f.to(accumulation_dtype(self.f.dtype))
        return rows if self.scale is None else rows * self.scale.unsqueeze(1)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.f, self.scale, self.bias, self.inv_norm

    def part(self, rows: slice) -> Features:
        """Those of some rows."""
        return Features(*(None if x is None else x[rows] for x in self.tensors()))


def positives(rows: Tensor, similarity: str) -> Tensor:
    """(2N,) t⁺ of every row of the stacked views (2N, D)."""
    a, b = rows.chunk(2)
    return ((a - b).square().sum(1) / -2 if similarity == "euclidean" else (a * b).sum(1)).repeat(2)


class Layout(NamedTuple):
    """Which rows meet which, in the operators' terms (docs/design.md)."""

    rows: int  # of the stacked views, that the sweeps see
    split: int
    partner: int
    anchors: int
    n_neg: int
    rectangle: bool  # split says so too, but not of a process that has no rows

    @classmethod
    def make(cls, call: Call, n: int) -> Layout:
        if call.negatives == "two_view":
            return cls(2 * n, 0, n, 2 * n, 2 * n - 2, False)
        if call.negatives == "one_view":
            return cls(n, 0, 0, n, n - 1, False)
        return cls(2 * n, n, n, call.anchors(n), n - 1, True)


class Groups(NamedTuple):
    """Rows with one id: no two of them are negatives of each other (false-negative elimination, arXiv:2011.11765)."""

    ids: Tensor  # (rows,) int32 number of each row's group, of the rows that the sweeps see
    n_neg: Tensor  # (anchors,) |Neg(i)| in the accumulation dtype; 1 where there is none
    empty: Tensor  # (anchors,) bool: no negative is left, so that loss and gradient are 0

    @classmethod
    def make(cls, ids: Tensor, layout: Layout, dtype: torch.dtype) -> Groups:
        """From the ids (rows,), any integers. Sizes depend on no value, so nothing is read on the host."""
        in_order, order = ids.sort()
        first = torch.nn.functional.pad(in_order[1:] != in_order[:-1], (1, 0))
        group = torch.empty_like(order).scatter_(0, order, first.cumsum(0))

        def strangers(anchors: Tensor, others: Tensor) -> Tensor:
            """How many of the others are of another group than each anchor."""
            sizes = torch.zeros_like(group).index_add_(0, others, torch.ones_like(others))
            return len(others) - sizes[anchors]

        if layout.rectangle:
            left, right = group[: layout.split], group[layout.split :]
            n_neg = torch.cat([strangers(left, right), strangers(right, left)])[: layout.anchors]
        else:
            n_neg = strangers(group, group)
        return cls(group.to(torch.int32), n_neg.clamp(min=1).to(dtype), n_neg == 0)

    @classmethod
    def of_views(cls, ids: Tensor | None, call: Call, n: int, dtype: torch.dtype) -> Groups | None:
        """Of N pairs with ids (N,); both views of a sample have its id."""
        if ids is None:
            return None
        layout = Layout.make(call, n)
        return cls.make(ids.repeat(2)[: layout.rows], layout, dtype)

    def sums_of_strangers(self, anchors: slice, others: slice, rows: Tensor) -> Tensor:
        """(anchors, D) sums of those ``rows`` (others, D) that are of another group; differentiable."""
        of_group = rows.new_zeros(len(self.ids), rows.shape[1]).index_add(0, self.ids[others], rows)
        return rows.sum(0) - of_group.index_select(0, self.ids[anchors])


class Operators:
    """`row_sums` and `pair_grad` with everything bound that is the same in all sweeps of a call."""

    def __init__(self, tau: Tensor, call: Call, groups: Groups | None = None) -> None:
        self.backend, self.tau = call.backend, call.objective.kind_tau(tau)
        self._ids = None if groups is None else groups.ids
        self._kind, self._precision = call.objective.kind, call.precision
        self._params = call.objective.params(call.c)
        # of rows of unit length, whose similarities have bounds: with τ on the host, so have those of log f
        known = call.similarity == "cosine" and call.tau is not None and lookup(call.objective.kind).log
        self._unit_tau = ((call.tau if call.objective.uses_temperature else 1.0),) if known else ()

    def row_sums(
        self, f: Features, terms: tuple[str, ...], split: int, partner: int, center: Tensor, shift: Tensor | None,
        offset: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """(len(terms), anchors) from row scalars (anchors,)."""
        return ops.row_sums(
            f.f, f.scale, f.bias, center, shift, offset, self.tau, self._kind, self._params, terms, split, partner,
            center.shape[0], self._unit_tau, self._precision, self.backend, self._ids,
        )  # fmt: skip

    def pair_grad(
        self, f: Features, weight: str, terms: tuple[str, ...], split: int, partner: int, lo: int, hi: int, center: Tensor,
        gain: Tensor, shift: Tensor | None, offset: Tensor | None, level: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """dF (hi − lo, D), row sums of the weights with a bias, (len(terms), anchors) from row scalars (anchors,)."""
        return ops.pair_grad(
            f.f, f.scale, f.bias, center, gain, shift, offset, level, self.tau, self._kind, self._params, weight, terms,
            split, partner, lo, hi, self._unit_tau, self._precision, self.backend, self._ids,
        )  # fmt: skip


class Sweeps:
    """One batch bound to its operators: the `Pairs` that an objective solves on, and the gradient sweep."""

    layout: Layout
    groups: Groups | None = None

    def __init__(self, features: Features, pos: Tensor, tau: Tensor, call: Call, groups: Groups | None = None) -> None:
        self.layout, self.groups = Layout.make(call, pos.shape[0] // 2), groups
        self.features = features.part(slice(self.layout.rows))
        self.pos = pos[: self.layout.anchors]
        self.n_neg = self.layout.n_neg if groups is None else groups.n_neg
        self.tau, self.divisor = tau, call.divisor(pos.shape[0] // 2)
        self.operators = Operators(tau, call, groups)

    @property
    def most_neg(self) -> int:
        return self.layout.n_neg

    def solve(self, objective: Objective, learn_tau: bool) -> Rows:
        """The rows of an objective; those without negatives have loss and gradient 0."""
        rows = objective.solve(self, learn_tau)
        if self.groups is None:
            return rows
        nothing = {
            name: torch.where(self.groups.empty, 0.0, x)
            for name in ("gain", "mass", "loss", "dtau") if (x := getattr(rows, name)) is not None
        }  # fmt: skip
        return replace(rows, **nothing)

    def sums(
        self,
        terms: tuple[str, ...],
        *,
        shift: Tensor | None = None,
        offset: Tensor | None = None,
        center: Tensor | None = None,
    ) -> Tensor:
        return self.row_sums(terms, (self.pos if center is None else center, shift, offset))

    def row_sums(self, terms: tuple[str, ...], scalars: tuple[Tensor | None, ...]) -> Tensor:
        """(len(terms), anchors) from row scalars center, shift, offset (anchors,).

        Sums over no negatives are made those of one with f = 1: every formula is finite there, and `solve` drops the result.
        """
        sums = self.operators.row_sums(self.features, terms, self.layout.split, self.layout.partner, *scalars)
        if self.groups is None:
            return sums
        if terms[0] in ("base", "max"):
            largest = torch.where(sums[:1] == -torch.inf, 0.0, sums[:1])
            return torch.cat([largest, torch.where(self.groups.empty, 1.0, sums[1:])])
        return torch.where(self.groups.empty, 1.0, sums)

    def step(self, name: str, *vectors: Tensor, params: tuple[float, ...] = ()) -> dict[str, Tensor]:
        function, outputs = ROW_STEPS[name]
        tau, backend = self.operators.tau, self.operators.backend
        if ops.has_row_step(backend) and self.layout.anchors and self.groups is None:
            anchors, scalars = self.layout.anchors, (tau, self.n_neg, self.divisor)
            values = ops.row_step(vectors, *scalars, anchors, name, params, backend).unbind(0)
        else:
            values = function(vectors, RowScalars(tau, self.n_neg, self.divisor), params)
        return dict(zip(outputs, values, strict=True))

    def grad(self, rows: Rows, weight: str, terms: tuple[str, ...], lo: int, hi: int) -> tuple[Tensor, Tensor, Tensor]:
        """One `pair_grad` sweep for rows [lo, hi)."""
        if lo == hi and not terms:
            nothing = self.pos.new_empty(0)
            return nothing, nothing, nothing
        center = self.pos if rows.center is None else rows.center
        return self.operators.pair_grad(
            self.features, weight, terms, self.layout.split, self.layout.partner, lo, hi, center, rows.gain, rows.shift,
            rows.offset, rows.level,
        )  # fmt: skip

    def mean_negative(self) -> Tensor:
        return self._mean(1, self.groups)

    def moments(self) -> tuple[Tensor, Tensor]:
        return self._mean(1), self._mean(2)

    def _mean(self, power: int, groups: Groups | None = None) -> Tensor:
        return mean_negative(self.features.rows(), self.features.bias, self.layout, power, self.everywhere, groups)

    def everywhere(self, x: Tensor) -> Tensor:
        """Σ over rows held here → over all rows."""
        return x

    def all_done(self, done: Tensor) -> bool:
        return bool(done.all())


def mean_negative(
    rows: Tensor,
    bias: Tensor | None,
    layout: Layout,
    power: int = 1,
    everywhere: Callable[[Tensor], Tensor] = lambda x: x,
    groups: Groups | None = None,
) -> Tensor:
    """(anchors,) mean of t_ij, in O(n·D), or of t_ij², in O(n·D²), over the negatives; differentiable.

    ``everywhere`` adds up what other holders of rows have: negatives are all rows, ``rows`` those of this process.
    With groups (power 1) those of another group count; 0 where there is none.
    """
    left, right = rows, rows
    if bias is not None:  # t_ij = ⟨[F_i, b_i, 1], [F_j, 1, b_j]⟩
        b, one = bias.unsqueeze(1), torch.ones_like(bias).unsqueeze(1)
        left, right = torch.cat([rows, b, one], 1), torch.cat([rows, one, b], 1)

    def total(a: Tensor, b: Tensor) -> Tensor:  # Σ_j over all rows of b
        # not a @ Σb: its backward adds n equal numbers one after the other, which rounds in one direction (1e-5 at n = 2,566)
        return (a * (everywhere(b.sum(0)) if power == 1 else a @ everywhere(b.t() @ b))).sum(1)

    def own(a: Tensor, b: Tensor) -> Tensor:  # one excluded pair of each row
        return (a * b).sum(1).pow(power)

    if groups is not None:
        a, b = (slice(layout.split), slice(layout.split, None)) if layout.rectangle else (slice(None), slice(None))
        sums = [(left[a] * groups.sums_of_strangers(a, b, right[b])).sum(1)]
        if layout.rectangle and layout.anchors > layout.split:
            sums.append((left[b] * groups.sums_of_strangers(b, a, right[a])).sum(1))
        return torch.where(groups.empty, 0.0, torch.cat(sums) / groups.n_neg)
    if layout.rectangle:
        (left_a, left_b), (right_a, right_b) = left.tensor_split(2), right.tensor_split(2)
        sums = [total(left_a, right_b) - own(left_a, right_b), total(left_b, right_a) - own(left_b, right_a)]
        return torch.cat(sums if layout.anchors > layout.split else sums[:1]) / layout.n_neg
    sums = total(left, right) - own(left, right)
    if layout.partner:
        sums = sums - own(left, right.roll(layout.partner, 0))
    return sums / layout.n_neg


def through_normalization(d: Tensor, rows: Tensor, inv_norm: Tensor) -> Tensor:
    """dz = (dF − F⟨F, dF⟩)/‖z‖."""
    along = (rows * d).sum(1, keepdim=True)
    return torch.addcmul(d, rows, along, value=-1).mul_(inv_norm.unsqueeze(1))


SECOND_DERIVATIVE = "a second derivative of the loss was asked for (create_graph=True or torch.func), it has first ones only"


def first_derivative(grad: Tensor | None, of_kept: tuple[Tensor | None, ...]) -> bool:
    """Whether a backward has something to do, from the gradients of its function's result and of what it kept.

    Raises RuntimeError if there is a gradient of what was kept: only a second derivative has one.
    """
    if any(x is not None for x in of_kept):
        raise RuntimeError(SECOND_DERIVATIVE)
    return grad is not None


def only_once(gradients: tuple[Tensor | None, ...], sources: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """``gradients``, which were made of ``sources`` without a graph: their own derivative is an error, not 0."""
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in sources)):
        return gradients
    floating = [x for x in sources if x is not None and x.is_floating_point()]
    return tuple(x if x is None else _OnlyOnce.apply(x, *floating) for x in gradients)


class _OnlyOnce(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, *sources: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise RuntimeError(SECOND_DERIVATIVE)


class UnitRows(torch.autograd.Function):
    """(n, D) → rows of unit length in the accumulation dtype; finite gradients for zero and for tiny rows."""

    @staticmethod
    def forward(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = Features.make(z, "cosine")
        rows = features.rows()
        return rows.clone(), rows, features.inv_norm  # torch.compile loses the gradient of an output that is also saved

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.dtype = inputs[0].dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx, grad: Tensor | None, *of_kept: Tensor | None) -> Tensor | None:
        if torch.compiler.is_compiling():  # which makes zeros of the gradients that there are not, and no second derivatives
            return through_normalization(grad, *ctx.saved_tensors).to(ctx.dtype)
        if not first_derivative(grad, of_kept):
            return None
        with torch.no_grad():
            dz = through_normalization(grad, *ctx.saved_tensors).to(ctx.dtype)
        return only_once((dz,), (grad, *ctx.saved_tensors))[0]


def unit_rows(z: Tensor) -> Tensor:
    """(n, D) rows of unit length in the accumulation dtype, differentiable."""
    return UnitRows.apply(z)[0]


def closed_form(
    z1: Tensor,
    z2: Tensor,
    call: Call,
    layout: Layout,
    center: Tensor | None = None,
    everywhere: Callable[[Tensor], Tensor] = lambda x: x,
    groups: Groups | None = None,
) -> Tensor:
    """(anchors,) losses of a constant-α objective by autograd through O(n·D) sums; arguments as above."""
    assert isinstance(call.objective, ClosedForm)
    z = torch.cat([z1, z2])
    rows, bias = unit_rows(z) if call.similarity == "cosine" else z.to(accumulation_dtype(z.dtype)), None
    if call.similarity == "euclidean":
        rows = rows - (rows.mean(0) if center is None else center)
        bias = rows.square().sum(1) / -2
    pos = positives(rows, call.similarity)
    mean = mean_negative(
        rows[: layout.rows], None if bias is None else bias[: layout.rows], layout, everywhere=everywhere, groups=groups
    )
    return constant_alpha(call.objective, mean - pos[: layout.anchors], layout, groups)


def constant_alpha(objective: ClosedForm, gap: Tensor, layout: Layout, groups: Groups | None) -> Tensor:
    """(anchors,) losses from the mean Δ over the negatives."""
    if groups is None:
        return objective.weight(layout.n_neg) * gap
    return torch.where(groups.empty, 0.0, objective.weight(groups.n_neg) * gap)


class AlphaCLFunction(torch.autograd.Function):
    """(loss(z1, z2, τ), what the backward reads) through the sweeps; first derivatives only (a second backward raises).

    ``need`` says whose gradients are wanted. What is kept are outputs, and the context is set up apart from the forward: the
    form that torch.func differentiates. A gradient that came to them would be a second derivative.
    """

    @staticmethod
    def forward(
        z1: Tensor, z2: Tensor, tau: Tensor, call: Call, need: tuple[bool, bool, bool], ids: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        accumulate = accumulation_dtype(z1.dtype)
        with without_autocast(z1.device):
            groups = Groups.of_views(ids, call, z1.shape[0], accumulate)
            problem = Problem(*features_of_views(z1, z2, call), tau.to(accumulate), call, groups=groups)
            if not any(need):
                return (call.reduce(problem.solve(learn_tau=False).loss),)
            if call.reduction == "none":
                rows = problem.solve(learn_tau=need[2])
                kept = (*problem.features.tensors(), problem.pos, *row_tensors(rows), *(groups or ()))
                return call.reduce(rows.loss), *kept
            return problem.loss_and_gradient(need)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        z1, _, tau, ctx.call, ctx.need, _ = inputs
        ctx.dtypes = z1.dtype, tau.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:], *([tau] if ctx.call.reduction == "none" else []))

    @staticmethod
    def backward(ctx, grad: Tensor | None, *of_kept: Tensor | None) -> tuple[Tensor | None, ...]:
        if not first_derivative(grad, of_kept):
            return (None,) * 6
        call: Call = ctx.call
        dz_dtype, tau_dtype = ctx.dtypes
        need_1, need_2, need_tau = ctx.need
        kept = ctx.saved_tensors
        with torch.no_grad(), without_autocast(grad.device):
            if call.reduction == "none":
                f, scale, bias, inv_norm, pos, *rest, tau = kept
                rows, groups = rows_and_groups(rest)
                problem = Problem(Features(f, scale, bias, inv_norm), pos, tau.to(pos.dtype), call, groups=groups)
                dz, dtau = problem.gradient(rows, grad, ctx.need)
                dz = None if dz is None else dz.to(dz_dtype)
            else:
                # float32 until it is scaled: a half-precision gradient of 1e-8 would vanish before GradScaler sees it
                dz, dtau = kept
                dz = None if dz is None else (dz * grad).to(dz_dtype)
                dtau = None if dtau is None else dtau * grad
            dtau = dtau.to(tau_dtype) if need_tau else None
        dz, dtau = only_once((dz, dtau), (grad, *kept))
        n = 0 if dz is None else dz.shape[0] // (need_1 + need_2)
        return (dz[:n] if need_1 else None), (dz[-n:] if need_2 else None), dtau, None, None, None


# `Function.apply` asks for it at every call; without one that stands there it would be made anew
AlphaCLFunction.forward.__signature__ = inspect.signature(AlphaCLFunction.forward)

_ROW_FIELDS = tuple(field.name for field in fields(Rows) if field.name != "loss")  # the backward has no use for it


def row_tensors(rows: Rows) -> tuple[Tensor | None, ...]:
    """What the backward reads, each a tensor of its own: autograd tells inputs and outputs apart by the object."""
    values = (getattr(rows, name) for name in _ROW_FIELDS)
    return tuple(None if x is None else x.view_as(x) for x in values)


def rows_and_groups(tensors: list[Tensor | None]) -> tuple[Rows, Groups | None]:
    """From what was saved: `row_tensors`, and the members of `Groups` where there are ids."""
    rows, groups = tensors[: len(_ROW_FIELDS)], tensors[len(_ROW_FIELDS) :]
    return Rows(**dict(zip(_ROW_FIELDS, rows, strict=True))), Groups(*groups) if groups else None  # type: ignore[arg-type]


def features_of_views(z1: Tensor, z2: Tensor, call: Call, center: Tensor | None = None) -> tuple[Features, Tensor]:
    """Features of the stacked views and t⁺ (2N,); ``center`` as of `Features.make`."""
    if call.similarity == "cosine" and ops.has_unit_rows(call.backend):
        f, inv_norm, pos = ops.unit_rows(z1.detach(), z2.detach(), call.backend)
        scale = None if z1.dtype == pos.dtype else inv_norm
        return Features(f, scale, None, inv_norm), pos
    features = Features.make(torch.cat([z1, z2]), call.similarity, center)
    return features, positives(features.rows(), call.similarity)


class Problem:
    """A batch, an objective and a temperature: solves the rows, then the gradient for given row weights."""

    def __init__(
        self, features: Features, pos: Tensor, tau: Tensor, call: Call, sweeps: Sweeps | None = None,
        groups: Groups | None = None,
    ) -> None:  # fmt: skip
        self.features, self.pos, self.tau, self.call = features, pos, tau, call
        self.n_pairs = pos.shape[0] // 2
        self.sweeps = sweeps or Sweeps(features, pos, tau, call, groups)

    def reduce(self, row_losses: Tensor) -> Tensor:
        """(anchors,) → what the caller receives."""
        return self.call.reduce(row_losses)

    def total(self, x: Tensor) -> Tensor:
        """Σ over anchors of this process → over all anchors."""
        return x

    def solve(self, learn_tau: bool) -> Rows:
        return self.sweeps.solve(self.call.objective, learn_tau and self.call.objective.tau_gradient == "rows")

    def loss_and_gradient(self, need: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scalar loss, (dz1, dz2) in one tensor, dτ (None where not needed)."""
        objective = self.call.objective
        if objective.one_sweep:
            rows, dz, dtau = self._gradient(objective.start(self.sweeps), need, finish=True)
        else:
            rows, dz, dtau = self._gradient(self.solve(learn_tau=need[2]), need)
        return self.reduce(rows.loss), dz, dtau

    def gradient(self, rows: Rows, grad: Tensor, need: tuple[bool, bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        """(dz1, dz2) in one tensor and dτ for an incoming gradient of every row's loss."""
        half = self.call.negatives == "cross_view" and self.call.symmetric
        c = (grad / 2).repeat(2) if half else grad.to(self.tau.dtype)
        weighted = {name: x * c for name in ("gain", "mass", "dtau") if (x := getattr(rows, name)) is not None}
        return self._gradient(replace(rows, **weighted), need)[1:]

    def _gradient(
        self, rows: Rows, need: tuple[bool, bool, bool], finish: bool = False
    ) -> tuple[Rows, Tensor | None, Tensor | None]:
        call, objective, n = self.call, self.call.objective, self.n_pairs
        need_1, need_2, need_tau = need
        lo = 0 if need_1 else n
        hi = 2 * n if need_2 else n
        if call.negatives == "one_view":  # z2 meets the pairs only through the positives
            lo, hi = min(lo, n), n
        terms: tuple[str, ...] = objective.terms if finish else ()
        weight = "df" if objective.derivative else "f" if rows.level is None else "f+df"
        if need_tau and objective.tau_gradient == "pairs":
            terms = (*terms, "dtau")
        df, weight_sums, sums = self.sweeps.grad(rows, weight, terms, lo, hi)
        if finish:
            rows = objective.finish(self.sweeps, rows, sums)
        dz = dtau = None
        if need_1 or need_2:
            d = df
            if hi - lo < 2 * n:  # rows outside [lo, hi) receive only what comes through their positive
                d = self.tau.new_zeros(2 * n, self.features.f.shape[1])
                d[lo:hi] = df.view(-1, d.shape[1])
            dz = self._through_rows(d, rows.mass, weight_sums, slice(lo, hi))[0 if need_1 else n : 2 * n if need_2 else n]
        if need_tau:
            dtau = self.total((rows.gain * sums[-1] if objective.tau_gradient == "pairs" else rows.dtau).sum())
        return rows, dz, dtau

    def _through_rows(self, d: Tensor, q: Tensor, weight_sums: Tensor, used: slice) -> Tensor:
        """Adds what comes through the positives, q (anchors,), and the rows' own making to d; may write to it."""
        features, similarity, n = self.features, self.call.similarity, self.n_pairs
        if similarity == "cosine" and ops.has_unit_rows(self.call.backend):
            ops.finish_rows(d, features.f, features.inv_norm, q, self.call.backend)
            return d
        q = q.unsqueeze(1) if q.shape[0] == n else (q[:n] + q[n:]).unsqueeze(1)  # both anchors of a positive pair
        rows = features.rows()
        (f1, f2), (d1, d2) = rows.chunk(2), d.chunk(2)
        if similarity == "euclidean":
            d[used] -= weight_sums[used].unsqueeze(1) * rows[used]
            apart = q * (f1 - f2)
            d1 += apart
            d2 -= apart
            return d
        d1.addcmul_(q, f2, value=-1)
        d2.addcmul_(q, f1, value=-1)
        return d if similarity == "dot" else through_normalization(d, rows, features.inv_norm)
