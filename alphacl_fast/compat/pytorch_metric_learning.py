"""In the place of ``NTXentLoss`` (as SimCLR uses it) and ``SupConLoss`` of ``pytorch_metric_learning.losses``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..explicit_negatives import supcon_loss
from ..functional import alpha_cl_loss


class _Loss(nn.Module):
    """Called with embeddings (n, D), normalised here, and labels (n,); returns ()."""

    def __init__(self, temperature: float, **others: Any) -> None:
        super().__init__()
        if others:
            raise ValueError(f"{', '.join(others)} must be left at its default: not in this adapter")
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
        for name, value in (("indices_tuple", indices_tuple), ("ref_emb", ref_emb), ("ref_labels", ref_labels)):
            if value is not None:
                raise ValueError(f"{name} must be None: not in this adapter")
        if not isinstance(labels, Tensor) or labels.shape != embeddings.shape[:1]:
            got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"labels must be a tensor of shape {tuple(embeddings.shape[:1])}, got {got}")
        return self.compute(embeddings, labels.to(embeddings.device))

    def compute(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError


class NTXentLoss(_Loss):
    """NT-Xent where every label stands for two views of one sample.

    Raises:
        ValueError: a label with more or fewer than two rows (`SupConLoss` takes any number), a negative temperature, or an
            argument that is not served.

    Source: arXiv:2002.05709.
    """

    def __init__(self, temperature: float = 0.07, **others: Any) -> None:
        super().__init__(temperature, **others)

    def compute(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        order = labels.argsort(stable=True)
        first, second = order[::2], order[1::2]
        paired = len(first) == len(second) and bool((labels[first] == labels[second]).all())
        if not paired or bool((labels[second[:-1]] == labels[first[1:]]).any()):
            raise ValueError("labels must each have two rows, the two views of a sample; SupConLoss takes any number")
        return alpha_cl_loss(embeddings[first], embeddings[second], temperature=self.temperature)


class SupConLoss(_Loss):
    """Supervised contrastive loss: the positives of a row are all others of its label; mean over rows that have one.

    A batch without positives, or of one label, has the loss 0, as there; `alphacl_fast.explicit_negatives.supcon_loss` serves one label.

    Raises:
        ValueError: a negative temperature, or an argument that is not served.

    Source: arXiv:2004.11362.
    """

    def __init__(self, temperature: float = 0.1, **others: Any) -> None:
        super().__init__(temperature, **others)

    def compute(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if len(torch.unique(labels)) in (1, len(labels)):  # no negatives, or no positives: 0, as there
            return embeddings.sum() * 0
        return supcon_loss(embeddings, labels, temperature=self.temperature)
