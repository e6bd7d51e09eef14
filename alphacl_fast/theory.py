"""The max player: energy, contrastive covariance, and gradient ascent of the networks that the theorems are about.

For fixed α the max player maximises the energy E_α = Σ_i Σ_{j≠i} α_ij (d²_ij − d²_i), d² = ½‖·‖², which is ½·tr C_α[f(x)]
with the contrastive covariance C_α[x] = Σ_i Σ_{j≠i} α_ij [(x_i − x_j)(x_i − x_j)ᵀ − (x_i − x_i′)(x_i − x_i′)ᵀ]. Then
(arXiv:2201.12680)

* the gradient of every φ/ψ loss is that of −E_α with α held fixed (Theorem 1);
* a deep linear network with weights of bounded norm has only rank-1 local maxima, along the top eigenvector of C_α[x]: PCA;
* with ReLU and bounded filters, maxima may have higher rank.

With r, c the row and column sums of A = (α_ij) over the rows X of x and X′ of x′,
C_α = Xᵀdiag(r + c)X − Xᵀ(A + Aᵀ)X − (X − X′)ᵀdiag(r)(X − X′): (A + Aᵀ)X is what a gradient sweep computes, in O(n·D) memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .functional import check_embeddings
from .objectives import Objective
from .pair_weights import Importances

NORMS = ("frobenius", "filter")


class _Parts(NamedTuple):
    x: Tensor  # (N, D) centred
    both: Tensor  # (N,) r + c
    product: Tensor  # (N, D) (A + Aᵀ)·x
    row_sums: Tensor  # (N,) r
    apart: Tensor  # (N, D) x − x′


def _parts(x1: Tensor, x2: Tensor, alpha: Tensor | str | Objective | Importances, settings: dict[str, Any]) -> _Parts:
    check_embeddings(x1, x2)
    if isinstance(alpha, (str, Objective)):
        solved = Importances(x1, x2, alpha, negatives="one_view", **settings)
        product, row_sums, both = solved.both_ways_on_own_rows()
        rows, others = solved.rows.chunk(2)
        mean = rows.mean(0)
        return _Parts(rows - mean, both, torch.addr(product, both, mean, alpha=-1), row_sums, rows - others)
    if settings:
        raise TypeError(f"{', '.join(settings)} must come with an objective, got {type(alpha).__name__}")
    x = x1 - x1.mean(0)
    if isinstance(alpha, Importances):
        if alpha.anchors != len(x):
            raise ValueError(f"alpha must be of {len(x)} anchors, one for each row of x1, got {alpha.anchors}")
        product, row_sums, col_sums = alpha.both_ways(x)
        return _Parts(x, row_sums + col_sums, product, row_sums, x1 - x2)
    if not isinstance(alpha, Tensor):
        raise TypeError(f"alpha must be a tensor, an objective or Importances, got {type(alpha).__name__}")
    if alpha.shape != (len(x), len(x)):
        raise ValueError(f"alpha must have shape {(len(x), len(x))}, got {tuple(alpha.shape)}")
    a = alpha.to(x).clone().fill_diagonal_(0.0)
    row_sums = a.sum(1)
    return _Parts(x, row_sums + a.sum(0), a @ x + a.t() @ x, row_sums, x1 - x2)


def energy(x1: Tensor, x2: Tensor, alpha: Tensor | str | Objective | Importances, **settings: Any) -> Tensor:
    """E_α = Σ_i Σ_{j≠i} α_ij (½‖x_i − x_j‖² − ½‖x_i − x_i′‖²) = ½·tr C_α, differentiable in x for a dense α.

    Args:
        x1, x2: (N, D) both views of the data, or of what a network makes of it.
        alpha: (N, N), its diagonal unused; or an objective, whose α of these very rows it is, by the fused sweeps (cosine:
            of unit rows, which then are x); or the `Importances` of other rows, such as embeddings of x.
        **settings: of the objective, as of `alphacl_fast.alpha`; negatives are "one_view".

    Returns:
        (), dtype of x1 (at least float32 for an objective).

    Raises:
        TypeError, ValueError: shapes that do not fit, or settings without an objective.

    Source: arXiv:2201.12680, equation of the max player.
    """
    p = _parts(x1, x2, alpha, settings)
    spread = (p.both * p.x.square().sum(1)).sum() - (p.x * p.product).sum()
    return (spread - (p.row_sums * p.apart.square().sum(1)).sum()) / 2


def contrastive_covariance(
    x1: Tensor, x2: Tensor, alpha: Tensor | str | Objective | Importances, **settings: Any
) -> Tensor:
    """C_α = Σ_i Σ_{j≠i} α_ij [(x_i − x_j)(x_i − x_j)ᵀ − (x_i − x_i′)(x_i − x_i′)ᵀ], (D, D), in O(N·D + D²) memory.

    Arguments and errors as of `energy`; a dense α takes the N² that it has itself.

    Source: arXiv:2201.12680, definition of the contrastive covariance.
    """
    p = _parts(x1, x2, alpha, settings)
    c = (p.x.t() * p.both) @ p.x - p.x.t() @ p.product - (p.apart.t() * p.row_sums) @ p.apart
    return (c + c.t()) / 2


# --- networks on a fixed covariance ------------------------------------------------------------------------------------


def normalize(weight: Tensor, norm: str) -> Tensor:
    """(…, out, in) scaled to ‖W‖_F = 1, or every filter (row) to norm 1/√out; zero stays zero."""
    if norm == "frobenius":
        return torch.nn.functional.normalize(weight.flatten(-2), dim=-1, eps=1e-300).view_as(weight)
    return torch.nn.functional.normalize(weight, dim=-1, eps=1e-300) / math.sqrt(weight.shape[-2])


def random_weights(widths: Sequence[int], norm: str, seeds: Sequence[int]) -> list[Tensor]:
    """float64 (seeds, widths[l + 1], widths[l]) for every layer l, normalised."""
    weights = []
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
        generators = (torch.Generator().manual_seed(1000 * seed + layer) for seed in seeds)
        draws = [torch.randn(fan_out, fan_in, dtype=torch.float64, generator=generator) for generator in generators]
        weights.append(normalize(torch.stack(draws), norm))
    return weights


class Ascent(NamedTuple):
    """Where projected gradient ascent has come: the weights (seeds, out, in), and E before every step and at the end."""

    weights: list[Tensor]  #: (seeds, out, in) of every layer
    energies: Tensor  #: (steps + 1, seeds)


def ascend(
    value: Callable[[list[Tensor]], Tensor], weights: Sequence[Tensor], norm: str, *, rate: float, steps: int
) -> Ascent:
    """Gradient ascent on ``value``, with every layer normalised after each step, of many networks at once.

    Args:
        value: weights (seeds, out, in) of all layers → E (seeds,), each of its own seed's weights.
        norm: "frobenius" (‖W_l‖_F = 1) or "filter" (every row of W_l has norm 1/√rows).
        rate: step size η.

    Raises:
        ValueError: an unknown norm, or an E that stops being finite.

    Source: arXiv:2201.12680, the setting of its theorems on deep linear and two-layer ReLU networks.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")
    weights, energies = [w.detach().clone() for w in weights], []
    for _ in range(steps):
        with torch.enable_grad():
            leaves = [w.requires_grad_() for w in weights]
            e = value(leaves)
            gradients = torch.autograd.grad(e.sum(), leaves)
        energies.append(e.detach())
        weights = [normalize(w.detach() + rate * g, norm) for w, g in zip(leaves, gradients, strict=True)]
    with torch.no_grad():
        energies.append(value(weights))
    if not energies[-1].isfinite().all():
        raise ValueError(f"rate must be small enough for E to stay finite, got {rate}")
    return Ascent(weights, torch.stack(energies))


def linear_energy(covariance: Tensor) -> Callable[[list[Tensor]], Tensor]:
    """E = ½·tr(W C Wᵀ), W = W_L…W_1, of deep linear networks on C_α[x] (D, D)."""

    def value(weights: list[Tensor]) -> Tensor:
        w = weights[0]
        for layer in weights[1:]:
            w = layer @ w
        return (w @ covariance * w).sum((-2, -1)) / 2

    return value


def relu_energy(x1: Tensor, x2: Tensor, alpha: Tensor) -> Callable[[list[Tensor]], Tensor]:
    """E_α of networks with a ReLU between the layers on data x1, x2 (N, D), for a dense α (N, N)."""
    a = alpha.clone().fill_diagonal_(0.0)
    row_sums = a.sum(1)
    both, sym = row_sums + a.sum(0), a + a.t()

    def value(weights: list[Tensor]) -> Tensor:
        f, g = x1.t().expand(len(weights[0]), -1, -1), x2.t().expand(len(weights[0]), -1, -1)  # (seeds, D, N)
        for number, layer in enumerate(weights):
            f, g = layer @ f, layer @ g
            if number + 1 < len(weights):
                f, g = torch.relu(f), torch.relu(g)
        spread = (f.square().sum(1) * both).sum(1) - (f * (f @ sym)).sum((1, 2))
        return (spread - ((f - g).square().sum(1) * row_sums).sum(1)) / 2

    return value


def singular_ratio(weight: Tensor) -> Tensor:
    """σ₂/σ₁ of (…, out, in): 0 for rank 1; NaN for a zero matrix."""
    s = torch.linalg.svdvals(weight)
    return s[..., 1] / s[..., 0] if s.shape[-1] > 1 else torch.zeros_like(s[..., 0])
