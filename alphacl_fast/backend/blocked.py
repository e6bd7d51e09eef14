"""The two sweeps as a loop over tiles of matrix products: any device, any pair kind, O(n·(D +
tile)) memory.

A sweep computes each tile (I, J) of similarities t once. In a triangle sweep (``split == 0``) the
tile serves the anchors of I by reduction over its columns and the anchors of J by reduction over
its rows. In a rectangle sweep (rows [0, split) against [split, n)) it does so when the second
block's rows are anchors too. Operands: docs/design.md.

On a CPU a few workers take the tiles in turn, each with one thread (or its share of the threads)
and its own accumulators. A tile stays in one core's cache, and no operation ends at a barrier,
which would cost a factor of five on a busy machine. Tiles are dealt out by number and results
merged in order, so a fixed thread count gives the same bits every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from ..bundles import Form, PairFunction, Pairing, Rows, RowScalars, Term, Weight
from ..objectives import kind as lookup
from . import forms
from .precision import float32_precision

#: Optional operands that this backend serves.
OPTIONAL_OPERANDS = {"ids", "max_gap", "guide"}


def unsupported(
    device: torch.device, dtype: torch.dtype, precision: str | None, kind: str
) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if precision is None or (dtype == torch.float64 and precision == "ieee"):
        return None
    now = "ieee" if dtype == torch.float64 else float32_precision(device)
    return (
        None
        if precision == now
        else f"multiplies as torch is set to ({now} on {device.type}), not precision={precision!r}"
    )


#: Most workers of a sweep on a CPU. Each has a gradient accumulator of n·D; with more cores a
#: worker gets more threads.
MAX_WORKERS = 4

Result = TypeVar("Result")
Tiles = Iterator[tuple[int, int, int, int]]


def deal(enough: int, device: torch.device, work: Callable[[int, int], Result]) -> list[Result]:
    """The results of ``work(k, workers)`` for every worker k, in order: run in this thread, or on
    a CPU in up to ``enough`` threads.
    """
    threads = torch.get_num_threads()
    workers = min(threads, enough, MAX_WORKERS) if device.type == "cpu" else 1
    if workers < 2:
        return [work(0, 1)]
    inference = torch.is_inference_mode_enabled()

    def run(worker: int) -> Result:
        torch.set_num_threads(threads // workers)  # of this thread
        with torch.inference_mode(inference), torch.no_grad():
            return work(worker, workers)

    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(run, range(workers)))
    finally:
        torch.set_num_threads(threads)  # threads that start later inherit this


def tile_size(n: int, device: torch.device) -> int:
    """Rows of a tile. On a CPU a float32 tile and its companion stay in the second-level cache.

    A GPU needs larger tiles to be busy.
    """
    if device.type == "cpu":
        return min(n, 512)
    return min(n, 4096)


class _Side:
    """Row scalars of a tile's anchors, as columns (rows of I) or as a row (rows of J), and the
    reduction over the rest.
    """

    def __init__(
        self, start: int, stop: int, dim: int, scalars: RowScalars, pairing: Pairing
    ) -> None:
        self.slice, self.dim = slice(start, stop), dim
        self.shape = (-1, 1) if dim == 1 else (1, -1)
        self.scalars = RowScalars(*(None if x is None else self.of(x) for x in scalars))
        limits = pairing.largest_t, pairing.largest_guide
        self.largest_t, self.largest_guide = (None if x is None else self.of(x) for x in limits)

    def of(self, vector: Tensor) -> Tensor:
        """The side's part of a vector (anchors,), ready to be broadcast over the tile."""
        return vector[self.slice].view(self.shape)


class _Tile:
    """Similarities t of one tile (I, J), with the pair kind's functions for one side at a time.

    A kind that is linear in t gets t/τ from the matrix product (``divided``): one pass over the
    tile less, and every sweep rounds log f in the same way. t itself is then made only where a
    caller needs it.
    """

    def __init__(
        self,
        product: Tensor,
        excluded: list[int],
        same_id: Tensor | None,
        guide: Tensor | None,
        function: PairFunction,
        need_t: bool,
        divided: bool,
        unweighted: Tensor | None,
    ) -> None:
        self.excluded, self.same_id, self.guide = excluded, same_id, guide
        self.kind, self.tau = lookup(function.kind), function.tau
        self.bound = self.kind.bind(function.params)
        self._log_f: Tensor | None = None
        self.mask(product)  # the similarity of an excluded pair may be infinite, and 0·inf is not 0
        if divided:
            self.t = product * self.tau if need_t else product
            self._log_f = self.mask(product, -torch.inf)
        else:
            self.t = product
        #: t without log-weights, which limits are compared with
        self.unweighted = self.t if unweighted is None else unweighted

    def mask(self, x: Tensor, value: float = 0.0) -> Tensor:
        """Writes ``value`` where a pair is the anchor itself, its positive, or two rows of one id.

        It changes x in place.
        """
        for diagonal in self.excluded:
            x.diagonal(diagonal).fill_(value)
        return x if self.same_id is None else x.masked_fill_(self.same_id, value)

    def of_side(self, x: Tensor, side: _Side, value: float = 0.0) -> Tensor:
        """x with ``value`` where a pair is too similar to count for the side's anchor."""
        if side.largest_t is not None:
            x = x.masked_fill(self.unweighted > side.largest_t, value)
        if self.guide is not None:
            x = x.masked_fill(self.guide > side.largest_guide, value)
        return x

    def log_f(self) -> Tensor:
        """log f of a log kind, −inf at excluded pairs."""
        if self._log_f is None:
            self._log_f = self.mask(self.bound.f(self.t, self.tau), -torch.inf)
        return self._log_f

    def exp(self, shift: float | Tensor) -> Tensor:
        """exp(log f − shift); in place where the shift is one number."""
        log_f = self.log_f()
        if isinstance(shift, Tensor):
            return (log_f - shift).exp_()
        return (log_f.sub_(shift) if shift else log_f).exp_()

    def values(self, side: _Side, pieces: set[str]) -> dict[str, Tensor]:
        """The named values of f, df and dtau for one side's row scalars; 0 at excluded pairs."""
        functions, tau, scalars = self.bound._asdict(), self.tau, side.scalars
        if self.kind.log:
            f = self.of_side(self.exp(scalars.shift), side)
            return {name: f if name == "f" else f * functions[name](self.t, tau) for name in pieces}
        x = self.t if scalars.shift is None else self.t - scalars.shift
        if scalars.argument_offset is not None:
            x = x + scalars.argument_offset
        return {
            name: self.of_side(self.mask(_owned(functions[name](x, tau), x)), side)
            for name in pieces
        }

    def moment(self, side: _Side) -> Tensor:
        """t − moment_origin, in a tensor of its own."""
        return self.t - side.scalars.moment_origin

    def deviation(self, side: _Side) -> Tensor:
        """t − moment_origin − baseline."""
        return self.moment(side).sub_(side.scalars.baseline)


def _owned(y: Tensor, x: Tensor) -> Tensor:
    """y as a tensor that may be written to: a user's function may return its argument or an
    expanded constant.
    """
    return y.clone() if y.data_ptr() == x.data_ptr() or 0 in y.stride() or y.requires_grad else y


def _tiles(n: int, split: int, block: int) -> Tiles:
    for i0 in range(0, split or n, block):
        i1 = min(i0 + block, split or n)
        for j0 in range(split or i0, n, block):
            yield i0, i1, j0, min(j0 + block, n)


def excluded_diagonals(i0: int, i1: int, j0: int, j1: int, split: int, partner: int) -> list[int]:
    """Diagonals of the tile that hold excluded pairs: j = i (triangle) and j = i ± partner."""
    offsets = ([] if split else [0]) + ([partner, -partner] if partner else [])
    return [d - (j0 - i0) for d in offsets if -(i1 - i0) < d - (j0 - i0) < j1 - j0]


def equal_ids(a: Tensor, b: Tensor) -> Tensor:
    """(len(a), len(b)): whether the two rows of a pair have the same id."""
    return a[:, None] == b[None, :]


class _Sweep:
    """The state that a sweep's tiles share; a call yields a worker's tiles with the anchors that
    they serve.

    Rows I are always anchors. Rows J are served as well, unless they are no anchors or the tile is
    diagonal.
    """

    def __init__(
        self,
        rows: Rows,
        pairing: Pairing,
        function: PairFunction,
        scalars: RowScalars,
        need_t: bool,
    ) -> None:
        wide = rows.f.to(function.tau.dtype)
        self.rows = wide if rows.scale is None else wide * rows.scale.unsqueeze(1)
        self.bias, self.pairing, self.function, self.scalars = rows.bias, pairing, function, scalars
        self.divided = lookup(function.kind).linear_in_t and pairing.largest_t is None
        self.need_t = need_t
        self.n, device = len(wide), wide.device
        self.block = tile_size(self.n, device)

    def share(self, work: Callable[[Tiles], Result]) -> list[Result]:
        """``work`` on all tiles, dealt out to workers; results in the workers' order."""
        tiles = self.n, self.pairing.split, self.block
        enough = sum(1 for _ in islice(_tiles(*tiles), 4 * MAX_WORKERS)) // 4
        return deal(
            enough, self.rows.device,
            lambda worker, workers: work(islice(_tiles(*tiles), worker, None, workers)),
        )  # fmt: skip

    def __call__(
        self, tiles: Tiles
    ) -> Iterator[tuple[tuple[int, int, int, int], _Tile, list[_Side]]]:
        """Computes t (or t/τ, see `_Tile`) of tile after tile into one buffer."""
        tau, left, bias = self.function.tau, self.rows, self.bias
        if self.divided:
            left, bias = left / tau, None if bias is None else bias / tau
        buffer = self.rows.new_empty(self.block * self.block)
        pairing, ids = self.pairing, self.pairing.ids
        for i0, i1, j0, j1 in tiles:
            t = buffer[: (i1 - i0) * (j1 - j0)].view(i1 - i0, j1 - j0)
            torch.mm(left[i0:i1], self.rows[j0:j1].t(), out=t)
            unweighted = t.clone() if pairing.weighted else None
            if bias is not None:
                t.add_(bias[i0:i1, None]).add_(bias[None, j0:j1])
            excluded = excluded_diagonals(i0, i1, j0, j1, pairing.split, pairing.partner)
            same_id = None if ids is None else equal_ids(ids[i0:i1], ids[j0:j1])
            guide = None
            if pairing.guide is not None:
                guide = pairing.guide[i0:i1] @ pairing.guide[j0:j1].t()
            sides = [_Side(i0, i1, 1, self.scalars, pairing)]
            if pairing.anchors > pairing.split if pairing.split else j0 > i0:
                sides.append(_Side(j0, j1, 0, self.scalars, pairing))
            how = self.function, self.need_t, self.divided, unweighted
            tile = _Tile(t, excluded, same_id, guide, *how)
            yield (i0, i1, j0, j1), tile, sides


_PIECE = {Term.F: "f", Term.DF: "df", Term.F_MOMENT: "f", Term.DF_MOMENT: "df", Term.DTAU: "dtau"}
_PIECES = {Weight.F: {"f"}, Weight.DF: {"df"}, Weight.F_PLUS_DF: {"f", "df"}}


def _add_terms(
    out: Tensor, tile: _Tile, side: _Side, terms: tuple[Term, ...], values: dict[str, Tensor]
) -> None:
    """Adds every term over one side of a tile."""
    for k, term in enumerate(terms):
        value = values[_PIECE[term]]
        if term in (Term.F_MOMENT, Term.DF_MOMENT):
            value = value * tile.moment(side)
        elif term == Term.DTAU:
            value = value * tile.deviation(side)
        out[k, side.slice] += value.sum(side.dim)


# --- sweep 1 --------------------------------------------------------------------------------------


def row_sums(
    rows: Rows,
    pairing: Pairing,
    function: PairFunction,
    scalars: RowScalars,
    terms: tuple[Term, ...],
    precision: str = "",
) -> Tensor:
    """(len(terms), anchors): every term summed over the negatives of every anchor."""
    form, shift = forms.of_row_sums(function, terms)
    if form in (Form.CONSTANT, Form.ONLINE):
        return _log_sums(
            rows, pairing, function, scalars, terms, shift if form == Form.CONSTANT else None
        )
    sweep = _Sweep(rows, pairing, function, scalars, need_t=True)

    def work(tiles: Tiles) -> Tensor:
        start = -torch.inf if form == Form.T_MAX else 0.0
        out = sweep.rows.new_full((len(terms), pairing.anchors), start)
        for _, tile, sides in sweep(tiles):
            for side in sides:
                if form == Form.T_MAX:
                    best = out[0, side.slice]
                    t = tile.of_side(tile.mask(tile.t, -torch.inf), side, -torch.inf)
                    torch.maximum(best, t.amax(side.dim), out=best)
                else:
                    _add_terms(
                        out, tile, side, terms, tile.values(side, {_PIECE[term] for term in terms})
                    )
        return out

    out, *others = sweep.share(work)
    for other in others:
        out = torch.maximum(out, other) if form == Form.T_MAX else out.add_(other)
    return out


def _log_sums(
    rows: Rows,
    pairing: Pairing,
    function: PairFunction,
    scalars: RowScalars,
    terms: tuple[Term, ...],
    constant: float | None,
) -> Tensor:
    """shift_i, Σ_j exp(log f − shift_i) and, where asked for, Σ_j exp(log f − shift_i)·(t −
    moment_origin).
    """
    with_moment = Term.F_MOMENT in terms
    sweep = _Sweep(rows, pairing, function, scalars, need_t=with_moment)

    def work(tiles: Tiles) -> tuple[Tensor, Tensor]:
        sums = sweep.rows.new_zeros(1 + with_moment, pairing.anchors)
        shift = sweep.rows.new_full(
            (pairing.anchors,), -torch.inf if constant is None else constant
        )
        for _, tile, sides in sweep(tiles):
            e = None if constant is None else tile.exp(constant)
            for side in sides:
                if constant is None:
                    log_f = tile.of_side(tile.log_f(), side, -torch.inf)
                    new = torch.maximum(shift[side.slice], log_f.amax(side.dim))
                    forms.rescale(shift[side.slice], sums[:, side.slice], new)
                    e = tile.exp(forms.finite(new).view(side.shape))
                counted = tile.of_side(e, side)
                sums[0, side.slice] += counted.sum(side.dim)
                if with_moment:
                    sums[1, side.slice] += (counted * tile.moment(side)).sum(side.dim)
        return shift, sums

    (shift, sums), *others = sweep.share(work)
    for other_shift, other_sums in others:
        new = torch.maximum(shift, other_shift)
        forms.rescale(shift, sums, new)
        forms.rescale(other_shift, other_sums, new)
        sums += other_sums
    return torch.cat([shift.unsqueeze(0), sums])


# --- sweep 2 --------------------------------------------------------------------------------------


def pair_grad(
    rows: Rows,
    pairing: Pairing,
    function: PairFunction,
    scalars: RowScalars,
    weight: Weight,
    terms: tuple[Term, ...],
    wanted: tuple[int, int],
    precision: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_j (g_ij + g_ji)·F_j of the ``wanted`` rows, sums of the weights (with a bias), sums of
    ``terms``.
    """
    low, high = wanted
    form, shift = forms.of_pair_grad(function, scalars, weight, terms)
    if (
        pairing.largest_t is not None or pairing.guide is not None
    ):  # the two anchors of a pair may differ on whether it counts
        form = Form.PLAIN
    if form == Form.CONSTANT:
        scalars = scalars._replace(row_weight=scalars.row_weight * (shift - scalars.shift).exp())
    need_t = bool(terms) or weight != Weight.F or not lookup(function.kind).log
    sweep = _Sweep(rows, pairing, function, scalars, need_t)

    def work(tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
        df = sweep.rows.new_zeros(high - low, sweep.rows.shape[1])
        weight_sums = sweep.rows.new_zeros(sweep.n if rows.bias is not None else 0)
        sums = sweep.rows.new_zeros(len(terms), pairing.anchors if terms else 0)
        scratch = sweep.rows.new_empty(sweep.block * sweep.block)
        for (i0, i1, j0, j1), tile, sides in sweep(tiles):
            if form == Form.CONSTANT:
                g, both = tile.exp(shift), sides[0].scalars.row_weight
                if len(sides) == 2:
                    out = scratch[: g.numel()].view(g.shape)
                    both = torch.add(both, sides[1].scalars.row_weight, out=out)
                g.mul_(both)
            else:
                g = _weights(tile, sides[0], weight, terms, sums)
                for side in sides[1:]:
                    g += _weights(tile, side, weight, terms, sums)
            diagonal = not pairing.split and i0 == j0  # both g_ij and g_ji lie inside the tile
            if diagonal:
                g = g + g.t()
            if rows.bias is not None:
                weight_sums[i0:i1] += g.sum(1)
                if not diagonal:
                    weight_sums[j0:j1] += g.sum(0)
            _add_product(df, g, sweep.rows[j0:j1], i0, i1, low, high)
            if not diagonal:
                _add_product(df, g.t(), sweep.rows[i0:i1], j0, j1, low, high)
        return df, weight_sums, sums

    total, *others = sweep.share(work)
    for other in others:
        for mine, theirs in zip(total, other, strict=True):
            mine += theirs
    return total


def _weights(
    tile: _Tile, side: _Side, weight: Weight, terms: tuple[Term, ...], sums: Tensor
) -> Tensor:
    """g of one side of a tile; adds the sums of ``terms`` on the way."""
    values = tile.values(side, _PIECES[weight] | {_PIECE[term] for term in terms})
    if terms:
        _add_terms(sums, tile, side, terms, values)
    if weight == Weight.F_PLUS_DF:
        return (values["f"] + values["df"] * tile.deviation(side)) * side.scalars.row_weight
    return values["f" if weight == Weight.F else "df"] * side.scalars.row_weight


def _add_product(
    df: Tensor, g: Tensor, rows: Tensor, r0: int, r1: int, low: int, high: int
) -> None:
    """df[r0:r1] += g @ rows, for the part of [r0, r1) inside [low, high)."""
    a, b = max(r0, low), min(r1, high)
    if a < b:
        df[a - low : b - low].addmm_(g[a - r0 : b - r0], rows)
