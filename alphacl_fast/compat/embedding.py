"""The losses of sentence-transformers that do more with models than embed columns.

They are subclasses of the package's own, whose constructors, gradient caching and guide models they
keep; they replace only the loss of the embeddings.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from sentence_transformers.sentence_transformer import losses as _package
from sentence_transformers.sentence_transformer.losses import (
    cached_gist_embed as _cached_gist,
)
from sentence_transformers.sentence_transformer.losses import (
    cached_multiple_negatives_ranking as _cached,
)
from sentence_transformers.sentence_transformer.losses import gist_embed as _gist
from torch import Tensor, nn

from ..autograd import unit_rows
from ..explicit_negatives import loss_against
from ..functional import check_alike, check_rows, of_one_dtype
from .entry import check_pair, cross_entropy, loss_dtype
from .ranking import MultipleNegativesRankingLoss


class CachedMultipleNegativesRankingLoss(_package.CachedMultipleNegativesRankingLoss):
    """`MultipleNegativesRankingLoss` of a batch that is embedded in parts (gradient caching).

    The package embeds and gathers; the loss of all embeddings is computed at once, in O(n·D)
    memory.

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
        columns = [torch.cat(parts) for parts in reps]

        def gather(rows: Tensor) -> tuple[Tensor, int]:
            return _cached.all_gather_with_grad(rows), _cached.get_rank() * len(rows)

        loss = ours.loss_of_columns(columns, gather if self.gather_across_devices else None)
        return _after_backward(loss) if with_backward else loss


class CachedMultipleNegativesSymmetricRankingLoss(
    CachedMultipleNegativesRankingLoss, _package.CachedMultipleNegativesSymmetricRankingLoss
):
    """`MultipleNegativesSymmetricRankingLoss` of a batch that is embedded in parts.

    Args:
        model: a SentenceTransformer.
        scale: 1/τ.
        similarity_fct: as in `MultipleNegativesRankingLoss`.
        mini_batch_size: how many texts are embedded at once.
        mini_batch_num_tokens: instead, how many tokens; None: mini_batch_size counts.
        gather_across_devices: as in `MultipleNegativesRankingLoss`.
        show_progress_bar: whether progress is shown.

    Raises:
        ValueError: as `CachedMultipleNegativesRankingLoss`.

    Source: arXiv:2310.19923; arXiv:2101.06983.
    """


class GISTEmbedLoss(_package.GISTEmbedLoss):
    """Cross-entropy among candidates that a guide model does not take for positives.

    The guide compares each candidate with the anchor. A candidate is left out if the guide finds it
    more similar than the anchor's positive, less a margin. Memory is O(n·D), unless
    ``cross_entropy_loss`` or ``similarity_fct`` has been replaced, which the package's code calls.

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

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any = None) -> Tensor:
        """Embed every column with both models and compute the loss.

        Args:
            sentence_features: features of anchors, positives and, possibly, negatives.
            labels: ignored: the positive of row i is row i.

        Returns:
            ().

        Raises:
            ValueError: another number of columns than 2 or 3, positives of another shape than the
                anchors, or negatives of another width.
        """
        if not _is_plain(self, GISTEmbedLoss):
            return super().forward(sentence_features, labels)
        columns = list(sentence_features)
        guided = [dict(column) for column in columns]  # the guide writes its outputs into them
        embeddings = _gist.embed_columns(self.model, columns)
        with torch.no_grad():
            if self.must_retokenize:
                guided = [self._retokenized(column) for column in columns]
            guide = _gist.embed_columns(self.guide, guided)
        if len(embeddings) not in (2, 3):
            raise ValueError(
                f"sentence_features must have 2 columns, or 3 with negatives, got {len(embeddings)}"
            )
        return _guided_loss(self, embeddings, guide, _gist)

    def _retokenized(self, column: dict[str, Tensor]) -> dict[str, Tensor]:
        """The features that the guide makes of a column's texts."""
        tokens = column["input_ids"]
        if "cu_seq_lens_q" in column:  # all sequences follow each other in one
            ends, flat = column["cu_seq_lens_q"].tolist(), tokens[0].tolist()
            tokens = [flat[a:b] for a, b in itertools.pairwise(ends)]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return _gist.batch_to_device(self.guide.preprocess(texts), self.guide.device)


class CachedGISTEmbedLoss(_package.CachedGISTEmbedLoss):
    """`GISTEmbedLoss` of a batch that is embedded in parts (gradient caching).

    The package embeds and gathers; the loss of all embeddings is computed at once, in O(n·D)
    memory. There may be several columns of negatives.

    It takes every argument of `GISTEmbedLoss`, and as the package's class also mini_batch_size,
    mini_batch_num_tokens and show_progress_bar.

    Raises:
        ValueError: as `GISTEmbedLoss`, or a model whose inputs cannot be cut into parts.

    Source: arXiv:2402.16829; arXiv:2101.06983.
    """

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        reps_guided: list[list[Tensor]],
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """The loss of embeddings that came in parts; the package calls it.

        Args:
            reps: parts (…, D) of every column.
            reps_guided: parts of the guide's embeddings.
            with_backward: whether the gradients of the parts are computed here.

        Returns:
            (); a constant if the gradients were computed.

        Raises:
            ValueError: the guide has another number of columns, the positives have another shape
                than the anchors, or the negatives another width.
        """
        if len(reps) != len(reps_guided):
            raise ValueError(
                "reps and reps_guided must have the same length, "
                f"got {len(reps)} and {len(reps_guided)}"
            )
        if not _is_plain(self, CachedGISTEmbedLoss):
            return super().calculate_loss(reps, reps_guided, with_backward=with_backward)
        columns, guides = ([torch.cat(parts) for parts in x] for x in (reps, reps_guided))
        loss = _guided_loss(self, columns, guides, _cached_gist)
        return _after_backward(loss) if with_backward else loss


def _after_backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def _is_plain(loss: nn.Module, ours: type[nn.Module]) -> bool:
    """Whether a guided loss still has the package's own similarity and cross-entropy."""
    plain = {"similarity_fct": nn.CosineSimilarity(-1), "cross_entropy_loss": nn.CrossEntropyLoss()}
    return type(loss).sim_matrix is ours.sim_matrix and all(
        type(x) is type(getattr(loss, name)) and _settings(x) == _settings(getattr(loss, name))
        for name, x in plain.items()
    )


def _settings(module: nn.Module) -> dict[str, Any]:
    """What the constructor of a module without state has set."""
    buffers = dict.fromkeys(name for name, _ in module.named_buffers())
    held = {k: x for k, x in vars(module).items() if not k.startswith("_") and k != "training"}
    return held | buffers


def _guided_loss(
    loss: nn.Module, columns: Sequence[Tensor], guides: Sequence[Tensor], package: ModuleType
) -> Tensor:
    """The loss of all embeddings, and the guide's, with the settings of a loss of the package.

    The module ``package`` has the functions that gather and tell the rank.
    """
    if len(columns) < 2:
        raise ValueError(f"sentence_features must have 2 columns or more, got {len(columns)}")
    columns = of_one_dtype(*columns)
    anchors = "the anchors' embeddings"
    check_pair(anchors, columns[0], "the positives' embeddings", columns[1], None)
    for column in columns[2:]:
        check_rows("the negatives' embeddings", column, fewest=1)
        check_alike("the negatives' embeddings", column, anchors, columns[0])
    dtype = loss_dtype(columns[0].dtype, columns[0].device, cross_entropy)
    own, first = [unit_rows(x) for x in columns], 0
    with torch.no_grad():
        own_guide = [unit_rows(x) for x in of_one_dtype(*guides)]
    every, every_guide = own, own_guide
    if loss.gather_across_devices:
        every, every_guide = (
            [x[0], *(package.all_gather_with_grad(y) for y in x[1:])] for x in (own, own_guide)
        )
        first = package.get_rank() * len(own[0])
    positive = (own[0] * own[1]).sum(1)
    limit = _limit(loss, (own_guide[0] * own_guide[1]).sum(1))
    settings = {"temperature": loss.temperature, "reduction": "none"}

    # an anchor's positive has its id; the guide alone leaves out the rest
    kept = [*range(1, len(own)), *[0] * loss.contrast_anchors]
    ids = [torch.full((len(every[k]),), -1, device=positive.device) for k in kept]
    ids[0] = torch.arange(len(every[1]), device=positive.device)
    losses = loss_against(
        own[0], torch.cat([every[k] for k in kept]), positive,
        ids=ids[0][first : first + len(positive)], negative_ids=torch.cat(ids),
        guide=(own_guide[0], torch.cat([every_guide[k] for k in kept]), limit), **settings,
    )  # fmt: skip
    if loss.contrast_positives:
        guide = (own_guide[1], every_guide[1], limit)
        more = loss_against(own[1], every[1], positive, guide=guide, **settings)
        losses = _of_both_sums(losses, more)
    return losses.mean().to(dtype)


def _limit(loss: nn.Module, positive: Tensor) -> Tensor:
    """(N,) guide similarity above which a candidate is left out.

    A candidate that equals the positive is not above it, whatever the rounding.
    """
    width = positive.abs() if loss.margin_strategy == "relative" else 1.0
    return positive - width * loss.margin + 8 * torch.finfo(positive.dtype).eps


def _of_both_sums(x: Tensor, y: Tensor) -> Tensor:
    """log(1 + a + b) of x = log(1 + a) and y = log(1 + b)."""
    some = y > 0
    kept = torch.where(some, y, 1.0)  # the logarithm of b = 0 has no derivative
    log_b = kept + (-(-kept).expm1()).log()
    return torch.where(some, torch.logaddexp(x, log_b), x)
