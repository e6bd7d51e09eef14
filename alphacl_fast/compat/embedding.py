"""The losses of sentence-transformers that do more with models than embed columns.

They are subclasses of the package's own, whose gradient caching and guide models they keep; what
they replace is the loss of the embeddings.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers.sentence_transformer import losses as _package
from sentence_transformers.sentence_transformer.losses import gist_embed as _gist
from torch import Tensor, nn

from .. import functional
from ..autograd import unit_rows
from ..functional import of_one_dtype
from .entry import in_blocks
from .ranking import MultipleNegativesRankingLoss


class CachedMultipleNegativesRankingLoss(_package.CachedMultipleNegativesRankingLoss):
    """`MultipleNegativesRankingLoss` of a batch that is embedded in parts (gradient caching).

    The package embeds; the loss of all embeddings is computed at once, in O(n·D) memory.

    It takes every argument of `MultipleNegativesRankingLoss`, and as the package's class also
    mini_batch_size, mini_batch_num_tokens and show_progress_bar: the first two limit how much is
    embedded at once.

    Raises:
        ValueError: an argument is out of range, or a model whose inputs cannot be cut into parts.

    Source: arXiv:2101.06983.
    """

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        labels: Tensor | None = None,
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """The loss of embeddings that came in parts; the package calls it.

        Args:
            reps: parts (…, D) of every column.
            labels: ignored.
            with_backward: whether the gradients of the parts are computed here.

        Returns:
            (); a constant if the gradients were computed.
        """
        # a setting of a later release, which ours does not know, is a TypeError here
        settings = self.loss.get_config_dict() | {"similarity_fct": self.loss.similarity_fct}
        ours = MultipleNegativesRankingLoss(**settings)
        loss = ours.compute_loss_from_embeddings([torch.cat(parts) for parts in reps])
        if not with_backward:
            return loss
        loss.backward()
        return loss.detach()


class GISTEmbedLoss(_package.GISTEmbedLoss):
    """Cross-entropy among candidates that a guide model does not take for positives.

    The guide compares each candidate with the anchor. A candidate is left out if the guide finds it
    more similar than the anchor's positive, less a margin. Similarities exist for a block of
    anchors at a time, in PyTorch operations.

    Args:
        model: a SentenceTransformer with a tokenizer.
        guide: another one, which gets no gradient.
        temperature: temperature τ > 0.
        margin_strategy: "absolute", or "relative" to the similarity of the guide's positive.
        margin: the margin.
        contrast_anchors: whether other anchors are candidates.
        contrast_positives: whether other positives are compared with an anchor's positive.
        gather_across_devices: whether the positives and negatives of all processes are candidates;
            a process returns the mean over its own anchors.

    Raises:
        ValueError: a bad margin_strategy, or a model without a tokenizer.

    Source: arXiv:2402.16829.
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        temperature: float = 0.01,
        margin_strategy: str = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(
            model, guide, temperature, margin_strategy, margin, contrast_anchors,
            contrast_positives, gather_across_devices,
        )  # fmt: skip

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any = None) -> Tensor:
        """Embed every column with both models and compute the loss.

        Args:
            sentence_features: features of anchors, positives and, possibly, negatives.
            labels: ignored: the positive of row i is row i.

        Returns:
            ().

        Raises:
            ValueError: another number of columns than 2 or 3, or columns of different shapes.
        """
        columns = list(sentence_features)
        guided = [dict(column) for column in columns]  # the guide writes its outputs into them
        embeddings = of_one_dtype(*_gist.embed_columns(self.model, columns))
        with torch.no_grad():
            if self.must_retokenize:
                guided = [self._retokenized(column) for column in columns]
            guide = of_one_dtype(*_gist.embed_columns(self.guide, guided))
        if len(embeddings) not in (2, 3):
            raise ValueError(
                f"sentence_features must have 2 columns, or 3 with negatives, got {len(embeddings)}"
            )
        functional.check_embeddings(*embeddings[:2], fewest=1)
        own, offset = [unit_rows(x) for x in embeddings], 0
        with torch.no_grad():
            own_guide = [unit_rows(x) for x in guide]
        every, every_guide = own, own_guide
        if self.gather_across_devices:
            every, every_guide = (
                [x[0], *(_gist.all_gather_with_grad(y) for y in x[1:])] for x in (own, own_guide)
            )
            offset = _gist.get_rank() * len(own[0])
        return self._loss(own, every, own_guide, every_guide, offset)

    def _loss(
        self,
        own: list[Tensor],
        every: list[Tensor],
        own_guide: list[Tensor],
        every_guide: list[Tensor],
        offset: int,
    ) -> Tensor:
        """From unit rows of all columns, of this process and of all."""
        n = len(own[0])
        # which rows meet which columns: the first of them holds the positives
        meetings = [(0, 1)]
        meetings += [(0, 0)] * self.contrast_anchors + [(1, 1)] * self.contrast_positives
        meetings += [(0, 2)] * (len(own) == 3)

        def losses(block: slice) -> Tensor:
            targets = torch.arange(offset + block.start, offset + block.stop, device=own[0].device)
            scores, limit = [], None
            for i, j in meetings:
                guide = own_guide[i][block] @ every_guide[j].t()
                if limit is None:
                    limit = self._limit(guide.gather(1, targets[:, None]))
                false = guide > limit
                if not scores:
                    false.scatter_(1, targets[:, None], False)
                similarities = own[i][block] @ every[j].t()
                scores.append(similarities.masked_fill(false, -torch.inf))
            logits = torch.cat(scores, 1) / self.temperature
            share = len(targets) / n
            return self.cross_entropy_loss(logits, targets).reshape(1) * share

        columns = sum(len(every[j]) for _, j in meetings)
        return in_blocks(losses, n, columns, own[0].device).sum()

    def _limit(self, positive: Tensor) -> Tensor:
        """(b, 1) guide similarity above which a candidate is left out."""
        width = positive.abs() if self.margin_strategy == "relative" else 1.0
        return positive - width * self.margin

    def _retokenized(self, column: dict[str, Tensor]) -> dict[str, Tensor]:
        """The features that the guide makes of a column's texts."""
        tokens = column["input_ids"]
        if "cu_seq_lens_q" in column:  # all sequences follow each other in one
            ends, flat = column["cu_seq_lens_q"].tolist(), tokens[0].tolist()
            tokens = [flat[a:b] for a, b in itertools.pairwise(ends)]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return _gist.batch_to_device(self.guide.preprocess(texts), self.guide.device)
