"""Losses of chosen pairs, a block of rows at a time.

The sweeps know an anchor's positives and negatives by ids. Miners and memories choose single pairs,
masks weight them, and a user's distance is no inner product: here the similarities of a block of
anchors with all other rows exist as a matrix, next to matrices of how often each pair counts. A
formula takes similarities t (b, m) that grow with closeness, and the counts of the positive and
negative pairs (b, m); an anchor without positives, or without negatives, contributes 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# --- which pairs ----------------------------------------------------------------------------------


class PairsByLabel(NamedTuple):
    """Rows with equal labels are positives of each other, all others negatives."""

    labels: Tensor  # (n,) of the anchors
    other_labels: Tensor  # (m,)
    same: bool  # whether the other rows are the anchors, so that nothing pairs with itself

    def block(self, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(b, m) counts of the positive and of the negative pairs of some anchors."""
        equal = self.labels[rows, None] == self.other_labels
        negatives = ~equal
        if self.same:
            equal.diagonal(rows.start).fill_(False)
        return equal.to(dtype), negatives.to(dtype)

    def positives(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Which anchor of the block, and which other row, for each positive pair."""
        return torch.where(self.block(rows, torch.bool)[0])

    def in_order(self, values: Tensor) -> Tensor:
        """Reorders values of all positive pairs: they come block by block, and leave as `indices`
        lists the pairs.
        """
        return values

    def indices(self) -> tuple[Tensor, Tensor]:
        """Anchors and other rows of all positive pairs."""
        return self.positives(slice(0, len(self.labels)))


class ListedPairs:
    """Pairs that are listed, as often as they are listed.

    Args:
        positives: anchors and other rows of the positive pairs, two tensors of indices.
        negatives: likewise.
        columns: m, the number of other rows.
    """

    def __init__(
        self, positives: tuple[Tensor, Tensor], negatives: tuple[Tensor, Tensor], columns: int
    ) -> None:
        self.given, self.columns = positives, columns
        self.order = positives[0].argsort(stable=True)
        self.sorted_positives = tuple(x[self.order] for x in positives)
        order = negatives[0].argsort(stable=True)
        self.sorted_negatives = tuple(x[order] for x in negatives)

    def block(self, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(b, m) counts of the positive and of the negative pairs of some anchors."""
        return tuple(
            self._counts(self._part(pairs, rows), rows, dtype)
            for pairs in (self.sorted_positives, self.sorted_negatives)
        )

    def positives(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Which anchor of the block, and which other row, for each positive pair."""
        return self._part(self.sorted_positives, rows)

    def in_order(self, values: Tensor) -> Tensor:
        """Reorders values of all positive pairs: they come block by block, and leave as `indices`
        lists the pairs.
        """
        return torch.empty_like(values).index_copy(0, self.order, values)

    def indices(self) -> tuple[Tensor, Tensor]:
        """Anchors and other rows of all positive pairs, as they were given."""
        return self.given

    @staticmethod
    def _part(pairs: tuple[Tensor, Tensor], rows: slice) -> tuple[Tensor, Tensor]:
        anchors, others = pairs
        ends = torch.tensor([rows.start, rows.stop], device=anchors.device)
        low, high = torch.searchsorted(anchors, ends.to(anchors.dtype)).tolist()
        return anchors[low:high] - rows.start, others[low:high]

    def _counts(
        self, pairs: tuple[Tensor, Tensor], rows: slice, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        anchors, others = pairs
        counts = torch.zeros(
            rows.stop - rows.start, self.columns, dtype=dtype, device=anchors.device
        )
        ones = torch.ones_like(anchors, dtype=dtype)
        return counts.index_put_((anchors, others), ones, accumulate=True)


# --- formulas with a value for each positive pair -------------------------------------------------


def ntxent(t: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """log(1 + Σ_n exp((t_in − t_ip)/τ)) of the positive pairs (b, m), 0 elsewhere."""
    t = t / temperature
    return _pair_losses(t, t, positives, negatives)


def tuplet_margin(
    t: Tensor, positives: Tensor, negatives: Tensor, margin: float, scale: float
) -> Tensor:
    """log(1 + Σ_n exp(σ(t_in − cos(θ_ip − m)))) of the positive pairs (b, m), 0 elsewhere.

    The margin is in radians. Where rows coincide the angle has no derivative: 0 is taken.
    """
    edge = 1 - torch.finfo(t.dtype).eps
    closer = (t.clamp(-edge, edge).acos() - margin).cos()
    return _pair_losses(closer * scale, t * scale, positives, negatives)


def _pair_losses(own: Tensor, t: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    log_sums = _logsumexp(t + negatives.log(), negatives > 0)
    chosen = positives > 0
    ratio = torch.where(chosen, log_sums[:, None] - own, -torch.inf)
    return torch.where(chosen, _log1p_exp(ratio), 0.0)


# --- formulas with a value for each anchor --------------------------------------------------------


def supcon_rows(logits: Tensor, positives: Tensor, others: Tensor) -> Tensor:
    """(b,) mean over the positives of log Σ_a exp(logit_ia) − logit_ip.

    Args:
        logits: (b, m) t/τ.
        positives: (b, m) weights ≥ 0 of the mean.
        others: (b, m) bool, the pairs a of the sum.
    """
    total = positives.sum(1)
    mean = (positives * logits).sum(1) / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, _logsumexp(logits, others) - mean, 0.0)


def multi_similarity(
    t: Tensor, positives: Tensor, negatives: Tensor, alpha: float, beta: float, base: float
) -> Tensor:
    """(b,) (1/α)·log(1 + Σ_p exp(α(λ − t_ip))) + (1/β)·log(1 + Σ_n exp(β(t_in − λ)))."""
    pull = _log1p_exp(_logsumexp(-alpha * t, positives > 0) + alpha * base)
    push = _log1p_exp(_logsumexp(beta * t, negatives > 0) - beta * base)
    return pull / alpha + push / beta


def circle(t: Tensor, positives: Tensor, negatives: Tensor, margin: float, gamma: float) -> Tensor:
    """(b,) log(1 + Σ_n exp(γ·a_in·(t_in − m))·Σ_p exp(−γ·a_ip·(t_ip − 1 + m))).

    a_in = max(t_in + m, 0) and a_ip = max(1 + m − t_ip, 0) are constants of the gradient.
    """
    near, far = positives > 0, negatives > 0
    held = t.detach()
    pull = _logsumexp((1 + margin - held).relu() * (1 - margin - t) * gamma, near)
    push = _logsumexp((held + margin).relu() * (t - margin) * gamma, far)
    usable = near.any(1) & far.any(1)
    total = torch.where(usable, pull, -torch.inf) + torch.where(usable, push, -torch.inf)
    return _log1p_exp(total)


def _logsumexp(x: Tensor, kept: Tensor) -> Tensor:
    """(b,) over the kept entries; −inf, with gradient 0, where there are none."""
    # a finite number: anomaly detection would find NaN in the gradient of a row of −inf alone
    x = x.masked_fill(~kept, torch.finfo(x.dtype).min)
    return torch.where(kept.any(1), x.logsumexp(1), -torch.inf)


def _log1p_exp(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))
