"""The baselines: eager PyTorch, torch.compile and other packages' losses, as (z1, z2) → scalar.

A baseline computes the same value as this package, for each task and mode that it supports. A task
is InfoNCE or a loss outside the family of objectives (`TASKS`).
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from alphacl_fast import MatryoshkaLoss, siglip_loss, supcon_loss
from alphacl_fast.functional import alpha_cl_loss

Loss = Callable[[Tensor, Tensor], Tensor]
Build = Callable[[str, float], Loss]  # (negatives, temperature) → loss

#: Classes of the task "supcon", whose rows have the labels 0, 1, …, 9, 0, 1, ….
CLASSES = 10
#: Scale and bias of the task "siglip".
SIGLIP = 10.0, -10.0


class Baseline(NamedTuple):
    """An implementation to compare with."""

    builds: dict[str, Build]  # by task
    modes: dict[str, tuple[str, ...]]  # values of ``negatives`` that it supports, by task
    package: str | None  # the package that its version comes from
    gpu_only: bool  # whether it has kernels, or a gradient, on GPUs only


BASELINES: dict[str, Baseline] = {}


def baseline(
    *modes: str,
    package: str | None = None,
    gpu_only: bool = False,
    task: str = "infonce",
    of: str | None = None,
) -> Callable[[Build], Build]:
    """Register a function (negatives, temperature) → loss for a task.

    The baseline has the name ``of``, by default the function's.
    """

    def register(build: Build) -> Build:
        name = of or build.__name__
        found = BASELINES.setdefault(name, Baseline({}, {}, package, gpu_only))
        found.builds[task], found.modes[task] = build, modes
        return build

    return register


# --- the tasks beside InfoNCE ---------------------------------------------------------------------


def labels(z: Tensor) -> Tensor:
    """(2N,) labels of the stacked views: both views of a sample have its label."""
    return (_rows(z) % CLASSES).repeat(2)


def widths(dim: int) -> tuple[int, ...]:
    """The widths of the task "matryoshka"."""
    return tuple(width for width in (dim, dim // 2, dim // 4) if width)


def _siglip(negatives: str, tau: float, backend: str) -> Loss:
    scale, bias = SIGLIP
    return lambda z1, z2: siglip_loss(z1, z2, scale=scale, bias=bias, backend=backend)


def _supcon(negatives: str, tau: float, backend: str) -> Loss:
    return lambda z1, z2: supcon_loss(
        torch.cat([z1, z2]), labels(z1), temperature=tau, backend=backend
    )


def _dcl(negatives: str, tau: float, backend: str) -> Loss:
    fixed = {"temperature": tau, "negatives": negatives, "backend": backend, "epsilon": 0.0}
    return lambda z1, z2: alpha_cl_loss(z1, z2, "infonce", **fixed)


def _matryoshka(negatives: str, tau: float, backend: str) -> Loss:
    fixed = {"temperature": tau, "negatives": negatives, "backend": backend}

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        return MatryoshkaLoss(lambda a, b: alpha_cl_loss(a, b, **fixed), widths(z1.shape[1]))(
            z1, z2
        )

    return loss


class Task(NamedTuple):
    """A loss of two views that is no objective of the family."""

    ours: Callable[[str, float, str], Loss]  # (negatives, temperature, backend) → loss
    modes: tuple[str, ...]


#: SigLIP; SupCon with `CLASSES` labels; decoupled InfoNCE; InfoNCE on three widths of the features.
TASKS = {
    "siglip": Task(_siglip, ("cross_view",)),
    "supcon": Task(_supcon, ("two_view",)),
    "dcl": Task(_dcl, ("two_view",)),
    "matryoshka": Task(_matryoshka, ("two_view", "cross_view")),
}


# --- the baselines --------------------------------------------------------------------------------


def _normalized(*views: Tensor) -> list[Tensor]:
    return [F.normalize(z, dim=1) for z in views]


def _rows(z: Tensor) -> Tensor:
    return torch.arange(z.shape[0], device=z.device)


def _infonce(z1: Tensor, z2: Tensor, negatives: str, tau: float) -> Tensor:
    """Compute InfoNCE the usual way: cross-entropy on the (masked) similarity matrix."""
    a, b = _normalized(z1, z2)
    if negatives == "cross_view":
        logits, labels = a @ b.t() / tau, _rows(a)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
    f = torch.cat([a, b])
    logits = (f @ f.t() / tau).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, _rows(f).roll(len(a)))


@baseline("two_view", "cross_view")
def eager(negatives: str, tau: float) -> Loss:
    """Plain PyTorch."""
    return lambda z1, z2: _infonce(z1, z2, negatives, tau)


@baseline("two_view", "cross_view")
def compiled(negatives: str, tau: float) -> Loss:
    """Plain PyTorch through torch.compile."""
    torch.compiler.reset()  # after eight shapes and modes it would fall back to eager
    function = torch.compile(_infonce, dynamic=False)
    return lambda z1, z2: function(z1, z2, negatives, tau)


def _siglip_dense(z1: Tensor, z2: Tensor, scale: float, bias: float) -> Tensor:
    a, b = _normalized(z1, z2)
    y = a @ b.t() * scale + bias
    sign = 2 * torch.eye(len(a), dtype=y.dtype, device=y.device) - 1
    return -F.logsigmoid(sign * y).sum() / len(a)


def _supcon_dense(z1: Tensor, z2: Tensor, tau: float) -> Tensor:
    z, ids = F.normalize(torch.cat([z1, z2]), dim=1), labels(z1)
    logits = (z @ z.t() / tau).fill_diagonal_(float("-inf"))
    positive = ids[:, None] == ids
    positive.fill_diagonal_(False)
    log_share = logits - logits.logsumexp(1, keepdim=True)
    mean = log_share.masked_fill(~positive, 0.0).sum(1) / positive.sum(1)
    return -mean.mean()


def _matryoshka_dense(z1: Tensor, z2: Tensor, negatives: str, tau: float) -> Tensor:
    cuts = [(z1[:, :width], z2[:, :width]) for width in widths(z1.shape[1])]
    return torch.stack([_infonce(a, b, negatives, tau) for a, b in cuts]).sum()


def _dcl_dense(z1: Tensor, z2: Tensor, tau: float) -> Tensor:
    z, n = F.normalize(torch.cat([z1, z2]), dim=1), len(z1)
    logits = z @ z.t() / tau
    positive = logits.diagonal(n)
    logits = logits.fill_diagonal_(float("-inf"))
    logits = logits.masked_fill(torch.eye(2 * n, device=z.device).roll(n, 0) > 0, float("-inf"))
    return (logits.logsumexp(1) - positive.repeat(2)).mean()


@baseline("cross_view", task="siglip", of="eager")
def eager_siglip(negatives: str, tau: float) -> Loss:
    return lambda z1, z2: _siglip_dense(z1, z2, *SIGLIP)


@baseline("two_view", task="supcon", of="eager")
def eager_supcon(negatives: str, tau: float) -> Loss:
    return lambda z1, z2: _supcon_dense(z1, z2, tau)


@baseline("two_view", task="dcl", of="eager")
def eager_dcl(negatives: str, tau: float) -> Loss:
    return lambda z1, z2: _dcl_dense(z1, z2, tau)


@baseline("two_view", "cross_view", task="matryoshka", of="eager")
def eager_matryoshka(negatives: str, tau: float) -> Loss:
    return lambda z1, z2: _matryoshka_dense(z1, z2, negatives, tau)


def _compiled(task: str) -> Build:
    """The eager implementation of a task through torch.compile."""

    def build(negatives: str, tau: float) -> Loss:
        torch.compiler.reset()
        return torch.compile(BASELINES["eager"].builds[task](negatives, tau), dynamic=False)

    return build


for _task, _found in TASKS.items():
    baseline(*_found.modes, task=_task, of="compiled")(_compiled(_task))


@baseline("two_view", package="lightly")
def lightly(negatives: str, tau: float) -> Loss:
    """NTXentLoss."""
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=tau)


@baseline("two_view", package="lightly", task="dcl", of="lightly")
def lightly_dcl(negatives: str, tau: float) -> Loss:
    """DCLLoss."""
    from lightly.loss import DCLLoss

    return DCLLoss(temperature=tau)


@baseline(
    "two_view", package="pytorch-metric-learning", task="supcon", of="pytorch_metric_learning"
)
def pytorch_metric_learning_supcon(negatives: str, tau: float) -> Loss:
    """SupConLoss."""
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(temperature=tau)
    return lambda z1, z2: loss(torch.cat([z1, z2]), labels(z1))


@baseline("two_view", package="pytorch-metric-learning")
def pytorch_metric_learning_ntxent(negatives: str, tau: float) -> Loss:
    """NTXentLoss, with a label for each pair."""
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(temperature=tau)
    return lambda z1, z2: loss(torch.cat([z1, z2]), _rows(z1).repeat(2))


@baseline("two_view", package="pytorch-metric-learning")
def pytorch_metric_learning(negatives: str, tau: float) -> Loss:
    """SupConLoss, which equals InfoNCE when each label has two rows."""
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(temperature=tau)
    return lambda z1, z2: loss(torch.cat([z1, z2]), _rows(z1).repeat(2))


@baseline("two_view", "cross_view", package="pykeops")
def keops(negatives: str, tau: float) -> Loss:
    """A log-sum-exp of symbolic similarities, compiled at the first call."""
    with contextlib.redirect_stdout(io.StringIO()):
        from pykeops.torch import LazyTensor

    def similarities(a: Tensor, b: Tensor) -> Any:
        return (LazyTensor(a[:, None]) * LazyTensor(b[None])).sum(-1) / tau

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        a, b = _normalized(z1, z2)
        positive = (a * b).sum(1) / tau
        if negatives == "cross_view":
            s = similarities(a, b)
            return ((s.logsumexp(1)[:, 0] + s.logsumexp(0)[:, 0]) / 2 - positive).mean()
        f = torch.cat([a, b])
        # Mask the diagonal; row numbers in the rows' dtype are exact far beyond any n used here.
        at = _rows(f).to(f.dtype)[:, None]
        apart = (LazyTensor(at[:, None]) - LazyTensor(at[None])).square() - 0.5
        s = apart.ifelse(similarities(f, f), apart * 1e9)
        return (s.logsumexp(1)[:, 0] - positive.repeat(2)).mean()

    return loss


def _both_directions(one_way: Loss, normalize: bool = True) -> Loss:
    """Average a one-way cross_view loss over both directions."""

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        a, b = _normalized(z1, z2) if normalize else (z1, z2)
        return (one_way(a, b) + one_way(b, a)) / 2

    return loss


def _linear(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor], tau: float) -> Loss:
    """Express InfoNCE as a linear cross-entropy: one tower's rows are the other's classes."""
    return _both_directions(lambda a, b: cross_entropy(a / tau, b, _rows(a)))


@baseline("cross_view", package="inf-cl", gpu_only=True)
def inf_cl(negatives: str, tau: float) -> Loss:
    """cal_flash_loss, which multiplies in tf32 whatever the input dtype."""
    from inf_cl import cal_flash_loss

    return _both_directions(
        lambda a, b: cal_flash_loss(a, b, scale=1 / tau, head_dim=min(256, a.shape[1])).mean()
    )


@baseline("cross_view", package="cut-cross-entropy", gpu_only=True)
def cut_cross_entropy(negatives: str, tau: float) -> Loss:
    """linear_cross_entropy, with its lossy gradient filter off."""
    from cut_cross_entropy import linear_cross_entropy

    return _linear(lambda a, b, labels: linear_cross_entropy(a, b, labels, filter_eps=None), tau)


@baseline("cross_view", package="liger-kernel", gpu_only=True)
def liger(negatives: str, tau: float) -> Loss:
    """The chunked linear cross-entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return _linear(liger_fused_linear_cross_entropy, tau)


@baseline("cross_view", gpu_only=True)
def flex_attention(negatives: str, tau: float) -> Loss:
    """The log-sum-exp of torch's compiled FlexAttention (its output is unused) less positives."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    fused = torch.compile(flex_attention, dynamic=False)

    def log_sum_exp(a: Tensor, b: Tensor, values: Tensor) -> Tensor:
        aux = AuxRequest(lse=True)
        return fused(a[None, None], b[None, None], values, scale=1 / tau, return_aux=aux)[1].lse

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        a, b = _normalized(z1, z2)
        values = a.new_zeros((1, 1, a.shape[0], 16))  # the narrowest width that it accepts
        positive = (a.float() * b.float()).sum(1) / tau
        return ((log_sum_exp(a, b, values) + log_sum_exp(b, a, values)) / 2 - positive).mean()

    return loss


@baseline("cross_view", package="open_clip_torch")
def open_clip(negatives: str, tau: float) -> Loss:
    """ClipLoss, on normalised rows as in CLIP."""
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda z1, z2: loss(*_normalized(z1, z2), 1 / tau)


@baseline("cross_view", package="open_clip_torch", task="siglip", of="open_clip")
def open_clip_siglip(negatives: str, tau: float) -> Loss:
    """SigLipLoss, on normalised rows as in SigLIP."""
    from open_clip.loss import SigLipLoss

    loss = SigLipLoss()
    return lambda z1, z2: loss(*_normalized(z1, z2), *SIGLIP)


@baseline("cross_view", package="memeff", gpu_only=True)
def memeff(negatives: str, tau: float) -> Loss:
    """MemoryEfficientCLIPLoss with the gradient of its value (stable=False)."""
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=tau, stable=False)


@baseline("cross_view", package="memeff", gpu_only=True)
def memeff_stable(negatives: str, tau: float) -> Loss:
    """The same with its default stable=True, whose gradient has another scale."""
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=tau)


@baseline("cross_view", package="info-nce-pytorch")
def info_nce(negatives: str, tau: float) -> Loss:
    """InfoNCE, in both directions."""
    from info_nce import InfoNCE

    return _both_directions(InfoNCE(temperature=tau), normalize=False)


def _sentence_transformers(name: str, tau: float, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers.sentence_transformer import losses

    model = torch.nn.Sequential(torch.nn.Identity())
    options["directions"] = ("query_to_doc", "doc_to_query")
    return getattr(losses, name)(model, scale=1 / tau, partition_mode="per_direction", **options)


@baseline("cross_view", package="sentence-transformers")
def sentence_transformers(negatives: str, tau: float) -> Loss:
    """MultipleNegativesRankingLoss (6.0 or later), in both directions."""
    loss = _sentence_transformers("MultipleNegativesRankingLoss", tau)
    return lambda z1, z2: loss.compute_loss_from_embeddings([z1, z2], None)


@baseline("cross_view", package="sentence-transformers")
def sentence_transformers_cached(negatives: str, tau: float) -> Loss:
    """CachedMultipleNegativesRankingLoss: 128 rows of scores at a time, gradients cached."""
    loss = _sentence_transformers("CachedMultipleNegativesRankingLoss", tau, mini_batch_size=128)

    class Cached(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z1, z2):
            leaves = [z.detach().requires_grad_() for z in (z1, z2)]
            wanted = any(ctx.needs_input_grad)
            with torch.set_grad_enabled(wanted):
                value = loss.calculate_loss([[z] for z in leaves], with_backward=wanted)
            ctx.gradients = [z.grad for z in leaves]
            return value.detach()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            return tuple(grad * g for g in ctx.gradients)

    return Cached.apply


@baseline("cross_view")
def linear_cross_entropy(negatives: str, tau: float) -> Loss:
    """torch's own chunked `F.linear_cross_entropy` (torch >= 2.13)."""
    return _linear(F.linear_cross_entropy, tau)


#: Baselines other than plain PyTorch.
PACKAGES = tuple(name for name in BASELINES if name not in ("eager", "compiled"))


def missing(name: str) -> str | None:
    """Say why an implementation cannot run here: it is not installed, or too old."""
    if name in PACKAGES:
        try:
            found = BASELINES[name]
            for task, build in found.builds.items():
                build(found.modes[task][0], 0.5)
        except (ImportError, AttributeError, TypeError) as error:
            return str(error)
    return None


def serves(name: str, objective: str, negatives: str) -> bool:
    """Whether a baseline or backend computes this objective or task in this mode."""
    if name not in BASELINES:
        return objective not in TASKS or negatives in TASKS[objective].modes
    return negatives in BASELINES[name].modes.get(objective, ())


def make(name: str, objective: str, negatives: str, tau: float) -> Loss:
    """Build a loss (z1, z2) → ().

    Args:
        name: a baseline, or a backend of this package.
        objective: name of an objective or task; baselines compute "infonce" and some tasks.
        negatives: "two_view", "one_view" or "cross_view".
        tau: temperature.

    Raises:
        ValueError: the baseline does not compute this objective in this mode.
    """
    if not serves(name, objective, negatives):
        modes = BASELINES[name].modes if name in BASELINES else {objective: TASKS[objective].modes}
        known = "; ".join(f"{task} in {' or '.join(where)}" for task, where in modes.items())
        raise ValueError(f"{name} must be asked for {known}, got {objective}, {negatives}")
    if name in BASELINES:
        return BASELINES[name].builds[objective](negatives, tau)
    if objective in TASKS:
        return TASKS[objective].ours(negatives, tau, name)
    fixed = {"temperature": tau, "negatives": negatives, "backend": name}
    return lambda z1, z2: alpha_cl_loss(z1, z2, objective, **fixed)
