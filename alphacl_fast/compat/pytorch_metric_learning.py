"""Drop-in replacements for losses of ``pytorch_metric_learning.losses``.

Where the package is installed, the classes are subclasses of its own: reducers, regularisers,
statistics and wrappers are the package's code, and only `compute_loss` is replaced. Without the
package they take neither of these objects.

Labels and cosine similarities are served by the functions of this package. Pairs that a miner or a
memory has chosen, other distances, and reducers that need every pair are served in blocks of rows
(`pairs`). Memory then holds one block at a time, and the values that the reducer gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, zoo
from ..autograd import unit_rows
from ..bundles import accumulation_dtype
from ..functional import of_one_dtype, zero_with_graph
from ..same_id import Groups
from ..supcon import supcon_loss
from . import pairs
from .entry import as_called, class_ids, in_blocks, is_small, loss_dtype
from .pairs import ListedPairs, PairsByLabel

try:
    from pytorch_metric_learning import losses as _package
except ImportError:
    _package = None

#: What `forward` gives to `compute_loss`, and `compute_loss` to the reducer.
LossDict = dict[str, dict[str, Any]]


class _StandIn(nn.Module):
    """What the package's classes do around `compute_loss`, without their objects."""

    def __init__(
        self,
        reducer: None = None,
        distance: None = None,
        collect_stats: bool | None = None,
        embedding_regularizer: None = None,
        embedding_reg_weight: float = 1,
        **hyperparameters: Any,
    ) -> None:
        super().__init__()
        objects = {
            "reducer": reducer, "distance": distance, "collect_stats": collect_stats or None,
            "embedding_regularizer": embedding_regularizer,
        }  # fmt: skip
        for name, value in objects.items():
            if value is not None:
                raise ValueError(f"{name} must be None without pytorch-metric-learning installed")
        self.reducer = self.distance = self.embedding_regularizer = None
        self.collect_stats, self.embedding_reg_weight = False, embedding_reg_weight
        for name, value in hyperparameters.items():
            setattr(self, name, value)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        if labels is not None:
            labels = labels.to(embeddings.device)
        if ref_emb is None:
            ref_emb, ref_labels = embeddings, labels
        arguments = (embeddings, labels, indices_tuple, ref_emb, ref_labels)
        return self.compute_loss(*arguments)["loss"]["losses"]


def _base(name: str) -> type[nn.Module]:
    return _StandIn if _package is None else getattr(_package, name)


class _PairLoss:
    """`compute_loss` of all losses; what differs is below "what a loss is"."""

    #: The package's reducer that the loss has unless it is given another.
    DEFAULT_REDUCER = "MeanReducer"
    #: Whether the package gives the reducer a value for each positive pair, or for each anchor.
    PER_PAIR = False
    #: Whether the package's loss is 0 for a batch without any negative pair.
    NEEDS_NEGATIVES = False

    # --- what a loss is ---

    def formula(self, inverted: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A formula of `pairs`; "inverted" similarities are given as such, else as −distances."""
        raise NotImplementedError

    def fused(self, call: _Call, similarity: str) -> Tensor | None:
        """(n,) losses of the anchors from public functions, or None if there are none for it."""
        raise NotImplementedError

    # --- what they share ---

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> LossDict:
        call = _Call.make(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        # This may call the distance for one row. The call for all rows comes last, because a
        # distance keeps the statistics of its last call.
        call.loss_dtype = self._loss_dtype(embeddings)
        if call.few:
            return self._zero(call)
        losses, mean = None, self._reduces_itself()
        similarity = _similarity(self.distance)
        served = similarity is not None and call.by_label and call.plain
        if served and (mean or not self.PER_PAIR) and not call.small:
            losses = self.fused(call, similarity)
        if losses is None and self.PER_PAIR and not mean:
            return self._of_every_pair(call)
        if losses is None:
            losses = self._in_blocks(call, every_pair=False)
        if self.NEEDS_NEGATIVES:
            losses = torch.where(call.any_negative(), losses, 0.0)
        if not mean and self.NEEDS_NEGATIVES and not (call.positives() > 0 and call.any_negative()):
            return self._zero(call)
        if not mean:
            places = torch.arange(len(losses), device=losses.device)
            return self._given(call, losses, places, "element")
        if self.PER_PAIR:
            return self._given(call, losses.sum() / call.positives().clamp(min=1))
        if self.DEFAULT_REDUCER == "MeanReducer":
            return self._given(call, losses.mean())
        counted = ~(losses <= 0)  # NaN is counted
        total = torch.where(counted, losses, 0.0).sum()
        return self._given(call, total / counted.sum().clamp(min=1))

    def _of_every_pair(self, call: _Call) -> LossDict:
        indices = call.pairs.indices()
        if len(indices[0]) == 0 or not call.any_negative():
            return self._zero(call)
        return self._given(call, self._in_blocks(call, every_pair=True), indices, "pos_pair")

    def _in_blocks(self, call: _Call, every_pair: bool) -> Tensor:
        """(n,) losses of the anchors, or one for each positive pair."""
        inverted = self.distance is None or self.distance.is_inverted
        formula, matrix = self.formula(inverted), _matrix(self.distance, call)

        def losses(rows: slice) -> Tensor:
            t = matrix(rows)
            counts = call.pairs.block(rows, t.dtype)
            out = formula(t if inverted else -t, *counts)
            if every_pair:
                return out[call.pairs.positives(rows)]
            return (counts[0] * out).sum(1) if self.PER_PAIR else out

        n, m = len(call.embeddings), len(call.others)
        out = in_blocks(losses, n, m, call.embeddings.device)
        return call.pairs.in_order(out) if every_pair else out

    def _reduces_itself(self) -> bool:
        """Whether the reducer is the default one, whose result needs no list of losses."""
        reducer = self.reducer
        if reducer is None:
            return True
        reducer = getattr(reducer, "reducers", {"loss": reducer})["loss"]
        known = type(reducer).__name__ == self.DEFAULT_REDUCER
        return (
            known
            and not reducer.collect_stats
            and type(reducer).__module__.startswith("pytorch_metric_learning.")
        )

    def _zero(self, call: _Call) -> LossDict:
        if self._reduces_itself():
            return self._given(call, zero_with_graph(call.embeddings, call.others))
        return self.zero_losses()

    def _given(
        self, call: _Call, losses: Tensor, indices: Any = None, kind: str = "already_reduced"
    ) -> LossDict:
        """What the reducer gets, in the dtype in which the package gives it."""
        losses = losses.to(call.loss_dtype)
        return {"loss": {"losses": losses, "indices": indices, "reduction_type": kind}}

    def _loss_dtype(self, embeddings: Tensor) -> torch.dtype:
        """The dtype in which the package gives losses."""
        row = torch.ones_like(embeddings[:1])
        distance = (lambda x, y: x @ y.t()) if self.distance is None else self.distance
        return loss_dtype(row.dtype, row.device, lambda _: distance(row, row).exp())


class _Call:
    """The tensors of a call, and its pairs."""

    def __init__(
        self,
        embeddings: Tensor,
        others: Tensor,
        pairs: PairsByLabel | ListedPairs,
        plain: bool,
        few: bool,
    ) -> None:
        self.embeddings, self.others, self.pairs = embeddings, others, pairs
        #: Whether the other rows are the anchors themselves, or none of them is an anchor.
        self.plain = plain
        self.small = is_small(len(embeddings), len(others), embeddings.device)
        self.loss_dtype = accumulation_dtype(embeddings.dtype)
        #: Whether there is at most one positive and one negative pair: the package's loss is 0.
        self.few = few

    @classmethod
    def make(
        cls,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> _Call:
        """Checks the arguments of `compute_loss`."""
        functional.check_rows("embeddings", embeddings, fewest=0)
        if ref_emb is embeddings:
            others = embeddings
        else:
            embeddings, others = of_one_dtype(embeddings, ref_emb)
            functional.check_rows("ref_emb", others, fewest=0)
            functional.check_alike("ref_emb", others, "embeddings", embeddings)
        if indices_tuple is not None:
            if len(indices_tuple) not in (3, 4):
                raise ValueError(
                    "indices_tuple must have 3 tensors (triplets) or 4 (positive and negative "
                    f"pairs), got {len(indices_tuple)}"
                )
            listed = tuple(torch.as_tensor(x, device=embeddings.device) for x in indices_tuple)
            a1, p, a2, n = listed if len(listed) == 4 else (*listed[:2], listed[0], listed[2])
            few = max(len(x) for x in (a1, a2)) <= 1
            return cls(embeddings, others, ListedPairs((a1, p), (a2, n), len(others)), True, few)
        ref_labels = labels if ref_labels is None else ref_labels
        ids, other_ids = _ids(labels, ref_labels, embeddings, others)
        same = ref_labels is labels
        by_label = PairsByLabel(ids, other_ids, same)
        few = len(embeddings) * len(others) <= 2 and all(
            x.sum() <= 1 for x in by_label.block(slice(0, len(ids)), torch.float32)
        )
        return cls(embeddings, others, by_label, same == (ref_emb is embeddings), few)

    @property
    def by_label(self) -> bool:
        return isinstance(self.pairs, PairsByLabel)

    @property
    def reference(self) -> dict[str, Tensor]:
        """The arguments of `supcon_loss` for rows that are no anchors."""
        if self.others is self.embeddings:
            return {}
        return {"reference": self.others, "reference_ids": self.pairs.other_labels}

    def counts(self) -> Tensor:
        """(n,) positives of the anchors, if they follow from labels."""
        ids, other_ids, same = self.pairs
        return (Groups.among(ids) if same else Groups.between(ids, other_ids)).count

    def positives(self) -> Tensor | float:
        """The number of positive pairs."""
        if self.by_label:
            return self.counts().sum()
        return torch.tensor(len(self.pairs.given[0]), device=self.embeddings.device)

    def any_negative(self) -> Tensor:
        """() bool."""
        if not self.by_label:
            return torch.tensor(len(self.pairs.sorted_negatives[0]) > 0).to(self.embeddings.device)
        ids, others, _ = self.pairs
        return (ids != ids[0]).any() | (others != ids[0]).any()


def _ids(
    labels: Tensor | None, ref_labels: Tensor | None, rows: Tensor, others: Tensor
) -> tuple[Tensor, Tensor]:
    for name, x, z in (("labels", labels, rows), ("ref_labels", ref_labels, others)):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        if got != tuple(z.shape[:1]):
            raise ValueError(f"{name} must be a tensor of shape {tuple(z.shape[:1])}, got {got}")
    if ref_labels is labels:
        (ids,) = class_ids(labels.to(rows.device))
        return ids, ids
    return class_ids(labels.to(rows.device), ref_labels.to(rows.device))


def _not_zero(name: str, value: float) -> float:
    if value == 0 or value != value:
        raise ValueError(f"{name} must be a number other than 0, got {value}")
    return value


def _similarity(distance: Any) -> str | None:
    """What a distance object is to the public functions; None: it needs its own matrix."""
    if distance is None:
        return "cosine"
    ours = type(distance).__name__ in ("CosineSimilarity", "DotProductSimilarity")
    plain = ours and type(distance).__module__.startswith("pytorch_metric_learning.")
    if not plain or distance.power != 1 or distance.p != 2 or distance.collect_stats:
        return None
    return "cosine" if distance.normalize_embeddings else "dot"


def _matrix(distance: Any, call: _Call) -> Callable[[slice], Tensor]:
    """Similarities (b, m) of a block of anchors, or distances, in the accumulation dtype."""
    z, others = call.embeddings, call.others
    wide = accumulation_dtype(z.dtype)
    if _similarity(distance) == "cosine":
        alike = others is z
        z = unit_rows(z)
        others = z if alike else unit_rows(others)
        return lambda rows: z[rows] @ others.t()
    called = as_called(distance, z.device)
    return lambda rows: called(z[rows], others).to(wide)


class NTXentLoss(_PairLoss, _base("NTXentLoss")):
    """NT-Xent of labels: −log(exp(s_ip/τ)/(exp(s_ip/τ) + Σ_n exp(s_in/τ))) over the positive pairs.

    Two rows for each label make it SimCLR's loss.

    Args:
        temperature: temperature τ ≠ 0; with a negative one similar rows repel, as in the package.
        **kwargs: distance, reducer, embedding_regularizer, embedding_reg_weight and collect_stats
            of the package's classes.

    Raises:
        ValueError: an object of the package without the package; when called, bad embeddings or
            labels, or a hyperparameter of 0 by which the formula divides.

    Source: arXiv:2002.05709; arXiv:1807.03748.
    """

    PER_PAIR = True

    def __init__(self, temperature: float = 0.07, **kwargs: Any) -> None:
        super().__init__(temperature=temperature, **kwargs)

    def formula(self, inverted: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return partial(pairs.ntxent, temperature=_not_zero("temperature", self.temperature))

    def fused(self, call: _Call, similarity: str) -> Tensor | None:
        if not self.temperature > 0:  # what the function takes
            return None
        losses = supcon_loss(
            call.embeddings, call.pairs.labels, form="sincere", temperature=self.temperature,
            similarity=similarity, reduction="none", **call.reference,
        )  # fmt: skip
        return losses * call.counts()


class SupConLoss(_PairLoss, _base("SupConLoss")):
    """Supervised contrastive loss: a row's positives are all other rows of its label.

    The loss is the mean over rows whose loss is positive. As in the package, it is 0 for a batch
    without positives or without negatives; `alphacl_fast.supcon_loss` serves the latter.

    Args:
        temperature: temperature τ ≠ 0, as `NTXentLoss`.
        **kwargs: as `NTXentLoss`.

    Raises:
        ValueError: as `NTXentLoss`.

    Source: arXiv:2004.11362.
    """

    DEFAULT_REDUCER = "AvgNonZeroReducer"
    NEEDS_NEGATIVES = True

    def __init__(self, temperature: float = 0.1, **kwargs: Any) -> None:
        super().__init__(temperature=temperature, **kwargs)

    def formula(self, inverted: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        temperature = _not_zero("temperature", self.temperature)

        def losses(t: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
            others = (positives > 0) | (negatives > 0)
            return pairs.supcon_rows(t / temperature, (positives > 0).to(t.dtype), others)

        return losses

    def fused(self, call: _Call, similarity: str) -> Tensor | None:
        if not self.temperature > 0:  # what the function takes
            return None
        return supcon_loss(
            call.embeddings, call.pairs.labels, temperature=self.temperature,
            similarity=similarity, reduction="none", **call.reference,
        )  # fmt: skip


class MultiSimilarityLoss(_PairLoss, _base("MultiSimilarityLoss")):
    """Multi-similarity loss, the mean over all rows.

    Args:
        alpha: α ≠ 0, of the positives.
        beta: β ≠ 0, of the negatives.
        base: λ, the similarity that separates them.
        **kwargs: as `NTXentLoss`.

    Raises:
        ValueError: as `NTXentLoss`.

    Source: Wang et al., CVPR 2019, eq. 10.
    """

    def __init__(
        self, alpha: float = 2, beta: float = 50, base: float = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(alpha=alpha, beta=beta, base=base, **kwargs)

    def formula(self, inverted: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        base = self.base if inverted else -self.base
        numbers = {name: _not_zero(name, getattr(self, name)) for name in ("alpha", "beta")}
        return partial(pairs.multi_similarity, base=base, **numbers)

    def fused(self, call: _Call, similarity: str) -> Tensor | None:
        known = self.alpha > 0 and self.beta > 0  # what the function takes
        if similarity != "cosine" or call.reference or not known:
            return None
        return zoo.multi_similarity(
            call.embeddings, call.pairs.labels, alpha=self.alpha, beta=self.beta, base=self.base,
            reduction="none",
        )  # fmt: skip


class CircleLoss(_PairLoss, _base("CircleLoss")):
    """Circle loss, the mean over rows whose loss is positive.

    Args:
        m: the margin.
        gamma: γ > 0, the scale.
        **kwargs: as `NTXentLoss`; the distance must be cosine similarity.

    Raises:
        ValueError: as `NTXentLoss`.

    Source: arXiv:2002.10857.
    """

    DEFAULT_REDUCER = "AvgNonZeroReducer"

    def __init__(self, m: float = 0.4, gamma: float = 80, **kwargs: Any) -> None:
        super().__init__(m=m, gamma=gamma, **kwargs)
        self.op, self.on, self.delta_p, self.delta_n = 1 + m, -m, 1 - m, m

    def formula(self, inverted: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return partial(pairs.circle, margin=self.m, gamma=self.gamma)

    def fused(self, call: _Call, similarity: str) -> Tensor | None:
        known = 0 <= self.m <= 1 and 0 < self.gamma <= 1e4  # what the function takes
        if similarity != "cosine" or call.reference or not known:
            return None
        return zoo.circle(
            call.embeddings, call.pairs.labels, margin=self.m, gamma=self.gamma, reduction="none"
        )


class TupletMarginLoss(_PairLoss, _base("TupletMarginLoss")):
    """Tuplet margin loss, the mean over the positive pairs.

    Args:
        margin: the margin in degrees; the attribute is in radians.
        scale: σ > 0.
        **kwargs: as `NTXentLoss`; the distance must be cosine similarity.

    Raises:
        ValueError: as `NTXentLoss`.

    Source: Yu and Tao, ICCV 2019.
    """

    PER_PAIR = True

    def __init__(self, margin: float = 5.73, scale: float = 64, **kwargs: Any) -> None:
        super().__init__(margin=margin, scale=scale, **kwargs)
        self.margin = math.radians(margin)

    def formula(self, inverted: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return partial(pairs.tuplet_margin, margin=self.margin, scale=self.scale)

    def fused(self, call: _Call, similarity: str) -> Tensor | None:
        known = 0 <= self.margin <= math.pi / 2 and self.scale > 0  # what the function takes
        if similarity != "cosine" or call.reference or not known:
            return None
        return zoo.tuplet_margin(
            call.embeddings, call.pairs.labels, margin=math.degrees(self.margin), scale=self.scale,
            reduction="none",
        )  # fmt: skip
