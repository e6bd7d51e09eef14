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
    return _both_directions(F.linear_cross_entropy, tau)


def flex_attention(negatives: str, tau: float) -> Loss:
    """The log-sum-exp of torch's compiled FlexAttention, of a value nobody reads, less the positives; in both directions."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    fused = torch.compile(flex_attention, dynamic=False)

    def log_sum_exp(a: Tensor, b: Tensor, nothing: Tensor) -> Tensor:
        return fused(a[None, None], b[None, None], nothing, scale=1 / tau, return_aux=AuxRequest(lse=True))[1].lse

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        a, b = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        nothing = a.new_zeros((1, 1, a.shape[0], 16))  # the narrowest value that it takes
        positive = (a.float() * b.float()).sum(1) / tau
        return ((log_sum_exp(a, b, nothing) + log_sum_exp(b, a, nothing)) / 2 - positive).mean()

    return loss


def inf_cl(negatives: str, tau: float) -> Loss:
    """The package inf-cl, in both directions; it multiplies as tf32 whatever the input."""
    from inf_cl import cal_flash_loss

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        a, b = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        both = [cal_flash_loss(x, y, scale=1 / tau, head_dim=min(256, a.shape[1])).mean() for x, y in ((a, b), (b, a))]
        return (both[0] + both[1]) / 2

    return loss


def cut_cross_entropy(negatives: str, tau: float) -> Loss:
    """The package cut-cross-entropy with its lossy gradient filter off, in both directions."""
    from cut_cross_entropy import linear_cross_entropy

    return _both_directions(lambda a, b, labels: linear_cross_entropy(a, b, labels, filter_eps=None), tau)


def liger(negatives: str, tau: float) -> Loss:
    """The package liger-kernel's chunked linear cross-entropy, in both directions."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return _both_directions(liger_fused_linear_cross_entropy, tau)


def _both_directions(linear_cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor], tau: float) -> Loss:
    """InfoNCE as a linear cross-entropy: one tower's rows are the other's classes."""

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        a, b = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        labels = torch.arange(a.shape[0], device=a.device)
        return (linear_cross_entropy(a / tau, b, labels) + linear_cross_entropy(b / tau, a, labels)) / 2

    return loss


#: Losses of other packages, all of them cross_view InfoNCE.
RIVALS = {
    "inf_cl": inf_cl, "cut_cross_entropy": cut_cross_entropy, "liger": liger, "flex_attention": flex_attention,
    "open_clip": open_clip, "info_nce": info_nce, "linear_cross_entropy": linear_cross_entropy,
}  # fmt: skip


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
    """``eager``, ``compiled`` (eager through torch.compile) or a rival, InfoNCE only, else a backend of this package.

    Raises:
        ValueError: a contestant that does not compute this objective in this mode.
    """
    if name in RIVALS:
        if objective != "infonce" or negatives != "cross_view":
            raise ValueError(f"{name} must be asked for infonce in cross_view, got {objective}, {negatives}")
        return RIVALS[name](negatives, tau)
    if name in ("eager", "compiled"):
        if objective != "infonce" or negatives == "one_view":
            raise ValueError(f"{name} must be asked for infonce in two_view or cross_view, got {objective}, {negatives}")
        function = eager_infonce if name == "eager" else torch.compile(eager_infonce, dynamic=False)
        return lambda z1, z2: function(z1, z2, negatives, tau)
    return lambda z1, z2: alpha_cl_loss(z1, z2, objective, temperature=tau, negatives=negatives, backend=name)
