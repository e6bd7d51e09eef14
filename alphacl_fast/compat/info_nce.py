"""Drop-in replacements for ``InfoNCE`` and ``info_nce`` of info-nce-pytorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional
from ..autograd import unit_rows
from ..call import without_autocast
from ..explicit_negatives import loss_against_rows
from ..functional import alpha_cl_loss, of_one_dtype, zero_with_graph
from .entry import check_pair, cross_entropy, is_small, loss_dtype


class InfoNCE(nn.Module):
    """Cross-entropy of each query's positive key among its negative keys.

    Args:
        temperature: temperature τ > 0.
        reduction: "mean", "sum" or "none".
        negative_mode: "unpaired" (all queries have the same negatives) or "paired" (each has its
            own).

    Raises:
        ValueError: when called, a bad argument.

    Source: arXiv:1807.03748; arXiv:2010.05113.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
    ) -> None:
        super().__init__()
        self.temperature, self.reduction = temperature, reduction
        self.negative_mode = negative_mode

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None
    ) -> Tensor:
        """Compute the loss, with the arguments and errors of the function `info_nce`.

        Args:
            query: (N, D).
            positive_key: (N, D).
            negative_keys: (M, D), (N, M, D) or None.

        Returns:
            () or (N,).

        Raises:
            TypeError, ValueError: a bad argument.
        """
        return info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=self.temperature,
            reduction=self.reduction,
            negative_mode=self.negative_mode,
        )


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    """Cross-entropy of each query's positive key among its negative keys.

    Args:
        query: (N, D), normalised here; any floating dtype of the backends.
        positive_key: (N, D), normalised here.
        negative_keys: (M, D) for all queries or, with "paired" negatives, (N, M, D), normalised
            here. None: the positive keys of the other queries.
        temperature: temperature τ > 0.
        reduction: "mean", "sum" or "none".
        negative_mode: "unpaired" or "paired".

    Returns:
        () or, with reduction="none", (N,).

    Raises:
        TypeError, ValueError: a bad argument; the message names it, what was expected and what was
            received.

    Source: arXiv:1807.03748; arXiv:2010.05113.
    """
    functional.one_of("negative_mode", negative_mode, ("unpaired", "paired"))
    tensors = of_one_dtype(query, positive_key, negative_keys)
    check_pair("query", tensors[0], "positive_key", tensors[1], None)
    loss = _loss(*tensors, temperature, reduction, negative_mode)
    return loss.to(loss_dtype(tensors[0].dtype, loss.device, cross_entropy))


def _loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None,
    temperature: float,
    reduction: str,
    negative_mode: str,
) -> Tensor:
    """`info_nce` of tensors of one dtype, in the accumulation dtype."""
    if negative_keys is None:
        return alpha_cl_loss(
            query,
            positive_key,
            temperature=temperature,
            negatives="cross_view",
            symmetric=False,
            reduction=reduction,
        )
    functional.one_of("reduction", reduction, functional.REDUCTIONS)
    paired = negative_mode == "paired"
    _check_negatives(negative_keys, query, paired)
    if not negative_keys.numel():  # nothing repels
        losses = zero_with_graph(query, positive_key, negative_keys).expand(len(query))
        return losses if reduction == "none" else getattr(losses, reduction)()
    rows, keys = unit_rows(query), unit_rows(negative_keys.flatten(0, -2))
    positive = (rows * unit_rows(positive_key)).sum(1)
    if not paired and not is_small(len(rows), len(keys), rows.device, True):
        return loss_against_rows(
            rows, keys, positive, functional.DEFAULTS["infonce"], similarity="cosine",
            temperature=temperature, reduction=reduction,
        )  # fmt: skip
    functional.check_temperature(temperature, functional.DEFAULTS["infonce"])
    with without_autocast(rows.device):
        if paired:
            similarities = torch.bmm(keys.view(negative_keys.shape), rows[:, :, None]).squeeze(2)
        else:
            similarities = rows @ keys.t()
        sums = (similarities / temperature).logsumexp(1) - positive / temperature
    losses = torch.logaddexp(sums, torch.zeros_like(sums))  # the positive's own logit is 0
    return losses if reduction == "none" else getattr(losses, reduction)()


def _check_negatives(negatives: Tensor, query: Tensor, paired: bool) -> None:
    fits = (
        negatives.dim() == 3 and negatives.shape[0] == query.shape[0]
        if paired
        else negatives.dim() == 2
    )
    if not fits or negatives.shape[-1] != query.shape[1]:
        n, d = query.shape
        expected = f"({n}, M, {d})" if paired else f"(M, {d})"
        raise ValueError(
            f"negative_keys must have shape {expected} with "
            f"negative_mode={'paired' if paired else 'unpaired'!r}, got {tuple(negatives.shape)}"
        )
