"""`loss_against`: losses with explicit negatives and given positive similarities.

`alpha_cl_loss` derives negatives and positives from two views. Memory banks (MoCo), several
positives per anchor (supervised contrastive) and more candidates than anchors (retrieval) need the
same sums over other pairs: anchors z (N, D) meet all rows of ``negatives`` (M, D), or one another,
and the positive similarities t⁺ (N,) are given. The same two sweeps serve them on every backend,
with t_ij = ⟨z_i, y_j⟩ of the rows as given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import functional
from .autograd import (
    Features,
    Need,
    Problem,
    Saved,
    Sweeps,
    constant_alpha,
    first_derivative,
    mean_negative,
    only_once,
)
from .bundles import Rows, accumulation_dtype
from .call import BoundCall, Call, Layout, SameId, without_autocast
from .objectives import ClosedForm, Objective


@torch.compiler.disable  # only the loss of two views is a compiled operator
def loss_against(
    z: Tensor,
    negatives: Tensor | None,
    positive: Tensor,
    objective: str | Objective = "infonce",
    *,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    backend: str = "auto",
    precision: str | None = None,
    ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Loss of anchors z against the rows of ``negatives``, with given positive similarities.

    Gradients flow to z, negatives, positive and a tensor temperature.

    Args:
        z: (N, D) anchors, N ≥ 1, float32, float64, bfloat16 or float16. Rows are used as given:
            normalise them for cosine similarity.
        negatives: (M, D) with the dtype and device of z, M ≥ 1. None: the other rows of z; the only
            row has loss 0 and no gradient.
        positive: (N,) similarity t⁺ of every anchor with its positive, float32 (float64 for float64
            z).
        objective: a name listed by `alphacl_fast.objectives.names`, or an `Objective`; d² = 1 − t.
        temperature: τ > 0, a float or a tensor with one element.
        reduction: "mean", "sum" or "none".
        backend: "auto" or the name of a sweep backend. There is no oracle: "reference" is refused.
        precision: arithmetic of float32 matrix products; see
            `alphacl_fast.functional.alpha_cl_loss`.
        ids: (N,) integers, moved to z's device if necessary. A row of ``negatives`` (or of z) that
            has the anchor's id is not its negative: in a queue, an earlier key of the same sample
            or class. An anchor that has no negatives left has loss 0 and no gradient, and "mean"
            still counts it.
        negative_ids: (M,) integers, the ids of ``negatives``; required exactly if both
            ``negatives`` and ``ids`` are given.
        **options: options of the objective, by its own names.

    Returns:
        (), or (N,) with ``reduction="none"``; float32, or float64 for float64 z.

    Raises:
        TypeError, ValueError: a bad argument; the message names it, what was expected and what was
            received.

    Source: arXiv:1911.05722 (queue of negatives); arXiv:2004.11362 (several positives, whose mean
    is t⁺, with epsilon=0).
    """
    call = functional.make_call(
        objective,
        options,
        similarity="dot",
        negatives="one_view",
        symmetric=True,
        reduction=reduction,
        backend=backend,
        precision=precision,
    )
    if backend == "reference":
        raise ValueError("backend must not be 'reference': the oracle has two views")
    return call.reduce(_row_losses(call, z, negatives, positive, temperature, ids, negative_ids))


@torch.compiler.disable
def against_unit_rows(
    z: Tensor,
    negatives: Tensor | None,
    positive: Tensor,
    objective: Objective,
    *,
    temperature: float | Tensor,
    ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    backend: str = "auto",
    precision: str | None = None,
) -> Tensor:
    """(N,) losses of `loss_against` for rows of unit length.

    Their similarities lie in [−1, 1], which saves a sweep the search for the largest exponent.
    """
    call = functional.make_call(
        objective,
        {},
        similarity="cosine",
        negatives="one_view",
        reduction="none",
        backend=backend,
        precision=precision,
    )
    return _row_losses(call, z, negatives, positive, temperature, ids, negative_ids)


def _row_losses(
    call: Call,
    z: Tensor,
    negatives: Tensor | None,
    positive: Tensor,
    temperature: float | Tensor,
    ids: Tensor | None,
    negative_ids: Tensor | None,
) -> Tensor:
    """(N,) losses; checks the tensors."""
    other = z if negatives is None else negatives
    functional.check_rows("z", z, fewest=1)
    functional.check_rows("negatives", other, fewest=1)
    functional.check_alike("negatives", other, "z", z)
    if (
        not isinstance(positive, Tensor)
        or positive.shape != z.shape[:1]
        or positive.device != z.device
    ):
        got = (
            f"{tuple(positive.shape)} on {positive.device}"
            if isinstance(positive, Tensor)
            else type(positive).__name__
        )
        raise ValueError(
            f"positive must be a tensor of shape {tuple(z.shape[:1])} on {z.device}, got {got}"
        )
    functional.check_temperature(temperature, call.objective)
    tau, bound, _ = functional.bind_temperature(
        z, temperature, call, ids is not None, reduction="none"
    )
    layout = _layout(len(z), len(z) if negatives is None else len(z) + len(negatives))
    same_id = _same_id(z, negatives, ids, negative_ids, layout)
    with without_autocast(z.device):
        positive = positive.to(accumulation_dtype(z.dtype))
        if len(z) == 1 and negatives is None:
            return functional.zero_with_graph(z, positive, tau).expand(1)
        if isinstance(call.objective, ClosedForm):
            mean = _mean_negative(z, negatives, layout, same_id)
            return constant_alpha(call.objective, mean - positive, layout, same_id)
        learn_tau = tau.requires_grad and torch.is_grad_enabled()
        return _ExplicitNegatives.apply(z, negatives, positive, tau, bound, same_id, learn_tau)[0]


def _layout(n: int, rows: int) -> Layout:
    """All pairs among n anchors, or n anchors against the other rows."""
    return Layout(rows, n, 0, n, rows - n, True) if rows > n else Layout(n, 0, 0, n, n - 1, False)


def _mean_negative(
    z: Tensor, negatives: Tensor | None, layout: Layout, same_id: SameId | None
) -> Tensor:
    """(N,) mean similarity to the negatives, differentiable; 0 for an anchor without negatives."""
    wide, n = accumulation_dtype(z.dtype), len(z)
    if negatives is None:
        return mean_negative(z.to(wide), None, layout, same_id=same_id)
    if same_id is None:
        return (z.to(wide) * negatives.to(wide).sum(0)).sum(1) / layout.n_neg
    sums = same_id.sums_with_other_ids(slice(n), slice(n, None), negatives.to(wide))
    return torch.where(same_id.empty, 0.0, (z.to(wide) * sums).sum(1) / same_id.n_neg)


def _same_id(
    z: Tensor,
    negatives: Tensor | None,
    ids: Tensor | None,
    negative_ids: Tensor | None,
    layout: Layout,
) -> SameId | None:
    """The ids of all rows that the sweeps see, from ids that are checked here."""
    if (negative_ids is None) != (ids is None or negatives is None):
        given = (
            "got None"
            if negative_ids is None
            else f"got them with {'ids' if ids is None else 'negatives'}=None"
        )
        raise ValueError(f"negative_ids must be given exactly if negatives and ids are, {given}")
    if ids is None:
        return None
    ids = functional.checked_ids("ids", ids, z)
    if negatives is not None:
        ids = torch.cat([ids, functional.checked_ids("negative_ids", negative_ids, negatives)])
    return SameId.make(ids, layout, accumulation_dtype(z.dtype))


class _GivenPositives(Problem):
    """A problem whose positive similarities t⁺ (N,) are given.

    Its rows are [z; negatives], as given.
    """

    def __init__(
        self,
        z: Tensor,
        negatives: Tensor | None,
        pos: Tensor,
        tau: Tensor,
        call: BoundCall,
        same_id: SameId | None,
    ) -> None:
        rows = Rows(z if negatives is None else torch.cat([z, negatives]))
        tau = tau.to(pos.dtype)
        sweeps = Sweeps(rows, pos, tau, call, _layout(len(z), len(rows.f)), same_id)
        super().__init__(Features(rows, None), pos, tau, call, same_id, sweeps)
        self.n_first = len(z)

    def _to_views(
        self, df: Tensor, q: Tensor, weight_sums: Tensor, used: slice, views: slice
    ) -> Tensor:
        return df.view(-1, self.features.rows.f.shape[1])


class _ExplicitNegatives(torch.autograd.Function):
    """(N,) losses; the gradient sweep waits for the incoming row gradient."""

    @staticmethod
    def forward(
        z: Tensor,
        negatives: Tensor | None,
        pos: Tensor,
        tau: Tensor,
        call: BoundCall,
        same_id: SameId | None,
        learn_tau: bool,
    ) -> tuple[Tensor | None, ...]:
        problem = _GivenPositives(z, negatives, pos, tau, call, same_id)
        solution = problem.solve(learn_tau)
        # The inputs themselves are saved, not the rows that were put together from them.
        saved = problem.saved(solution)._replace(features=Features(Rows(None), None))
        return solution.loss, *saved.flatten()

    @staticmethod
    def setup_context(ctx, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        z, negatives, _, tau, ctx.call, _, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, negatives, tau, *output[1:])

    @staticmethod
    def backward(ctx, grad: Tensor | None, *of_saved: Tensor | None) -> tuple[Tensor | None, ...]:
        if not first_derivative(grad, of_saved):
            return (None,) * 7
        need_z, need_negatives, need_pos, need_tau = ctx.needs_input_grad[:4]
        z, negatives, tau, *tensors = ctx.saved_tensors
        saved = Saved.unflatten(tensors)
        with torch.no_grad(), without_autocast(grad.device):
            problem = _GivenPositives(z, negatives, saved.pos, tau, ctx.call, saved.same_id)
            need = Need(need_z, need_negatives, need_tau)
            dz, dtau = problem.gradient(saved.solution, grad, need)
            own = len(z) if need_z else 0  # rows of dz that belong to z
            gradients = (
                dz[:own].to(z.dtype) if need_z else None,
                dz[own:].to(z.dtype) if need_negatives else None,
                -(saved.solution.mass * grad) if need_pos else None,
                dtau.to(tau.dtype) if need_tau else None,
            )
        return *only_once(gradients, (grad, *ctx.saved_tensors)), None, None, None
