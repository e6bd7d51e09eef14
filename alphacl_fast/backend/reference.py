"""The oracle: the family in dense PyTorch, gradient by autograd, O(n²) memory, any float dtype.

It shares the pointwise formulas φ, ψ, w, h of `alphacl_fast.objectives` with the other backends and
nothing else: no sweeps, no derivatives, no log-domain row scalars, no closed forms. Min players are
solved by bisection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives import ClosedForm, ConstantWeight, MinPlayer, Objective, PairWeight, SigLip
from ..objectives import kind as lookup


def normalized(z: Tensor) -> Tensor:
    """Rows of unit length; an all-zero row stays zero with zero gradient."""
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    zero = norm == 0
    return (
        torch.where(zero, torch.zeros_like(z), z / norm.masked_fill(zero, 1.0))
        if bool(zero.any())
        else z / norm
    )


def similarities(a: Tensor, b: Tensor, similarity: str) -> Tensor:
    """(rows of a, rows of b) of t: inner products, or minus half the squared distances."""
    if similarity != "euclidean":
        return a @ b.t()
    mean = a.mean(0)
    a, b = a - mean, b - mean
    return a @ b.t() - a.square().sum(1, keepdim=True) / 2 - b.square().sum(1) / 2


def negatives_and_positives(
    z1: Tensor, z2: Tensor, similarity: str, negatives: str, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """(anchors, |Neg|) t of the negatives and (anchors,) t of the positive.

    Symmetric cross_view has 2N anchors.
    """
    n = z1.shape[0]
    if similarity == "cosine":
        z1, z2 = normalized(z1), normalized(z2)
    others = ~torch.eye(n, dtype=torch.bool, device=z1.device)
    cross = similarities(z1, z2, similarity)
    pos = cross.diagonal()
    if negatives == "two_view":
        both = torch.cat([z1, z2])
        mask = others.repeat(2, 2)  # neither oneself nor the partner
        return similarities(both, both, similarity)[mask].view(2 * n, 2 * n - 2), torch.cat(
            [pos, pos]
        )
    if negatives == "one_view":
        return similarities(z1, z1, similarity)[others].view(n, n - 1), pos
    forward = cross[others].view(n, n - 1)
    if not symmetric:
        return forward, pos
    return torch.cat([forward, cross.t()[others].view(n, n - 1)]), torch.cat([pos, pos])


def alpha(objective: PairWeight | MinPlayer, t: Tensor, tau: Tensor, c: float) -> Tensor:
    """(anchors, |Neg|) pairwise importances of negatives' similarities t, differentiable."""
    log = lookup(objective.kind).log
    kind = lookup(objective.kind).bind(objective.params(c))
    if isinstance(objective, MinPlayer):
        return _min_player(objective, t - t.max(1, keepdim=True).values, tau)
    n_neg = t.shape[1]
    if not log:
        w = kind.f(t, tau)
        total = w.sum(1, keepdim=True) + objective.alpha_eps * n_neg
        return w / total.masked_fill(total == 0, 1.0) if objective.normalized else w
    log_w = kind.f(t, tau)
    if not objective.normalized:
        return log_w.exp()
    if objective.alpha_eps:
        extra = torch.full_like(log_w[:, :1], objective.alpha_eps * n_neg).log()
        return torch.cat([log_w, extra], 1).softmax(1)[:, :-1]
    return log_w.softmax(1)


def _min_player(objective: MinPlayer, x: Tensor, tau: Tensor) -> Tensor:
    """h(y + x) with Σ_j h = 1.

    Bisection finds y; one Newton step then carries its exact derivative.
    """
    kind = lookup(objective.kind).bind(objective.params(0.0))
    with torch.no_grad():
        low = objective.inverse(1 / x.shape[1], tau).expand(x.shape[0], 1).clone()
        high = objective.inverse(1.0, tau).expand(x.shape[0], 1).clone()
        for _ in range(200 if x.dtype == torch.float64 else 60):
            y = (low + high) / 2
            large = kind.f(y + x, tau).sum(1, keepdim=True) > 1
            low, high = torch.where(large, low, y), torch.where(large, y, high)
        slope = kind.df(y + x, tau).sum(1, keepdim=True)
    residual = kind.f(y + x, tau).sum(1, keepdim=True) - 1
    y = y - torch.where(slope > 0, residual / slope.masked_fill(slope == 0, 1.0), 0.0)
    return kind.f(y + x, tau)


def importances(
    z1: Tensor,
    z2: Tensor,
    tau: Tensor,
    objective: Objective,
    similarity: str,
    negatives: str,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """(anchors, |Neg|) t of the negatives and α_ij = ∂L_i/∂Δ_ij, with a designed α held fixed.

    For φ/ψ losses autograd computes α.
    """
    c = 0.0 if similarity == "euclidean" else 1.0
    t, pos = negatives_and_positives(z1.detach(), z2.detach(), similarity, negatives, symmetric)
    if isinstance(objective, (PairWeight, MinPlayer)):
        return t, alpha(objective, t, tau, c).detach()
    with torch.enable_grad():
        gap = (t - pos[:, None]).requires_grad_()
        (a,) = torch.autograd.grad(_of_gaps(objective, gap, tau, c).sum(), gap)
    return t, a


def row_losses(
    z1: Tensor,
    z2: Tensor,
    tau: Tensor,
    objective: Objective,
    similarity: str,
    negatives: str,
    symmetric: bool,
    ids: Tensor | None = None,
    max_gap: float | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """(anchors,) losses L_i; symmetric cross_view gives the 2N anchors of both towers.

    Args:
        z1, z2: (N, D) embeddings, same float dtype.
        tau: () temperature, or (2,) scale and bias of SigLIP, same dtype.
        ids: (N,) integers; samples with the id of an anchor are none of its negatives.
        max_gap: negatives with a larger Δ do not count.
        guide: unit rows of another model, of one view or both, and (anchors,) the largest inner
            product with the anchor's one at which a negative counts.
    """
    if isinstance(objective, SigLip):
        return _siglip(z1, z2, tau, similarity, ids)
    c = 0.0 if similarity == "euclidean" else 1.0
    if ids is not None or max_gap is not None or guide is not None:
        # without ids every pair has its own
        ids = torch.arange(len(z1), device=z1.device) if ids is None else ids
        counts = _counts(len(z1), negatives, symmetric, ids, guide)
        return _one_by_one(z1, z2, tau, objective, similarity, negatives, counts, max_gap)
    return of_similarities(
        objective, *negatives_and_positives(z1, z2, similarity, negatives, symmetric), tau, c
    )


def _counts(
    n: int,
    negatives: str,
    symmetric: bool,
    ids: Tensor,
    guide: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """(anchors, others) bool: which rows count for an anchor, by their ids and by the guide."""
    first, second, both = slice(n), slice(n, 2 * n), slice(2 * n)
    sides = {
        "two_view": [(both, both)],
        "one_view": [(first, first)],
        "cross_view": [(first, second), (second, first)][: 1 + symmetric],
    }[negatives]
    ids, counts = ids.repeat(2), []
    for anchors, others in sides:
        counts.append(ids[anchors, None] != ids[others])
        if guide is not None:
            rows, largest = guide
            counts[-1] &= ~(rows[anchors] @ rows[others].t() > largest[anchors, None])
    return torch.cat(counts)


def _one_by_one(
    z1: Tensor,
    z2: Tensor,
    tau: Tensor,
    objective: Objective,
    similarity: str,
    negatives: str,
    counts: Tensor,
    max_gap: float | None,
) -> Tensor:
    """(anchors,) losses, each anchor with a list of negatives of its own; 0 where that is empty."""
    c = 0.0 if similarity == "euclidean" else 1.0
    if similarity == "cosine":
        z1, z2 = normalized(z1), normalized(z2)
    anchors, positives = (torch.cat(x)[: len(counts)] for x in ((z1, z2), (z2, z1)))
    losses = []
    for k, (anchor, positive) in enumerate(zip(anchors, positives, strict=True)):
        others = {"two_view": anchors, "one_view": z1, "cross_view": z2 if k < len(z1) else z1}
        mine = others[negatives][counts[k]]
        pos = similarities(anchor[None], positive[None], similarity)[0]
        t = pos.new_empty(1, 0)
        if len(mine):
            t = similarities(anchor[None], mine, similarity)
        if max_gap is not None:
            t = t[:, ~(t[0] > pos + max_gap)]
        if t.numel():
            losses += of_similarities(objective, t, pos, tau, c)
        else:
            losses.append((anchor * 0).sum() + tau * 0)  # every input has a gradient: 0
    return torch.stack(losses)


def _siglip(
    z1: Tensor, z2: Tensor, scale_and_bias: Tensor, similarity: str, ids: Tensor | None
) -> Tensor:
    """(N,) losses of the rows of z1, each pair by the logistic loss of its label ±1."""
    if similarity == "cosine":
        z1, z2 = normalized(z1), normalized(z2)
    scale, bias = scale_and_bias
    own = torch.eye(len(z1), dtype=torch.bool, device=z1.device)
    y = scale * similarities(z1, z2, similarity) + bias
    losses = torch.logaddexp(torch.where(own, -y, y), torch.zeros_like(y))
    if ids is None:
        return losses.sum(1)
    return losses.masked_fill((ids[:, None] == ids) & ~own, 0.0).sum(1)


def of_similarities(objective: Objective, t: Tensor, pos: Tensor, tau: Tensor, c: float) -> Tensor:
    """(anchors,) losses from t (anchors, |Neg|) of the negatives and (anchors,) of the
    positives.
    """
    gap = t - pos[:, None]
    if isinstance(objective, ConstantWeight):
        objective = objective.closed_form
    if isinstance(objective, (PairWeight, MinPlayer)):
        a = alpha(objective, t, tau, c)
        return ((a.detach() if objective.detach_alpha else a) * gap).sum(1)
    return _of_gaps(objective, gap, tau, c)


def _of_gaps(objective: Objective, gap: Tensor, tau: Tensor, c: float) -> Tensor:
    """(anchors,) losses that are functions of Δ (anchors, |Neg|) alone."""
    if isinstance(objective, ClosedForm):
        return gap.sum(1) if objective.name == "triplet_contrastive" else gap.mean(1)
    kind = lookup(objective.kind)
    psi = kind.bind(objective.params(c)).f(gap, objective.kind_tau(tau))
    return objective.phi(psi.logsumexp(1) + objective.margin if kind.log else psi.sum(1), tau)
