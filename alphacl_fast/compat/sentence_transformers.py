"""In the place of ``sentence_transformers.losses.MultipleNegativesRankingLoss``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd import unit_rows
from ..explicit_negatives import loss_against
from ..functional import alpha_cl_loss


class MultipleNegativesRankingLoss(nn.Module):
    """Cross-entropy of each anchor's positive among all positives of the batch and all hard negatives.

    Args:
        model: called on the features of each column, returns a dictionary with "sentence_embedding" (N, D); None if only
            `compute_loss_from_embeddings` is used.
        scale: 1/τ of the scores.
        similarity_fct: a function called ``cos_sim`` (None) or ``dot_score``.

    Called with an iterable of columns: anchors, positives, and any number of columns of hard negatives.

    Raises:
        ValueError: another similarity, fewer than two columns, or columns of different shapes.

    Source: arXiv:1705.00652.
    """

    def __init__(
        self, model: nn.Module | None = None, scale: float = 20.0, similarity_fct: Callable[..., Tensor] | None = None
    ) -> None:
        super().__init__()
        name = "cos_sim" if similarity_fct is None else getattr(similarity_fct, "__name__", repr(similarity_fct))
        if name not in ("cos_sim", "dot_score"):
            raise ValueError(f"similarity_fct must be cos_sim or dot_score, got {name}")
        self.model, self.scale, self.similarity = model, scale, "cosine" if name == "cos_sim" else "dot"

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any = None) -> Tensor:
        return self.compute_loss_from_embeddings([self.model(column)["sentence_embedding"] for column in sentence_features])

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Any = None) -> Tensor:
        """() from (N, D) of every column; ``labels`` are not used, as the positive of row i is row i."""
        if len(embeddings) < 2 or any(e.shape != embeddings[0].shape for e in embeddings):
            shapes = ", ".join(str(tuple(e.shape)) for e in embeddings)
            raise ValueError(f"embeddings must be two columns or more of one shape, got {shapes}")
        anchors, positives, *hard = embeddings
        settings = {"temperature": 1 / self.scale, "backend": "auto"}
        one_way = {"similarity": self.similarity, "negatives": "cross_view", "symmetric": False}
        if not hard:
            return alpha_cl_loss(anchors, positives, **settings, **one_way)
        # log Σ over the others' positives and log Σ over the hard negatives, each relative to one's own positive
        among_positives = alpha_cl_loss(anchors, positives, epsilon=0.0, reduction="none", **settings, **one_way)
        if self.similarity == "cosine":
            anchors, positives, *hard = (unit_rows(e) for e in embeddings)
        own = (anchors * positives).sum(1)
        among_hard = loss_against(anchors, torch.cat(hard), own, epsilon=0.0, reduction="none", **settings)
        total = torch.logaddexp(among_positives, among_hard)
        return torch.logaddexp(total, torch.zeros_like(total)).mean()
