"""The two sweeps as a loop over tiles of vendor matrix products: any device, any pair kind, O(n·(D + tile)) memory.

A tile (I, J) of similarities t is computed once per sweep. In a triangle sweep (``split == 0``) it serves the anchors
of I by reduction over its columns and those of J by reduction over its rows; so it does in a rectangle sweep
(rows [0, split) against [split, n)) when the second block's rows are anchors too. Arguments: docs/design.md.

On a CPU a few workers take the tiles in turn, each with one thread (or its share of them) and accumulators of its own: a
tile stays in one core's cache, and nobody waits at a barrier per operation, which on a busy machine costs a factor of
five. Tiles are dealt out by number and results merged in order, so a fixed thread count gives the same bits every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from ..objectives import PairKind
from ..objectives import kind as lookup
from .precision import float32_precision
from .ranges import middle as middle_of


def unsupported(device: torch.device, dtype: torch.dtype, precision: str | None, kind: str) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if precision is None or (dtype == torch.float64 and precision == "ieee"):
        return None
    now = "ieee" if dtype == torch.float64 else float32_precision(device)
    return None if precision == now else f"multiplies as torch is set to ({now} on {device.type}), not precision={precision!r}"


#: Most workers of a sweep on a CPU. Each has a gradient accumulator of n·D; with more cores a worker gets more threads.
MAX_WORKERS = 4

Result = TypeVar("Result")
Tiles = Iterator[tuple[int, int, int, int]]


def deal(enough: int, device: torch.device, work: Callable[[int, int], Result]) -> list[Result]:
    """``work(k, workers)`` for every worker k, in this thread or on a CPU in up to ``enough`` of them; in their order."""
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
        torch.set_num_threads(threads)  # what threads that start later will take over


def _share(n: int, split: int, block: int, device: torch.device, work: Callable[[Tiles], Result]) -> list[Result]:
    """``work`` on all tiles, dealt out to workers; results in the workers' order."""
    enough = sum(1 for _ in islice(_tiles(n, split, block), 4 * MAX_WORKERS)) // 4
    return deal(enough, device, lambda worker, workers: work(islice(_tiles(n, split, block), worker, None, workers)))


def tile_size(n: int, device: torch.device) -> int:
    """Rows of a tile. On a CPU a float32 tile and its companion stay in the second-level cache; a GPU wants work."""
    if device.type == "cpu":
        return min(n, 512)
    return min(n, 4096)


class _Side:
    """Row scalars of a tile's anchors, as columns (rows of I) or as a row (rows of J), and the reduction over the rest."""

    def __init__(self, start: int, stop: int, dim: int, **scalars: Tensor | None) -> None:
        self.slice, self.dim = slice(start, stop), dim
        shape = (-1, 1) if dim == 1 else (1, -1)
        for name, vector in scalars.items():
            setattr(self, name, None if vector is None else vector[start:stop].view(shape))


class _Tile:
    """Similarities t of one tile (I, J), with the pair kind's functions for one side at a time.

    A kind that is linear in t gets t/τ from the matrix product: one pass over the tile less, and every sweep rounds
    log f in the same way. t itself is then made only where a caller needs it.
    """

    def __init__(
        self, product: Tensor, excluded: list[int], same_id: Tensor | None, kind: PairKind, tau: Tensor,
        params: tuple[float, ...], need_t: bool,
    ) -> None:  # fmt: skip
        self.excluded, self.same_id, self.kind, self.tau, self.params = excluded, same_id, kind, tau, params
        self._log_f: Tensor | None = None
        self.mask(product)  # the similarity of an excluded pair may be infinite, and 0·inf is not 0
        if kind.linear_in_t:
            self.t = product * tau if need_t else product
            self._log_f = self.mask(product, -torch.inf)
        else:
            self.t = product

    def mask(self, x: Tensor, value: float = 0.0) -> Tensor:
        """Writes ``value`` where a pair is the anchor itself, its positive or of one id; in place."""
        for diagonal in self.excluded:
            x.diagonal(diagonal).fill_(value)
        return x if self.same_id is None else x.masked_fill_(self.same_id, value)

    def log_f(self) -> Tensor:
        """log f of a log kind, −inf at excluded pairs."""
        if self._log_f is None:
            self._log_f = self.mask(self.kind.f(self.t, self.tau, self.params), -torch.inf)
        return self._log_f

    def pieces(self, side: _Side, names: set[str]) -> dict[str, Tensor]:
        """The named ones of f, df, dtau for one side's row scalars, 0 at excluded pairs."""
        kind, tau, params = self.kind, self.tau, self.params
        derivatives = {"df": kind.df, "dtau": kind.dtau}
        if kind.log:
            f = (self.log_f() - side.shift).exp_()
            return {name: f if name == "f" else f * derivatives[name](self.t, tau, params) for name in names}
        x = self.t if side.shift is None else self.t - side.shift
        if side.offset is not None:
            x = x + side.offset
        functions = {"f": kind.f, **derivatives}
        return {name: self.mask(_owned(functions[name](x, tau, params), x)) for name in names}


def _owned(y: Tensor, x: Tensor) -> Tensor:
    """y as a tensor that may be written to: a user's function may return its argument or an expanded constant."""
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


def _clashes(ids: Tensor | None, i0: int, i1: int, j0: int, j1: int) -> Tensor | None:
    """Which pairs of a tile have one id."""
    return None if ids is None else ids[i0:i1, None] == ids[None, j0:j1]


def _rows(f: Tensor, scale: Tensor | None, accumulate: torch.dtype) -> Tensor:
    rows = f.to(accumulate)
    return rows if scale is None else rows * scale.unsqueeze(1)


class _Products:
    """Computes t (or t/τ, see `_Tile`) of any tile into one reused buffer."""

    def __init__(self, rows: Tensor, bias: Tensor | None, block: int, kind: PairKind, tau: Tensor) -> None:
        self.right = rows
        self.left, self.bias = (rows / tau, None if bias is None else bias / tau) if kind.linear_in_t else (rows, bias)
        self.buffer = rows.new_empty(block * block)

    def __call__(self, i0: int, i1: int, j0: int, j1: int) -> Tensor:
        t = self.buffer[: (i1 - i0) * (j1 - j0)].view(i1 - i0, j1 - j0)
        torch.mm(self.left[i0:i1], self.right[j0:j1].t(), out=t)
        if self.bias is not None:
            t.add_(self.bias[i0:i1, None]).add_(self.bias[None, j0:j1])
        return t


def row_sums(
    f: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    center: Tensor,
    shift: Tensor | None,
    offset: Tensor | None,
    tau: Tensor,
    kind_name: str,
    params: tuple[float, ...],
    terms: tuple[str, ...],
    split: int,
    partner: int,
    anchors: int,
    span: tuple[float, ...],
    precision: str = "",
    ids: Tensor | None = None,
) -> Tensor:
    """``out[k, i] = Σ_{j∈Neg(i)} term_k``; with "base" first, relative to exp(base_i) (log kinds)."""
    kind = lookup(kind_name)
    rows = _rows(f, scale, tau.dtype)
    n = rows.shape[0]
    block = tile_size(n, rows.device)
    if terms[0] == "base":
        return _log_sums(rows, bias, center, tau, kind, params, terms, split, partner, anchors, span, block, ids)
    maximum = terms == ("max",)

    def work(tiles: Tiles) -> Tensor:
        products = _Products(rows, bias, block, kind, tau)
        out = rows.new_full((len(terms), anchors), -torch.inf if maximum else 0.0)
        for i0, i1, j0, j1 in tiles:
            excluded = excluded_diagonals(i0, i1, j0, j1, split, partner)
            same_id = _clashes(ids, i0, i1, j0, j1)
            tile = _Tile(products(i0, i1, j0, j1), excluded, same_id, kind, tau, params, need_t=True)  # (i1 − i0, j1 − j0)
            for side in _sides(i0, i1, j0, j1, split, anchors, center=center, shift=shift, offset=offset):
                if maximum:
                    best = out[0, side.slice]
                    torch.maximum(best, tile.mask(tile.t, -torch.inf).amax(side.dim), out=best)
                else:
                    _add_terms(out, tile, side, terms, tile.pieces(side, {_PIECE[term] for term in terms}))
        return out

    out, *others = _share(n, split, block, rows.device, work)
    for other in others:
        out = torch.maximum(out, other) if maximum else out.add_(other)
    return out


def _sides(i0: int, i1: int, j0: int, j1: int, split: int, anchors: int, **scalars: Tensor | None) -> list[_Side]:
    """The anchors that a tile serves: rows I always; rows J unless the tile is diagonal or they are no anchors."""
    sides = [_Side(i0, i1, 1, **scalars)]
    if (j0 > i0 if not split else anchors > split):
        sides.append(_Side(j0, j1, 0, **scalars))
    return sides


_PIECE = {"f": "f", "df": "df", "ft": "f", "dft": "df", "dtau": "dtau"}


def _add_terms(out: Tensor, tile: _Tile, side: _Side, terms: tuple[str, ...], pieces: dict[str, Tensor]) -> None:
    """Adds Σ f, Σ f′, Σ f·(t − center), Σ f′·(t − center), Σ ∂f/∂τ·(t − center − level) over one side of a tile."""
    for k, term in enumerate(terms):
        value = pieces[_PIECE[term]]
        if term in ("ft", "dft"):
            value = value * (tile.t - side.center)
        elif term == "dtau":
            value = value * (tile.t - side.center).sub_(side.level)
        out[k, side.slice] += value.sum(side.dim)


def _log_sums(
    rows: Tensor,
    bias: Tensor | None,
    center: Tensor,
    tau: Tensor,
    kind: PairKind,
    params: tuple[float, ...],
    terms: tuple[str, ...],
    split: int,
    partner: int,
    anchors: int,
    span: tuple[float, ...],
    block: int,
    ids: Tensor | None,
) -> Tensor:
    """base_i, Σ_j exp(log f − base_i) and, where asked for, Σ_j exp(log f − base_i)·(t − center)."""
    with_gap = len(terms) == 3
    middle = middle_of(kind, span, rows.dtype)

    def work(tiles: Tiles) -> tuple[Tensor, Tensor]:
        products = _Products(rows, bias, block, kind, tau)
        sums = rows.new_zeros(1 + with_gap, anchors)
        base = rows.new_full((anchors,), -torch.inf if middle is None else middle)
        for i0, i1, j0, j1 in tiles:
            excluded = excluded_diagonals(i0, i1, j0, j1, split, partner)
            same_id = _clashes(ids, i0, i1, j0, j1)
            tile = _Tile(products(i0, i1, j0, j1), excluded, same_id, kind, tau, params, need_t=with_gap)
            log_f = tile.log_f()
            if middle is not None:
                e = (log_f.sub_(middle) if middle else log_f).exp_()
            for side in _sides(i0, i1, j0, j1, split, anchors, center=center):
                if middle is None:
                    new = torch.maximum(base[side.slice], log_f.amax(side.dim))
                    _rebase(base[side.slice], sums[:, side.slice], new)
                    e = (log_f - _finite(new).view((-1, 1) if side.dim == 1 else (1, -1))).exp_()
                sums[0, side.slice] += e.sum(side.dim)
                if with_gap:
                    sums[1, side.slice] += (e * (tile.t - side.center)).sum(side.dim)
        return base, sums

    (base, sums), *others = _share(rows.shape[0], split, block, rows.device, work)
    for other_base, other_sums in others:
        new = torch.maximum(base, other_base)
        _rebase(base, sums, new)
        _rebase(other_base, other_sums, new)
        sums += other_sums
    return torch.cat([base.unsqueeze(0), sums])


def _finite(base: Tensor) -> Tensor:
    """0 for −inf: so far every pair of the row was excluded."""
    return torch.where(base > -torch.inf, base, 0.0)


def _rebase(base: Tensor, sums: Tensor, new: Tensor) -> None:
    """Makes sums relative to exp(base) relative to exp(new); in place."""
    sums *= (base - _finite(new)).exp()
    base.copy_(new)


def pair_grad(
    f: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    center: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    offset: Tensor | None,
    level: Tensor | None,
    tau: Tensor,
    kind_name: str,
    params: tuple[float, ...],
    weight: str,
    terms: tuple[str, ...],
    split: int,
    partner: int,
    lo: int,
    hi: int,
    span: tuple[float, ...],
    precision: str = "",
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``df_i = Σ_j (g_ij + g_ji) F_j`` for rows [lo, hi); row sums of g_ij + g_ji (with a bias); sums of ``terms``."""
    kind = lookup(kind_name)
    rows = _rows(f, scale, tau.dtype)
    n, anchors = rows.shape[0], gain.shape[0]
    block = tile_size(n, rows.device)
    plain = kind.log and weight == "f" and not terms  # g = gain_i·exp(log f − shift_i): t itself is not needed
    middle = middle_of(kind, span, rows.dtype) if plain else None
    if middle is not None:
        gain = gain * (middle - shift).exp()

    def work(tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
        df = rows.new_zeros(hi - lo, rows.shape[1])
        weight_sums = rows.new_zeros(n if bias is not None else 0)
        sums = rows.new_zeros(len(terms), anchors if terms else 0)
        products = _Products(rows, bias, block, kind, tau)
        scratch = rows.new_empty(block * block)
        for i0, i1, j0, j1 in tiles:
            excluded = excluded_diagonals(i0, i1, j0, j1, split, partner)
            same_id = _clashes(ids, i0, i1, j0, j1)
            tile = _Tile(products(i0, i1, j0, j1), excluded, same_id, kind, tau, params, need_t=not plain)
            sides = _sides(
                i0, i1, j0, j1, split, anchors, center=center, gain=gain, shift=shift, offset=offset, level=level
            )
            if middle is not None:
                log_f = tile.log_f()
                g = (log_f.sub_(middle) if middle else log_f).exp_()
                if len(sides) == 2:
                    both = torch.add(sides[0].gain, sides[1].gain, out=scratch[: g.numel()].view(g.shape))
                    g.mul_(both)
                else:
                    g.mul_(sides[0].gain)
            else:
                g = _weights(tile, sides[0], weight, terms, sums)
                for side in sides[1:]:
                    g += _weights(tile, side, weight, terms, sums)
            diagonal = not split and i0 == j0  # both g_ij and g_ji lie inside the tile
            if diagonal:
                g = g + g.t()
            if bias is not None:
                weight_sums[i0:i1] += g.sum(1)
                if not diagonal:
                    weight_sums[j0:j1] += g.sum(0)
            _add_product(df, g, rows[j0:j1], i0, i1, lo, hi)
            if not diagonal:
                _add_product(df, g.t(), rows[i0:i1], j0, j1, lo, hi)
        return df, weight_sums, sums

    total, *others = _share(n, split, block, rows.device, work)
    for other in others:
        for mine, theirs in zip(total, other, strict=True):
            mine += theirs
    return total


def _weights(tile: _Tile, side: _Side, weight: str, terms: tuple[str, ...], sums: Tensor) -> Tensor:
    """g of one side of a tile; adds the sums of ``terms`` on the way."""
    pieces = tile.pieces(side, {*weight.split("+")} | {_PIECE[term] for term in terms})
    if terms:
        _add_terms(sums, tile, side, terms, pieces)
    if weight == "f+df":
        return (pieces["f"] + pieces["df"] * (tile.t - side.center).sub_(side.level)) * side.gain
    return pieces[weight] * side.gain


def _add_product(df: Tensor, g: Tensor, rows: Tensor, r0: int, r1: int, lo: int, hi: int) -> None:
    """df[r0:r1] += g @ rows, for the part of [r0, r1) inside [lo, hi)."""
    a, b = max(r0, lo), min(r1, hi)
    if a < b:
        df[a - lo : b - lo].addmm_(g[a - r0 : b - r0], rows)
