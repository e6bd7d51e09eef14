"""Metrics of a batch of positive pairs: alignment, uniformity, in-batch accuracy, effective rank.

All metrics use rows of unit length and O(N·D) memory. `alignment` and `uniformity` are
differentiable; `batch_metrics` is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .autograd import unit_rows
from .backend.blocked import deal, tile_size
from .call import without_autocast
from .functional import alpha_cl_loss, check_embeddings, of_one_dtype
from .objectives import LOG_SUM


def alignment(z1: Tensor, z2: Tensor) -> Tensor:
    """Mean squared distance of positive pairs, mean_i ‖x_i − y_i‖² of unit rows; differentiable.

    It is 2 − 2·(mean cosine): 0 if both views agree, 2 if they are orthogonal, 4 if opposite. An
    all-zero row stays zero, at squared distance 1 from a unit row, and has gradient 0.

    Args:
        z1: (N, D) embeddings of the first view, N ≥ 1, float32, float64, bfloat16 or float16; they
            are normalised here.
        z2: (N, D) embeddings of the second view, with the dtype and device of z1.

    Returns:
        (), float32, or float64 for float64 embeddings. For one pair it is the pair's squared
        distance.

    Raises:
        TypeError, ValueError: bad embeddings; the message names the argument, what was expected and
            what was received.

    Source: Wang and Isola, arXiv:2005.10242, with exponent 2.
    """
    z1, z2 = of_one_dtype(z1, z2)
    check_embeddings(z1, z2, fewest=1)
    with without_autocast(z1.device):
        return (unit_rows(z1) - unit_rows(z2)).square().sum(1).mean()


def uniformity(z1: Tensor, z2: Tensor, *, t: float = 2.0) -> Tensor:
    """log mean_{i≠j} exp(−t‖x_i − x_j‖²) over the pairs of a view, mean of both views.

    Rows are normalised here. The value is 0 if all rows of a view coincide, and it falls as they
    cover the sphere more evenly. It is the log-sum-exp of InfoNCE's row losses with ε = 0,
    negatives of one view and τ = 1/(2t), so it is differentiable and needs O(N·D) memory.

    Args:
        z1: (N, D) embeddings of the first view, N ≥ 1, float32, float64, bfloat16 or float16.
        z2: (N, D) embeddings of the second view, with the dtype and device of z1.
        t: factor of the squared distances, between 1e-12 and 1e12.

    Returns:
        () in nats, float32, or float64 for float64 embeddings. With one pair there are no two rows
        to compare: the value is 0, and so is the gradient.

    Raises:
        TypeError, ValueError: bad embeddings or a bad t; the message names the argument, what was
            expected and what was received.

    Source: Wang and Isola, arXiv:2005.10242.
    """
    z1, z2 = of_one_dtype(z1, z2)
    check_embeddings(z1, z2, fewest=1)
    _check_t(t)
    with without_autocast(z1.device):
        return (_uniformity_of_view(unit_rows(z1), t) + _uniformity_of_view(unit_rows(z2), t)) / 2


def _uniformity_of_view(rows: Tensor, t: float) -> Tensor:
    n = rows.shape[0]
    if n == 1:
        return rows.square().sum() * 0.0
    # t⁺ is the similarity of a row with itself, which is exactly 0: Δ_ij = −½‖x_i − x_j‖².
    log_sums = alpha_cl_loss(
        rows,
        rows.detach(),
        LOG_SUM,
        temperature=1 / (2 * t),
        similarity="euclidean",
        negatives="one_view",
        reduction="none",
    )
    return log_sums.logsumexp(0) - log_sums.new_full((), n * (n - 1)).log()


@dataclass(frozen=True)
class BatchMetrics:
    """Metrics of a batch, made by `batch_metrics`."""

    alignment: float  #: mean ‖x_i − y_i‖²; see `alignment`
    uniformity: float  #: nats; see `uniformity`
    accuracy: dict[int, float]  #: k → share of anchors whose positive is among the k nearest rows
    effective_rank: float  #: between 1 and min(2N, D); 0 if all rows are zero

    def scalars(self) -> dict[str, float]:
        """The numbers by name, as logged during training: accuracy[1] is "accuracy_top1"."""
        return {
            "alignment": self.alignment,
            "uniformity": self.uniformity,
            **{f"accuracy_top{k}": share for k, share in self.accuracy.items()},
            "effective_rank": self.effective_rank,
        }


@torch.no_grad()
def batch_metrics(
    z1: Tensor, z2: Tensor, *, t: float = 2.0, top: Iterable[int] = (1, 5)
) -> BatchMetrics:
    """Alignment, uniformity, in-batch accuracy and effective rank, in O(N·D) memory.

    One pass over tiles of pairs computes them, without gradients, in float32 (float64 for float64
    embeddings). Matrix products have torch's precision setting.

    * **Accuracy**: each row of either view is an anchor, and the rows of the other view are its
      candidates, by cosine. The rank of the positive is 1 + the number of other candidates that are
      at least as similar, where cosines tie within √D units of the dtype's rounding, 2⁻²³ for
      float32. Rows that all coincide thus have accuracy 0. A NaN counts as wrong.
    * **Effective rank**: exp(−Σ p log p) of the singular values of the 2N unit rows, divided by
      their sum. It is 1 if all rows are parallel, and D if all singular values are equal.

    Args:
        z1: (N, D) embeddings of the first view, N ≥ 1, float32, float64, bfloat16 or float16; they
            are normalised here.
        z2: (N, D) embeddings of the second view, with the dtype and device of z1.
        t: factor of the squared distances in the uniformity, between 1e-12 and 1e12.
        top: the numbers k of nearest candidates, positive integers.

    Returns:
        The metrics as Python numbers, which waits for the device. With one pair uniformity is 0
        (there are no two rows to compare) and every accuracy is 1 (there is no other candidate);
        the effective rank is computed from the two rows. If a row has a NaN or an infinity,
        alignment, uniformity and effective rank are NaN.

    Raises:
        TypeError, ValueError: bad embeddings, t or top; the message names the argument, what was
            expected and what was received.

    Source: alignment and uniformity: Wang and Isola, arXiv:2005.10242; effective rank: Roy and
    Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    z1, z2 = of_one_dtype(z1, z2)
    check_embeddings(z1, z2, fewest=1)
    _check_t(t)
    top = _checked_top(top)
    with without_autocast(z1.device):
        x, y = unit_rows(z1), unit_rows(z2)
        ranks, uniform = _walk(x, y, t)
        return BatchMetrics(
            alignment=(x - y).square().sum(1).mean().item(),
            uniformity=uniform,
            accuracy={k: (ranks <= k).sum().item() / ranks.numel() for k in top},
            effective_rank=_effective_rank(torch.cat([x, y])),
        )


def _walk(x: Tensor, y: Tensor, t: float) -> tuple[Tensor, float]:
    """The positives' ranks (2, N), for anchors of x and of y, and the uniformity.

    x and y are unit rows (N, D).
    """
    n, side = len(x), tile_size(len(x), x.device)
    blocks = [slice(start, min(start + side, n)) for start in range(0, n, side)]
    tiles = [(i, j) for k, i in enumerate(blocks) for j in blocks[k:]]
    # By the same products as the candidates' similarities, so that all are rounded alike.
    positive = torch.cat([(x[i] @ y[i].t()).diagonal() for i in blocks])
    below = positive - math.sqrt(x.shape[1]) * torch.finfo(x.dtype).eps
    views = [_Distances(x), _Distances(y)]

    def collect(worker: int, workers: int) -> tuple[Tensor, Tensor]:
        lower = torch.zeros(2, n, dtype=torch.int64, device=x.device)
        log_sums = []
        for i, j in tiles[worker::workers]:
            for rows, columns in [(i, j)] if i is j else [(i, j), (j, i)]:
                similarity = x[rows] @ y[columns].t()
                lower[0, rows] += (similarity < below[rows, None]).sum(1)
                lower[1, columns] += (similarity < below[None, columns]).sum(0)
            log_sums.append(torch.stack([view.log_sum(i, j, t) for view in views]))
        return lower, torch.stack(log_sums)

    lowers, log_sums = zip(*deal(len(tiles), x.device, collect), strict=True)
    ranks = n - torch.stack(lowers).sum(0)
    if n == 1:
        return ranks, 0.0 * abs(positive.item())
    of_views = torch.cat(log_sums).logsumexp(0) - math.log(n * (n - 1))
    return ranks, of_views.mean().item()


class _Distances:
    """Squared distances among rows (N, D), which are centred first: close rows lose no digits."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows - rows.mean(0)
        self.squares = self.rows.square().sum(1)

    def log_sum(self, i: slice, j: slice, t: float) -> Tensor:
        """() log Σ exp(−t·d²) over the ordered pairs of distinct rows between two blocks."""
        log = (self.rows[i] @ self.rows[j].t()).mul_(2)
        log.sub_(self.squares[i, None]).sub_(self.squares[None, j]).clamp_(max=0).mul_(t)
        if i is j:
            log.diagonal().fill_(-math.inf)
            return log.flatten().logsumexp(0)
        return log.flatten().logsumexp(0) + math.log(2)


def _effective_rank(rows: Tensor) -> float:
    if not rows.isfinite().all():
        return math.nan
    # The triangular factor has the same singular values and is small.
    values = torch.linalg.svdvals(torch.linalg.qr(rows, mode="r").R)
    total = values.sum()
    if total == 0:
        return 0.0
    share = values / total
    return torch.xlogy(share, share).sum().neg().exp().item()


def _check_t(t: Any) -> None:
    if isinstance(t, bool) or not isinstance(t, Real) or not 1e-12 <= t <= 1e12:
        raise ValueError(f"t must be a number between 1e-12 and 1e12, got {t!r}")


def _checked_top(top: Any) -> tuple[int, ...]:
    try:
        listed = list(top)
    except TypeError:
        raise TypeError(f"top must be a sequence of positive integers, got {top!r}") from None
    for k in listed:
        if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
            raise ValueError(f"top must be positive integers, got {k!r} in {listed}")
    return tuple(int(k) for k in listed)
