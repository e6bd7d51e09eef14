"""The in-batch losses of sentence-transformers that need nothing of the package."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..autograd import unit_rows
from ..bundles import accumulation_dtype
from ..explicit_negatives import loss_against_rows
from ..functional import alpha_cl_loss, of_one_dtype, zero_with_graph
from ..objectives import LOG_SUM
from .entry import (
    as_called,
    everyone,
    in_blocks,
    is_small,
    log_sum_exp,
    loss_dtype,
    world,
)

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
HARDNESS_MODES = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
#: Gives the rows (P·N, D) of all processes and the place of this one's first row among them.
Gather = Callable[[Tensor], tuple[Tensor, int]]
_SIMILARITIES = {"cos_sim": "cosine", "dot_score": "dot"}
#: The functions that ``model.similarity`` stands for, by the model's ``similarity_fn_name``.
_OF_A_MODEL = {"cosine": "cos_sim", "dot": "dot_score"}


def cos_sim(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarities of all pairs.

    Args:
        a: (N, D).
        b: (M, D).

    Returns:
        (N, M).
    """
    return unit_rows(a) @ unit_rows(b).t()


class MultipleNegativesRankingLoss(nn.Module):
    """Cross-entropy of each anchor's positive among all positives and all hard negatives.

    Args:
        model: maps the features of a column to a dictionary with "sentence_embedding" (N, D); None
            if only `compute_loss_from_embeddings` is called.
        scale: 1/τ, the factor of the similarities.
        similarity_fct: gives the similarities (N, M) of rows (N, D) and (M, D). Functions named
            ``cos_sim`` and ``dot_score``, and ``model.similarity`` where it is one of them, are
            never called: the sweeps replace them. Another function is called for blocks of
            anchors.
        gather_across_devices: whether the documents of all processes are candidates. A process
            returns the mean over its own anchors; the gradient is exact after DDP's averaging.
        directions: which pairs are compared: "query_to_doc", always, and any of "query_to_query",
            "doc_to_query" and "doc_to_doc".
        partition_mode: "joint" (one softmax over all directions) or "per_direction" (the mean of
            one softmax each; with "query_to_doc" and "doc_to_query" alone).
        hardness_mode: None, or the negatives of "query_to_doc" to which ``hardness_strength`` times
            their similarity, a constant of the gradient, is added: "in_batch_negatives" (documents
            of other anchors), "hard_negatives" (an anchor's own) or "all_negatives".
        hardness_strength: ≥ 0.

    Raises:
        ValueError: an argument is out of range.

    Source: arXiv:1705.00652; arXiv:2308.03281 (all directions in one softmax); arXiv:2503.04812 and
    arXiv:2509.20354 (hardness).
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = cos_sim,
        gather_across_devices: bool = False,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__()
        if not scale > 0:
            # the package's own sentence comes first, as callers match it
            raise ValueError(f"Scale must be a positive value. scale must be > 0, got {scale}")
        if not set(directions) <= set(DIRECTIONS) or "query_to_doc" not in directions:
            raise ValueError(
                f"directions must be 'query_to_doc' and some of {DIRECTIONS[1:]}, got {directions}"
            )
        functional.one_of("partition_mode", partition_mode, ("joint", "per_direction"))
        if partition_mode == "per_direction" and set(directions) & {"query_to_query", "doc_to_doc"}:
            raise ValueError(
                "partition_mode must be 'joint' with 'query_to_query' or 'doc_to_doc', which have "
                "no positive pair of their own, got 'per_direction'"
            )
        functional.one_of("hardness_mode", hardness_mode, HARDNESS_MODES)
        if not hardness_strength >= 0:
            raise ValueError(f"hardness_strength must be ≥ 0, got {hardness_strength}")
        self.model, self.scale = model, scale
        self.similarity_fct = cos_sim if similarity_fct is None else similarity_fct
        self.gather_across_devices = gather_across_devices
        self.directions, self.partition_mode = tuple(directions), partition_mode
        self.hardness_mode, self.hardness_strength = hardness_mode, hardness_strength

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any = None) -> Tensor:
        """Embed every column with the model and compute the loss.

        Columns that the package can put together go through the model at once.

        Args:
            sentence_features: features of anchors, positives and any number of hard negative
                columns.
            labels: ignored: the positive of row i is row i.

        Returns:
            ().

        Raises:
            TypeError, ValueError: as `compute_loss_from_embeddings`.
        """
        embeddings = _embedded(self.model, list(sentence_features))
        return self.compute_loss_from_embeddings(embeddings, labels)

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
            TypeError, ValueError: fewer than two columns, columns of different shapes, or a column
                that is no (N, D) tensor of a dtype of the backends.
        """
        group = world(self.gather_across_devices)
        return self.loss_of_columns(
            embeddings, None if group is None else partial(everyone, group=group)
        )

    def loss_of_columns(self, embeddings: Sequence[Tensor], gather: Gather | None) -> Tensor:
        """`compute_loss_from_embeddings` with a user's way to gather.

        Args:
            embeddings: as there.
            gather: rows (N, D) → the rows (M, D) of all processes, and the place of this one's
                first row among them. None: there are no other processes.

        Returns:
            ().

        Raises:
            TypeError, ValueError: as there.
        """
        columns = of_one_dtype(*embeddings)
        for k, column in enumerate(columns):
            functional.check_rows(f"embeddings[{k}]", column, fewest=1 if gather is None else 0)
        if len(columns) < 2 or any(x.shape != columns[0].shape for x in columns):
            shapes = ", ".join(str(tuple(x.shape)) for x in columns)
            raise ValueError(f"embeddings must be two columns or more of one shape, got {shapes}")
        similarity = _SIMILARITIES.get(_name(self.similarity_fct))
        first, wide = columns[0], accumulation_dtype(columns[0].dtype)
        if similarity is None:
            row = torch.ones_like(first[:1])
            dtype = loss_dtype(
                first.dtype, first.device, lambda _: log_sum_exp(self.similarity_fct(row, row))
            )
            similarity_fct = as_called(self.similarity_fct, first.device)
            return self._in_blocks(columns, gather, similarity_fct).mean().to(dtype)
        # the package's two functions widen half precision
        dtype = loss_dtype(wide, first.device, log_sum_exp)
        if self._is_of_two_views(columns, gather):
            return alpha_cl_loss(
                *columns, temperature=1 / self.scale, similarity=similarity,
                negatives="cross_view", symmetric="doc_to_query" in self.directions,
            ).to(dtype)  # fmt: skip
        rows = [unit_rows(x) if similarity == "cosine" else x.to(wide) for x in columns]
        one_softmax = self._is_one_softmax()
        if is_small(len(first), len(first), first.device, one_softmax):
            losses = self._in_blocks(rows, gather, lambda x, y: x @ y.t())
        elif one_softmax:
            return self._softmax_of_queries(rows, gather, similarity).to(dtype)
        else:
            losses = self._row_losses(rows, gather, similarity)
        return losses.mean().to(dtype)

    def _is_of_two_views(self, columns: Sequence[Tensor], gather: Gather | None) -> bool:
        """Whether a softmax over the positives is all that there is."""
        one_softmax_each = set(self.directions) == {"query_to_doc"} or (
            set(self.directions) == {"query_to_doc", "doc_to_query"}
            and self.partition_mode == "per_direction"
        )
        return len(columns) == 2 and gather is None and not self._strength() and one_softmax_each

    def _is_one_softmax(self) -> bool:
        """Whether the loss is one softmax per query, in which no negative is treated as harder than
        the others.
        """
        return self.directions == ("query_to_doc",) and (
            not self._strength() or self.hardness_mode == "all_negatives"
        )

    def _softmax_of_queries(
        self, rows: list[Tensor], gather: Gather | None, similarity: str
    ) -> Tensor:
        """() the mean loss of queries against the documents of all, if `_is_one_softmax`."""
        queries, positives, *_ = rows
        everyones_queries, docs, first = _gathered(rows, gather)
        if not len(queries):  # this process takes part in all messages
            return zero_with_graph(everyones_queries, docs).expand(0).mean()
        own = (queries * positives).sum(1)
        ids = torch.arange(len(docs), device=own.device)  # a query's positive has its id
        share = self.scale / (self.scale + self._strength())
        if share != 1:
            queries, docs = _HeldGradient.apply(queries, share), _HeldGradient.apply(docs, share)
            own = own * share
        return loss_against_rows(
            queries, docs, own, functional.DEFAULTS["infonce"], similarity=similarity,
            temperature=share / self.scale, ids=ids[first : first + len(own)], negative_ids=ids,
            reduction="mean",
        )  # fmt: skip

    def _strength(self, *modes: str) -> float:
        """The hardness strength if it is used, or used for negatives of one of the modes."""
        used = self.hardness_mode in (modes or HARDNESS_MODES[1:])
        return self.hardness_strength if used else 0.0

    def _row_losses(self, rows: list[Tensor], gather: Gather | None, similarity: str) -> Tensor:
        """(N,) losses of rows whose inner products are the similarities.

        Every logit is taken relative to the anchor's own positive, whose logit is then 0; sums of
        exponentials are kept as logarithms.
        """
        queries, positives, *hard = rows
        everyones_queries, docs, first = _gathered(rows, gather)
        if not len(queries):  # this process takes part in all messages
            return zero_with_graph(everyones_queries, docs).expand(0)
        own = (queries * positives).sum(1)
        query_ids = torch.arange(len(everyones_queries), device=own.device)
        ids, doc_ids = query_ids[first : first + len(own)], query_ids.repeat(len(rows) - 1)
        alone = len(query_ids) == 1

        def others(x: Tensor, y: Tensor, y_ids: Tensor, strength: float = 0.0) -> list[Tensor]:
            """The sum over what belongs to other anchors, if there are any."""
            if alone:
                return []
            kept = self.scale / (self.scale + strength)
            x, y = _HeldGradient.apply(x, kept), _HeldGradient.apply(y, kept)
            return [
                loss_against_rows(
                    x, y, own * kept, LOG_SUM, similarity=similarity,
                    temperature=kept / self.scale, ids=ids, negative_ids=y_ids,
                )
            ]  # fmt: skip

        strength = self._strength("in_batch_negatives", "all_negatives")
        sums = {"query_to_doc": others(queries, docs, doc_ids, strength)}
        strength = self._strength("hard_negatives", "all_negatives")
        for column in hard:
            near = (queries * column).sum(1)
            sums["query_to_doc"].append(self.scale * (near - own) + strength * near.detach())
        if "query_to_query" in self.directions:
            sums["query_to_query"] = others(queries, everyones_queries, query_ids)
        if "doc_to_query" in self.directions:
            sums["doc_to_query"] = others(positives, everyones_queries, query_ids)
        if "doc_to_doc" in self.directions:
            sums["doc_to_doc"] = others(positives, docs, doc_ids)
        if self.partition_mode == "per_direction":
            return sum(_log_of_sum(1, x, own) for x in sums.values()) / len(sums)
        positive_pairs = 1 + ("doc_to_query" in sums)
        return _log_of_sum(positive_pairs, [x for part in sums.values() for x in part], own)

    def _in_blocks(
        self,
        columns: Sequence[Tensor],
        gather: Gather | None,
        similarity_fct: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """(N,) losses by matrices of the similarities of a block of queries."""
        queries, positives = columns[:2]
        everyones_queries, docs, first = _gathered(columns, gather)
        places = torch.arange(len(everyones_queries), device=queries.device)
        groups = places.repeat(len(columns) - 1)  # whose document it is
        near, far = (
            self._strength(mode, "all_negatives")
            for mode in ("hard_negatives", "in_batch_negatives")
        )

        def losses(block: slice) -> Tensor:
            mine = places[first + block.start : first + block.stop, None]
            x, d = queries[block], positives[block]
            similarities = similarity_fct(x, docs)
            logits = self.scale * similarities
            if near or far:
                is_hard = torch.arange(len(docs), device=x.device) >= len(places)
                strength = torch.where(groups == mine, near * is_hard, far)
                logits = logits + strength * similarities.detach()
            own = self.scale * similarities.gather(1, mine)  # no negative's strength counts
            # the positive's own logit is added at the end, as 0
            parts = {"query_to_doc": logits.scatter_(1, mine, torch.finfo(logits.dtype).min)}
            if "query_to_query" in self.directions:
                logits = self.scale * similarity_fct(x, everyones_queries)
                parts["query_to_query"] = logits.masked_fill(places == mine, -math.inf)
            if "doc_to_query" in self.directions:
                parts["doc_to_query"] = self.scale * similarity_fct(everyones_queries, d).t()
            if "doc_to_doc" in self.directions:
                logits = self.scale * similarity_fct(docs, d).t()
                parts["doc_to_doc"] = logits.masked_fill(groups == mine, -math.inf)
            if self.partition_mode == "joint" and len(parts) > 1:
                parts = {"joint": torch.cat([*parts.values()], 1)}
            own = own.squeeze(1)
            with_positive, *others = (p.logsumexp(1) - own for p in parts.values())
            with_positive = torch.logaddexp(with_positive, torch.zeros_like(with_positive))
            return sum(others, with_positive) / len(parts)

        return in_blocks(losses, len(queries), len(docs), queries.device)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as they stand in a model card."""
        return {
            "scale": self.scale,
            "similarity_fct": _name(self.similarity_fct),
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": self.hardness_mode,
            "hardness_strength": self.hardness_strength,
        }

    @property
    def temperature(self) -> float:
        """1/scale."""
        return 1.0 / self.scale

    @property
    def citation(self) -> str:
        """The BibTeX entry of the paper that the settings follow, for a model card."""
        if set(self.directions) == set(DIRECTIONS) and self.partition_mode == "joint":
            return _CITATIONS["all directions"]
        if set(self.directions) == {"query_to_doc", "doc_to_query"} and (
            self.partition_mode == "per_direction"
        ):
            return _CITATIONS["both directions"]
        return _CITATIONS["one direction"]


class MultipleNegativesSymmetricRankingLoss(MultipleNegativesRankingLoss):
    """`MultipleNegativesRankingLoss` in both directions, each with a softmax of its own.

    Args:
        model: as there.
        scale: 1/τ.
        similarity_fct: as there.
        gather_across_devices: as there.

    Raises:
        ValueError: an argument is out of range.

    Source: arXiv:2310.19923.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = cos_sim,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(
            model, scale, similarity_fct, gather_across_devices,
            directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction",
        )  # fmt: skip


class _HeldGradient(torch.autograd.Function):
    """The rows themselves, with a share of their gradient: the rest of a logit is a constant."""

    @staticmethod
    def forward(ctx, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.share, None


def _gathered(columns: Sequence[Tensor], gather: Gather | None) -> tuple[Tensor, Tensor, int]:
    """The queries and the documents of all processes, and where this one's queries begin."""
    if gather is None:
        return columns[0], columns[1] if len(columns) == 2 else torch.cat(columns[1:]), 0
    rows, first = gather(torch.cat(tuple(columns), 1))  # one message
    queries, *docs = rows.chunk(len(columns), 1)
    return queries, torch.cat(docs), first


def _log_of_sum(positive_pairs: int, logarithms: list[Tensor], own: Tensor) -> Tensor:
    """log(positive_pairs + Σ exp(x)); the positives' own logits are 0."""
    constant = zero_with_graph(own) + math.log(positive_pairs)
    return torch.stack([constant.expand_as(own), *logarithms]).logsumexp(0)


def _embedded(model: nn.Module, columns: list[dict[str, Tensor]]) -> list[Tensor]:
    """(N, D) embeddings of every column; a model of the package's takes them together."""
    if "sentence_transformers" in sys.modules:
        try:
            from sentence_transformers.base.losses.merged_forward import embed_columns
        except ImportError:  # a release before 6
            pass
        else:
            return embed_columns(model, columns)
    return [model(column)["sentence_embedding"] for column in columns]


def _name(function: Callable[..., Tensor]) -> str:
    """The name of a similarity function, with the arguments that are bound to it."""
    if isinstance(function, partial):
        bound = ", ".join(f"{key}={value!r}" for key, value in function.keywords.items())
        return _name(function.func) + (f"({bound})" if bound else "")
    name = getattr(function, "__name__", type(function).__name__)
    owner = getattr(function, "__self__", None)
    if name == "similarity" and hasattr(owner, "similarity_fn_name"):
        chosen = str(getattr(owner.similarity_fn_name, "value", owner.similarity_fn_name))
        return _OF_A_MODEL.get(chosen, f"{chosen}_sim")
    return name


_CITATIONS = {
    "one direction": """
@misc{oord2019representationlearningcontrastivepredictive,
      title={Representation Learning with Contrastive Predictive Coding},
      author={Aaron van den Oord and Yazhe Li and Oriol Vinyals},
      year={2019},
      eprint={1807.03748},
      archivePrefix={arXiv},
      primaryClass={cs.LG},
      url={https://arxiv.org/abs/1807.03748},
}
""",
    "both directions": """
@misc{günther2024jinaembeddings28192token,
      title={Jina Embeddings 2: 8192-Token General-Purpose Text Embeddings for Long Documents},
      author={Michael Günther and others},
      year={2024},
      eprint={2310.19923},
      archivePrefix={arXiv},
      primaryClass={cs.CL},
      url={https://arxiv.org/abs/2310.19923},
}
""",
    "all directions": """
@misc{li2023generaltextembeddingsmultistage,
      title={Towards General Text Embeddings with Multi-stage Contrastive Learning},
      author={Zehan Li and Xin Zhang and Yanzhao Zhang and others},
      year={2023},
      eprint={2308.03281},
      archivePrefix={arXiv},
      primaryClass={cs.CL},
      url={https://arxiv.org/abs/2308.03281},
}
""",
}
