"""The two Triton kernels, `row_sums` and `pair_grad` of docs/design.md, for every pair kind and
mode.

A program owns BLOCK_M rows "i" and walks over column tiles of BLOCK_N rows "j" each, in the order
of a ring that begins at its diagonal (`_schedule`):

* **Paired blocks.** In two_view a block of B rows holds B/2 rows of the first view, then their
  partners in the second. Pairs that do not meet (a row with itself or its positive) thus lie in the
  first tiles of every schedule. Only these and a ragged last tile are masked, in a loop of their
  own; with ids, where equal ones may meet anywhere, every tile is masked. Beyond the last row the
  last one is read again. (A branch in one loop would not do: the compiler turns it into selections,
  for which every pair pays.)
* **Splits.** A program sees every column tile and writes each of its results once; the order of all
  additions is fixed. Where there are too few row blocks several programs split a schedule
  (split-K), and their results are added afterwards.
* **Symmetric tiles** (SYMMETRIC, of `row_sums`): block I walks over half of the ring, and a tile
  also serves its columns J, whose sums go to slices of their own; their order is fixed.

An absent row scalar is an empty tuple and a present one a tuple of one vector, because Triton
functions cannot return None.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rows import larger, largest_along, rounded_to_tf32


class Vectors(NamedTuple):
    """Pointers to one value per row, in the accumulation dtype (ids: int32), or None."""

    scale: Any
    bias: Any
    moment_origin: Any
    row_weight: Any
    shift: Any
    argument_offset: Any
    baseline: Any
    ids: Any
    largest_t: Any


class Side(NamedTuple):
    """The rows of one side of a tile.

    ``row = base + local`` are rows of f; rows of the two sides with the same ``pair`` do not meet;
    ``keep`` says which rows exist.
    """

    base: Any
    local: Any
    pair: Any
    keep: Any
    scale: Any
    bias: Any
    moment_origin: Any
    row_weight: Any
    shift: Any
    argument_offset: Any
    baseline: Any
    ids: Any
    largest_t: Any


class Common(NamedTuple):
    """The values that every tile of a program needs."""

    f_ptr: Any
    stride: Any
    v: Any  # Vectors
    tau: Any
    constant_shift: Any
    unit: Any
    inv_unit: Any
    out: Any
    anchors: Any
    n_cols: Any
    col_start: Any
    half: Any


class Static(NamedTuple):
    """The choices for which a kernel is compiled.

    F, DF and DTAU are Triton functions (x, τ) of a pair kind, None where they are not needed.
    """

    F: Any
    DF: Any
    DTAU: Any
    LOG: bool  # F is log f, and DF, DTAU its derivatives
    LINEAR: bool  # log f = t/τ
    # As `Form`: CONSTANT: exp(log f − constant_shift); ONLINE: relative to the row's maximum;
    # PLAIN; T_MAX.
    FORM: str
    TERMS: tuple[str, ...]  # as `Term`
    D: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    ACC: Any  # float32 or float64
    PRECISION: str  # of the product of similarities
    UPCAST: bool  # multiply as float32 (the interpreter multiplies bfloat16 wrongly)
    EXCLUDE: bool  # rows of the same pair do not count
    TRIANGLE: bool  # both sides are the same rows
    SYMMETRIC: bool  # a tile serves its columns too
    ROWS_PAIRED: bool  # a block holds rows of both views
    COLS_PAIRED: bool
    ROWS_ANCHOR: bool = True
    COLS_ANCHOR: bool = True
    WEIGHT: str = "F"  # as `Weight`
    GRADIENT: str = (
        "PRODUCT"  # as `Gradient`: PRODUCT; WEIGHTS: W itself, for cuBLAS; NONE: sums only
    )
    W_TYPE: Any = None  # to which weights are rounded for the second product
    W_PRECISION: str = "ieee"
    IDS: bool = False  # rows of one id do not meet: every tile is masked
    LIMITED: bool = False  # pairs with t above an anchor's largest_t do not count for it
    WEIGHTED: bool = False  # the bias holds log-weights: limits are compared before it is added

    @property
    def cache_key(self) -> str:
        """Identifies the functions by their source; str() would give their names alone."""
        return "-".join(x.cache_key if hasattr(x, "cache_key") else str(x) for x in self)


# --- rows and tiles -------------------------------------------------------------------------------


@triton.jit
def _load(a_ptr, b_ptr, side):
    """Two row scalars, either of which may be absent, in one load.

    Otherwise every thread that needs a vector would load it by itself, 4 bytes at a time. Of a
    (rows, 2) tile each thread loads one element, and shared memory distributes them.
    """
    if a_ptr is None and b_ptr is None:
        return (), ()
    elif a_ptr is None:
        return (), (_split(b_ptr, b_ptr, side)[1],)
    elif b_ptr is None:
        return (_split(a_ptr, a_ptr, side)[0],), ()
    else:
        a, b = _split(a_ptr, b_ptr, side)
        return (a,), (b,)


@triton.jit
def _split(a_ptr, b_ptr, side):
    first = (tl.arange(0, 2) == 0)[None, :]
    return tl.split(
        tl.load(tl.where(first, a_ptr + side.base, b_ptr + side.base) + side.local[:, None])
    )


@triton.jit
def _side(v, block, n, start, half, SIZE: tl.constexpr, PAIRED: tl.constexpr, ANCHOR: tl.constexpr):
    """Block number ``block`` of a side with n rows from row ``start`` on.

    Partners are ``half`` rows apart.
    """
    offs = tl.arange(0, SIZE)
    if PAIRED:
        base, inside = block * (SIZE // 2), offs % (SIZE // 2)
        local = tl.minimum(inside, half - 1 - base) + offs // (SIZE // 2) * half
        side = Side(
            start + base, local, base + inside, base + inside < half,
            (), (), (), (), (), (), (), (), (),
        )  # fmt: skip
    else:
        base = block * SIZE
        local = tl.minimum(offs, n - 1 - base)
        side = Side(
            start + base, local, base + offs, base + offs < n,
            (), (), (), (), (), (), (), (), (),
        )  # fmt: skip
    ids, _ = _load(v.ids, None, side)
    if ANCHOR:
        scale, row_weight = _load(v.scale, v.row_weight, side)
        moment_origin, shift = _load(v.moment_origin, v.shift, side)
        argument_offset, baseline = _load(v.argument_offset, v.baseline, side)
        bias, largest_t = _load(v.bias, v.largest_t, side)
        return Side(
            side.base,
            side.local,
            side.pair,
            side.keep,
            scale,
            bias,
            moment_origin,
            row_weight,
            shift,
            argument_offset,
            baseline,
            ids,
            largest_t,
        )
    else:
        scale, bias = _load(v.scale, v.bias, side)
        return Side(
            side.base, side.local, side.pair, side.keep, scale, bias, (), (), (), (), (), ids, ()
        )


@triton.jit
def _features(f_ptr, stride, side, d, S: tl.constexpr):
    """(rows, BLOCK_D) features from d on, 0 beyond D.

    Offsets have 64 bits: n·D passes 2³¹ at n = 4 M, D = 512.
    """
    offs_d = d + tl.arange(0, S.BLOCK_D)
    ptrs = (
        f_ptr
        + side.base.to(tl.int64) * stride
        + (side.local.to(tl.int64)[:, None] * stride + offs_d[None, :])
    )
    if S.D % S.BLOCK_D != 0:
        return tl.load(ptrs, mask=(offs_d < S.D)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _dot(a, b, acc, S: tl.constexpr, SECOND: tl.constexpr):
    """acc + a @ b, of the first product or of the second."""
    PRECISION: tl.constexpr = S.W_PRECISION if SECOND else S.PRECISION
    if S.UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _scaled(t, i, j):
    """t_ij from ⟨f_i, f_j⟩ without and with the bias.

    Row scalars meet first: t_ij and t_ji must agree to the last bit.
    """
    if len(i.scale):
        t = t * (i.scale[0][:, None] * j.scale[0][None, :])
    unbiased = t
    if len(i.bias):
        t = t + (i.bias[0][:, None] + j.bias[0][None, :])
    return unbiased, t


@triton.jit
def _similarities(f_ptr, stride, f_i, i, j, S: tl.constexpr):
    """t (BLOCK_M, BLOCK_N) without and with the bias, and f_j (BLOCK_N, BLOCK_D) where a row fits
    into one chunk.
    """
    M: tl.constexpr = S.BLOCK_M
    N: tl.constexpr = S.BLOCK_N
    t = tl.zeros((M, N), S.ACC)
    if len(f_i):
        f_j = _features(f_ptr, stride, j, 0, S)
        t = _dot(f_i[0], tl.trans(f_j), t, S, False)
        unbiased, t = _scaled(t, i, j)
        return unbiased, t, (f_j,)
    else:
        for d in range(0, S.D, S.BLOCK_D):
            a, b = _features(f_ptr, stride, i, d, S), _features(f_ptr, stride, j, d, S)
            t = _dot(a, tl.trans(b), t, S, False)
        unbiased, t = _scaled(t, i, j)
        return unbiased, t, ()


@triton.jit
def _schedule(block_i, split, splits, n_rows, n_cols, begin, end, S: tl.constexpr):
    """Split ``split`` of the positions [begin, end) of block I's schedule, a ring of column tiles.

    Returns the number of column tiles, the tile at position 0, where the split begins, how many
    positions from there on are masked, the one masked position beyond them (or -1), and how many
    are not masked.
    """
    tiles = tl.cdiv(n_cols, S.BLOCK_N)
    # half way round an even ring both ends meet: the first half of the blocks serves that tile
    if S.TRIANGLE and S.SYMMETRIC:
        end = tl.where((tiles % 2 == 0) & (block_i >= tiles // 2), tl.minimum(end, tiles // 2), end)
    each = tl.cdiv(end - begin, splits)
    begin = tl.minimum(begin + split * each, end)
    end = tl.minimum(begin + each, end)

    ROW_PAIRS: tl.constexpr = S.BLOCK_M // 2 if S.ROWS_PAIRED else S.BLOCK_M
    COL_PAIRS: tl.constexpr = S.BLOCK_N // 2 if S.COLS_PAIRED else S.BLOCK_N
    first = block_i * ROW_PAIRS // COL_PAIRS
    special = 0
    if S.EXCLUDE:
        special = (block_i * ROW_PAIRS + ROW_PAIRS - 1) // COL_PAIRS - first + 1
    first = first % tiles
    if S.SYMMETRIC:  # rows that do not exist, in a ragged block I, must not count for J
        special = tl.where((block_i + 1) * S.BLOCK_M > n_rows, end, special)
    if S.IDS:
        special = end
    masked = tl.maximum(tl.minimum(end, special) - begin, 0)
    ragged = tl.where(n_cols % S.BLOCK_N != 0, (2 * tiles - 1 - first) % tiles, -1)
    ragged = tl.where((ragged >= begin + masked) & (ragged < end), ragged, -1)
    plain = end - begin - masked - tl.where(ragged >= 0, 1, 0)
    return tiles, first, begin, masked, ragged, plain


@triton.jit
def _counted(x, other, i, j, S: tl.constexpr, MASKED: tl.constexpr):
    """``other`` where a pair does not count."""
    if MASKED:
        keep = i.keep[:, None] & j.keep[None, :]
        if S.EXCLUDE:
            keep = keep & (i.pair[:, None] != j.pair[None, :])
        if S.IDS:
            keep = keep & (i.ids[0][:, None] != j.ids[0][None, :])
        x = tl.where(keep, x, other)
    return x


@triton.jit
def _compared(unbiased, t, S: tl.constexpr):
    """The similarity that limits are compared with: a log-weight is no part of it."""
    if S.WEIGHTED:
        return unbiased
    else:
        return t


@triton.jit
def _of_side(x, other, t, side, axis: tl.constexpr, S: tl.constexpr):
    """``other`` where a pair is too similar to count for the side's anchor; a NaN counts."""
    if S.LIMITED:
        x = tl.where(t > tl.expand_dims(side.largest_t[0], axis), other, x)
    return x


@triton.jit
def _log_f(t, i, j, c, S: tl.constexpr, MASKED: tl.constexpr):
    """log f, −inf where a pair does not count, and the t that moments take.

    For the exp kind that t is τ·log f: where |t|/τ is large, the two must have been rounded
    together.
    """
    log_f = S.F(t, c.tau)
    if S.LINEAR:
        t = _counted(log_f * c.tau, 0.0, i, j, S, MASKED)
    return (_counted(log_f, float("-inf"), i, j, S, MASKED),), t


# --- pieces and sums of a tile --------------------------------------------------------------------


@triton.jit
def _minus(t, v, axis: tl.constexpr):
    """t less a scalar of each row (axis 1) or of each column (axis 0)."""
    if len(v):
        return t - tl.expand_dims(v[0], axis)
    else:
        return t


@triton.jit
def _exp(x):
    """exp x by the hardware's exp2; 0 below 1e-38, where tl.exp spends three more instructions."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _exp_constant(log_f, constant_shift):
    """exp(log f − constant_shift) by one multiply-add and the hardware's exp2."""
    if log_f.dtype == tl.float64:
        return tl.exp(log_f - constant_shift)
    else:
        return tl.exp2(log_f * 1.4426950408889634 - constant_shift * 1.4426950408889634)


@triton.jit
def _values(
    t, raw, log_f, i, j, side, tau, axis: tl.constexpr, S: tl.constexpr, MASKED: tl.constexpr
):
    """f, df and ∂f/∂τ with one side's row scalars, each in a tuple: empty where it is not
    needed.

    ``raw`` is the similarity that limits are compared with.
    """
    f, df, dtau = (), (), ()
    if S.LOG:
        f = (_of_side(_exp(_minus(log_f[0], side.shift, axis)), 0.0, raw, side, axis, S),)
        if S.DF is not None:
            df = (f[0] * S.DF(t, tau),)
        if S.DTAU is not None:
            dtau = (f[0] * S.DTAU(t, tau),)
    else:
        x = _minus(t, side.shift, axis)
        if len(side.argument_offset):
            x = x + tl.expand_dims(side.argument_offset[0], axis)
        if S.F is not None:
            f = (_of_side(_counted(S.F(x, tau), 0.0, i, j, S, MASKED), 0.0, raw, side, axis, S),)
        if S.DF is not None:
            df = (_of_side(_counted(S.DF(x, tau), 0.0, i, j, S, MASKED), 0.0, raw, side, axis, S),)
        if S.DTAU is not None:
            dtau = (
                _of_side(_counted(S.DTAU(x, tau), 0.0, i, j, S, MASKED), 0.0, raw, side, axis, S),
            )
    return f, df, dtau


@triton.jit
def _term(K: tl.constexpr, t, f, df, dtau, side, axis: tl.constexpr, S: tl.constexpr):
    """One of the sums of `Term`, over one tile."""
    NAME: tl.constexpr = S.TERMS[K]
    if NAME == "F":
        return tl.sum(f[0], axis)
    elif NAME == "DF":
        return tl.sum(df[0], axis)
    elif NAME == "F_MOMENT":
        return tl.sum(f[0] * _minus(t, side.moment_origin, axis), axis)
    elif NAME == "DF_MOMENT":
        return tl.sum(df[0] * _minus(t, side.moment_origin, axis), axis)
    else:
        return tl.sum(
            dtau[0] * _minus(_minus(t, side.moment_origin, axis), side.baseline, axis), axis
        )


@triton.jit
def _terms(t, f, df, dtau, side, axis: tl.constexpr, S: tl.constexpr):
    sums = ()
    for k in tl.static_range(len(S.TERMS)):
        sums = sums + (_term(k, t, f, df, dtau, side, axis, S),)
    return sums


@triton.jit
def _zeros(SIZE: tl.constexpr, COUNT: tl.constexpr, S: tl.constexpr):
    vectors = ()
    for _ in tl.static_range(COUNT):
        vectors = vectors + (tl.zeros((SIZE,), S.ACC),)
    return vectors


@triton.jit
def _add(totals, comps, sums):
    """totals + sums by Kahan summation, because a row's terms arrive over thousands of tiles.

    Infinite totals stay infinite.
    """
    new_totals, new_comps = (), ()
    for k in tl.static_range(len(sums)):
        y = sums[k] - comps[k]
        new = totals[k] + y
        comp = (new - totals[k]) - y
        new_totals = new_totals + (new,)
        new_comps = new_comps + (tl.where(tl.abs(new) < float("inf"), comp, 0.0),)
    return new_totals, new_comps


@triton.jit
def _times(vectors, factor):
    scaled = ()
    for k in tl.static_range(len(vectors)):
        scaled = scaled + (vectors[k] * factor,)
    return scaled


@triton.jit
def _store_sums(out_ptr, number, anchors, side, keep, largest, sums):
    """Slice ``number`` of a workspace (slices, [largest,] terms, anchors)."""
    ptrs = (
        out_ptr
        + number.to(tl.int64) * (len(largest) + len(sums)) * anchors
        + (side.base + side.local)
    )
    if len(largest):
        tl.store(ptrs, largest[0], mask=keep)
    for k in tl.static_range(len(sums)):
        tl.store(ptrs + (k + len(largest)) * anchors.to(tl.int64), sums[k], mask=keep)


# --- sweep 1 --------------------------------------------------------------------------------------


@triton.jit
def _side_sums(
    t, raw, log_f, e, i, j, side, tau, axis: tl.constexpr, S: tl.constexpr, MASKED: tl.constexpr
):
    """One side's largest log f (online) or t, and its sums of a tile."""
    if S.FORM == "T_MAX":
        t = _of_side(_counted(t, float("-inf"), i, j, S, MASKED), float("-inf"), raw, side, axis, S)
        return (largest_along(t, axis),), ()
    elif S.FORM == "CONSTANT":
        return (), _terms(t, (_of_side(e[0], 0.0, raw, side, axis, S),), (), (), side, axis, S)
    elif S.FORM == "ONLINE":
        counted = _of_side(log_f[0], float("-inf"), raw, side, axis, S)
        largest = tl.max(counted, axis)
        # no pair of the row counts in this tile
        finite = tl.where(largest > float("-inf"), largest, 0.0)
        return (largest,), _terms(
            t, (_exp(_minus(counted, (finite,), axis)),), (), (), side, axis, S
        )
    else:
        f, df, dtau = _values(t, raw, log_f, i, j, side, tau, axis, S, MASKED)
        return (), _terms(t, f, df, dtau, side, axis, S)


@triton.jit
def _merge(largest, totals, comps, tile_largest, sums, S: tl.constexpr):
    """Adds a tile's sums; online (as online softmax) each relative to its own largest log f."""
    if S.FORM == "T_MAX":
        return (larger(largest[0], tile_largest[0]),), totals, comps
    elif S.FORM == "ONLINE":
        new = tl.maximum(largest[0], tile_largest[0])
        finite = tl.where(new > float("-inf"), new, 0.0)
        old = tl.exp(largest[0] - finite)
        totals, comps = _add(
            _times(totals, old), _times(comps, old), _times(sums, tl.exp(tile_largest[0] - finite))
        )
        return (new,), totals, comps
    else:
        totals, comps = _add(totals, comps, sums)
        return (), totals, comps


@triton.jit
def _sum_tile(
    largest, totals, comps, tile, at, column_slice, i, f_i, c, S: tl.constexpr, MASKED: tl.constexpr
):
    """Adds a tile to the sums of rows I.

    A symmetric tile's sums of rows J go to their own slice.
    """
    j = _side(c.v, tile, c.n_cols, c.col_start, c.half, S.BLOCK_N, S.COLS_PAIRED, S.SYMMETRIC)
    unbiased, t, _ = _similarities(c.f_ptr, c.stride, f_i, i, j, S)
    # an excluded pair's similarity may be infinite, and 0·inf is not 0
    t = _counted(t, 0.0, i, j, S, MASKED)
    raw, log_f, e = _compared(unbiased, t, S), (), ()
    if S.LOG:
        log_f, t = _log_f(t, i, j, c, S, MASKED)
        if S.FORM == "CONSTANT":
            e = (_exp_constant(log_f[0], c.constant_shift),)
    tile_largest, sums = _side_sums(t, raw, log_f, e, i, j, i, c.tau, 1, S, MASKED)
    largest, totals, comps = _merge(largest, totals, comps, tile_largest, sums, S)
    if S.SYMMETRIC:
        keep = j.keep
        if S.TRIANGLE:
            keep = keep & (at > 0)
        tile_largest, sums = _side_sums(t, raw, log_f, e, i, j, j, c.tau, 0, S, MASKED)
        _store_sums(c.out, column_slice + at, c.anchors, j, keep, tile_largest, sums)
    return largest, totals, comps


@triton.jit(
    do_not_specialize=[
        "n_rows",
        "n_cols",
        "row_start",
        "col_start",
        "half",
        "anchors",
        "begin",
        "end",
        "column_slice",
        "constant_shift",
    ],
    do_not_specialize_on_alignment=["out_ptr"],
)
def row_sums(
    f_ptr,
    v,
    tau_ptr,
    out_ptr,
    stride,
    n_rows,
    n_cols,
    row_start,
    col_start,
    half,
    anchors,
    begin,
    end,
    column_slice,
    constant_shift,
    S: tl.constexpr,
):
    """Sums of S.TERMS over the positions [begin, end) of every block's schedule.

    Grid (row blocks, splits).

    Args:
        f_ptr: (rows, D) features with row stride ``stride``, unit column stride.
        v: `Vectors`, (rows,) or (anchors,) ACC each.
        tau_ptr: () ACC.
        n_rows, n_cols: rows of the two sides, which begin at the rows row_start, col_start of f.
        out_ptr: (slices, [largest,] terms, anchors) ACC: a split's rows in slice ``split``; what
            symmetric tiles at ring distance t add to their columns in slice ``column_slice + t``
            (distance 0 of a triangle adds nothing).
        constant_shift: of the constant form; float.
    """
    tau = tl.load(tau_ptr)
    c = Common(
        f_ptr, stride, v, tau, constant_shift, (), (), out_ptr, anchors, n_cols, col_start, half
    )
    block_i, split = tl.program_id(0), tl.program_id(1)
    M: tl.constexpr = S.BLOCK_M
    i = _side(v, block_i, n_rows, row_start, half, S.BLOCK_M, S.ROWS_PAIRED, True)
    f_i, largest = (), ()
    if S.D <= S.BLOCK_D:
        f_i = (_features(f_ptr, stride, i, 0, S),)
    if S.FORM == "ONLINE" or S.FORM == "T_MAX":
        largest = (tl.full((M,), float("-inf"), S.ACC),)
    totals, comps = _zeros(M, len(S.TERMS), S), _zeros(M, len(S.TERMS), S)
    tiles, first, begin, masked, ragged, plain = _schedule(
        block_i, split, tl.num_programs(1), n_rows, n_cols, begin, end, S
    )
    for k in range(0, masked + tl.where(ragged >= 0, 1, 0)):
        at = tl.where(k < masked, begin + k, ragged)
        largest, totals, comps = _sum_tile(
            largest, totals, comps, (first + at) % tiles, at, column_slice, i, f_i, c, S, True
        )
    if not S.IDS:
        for k in range(begin + masked, begin + masked + plain):
            at = k + tl.where((ragged >= 0) & (k >= ragged), 1, 0)
            largest, totals, comps = _sum_tile(
                largest, totals, comps, (first + at) % tiles, at, column_slice, i, f_i, c, S, False
            )
    _store_sums(out_ptr, split, anchors, i, i.keep, largest, totals)


# --- sweep 2 --------------------------------------------------------------------------------------


class Outputs(NamedTuple):
    """Where `pair_grad` writes; None where it does not."""

    df: Any
    weight_sums: Any
    sums: Any
    weights: Any


@triton.jit
def _side_weights(
    t, raw, log_f, i, j, side, c, axis: tl.constexpr, S: tl.constexpr, MASKED: tl.constexpr
):
    """g of one side's anchors with their pieces."""
    f, df, dtau = _values(t, raw, log_f, i, j, side, c.tau, axis, S, MASKED)
    if S.WEIGHT == "F":
        g = f[0]
    elif S.WEIGHT == "DF":
        g = df[0]
    else:
        g = f[0] + df[0] * _minus(_minus(t, side.moment_origin, axis), side.baseline, axis)
    return g * tl.expand_dims(side.row_weight[0] * c.inv_unit, axis), f, df, dtau


@triton.jit
def _constant_weights(log_f, raw, i, j, c, S: tl.constexpr):
    """g_ij + g_ji of the constant form: one exponential serves both anchors of a pair."""
    e = _exp_constant(log_f, c.constant_shift)
    if S.LIMITED:
        both = tl.zeros(e.shape, S.ACC)
        if S.ROWS_ANCHOR:
            both += _of_side((i.row_weight[0] * c.inv_unit)[:, None] + both, 0.0, raw, i, 1, S)
        if S.COLS_ANCHOR:
            none = tl.zeros(e.shape, S.ACC)
            both += _of_side((j.row_weight[0] * c.inv_unit)[None, :] + none, 0.0, raw, j, 0, S)
        return e * both
    elif S.ROWS_ANCHOR and S.COLS_ANCHOR:
        return e * (
            (i.row_weight[0] * c.inv_unit)[:, None] + (j.row_weight[0] * c.inv_unit)[None, :]
        )
    elif S.ROWS_ANCHOR:
        return e * (i.row_weight[0] * c.inv_unit)[:, None]
    else:
        return e * (j.row_weight[0] * c.inv_unit)[None, :]


@triton.jit
def _factor(w, j, S: tl.constexpr):
    """W as a factor of the product with rows J: multiplied by their scales, then rounded.

    In this way normalised rows are never rounded.
    """
    if len(j.scale):
        w = w * j.scale[0][None, :]
    w = w.to(S.W_TYPE)
    if S.W_PRECISION == "tf32":
        w = rounded_to_tf32(w)
    return w


@triton.jit
def _grad_tile(
    acc,
    w_total,
    w_comp,
    totals,
    comps,
    tile,
    block_w,
    i,
    f_i,
    c,
    S: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds W·F_J of one tile to the gradient of rows I, or writes W."""
    j = _side(c.v, tile, c.n_cols, c.col_start, c.half, S.BLOCK_N, S.COLS_PAIRED, S.COLS_ANCHOR)
    unbiased, t, f_j = _similarities(c.f_ptr, c.stride, f_i, i, j, S)
    t = _counted(t, 0.0, i, j, S, MASKED)
    raw, log_f = _compared(unbiased, t, S), ()
    if S.LOG:
        log_f, t = _log_f(t, i, j, c, S, MASKED)
    if S.FORM == "CONSTANT":
        w = _constant_weights(log_f[0], raw, i, j, c, S)
    else:
        w = tl.zeros(t.shape, S.ACC)
        if S.ROWS_ANCHOR:
            g, f, df, dtau = _side_weights(t, raw, log_f, i, j, i, c, 1, S, MASKED)
            totals, comps = _add(totals, comps, _terms(t, f, df, dtau, i, 1, S))
            w += g
        if S.COLS_ANCHOR:
            g, f, df, dtau = _side_weights(t, raw, log_f, i, j, j, c, 0, S, MASKED)
            w += g
    if len(w_total):
        w_total, w_comp = _add(w_total, w_comp, (tl.sum(w, 1),))
    if S.GRADIENT == "WEIGHTS":
        # W covers whole tiles; with two views all first halves come before the second halves
        HALF: tl.constexpr = S.BLOCK_N // 2 if S.COLS_PAIRED else S.BLOCK_N
        columns = tl.cdiv(c.n_cols, S.BLOCK_N) * S.BLOCK_N
        row, column = tl.arange(0, S.BLOCK_M), tl.arange(0, S.BLOCK_N)
        first = (block_w * S.BLOCK_M + row).to(tl.int64) * columns + tile * HALF
        at = column % HALF + column // HALF * (columns // 2)
        tl.store(c.out.weights + first[:, None] + at[None, :], _factor(w, j, S))
    elif S.GRADIENT == "PRODUCT":
        acc = (_dot(_factor(w, j, S), f_j[0].to(S.W_TYPE), acc[0], S, True),)
    return acc, w_total, w_comp, totals, comps


@triton.jit(
    do_not_specialize=[
        "n_rows",
        "n_cols",
        "row_start",
        "col_start",
        "half",
        "anchors",
        "n",
        "n_out",
        "lo",
        "first_block",
        "constant_shift",
    ]
)
def pair_grad(
    f_ptr,
    v,
    tau_ptr,
    unit_ptr,
    out,
    stride,
    n_rows,
    n_cols,
    row_start,
    col_start,
    half,
    anchors,
    n,
    n_out,
    lo,
    first_block,
    constant_shift,
    S: tl.constexpr,
):
    """df_i = Σ_j (g_ij + g_ji) F_j of every row, with the sums of S.TERMS over its pairs.

    Grid (row blocks, splits).

    Args (`row_sums` explains the others):
        unit_ptr: () ACC or None: weights are divided by it before they are rounded, gradients
            multiplied by it.
        out: `Outputs`, ACC but for weights: df (splits, n_out, D), for the rows of f from ``lo``
            on; weight_sums (splits, n): sums of g_ij + g_ji; sums (splits, terms, anchors); weights
            (programs·BLOCK_M, columns of whole tiles) W_TYPE, a block's rows in its own order;
            pairs that do not exist weigh 0.
        first_block: the first row block of the launch.
        constant_shift: of the constant form, in which v.row_weight already holds
            row_weight·exp(constant_shift − shift).
    """
    tau = tl.load(tau_ptr)
    unit, inv_unit = 1.0, 1.0
    if unit_ptr is not None:
        unit = tl.load(unit_ptr)
        unit = tl.where(unit > 0, unit, 1.0)
        inv_unit = 1.0 / unit
    c = Common(
        f_ptr, stride, v, tau, constant_shift, unit, inv_unit, out, anchors, n_cols, col_start, half
    )
    block_w, split = tl.program_id(0), tl.program_id(1)
    block_i = block_w + first_block
    M: tl.constexpr = S.BLOCK_M
    K: tl.constexpr = S.BLOCK_D
    i = _side(v, block_i, n_rows, row_start, half, S.BLOCK_M, S.ROWS_PAIRED, S.ROWS_ANCHOR)
    f_i, acc = (), ()
    if S.D <= S.BLOCK_D:
        f_i = (_features(f_ptr, stride, i, 0, S),)
    if S.GRADIENT == "PRODUCT":
        acc = (tl.zeros((M, K), S.ACC),)
    HAS_W_SUMS: tl.constexpr = 0 if out.weight_sums is None else 1
    w_total, w_comp = _zeros(M, HAS_W_SUMS, S), _zeros(M, HAS_W_SUMS, S)
    totals, comps = _zeros(M, len(S.TERMS), S), _zeros(M, len(S.TERMS), S)
    tiles, first, begin, masked, ragged, plain = _schedule(
        block_i, split, tl.num_programs(1), n_rows, n_cols, 0, tl.cdiv(n_cols, S.BLOCK_N), S
    )
    for k in range(0, masked + tl.where(ragged >= 0, 1, 0)):
        at = tl.where(k < masked, begin + k, ragged)
        acc, w_total, w_comp, totals, comps = _grad_tile(
            acc, w_total, w_comp, totals, comps, (first + at) % tiles, block_w, i, f_i, c, S, True
        )
    if not S.IDS:
        for k in range(begin + masked, begin + masked + plain):
            at = k + tl.where((ragged >= 0) & (k >= ragged), 1, 0)
            acc, w_total, w_comp, totals, comps = _grad_tile(
                acc,
                w_total,
                w_comp,
                totals,
                comps,
                (first + at) % tiles,
                block_w,
                i,
                f_i,
                c,
                S,
                False,
            )
    if S.GRADIENT == "PRODUCT":
        offs_d = tl.arange(0, S.BLOCK_D)
        ptrs = (
            out.df
            + split.to(tl.int64) * n_out * S.D
            + (i.base + i.local - lo).to(tl.int64)[:, None] * S.D
            + offs_d[None, :]
        )
        tl.store(ptrs, acc[0] * unit, mask=i.keep[:, None] & (offs_d < S.D)[None, :])
    if len(w_total):
        _store_sums(out.weight_sums, split, n, i, i.keep, (), _times(w_total, unit))
    if len(S.TERMS):
        _store_sums(out.sums, split, anchors, i, i.keep, (), totals)
