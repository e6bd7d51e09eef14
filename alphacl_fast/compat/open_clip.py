"""Drop-in replacements for ``ClipLoss`` and ``SigLipLoss`` of ``open_clip.loss``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..bundles import accumulation_dtype
from ..call import without_autocast
from ..functional import alpha_cl_loss, of_one_dtype
from ..siglip import siglip_loss
from .entry import check_pair, cross_entropy, in_graph, is_small, loss_dtype


def _overrides(loss: nn.Module, ours: type[nn.Module], *names: str) -> bool:
    """Whether a subclass computes something of its own, so that the dense formula must call it."""
    return any(getattr(type(loss), name) is not getattr(ours, name) for name in names)


def _gathered(rows: Tensor, with_grad: bool, keep_own: bool) -> Tensor:
    """The rows of all processes, of as many each; without a gradient, but for this process's."""
    if with_grad:
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(rows))
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    if keep_own:
        parts[dist.get_rank()] = rows
    return torch.cat(parts)


class ClipLoss(nn.Module):
    """CLIP's symmetric cross-entropy of normalised features.

    A subclass that overrides `get_logits` or `get_ground_truth` gets the dense loss of what they
    return, and `get_logits` may be called for other losses; both need memory for N² numbers.

    Args:
        local_loss: whether a process returns the mean over its own rows (True) or over the rows of
            all processes (False). It changes neither the memory nor the gradient.
        gather_with_grad: changes nothing: the gradient is always exact.
        cache_labels: whether `get_ground_truth` keeps its result.
        rank: number of this process.
        world_size: above 1, the negatives come from the batches of all processes; the gradient is
            exact after DDP's averaging.
        use_horovod: must be False.

    Raises:
        ValueError: horovod is requested.

    Source: arXiv:2103.00020.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod must be False: processes meet through torch.distributed")
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.use_horovod = use_horovod
        self.prev_num_logits, self.labels = 0, {}

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The column of every row's positive.

        Args:
            device: where the result is.
            num_logits: rows of the logits.

        Returns:
            (num_logits,) integers.
        """
        if self.prev_num_logits == num_logits and device in self.labels:
            return self.labels[device]
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        labels = torch.arange(first, first + num_logits, device=device)
        if self.cache_labels:
            self.labels[device], self.prev_num_logits = labels, num_logits
        return labels

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The matrices of all logits, for losses that are written in terms of them.

        Args:
            image_features: (N, D), normalised rows.
            text_features: (N, D), normalised rows.
            logit_scale: factor of the similarities.
            logit_bias: is added to them; None adds nothing.

        Returns:
            (N, M) of images against texts and (N, M) of texts against images; with several
            processes M counts the rows of all, and N too unless local_loss.
        """
        images, texts = image_features, text_features
        if self.world_size > 1:
            images, texts = (
                _gathered(x, self.gather_with_grad, not self.local_loss) for x in (images, texts)
            )
        if self.world_size > 1 and not self.local_loss:
            image_features, text_features = images, texts
        per_image = logit_scale * image_features @ texts.t()
        per_text = logit_scale * text_features @ images.t()
        if logit_bias is None:
            return per_image, per_text
        return per_image + logit_bias, per_text + logit_bias

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss.

        Args:
            image_features: (N, D), normalised rows; any floating dtype of the backends.
            text_features: (N, D), normalised rows.
            logit_scale: 1/τ, a float or a tensor of one element, which receives its exact gradient.
            logit_bias: does not change the loss, as a bias cancels in a softmax; a tensor gets
                gradient 0.
            output_dict: whether to return a dictionary.

        Returns:
            (), or {"contrastive_loss": ()}.

        Raises:
            TypeError, ValueError: bad features or a bad scale.
        """
        arguments = (image_features, text_features, logit_scale, logit_bias)
        if _overrides(self, ClipLoss, "get_logits", "get_ground_truth"):
            loss = self._dense(*arguments)
        else:
            loss = self._fused(*arguments)
        return {"contrastive_loss": loss} if output_dict else loss

    def _fused(
        self, images: Tensor, texts: Tensor, scale: float | Tensor, bias: float | Tensor | None
    ) -> Tensor:
        images, texts = of_one_dtype(images, texts)
        group = "world" if self.world_size > 1 else None
        local = group is not None and self.local_loss
        check_pair("image_features", images, "text_features", texts, group)
        _check_scale(scale)
        if group is None and is_small(len(images), len(texts), images.device, True):
            loss = _of_matrix(images, texts, scale)
        else:
            loss = alpha_cl_loss(
                images,
                texts,
                temperature=1 / _wide(scale, images),
                similarity="dot",
                negatives="cross_view",
                process_group=group,
                reduction="none" if local else "mean",
            )
        loss = in_graph(loss.mean() if local else loss, bias)
        return loss.to(loss_dtype(images.dtype, images.device, cross_entropy))

    def _dense(self, images: Tensor, *others: Any) -> Tensor:
        logits = self.get_logits(images, *others)
        labels = self.get_ground_truth(images.device, logits[0].shape[0])
        return sum(F.cross_entropy(x, labels) for x in logits) / 2


def _check_scale(scale: float | Tensor) -> None:
    """Raises unless the scale is a positive number, as far as it can be seen."""
    functional.check_scale_and_bias(scale, 0.0)
    visible = not isinstance(scale, Tensor) or scale.device.type == "cpu"
    if visible and not torch.compiler.is_compiling() and not scale > 0:
        raise ValueError(f"logit_scale must be > 0, got {scale}")


def _scaled(images: Tensor, texts: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose inner products are the logits, in the accumulation dtype."""
    wide = accumulation_dtype(images.dtype)
    return images.to(wide) * _wide(scale, images), texts.to(wide)


def _of_matrix(images: Tensor, texts: Tensor, scale: float | Tensor) -> Tensor:
    """CLIP's loss by the matrix of logits, as log(1 + Σ exp(l_ij − l_ii)) of rows and columns."""
    with without_autocast(images.device):
        images, texts = _scaled(images, texts, scale)
        own, logits = (images * texts).sum(1), images @ texts.t()
        logits.fill_diagonal_(torch.finfo(logits.dtype).min)
        sums = torch.cat([logits.logsumexp(0) - own, logits.logsumexp(1) - own])
        return torch.logaddexp(sums, torch.zeros_like(sums)).mean()


def _of_sigmoids(
    images: Tensor, texts: Tensor, scale: float | Tensor, bias: float | Tensor
) -> Tensor:
    """SigLIP's loss by the matrix of logits."""
    with without_autocast(images.device):
        images, texts = _scaled(images, texts, scale)
        logits = images @ texts.t() + _wide(bias, images)
        labels = torch.full_like(logits, -1.0).fill_diagonal_(1.0)
        return -F.logsigmoid(labels * logits).sum() / len(images)


def _wide(number: float | Tensor, rows: Tensor) -> float | Tensor:
    """A number in a dtype in which its reciprocal is as exact as the loss."""
    if not isinstance(number, Tensor):
        return number
    return number.to(torch.promote_types(number.dtype, accumulation_dtype(rows.dtype)))


class SigLipLoss(nn.Module):
    """Sigmoid loss of all pairs of normalised image and text features.

    A subclass that overrides `get_logits`, `get_ground_truth` or `_loss` gets the dense loss of
    what they return, in one process.

    Args:
        cache_labels: changes nothing: no labels are made.
        rank: number of this process.
        world_size: above 1, the texts of all processes are negatives of this process's images; a
            process returns the mean over its own images, and the gradient is exact after DDP's
            averaging.
        dist_impl: "bidir", "shift", "reduce", "gather" or None; changes nothing.
        chunk_size: changes nothing: the matrix of logits is never stored.

    Raises:
        ValueError: another dist_impl.

    Source: arXiv:2303.15343.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        known = ("bidir", "shift", "reduce", "gather")
        if dist_impl is not None and dist_impl not in known:
            raise ValueError(f"dist_impl must be None or one of {known}, got {dist_impl!r}")
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.dist_impl, self.chunk_size = dist_impl or "bidir", chunk_size
        self.prev_num_logits, self.labels = 0, {}

    def get_ground_truth(
        self,
        device: torch.device,
        dtype: torch.dtype,
        num_logits: int,
        negative_only: bool = False,
    ) -> Tensor:
        """The label of every pair: 1 for a positive, −1 for a negative.

        Args:
            device: where the result is.
            dtype: of the result.
            num_logits: rows and columns.
            negative_only: whether there is no positive.

        Returns:
            (num_logits, num_logits).
        """
        labels = -torch.ones(num_logits, num_logits, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:
        """The matrix of all logits, for losses that are written in terms of it.

        Args:
            image_features: (N, D), normalised rows.
            text_features: (N, D), normalised rows.
            logit_scale: factor of the similarities.
            logit_bias: is added to them; None adds nothing.

        Returns:
            (N, N).
        """
        logits = logit_scale * image_features @ text_features.t()
        return logits if logit_bias is None else logits + logit_bias

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        n, like = len(image_features), image_features
        labels = self.get_ground_truth(like.device, like.dtype, n, negative_only=negative_only)
        return -F.logsigmoid(labels * logits).sum() / n

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss.

        Args:
            image_features: (N, D), normalised rows; any floating dtype of the backends.
            text_features: (N, D), normalised rows.
            logit_scale: factor of the similarities, a float or a tensor of one element, which
                receives its gradient.
            logit_bias: is added to them, likewise; None adds nothing.
            output_dict: whether to return a dictionary.

        Returns:
            (), or {"contrastive_loss": ()}.

        Raises:
            TypeError, ValueError: bad features, scale or bias; or several processes with a
                subclass that has its own logits.
        """
        if _overrides(self, SigLipLoss, "get_logits", "get_ground_truth", "_loss"):
            if self.world_size > 1:
                raise ValueError(
                    "world_size must be 1 for a subclass that overrides get_logits, "
                    f"get_ground_truth or _loss, got {self.world_size}"
                )
            loss = self._loss(image_features, text_features, logit_scale, logit_bias)
        else:
            loss = self._fused(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _fused(
        self, images: Tensor, texts: Tensor, scale: float | Tensor, bias: float | Tensor | None
    ) -> Tensor:
        given = images
        images, texts = of_one_dtype(images, texts)
        group = "world" if self.world_size > 1 else None
        check_pair("image_features", images, "text_features", texts, group)
        bias = 0.0 if bias is None else bias
        if group is None and is_small(len(images), len(texts), images.device, True):
            functional.check_scale_and_bias(scale, bias)
            loss = _of_sigmoids(images, texts, scale, bias)
        else:
            loss = siglip_loss(
                images,
                texts,
                scale=scale,
                bias=bias,
                similarity="dot",
                process_group=group,
                reduction="mean" if group is None else "none",
            )
        # the package's labels have the dtype of the images
        last = loss_dtype(
            images.dtype, images.device, lambda x: F.logsigmoid(x * torch.ones_like(given[:1, :1]))
        )
        return (loss.mean() if loss.dim() else loss).to(last)
