"""One batch over many processes: every rank passes its own pairs and gets the loss of all of them.

Each rank differentiates Σ_r L_r: `FusedAlphaCLLoss(process_group=…)` gives rank r of P the
derivative of Σ_r′ L_r′ in its own rows. With "mean" and "sum" every L_r′ is the loss of the whole
batch, so the gradient is P times a single process's. DDP and FSDP average the parameters'
gradients, which makes them exact.

**No pair is computed twice.** A rank holds one block of rows. Block b meets itself and the
blocks b + 1, …, b + ⌊P/2⌋ (mod P) at rank b; with P even, blocks that are P/2 apart meet half at
one rank and half at the other. Two blocks meet in a rectangle whose sides are both anchors, so one
tile serves both ranks.

**Two strategies.** "gather": every rank receives all rows at once (all-gather), and results go home
by reduce-scatter; O(n·D) memory, few messages. "ring": a block travels from rank to rank against
their order, the next one arriving while one is at work, and its results travel behind it, last of
all home; O(local·D) memory. Row scalars stay with their rows in both, so an objective solves its
own anchors and sees only the `Pairs` protocol.

``torchrun --nproc-per-node=4 -m alphacl_fast.verify`` checks a machine or a cluster.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops
from .autograd import (
    AlphaCLFunction,
    Features,
    Need,
    Problem,
    Saved,
    Sweeps,
    closed_form,
    first_derivative,
    only_once,
)
from .backend import forms
from .bundles import (
    PairFunction,
    Pairing,
    Rows,
    RowScalars,
    Term,
    Weight,
    accumulation_dtype,
    leading,
)
from .call import BoundCall, Guide, Layout, Loss, SameId, without_autocast
from .objectives import ClosedForm
from .plan import aligned, recommended_ring, steps
from .process_groups import (
    Arrival,
    OwnGroup,
    Peers,
    ProcessGroup,
    Statement,
    brief,
    described,
    exchange,
    outside_transforms,
    require_same,
    values_of,
)

#: "auto" gathers while all rows of the batch and their gradient together take no more bytes than
#: this.
GATHER_BYTES = 256 * 2**20


# --- the processes --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks(Peers):
    """The ranks of one call, once they have agreed on it, and the messages between them.

    Attributes:
        sizes: pairs of each process, in the order of the ranks.
        want: whether any rank wants the gradient in z1, z2, τ. All do the same work, so that none
            waits.
        strategy: "gather", "ring" or "two_level".
        ids: (pairs of all processes,) int32, numbered from 0.
        guide: of this process's rows and anchors.
        own: the group that the messages travel in.
        per_node: ranks of a node, for "two_level".
    """

    sizes: tuple[int, ...]
    want: Need
    strategy: str
    ids: Tensor | None = None
    guide: Guide | None = None
    own: OwnGroup | None = field(default=None, kw_only=True)
    per_node: int = field(default=1, kw_only=True)

    @property
    def total(self) -> int:
        """Pairs of all processes."""
        return sum(self.sizes)

    def problem(self, z1: Tensor, z2: Tensor, tau: Tensor, call: BoundCall) -> Problem:
        """This process's part of the batch."""
        features, pos = Features.of_views(z1, z2, call, _center(z1, z2, call))
        return GlobalProblem(features, pos, tau, call)

    def node(self) -> Peers:
        """The ranks of this process's node."""
        handle = self.own.node(self.per_node)
        return Peers(
            handle, self.rank % self.per_node, self.per_node, call=self.call, number=self.number
        )

    def ids_of(self, rank: int) -> Tensor:
        """(pairs of a process,)."""
        return self.ids.split(self.sizes)[rank]

    def same_id(self, call: Loss, dtype: torch.dtype) -> SameId | None:
        """For the rows of this process, whose negatives are the rows of all processes."""
        if self.ids is None:
            return None
        own = self.ids_of(self.rank)
        layout = Layout.of(call, len(own))
        views = 2 if call.negatives == "two_view" else 1
        sizes = torch.zeros_like(self.ids).index_add(0, self.ids, torch.ones_like(self.ids))
        n_neg = views * (self.total - sizes[own]).repeat(2)[: layout.anchors]
        ids = own.repeat(2)[: layout.rows]
        return SameId(ids, n_neg.clamp(min=1).to(dtype), n_neg == 0)

    def with_ids(self, ids: Tensor | None) -> Ranks:
        """The ranks with the ids of all pairs; ``ids`` (pairs,) belong to this process's pairs."""
        if ids is None:
            return self
        padded = ids.new_zeros(max(self.sizes), dtype=torch.int64)
        padded[: len(ids)] = ids
        rows = self.all_gather(padded)
        everyone = torch.cat([row[:n] for row, n in zip(rows, self.sizes, strict=True)])
        numbers = everyone.unique(return_inverse=True)[1].to(torch.int32)
        return replace(self, ids=numbers)

    def problem_of_saved(self, saved: Saved, tau: Tensor, call: BoundCall) -> Problem:
        return GlobalProblem(saved.features, saved.pos, tau, call)


# --- agreeing on a call ---------------------------------------------------------------------------


class LeftOut(NamedTuple):
    """What excludes negatives of this process's pairs, besides `max_gap`, which the call has."""

    ids: Tensor | None = None  # (pairs,) integers
    guide: Guide | None = None
    guide_margin: float = 0.0

    def __str__(self) -> str:
        """What must be the same on every rank."""
        parts = ["no ids" if self.ids is None else "ids"]
        if self.guide is not None:
            width = self.guide.rows.shape[1]
            parts.append(f"guide of width {width}, guide_margin={self.guide_margin}")
        return ", ".join(parts)


def agree(
    group: ProcessGroup,
    z1: Tensor,
    z2: Tensor,
    tau: Tensor | None,
    call: BoundCall | None,
    failure: Exception | None,
    left_out: LeftOut | None = None,
) -> Ranks:
    """One small all-gather, after which either all ranks go on with the same call or all raise the
    same error.

    Args:
        failure: the error of this rank's arguments; the other arguments may then be anything.

    Raises:
        TypeError, ValueError, RuntimeError: on every rank; names the ranks whose arguments are bad,
            or differ.
    """
    left_out = left_out or LeftOut()
    agreed = exchange(
        group,
        (0 if failure else len(z1), 0),
        lambda own: _statement(own, group, z1, z2, tau, call, left_out),
        failure,
        None if failure else z1.device,
    )
    own, sizes = agreed.own, tuple(pairs for pairs, _ in agreed.counts)
    first, *others = agreed.statements
    for r, other in enumerate(others, 1):
        if other is not first:
            _require_same_call(first, other, r, call)
    if sum(sizes) < 1:
        raise ValueError(f"all ranks together must have at least 1 pair, got {sizes}")
    want = Need(*map(any, zip(*(each.wanted for each in agreed.statements), strict=True)))
    # nodes of different sizes are no hindrance to a strategy that is free to do without them
    per_node = first.per_node if len({each.per_node for each in agreed.statements}) == 1 else None
    strategy, guide = group.strategy, left_out.guide
    if strategy == "auto":
        strategy = auto_strategy(
            sum(sizes), z1.shape[1], z1.dtype, call.negatives,
            ranks=own.world, ranks_per_node=per_node, device=z1.device.type,
            guide_dim=0 if guide is None else guide.rows.shape[1],
        )  # fmt: skip
    ranks = Ranks(
        own.handle, own.rank, own.world, sizes, want, strategy, guide=guide,
        own=own, per_node=per_node or 1, call=brief(first), number=agreed.number,
    )  # fmt: skip
    with outside_transforms():
        return ranks.with_ids(left_out.ids)


def _require_same_call(first: Statement, other: Statement, rank: int, call: BoundCall) -> None:
    """Raises unless rank 0 and another rank state calls that fit together."""
    require_same("number of features D", first.dim, other.dim, rank)
    require_same("dtype", first.dtype, other.dtype, rank)
    require_same("call", first.text, other.text, rank)
    names = ("temperature",) if len(first.temperature) == 1 else ("scale", "bias")
    for name, here, there in zip(names, first.temperature, other.temperature, strict=True):
        if abs(here - there) > 1e-6 * abs(here):  # false for NaN
            require_same(name, here, there, rank)
    here, there = any(first.wanted), any(other.wanted)
    if call.reduction == "none" and here != there:
        raise ValueError(
            "with reduction='none' every rank must want a gradient or none (the backward is a "
            f"common step), got {here} on rank 0 and {there} on rank {rank}"
        )
    if "strategy='two_level'" in first.text:
        require_same("ranks_per_node", first.per_node, other.per_node, rank)


def _statement(
    own: OwnGroup,
    group: ProcessGroup,
    z1: Tensor,
    z2: Tensor,
    tau: Tensor,
    call: BoundCall,
    left_out: LeftOut,
) -> Statement:
    known = tuple(math.nan if x is None else x for x in call.known)
    text = (
        f"{call.objective}, similarity={call.similarity!r}, negatives={call.negatives!r}, "
        f"symmetric={call.symmetric}, reduction={call.reduction!r}, strategy={group.strategy!r}, "
        f"ranks_per_node={group.ranks_per_node}, max_gap={call.max_gap}, {left_out}"
    )
    return Statement(
        None,
        described(text),
        z1.shape[1],
        z1.dtype,
        z1.device.type,
        Need.of(z1, z2, tau),
        known,
        group.per_node(own),
        values_of(call.objective),
    )


def auto_strategy(
    pairs: int,
    dim: int,
    dtype: torch.dtype,
    negatives: str,
    *,
    ranks: int = 1,
    ranks_per_node: int | None = None,
    device: str = "cuda",
    guide_dim: int = 0,
) -> str:
    """The strategy for a batch of this many pairs.

    Args:
        ranks_per_node: None if it is not known.
        device: type of the embeddings' device.
        guide_dim: features of a guide, whose rows are gathered too.
    """
    rows, wide = pairs if negatives == "one_view" else 2 * pairs, accumulation_dtype(dtype).itemsize
    if rows * (dim * (dtype.itemsize + wide) + guide_dim * wide) <= GATHER_BYTES:
        return "gather"
    if ranks_per_node is None or not 1 < ranks_per_node < ranks:
        return "ring"
    return recommended_ring(pairs, dim, ranks, ranks_per_node, dtype, negatives, device)


# --- who computes which pairs ---------------------------------------------------------------------


def meetings(
    rank: int, other: int, world: int, negatives: str, sizes: Sequence[int] | dict[int, int]
) -> list[tuple[slice, slice, bool]]:
    """Rectangles of block ``rank`` and block ``other`` that rank ``rank`` computes.

    Returns:
        (own rows, other's rows, whether the own rows are the rectangle's left side).
    """
    shared = 2 * ((other - rank) % world) == world  # the other process holds both blocks too
    n, m = sizes[rank], sizes[other]
    if negatives == "cross_view":  # left is z1, right is z2
        first = (slice(0, n), slice(m, 2 * m), True)
        return [first] if shared else [first, (slice(n, 2 * n), slice(0, m), False)]
    views = 2 if negatives == "two_view" else 1
    n, m = views * n, views * m
    if not shared:
        return [(slice(0, n), slice(0, m), True)]
    if rank < other:
        return [(slice(0, n), slice(0, m // 2), True)]
    return [(slice(n // 2, n), slice(0, m), True)]


# --- blocks and their results ---------------------------------------------------------------------


class Limits(NamedTuple):
    """What a pair must not exceed to count for an anchor; see `bundles.Pairing`."""

    largest_t: Tensor | None = None  # (anchors,)
    largest_guide: Tensor | None = None  # (anchors,)


class Marks(NamedTuple):
    """What is compared of two rows, besides their similarity."""

    ids: Tensor | None = None  # (n,) int32; not sent, because every process has the ids of all rows
    guide: Tensor | None = None  # (n, G)


class Block(NamedTuple):
    """One process's rows with their row scalars and limits, one for each of the first rows, or one
    per row.
    """

    rows: Rows
    scalars: RowScalars
    limits: Limits
    marks: Marks

    @property
    def of_anchors(self) -> tuple[Tensor | None, ...]:
        """What a message holds for every anchor."""
        return *self.scalars, *self.limits

    @property
    def of_rows(self) -> tuple[Tensor | None, ...]:
        """What a message holds for every row; the rows come last, because they may be narrow."""
        f, *others = self.rows
        return self.marks.guide, *others, f

    @classmethod
    def of_message(
        cls,
        of_anchors: Sequence[Tensor | None],
        of_rows: Sequence[Tensor | None],
        ids: Tensor | None,
    ) -> Block:
        """The block whose properties of these names are given."""
        count, (guide, *others, f) = len(RowScalars._fields), of_rows
        scalars, limits = RowScalars(*of_anchors[:count]), Limits(*of_anchors[count:])
        return cls(Rows(f, *others), scalars, limits, Marks(ids, guide))

    @property
    def n_rows(self) -> int:
        return self.rows.f.shape[0]

    @property
    def anchors(self) -> int:
        return self.scalars.moment_origin.shape[0]

    def part(self, where: slice) -> Block:
        return Block(
            *(type(bundle)(*(None if x is None else x[where] for x in bundle)) for bundle in self)
        )

    @staticmethod
    def join(blocks: list[Block]) -> Block:
        """The blocks' rows, stacked; an operator needs the anchors first."""

        def stack(tensors: Iterable[Tensor | None]) -> Tensor | None:
            tensors = list(tensors)
            return None if tensors[0] is None else torch.cat(tensors)

        return Block(*(
            type(bundles[0])(*(stack(column) for column in zip(*bundles, strict=True)))
            for bundles in zip(*blocks, strict=True)
        ))  # fmt: skip


def pack(tensors: Iterable[Tensor | None]) -> Tensor:
    """The bytes of some tensors as one message.

    Wide dtypes come first, so that they are aligned when unpacked.
    """
    whole = (x.contiguous() for x in tensors if x is not None)
    # An expanded single number counts as contiguous, but cannot be viewed as bytes.
    dense = (
        x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format) for x in whole
    )
    return torch.cat([x.view(-1).view(torch.uint8) for x in dense])


def unpack(message: Tensor, like: list[tuple[Tensor | None, int]]) -> list[Tensor | None]:
    """Views of a message as tensors, each like a given one except for its number of rows."""
    tensors, start = [], 0
    for x, rows in like:
        if x is None:
            tensors.append(None)
            continue
        stop = start + _bytes(x, rows)
        tensors.append(message[start:stop].view(x.dtype).view(rows, *x.shape[1:]))
        start = stop
    return tensors


def _bytes(x: Tensor | None, rows: int) -> int:
    """The size of a tensor like x with this many rows."""
    return 0 if x is None else rows * math.prod(x.shape[1:]) * x.element_size()


class Result:
    """Sums and gradient rows of one block, as views of one flat tensor that can travel in one
    message.

    Attributes:
        sums: (terms, anchors); df: (rows, D) and weight_sums: (rows,), both with 0 rows where not
            wanted.
    """

    def __init__(self, sweep: _Sweep, layout: Layout, flat: Tensor) -> None:
        self.flat, self.terms = flat, sweep.terms
        sums, df, self.weight_sums = flat.split(sweep.sizes(layout))
        self.sums = sums.view(len(sweep.terms), layout.anchors)
        self.df = df.view(sweep.gradient_rows(layout), sweep.dim)

    def add_sums(self, sums: Tensor, anchors: slice) -> None:
        """Merges sums over other negatives of some anchors."""
        into = self.sums[:, anchors]
        if leading(self.terms) == Term.T_MAX:
            torch.maximum(into, sums, out=into)
        elif leading(self.terms) == Term.SHIFT:
            shift = torch.maximum(into[0], sums[0])
            forms.rescale(into[0], into[1:], shift)
            into[1:] += sums[1:] * (sums[0] - forms.finite(shift)).exp()
        else:
            into += sums

    def add(self, other: Result) -> None:
        """Merges another result of the same rows."""
        self.add_sums(other.sums, slice(None))
        self.df += other.df
        self.weight_sums += other.weight_sums


@dataclass(frozen=True)
class _Sweep:
    """One sweep over all pairs: `row_sums`, or `pair_grad` where there is a weight."""

    function: PairFunction
    call: BoundCall
    terms: tuple[Term, ...]
    weight: Weight | None
    want: Need
    dim: int
    euclidean: bool

    def sizes(self, layout: Layout) -> tuple[int, int, int]:
        """Elements of the three parts of a block's result."""
        rows = self.gradient_rows(layout)
        return len(self.terms) * layout.anchors, rows * self.dim, rows if self.euclidean else 0

    def size(self, layout: Layout) -> int:
        return sum(self.sizes(layout))

    def gradient_rows(self, layout: Layout) -> int:
        return layout.rows if self.weight is not None and self.want.views else 0

    def nothing(self, layout: Layout, zeros: Tensor) -> Result:
        """A block's result before anything is added to it."""
        result = Result(self, layout, zeros)
        if leading(self.terms) is not None:
            result.sums[0].fill_(-torch.inf)
        return result

    def add(
        self, block: Block, split: int, partner: int, into: list[tuple[Result, slice, int]]
    ) -> None:
        """Runs the operator on a block's triangle or rectangle and adds its output to the results
        of the parts.

        Args:
            into: for consecutive rows of the block: their result, their rows in it, and the number
                of anchors.
        """
        (largest_t, largest_guide), (ids, guide) = block.limits, block.marks
        pairing = Pairing(
            split,
            partner,
            block.anchors,
            ids,
            largest_t=largest_t,
            guide=guide,
            largest_guide=largest_guide,
        )
        operands = block.rows, pairing, self.function, block.scalars
        served = self.call.precision, self.call.backend
        if self.weight is None:
            sums = ops.row_sums(*operands, self.terms, *served)
            lo = hi = 0
        else:
            lo, hi = (0, block.n_rows) if self.want.views else (0, 0)
            # the product for a tower that needs no gradient is left out
            if self.call.negatives == "cross_view":
                lo, hi = (0 if self.want.z1 else split), (block.n_rows if self.want.z2 else split)
            df, weight_sums, sums = ops.pair_grad(
                *operands, self.weight, self.terms, (lo, hi), *served
            )
        row = anchor = 0
        for result, rows, anchors in into:
            count = rows.stop - rows.start
            if anchors and self.terms:
                result.add_sums(
                    sums[:, anchor : anchor + anchors], slice(rows.start, rows.start + anchors)
                )
            first, last = max(row, lo), min(row + count, hi)
            if first < last:
                here = slice(rows.start + first - row, rows.start + last - row)
                result.df[here] += df[first - lo : last - lo]
                if self.euclidean:
                    result.weight_sums[here] += weight_sums[first:last]
            row, anchor = row + count, anchor + anchors


class GlobalSweeps(Sweeps):
    """The sweeps of this rank's anchors against the negatives of all ranks."""

    def __init__(self, rows: Rows, pos: Tensor, tau: Tensor, call: BoundCall) -> None:
        ranks = call.ranks
        n_neg = Layout.of(call, ranks.total).n_neg
        layout = Layout.of(call, pos.shape[0] // 2)._replace(n_neg=n_neg)
        same_id = ranks.same_id(call, tau.dtype)
        super().__init__(rows, pos, tau, call, layout, same_id, ranks.guide)
        self.divisor = call.divisor(ranks.total)
        self.ranks = ranks
        self.layouts = [Layout.of(call, n) for n in ranks.sizes]
        self._gathered: Tensor | None = None

    def row_sums(
        self, terms: tuple[Term, ...], scalars: RowScalars, function: PairFunction | None = None
    ) -> Tensor:
        return self._sweep(terms, None, scalars, function).sums

    def pair_grad(
        self, weight: Weight, terms: tuple[Term, ...], scalars: RowScalars, wanted: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.ranks.want.views and not terms:
            return self.nothing()
        result = self._sweep(terms, weight, scalars)
        return result.df[slice(*wanted)], result.weight_sums, result.sums

    def mean_negative(self) -> Tensor:
        return self._mean(1)  # as if there were no ids: it only starts an iteration

    def ids_of(self, rank: int) -> Tensor | None:
        """The ids of a process's rows."""
        if self.ranks.ids is None:
            return None
        return self.ranks.ids_of(rank).repeat(2)[: self.layouts[rank].rows]

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return self.ranks.all_reduce(x)

    def all_done(self, done: Tensor) -> bool:
        flag = done.all().to(self.tau.dtype)
        return bool(self.ranks.all_reduce(flag, dist.ReduceOp.MIN))

    def _sweep(
        self,
        terms: tuple[Term, ...],
        weight: Weight | None,
        scalars: RowScalars,
        function: PairFunction | None = None,
    ) -> Result:
        """One sweep over the pairs of all ranks; the result for this rank's rows."""
        rows, gradient = self.rows, weight is not None
        dim, euclidean = rows.f.shape[1] if gradient else 0, gradient and rows.bias is not None
        want = self.call.ranks.want
        function = function or self.function
        sweep = _Sweep(function, self.call, terms, weight, want, dim, euclidean)
        pairing, ids = self.pairing, self.ids_of(self.ranks.rank)
        limits = Limits(pairing.largest_t, pairing.largest_guide)
        own = Block(rows, scalars, limits, Marks(ids, pairing.guide))
        run = {"gather": self._gather, "ring": self._ring, "two_level": self._two_level}
        return run[self.ranks.strategy](sweep, own)

    def _among_own(self, sweep: _Sweep, own: Block, result: Result) -> None:
        if self.ranks.sizes[self.ranks.rank] > 1:  # one pair has no negatives in its own block
            layout = self.layout
            sweep.add(
                own, layout.split, layout.partner, [(result, slice(0, own.n_rows), own.anchors)]
            )

    def _meetings(self, other: int) -> list[tuple[slice, slice, bool]]:
        """Rectangles of this rank's block and another's."""
        ranks = self.ranks
        return meetings(ranks.rank, other, ranks.world, self.call.negatives, ranks.sizes)

    def _meet(
        self,
        sweep: _Sweep,
        own: Block,
        result: Result,
        others: dict[int, Block],
        results: dict[int, Result],
        rectangles_with: Callable[[int], list[tuple[slice, slice, bool]]],
    ) -> None:
        """A block against other blocks that are present.

        Rectangles with the same own rows become one.

        Args:
            rectangles_with: for another block: the own rows, its rows, and whether the own rows are
                the left side.
        """
        rectangles: dict[tuple[int, int, bool], list[tuple[int, slice]]] = defaultdict(list)
        for other in others:
            for mine, theirs, left in rectangles_with(other):
                if mine.start < mine.stop and theirs.start < theirs.stop:
                    rectangles[mine.start, mine.stop, left].append((other, theirs))
        for (start, stop, left), guests in rectangles.items():
            mine = own.part(slice(start, stop))
            parts = [others[other].part(rows) for other, rows in guests]
            into = [
                (results[other], rows, block.anchors)
                for (other, rows), block in zip(guests, parts, strict=True)
            ]
            split = mine.n_rows if left else sum(block.n_rows for block in parts)
            here = (result, slice(start, stop), mine.anchors)
            parts, into = (
                ([mine, *parts], [here, *into]) if left else ([*parts, mine], [*into, here])
            )
            sweep.add(Block.join(parts), split, 0, into)

    def _like(self, block: Block, rank: int) -> list[tuple[Tensor | None, int]]:
        """The tensors of a message that holds a block, with the number of rows they have for a
        process.
        """
        layout = self.layouts[rank]
        of_anchors = [(x, layout.anchors) for x in block.of_anchors]
        return of_anchors + [(x, layout.rows) for x in block.of_rows]

    def _ring(self, sweep: _Sweep, own: Block) -> Result:
        result = sweep.nothing(self.layout, self.tau.new_zeros(sweep.size(self.layout)))

        def visit(other: int, visitor: Block, theirs: Result) -> None:
            self._meet(sweep, own, result, {other: visitor}, {other: theirs}, self._meetings)

        home = self._travel(sweep, own, 1, lambda: self._among_own(sweep, own, result), visit)
        if home is not None:
            result.add(home)
        return result

    def _travel(
        self,
        sweep: _Sweep,
        own: Block,
        stride: int,
        meanwhile: Callable[[], None],
        visit: Callable[[int, Block, Result], None],
    ) -> Result | None:
        """Sends the blocks around the ring of every ``stride``-th rank.

        Args:
            meanwhile: work for the time until the first block arrives.
            visit: adds a visiting block's pairs to its results; takes the block's rank.

        Returns:
            What the own block has collected on its way; None if there was none.
        """
        ranks, zeros = self.ranks, self.tau.new_zeros
        rank, world, last = ranks.rank, ranks.world, ranks.world // stride // 2

        def message_bytes(other: int) -> int:
            return sum(_bytes(x, rows) for x, rows in self._like(own, other % world))

        def size(other: int) -> int:
            return sweep.size(self.layouts[other % world])

        if not last:
            meanwhile()
            return None
        after, before = rank + stride, rank - stride
        packed = pack([x for x, _ in self._like(own, rank)])
        block = ranks.exchange(packed, before, message_bytes(after), after, 0)
        del packed
        meanwhile()
        behind: Arrival | None = None  # results of the block at hand from the ranks it has visited
        for step in steps(world // stride):
            other = (rank + step * stride) % world
            message = block.wait()
            if step < last:
                block = ranks.exchange(message, before, message_bytes(other + stride), after, 0)
            tensors, count = unpack(message, self._like(own, other)), len(own.of_anchors)
            visitor = Block.of_message(tensors[:count], tensors[count:], self.ids_of(other))
            theirs = sweep.nothing(self.layouts[other], zeros(size(other)))
            visit(other, visitor, theirs)
            del message, visitor, tensors
            if behind is not None:
                theirs.add(Result(sweep, self.layouts[other], behind.wait()))
            if step < last:
                behind = ranks.exchange(theirs.flat, before, size(other + stride), after, 1)
            else:
                home = ranks.exchange(theirs.flat, other, size(rank), rank - last * stride, 1)
        return Result(sweep, self.layout, home.wait())

    def _gather(self, sweep: _Sweep, own: Block) -> Result:
        ranks = self.ranks
        if ranks.world == 1:
            result = sweep.nothing(self.layout, self.tau.new_zeros(sweep.size(self.layout)))
            self._among_own(sweep, own, result)
            return result
        needed = {(ranks.rank + step) % ranks.world for step in steps(ranks.world)}
        blocks = self._blocks_of(ranks, own, 0, needed)
        results = self._results_of(sweep, ranks, 0)
        mine = results[ranks.rank]
        self._among_own(sweep, own, mine)
        self._meet(sweep, own, mine, blocks, results, self._meetings)
        return self._send_home(sweep, ranks, results)

    def _two_level(self, sweep: _Sweep, own: Block) -> Result:
        """A visiting block meets the blocks of all ranks of a node at one of them."""
        ranks, node = self.ranks, self.ranks.node()
        nodes, first = ranks.world // node.world, ranks.rank - node.rank
        blocks: dict[int, Block] = {}
        results = self._results_of(sweep, node, first)
        mine = results[ranks.rank]

        def within(other: int) -> list[tuple[slice, slice, bool]]:
            sizes = ranks.sizes[first : first + node.world]
            return meetings(node.rank, other - first, node.world, self.call.negatives, sizes)

        def among_node() -> None:
            members = {first + k for k in range(node.world)}
            blocks.update(self._blocks_of(node, own, first, members - {ranks.rank}))
            blocks[ranks.rank] = own
            self._among_own(sweep, own, mine)
            partners = [first + (node.rank + step) % node.world for step in steps(node.world)]
            met = {other: blocks[other] for other in partners}
            self._meet(sweep, own, mine, met, results, within)

        def visit(other: int, visitor: Block, theirs: Result) -> None:
            here, there = first // node.world, other // node.world

            def with_member(member: int) -> list[tuple[slice, slice, bool]]:
                sizes = {here: ranks.sizes[member], there: ranks.sizes[other]}
                found = meetings(here, there, nodes, self.call.negatives, sizes)
                return [(guest, host, not left) for host, guest, left in found]

            self._meet(sweep, visitor, theirs, blocks, results, with_member)

        home = self._travel(sweep, own, node.world, among_node, visit)
        if home is not None:
            mine.add(home)
        blocks.clear()
        return self._send_home(sweep, node, results)

    def _blocks_of(
        self, peers: Peers, own: Block, first: int, needed: set[int]
    ) -> dict[int, Block]:
        """The needed blocks of some peers, who all take part; their ranks begin with ``first``."""
        layouts = self.layouts[first : first + peers.world]
        if self._gathered is None:  # rows once for all sweeps, row scalars for each
            self._gathered = self._gather_tensors(peers, own.of_rows, [n.rows for n in layouts])
        messages = self._gather_tensors(peers, own.of_anchors, [n.anchors for n in layouts])
        blocks = {}
        for other in sorted(
            needed, key=lambda other: (other - self.ranks.rank) % len(self.layouts)
        ):
            layout = self.layouts[other]
            of_rows, of_anchors = (
                unpack(message, [(x, rows) for x in like])
                for message, like, rows in (
                    (self._gathered[other - first], own.of_rows, layout.rows),
                    (messages[other - first], own.of_anchors, layout.anchors),
                )
            )
            blocks[other] = Block.of_message(of_anchors, of_rows, self.ids_of(other))
        return blocks

    def _gather_tensors(
        self, peers: Peers, tensors: tuple[Tensor | None, ...], lengths: list[int]
    ) -> Tensor:
        """(P, bytes): the peers' tensors of these lengths, in aligned messages of equal length."""
        largest = sum(_bytes(x, max(lengths)) for x in tensors)
        message = torch.zeros(aligned(largest), dtype=torch.uint8, device=self.tau.device)
        mine = pack(tensors)
        message[: mine.numel()] = mine
        return peers.all_gather(message)

    def _results_of(self, sweep: _Sweep, peers: Peers, first: int) -> dict[int, Result]:
        """Empty results for the blocks of some peers, as rows of one tensor."""
        layouts = self.layouts[first : first + peers.world]
        flat = self.tau.new_zeros(peers.world, max(sweep.size(layout) for layout in layouts))
        return {
            first + k: sweep.nothing(layout, flat[k, : sweep.size(layout)])
            for k, layout in enumerate(layouts)
        }

    def _send_home(self, sweep: _Sweep, peers: Peers, results: dict[int, Result]) -> Result:
        """The sum of what the peers have for this rank's block."""
        mine = results[self.ranks.rank]
        flat = mine.flat._base

        def summed() -> Tensor:
            return peers.reduce_scatter(flat)[: mine.flat.numel()]

        if leading(sweep.terms) is None:
            return Result(sweep, self.layout, summed())
        top = self.tau.new_full(
            (peers.world, max(result.sums.shape[1] for result in results.values())), -torch.inf
        )
        for row, result in zip(top, results.values(), strict=True):
            row[: result.sums.shape[1]] = result.sums[0]
        top = peers.all_reduce(top, dist.ReduceOp.MAX)
        for row, result in zip(top, results.values(), strict=True):
            shift, *_ = result.sums
            forms.rescale(shift, result.sums[1:], row[: len(shift)])
            result.sums[0].zero_()
        if len(sweep.terms) > 1:
            mine.flat[:] = summed()
        mine.sums[0] = top[peers.rank, : mine.sums.shape[1]]
        return mine


# --- autograd -------------------------------------------------------------------------------------


class GlobalProblem(Problem):
    """This rank's part of a batch: solves its rows, then their gradient."""

    def __init__(self, features: Features, pos: Tensor, tau: Tensor, call: BoundCall) -> None:
        super().__init__(
            features, pos, tau, call, sweeps=GlobalSweeps(features.rows, pos, tau, call)
        )

    def reduce(self, row_losses: Tensor) -> Tensor:
        return global_reduce(row_losses, self.call, self.call.ranks)

    def total(self, x: Tensor) -> Tensor:
        # With "none" each process has an objective and a copy of τ of its own, so the result is
        # their average; a shared loss is its own average.
        ranks = self.call.ranks
        total = ranks.all_reduce(x)
        return total / ranks.world if self.call.reduction == "none" else total

    def loss_and_gradient(self, need: Need) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As for one process, except that dz belongs to the sum over all ranks' results, P times
        the loss.
        """
        loss, dz, dtau = super().loss_and_gradient(need)
        return loss, None if dz is None else dz.mul_(self.call.ranks.world), dtau


def global_weights(grad: Tensor, loss: Loss, ranks: Ranks) -> Tensor:
    """(anchors,) of this process: the derivative of the sum over all ranks' results with respect to
    its row losses.
    """
    if loss.reduction == "none":
        return loss.of_anchors(grad)
    return (grad * (ranks.world / loss.divisor(ranks.total))).expand(
        loss.anchors(ranks.sizes[ranks.rank])
    )


def global_reduce(row_losses: Tensor, loss: Loss, ranks: Ranks) -> Tensor:
    """(anchors,) of this process → its own values with reduction "none", else the loss of the
    whole batch.
    """
    if loss.reduction == "none":
        return loss.reduce(row_losses)
    return ranks.all_reduce(row_losses.sum()) / loss.divisor(ranks.total)


class GlobalClosedForm(torch.autograd.Function):
    """(loss, what the backward reads) of a constant-α objective over all ranks' pairs: one sum of
    rows is exchanged, and its gradient in the backward pass.

    What is saved is returned too, as by `AlphaCLFunction`.
    """

    @staticmethod
    def forward(z1: Tensor, z2: Tensor, call: BoundCall, need: Need) -> tuple[Tensor | None, ...]:
        with without_autocast(z1.device):
            closed = _ClosedProblem(z1, z2, call)
            loss = global_reduce(closed.losses.detach(), call, call.ranks)
            if call.reduction == "none" or not any(call.ranks.want):
                return (loss,)
            grads = closed.gradient(closed.losses.new_ones(()))
            wanted = (need.z1, need.z2)
            return loss, *(g if w else None for g, w in zip(grads, wanted, strict=True))

    @staticmethod
    def setup_context(ctx, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        z1, z2, ctx.call, ctx.need = inputs
        ctx.dtype, loss = z1.dtype, output[0]
        ctx.like_loss = partial(torch.zeros, loss.shape, dtype=loss.dtype, device=loss.device)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*((z1, z2) if ctx.call.reduction == "none" else output[1:]))

    @staticmethod
    def backward(ctx, grad: Tensor | None, *of_saved: Tensor | None) -> tuple[Tensor | None, ...]:
        if not first_derivative(grad, of_saved):
            if ctx.call.reduction != "none":
                return (None,) * 4
            grad = ctx.like_loss()  # the other ranks wait for this one
        if ctx.call.reduction == "none" and torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"torch.func cannot differentiate {ctx.call.objective} with a process_group and "
                "reduction='none': take reduction='mean' or 'sum', or torch.autograd.grad"
            )
        tensors = ctx.saved_tensors
        with torch.no_grad(), without_autocast(grad.device):
            if ctx.call.reduction == "none":
                grads = _ClosedProblem(*tensors, ctx.call).gradient(grad)
            else:
                grads = [None if g is None else g * grad for g in tensors]
        wanted = (ctx.need.z1, ctx.need.z2)
        grads = [g.to(ctx.dtype) if w else None for g, w in zip(grads, wanted, strict=True)]
        return *only_once(grads, (grad, *tensors)), None, None


class _ClosedProblem:
    """Row losses of this rank and their gradient: autograd on both sides of the all-reduced sums,
    which are leaves.

    A sum inside the graph would be a message that autograd sends whenever it chooses, and never on
    a rank without rows.
    """

    def __init__(self, z1: Tensor, z2: Tensor, call: BoundCall) -> None:
        self.call, self.ranks = call, call.ranks
        self.own_sums: list[Tensor] = []
        self.all_sums: list[Tensor] = []
        n_neg = Layout.of(call, self.ranks.total).n_neg
        layout = Layout.of(call, z1.shape[0])._replace(n_neg=n_neg)
        center = _center(z1, z2, call)
        wide = accumulation_dtype(z1.dtype)  # gradients stay float32 until they are scaled
        with torch.enable_grad():
            self.views = tuple(z.detach().to(wide).requires_grad_() for z in (z1, z2))
            self.losses = closed_form(*self.views, call, layout, center, self._all_reduce_sum)

    def _all_reduce_sum(self, x: Tensor) -> Tensor:
        self.own_sums.append(x)
        self.all_sums.append(self.ranks.all_reduce(x.detach()).requires_grad_())
        return self.all_sums[-1]

    def gradient(self, grad: Tensor) -> list[Tensor]:
        """dz1, dz2 in the accumulation dtype for an incoming gradient."""
        weights = global_weights(grad.to(self.losses.dtype), self.call, self.ranks)
        # one_view's negatives are z1 alone
        options = {
            "allow_unused": True,
            "materialize_grads": True,
        }
        direct = torch.autograd.grad(
            self.losses, (*self.views, *self.all_sums), weights, retain_graph=True, **options
        )
        back = [self.ranks.all_reduce(g) for g in direct[2:]]
        through_sums = torch.autograd.grad(self.own_sums, self.views, back, **options)
        return [a + b for a, b in zip(direct[:2], through_sums, strict=True)]


def _center(z1: Tensor, z2: Tensor, call: BoundCall) -> Tensor | None:
    """The mean of all processes' rows, which is subtracted from euclidean rows."""
    if call.similarity != "euclidean":
        return None
    wide = accumulation_dtype(z1.dtype)
    own = z1.detach().to(wide).sum(0) + z2.detach().to(wide).sum(0)
    return call.ranks.all_reduce(own) / (2 * call.ranks.total)


def global_loss(z1: Tensor, z2: Tensor, tau: Tensor, call: BoundCall) -> Tensor:
    """The loss of a call that all its processes have agreed on."""
    with without_autocast(z1.device):
        if not torch.is_grad_enabled():
            z1, z2, tau = z1.detach(), z2.detach(), tau.detach()
        if isinstance(call.objective, ClosedForm):
            return GlobalClosedForm.apply(z1, z2, call, Need.of(z1, z2, tau))[0]
        return AlphaCLFunction.apply(z1, z2, tau, call, call.ranks.want, None, None)[0]
