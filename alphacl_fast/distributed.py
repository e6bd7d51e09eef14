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
import pickle
import re
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops
from .autograd import AlphaCLFunction, Features, Need, Problem, Saved, Sweeps, closed_form
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
from .call import BoundCall, Layout, Loss, SameId, without_autocast
from .objectives import ClosedForm

STRATEGIES = ("auto", "gather", "ring")
#: "auto" gathers while all rows of the batch and their gradient together take no more bytes than
#: this.
GATHER_BYTES = 256 * 2**20


# --- the processes --------------------------------------------------------------------------------


class ProcessGroup:
    """The ranks that share a loss's batch, a torch ProcessGroup or "world", and their strategy."""

    def __init__(self, process_group: Any, strategy: str) -> None:
        if not dist.is_available():
            raise ValueError(
                "process_group must be None: this build of torch has no torch.distributed"
            )
        if process_group != "world" and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                "process_group must be None, 'world' or a torch.distributed ProcessGroup, got "
                f"{process_group!r}"
            )
        self.process_group, self.strategy = process_group, strategy

    def __repr__(self) -> str:
        name = (
            "'world'"
            if self.process_group == "world"
            else f"<{self.process_group.size()} processes>"
        )
        return f"{name}, strategy={self.strategy!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessGroup:
        return self  # a copy of a loss shares its batch with the same processes

    def handle(self) -> dist.ProcessGroup:
        if not dist.is_initialized():
            raise ValueError(
                "process_group needs torch.distributed to be initialised, got a call before "
                "init_process_group"
            )
        handle = dist.group.WORLD if self.process_group == "world" else self.process_group
        if dist.get_rank(handle) < 0:
            raise ValueError(
                f"process_group must contain this process, got one without rank {dist.get_rank()} "
                "of the world"
            )
        return handle


@dataclass(frozen=True)
class Ranks:
    """The ranks of one call, once they have agreed on it, and the messages between them.

    Attributes:
        sizes: pairs of each process, in the order of the ranks.
        want: whether any rank wants the gradient in z1, z2, τ. All do the same work, so that none
            waits.
    """

    handle: dist.ProcessGroup
    rank: int
    world: int
    sizes: tuple[int, ...]
    want: Need
    strategy: str
    ids: Tensor | None = None  # (pairs of all processes,) int32, numbered from 0

    @property
    def total(self) -> int:
        """Pairs of all processes."""
        return sum(self.sizes)

    def problem(self, z1: Tensor, z2: Tensor, tau: Tensor, call: BoundCall) -> Problem:
        """This process's part of the batch."""
        features, pos = Features.of_views(z1, z2, call, _center(z1, z2, call))
        return GlobalProblem(features, pos, tau, call)

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

    def all_reduce(self, x: Tensor, op: Any = None) -> Tensor:
        """Σ (or another reduction) over the processes, the same bits on all of them."""
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, op or dist.ReduceOp.SUM, group=self.handle)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """(k,) → (P, k)."""
        out = x.new_empty(self.world * x.numel())
        dist.all_gather_into_tensor(out, x, group=self.handle)
        return out.view(self.world, -1)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """(P, k) → (k,), the sum of everyone's row for this process."""
        out = x.new_empty(x.shape[1])
        dist.reduce_scatter_tensor(out, x.view(-1), group=self.handle)
        return out

    def exchange(self, outgoing: Tensor, to: int, size: int, source: int, tag: int) -> Arrival:
        """Starts to send a flat tensor to one rank and to receive one of ``size`` elements from
        another.
        """
        incoming = outgoing.new_empty(size)
        operations = [
            dist.P2POp(
                function,
                tensor,
                dist.get_global_rank(self.handle, peer % self.world),
                self.handle,
                tag,
            )
            for function, tensor, peer in (
                (dist.isend, outgoing, to),
                (dist.irecv, incoming, source),
            )
            if tensor.numel()
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
        return Arrival(incoming, outgoing, works)


class Arrival:
    """A message under way.

    It keeps the outgoing tensor alive until `wait` returns, and no tensor afterwards.
    """

    def __init__(self, incoming: Tensor, outgoing: Tensor, works: list[Any]) -> None:
        self._state = incoming, outgoing, works

    def wait(self) -> Tensor:
        (incoming, _, works), self._state = self._state, None
        for work in works:
            work.wait()
        return incoming


# --- agreeing on a call ---------------------------------------------------------------------------

STATEMENT_BYTES = 1024
_COUNTS = struct.Struct("<2q")  # a message begins with the rank's numbers of rows or pairs
_ERRORS: tuple[type[Exception], ...] = (TypeError, ValueError, RuntimeError)


class Statement(NamedTuple):
    """A rank's statement of its arguments; most ranks make the same one."""

    error: type[Exception] | None
    text: str  #: of the error, or of the call
    dim: int = 0
    dtype: torch.dtype | None = None
    wanted: Need = Need(False, False, False)
    temperature: tuple[float, ...] = ()  #: or scale and bias; NaN: not known on the host


def agree(
    group: ProcessGroup,
    z1: Tensor,
    z2: Tensor,
    tau: Tensor | None,
    call: BoundCall | None,
    failure: Exception | None,
    ids: Tensor | None = None,
) -> Ranks:
    """One small all-gather, after which either all ranks go on with the same call or all raise the
    same error.

    Args:
        failure: the error of this rank's arguments; the other arguments may then be anything.

    Raises:
        TypeError, ValueError, RuntimeError: on every rank; names the ranks whose arguments are bad,
            or differ.
    """
    pairs, statement = 0, None
    if failure is None:
        pairs = len(z1)
        statement = _statement(z1, z2, tau, call, group.strategy, ids is not None)
    handle, counts, statements = exchange(group, (pairs, 0), statement, failure)
    sizes = tuple(pairs for pairs, _ in counts)
    first = statements[0]
    for r, other in enumerate(statements):
        if other is first:
            continue
        for what, here, there in (
            ("number of features D", first.dim, other.dim),
            ("dtype", first.dtype, other.dtype),
            ("call", first.text, other.text),
        ):
            if here != there:
                raise ValueError(
                    f"every rank must pass the same {what}, "
                    f"got {here} on rank 0 and {there} on rank {r}"
                )
        names = ("temperature",) if len(first.temperature) == 1 else ("scale", "bias")
        for name, here, there in zip(names, first.temperature, other.temperature, strict=True):
            if abs(here - there) > 1e-6 * abs(here):  # false for NaN
                raise ValueError(
                    f"every rank must pass the same {name}, "
                    f"got {here} on rank 0 and {there} on rank {r}"
                )
        here, there = any(first.wanted), any(other.wanted)
        if call.reduction == "none" and here != there:
            raise ValueError(
                "with reduction='none' every rank must want a gradient or none (the backward is a "
                f"common step), got {here} on rank 0 and {there} on rank {r}"
            )
    if sum(sizes) < 1:
        raise ValueError(f"all ranks together must have at least 1 pair, got {sizes}")
    want = Need(*map(any, zip(*(statement.wanted for statement in statements), strict=True)))
    strategy = group.strategy
    if strategy == "auto":
        strategy = auto_strategy(Layout.of(call, sum(sizes)).rows, z1.shape[1], z1.dtype)
    rank, world = dist.get_rank(handle), len(sizes)
    return Ranks(handle, rank, world, sizes, want, strategy).with_ids(ids)


def exchange(
    group: ProcessGroup,
    counts: tuple[int, int],
    statement: Statement | None,
    failure: Exception | None,
) -> tuple[dist.ProcessGroup, list[tuple[int, int]], list[Statement]]:
    """The group's handle, and the counts and statements of all ranks, by one small all-gather.

    Args:
        statement: not read if there is a failure.
        failure: the error of this rank's arguments.

    Raises:
        TypeError, ValueError, RuntimeError: on every rank if one of them has a failure.
    """
    if failure is not None:
        if not dist.is_initialized():
            raise failure
        kind = next(k for k in _ERRORS if isinstance(failure, k) or k is RuntimeError)
        statement = Statement(kind, cut(str(failure) or type(failure).__name__))
    handle = group.handle()
    message = _COUNTS.pack(*counts) + pickle.dumps(statement)
    sent = torch.frombuffer(bytearray(message.ljust(STATEMENT_BYTES, b"\0")), dtype=torch.uint8)
    received = torch.empty(dist.get_world_size(handle) * STATEMENT_BYTES, dtype=torch.uint8)
    if "cpu" not in dist.get_backend_config(handle):
        sent, received = sent.cuda(), received.cuda()
    dist.all_gather_into_tensor(received, sent, group=handle)
    received = received.cpu()  # without gloo the host waits for the device here
    messages = [x.numpy().tobytes() for x in received.split(STATEMENT_BYTES)]
    different = {message[_COUNTS.size :] for message in messages}  # only a few, even of 1,024 ranks
    known = {message: pickle.loads(message) for message in different}
    statements = [known[message[_COUNTS.size :]] for message in messages]
    if failed := [r for r, statement in enumerate(statements) if statement.error]:
        reasons = "; ".join(f"rank {r}: {statements[r].text}" for r in failed)
        raise statements[failed[0]].error(reasons) from failure
    return handle, [_COUNTS.unpack_from(message) for message in messages], statements


def _statement(
    z1: Tensor, z2: Tensor, tau: Tensor, call: BoundCall, strategy: str, with_ids: bool
) -> Statement:
    known = tuple(math.nan if x is None else x for x in call.known)
    text = (
        f"{call.objective}, similarity={call.similarity!r}, negatives={call.negatives!r}, "
        f"symmetric={call.symmetric}, reduction={call.reduction!r}, strategy={strategy!r}, "
        f"{'ids' if with_ids else 'no ids'}"
    )
    text = re.sub(r" at 0x[0-9a-f]+", "", text)  # an unnamed callable's address differs
    wanted = Need.of(z1, z2, tau)
    return Statement(None, cut(text), z1.shape[1], z1.dtype, wanted, known)


def cut(text: str) -> str:
    """The text shortened to fit into a statement; a hash tells long texts apart."""
    data, most = text.encode(), STATEMENT_BYTES - 256
    if len(data) <= most:
        return text
    return f"{data[:most].decode(errors='ignore')}… (crc {zlib.crc32(data):08x})"


def auto_strategy(rows: int, dim: int, dtype: torch.dtype) -> str:
    """The strategy for a batch of this many rows."""
    return (
        "gather"
        if rows * dim * (dtype.itemsize + accumulation_dtype(dtype).itemsize) <= GATHER_BYTES
        else "ring"
    )


# --- who computes which pairs ---------------------------------------------------------------------


def steps(world: int) -> range:
    """Distances to the blocks that a rank's own block meets at that rank."""
    return range(1, world // 2 + 1)


def meetings(
    rank: int, other: int, world: int, negatives: str, sizes: tuple[int, ...]
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


class Names(NamedTuple):
    """The ids of some rows."""

    ids: Tensor | None  # (n,) int32


class Block(NamedTuple):
    """One process's rows with their row scalars, one for each of the first rows, or one per row."""

    rows: Rows
    scalars: RowScalars
    names: Names

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
        pairing = Pairing(split, partner, block.anchors, block.names.ids)
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
        super().__init__(rows, pos, tau, call, layout, ranks.same_id(call, tau.dtype))
        self.divisor = call.divisor(ranks.total)
        self.ranks = ranks
        self.layouts = [Layout.of(call, n) for n in ranks.sizes]
        self._gathered: Tensor | None = None

    def row_sums(self, terms: tuple[Term, ...], scalars: RowScalars) -> Tensor:
        return self._sweep(terms, None, scalars).sums

    def pair_grad(
        self, weight: Weight, terms: tuple[Term, ...], scalars: RowScalars, wanted: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.ranks.want.views and not terms:
            return self.nothing()
        result = self._sweep(terms, weight, scalars)
        return result.df[slice(*wanted)], result.weight_sums, result.sums

    def mean_negative(self) -> Tensor:
        return self._mean(1)  # as if there were no ids: it only starts an iteration

    def names_of(self, rank: int) -> Names:
        """The ids of a process's rows."""
        if self.ranks.ids is None:
            return Names(None)
        return Names(self.ranks.ids_of(rank).repeat(2)[: self.layouts[rank].rows])

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return self.ranks.all_reduce(x)

    def all_done(self, done: Tensor) -> bool:
        flag = done.all().to(self.tau.dtype)
        return bool(self.ranks.all_reduce(flag, dist.ReduceOp.MIN))

    def _sweep(self, terms: tuple[Term, ...], weight: Weight | None, scalars: RowScalars) -> Result:
        """One sweep over the pairs of all ranks; the result for this rank's rows."""
        rows, gradient = self.rows, weight is not None
        dim, euclidean = rows.f.shape[1] if gradient else 0, gradient and rows.bias is not None
        want = self.call.ranks.want
        sweep = _Sweep(self.function, self.call, terms, weight, want, dim, euclidean)
        own = Block(rows, scalars, self.names_of(self.ranks.rank))
        return self._ring(sweep, own) if self.ranks.strategy == "ring" else self._gather(sweep, own)

    def _among_own(self, sweep: _Sweep, own: Block, result: Result) -> None:
        if self.ranks.sizes[self.ranks.rank] > 1:  # one pair has no negatives in its own block
            layout = self.layout
            sweep.add(
                own, layout.split, layout.partner, [(result, slice(0, own.n_rows), own.anchors)]
            )

    def _meet(
        self,
        sweep: _Sweep,
        own: Block,
        result: Result,
        others: dict[int, Block],
        results: dict[int, Result],
    ) -> None:
        """The own block against the other blocks that are present.

        Rectangles with the same own rows become one.
        """
        rank, world, sizes = self.ranks.rank, self.ranks.world, self.ranks.sizes
        rectangles: dict[tuple[int, int, bool], list[tuple[int, slice]]] = defaultdict(list)
        for other in others:
            for mine, theirs, left in meetings(rank, other, world, self.call.negatives, sizes):
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

        The rows come last, because they may be narrow.
        """
        layout, (f, *others) = self.layouts[rank], block.rows
        return [(x, layout.anchors) for x in block.scalars] + [
            (x, layout.rows) for x in (*others, f)
        ]

    def _ring(self, sweep: _Sweep, own: Block) -> Result:
        ranks, zeros = self.ranks, self.tau.new_zeros
        rank, world = ranks.rank, ranks.world

        def message_bytes(other: int) -> int:
            return sum(_bytes(x, rows) for x, rows in self._like(own, other % world))

        def size(other: int) -> int:
            return sweep.size(self.layouts[other % world])

        result, last = sweep.nothing(self.layout, zeros(size(rank))), world // 2
        if last:
            block = ranks.exchange(
                pack([x for x, _ in self._like(own, rank)]),
                rank - 1,
                message_bytes(rank + 1),
                rank + 1,
                0,
            )
        self._among_own(sweep, own, result)
        behind: Arrival | None = (
            None  # results of the block at hand from the processes it has visited
        )
        for step in steps(world):
            other = (rank + step) % world
            message = block.wait()
            if step < last:
                block = ranks.exchange(message, rank - 1, message_bytes(other + 1), rank + 1, 0)
            *vectors, f = unpack(message, self._like(own, other))
            count = len(RowScalars._fields)
            visitor = Block(
                Rows(f, *vectors[count:]), RowScalars(*vectors[:count]), self.names_of(other)
            )
            theirs = sweep.nothing(self.layouts[other], zeros(size(other)))
            self._meet(sweep, own, result, {other: visitor}, {other: theirs})
            del message, visitor, vectors, f
            if behind is not None:
                theirs.add(Result(sweep, self.layouts[other], behind.wait()))
            if step < last:
                behind = ranks.exchange(theirs.flat, rank - 1, size(other + 1), rank + 1, 1)
            else:
                home = ranks.exchange(theirs.flat, other, size(rank), rank - last, 1)
        if last:
            result.add(Result(sweep, self.layout, home.wait()))
        return result

    def _gather(self, sweep: _Sweep, own: Block) -> Result:
        ranks = self.ranks
        if ranks.world == 1:
            result = sweep.nothing(self.layout, self.tau.new_zeros(sweep.size(self.layout)))
            self._among_own(sweep, own, result)
            return result
        f, *others = own.rows
        features, scalars = (*others, f), own.scalars
        if self._gathered is None:  # rows once for all sweeps, row scalars for each
            self._gathered = self._gather_blocks(features, [n.rows for n in self.layouts])
        messages = self._gather_blocks(scalars, [n.anchors for n in self.layouts])
        blocks = {}
        for step in steps(ranks.world):
            other = (ranks.rank + step) % ranks.world
            layout = self.layouts[other]
            *others, f = unpack(self._gathered[other], [(x, layout.rows) for x in features])
            vectors = unpack(messages[other], [(x, layout.anchors) for x in scalars])
            blocks[other] = Block(Rows(f, *others), RowScalars(*vectors), self.names_of(other))
        flat = self.tau.new_zeros(ranks.world, max(sweep.size(layout) for layout in self.layouts))
        results = [
            sweep.nothing(layout, flat[r, : sweep.size(layout)])
            for r, layout in enumerate(self.layouts)
        ]
        mine = results[ranks.rank]
        self._among_own(sweep, own, mine)
        self._meet(sweep, own, mine, blocks, dict(enumerate(results)))
        if leading(sweep.terms) is None:
            return Result(sweep, self.layout, ranks.reduce_scatter(flat)[: mine.flat.numel()])
        top = self.tau.new_full(
            (ranks.world, max(layout.anchors for layout in self.layouts)), -torch.inf
        )
        for row, result in zip(top, results, strict=True):
            row[: result.sums.shape[1]] = result.sums[0]
        top = ranks.all_reduce(top, dist.ReduceOp.MAX)
        for row, result in zip(top, results, strict=True):
            shift, *_ = result.sums
            forms.rescale(shift, result.sums[1:], row[: len(shift)])
            result.sums[0].zero_()
        if len(sweep.terms) > 1:
            mine.flat[:] = ranks.reduce_scatter(flat)[: mine.flat.numel()]
        mine.sums[0] = top[ranks.rank, : mine.sums.shape[1]]
        return mine

    def _gather_blocks(self, tensors: tuple[Tensor | None, ...], lengths: list[int]) -> Tensor:
        """(P, bytes): all ranks' tensors of these lengths, in aligned messages of equal length."""
        largest = sum(_bytes(x, max(lengths)) for x in tensors)
        message = torch.zeros(-(-largest // 16) * 16, dtype=torch.uint8, device=self.tau.device)
        mine = pack(tensors)
        message[: mine.numel()] = mine
        return self.ranks.all_gather(message)


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
    """Loss of a constant-α objective over all ranks' pairs: one sum of rows is exchanged, and its
    gradient in the backward pass.
    """

    @staticmethod
    def forward(ctx, z1: Tensor, z2: Tensor, call: BoundCall) -> Tensor:
        ctx.call, ctx.dtype, ctx.need = call, z1.dtype, ctx.needs_input_grad[:2]
        ranks, closed = call.ranks, _ClosedProblem(z1, z2, call)
        if any(ranks.want) and call.reduction == "none":
            ctx.save_for_backward(z1, z2)
        elif any(ranks.want):
            grads = closed.gradient(closed.losses.new_ones(()))
            ctx.save_for_backward(
                *(g if need else None for g, need in zip(grads, ctx.need, strict=True))
            )
        return global_reduce(closed.losses.detach(), call, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad.device):
            if ctx.call.reduction == "none":
                grads = _ClosedProblem(*ctx.saved_tensors, ctx.call).gradient(grad)
            else:
                grads = [None if g is None else g * grad for g in ctx.saved_tensors]
        grads = [g.to(ctx.dtype) if need else None for g, need in zip(grads, ctx.need, strict=True)]
        return *grads, None


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
            return GlobalClosedForm.apply(z1, z2, call)
        return AlphaCLFunction.apply(z1, z2, tau, call, call.ranks.want, None)[0]
