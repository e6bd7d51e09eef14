"""The losses that are timed against each other, all as (z1, z2) → scalar with the same value."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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


# --- rivals of two views ----------------------------------------------------------------------------------------------


def lightly(negatives: str, tau: float) -> Loss:
    """NTXentLoss of the package lightly."""
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=tau)


def metric_learning(negatives: str, tau: float) -> Loss:
    """SupConLoss of the package pytorch-metric-learning: with two rows of each label it is InfoNCE."""
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(temperature=tau)
    return lambda z1, z2: loss(torch.cat([z1, z2]), torch.arange(z1.shape[0], device=z1.device).repeat(2))


def keops(negatives: str, tau: float) -> Loss:
    """A log-sum-exp of symbolic similarities by the package pykeops, which compiles it at the first call."""
    with contextlib.redirect_stdout(io.StringIO()):
        from pykeops.torch import LazyTensor

    def log_sum_exp(a: Tensor, b: Tensor, both: bool) -> tuple[Tensor, ...]:
        s = (LazyTensor(a[:, None]) * LazyTensor(b[None])).sum(-1) / tau
        if not both:  # a row does not meet itself; row numbers in the rows' dtype are exact far beyond any n here
            at = torch.arange(a.shape[0], device=a.device, dtype=a.dtype)[:, None]
            apart = (LazyTensor(at[:, None]) - LazyTensor(at[None])).square() - 0.5
            s = apart.ifelse(s, apart * 1e9)
            return (s.logsumexp(1)[:, 0],)
        return s.logsumexp(1)[:, 0], s.logsumexp(0)[:, 0]

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        a, b = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        positive = (a * b).sum(1) / tau
        if negatives == "cross_view":
            rows, columns = log_sum_exp(a, b, True)
            return ((rows + columns) / 2 - positive).mean()
        f = torch.cat([a, b])
        return (log_sum_exp(f, f, False)[0] - positive.repeat(2)).mean()

    return loss


# --- rivals of two towers ---------------------------------------------------------------------------------------------


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


def _sentence_transformers(name: str, tau: float, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers.sentence_transformer import losses

    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    return getattr(losses, name)(torch.nn.Sequential(torch.nn.Identity()), scale=1 / tau, **both, **options)


def sentence_transformers(negatives: str, tau: float) -> Loss:
    """MultipleNegativesRankingLoss of the package sentence-transformers (6.0 or later), in both directions."""
    loss = _sentence_transformers("MultipleNegativesRankingLoss", tau)
    return lambda z1, z2: loss.compute_loss_from_embeddings([z1, z2], None)


def sentence_transformers_cached(negatives: str, tau: float) -> Loss:
    """CachedMultipleNegativesRankingLoss: 128 rows of scores at a time, gradients kept, as in training with it."""
    loss = _sentence_transformers("CachedMultipleNegativesRankingLoss", tau, mini_batch_size=128)

    class Cached(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z1, z2):
            leaves = [z.detach().requires_grad_() for z in (z1, z2)]
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                value = loss.calculate_loss([[z] for z in leaves], with_backward=any(ctx.needs_input_grad))
            ctx.gradients = [z.grad for z in leaves]
            return value.detach()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            return tuple(grad * g for g in ctx.gradients)

    return Cached.apply


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


#: Losses of other packages, all of them InfoNCE, and the modes that each computes.
RIVALS: dict[str, tuple[Callable[[str, float], Loss], tuple[str, ...]]] = {
    "lightly": (lightly, ("two_view",)),
    "pytorch_metric_learning": (metric_learning, ("two_view",)),
    "keops": (keops, ("two_view", "cross_view")),
    "inf_cl": (inf_cl, ("cross_view",)),
    "cut_cross_entropy": (cut_cross_entropy, ("cross_view",)),
    "liger": (liger, ("cross_view",)),
    "flex_attention": (flex_attention, ("cross_view",)),
    "open_clip": (open_clip, ("cross_view",)),
    "info_nce": (info_nce, ("cross_view",)),
    "sentence_transformers": (sentence_transformers, ("cross_view",)),
    "sentence_transformers_cached": (sentence_transformers_cached, ("cross_view",)),
    "linear_cross_entropy": (linear_cross_entropy, ("cross_view",)),
}
#: The package that a rival's version is of.
PACKAGES = {
    "lightly": "lightly", "pytorch_metric_learning": "pytorch-metric-learning", "keops": "pykeops", "inf_cl": "inf-cl",
    "cut_cross_entropy": "cut-cross-entropy", "liger": "liger-kernel", "open_clip": "open_clip_torch",
    "info_nce": "info-nce-pytorch", "sentence_transformers": "sentence-transformers",
    "sentence_transformers_cached": "sentence-transformers",
}  # fmt: skip
#: Those that have kernels for GPUs only, or, like FlexAttention, no gradient on a CPU.
GPU_ONLY = ("inf_cl", "cut_cross_entropy", "liger", "flex_attention")


def missing(name: str) -> str | None:
    """Why a rival cannot take part here, or None."""
    if name not in RIVALS:
        return None
    try:
        build, modes = RIVALS[name]
        build(modes[0], 0.5)
    except (ImportError, AttributeError, TypeError) as error:  # not there, or of a version without what is needed
        return str(error)
    return None


def serves(name: str, objective: str, negatives: str) -> bool:
    """Whether a contestant computes this objective in this mode."""
    if name in RIVALS:
        return objective == "infonce" and negatives in RIVALS[name][1]
    return name not in ("eager", "compiled") or (objective == "infonce" and negatives != "one_view")


def make(name: str, objective: str, negatives: str, tau: float) -> Loss:
    """``eager``, ``compiled`` (eager through torch.compile) or a rival, InfoNCE only, else a backend of this package.

    Raises:
        ValueError: a contestant that does not compute this objective in this mode.
    """
    if not serves(name, objective, negatives):
        modes = RIVALS[name][1] if name in RIVALS else ("two_view", "cross_view")
        raise ValueError(f"{name} must be asked for infonce in {' or '.join(modes)}, got {objective}, {negatives}")
    if name in RIVALS:
        return RIVALS[name][0](negatives, tau)
    if name in ("eager", "compiled"):
        function = eager_infonce
        if name == "compiled":
            torch.compiler.reset()  # after eight shapes and modes in one process it would run the function uncompiled
            function = torch.compile(function, dynamic=False)
        return lambda z1, z2: function(z1, z2, negatives, tau)
    return lambda z1, z2: alpha_cl_loss(z1, z2, objective, temperature=tau, negatives=negatives, backend=name)
