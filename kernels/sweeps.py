"""The two Triton kernels: `row_sums` and `pair_grad` of docs/design.md, for any pair kind, mode and device.

A program owns BLOCK_M rows "i" and walks the ring of column tiles, BLOCK_N rows "j" each, beginning at its diagonal:

* **Paired blocks.** In two_view a block of B rows holds B/2 rows of the first view and then their partners in the second.
  Pairs that do not count (oneself, one's positive) thus lie in the first tiles of every ring. Only these and a ragged last
  tile are masked, in a loop of their own; with ids, of which equal ones may meet anywhere, all tiles are. Beyond the last row
  the last one is read again. (A branch in one loop would not do: the compiler turns it into selections, which every pair then
  pays for.)
* **Row-block form**: the program sees every column tile and writes each of its results once; the order of all additions is
  fixed. Where there are too few row blocks several programs share a ring, and their parts are summed afterwards.
* **Both-sides form** (BOTH, of `row_sums`): block I takes the ring distances 0 … tiles/2 only and serves the rows of block J
  as well, whose sums it writes to slots of their own; their order is fixed.

An absent row scalar is an empty tuple, a present one a tuple of one vector, for Triton functions cannot return None.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Vectors(NamedTuple):
    """Pointers to one value per row, in the accumulation dtype (ids: int32), or None."""

    scale: Any
    bias: Any
    center: Any
    gain: Any
    shift: Any
    offset: Any
    level: Any
    ids: Any


class Side(NamedTuple):
    """The rows of one side of a tile.

    ``row = base + local`` are rows of f; ``pair`` says which rows of the other side do not count; ``keep`` which rows exist.
    """

    base: Any
    local: Any
    pair: Any
    keep: Any
    scale: Any
    bias: Any
    center: Any
    gain: Any
    shift: Any
    offset: Any
    level: Any
    ids: Any


class Common(NamedTuple):
    """What every tile of a program needs."""

    f_ptr: Any
    stride: Any
    v: Any  # Vectors
    tau: Any
    middle: Any
    unit: Any
    inv_unit: Any
    out: Any
    anchors: Any
    n_cols: Any
    col_start: Any
    half: Any


class Static(NamedTuple):
    """What a kernel is compiled for. F, DF, DTAU are Triton functions (x, τ) of a pair kind, or None where not needed."""

    F: Any
    DF: Any
    DTAU: Any
    LOG: bool  # F is log f, and DF, DTAU its derivatives
    LINEAR: bool  # log f = t/τ
    FORM: str  # "fixed": exp(log f − middle); "running": relative to the row's maximum; "plain"; "max" (of t)
    TERMS: tuple[str, ...]  # "f", "df", "ft", "dft", "dtau"
    D: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    ACC: Any  # float32 or float64
    PRECISION: str  # of the product of similarities
    UPCAST: bool  # multiply as float32 (the interpreter multiplies bfloat16 wrongly)
    EXCLUDE: bool  # rows of the same pair do not count
    TRIANGLE: bool  # both sides are the same rows
    BOTH: bool  # a tile serves its columns too
    ROWS_PAIRED: bool  # a block holds rows of both views
    COLS_PAIRED: bool
    ROWS_ANCHOR: bool = True
    COLS_ANCHOR: bool = True
    WEIGHT: str = "f"  # "f", "df" or "f+df"
    GRAD: str = "product"  # "product"; "weights": W itself, for a vendor product; "none": sums only
    W_TYPE: Any = None  # to which weights are rounded for the second product
    W_PRECISION: str = "ieee"
    IDS: bool = False  # rows of one id do not count for each other, in whatever tile they meet: all are masked

    @property
    def cache_key(self) -> str:
        """Names the functions by their source, where str() would say only what they are called."""
        return "-".join(x.cache_key if hasattr(x, "cache_key") else str(x) for x in self)


# --- rows and tiles ---------------------------------------------------------------------------------------------------


@triton.jit
def _load(a_ptr, b_ptr, side):
    """Two row scalars, either of which may be absent, in one load.

    A vector by itself would be loaded by every thread that needs it, 4 bytes at a time; of a (rows, 2) tile each thread loads
    one element and shared memory spreads them.
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
    return tl.split(tl.load(tl.where(first, a_ptr + side.base, b_ptr + side.base) + side.local[:, None]))


@triton.jit
def _side(v, block, n, start, half, SIZE: tl.constexpr, PAIRED: tl.constexpr, ANCHOR: tl.constexpr):
    """Block number ``block`` of a side with n rows that begins at row ``start``; partners are ``half`` rows apart."""
    offs = tl.arange(0, SIZE)
    if PAIRED:
        base, inside = block * (SIZE // 2), offs % (SIZE // 2)
        local = tl.minimum(inside, half - 1 - base) + offs // (SIZE // 2) * half
        side = Side(start + base, local, base + inside, base + inside < half, (), (), (), (), (), (), (), ())
    else:
        base = block * SIZE
        local = tl.minimum(offs, n - 1 - base)
        side = Side(start + base, local, base + offs, base + offs < n, (), (), (), (), (), (), (), ())
    ids, _ = _load(v.ids, None, side)
    if ANCHOR:
        scale, gain = _load(v.scale, v.gain, side)
        center, shift = _load(v.center, v.shift, side)
        offset, level = _load(v.offset, v.level, side)
        bias, _ = _load(v.bias, None, side)
        return Side(side.base, side.local, side.pair, side.keep, scale, bias, center, gain, shift, offset, level, ids)
    else:
        scale, bias = _load(v.scale, v.bias, side)
        return Side(side.base, side.local, side.pair, side.keep, scale, bias, (), (), (), (), (), ids)


@triton.jit
def _features(f_ptr, stride, side, d, S: tl.constexpr):
    """(rows, BLOCK_D) features from d on, 0 beyond D. 64-bit offsets: n·D passes 2³¹ at n = 4 M, D = 512."""
    offs_d = d + tl.arange(0, S.BLOCK_D)
    ptrs = f_ptr + side.base.to(tl.int64) * stride + (side.local.to(tl.int64)[:, None] * stride + offs_d[None, :])
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
    """t_ij from ⟨f_i, f_j⟩. Row scalars meet first: t_ij and t_ji must agree to the last bit."""
    if len(i.scale):
        t = t * (i.scale[0][:, None] * j.scale[0][None, :])
    if len(i.bias):
        t = t + (i.bias[0][:, None] + j.bias[0][None, :])
    return t


@triton.jit
def _similarities(f_ptr, stride, f_i, i, j, S: tl.constexpr):
    """t (BLOCK_M, BLOCK_N), and f_j (BLOCK_N, BLOCK_D) where a row fits into one chunk of features."""
    M: tl.constexpr = S.BLOCK_M
    N: tl.constexpr = S.BLOCK_N
    t = tl.zeros((M, N), S.ACC)
    if len(f_i):
        f_j = _features(f_ptr, stride, j, 0, S)
        t = _dot(f_i[0], tl.trans(f_j), t, S, False)
        return _scaled(t, i, j), (f_j,)
    else:
        for d in range(0, S.D, S.BLOCK_D):
            a, b = _features(f_ptr, stride, i, d, S), _features(f_ptr, stride, j, d, S)
            t = _dot(a, tl.trans(b), t, S, False)
        return _scaled(t, i, j), ()


@triton.jit
def _ring(block_i, part, parts, n_rows, n_cols, begin, end, S: tl.constexpr):
    """One of ``parts`` parts of the positions [begin, end) of block I's ring.

    Returns the number of column tiles and the one at position 0, where the part begins, how many positions from there on are
    masked, the one masked position beyond them (or -1), and how many are not masked.
    """
    tiles = tl.cdiv(n_cols, S.BLOCK_N)
    if S.TRIANGLE and S.BOTH:  # half way round an even ring both ends meet: the first half of the blocks serves that tile
        end = tl.where((tiles % 2 == 0) & (block_i >= tiles // 2), tl.minimum(end, tiles // 2), end)
    each = tl.cdiv(end - begin, parts)
    begin = tl.minimum(begin + part * each, end)
    end = tl.minimum(begin + each, end)

    ROW_PAIRS: tl.constexpr = S.BLOCK_M // 2 if S.ROWS_PAIRED else S.BLOCK_M
    COL_PAIRS: tl.constexpr = S.BLOCK_N // 2 if S.COLS_PAIRED else S.BLOCK_N
    first = block_i * ROW_PAIRS // COL_PAIRS
    special = 0
    if S.EXCLUDE:
        special = (block_i * ROW_PAIRS + ROW_PAIRS - 1) // COL_PAIRS - first + 1
    first = first % tiles
    if S.BOTH:  # rows that do not exist, in a ragged block I, must not count for J
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
def _log_f(t, i, j, c, S: tl.constexpr, MASKED: tl.constexpr):
    """log f, −inf where a pair does not count, and the t that moments take: of the exp kind τ·log f, for where |t|/τ is large
    the two must have been rounded together."""
    log_f = S.F(t, c.tau)
    if S.LINEAR:
        t = _counted(log_f * c.tau, 0.0, i, j, S, MASKED)
    return (_counted(log_f, float("-inf"), i, j, S, MASKED),), t


# --- pieces and sums of a tile ----------------------------------------------------------------------------------------


@triton.jit
def _minus(t, v, axis: tl.constexpr):
    """t less a scalar of each row (axis 1) or of each column (axis 0)."""
    if len(v):
        return t - tl.expand_dims(v[0], axis)
    else:
        return t


@triton.jit
def _exp(x):
    """exp x by the hardware's exp2; below 1e-38 it is 0, where tl.exp spends three more instructions."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _exp_fixed(log_f, middle):
    """exp(log f − middle) by one multiply-add and the hardware's exp2."""
    if log_f.dtype == tl.float64:
        return tl.exp(log_f - middle)
    else:
        return tl.exp2(log_f * 1.4426950408889634 - middle * 1.4426950408889634)


@triton.jit
def _pieces(t, log_f, i, j, side, tau, axis: tl.constexpr, S: tl.constexpr, MASKED: tl.constexpr):
    """f, df and ∂f/∂τ with one side's row scalars, each in a tuple that is empty where the sweep does not need it."""
    f, df, dtau = (), (), ()
    if S.LOG:
        f = (_exp(_minus(log_f[0], side.shift, axis)),)
        if S.DF is not None:
            df = (f[0] * S.DF(t, tau),)
        if S.DTAU is not None:
            dtau = (f[0] * S.DTAU(t, tau),)
    else:
        x = _minus(t, side.shift, axis)
        if len(side.offset):
            x = x + tl.expand_dims(side.offset[0], axis)
        if S.F is not None:
            f = (_counted(S.F(x, tau), 0.0, i, j, S, MASKED),)
        if S.DF is not None:
            df = (_counted(S.DF(x, tau), 0.0, i, j, S, MASKED),)
        if S.DTAU is not None:
            dtau = (_counted(S.DTAU(x, tau), 0.0, i, j, S, MASKED),)
    return f, df, dtau


@triton.jit
def _term(K: tl.constexpr, t, f, df, dtau, side, axis: tl.constexpr, S: tl.constexpr):
    """Σ f, Σ f′, Σ f·(t − center), Σ f′·(t − center) or Σ ∂f/∂τ·(t − center − level) of one tile."""
    NAME: tl.constexpr = S.TERMS[K]
    if NAME == "f":
        return tl.sum(f[0], axis)
    elif NAME == "df":
        return tl.sum(df[0], axis)
    elif NAME == "ft":
        return tl.sum(f[0] * _minus(t, side.center, axis), axis)
    elif NAME == "dft":
        return tl.sum(df[0] * _minus(t, side.center, axis), axis)
    else:
        return tl.sum(dtau[0] * _minus(_minus(t, side.center, axis), side.level, axis), axis)


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
def _add(totals, losses, sums):
    """Compensated totals + sums: a row's terms arrive over thousands of tiles. Infinite totals stay what they are."""
    new_totals, new_losses = (), ()
    for k in tl.static_range(len(sums)):
        y = sums[k] - losses[k]
        new = totals[k] + y
        lost = (new - totals[k]) - y
        new_totals = new_totals + (new,)
        new_losses = new_losses + (tl.where(tl.abs(new) < float("inf"), lost, 0.0),)
    return new_totals, new_losses


@triton.jit
def _times(vectors, factor):
    scaled = ()
    for k in tl.static_range(len(vectors)):
        scaled = scaled + (vectors[k] * factor,)
    return scaled


@triton.jit
def _store_sums(out_ptr, slot, anchors, side, keep, base, sums):
    """One slot of ``out`` (slots, [base,] terms, anchors)."""
    ptrs = out_ptr + slot.to(tl.int64) * (len(base) + len(sums)) * anchors + (side.base + side.local)
    if len(base):
        tl.store(ptrs, base[0], mask=keep)
    for k in tl.static_range(len(sums)):
        tl.store(ptrs + (k + len(base)) * anchors.to(tl.int64), sums[k], mask=keep)


# --- sweep 1 ----------------------------------------------------------------------------------------------------------


@triton.jit
def _side_sums(t, log_f, e, i, j, side, tau, axis: tl.constexpr, S: tl.constexpr, MASKED: tl.constexpr):
    """One side's base (running and max forms) and sums of a tile."""
    if S.FORM == "max":
        return (tl.max(_counted(t, float("-inf"), i, j, S, MASKED), axis),), ()
    elif S.FORM == "fixed":
        return (), _terms(t, e, (), (), side, axis, S)
    elif S.FORM == "running":
        base = tl.max(log_f[0], axis)
        finite = tl.where(base > float("-inf"), base, 0.0)  # no pair of the row counts in this tile
        return (base,), _terms(t, (_exp(_minus(log_f[0], (finite,), axis)),), (), (), side, axis, S)
    else:
        f, df, dtau = _pieces(t, log_f, i, j, side, tau, axis, S, MASKED)
        return (), _terms(t, f, df, dtau, side, axis, S)


@triton.jit
def _merge(base, totals, losses, tile_base, sums, S: tl.constexpr):
    """Adds a tile's sums, in the running form each relative to its own base."""
    if S.FORM == "max":
        return (tl.maximum(base[0], tile_base[0]),), totals, losses
    elif S.FORM == "running":
        new = tl.maximum(base[0], tile_base[0])
        finite = tl.where(new > float("-inf"), new, 0.0)
        old = tl.exp(base[0] - finite)
        totals, losses = _add(_times(totals, old), _times(losses, old), _times(sums, tl.exp(tile_base[0] - finite)))
        return (new,), totals, losses
    else:
        totals, losses = _add(totals, losses, sums)
        return (), totals, losses


@triton.jit
def _sum_tile(base, totals, losses, tile, at, col_slot, i, f_i, c, S: tl.constexpr, MASKED: tl.constexpr):
    """Adds a tile to the sums of rows I; in the both-sides form writes those of rows J to their slot."""
    j = _side(c.v, tile, c.n_cols, c.col_start, c.half, S.BLOCK_N, S.COLS_PAIRED, S.BOTH)
    t, _ = _similarities(c.f_ptr, c.stride, f_i, i, j, S)
    t = _counted(t, 0.0, i, j, S, MASKED)  # an excluded pair's similarity may be infinite, and 0·inf is not 0
    log_f, e = (), ()
    if S.LOG:
        log_f, t = _log_f(t, i, j, c, S, MASKED)
        if S.FORM == "fixed":
            e = (_exp_fixed(log_f[0], c.middle),)
    tile_base, sums = _side_sums(t, log_f, e, i, j, i, c.tau, 1, S, MASKED)
    base, totals, losses = _merge(base, totals, losses, tile_base, sums, S)
    if S.BOTH:
        keep = j.keep
        if S.TRIANGLE:
            keep = keep & (at > 0)
        tile_base, sums = _side_sums(t, log_f, e, i, j, j, c.tau, 0, S, MASKED)
        _store_sums(c.out, col_slot + at, c.anchors, j, keep, tile_base, sums)
    return base, totals, losses


@triton.jit(
    do_not_specialize=[
        "n_rows", "n_cols", "row_start", "col_start", "half", "anchors", "begin", "end", "col_slot", "middle",
    ],
    do_not_specialize_on_alignment=["out_ptr"],
)  # fmt: skip
def row_sums(
    f_ptr, v, tau_ptr, out_ptr, stride, n_rows, n_cols, row_start, col_start, half, anchors, begin, end, col_slot, middle,
    S: tl.constexpr,
):  # fmt: skip
    """Sums of S.TERMS over the ring positions [begin, end) of every row. Grid (row blocks, parts of a ring).

    Args:
        f_ptr: (rows, D) features with row stride ``stride``, unit column stride. v: `Vectors`, (rows,) or (anchors,) ACC each.
        tau_ptr: () ACC. n_rows, n_cols: rows of the two sides, which begin at the physical rows row_start, col_start.
        out_ptr: (slots, [base,] terms, anchors) ACC: a part's rows in slot ``part``, and in the both-sides form what the tiles
            at ring distance t add to their columns' rows in slot ``col_slot + t`` (distance 0 of a triangle adds nothing).
            Slots of the fixed both-sides form have no base.
        middle: of the "fixed" form; float.
    """
    tau = tl.load(tau_ptr)
    c = Common(f_ptr, stride, v, tau, middle, (), (), out_ptr, anchors, n_cols, col_start, half)
    block_i, part = tl.program_id(0), tl.program_id(1)
    M: tl.constexpr = S.BLOCK_M
    i = _side(v, block_i, n_rows, row_start, half, S.BLOCK_M, S.ROWS_PAIRED, True)
    f_i, base = (), ()
    if S.D <= S.BLOCK_D:
        f_i = (_features(f_ptr, stride, i, 0, S),)
    if S.FORM == "running" or S.FORM == "max":
        base = (tl.full((M,), float("-inf"), S.ACC),)
    totals, losses = _zeros(M, len(S.TERMS), S), _zeros(M, len(S.TERMS), S)
    tiles, first, begin, masked, ragged, plain = _ring(block_i, part, tl.num_programs(1), n_rows, n_cols, begin, end, S)
    for k in range(0, masked + tl.where(ragged >= 0, 1, 0)):
        at = tl.where(k < masked, begin + k, ragged)
        base, totals, losses = _sum_tile(base, totals, losses, (first + at) % tiles, at, col_slot, i, f_i, c, S, True)
    if not S.IDS:
        for k in range(begin + masked, begin + masked + plain):
            at = k + tl.where((ragged >= 0) & (k >= ragged), 1, 0)
            base, totals, losses = _sum_tile(base, totals, losses, (first + at) % tiles, at, col_slot, i, f_i, c, S, False)
    if S.FORM == "fixed" and not S.BOTH:
        base = (tl.zeros((M,), S.ACC) + middle,)
    _store_sums(out_ptr, part, anchors, i, i.keep, base, totals)


# --- sweep 2 ----------------------------------------------------------------------------------------------------------


class Outputs(NamedTuple):
    """Where `pair_grad` writes; None where it does not."""

    df: Any
    w_sums: Any
    sums: Any
    w: Any


@triton.jit
def _side_weights(t, log_f, i, j, side, c, axis: tl.constexpr, S: tl.constexpr, MASKED: tl.constexpr):
    """g of one side's anchors with their pieces."""
    f, df, dtau = _pieces(t, log_f, i, j, side, c.tau, axis, S, MASKED)
    if S.WEIGHT == "f":
        g = f[0]
    elif S.WEIGHT == "df":
        g = df[0]
    else:
        g = f[0] + df[0] * _minus(_minus(t, side.center, axis), side.level, axis)
    return g * tl.expand_dims(side.gain[0] * c.inv_unit, axis), f, df, dtau


@triton.jit
def _fixed_weights(log_f, i, j, c, S: tl.constexpr):
    """g_ij + g_ji of the fixed form: one exponential serves both anchors of a pair."""
    e = _exp_fixed(log_f, c.middle)
    if S.ROWS_ANCHOR and S.COLS_ANCHOR:
        return e * ((i.gain[0] * c.inv_unit)[:, None] + (j.gain[0] * c.inv_unit)[None, :])
    elif S.ROWS_ANCHOR:
        return e * (i.gain[0] * c.inv_unit)[:, None]
    else:
        return e * (j.gain[0] * c.inv_unit)[None, :]


@triton.jit
def rounded_to_tf32(x):
    """float32 with 10 bits of mantissa. The hardware would cut the others off, which makes every weight too small."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _factor(w, j, S: tl.constexpr):
    """W as a factor of the product with rows J: times their scales, then rounded, so that normalised rows never are."""
    if len(j.scale):
        w = w * j.scale[0][None, :]
    w = w.to(S.W_TYPE)
    if S.W_PRECISION == "tf32":
        w = rounded_to_tf32(w)
    return w


@triton.jit
def _grad_tile(acc, w_total, w_lost, totals, losses, tile, block_w, i, f_i, c, S: tl.constexpr, MASKED: tl.constexpr):
    """Adds W·F_J of one tile to the gradient of rows I, or writes W."""
    j = _side(c.v, tile, c.n_cols, c.col_start, c.half, S.BLOCK_N, S.COLS_PAIRED, S.COLS_ANCHOR)
    t, f_j = _similarities(c.f_ptr, c.stride, f_i, i, j, S)
    t = _counted(t, 0.0, i, j, S, MASKED)
    log_f = ()
    if S.LOG:
        log_f, t = _log_f(t, i, j, c, S, MASKED)
    if S.FORM == "fixed":
        w = _fixed_weights(log_f[0], i, j, c, S)
    else:
        w = tl.zeros(t.shape, S.ACC)
        if S.ROWS_ANCHOR:
            g, f, df, dtau = _side_weights(t, log_f, i, j, i, c, 1, S, MASKED)
            totals, losses = _add(totals, losses, _terms(t, f, df, dtau, i, 1, S))
            w += g
        if S.COLS_ANCHOR:
            g, f, df, dtau = _side_weights(t, log_f, i, j, j, c, 0, S, MASKED)
            w += g
    if len(w_total):
        w_total, w_lost = _add(w_total, w_lost, (tl.sum(w, 1),))
    if S.GRAD == "weights":
        w_ptrs = block_w * S.BLOCK_M + tl.arange(0, S.BLOCK_M)
        w_ptrs = c.out.w + w_ptrs.to(tl.int64)[:, None] * c.n_cols + (j.base + j.local - c.col_start)[None, :]
        tl.store(w_ptrs, _factor(w, j, S), mask=i.keep[:, None] & j.keep[None, :])
    elif S.GRAD == "product":
        acc = (_dot(_factor(w, j, S), f_j[0].to(S.W_TYPE), acc[0], S, True),)
    return acc, w_total, w_lost, totals, losses


@triton.jit(
    do_not_specialize=[
        "n_rows", "n_cols", "row_start", "col_start", "half", "anchors", "n", "n_out", "lo", "first_block", "middle",
    ]
)  # fmt: skip
def pair_grad(
    f_ptr, v, tau_ptr, unit_ptr, out, stride, n_rows, n_cols, row_start, col_start, half, anchors, n, n_out, lo,
    first_block, middle, S: tl.constexpr,
):  # fmt: skip
    """df_i = Σ_j (g_ij + g_ji) F_j of every row, with the sums of S.TERMS over its pairs. Grid as of `row_sums`.

    Args: as of `row_sums`, and
        unit_ptr: () ACC or None: weights are divided by it before they are rounded, gradients multiplied by it.
        out: `Outputs`, ACC but for w: df (parts, n_out, D), for the physical rows from ``lo`` on; w_sums (parts, n): sums of
            g_ij + g_ji; sums (parts, terms, anchors); w (programs·BLOCK_M, n_cols) W_TYPE, a block's rows in its own order.
        first_block: the first row block of the launch.
        middle: of the "fixed" form, in which v.gain already holds gain·exp(middle − shift).
    """
    tau = tl.load(tau_ptr)
    unit, inv_unit = 1.0, 1.0
    if unit_ptr is not None:
        unit = tl.load(unit_ptr)
        unit = tl.where(unit > 0, unit, 1.0)
        inv_unit = 1.0 / unit
    c = Common(f_ptr, stride, v, tau, middle, unit, inv_unit, out, anchors, n_cols, col_start, half)
    block_w, part = tl.program_id(0), tl.program_id(1)
    block_i = block_w + first_block
    M: tl.constexpr = S.BLOCK_M
    K: tl.constexpr = S.BLOCK_D
    i = _side(v, block_i, n_rows, row_start, half, S.BLOCK_M, S.ROWS_PAIRED, S.ROWS_ANCHOR)
    f_i, acc = (), ()
    if S.D <= S.BLOCK_D:
        f_i = (_features(f_ptr, stride, i, 0, S),)
    if S.GRAD == "product":
        acc = (tl.zeros((M, K), S.ACC),)
    HAS_W_SUMS: tl.constexpr = 0 if out.w_sums is None else 1
    w_total, w_lost = _zeros(M, HAS_W_SUMS, S), _zeros(M, HAS_W_SUMS, S)
    totals, losses = _zeros(M, len(S.TERMS), S), _zeros(M, len(S.TERMS), S)
    tiles, first, begin, masked, ragged, plain = _ring(
        block_i, part, tl.num_programs(1), n_rows, n_cols, 0, tl.cdiv(n_cols, S.BLOCK_N), S
    )
    for k in range(0, masked + tl.where(ragged >= 0, 1, 0)):
        at = tl.where(k < masked, begin + k, ragged)
        acc, w_total, w_lost, totals, losses = _grad_tile(
            acc, w_total, w_lost, totals, losses, (first + at) % tiles, block_w, i, f_i, c, S, True
        )
    if not S.IDS:
        for k in range(begin + masked, begin + masked + plain):
            at = k + tl.where((ragged >= 0) & (k >= ragged), 1, 0)
            acc, w_total, w_lost, totals, losses = _grad_tile(
                acc, w_total, w_lost, totals, losses, (first + at) % tiles, block_w, i, f_i, c, S, False
            )
    if S.GRAD == "product":
        offs_d = tl.arange(0, S.BLOCK_D)
        ptrs = out.df + part.to(tl.int64) * n_out * S.D + (i.base + i.local - lo).to(tl.int64)[:, None] * S.D + offs_d[None, :]
        tl.store(ptrs, acc[0] * unit, mask=i.keep[:, None] & (offs_d < S.D)[None, :])
    if len(w_total):
        _store_sums(out.w_sums, part, n, i, i.keep, (), _times(w_total, unit))
    if len(S.TERMS):
        _store_sums(out.sums, part, anchors, i, i.keep, (), totals)
