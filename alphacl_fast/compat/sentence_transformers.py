"""A drop-in replacement for ``sentence_transformers.losses.MultipleNegativesRankingLoss``."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd import unit_rows
from ..explicit_negatives import loss_against
from ..functional import alpha_cl_loss


class MultipleNegativesRankingLoss(nn.Module):
    """Cross-entropy of each anchor's positive among all positives and all hard negatives.

    Args:
        model: maps the features of a column to a dictionary with "sentence_embedding" (N, D); None
            if only `compute_loss_from_embeddings` is called.
        scale: 1/τ, the factor of the similarities.
        similarity_fct: a function named ``cos_sim`` (None) or ``dot_score``.

    Raises:
        ValueError: another similarity.

    Source: arXiv:1705.00652.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        scale: float = 20.0,
        similarity_fct: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        known = {"cos_sim": "cosine", "dot_score": "dot"}
        name = (
            getattr(similarity_fct, "__name__", repr(similarity_fct))
            if similarity_fct
            else "cos_sim"
        )
        if name not in known:
            raise ValueError(f"similarity_fct must be cos_sim or dot_score, got {name}")
        self.model, self.scale, self.similarity = model, scale, known[name]

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any = None) -> Tensor:
        """Embed every column with the model and compute the loss.

        Args:
            sentence_features: features of anchors, positives and any number of hard negative
                columns.
            labels: ignored: the positive of row i is row i.

        Returns:
            ().

        Raises:
            ValueError: as `compute_loss_from_embeddings`.
        """
        columns = [self.model(column)["sentence_embedding"] for column in sentence_features]
        return self.compute_loss_from_embeddings(columns)

    def compute_loss_from_embeddings(
        self, embeddings: Sequence[Tensor], labels: Any = None
    ) -> Tensor:
        """Compute the loss of embeddings.

        Args:
            embeddings: anchors, positives and any number of hard negative columns, (N, D) each.
            labels: ignored: the positive of row i is row i.

        Returns:
            ().

        Raises:
            ValueError: fewer than two columns, or columns of different shapes.
        """
        if len(embeddings) < 2 or any(e.shape != embeddings[0].shape for e in embeddings):
            shapes = ", ".join(str(tuple(e.shape)) for e in embeddings)
            raise ValueError(f"embeddings must be two columns or more of one shape, got {shapes}")
        anchors, positives, *hard = embeddings
        tau = 1 / self.scale
        among_batch = {
            "temperature": tau, "similarity": self.similarity, "negatives": "cross_view",
            "symmetric": False,
        }  # fmt: skip
        if not hard:
            return alpha_cl_loss(anchors, positives, **among_batch)
        # log Σ over the others' positives and log Σ over the hard negatives, each relative to the
        # anchor's own positive, are combined by logaddexp.
        alone = {"epsilon": 0.0, "reduction": "none"}
        batch = alpha_cl_loss(anchors, positives, **among_batch, **alone)
        if self.similarity == "cosine":
            anchors, positives, *hard = (unit_rows(e) for e in embeddings)
        own = (anchors * positives).sum(1)
        others = loss_against(anchors, torch.cat(hard), own, temperature=tau, **alone)
        total = torch.logaddexp(batch, others)
        return torch.logaddexp(total, torch.zeros_like(total)).mean()
