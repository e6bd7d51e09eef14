"""The losses that are timed against each other, all as (z1, z2) → scalar with the same value."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from alphacl_fast.functional import alpha_cl_loss

Loss = Callable[[Tensor, Tensor], Tensor]


def eager_infonce(z1: Tensor, z2: Tensor, negatives: str, tau: float) -> Tensor:
    """What people write: cross-entropy on the (masked) similarity matrix."""
    n = z1.shape[0]
    if negatives == "cross_view":
        logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).t() / tau
        labels = torch.arange(n, device=z1.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
    f = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (f @ f.t() / tau).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.arange(2 * n, device=z1.device).roll(n))


def open_clip(negatives: str, tau: float) -> Loss:
    """ClipLoss of the package open_clip_torch, on rows normalised first, as CLIP does."""
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda z1, z2: loss(F.normalize(z1, dim=1), F.normalize(z2, dim=1), 1 / tau)


def info_nce(negatives: str, tau: float) -> Loss:
    """The package info-nce-pytorch, in both directions."""
    from info_nce import InfoNCE

    loss = InfoNCE(temperature=tau)
    return lambda z1, z2: (loss(z1, z2) + loss(z2, z1)) / 2


def linear_cross_entropy(negatives: str, tau: float) -> Loss:
    """torch's own chunked `F.linear_cross_entropy` (torch >= 2.13), in both directions."""
    fused = F.linear_cross_entropy

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        a, b = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        labels = torch.arange(a.shape[0], device=a.device)
        return (fused(a / tau, b, labels) + fused(b / tau, a, labels)) / 2

    return loss


#: Losses of other packages, all of them cross_view InfoNCE.
RIVALS = {"open_clip": open_clip, "info_nce": info_nce, "linear_cross_entropy": linear_cross_entropy}


def missing(name: str) -> str | None:
    """Why a rival cannot take part here, or None."""
    if name not in RIVALS:
        return None
    try:
        RIVALS[name]("cross_view", 0.5)
    except (ImportError, AttributeError) as error:
        return str(error)
    return None


def make(name: str, objective: str, negatives: str, tau: float) -> Loss:
    """``eager`` or a rival (InfoNCE only), else a backend of this package.

    Raises:
        ValueError: a contestant that does not compute this objective in this mode.
    """
    if name in RIVALS:
        if objective != "infonce" or negatives != "cross_view":
            raise ValueError(f"{name} must be asked for infonce in cross_view, got {objective}, {negatives}")
        return RIVALS[name](negatives, tau)
    if name == "eager":
        if objective != "infonce" or negatives == "one_view":
            raise ValueError(f"eager must be asked for infonce in two_view or cross_view, got {objective}, {negatives}")
        return lambda z1, z2: eager_infonce(z1, z2, negatives, tau)
    return lambda z1, z2: alpha_cl_loss(z1, z2, objective, temperature=tau, negatives=negatives, backend=name)
