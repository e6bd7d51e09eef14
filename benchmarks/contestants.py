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


def make(name: str, objective: str, negatives: str, tau: float) -> Loss:
    """``eager`` (InfoNCE only, two_view or cross_view), else a backend of this package.

    Raises:
        ValueError: a contestant that does not compute this objective in this mode.
    """
    if name == "eager":
        if objective != "infonce" or negatives == "one_view":
            raise ValueError(f"eager must be asked for infonce in two_view or cross_view, got {objective}, {negatives}")
        return lambda z1, z2: eager_infonce(z1, z2, negatives, tau)
    return lambda z1, z2: alpha_cl_loss(z1, z2, objective, temperature=tau, negatives=negatives, backend=name)
