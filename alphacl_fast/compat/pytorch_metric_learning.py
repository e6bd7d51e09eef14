"""Drop-in replacements for ``NTXentLoss`` and ``SupConLoss`` of pytorch_metric_learning.losses."""

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import alpha_cl_loss
from ..supcon import supcon_loss


class _Loss(nn.Module):
    def __init__(self, temperature: float, **others: Any) -> None:
        super().__init__()
        if others:
            raise ValueError(
                f"{', '.join(others)} must be left at its default: not in this adapter"
            )
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.temperature = temperature

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            embeddings: (n, D), normalised here; any floating dtype of the backends.
            labels: (n,) integers, moved to the embeddings' device if necessary.
            indices_tuple: must be None.
            ref_emb: must be None.
            ref_labels: must be None.

        Returns:
            ().

        Raises:
            ValueError: labels of another shape, or an argument that must be None.
        """
        unsupported = {"indices_tuple": indices_tuple, "ref_emb": ref_emb, "ref_labels": ref_labels}
        for name, value in unsupported.items():
            if value is not None:
                raise ValueError(f"{name} must be None: not in this adapter")
        shape = tuple(embeddings.shape[:1])
        got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        if got != shape:
            raise ValueError(f"labels must be a tensor of shape {shape}, got {got}")
        return self.compute(embeddings, labels.to(embeddings.device))

    def compute(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError


class NTXentLoss(_Loss):
    """NT-Xent as in SimCLR: every label marks the two views of one sample.

    Args:
        temperature: temperature τ > 0.
        **others: must be left out.

    Raises:
        ValueError: the temperature is not positive, or an argument is unsupported; when called, a
            label that does not have exactly two rows (`SupConLoss` takes any number).

    Source: arXiv:2002.05709.
    """

    def __init__(self, temperature: float = 0.07, **others: Any) -> None:
        super().__init__(temperature, **others)

    def compute(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        order = labels.argsort(stable=True)
        first, second = order[::2], order[1::2]
        paired = len(first) == len(second) and bool((labels[first] == labels[second]).all())
        if not paired or bool((labels[second[:-1]] == labels[first[1:]]).any()):
            raise ValueError(
                "labels must each have two rows, the two views of a sample; SupConLoss takes any "
                "number"
            )
        return alpha_cl_loss(embeddings[first], embeddings[second], temperature=self.temperature)


class SupConLoss(_Loss):
    """Supervised contrastive loss: a row's positives are all other rows of its label.

    The loss is the mean over rows that have a positive. As in the original, it is 0 for a batch
    without positives or with a single label; `alphacl_fast.supcon_loss` handles the latter.

    Args:
        temperature: temperature τ > 0.
        **others: must be left out.

    Raises:
        ValueError: the temperature is not positive, or an argument is unsupported.

    Source: arXiv:2004.11362.
    """

    def __init__(self, temperature: float = 0.1, **others: Any) -> None:
        super().__init__(temperature, **others)

    def compute(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if len(torch.unique(labels)) in (1, len(labels)):  # no negatives, or no positives
            return embeddings.sum() * 0
        return supcon_loss(embeddings, labels, temperature=self.temperature)
