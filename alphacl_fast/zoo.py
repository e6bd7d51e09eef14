"""Published losses by their names, as short compositions of the functions of this package.

Each takes O(n·D) memory and is exact: its pair weights are sums of (row scalar)·(function of
t_ij)·(column scalar), one sweep each (docs/losses.md). Rows are normalised here; s is the cosine.

Functions of two views (z1, z2) follow SimCLR unless they say otherwise: the anchors are the 2N rows
of both views, an anchor's positive is its other view, and its negatives are the other 2N − 2 rows.
One pair has no negatives: the loss is 0 with gradient 0. `multi_similarity`, `circle` and
`tuplet_margin` take rows with ids (n,), any number of rows per id; they sum over the rows of an
anchor's own id in blocks (`same_id`), and over all others in sweeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional, shared_rows
from .autograd import unit_rows
from .call import as_operator, without_autocast
from .explicit_negatives import loss_against, loss_against_rows
from .functional import alpha_cl_loss, zero_with_graph
from .objectives import LOG_SUM, PairLoss
from .one_operator import one_operator
from .same_id import Block, Groups, Outcome, losses_of_groups
from .tracing import breaks_the_graph

__all__ = [
    "ISogCLR",
    "SogCLR",
    "adnce",
    "circle",
    "dcl",
    "dclw",
    "debiased",
    "dhel",
    "hcl",
    "macl",
    "multi_similarity",
    "rince",
    "tuplet_margin",
]


# --- two views ------------------------------------------------------------------------------------


def _two_for_each(n: int, settings: dict[str, Any]) -> tuple[int]:
    """The shape of the losses of both anchors of n pairs."""
    return (2 * n,)


@one_operator("z1", "z2", losses=_two_for_each)
def dcl(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Decoupled contrastive loss: log Σ_j exp(s_ij/τ) − s⁺_i/τ, without the positive in the sum.

    Two sweeps: it is InfoNCE with ε = 0.

    Args:
        z1: (N, D) first view, N ≥ 1, float32, float64, bfloat16 or float16.
        z2: (N, D) second view, on the device of z1; towers of two dtypes are promoted to one.
        temperature: τ > 0, a float or a one-element tensor, which receives its gradient.
        reduction: "mean" or "sum" over the 2N anchors, or "none": (2N,).
        backend: see `alphacl_fast.functional.alpha_cl_loss`.

    Returns:
        () or (2N,), float32, or float64 for float64 embeddings.

    Raises:
        TypeError, ValueError: a bad argument; the message names it, what was expected and what was
            received.

    Source: Yeh et al., arXiv:2110.06848.
    """
    return alpha_cl_loss(
        z1, z2, LOG_SUM, temperature=temperature, reduction=reduction, backend=backend
    )


@one_operator("z1", "z2", losses=_two_for_each)
def dclw(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    sigma: float = 0.5,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """DCL with a weighted positive: log Σ_j exp(s_ij/τ) − w_i·s⁺_i/τ.

    w_i = 2 − N·softmax_i(s⁺/σ) is a constant of the gradient: hard positives weigh more. Two
    sweeps.

    Args:
        z1: (N, D) first view; see `dcl`.
        z2: (N, D) second view.
        temperature: τ > 0, a float or a one-element tensor.
        sigma: σ > 0.
        reduction: "mean", "sum" or "none": (2N,).
        backend: see `dcl`.

    Returns:
        () or (2N,).

    Raises:
        TypeError, ValueError: a bad argument.

    Source: Yeh et al., arXiv:2110.06848, the von Mises-Fisher weighting.
    """
    _positive("sigma", sigma)

    def losses() -> Tensor:
        positive = _positives(z1, z2)
        weight = 2 - len(z1) * torch.softmax(positive.detach() / sigma, 0)
        own = ((1 - weight) * positive / _tau(temperature, positive)).repeat(2)
        return _log_sums(z1, z2, temperature, backend) + own

    return _of_views(z1, z2, temperature, reduction, losses)


@one_operator("z1", "z2", losses=_two_for_each)
def debiased(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    tau_plus: float = 0.1,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Debiased contrastive loss, which discounts the negatives that share the anchor's class.

    L_i = −log(e⁺/(e⁺ + g)) with e⁺ = exp(s⁺_i/τ), M = 2N − 2 negatives, and g = max((Σ_j
    exp(s_ij/τ) − M·τ⁺·e⁺)/(1 − τ⁺), M·exp(−1/τ)). Two sweeps; everything is computed from
    logarithms.

    Args:
        z1: (N, D) first view; see `dcl`.
        z2: (N, D) second view.
        temperature: τ > 0, a float or a one-element tensor.
        tau_plus: τ⁺, the prior probability of the anchor's class, in [0, 1).
        reduction: "mean", "sum" or "none": (2N,).
        backend: see `dcl`.

    Returns:
        () or (2N,).

    Raises:
        TypeError, ValueError: a bad argument.

    Source: Chuang et al., arXiv:2007.00224.
    """
    _between("tau_plus", tau_plus, 0, 1, open_above=True)

    def losses() -> Tensor:
        log_sums = _log_sums(z1, z2, temperature, backend)
        return _debiased(log_sums, _positives(z1, z2).repeat(2), temperature, tau_plus)

    return _of_views(z1, z2, temperature, reduction, losses)


@one_operator("z1", "z2", losses=_two_for_each)
def hcl(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    tau_plus: float = 0.1,
    beta: float = 1.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Hard-negative contrastive loss: `debiased` with negatives weighted by exp(β·s_ij/τ).

    Σ_j exp(s_ij/τ) becomes M·Σ_j exp((1 + β)·s_ij/τ)/Σ_j exp(β·s_ij/τ), whose weights are
    differentiated too. Four sweeps: two sums, and a gradient of each.

    Args:
        z1: (N, D) first view; see `dcl`.
        z2: (N, D) second view.
        temperature: τ > 0, a float or a one-element tensor.
        tau_plus: τ⁺, the prior probability of the anchor's class, in [0, 1).
        beta: β ≥ 0, the concentration on hard negatives; 0 is `debiased`.
        reduction: "mean", "sum" or "none": (2N,).
        backend: see `dcl`.

    Returns:
        () or (2N,).

    Raises:
        TypeError, ValueError: a bad argument.

    Source: Robinson et al., arXiv:2010.04592.
    """
    _between("tau_plus", tau_plus, 0, 1, open_above=True)
    _between("beta", beta, 0, math.inf, open_above=True)

    def losses() -> Tensor:
        if beta == 0:
            log_sums = _log_sums(z1, z2, temperature, backend)
        else:
            hard = _log_sums(z1, z2, temperature / (1 + beta), backend)
            log_sums = hard - _log_sums(z1, z2, temperature / beta, backend)
            log_sums = log_sums + math.log(2 * len(z1) - 2)
        return _debiased(log_sums, _positives(z1, z2).repeat(2), temperature, tau_plus)

    return _of_views(z1, z2, temperature, reduction, losses)


def _debiased(
    log_sums: Tensor, positive: Tensor, temperature: float | Tensor, tau_plus: float
) -> Tensor:
    """−log(e⁺/(e⁺ + g)) from log Σ_j exp(Δ_ij/τ) and s⁺: it is log(1 + g/e⁺)."""
    log_m = math.log(len(positive) - 2)
    floor = log_m - (1 + positive) / _tau(temperature, positive)
    log_ratio = floor
    if tau_plus == 0:
        corrected, usable = log_sums, log_sums > floor
    else:
        excess = log_sums - (log_m + math.log(tau_plus))  # over what is taken away
        usable = ~(excess <= 0)  # NaN stays
        share = -torch.expm1(-torch.where(usable, excess, 1.0))
        corrected = log_sums + share.log() - math.log1p(-tau_plus)
        usable = usable & ~(corrected <= floor)
    log_ratio = torch.where(usable, corrected, floor)
    return _log1p_exp(log_ratio)


@one_operator("z1", "z2")
def dhel(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.3,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Decoupled hyperspherical energy loss: each view is spread out on its own.

    L_i = log Σ_{j≠i} exp(x_i·x_j/τ) + log Σ_{j≠i} exp(y_i·y_j/τ) − x_i·y_i/τ with the rows x and y
    of the views. It needs two sweeps for each view, which together cover half of the pairs of
    two_view.

    Args:
        z1: (N, D) first view; see `dcl`.
        z2: (N, D) second view.
        temperature: τ > 0, a float or a one-element tensor.
        reduction: "mean" or "sum" over the N pairs, or "none": (N,).
        backend: see `dcl`.

    Returns:
        () or (N,).

    Raises:
        TypeError, ValueError: a bad argument.

    Source: Koromilas et al., arXiv:2405.18045.
    """

    def losses() -> Tensor:
        positive = _positives(z1, z2)
        first, second = (
            _log_sums(a, b, temperature, backend, negatives="one_view")
            for a, b in ((z1, z2), (z2, z1))
        )
        return first + second + positive / _tau(temperature, positive)

    return _of_views(z1, z2, temperature, reduction, losses, anchors=1)


@one_operator("z1", "z2", losses=_two_for_each)
def rince(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    q: float = 0.5,
    lam: float = 0.025,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Robust InfoNCE, for positive pairs of which some may be false.

    L_i = −(e⁺)^q/q + (λ(e⁺ + Σ_j exp(s_ij/τ)))^q/q with e⁺ = exp(s⁺_i/τ). As q → 0 its gradient
    becomes InfoNCE's; q = 1 is the most robust. Two sweeps.

    Args:
        z1: (N, D) first view; see `dcl`.
        z2: (N, D) second view.
        temperature: τ > 0, a float or a one-element tensor.
        q: exponent in (0, 1].
        lam: λ > 0, the weight of the density in the batch.
        reduction: "mean", "sum" or "none": (2N,).
        backend: see `dcl`.

    Returns:
        () or (2N,).

    Raises:
        TypeError, ValueError: a bad argument.

    Source: Chuang et al., arXiv:2201.04309.
    """
    _between("q", q, 0, 1, open_below=True)
    _positive("lam", lam)

    def losses() -> Tensor:
        positive = _positives(z1, z2).repeat(2)
        # log((e⁺ + Σ)/e⁺)
        cross_entropy = alpha_cl_loss(
            z1, z2, temperature=temperature, reduction="none", backend=backend
        )
        logit = q * (positive / _tau(temperature, positive))
        return ((q * (cross_entropy + math.log(lam)) + logit).exp() - logit.exp()) / q

    return _of_views(z1, z2, temperature, reduction, losses)


@one_operator("z1", "z2", losses=_two_for_each)
def adnce(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.5,
    mu: float = 0.7,
    sigma: float = 1.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """InfoNCE with negatives weighted by a Gaussian of their similarity.

    L_i = −log(e⁺/(e⁺ + Σ_j w_ij·exp(s_ij/τ))) with e⁺ = exp(s⁺_i/τ) and w_ij = exp(−(s_ij −
    μ)²/(2σ²)), divided by their mean over j. The weights are constants of the gradient. Three
    sweeps: two sums, one gradient.

    Args:
        z1: (N, D) first view; see `dcl`.
        z2: (N, D) second view.
        temperature: τ > 0, a float. The sums are not computed from logarithms, so τ and σ must keep
            every term in the range of float32: 2/τ + (1 + |μ|)²/(2σ²) ≤ 80.
        mu: μ, the similarity with the largest weight.
        sigma: σ > 0, the width of the Gaussian.
        reduction: "mean", "sum" or "none": (2N,).
        backend: see `dcl`; "cuda" does not serve this loss, which consists of plain functions.

    Returns:
        () or (2N,).

    Raises:
        TypeError, ValueError: a bad argument.

    Source: Wu et al., arXiv:2310.11048.
    """
    _positive("temperature", temperature)
    _positive("sigma", sigma)
    _between("mu", mu, -math.inf, math.inf, open_above=True, open_below=True)
    largest = 2 / temperature + (1 + abs(mu)) ** 2 / (2 * sigma**2)
    if largest > 80:
        raise ValueError(
            "temperature and sigma must have 2/temperature + (1 + |mu|)²/(2·sigma²) ≤ 80, got "
            f"{largest:.4g}"
        )

    def losses() -> Tensor:
        rows, positive = torch.cat([unit_rows(z1), unit_rows(z2)]), _positives(z1, z2)
        weighted, weights = (
            loss_against(
                rows,
                None,
                torch.zeros_like(rows[:, 0]),
                objective,
                ids=torch.arange(len(z1), device=z1.device).repeat(2),
                reduction="none",
                backend=backend,
            )
            for objective in _adnce_sums(temperature, mu, sigma)
        )
        log_mean = weighted.log() - weights.detach().log()
        return _log1p_exp(
            math.log(len(rows) - 2) + log_mean + (1 - positive.repeat(2)) / temperature
        )

    return _of_views(z1, z2, temperature, reduction, losses)


@lru_cache(maxsize=16)
def _adnce_sums(temperature: float, mu: float, sigma: float) -> tuple[PairLoss, PairLoss]:
    """Σ_j w_ij·exp((s_ij − 1)/τ), whose gradient holds w, and Σ_j w_ij."""

    def weight(s: Tensor) -> Tensor:
        return torch.exp((s - mu).square() / (-2 * sigma**2))

    def weighted(s: Tensor) -> Tensor:
        return weight(s.detach()) * torch.exp((s - 1) / temperature)

    return PairLoss(None, weighted), PairLoss(None, weight)


@one_operator("z1", "z2", losses=_two_for_each)
def macl(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.1,
    alpha: float = 0.5,
    initial_alignment: float = 0.0,
    eps: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Model-aware contrastive loss: the temperature follows the alignment of the batch.

    L_i = ℓ_i/(1 − exp(−ℓ_i) + ε) with cross-entropy ℓ_i at τ = τ_0·(1 + α·(mean s⁺ − A_0)); both
    the denominator and τ are constants of the gradient. Two sweeps.

    Args:
        z1: (N, D) first view; see `dcl`.
        z2: (N, D) second view.
        temperature: τ_0 > 0.
        alpha: α in [0, 1], how strongly the temperature follows the alignment.
        initial_alignment: A_0 in [0, 1].
        eps: ε ≥ 0; the authors' code has 1e-8, which weakens anchors whose loss is as small as ε.
        reduction: "mean", "sum" or "none": (2N,).
        backend: see `dcl`.

    Returns:
        () or (2N,).

    Raises:
        TypeError, ValueError: a bad argument.

    Source: Huang et al., arXiv:2207.07874.
    """
    _positive("temperature", temperature)
    _between("alpha", alpha, 0, 1)
    _between("initial_alignment", initial_alignment, 0, 1)
    _between("eps", eps, 0, math.inf, open_above=True)

    def losses() -> Tensor:
        alignment = _positives(z1, z2).detach().mean()
        tau = temperature * (1 + alpha * (alignment - initial_alignment))
        tau = torch.where(tau.isnan(), temperature, tau)  # the loss is NaN in any case
        loss = alpha_cl_loss(z1, z2, temperature=tau, reduction="none", backend=backend)
        failed = eps - torch.expm1(-loss.detach())  # 1 − P of the positive
        return loss / failed.clamp(min=torch.finfo(loss.dtype).tiny)

    return _of_views(z1, z2, temperature, reduction, losses)


# --- rows with ids --------------------------------------------------------------------------------


@one_operator("z")
def multi_similarity(
    z: Tensor,
    ids: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Multi-similarity loss of rows with ids, without mining.

    L_i = (1/α)·log(1 + Σ_p exp(−α(s_ip − λ))) + (1/β)·log(1 + Σ_n exp(β(s_in − λ))) with the rows p
    of the anchor's id and the rows n of other ids. Two sweeps over the negatives, and blocks.

    Args:
        z: (n, D) embeddings, n ≥ 1, float32, float64, bfloat16 or float16.
        ids: (n,) integers.
        alpha: α > 0.
        beta: β > 0.
        base: λ, the similarity that separates positives from negatives.
        reduction: "mean" or "sum" over all rows, or "none": (n,).
        backend: see `dcl`.

    Returns:
        () or (n,), float32, or float64 for float64 embeddings.

    Raises:
        TypeError, ValueError: a bad argument.

    Source: Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric
    Learning", CVPR 2019, eq. 10 without its mining.
    """
    _positive("alpha", alpha)
    _positive("beta", beta)
    _between("base", base, -math.inf, math.inf, open_above=True, open_below=True)

    def losses(rows: Tensor, groups: Groups, ids: Tensor) -> tuple[Tensor, Tensor]:
        negative = loss_against(
            rows,
            None,
            torch.full_like(rows[:, 0], base),
            temperature=1 / beta,
            ids=ids,
            reduction="none",
            backend=backend,
        )

        def formula(block: Block) -> Outcome:
            logits = _only(block, (base - block.t) * alpha)
            total = _log1p_exp(logits.logsumexp(1))  # log(1 + Σ_p)
            return Outcome(total / alpha, (logits - total[:, None]).exp_(), -1.0, ())

        positive = losses_of_groups(rows, None, groups, formula)
        return negative / beta + positive, torch.ones_like(positive)

    return _of_rows(z, ids, reduction, losses)


@one_operator("z")
def circle(
    z: Tensor,
    ids: Tensor,
    *,
    margin: float = 0.25,
    gamma: float = 256.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Circle loss of rows with ids: pairs that are far from their optimum have larger weights.

    L_i = log(1 + Σ_n exp(γ·a_in·(s_in − m))·Σ_p exp(−γ·a_ip·(s_ip − 1 + m))) with a_in = max(s_in +
    m, 0) and a_ip = max(1 + m − s_ip, 0), which are constants of the gradient. Everything is
    computed from logarithms: the exponents of the negatives, which reach γ(1 − m²), are summed in
    bands that fit into float32. Two sweeps for each band, and blocks; γ = 256 has two bands.

    Args:
        z: (n, D) embeddings, n ≥ 1, float32, float64, bfloat16 or float16.
        ids: (n,) integers.
        margin: m in [0, 1].
        gamma: γ > 0, at most 1e4.
        reduction: "mean" or "sum" over the rows that have a positive and a negative, or "none":
            (n,), 0 for the others.
        backend: see `dcl`; "cuda" does not serve this loss, which consists of plain functions.

    Returns:
        () or (n,).

    Raises:
        TypeError, ValueError: a bad argument.

    Source: Sun et al., arXiv:2002.10857, per anchor.
    """
    _between("margin", margin, 0, 1)
    _between("gamma", gamma, 0, 1e4, open_below=True)

    def losses(rows: Tensor, groups: Groups, ids: Tensor) -> tuple[Tensor, Tensor]:
        usable = groups.has_positive & groups.has_negative
        bands = []
        for centre, band in _circle_bands(margin, gamma):
            total = loss_against(
                rows,
                None,
                torch.zeros_like(rows[:, 0]),
                band,
                ids=ids,
                reduction="none",
                backend=backend,
            )
            bands.append(torch.where(usable, centre + _log(total), 0.0))
        negative = torch.stack(bands).logsumexp(0)

        def formula(block: Block) -> Outcome:
            apart = torch.relu(1 + margin - block.t)  # a constant of the gradient
            logits = _only(block, apart * (1 - margin - block.t) * gamma)
            total = logits.logsumexp(1)
            total = torch.where(total == -math.inf, 0.0, total)  # no positive
            return Outcome(total, (logits - total[:, None]).exp_().mul_(apart), -gamma, ())

        positive = losses_of_groups(rows, None, groups, formula)
        loss = _log1p_exp(torch.where(usable, negative + positive, -math.inf))
        return torch.where(usable, loss, 0.0), usable

    return _of_rows(z, ids, reduction, losses)


#: The exponents of a band are at most this far from its centre; float32 holds exp(±87).
_HALF_BAND = 80.0


@lru_cache(maxsize=16)
def _circle_bands(margin: float, gamma: float) -> tuple[tuple[float, PairLoss], ...]:
    """Centres, and Σ_n exp(exponent − centre) over the pairs of the band."""
    least, most = -gamma * margin**2, gamma * (1 - margin**2)
    count = max(1, math.ceil((most - least) / (2 * _HALF_BAND)))
    step = (most - least) / count

    def band(k: int) -> tuple[float, PairLoss]:
        low, high = least + k * step, least + (k + 1) * step
        centre = (low + high) / 2
        # the outermost bands are open: a rounded cosine may exceed 1
        above, below = (low if k else -math.inf), (high if k < count - 1 else math.inf)

        def term(s: Tensor) -> Tensor:
            exponent = torch.relu(s.detach() + margin) * (s - margin) * gamma
            inside = (exponent > above) & (exponent <= below)
            kept = torch.where(inside, exponent - centre, torch.zeros_like(s))
            return torch.where(inside, torch.exp(kept), torch.zeros_like(s))

        return centre, PairLoss(None, term)

    return tuple(band(k) for k in range(count))


@one_operator("z")
def tuplet_margin(
    z: Tensor,
    ids: Tensor,
    *,
    margin: float = 5.73,
    scale: float = 64.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Tuplet margin loss of rows with ids.

    L_i = Σ_p log(1 + Σ_n exp(σ(s_in − cos(θ_ip − m)))) with the angle θ_ip between the anchor and a
    row p of its id. Two sweeps over the negatives, and blocks.

    Args:
        z: (n, D) embeddings, n ≥ 1, float32, float64, bfloat16 or float16.
        ids: (n,) integers.
        margin: m in degrees, in [0, 90].
        scale: σ > 0.
        reduction: "mean" over all pairs (i, p), "sum", or "none": (n,).
        backend: see `dcl`.

    Returns:
        () or (n,).

    Raises:
        TypeError, ValueError: a bad argument.

    Source: Yu and Tao, "Deep Metric Learning with Tuplet Margin Loss", ICCV 2019.
    """
    _between("margin", margin, 0, 90)
    _positive("scale", scale)
    cos, sin = (f(math.radians(margin)) for f in (math.cos, math.sin))

    def losses(rows: Tensor, groups: Groups, ids: Tensor) -> tuple[Tensor, Tensor]:
        # exponents are taken relative to a similarity near the positives', which rounds less
        origin = groups.mean_similarity(rows)
        log_sums = loss_against(
            rows,
            None,
            origin,
            LOG_SUM,
            temperature=1 / scale,
            ids=ids,
            reduction="none",
            backend=backend,
        )
        log_sums = torch.where(groups.has_negative, log_sums, -math.inf)

        def formula(block: Block, log_sums: Tensor, origin: Tensor) -> Outcome:
            # where rows coincide the angle has no derivative: 0 is taken
            edge = 1 - torch.finfo(block.t.dtype).eps
            s = block.t.clamp(-edge, edge)
            sine = (1 - s.square()).sqrt()
            closer = s * cos + sine * sin  # cos(θ − m)
            slope = torch.where(s == block.t, cos - s / sine * sin, 0.0)
            logits = _only(block, log_sums[:, None] + (origin[:, None] - closer) * scale)
            share = torch.sigmoid(logits)
            loss = _log1p_exp(logits).sum(1)
            return Outcome(loss, share * slope, -scale, (share.sum(1), None))

        out = losses_of_groups(rows, None, groups, formula, log_sums, origin)
        return out, groups.count

    return _of_rows(z, ids, reduction, losses)


# --- running sums ---------------------------------------------------------------------------------


class SogCLR(nn.Module):
    """Global contrastive loss, whose sums run over the whole data set although batches are small.

    Every sample keeps a running mean u of exp(Δ_ij/τ) over the negatives it has met, for each of
    its views: u ← (1 − γ)u + γ·(mean over this batch), and the batch's mean at the first visit. The
    loss is mean_i τ·(batch mean)_i/u_i with u a constant of the gradient, which descends on mean_i
    τ·log u_i. Two sweeps. The state is kept as logarithms, in the buffer ``log_u``, which the
    ``state_dict`` holds.

    Args:
        n_samples: size of the data set.
        temperature: τ > 0.
        gamma: γ in (0, 1], the share of the newest batch in u.
        backend: see `dcl`.
        process_group: None, "world" or a `torch.distributed.ProcessGroup` whose ranks share one
            batch: negatives come from all ranks, every rank receives the loss of the whole batch,
            and the running means of all ranks' samples are written on every rank, so that the
            states stay equal. Gradients follow the convention of
            `alphacl_fast.functional.alpha_cl_loss`.

    Shape:
        * z1, z2: (N, D), float32, float64, bfloat16 or float16.
        * index: (N,) integers in [0, n_samples), all different, on all ranks together: the samples
          of the batch.
        * output: (), float32, or float64 for float64 embeddings.

    Raises:
        TypeError, ValueError: a bad argument of the constructor or the call.

    Source: Yuan et al., arXiv:2202.12387.
    """

    def __init__(
        self,
        n_samples: int,
        *,
        temperature: float = 0.1,
        gamma: float = 0.9,
        backend: str = "auto",
        process_group: Any = None,
    ) -> None:
        super().__init__()
        _count("n_samples", n_samples)
        _positive("temperature", temperature)
        _between("gamma", gamma, 0, 1, open_below=True)
        functional.make_group(process_group, "auto")
        self.process_group = process_group
        self.n_samples, self.temperature = n_samples, float(temperature)
        self.gamma, self.backend = float(gamma), backend
        #: (2, n_samples) log u of each view; −inf: not visited yet
        self.register_buffer("log_u", torch.full((2, n_samples), -math.inf))

    def forward(self, z1: Tensor, z2: Tensor, index: Tensor) -> Tensor:
        """The loss of a batch; in training mode it updates the running means.

        Args:
            z1: (N, D) first view.
            z2: (N, D) second view.
            index: (N,) integers, the samples that the rows show.

        Returns:
            ().

        Raises:
            TypeError, ValueError: bad embeddings or a bad index.
        """
        batch = _Batch.of(self, z1, z2, index)
        if batch.count == 1:
            return zero_with_graph(z1, z2)
        losses = alpha_cl_loss(
            z1,
            z2,
            LOG_SUM,
            temperature=self.temperature,
            reduction="none",
            backend=self.backend,
            process_group=self.process_group,
        )
        log_mean = (losses - math.log(2 * batch.count - 2)).view(2, -1)
        log_u = _running(self.log_u[:, batch.index], log_mean.detach(), self.gamma)
        if self.training:
            where, new = batch.of_all(log_u.t().contiguous())
            self.log_u[:, where] = new.t().to(self.log_u.dtype)
        return batch.total(self.temperature * (log_mean - log_u).exp().sum() / (2 * batch.count))

    def extra_repr(self) -> str:
        """Every setting."""
        shown = f"{self.n_samples}, temperature={self.temperature:g}, gamma={self.gamma:g}"
        return shown + _shown_group(self.process_group)


class ISogCLR(nn.Module):
    """Global contrastive loss of two modalities with a temperature for every sample and modality.

    It minimises mean_i [τ_i·log(mean_j exp(Δ_ij/τ_i)) + τ_i·ρ] over the network and over τ_i in
    [τ_min, τ_max]: a sample with many near negatives gets a high temperature. The rows of each view
    are anchors against the rows of the other view. Running means u_i stand for the inner mean, as
    in `SogCLR`, and each temperature takes a step of gradient descent with momentum when its sample
    is visited. Four sweeps for each view, one of them for the gradient in τ_i.

    State: the buffers ``log_u``, ``tau`` and ``momentum``, all (2, n_samples).

    Args:
        n_samples: size of the data set.
        temperature: initial τ_i.
        temperature_range: (τ_min, τ_max).
        rho: ρ ≥ 0; the larger, the lower the temperatures.
        gamma: γ in (0, 1], the share of the newest batch in u.
        step: step size of the temperatures.
        momentum: share of the older gradients in a step, in [0, 1).
        backend: see `dcl`.
        process_group: None, "world" or a `torch.distributed.ProcessGroup` whose ranks share one
            batch; see `SogCLR`. Every rank gathers the rows of all ranks.

    Shape:
        * z1, z2: (N, D), float32, float64, bfloat16 or float16.
        * index: (N,) integers in [0, n_samples), all different, on all ranks together.
        * output: (), float32, or float64 for float64 embeddings: the sum of both directions.

    Raises:
        TypeError, ValueError: a bad argument of the constructor or the call.

    Source: Qiu et al., arXiv:2305.11965.
    """

    def __init__(
        self,
        n_samples: int,
        *,
        temperature: float = 0.01,
        temperature_range: tuple[float, float] = (0.005, 0.05),
        rho: float = 8.0,
        gamma: float = 0.8,
        step: float = 0.001,
        momentum: float = 0.9,
        backend: str = "auto",
        process_group: Any = None,
    ) -> None:
        super().__init__()
        _count("n_samples", n_samples)
        functional.make_group(process_group, "auto")
        self.process_group = process_group
        try:
            low, high = temperature_range
        except (TypeError, ValueError):
            raise TypeError(
                f"temperature_range must be two numbers (low, high), got {temperature_range!r}"
            ) from None
        _positive("temperature_range[0]", low)
        _between("temperature_range[1]", high, low, math.inf, open_above=True)
        _between("temperature", temperature, low, high)
        _between("rho", rho, 0, math.inf, open_above=True)
        _between("gamma", gamma, 0, 1, open_below=True)
        _between("step", step, 0, math.inf, open_above=True)
        _between("momentum", momentum, 0, 1, open_above=True)
        self.n_samples, self.range, self.rho = n_samples, (float(low), float(high)), float(rho)
        self.gamma, self.step, self.share = float(gamma), float(step), float(momentum)
        self.backend = backend
        self.register_buffer("log_u", torch.full((2, n_samples), -math.inf))
        self.register_buffer("tau", torch.full((2, n_samples), float(temperature)))
        self.register_buffer("momentum", torch.zeros(2, n_samples))

    def forward(self, z1: Tensor, z2: Tensor, index: Tensor) -> Tensor:
        """The loss of a batch; in training mode it updates running means and temperatures.

        Args:
            z1: (N, D) first modality.
            z2: (N, D) second modality.
            index: (N,) integers, the samples that the rows show.

        Returns:
            ().

        Raises:
            TypeError, ValueError: bad embeddings or a bad index.
        """
        batch = _Batch.of(self, z1, z2, index)
        if batch.count == 1:
            return zero_with_graph(z1, z2)
        x, y = unit_rows(z1), unit_rows(z2)
        first, second = self._direction(0, x, y, batch), self._direction(1, y, x, batch)
        return batch.total((first.sum() + second.sum()) / batch.count)

    def _direction(self, view: int, x: Tensor, y: Tensor, batch: _Batch) -> Tensor:
        """(N,) losses of the anchors x (N, D) against y; updates the state of their view."""
        index = batch.index
        tau = self.tau[view, index].to(x.dtype)
        log_mean, slope = self._log_mean(x, y, tau, batch)
        log_u = _running(self.log_u[view, index], log_mean.detach(), self.gamma)
        ratio = (log_mean - log_u).exp()
        if self.training:
            with torch.no_grad():
                # ∂/∂τ of τ·log u + τ·ρ, where u moves as the batch's mean does
                gradient = log_u + self.rho + tau * ratio * slope
                momentum = (1 - self.share) * gradient + self.share * self.momentum[view, index]
                new_tau = (tau - self.step * momentum).clamp(*self.range)
                where, state = batch.of_all(torch.stack([log_u, momentum, new_tau], 1))
                for buffer, new in zip(
                    (self.log_u, self.momentum, self.tau), state.unbind(1), strict=True
                ):
                    buffer[view, where] = new.to(buffer.dtype)
        return tau * ratio

    def _log_mean(self, x: Tensor, y: Tensor, tau: Tensor, batch: _Batch) -> tuple[Tensor, Tensor]:
        """log mean_j exp(Δ_ij/τ_i), and its derivative in τ_i as a constant."""
        if batch.sharing is None:
            log_mean, slope = log_mean_and_slope(x, y, tau, self.backend)
        else:
            log_mean, slope = _log_mean_over_ranks(x, y, tau, self, batch)
        return log_mean, slope.detach()

    def extra_repr(self) -> str:
        """Every setting."""
        shown = (
            f"{self.n_samples}, temperature_range={self.range}, rho={self.rho:g}, "
            f"gamma={self.gamma:g}, step={self.step:g}, momentum={self.share:g}"
        )
        return shown + _shown_group(self.process_group)


class _Batch(NamedTuple):
    """The samples of a batch of running sums."""

    index: Tensor  # (N,) of this process
    count: int  # of all processes
    sharing: shared_rows.Sharing | None

    @classmethod
    def of(cls, loss: SogCLR | ISogCLR, z1: Tensor, z2: Tensor, index: Tensor) -> _Batch:
        """Checks the arguments of a call, on all ranks of the loss's process group."""
        if loss.process_group is None:
            return cls(_checked_index(z1, z2, index, loss.n_samples), len(z1), None)
        index, sharing = _agreed(loss, z1, z2, index)
        return cls(index, sum(sharing.counts(0)), sharing)

    def of_all(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The indices and the new state (N, …) of all processes' samples, which each keeps."""
        if self.sharing is None:
            return self.index, state
        return self.sharing.gather(self.index, 0), self.sharing.gather(state, 0)

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the processes."""
        return x if self.sharing is None else self.sharing.total(x)


@breaks_the_graph  # sizes and errors of the other processes are read on the host
def _agreed(
    loss: SogCLR | ISogCLR, z1: Tensor, z2: Tensor, index: Tensor
) -> tuple[Tensor, shared_rows.Sharing]:
    """The index on the device of the rows, once all ranks have a good one."""
    failure, text, sizes = None, "", ()
    try:
        index = _checked_index(z1, z2, index, loss.n_samples, fewest=0)
        text = f"{loss!r}, D={z1.shape[1]}, dtype={z1.dtype}, training={loss.training}"
        sizes = (len(z1),)
    except Exception as error:  # the other processes wait for this one
        failure = error
    group = functional.make_group(loss.process_group, "auto")
    sharing = shared_rows.agree(group, text, sizes, failure, z1)
    if not sum(sharing.counts(0)):
        raise ValueError(f"all ranks together must have at least 1 pair, got {sharing.sizes}")
    return index, sharing


def _shown_group(process_group: Any) -> str:
    """For ``repr``."""
    if process_group is None:
        return ""
    return f", process_group={functional.make_group(process_group, 'auto')!r}"


@one_operator("x", "y", losses=lambda n, settings: (2, n))
def log_mean_and_slope(x: Tensor, y: Tensor, tau: Tensor, backend: str) -> Tensor:
    """(2, N) log mean_j exp((s_ij − s_ii)/τ_i) of unit rows, and its derivative in τ_i (N,).

    The derivative is a constant.
    """
    places = torch.arange(len(x), device=x.device)
    return _log_mean_and_slope(x, y, tau, places, len(x), backend=backend)


@breaks_the_graph
def _log_mean_over_ranks(x: Tensor, y: Tensor, tau: Tensor, loss: ISogCLR, batch: _Batch) -> Tensor:
    """As `log_mean_and_slope`, against the rows y of all processes."""
    place = batch.sharing.place(0)
    places = torch.arange(place.start, place.stop, device=x.device)
    options = {"backend": loss.backend, "process_group": loss.process_group}
    return _log_mean_and_slope(x, y, tau, places, batch.count, **options)


def _log_mean_and_slope(
    x: Tensor, y: Tensor, tau: Tensor, places: Tensor, count: int, **options: Any
) -> Tensor:
    """(2, N) of rows with these places among ``count`` rows."""

    def log_mean(x: Tensor, y: Tensor, tau: Tensor) -> Tensor:
        losses = loss_against_rows(
            x,
            y,
            (x * y).sum(1),
            LOG_SUM,
            similarity="dot",
            temperature=tau,
            one_each=True,
            ids=places,
            negative_ids=places,
            **options,
        )
        return losses - math.log(count - 1)

    with torch.enable_grad():
        leaf = tau.detach().requires_grad_()
        (slope,) = torch.autograd.grad(log_mean(x.detach(), y.detach(), leaf).sum(), leaf)
    return torch.stack([log_mean(x, y, tau), slope])


def _running(log_u: Tensor, log_mean: Tensor, gamma: float) -> Tensor:
    """log((1 − γ)u + γ·mean), or log mean where u is 0: its sample has not been visited."""
    log_u = log_u.to(log_mean.dtype)
    mixed = log_mean + math.log(gamma)
    if gamma < 1:
        mixed = torch.logaddexp(log_u + math.log1p(-gamma), mixed)
    return torch.where(log_u == -math.inf, log_mean, mixed)


# --- what all of them share -----------------------------------------------------------------------


def _of_views(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    reduction: str,
    losses: Callable[[], Tensor],
    anchors: int = 2,
) -> Tensor:
    """Checks the arguments and reduces ``losses()``, of ``anchors`` anchors for each pair."""
    functional.check_embeddings(z1, z2)
    functional.one_of("reduction", reduction, functional.REDUCTIONS)
    functional.check_temperature(temperature, LOG_SUM)
    with without_autocast(z1.device):
        if len(z1) == 1:
            tensors = (z1, z2, *((temperature,) if isinstance(temperature, Tensor) else ()))
            return _reduced(zero_with_graph(*tensors).expand(anchors), reduction)
        return _reduced(losses(), reduction)


def _of_rows(
    z: Tensor,
    ids: Tensor,
    reduction: str,
    losses: Callable[[Tensor, Groups, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Checks the arguments and reduces ``losses(rows, groups, ids)``.

    They are row losses (n,), and the weight of every row in a mean.
    """
    functional.check_rows("z", z, fewest=1)
    ids = functional.checked_ids("ids", ids, z)
    functional.one_of("reduction", reduction, functional.REDUCTIONS)
    with without_autocast(z.device):
        if len(z) == 1:
            return _reduced(zero_with_graph(z).expand(1), reduction)
        of_rows, weights = losses(unit_rows(z), Groups.among(ids), ids)
        if reduction == "mean":
            return of_rows.sum() / weights.sum().clamp(min=1)
        return _reduced(of_rows, reduction)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    return losses if reduction == "none" else getattr(losses, reduction)()


def _positives(z1: Tensor, z2: Tensor) -> Tensor:
    """(N,) s⁺."""
    return (unit_rows(z1) * unit_rows(z2)).sum(1)


def _log_sums(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    backend: str,
    negatives: str = "two_view",
) -> Tensor:
    """(anchors,) log Σ_j exp(Δ_ij/τ)."""
    return alpha_cl_loss(
        z1,
        z2,
        LOG_SUM,
        temperature=temperature,
        negatives=negatives,
        reduction="none",
        backend=backend,
    )


def _tau(temperature: float | Tensor, like: Tensor) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        return temperature
    return temperature.reshape(()).to(like.device, like.dtype)


def _log1p_exp(x: Tensor) -> Tensor:
    """log(1 + exp(x)), right to the last digits at both ends; torch's turns linear at 20."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _log(x: Tensor) -> Tensor:
    """log x, which at 0 is −inf with gradient 0."""
    return torch.where(x == 0, -math.inf, torch.where(x == 0, 1.0, x).log())


def _only(block: Block, logits: Tensor) -> Tensor:
    """Logits of the positives, −inf at other pairs."""
    return logits.masked_fill(block.excluded, -math.inf)


# --- checks ---------------------------------------------------------------------------------------


def _between(
    name: str,
    value: Any,
    low: float,
    high: float,
    open_below: bool = False,
    open_above: bool = False,
) -> None:
    """Raises unless the value is a number of the interval."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    inside = (low < value if open_below else low <= value) and (
        value < high if open_above else value <= high
    )
    if not inside:
        interval = f"{'(' if open_below else '['}{low:g}, {high:g}{')' if open_above else ']'}"
        raise ValueError(f"{name} must be in {interval}, got {value}")


def _positive(name: str, value: Any) -> None:
    _between(name, value, 0, math.inf, open_below=True, open_above=True)


def _count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _checked_index(
    z1: Tensor, z2: Tensor, index: Tensor, n_samples: int, fewest: int = 1
) -> Tensor:
    """The index on the device of the rows, for which the host does not wait."""
    functional.check_embeddings(z1, z2, fewest)
    index = functional.checked_ids("index", index, z1)
    if index.device.type == "cpu" and not as_operator(index) and len(index):
        low, high = index.aminmax()
        if not 0 <= low <= high < n_samples:
            raise ValueError(f"index must be in [0, {n_samples}), got {int(low)} to {int(high)}")
        samples, times = index.unique(return_counts=True)
        if len(samples) < len(index):  # which of its rows would its state be from?
            twice = int(samples[times > 1][0])
            raise ValueError(f"index must hold every sample once at most, got {twice} again")
    return index.long()
