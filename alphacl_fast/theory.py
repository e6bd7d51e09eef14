"""The max player: energy, contrastive covariance, and gradient ascent on the theorems' networks.

For fixed α the max player maximises the energy E_α = Σ_i Σ_{j≠i} α_ij (d²_ij − d²_i), d² = ½‖·‖².
The energy equals ½·tr C_α[f(x)] with the contrastive covariance
C_α[x] = Σ_i Σ_{j≠i} α_ij [(x_i − x_j)(x_i − x_j)ᵀ − (x_i − x_i′)(x_i − x_i′)ᵀ]. Then
(arXiv:2201.12680)

* every φ/ψ loss has the gradient of −E_α with α held fixed (Theorem 1);
* a deep linear network with norm-bounded weights does PCA: its local maxima all have rank 1 and lie
  along the top eigenvector of C_α[x];
* with ReLU and norm-bounded filters, maxima may have higher rank.

Let X and X′ hold the rows x_i and x_i′, and let r, c be the row and column sums of A = (α_ij). Then
C_α = Xᵀdiag(r + c)X − Xᵀ(A + Aᵀ)X − (X − X′)ᵀdiag(r)(X − X′), and a gradient sweep computes
(A + Aᵀ)X in O(n·D) memory.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import check_embeddings, of_one_dtype
from .objectives import Objective
from .pair_weights import Importances

NORMS = ("frobenius", "filter")


class _Parts(NamedTuple):
    x: Tensor  # (N, D) centred
    both: Tensor  # (N,) r + c
    product: Tensor  # (N, D) (A + Aᵀ)·x
    row_sums: Tensor  # (N,) r
    apart: Tensor  # (N, D) x − x′


Alpha = Tensor | str | Objective | Importances


def _parts(x1: Tensor, x2: Tensor, alpha: Alpha, settings: dict[str, Any]) -> _Parts:
    x1, x2 = of_one_dtype(x1, x2)
    check_embeddings(x1, x2, fewest=2)
    if isinstance(alpha, (str, Objective)):
        solved = Importances(x1, x2, alpha, negatives="one_view", **settings)
        product, row_sums, both = solved.both_ways_on_own_rows()
        rows, others = solved.rows.chunk(2)
        mean = rows.mean(0)
        product = torch.addr(product, both, mean, alpha=-1)
        return _Parts(rows - mean, both, product, row_sums, rows - others)
    if settings:
        raise TypeError(
            f"{', '.join(settings)} must come with an objective, got {type(alpha).__name__}"
        )
    x = x1 - x1.mean(0)
    if isinstance(alpha, Importances):
        if alpha.anchors != len(x):
            raise ValueError(
                f"alpha must be of {len(x)} anchors, one for each row of x1, got {alpha.anchors}"
            )
        product, row_sums, col_sums = alpha.both_ways(x)
        return _Parts(x, row_sums + col_sums, product, row_sums, x1 - x2)
    if not isinstance(alpha, Tensor):
        got = type(alpha).__name__
        raise TypeError(f"alpha must be a tensor, an objective or Importances, got {got}")
    if alpha.shape != (len(x), len(x)):
        raise ValueError(f"alpha must have shape {(len(x), len(x))}, got {tuple(alpha.shape)}")
    a, row_sums, both = _dense(alpha.to(x))
    return _Parts(x, both, a @ x + a.t() @ x, row_sums, x1 - x2)


def _dense(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Clear the diagonal of α (N, N); (α, row sums, row plus column sums)."""
    a = alpha.clone().fill_diagonal_(0.0)
    row_sums = a.sum(1)
    return a, row_sums, row_sums + a.sum(0)


def energy(x1: Tensor, x2: Tensor, alpha: Alpha, **settings: Any) -> Tensor:
    """Compute E_α = Σ_i Σ_{j≠i} α_ij (½‖x_i − x_j‖² − ½‖x_i − x_i′‖²) = ½·tr C_α.

    The energy is differentiable in x for a dense α.

    Args:
        x1: (N, D) first view of the data, or of a network's outputs; float32 or float64.
        x2: (N, D) second view, same dtype.
        alpha: the pair weights. A tensor (N, N), whose diagonal is ignored; or an objective (name
            or instance), whose α for these rows is computed by the fused sweeps (with cosine
            similarity for unit rows, which then replace x); or the `Importances` of other rows,
            such as the embeddings of x.
        **settings: settings of the objective, as for `alphacl_fast.alpha`; negatives are always
            "one_view".

    Returns:
        (), dtype of x1 (at least float32 for an objective).

    Raises:
        TypeError: ``alpha`` has another type, or settings are given without an objective.
        ValueError: shapes do not match.

    Source: arXiv:2201.12680, equation of the max player.
    """
    p = _parts(x1, x2, alpha, settings)
    spread = (p.both * p.x.square().sum(1)).sum() - (p.x * p.product).sum()
    return (spread - (p.row_sums * p.apart.square().sum(1)).sum()) / 2


def contrastive_covariance(x1: Tensor, x2: Tensor, alpha: Alpha, **settings: Any) -> Tensor:
    """Compute C_α = Σ_i Σ_{j≠i} α_ij [(x_i − x_j)(x_i − x_j)ᵀ − (x_i − x_i′)(x_i − x_i′)ᵀ].

    Memory is O(N·D + D²), besides a dense α's N².

    Args:
        x1: (N, D) first view of the data.
        x2: (N, D) second view.
        alpha: the pair weights, as for `energy`.
        **settings: settings of the objective, as for `energy`.

    Returns:
        (D, D), symmetric, dtype of x1 (at least float32 for an objective).

    Raises:
        TypeError: ``alpha`` has another type, or settings are given without an objective.
        ValueError: shapes do not match.

    Source: arXiv:2201.12680, definition of the contrastive covariance.
    """
    p = _parts(x1, x2, alpha, settings)
    c = (p.x.t() * p.both) @ p.x - p.x.t() @ p.product - (p.apart.t() * p.row_sums) @ p.apart
    return (c + c.t()) / 2


# --- networks on a fixed covariance ---------------------------------------------------------------


def normalize(weight: Tensor, norm: str) -> Tensor:
    """Scale weights to a unit norm; zero stays zero.

    Args:
        weight: (…, out, in).
        norm: "frobenius" (‖W‖_F = 1), else every filter (row) gets norm 1/√out.

    Returns:
        Shape and dtype of ``weight``.
    """
    if norm == "frobenius":
        return F.normalize(weight.flatten(-2), dim=-1, eps=1e-300).view_as(weight)
    return F.normalize(weight, dim=-1, eps=1e-300) / math.sqrt(weight.shape[-2])


def random_weights(widths: Sequence[int], norm: str, seeds: Sequence[int]) -> list[Tensor]:
    """Draw normalised Gaussian weights for several networks at once.

    Args:
        widths: number of units of every layer, the input first.
        norm: as for `normalize`.
        seeds: one per network.

    Returns:
        For each layer l, float64 (seeds, widths[l + 1], widths[l]).
    """
    weights = []
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
        generators = (torch.Generator().manual_seed(1000 * seed + layer) for seed in seeds)
        made = {"dtype": torch.float64, "device": "cpu"}
        draws = [torch.randn(fan_out, fan_in, generator=g, **made) for g in generators]
        weights.append(normalize(torch.stack(draws), norm))
    return weights


class Ascent(NamedTuple):
    """The result of projected gradient ascent."""

    weights: list[Tensor]  #: final weights (seeds, out, in) of every layer
    energies: Tensor  #: (steps + 1, seeds), E before every step and at the end


Energy = Callable[[list[Tensor]], Tensor]


def ascend(
    value: Energy, weights: Sequence[Tensor], norm: str, *, rate: float, steps: int
) -> Ascent:
    """Run projected gradient ascent on several networks at once.

    Every layer is normalised after each step.

    Args:
        value: maps all layers' weights (seeds, out, in) to E (seeds,), each from its own seed's.
        weights: initial weights (seeds, out, in) of every layer.
        norm: "frobenius" (‖W_l‖_F = 1) or "filter" (every row of W_l has norm 1/√rows).
        rate: step size η.
        steps: number of steps.

    Returns:
        Final weights and the course of E.

    Raises:
        ValueError: the norm is unknown, or E becomes infinite or NaN.

    Source: arXiv:2201.12680, the setting of its theorems on deep linear and two-layer ReLU
    networks.
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
        weights = [
            normalize(w.detach() + rate * g, norm) for w, g in zip(leaves, gradients, strict=True)
        ]
    with torch.no_grad():
        energies.append(value(weights))
    if not energies[-1].isfinite().all():
        raise ValueError(f"rate must be small enough for E to stay finite, got {rate}")
    return Ascent(weights, torch.stack(energies))


def linear_energy(covariance: Tensor) -> Energy:
    """Build the energy of deep linear networks: E = ½·tr(W C Wᵀ), W = W_L…W_1.

    Args:
        covariance: C_α[x] (D, D).

    Returns:
        A function of all layers' weights (seeds, out, in) that returns E (seeds,).
    """

    def value(weights: list[Tensor]) -> Tensor:
        w = reduce(lambda product, layer: layer @ product, weights)
        return (w @ covariance * w).sum((-2, -1)) / 2

    return value


def relu_energy(x1: Tensor, x2: Tensor, alpha: Tensor) -> Energy:
    """Build the energy E_α of networks with a ReLU between their layers.

    Args:
        x1: (N, D) first view of the data.
        x2: (N, D) second view.
        alpha: (N, N) pair weights; the diagonal is ignored.

    Returns:
        A function of all layers' weights (seeds, out, in) that returns E (seeds,).
    """
    a, row_sums, both = _dense(alpha)
    sym = a + a.t()

    def value(weights: list[Tensor]) -> Tensor:
        first, *others = weights
        f, g = (first @ x.t().expand(len(first), -1, -1) for x in (x1, x2))  # (seeds, out, N)
        for layer in others:
            f, g = layer @ torch.relu(f), layer @ torch.relu(g)
        spread = (f.square().sum(1) * both).sum(1) - (f * (f @ sym)).sum((1, 2))
        return (spread - ((f - g).square().sum(1) * row_sums).sum(1)) / 2

    return value


def singular_ratio(weight: Tensor) -> Tensor:
    """Compute σ₂/σ₁ of weights (…, out, in): 0 for rank 1, NaN for a zero matrix."""
    s = torch.linalg.svdvals(weight)
    return s[..., 1] / s[..., 0] if s.shape[-1] > 1 else torch.zeros_like(s[..., 0])
