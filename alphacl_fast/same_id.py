"""Losses from the pairs of an anchor and the rows of its own id, without a matrix of all pairs.

Once the rows are sorted by id, these pairs are blocks on the diagonal, so a loss over them costs
what the groups cost: a class of k rows has k² pairs. A `Formula` says what a loss makes of the
similarities of a block; this module walks over the blocks, and differentiates.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import first_derivative, for_each_gradient, only_once
from .backend import cpu_groups
from .call import without_autocast


class BlockSize(NamedTuple):
    """How many anchors a block has."""

    least: int  # small groups are put together
    most: int  # a larger group is cut


BLOCK_SIZES = {"cpu": BlockSize(64, 512)}
BLOCK_SIZE_OF_A_DEVICE = BlockSize(512, 2048)


class Block(NamedTuple):
    """The similarities of b anchors and of the c other rows that hold all their positives."""

    t: Tensor  # (b, c) inner products; a formula may write to them
    excluded: Tensor  # (b, c) bool: the other row has another id, or is the anchor itself
    count: Tensor  # (b,) positives of an anchor in the dtype of t, at least 1
    needed: tuple[bool, ...]  # the vectors whose derivatives are wanted


class Outcome(NamedTuple):
    """What a `Formula` makes of a block."""

    loss: Tensor  # (b,); what an anchor without positives has is dropped
    dt: Tensor  # (b, c) ∂loss/∂t divided by the scale, 0 at excluded pairs
    scale: Tensor | float  # (b,), or one number
    dvectors: tuple[Tensor | None, ...]  # (b,) ∂loss/∂vector each; None: it has no gradient


#: (block, *vectors (b,)) → what a block contributes.
Formula = Callable[..., Outcome]


class Compiled(NamedTuple):
    """A formula of the vectors ℓ, origin and τ that `backend.cpu_groups` has compiled."""

    form: int
    bounded: bool
    tau: float


class Groups(NamedTuple):
    """Which of the other rows have the id of an anchor, with both sorted by id."""

    anchors: Tensor  # (n,) indices of the anchors, in the order of their ids
    others: Tensor  # (m,) indices of the other rows, likewise
    first: Tensor  # (n,) of the anchors in order: where a group begins among the others
    last: Tensor  # (n,) where it ends
    first_of_others: Tensor  # (m,) of the others in order: where their own group begins
    own: Tensor | None  # (n,) the place of the anchor itself; None: it is not among the others
    count: Tensor  # (n,) positives of the anchors as they were given

    @classmethod
    def among(cls, ids: Tensor) -> Groups:
        """Of rows with ids (n,) that are anchors and other rows at once."""
        in_order, order = ids.sort(stable=True)
        places = torch.arange(len(ids), device=ids.device)
        return cls._make_groups(in_order, order, in_order, order, places)

    @classmethod
    def between(cls, ids: Tensor, other_ids: Tensor, own: Tensor | None = None) -> Groups:
        """Of anchors with ids (n,) and other rows with ids (m,).

        ``own`` (n,): the other row that is the anchor itself, where there is one.
        """
        # neither dtype need hold the ids of the other
        dtype = torch.promote_types(ids.dtype, other_ids.dtype)
        in_order, order = ids.to(dtype).sort(stable=True)
        others_in_order, other_order = other_ids.to(dtype).sort(stable=True)
        places = None
        if own is not None:
            place = torch.empty_like(other_order)
            place[other_order] = torch.arange(len(other_order), device=ids.device)
            places = place[own[order]]
        return cls._make_groups(in_order, order, others_in_order, other_order, places)

    @classmethod
    def _make_groups(
        cls,
        ids: Tensor,
        anchors: Tensor,
        other_ids: Tensor,
        others: Tensor,
        own: Tensor | None,
    ) -> Groups:
        first = torch.searchsorted(other_ids, ids)
        last = torch.searchsorted(other_ids, ids, right=True)
        in_order = last - first - int(own is not None)
        count = torch.empty_like(in_order)
        count[anchors] = in_order
        first_of_others = torch.searchsorted(other_ids, other_ids)
        return cls(anchors, others, first, last, first_of_others, own, count)

    @property
    def has_positive(self) -> Tensor:
        """(n,) bool."""
        return self.count > 0

    @property
    def has_negative(self) -> Tensor:
        """(n,) bool: some other row has another id."""
        return self.count + int(self.own is not None) < len(self.others)

    @torch.no_grad()
    def mean_similarity(self, anchors: Tensor, others: Tensor | None = None) -> Tensor:
        """(n,) mean inner product of an anchor with its positives, 0 without one; a constant.

        The others are None if they are the anchors. It costs O((n + m)·D).
        """
        rows = (anchors if others is None else others).index_select(0, self.others)
        sums = torch.zeros_like(rows).index_add_(0, self.first_of_others, rows)
        mine = anchors.index_select(0, self.anchors)
        total = sums.index_select(0, self.first.clamp(max=len(rows) - 1))
        if self.own is not None:
            total -= rows.index_select(0, self.own)
        count = self.count[self.anchors]
        mean = (mine * total).sum(1) / count.clamp(min=1)
        return unsorted(torch.where(count > 0, mean, 0.0), self.anchors)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Anchors and the other rows that their groups span, both in order.

        The host waits for the ends of the groups. A block holds whole groups, unless a group is too
        large.
        """
        device = self.anchors.device
        size = BLOCK_SIZES.get(device.type, BLOCK_SIZE_OF_A_DEVICE)
        ends = torch.searchsorted(self.first, self.first, right=True)
        spans = [*_packed(torch.unique_consecutive(ends).tolist(), size)]
        if not spans:
            return
        starts, last = ([span[k] - k for span in spans] for k in (0, 1))
        low, high = self.first[starts].tolist(), self.last[last].tolist()
        for (i0, i1), j0, j1 in zip(spans, low, high, strict=True):
            if j1 > j0:
                yield slice(i0, i1), slice(j0, j1)


def _packed(ends: list[int], size: BlockSize) -> Iterator[tuple[int, int]]:
    """Ranges of anchors, from the ends of their groups."""
    start = begin = 0  # of the block, of the group
    for end in ends:
        if start < begin and end - begin >= size.least:  # a large group has a block of its own
            yield start, begin
            start = begin
        begin = end
        if end - start > size.most:
            cuts = [*range(start, end, size.least), end]
            yield from itertools.pairwise(cuts)
            start = end
        elif end - start >= size.least:
            yield start, end
            start = end
    if start < begin:
        yield start, begin


class _Sorted:
    """Rows and vectors in the order of their ids, and the walk over the blocks."""

    def __init__(
        self,
        anchors: Tensor,
        others: Tensor | None,
        vectors: tuple[Tensor, ...],
        call: _Call,
    ) -> None:
        self.groups = groups = call.groups
        self.formula, self.compiled, self.needed = call.formula, call.compiled, call.needed
        self.anchors = anchors.index_select(0, groups.anchors)
        self.others = self.anchors if others is None else others.index_select(0, groups.others)
        self.vectors = [x[groups.anchors] for x in vectors]
        self.same = others is None
        count = groups.count[groups.anchors]
        self.usable, self.count = count > 0, count.clamp(min=1).to(anchors.dtype)
        #: where the group of an anchor begins among the others; −1: none of them has its id
        self.group = torch.where(groups.last > groups.first, groups.first, -1)

    def outcomes(self, weight: Tensor | None = None) -> Iterator[tuple[slice, slice, Outcome]]:
        """Of every block: its anchors and others in order.

        A compiled formula multiplies the derivatives in t by the ``weight`` of the anchors.
        """
        if self.compiled is not None:
            yield from self._of_compiled(weight)
            return
        groups = self.groups
        for i, j in groups.blocks():
            excluded = self.group[i, None] != groups.first_of_others[j]
            if self.same:
                excluded.diagonal(i.start - j.start).fill_(True)
            elif groups.own is not None:
                place = torch.arange(j.start, j.stop, device=excluded.device)
                excluded |= place == groups.own[i, None]
            t = self.anchors[i] @ self.others[j].t()
            block = Block(t, excluded, self.count[i], self.needed)
            outcome = self.formula(block, *(x[i] for x in self.vectors))
            if weight is not None:
                outcome.dt.mul_((weight[i] * outcome.scale)[:, None])
            yield i, j, outcome

    def _of_compiled(self, weight: Tensor | None) -> Iterator[tuple[slice, slice, Outcome]]:
        groups, (form, bounded, tau) = self.groups, self.compiled
        log_sums, origin, _ = (x.contiguous() for x in self.vectors)
        found = [torch.empty_like(log_sums) for _ in range(3)]
        own = groups.own
        for i, j in groups.blocks():
            t = self.anchors[i] @ self.others[j].t()
            of_block = None if weight is None else weight[i]
            loss, of_log_sums, of_tau = (x[i] for x in found)
            cpu_groups.differentiate(
                form, bounded, tau, t=t, first=groups.first[i] - j.start,
                last=groups.last[i] - j.start, own=None if own is None else own[i] - j.start,
                log_sums=log_sums[i], origin=origin[i], weight=of_block,
                loss=loss, of_log_sums=of_log_sums, of_tau=of_tau,
            )  # fmt: skip
            dvectors = of_log_sums, None, of_tau if self.needed[2] else None
            yield i, j, Outcome(loss, t, 1.0, dvectors)

    def losses(self) -> Tensor:
        """(n,) losses, 0 for an anchor without a positive."""
        out = torch.zeros_like(self.count)
        for i, _, outcome in self.outcomes():
            out[i] = outcome.loss
        return self._of_anchors(out)

    def gradients(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Σ_i weight_i·loss_i, and its derivatives in the anchors, the others and the vectors.

        If the others are the anchors, their derivative is None, and the first one is for both.
        """
        weight = torch.where(self.usable, weight[self.groups.anchors], 0.0)
        losses = torch.zeros_like(self.count)
        d_anchors = torch.zeros_like(self.anchors)
        d_others = d_anchors if self.same else torch.zeros_like(self.others)
        d_vectors = [torch.zeros_like(x) for x in self.vectors]
        for i, j, outcome in self.outcomes(weight):
            losses[i] = outcome.loss
            dt = outcome.dt
            if self.same and i == j:
                d_anchors[i].addmm_(dt + dt.t(), self.anchors[i])
            else:
                d_anchors[i].addmm_(dt, self.others[j])
                d_others[j].addmm_(dt.t(), self.anchors[i])
            for out, dv in zip(d_vectors, outcome.dvectors, strict=True):
                if dv is not None:
                    out[i] = dv
        total = (torch.where(self.usable, losses, 0.0) * weight).sum()
        of_others = None if self.same else unsorted(d_others, self.groups.others)
        of_vectors = (self._of_anchors(x * weight) for x in d_vectors)
        return total, unsorted(d_anchors, self.groups.anchors), of_others, *of_vectors

    def _of_anchors(self, x: Tensor) -> Tensor:
        """(n,) as the anchors were given; 0, which may replace NaN, without a positive."""
        return unsorted(torch.where(self.usable, x, 0.0), self.groups.anchors)


def unsorted(x: Tensor, order: Tensor) -> Tensor:
    """The rows that were taken in this order, where they were before."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return x.index_select(0, place)


def losses_of_groups(
    anchors: Tensor,
    others: Tensor | None,
    groups: Groups,
    formula: Formula,
    *vectors: Tensor,
    weight: Tensor | None = None,
    compiled: Compiled | None = None,
) -> Tensor:
    """(n,) losses of the formula, 0 for an anchor without a positive; or their weighted sum.

    Args:
        anchors: (n, D) in the accumulation dtype.
        others: (m, D); None: the anchors themselves.
        groups: which of the others are an anchor's positives.
        formula: the loss of an anchor from its block.
        *vectors: (n,) more arguments of the formula.
        weight: (n,) constants; gives Σ_i weight_i·loss_i in one walk for loss and gradient.
        compiled: the same formula in C++, for rows in the memory of the host.

    Returns:
        (n,), or () with ``weight``. Gradients flow to anchors, others and vectors.
    """
    inputs = [x for x in (anchors, others, *vectors) if x is not None]
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    needed = tuple(wanted and x.requires_grad for x in vectors)
    call = _Call(groups, formula, compiled, wanted, needed)
    return _LossesOfGroups.apply(anchors, others, weight, call, *vectors)[0]


class _Call(NamedTuple):
    groups: Groups
    formula: Formula
    compiled: Compiled | None
    wanted: bool  # whether any gradient is
    needed: tuple[bool, ...]  # whether each vector's gradient is


class _LossesOfGroups(torch.autograd.Function):
    """With a weight the forward computes the gradient too; without one the backward does."""

    @staticmethod
    def forward(
        anchors: Tensor,
        others: Tensor | None,
        weight: Tensor | None,
        call: _Call,
        *vectors: Tensor,
    ) -> tuple[Tensor | None, ...]:
        with without_autocast(anchors.device):
            walk = _Sorted(anchors, others, vectors, call)
            if weight is None:
                return (walk.losses(),)
            if not call.wanted:
                return ((walk.losses() * weight).sum(),)
            return walk.gradients(weight)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        anchors, others, weight, ctx.call, *vectors = inputs
        ctx.weighted = weight is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(output[1:] if ctx.weighted else (anchors, others, *vectors)))

    @staticmethod
    def backward(ctx, grad: Tensor | None, *of_saved: Tensor | None) -> tuple[Tensor | None, ...]:
        call = ctx.call
        if not first_derivative(grad, of_saved):
            return (None,) * (4 + len(call.needed))
        tensors = ctx.saved_tensors
        with without_autocast(grad.device):
            if ctx.weighted:  # as in `autograd.scaled`
                found = tuple(x if x is None else x * grad for x in tensors)
            else:
                run = partial(_LossesOfGroups._gradients, call, tensors)
                with torch.no_grad():
                    found = for_each_gradient(run, grad)
                found = only_once(found, (grad, *tensors))
        d_anchors, d_others, *rest = found
        return d_anchors, d_others, None, None, *rest

    @staticmethod
    def _gradients(
        call: _Call, tensors: tuple[Tensor | None, ...], grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Those of the tensors, for the gradient of every loss."""
        anchors, others, *vectors = tensors
        return _Sorted(anchors, others, vectors, call).gradients(grad)[1:]
