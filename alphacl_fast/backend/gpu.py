"""The host algorithm of both sweeps on a GPU, for the Triton and the CUDA kernels.

A sweep is cut into regions of rows against columns, and the columns that a row block meets into
splits. Every launch serves one region. Partial sums lie in a workspace and are added in their order
(split-K reduction). If the rows are too long for registers, the weights are written to memory and
cuBLAS multiplies them with the rows. A backend is a subclass of `Sweep`.
"""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import launches
from ..bundles import (
    Form,
    Gradient,
    PairFunction,
    Pairing,
    Rows,
    RowScalars,
    Term,
    Weight,
    accumulation_dtype,
    summed,
)
from . import filling, forms
from .precision import float32_precision

#: The most bytes that a sweep allocates for partial sums, and for the weights of long rows.
WORKSPACE = 256 << 20
#: Most rows of a sweep: kernels count them in 32 bits.
MOST_ROWS = 2**31 - 2**16 - 1
MOST_FEATURES = 2**31 - 2**16 - 1


class Region(NamedTuple):
    """Rows of f that a launch serves, and the columns (rows of f) that they meet."""

    row_start: int
    n_rows: int
    col_start: int
    n_cols: int
    rows_paired: bool  # a block of rows holds rows of one view, then their partners
    cols_paired: bool
    exclude: bool  # rows of the same pair do not meet
    triangle: bool  # both sides are the same rows
    rows_anchor: bool
    cols_anchor: bool


class Launch(NamedTuple):
    """One launch: row blocks of a region against tiles [begin, end) of their schedules."""

    region: Region
    blocks: int
    splits: int  # of each block's schedule
    terms: tuple[Term, ...]  # sums that are wanted
    end: int
    begin: int = 0
    first_block: int = 0
    symmetric: bool = False  # a tile serves its columns too, in slices column_slice + ring distance
    column_slice: int = 0
    gradient: Gradient = Gradient.NONE
    wanted: tuple[int, int] = (0, 0)  # rows that df holds
    sums: Tensor | None = None  # (slices, [shift,] terms, anchors)
    df: Tensor | None = None  # (splits, wanted rows, D)
    weight_sums: Tensor | None = None  # (splits, n)
    weights: Tensor | None = None  # (blocks·tile rows, columns of whole tiles)


# --- arithmetic ------------------------------------------------------------------------


class Arithmetic(NamedTuple):
    """How a call multiplies."""

    mode: str  # bf16, fp16, tf32, bf16x3, fp32 or fp64
    similarities: str  # input precision of the first product
    weights: torch.dtype  # dtype to which weights are rounded for the second product
    products: str  # input precision of the second product

    @property
    def rounds(self) -> bool:
        """Whether weights are rounded, and therefore divided by the largest row weight first."""
        return self.mode not in ("fp32", "fp64")


def arithmetic(dtype: torch.dtype, precision: str, device: torch.device) -> Arithmetic:
    """The arithmetic for a dtype; ``precision`` of float32 products, "" for torch's setting."""
    if dtype == torch.bfloat16:
        return Arithmetic("bf16", "ieee", torch.bfloat16, "ieee")
    if dtype == torch.float16:  # weights may leave its range; float16 rows are exact in TF32
        return Arithmetic("fp16", "ieee", torch.float32, "tf32")
    if dtype == torch.float64:
        return Arithmetic("fp64", "ieee", torch.float64, "ieee")
    precision = precision or float32_precision(device)
    precision = "tf32" if precision == "bf16" else precision
    return Arithmetic(
        "fp32" if precision == "ieee" else precision, precision, torch.float32, precision
    )


@functools.cache
def multiprocessors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few on a CPU, so that tests have splits."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return pretended or 3


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    return pretended_capability


#: Multiprocessors of the GPU that CPU tensors stand in for, 0 if they do not, and its capability.
pretended, pretended_capability = 0, (8, 0)


def pretend_gpu(multiprocessors: int, capability: tuple[int, int] = (8, 0)) -> None:
    """For the rest of this process CPU tensors get the Triton launches of such a GPU."""
    global pretended, pretended_capability
    pretended, pretended_capability = multiprocessors, capability
    launches.forget()
    multiprocessors_of.cache_clear()
    capability_of.cache_clear()


# --- regions --------------------------------------------------------------------------------------


def regions_of(n: int, pairing: Pairing) -> list[Region]:
    """The regions of all rows: one for a triangle, one per side for a rectangle."""
    split, partner, anchors = pairing.split, pairing.partner, pairing.anchors
    if split:
        if partner not in (0, split):
            raise ValueError(f"partner must be 0 or split ({split}) in a rectangle, got {partner}")
        both = anchors > split
        exclude = partner > 0
        return [
            Region(0, split, split, n - split, False, False, exclude, False, True, both),
            Region(split, n - split, 0, split, False, False, exclude, False, both, True),
        ]
    if partner not in (0, n // 2) or (partner and n % 2):
        raise ValueError(f"partner must be 0 or half of the rows ({n}), got {partner}")
    return [Region(0, n, 0, n, partner > 0, partner > 0, True, True, True, True)]


def regions_with_gradient(
    regions: list[Region], n: int, wanted: tuple[int, int], sums: bool
) -> list[tuple[Region, bool]]:
    """The regions that `pair_grad` launches, each with whether its rows' gradient is wanted.

    Raises:
        ValueError: the range ``wanted`` does not consist of whole views.
    """
    low, high = wanted
    if regions[0].rows_paired and wanted != (0, n):  # two_view: each view against all rows
        half = n // 2
        regions = [
            Region(start, half, 0, n, False, True, True, False, True, True) for start in (0, half)
        ]
    chosen = []
    for region in regions:
        begin, end = region.row_start, region.row_start + region.n_rows
        wants = low <= begin and end <= high and low < high
        if not wants and max(low, begin) < min(high, end):
            raise ValueError(
                f"wanted must hold whole views, rows {begin} to {end}, got {low} to {high}"
            )
        if wants or (sums and region.rows_anchor):
            chosen.append((region, wants))
    return chosen


def fitting(bytes_each: int) -> int:
    """How many fit into the workspace, at least one."""
    return max(1, WORKSPACE // bytes_each)


# --- a sweep --------------------------------------------------------------------------------------


class Sweep(abc.ABC):
    """One call of a sweep: its operands, and the choices that hold for all its launches.

    ``weight`` is None for `row_sums`.

    Attributes:
        backend: its name.
        form: how exp(log f) stays in range.
        shift: of the constant form.
        tile_rows, tile_cols: shape of a tile.
        resident: programs that a multiprocessor runs at a time.
        whole: a gradient row fits into registers.
        symmetric: `row_sums` is to read every similarity once.
        unit: () weights are divided by it before they are rounded, gradients multiplied by it; None
            where they are not rounded.
    """

    backend: str
    tile_rows: int
    tile_cols: int
    resident: int = 2
    whole: bool
    symmetric: bool = False

    def __init__(
        self, rows: Rows, pairing: Pairing, function: PairFunction, scalars: RowScalars,
        weight: Weight | None, terms: tuple[Term, ...], precision: str,
    ) -> None:  # fmt: skip
        f = rows.f
        if len(f) > MOST_ROWS:
            raise ValueError(
                f"the {self.backend} backend takes at most {MOST_ROWS} rows, got {len(f)}"
            )
        wide = accumulation_dtype(f.dtype)
        if function.tau.dtype != wide:
            raise ValueError(f"tau must be {wide} for rows of {f.dtype}, got {function.tau.dtype}")
        if f.shape[1] > MOST_FEATURES:
            raise ValueError(
                f"the {self.backend} backend takes {MOST_FEATURES} features at most, "
                f"got {f.shape[1]}"
            )
        if pairing.split >= len(f):
            raise ValueError(
                f"both sides of a sweep must have rows, got {len(f)} rows split at {pairing.split}"
            )
        self.f = f if f.stride(1) == 1 or f.shape[1] == 1 else f.contiguous()
        self.n, self.dim = f.shape
        self.rows = Rows(self.f, *map(_contiguous, rows[1:]))
        if weight is None:
            scalars = scalars._replace(row_weight=None)
        self.scalars = RowScalars(*map(_contiguous, scalars))
        self.pairing, self.function, self.tau = pairing, function, function.tau
        self.weight, self.terms = weight, summed(terms)
        if weight is None:
            self.form, self.shift = forms.of_row_sums(function, terms)
        else:
            self.form, self.shift = forms.of_pair_grad(function, scalars, weight, terms)
        self.arithmetic = arithmetic(f.dtype, precision, f.device)
        self.unit: Tensor | None = None

    def vectors(self, names: tuple[str, ...]) -> tuple[Tensor | None, ...]:
        """The row vectors of these names, from the bundles.

        Ids and largest_t are for backends that serve them.
        """
        pairing = self.pairing
        own = {"ids": pairing.ids, "largest_t": pairing.largest_t}
        known = {**self.rows._asdict(), **self.scalars._asdict(), **own}
        return tuple(known[name] for name in names)

    @abc.abstractmethod
    def launch(self, launch: Launch) -> None:
        """Starts the kernel."""

    @abc.abstractmethod
    def reduce(self, workspace: Tensor, out: Tensor) -> None:
        """out ([shift,] terms, anchors) ← the sums of slices (slices, [shift,] terms, anchors).

        They are added in their order. With a constant shift the slices have no row for it.
        """

    @abc.abstractmethod
    def scale_weights(self) -> None:
        """Gives `scalars` the row weights of the form, and sets `unit` to their largest magnitude.

        In the constant form they are row_weight·exp(constant shift − shift), and no shift is left.
        """

    def splits(self, region: Region, tiles: int | None = None) -> int:
        """Splits of a region's schedules, of all column tiles if ``tiles`` is None."""
        slots = self.resident * multiprocessors_of(self.f.device)
        tiles = self.blocks(region)[1] if tiles is None else tiles
        return filling.splits_of(self.run(region), tiles, slots, self.most_splits(region))

    def most_splits(self, region: Region) -> int:
        """The most splits whose partial sums fit into the workspace, at least two."""
        numbers = len(self.terms) + (self.rows.bias is not None)  # of a row in each split
        if self.weight is None:
            numbers += self.form != Form.CONSTANT
        elif self.whole:
            numbers += self.dim
        return max(2, fitting(max(1, region.n_rows * numbers * self.tau.itemsize)))

    def run(self, region: Region) -> int:
        """Row blocks of a launch: all, or equal runs whose weights fit into the workspace."""
        blocks, tiles = self.blocks(region)
        if self.weight is None or self.whole:
            return blocks
        columns = tiles * self.tile_cols
        most = fitting(self.tile_rows * columns * self.arithmetic.weights.itemsize)
        return -(-blocks // -(-blocks // most))

    def blocks(self, region: Region) -> tuple[int, int]:
        """Row blocks and column tiles."""
        return -(-region.n_rows // self.tile_rows), -(-region.n_cols // self.tile_cols)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# --- sweep 1 --------------------------------------------------------------------------------------


def row_sums(
    backend: type[Sweep], rows: Rows, pairing: Pairing, function: PairFunction, scalars: RowScalars,
    terms: tuple[Term, ...], precision: str,
) -> Tensor:  # fmt: skip
    """(len(terms), anchors): every term summed over the negatives of every anchor."""
    s = backend(rows, pairing, function, scalars, None, terms, precision)
    split, anchors = pairing.split, pairing.anchors
    regions = [region for region in regions_of(s.n, pairing) if region.rows_anchor]
    out = s.tau.new_empty(len(terms), anchors)
    if s.symmetric and (not split or (anchors > split and s.n == 2 * split)):
        _symmetric_sums(s, regions[0], out)
        return out
    computed = _computed(s, out)
    splits = min(map(s.splits, regions))
    workspace = computed.unsqueeze(0) if splits == 1 else out.new_empty(splits, *computed.shape)
    for region in regions:
        blocks, tiles = s.blocks(region)
        s.launch(Launch(region, blocks, splits, s.terms, tiles, sums=workspace))
    if splits > 1:
        s.reduce(workspace, out)
    elif s.form == Form.CONSTANT:
        out[0].fill_(s.shift)
    return out


def _computed(s: Sweep, out: Tensor) -> Tensor:
    """The rows of out that kernels compute: all but a constant shift."""
    return out[1:] if s.form == Form.CONSTANT else out


def _symmetric_sums(s: Sweep, region: Region, out: Tensor) -> None:
    """Fills out (K, anchors), reading every similarity once.

    A block walks half of the ring of column tiles. What the tiles at one ring distance add to their
    columns has a slice of its own; distances go in runs whose slices fit into the workspace.
    """
    blocks, tiles = s.blocks(region)
    distances = tiles // 2 + 1 if region.triangle else tiles
    splits = s.splits(region, distances)
    computed = _computed(s, out)
    run = min(distances, max(1, fitting(computed.numel() * out.element_size()) - splits))
    carried = int(run < distances)  # a slice for the sums of the runs before
    workspace = out.new_empty(splits + carried + run, *computed.shape)
    if carried:
        _clear(workspace[splits], s.form)
    for begin in range(0, distances, run):
        end = min(begin + run, distances)
        column_slice = splits + carried - begin
        if region.triangle and begin == 0:  # a block at ring distance 0 is the row block itself
            _clear(workspace[column_slice], s.form)
        if region.triangle and end == distances and tiles % 2 == 0:
            # only half of the blocks meet half way round the ring
            _clear(workspace[column_slice + end - 1], s.form)
        s.launch(
            Launch(
                region, blocks, splits, s.terms, end, begin, symmetric=True,
                column_slice=column_slice, sums=workspace,
            )
        )  # fmt: skip
        used, n = workspace[: column_slice + end], region.n_rows
        if region.triangle:
            s.reduce(used, out)
        else:  # the first side's sums are row sums, the second's column sums
            s.reduce(used[: splits + carried, :, :n], out[:, :n])
            s.reduce(used[splits:, :, n:], out[:, n:])
        if end < distances:
            workspace[splits].copy_(computed)


def _clear(part: Tensor, form: Form) -> None:
    """Fills a slice with the sums of no pairs; in place."""
    part.zero_()
    if form in (Form.ONLINE, Form.T_MAX):
        part[0].fill_(-torch.inf)


# --- sweep 2 --------------------------------------------------------------------------------------


def pair_grad(
    backend: type[Sweep], rows: Rows, pairing: Pairing, function: PairFunction, scalars: RowScalars,
    weight: Weight, terms: tuple[Term, ...], wanted: tuple[int, int], precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Σ_j (g_ij + g_ji)·F_j of ``wanted`` rows, sums of the weights (with a bias) and of
    ``terms``.
    """
    s = backend(rows, pairing, function, scalars, weight, terms, precision)
    s.scale_weights()
    regions = regions_with_gradient(regions_of(s.n, pairing), s.n, wanted, bool(terms))
    splits = min((s.splits(region) for region, _ in regions), default=1)
    low, high = wanted
    df = s.tau.new_empty(splits if s.whole else 1, high - low, s.dim)
    allocate = s.tau.new_empty if wanted == (0, s.n) else s.tau.new_zeros
    weight_sums = allocate(splits, s.n if rows.bias is not None else 0)
    sums = s.tau.new_empty(splits, len(terms), pairing.anchors if terms else 0)
    for region, wants in regions:
        own_terms = terms if region.rows_anchor else ()
        blocks, tiles = s.blocks(region)
        launch = Launch(
            region, blocks, splits, own_terms, tiles, wanted=wanted,
            sums=sums if own_terms else None,
            weight_sums=weight_sums if rows.bias is not None else None,
        )  # fmt: skip
        if not wants:
            s.launch(launch)
        elif s.whole:
            s.launch(launch._replace(gradient=Gradient.PRODUCT, df=df))
        else:
            _multiply_in_runs(s, launch, df[0])
    if s.unit is not None and not s.whole:
        df *= torch.where(s.unit > 0, s.unit, 1.0)
    return tuple(x[0] if x.shape[0] == 1 else x.sum(0) for x in (df, weight_sums, sums))


def _multiply_in_runs(s: Sweep, launch: Launch, df: Tensor) -> None:
    """df ← W·F, in runs of row blocks whose weights W fit into the workspace."""
    dtype, columns = s.arithmetic.weights, _columns_of_weights(s, launch.region)
    if not (columns.is_cuda and dtype.itemsize == 2):
        columns = columns.to(df.dtype)
    run = s.run(launch.region)
    for first in range(0, launch.blocks, run):
        count = min(run, launch.blocks - first)
        weights = s.f.new_empty(count * s.tile_rows, len(columns), dtype=dtype)
        s.launch(
            launch._replace(
                blocks=count, first_block=first, gradient=Gradient.WEIGHTS, weights=weights
            )
        )
        _multiply(s, launch, weights, columns, first, df)


def _columns_of_weights(s: Sweep, region: Region) -> Tensor:
    """The factor F of the product W·F, with a row for each column of W.

    W covers whole tiles, so F has zero rows where no row of f exists. With two views the first
    halves of all tiles come before the second halves.
    """
    columns, length = s.f[region.col_start :][: region.n_cols], s.blocks(region)[1] * s.tile_cols
    if length == region.n_cols:
        return columns
    views = 2 if region.cols_paired else 1
    padded = columns.new_zeros(views, length // views, s.dim)
    padded[:, : region.n_cols // views] = columns.unflatten(0, (views, -1))
    return padded.flatten(0, 1)


def _multiply(
    s: Sweep, launch: Launch, weights: Tensor, columns: Tensor, first: int, df: Tensor
) -> None:
    """df ← W·F for the row blocks from ``first`` on; W (rows, columns) has their row order."""
    region, size = launch.region, s.tile_rows
    if columns.is_cuda and weights.itemsize == 2:
        product = torch.mm(weights, columns, out_dtype=torch.float32)
    else:
        product = launches.as_one(
            _precise_product, weights, columns, df.dtype, s.arithmetic.products
        )
    # a block's first half are rows of one view, its second half their partners
    if region.rows_paired:
        pairs = product.view(-1, 2, size // 2, s.dim).transpose(0, 1).flatten(1, 2)
        out = df.view(2, -1, s.dim)[:, first * size // 2 :][:, : pairs.shape[1]]
        out.copy_(pairs[:, : out.shape[1]])
    else:
        begin = region.row_start + first * size - launch.wanted[0]
        rows = min(len(weights), region.n_rows - first * size)
        df[begin : begin + rows] = product[:rows]


def _precise_product(
    weights: Tensor, columns: Tensor, dtype: torch.dtype, precision: str
) -> Tensor:
    with matmul_precision(precision):
        return weights.to(dtype) @ columns


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Within the context torch multiplies float32 at this precision on GPUs (bf16x3 as IEEE)."""
    matmul = torch.backends.cuda.matmul
    name, wanted = "fp32_precision", "ieee" if precision == "bf16x3" else precision
    if not hasattr(matmul, name):
        name, wanted = "allow_tf32", precision == "tf32"
    before = getattr(matmul, name)
    setattr(matmul, name, wanted)
    try:
        yield
    finally:
        setattr(matmul, name, before)
