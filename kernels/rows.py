"""The O(n·D) and O(n) work around the sweeps, a launch each.

`unit_rows`, `finish_rows` and `row_step` are described in docs/design.md; `reduce_splits` adds the
partial sums of a sweep, and `scaled_weights` prepares the row weights of the second sweep.

A program of the first two owns PAIRS positive pairs, both rows of each, and walks over their
features in chunks of BLOCK_D. Up to MAX_BLOCK_D features there is one chunk: the loops fold away,
and with them the second read of a row.

Squares of a row could leave the range of its dtype, so it is first multiplied by the power of two
that brings its largest element to [1, 2). That is exact, and so is undoing it, unless the result
itself leaves the range.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from alphacl_fast.bundles import NormalizedRows, empty_vectors

from .start import launch
from .trace import libdevice

#: Features that a program holds at a time.
MAX_BLOCK_D = 4096
#: Whether kernels run in Triton's interpreter.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def larger(a, b):
    """The larger one; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_along(x, axis: tl.constexpr):
    """Maxima along an axis, NaN where there is one. (On a GPU, tl.max passes over NaN.)"""
    if INTERPRETED:  # NumPy's maximum keeps NaN
        return tl.max(x, axis)
    else:
        return tl.reduce(x, axis, larger)


@triton.jit
def rounded_to_tf32(x):
    """float32 with 10 bits of mantissa.

    The hardware would cut the others off, which makes every product too small. NaN stays NaN.
    """
    if INTERPRETED:  # there is no inline assembly
        rounded = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _lift(largest):
    """Power of two that brings a magnitude to [1, 2), or near it where it would not be normal."""
    BITS: tl.constexpr = 52 if largest.dtype == tl.float64 else 23  # of the mantissa
    BIAS: tl.constexpr = 1023 if largest.dtype == tl.float64 else 127  # of the exponent
    INT: tl.constexpr = tl.int64 if largest.dtype == tl.float64 else tl.int32
    exponent = largest.to(INT, bitcast=True) >> BITS
    inverse = 2 * BIAS - tl.minimum(tl.maximum(exponent, 1), 2 * BIAS - 1)
    return (inverse << BITS).to(largest.dtype, bitcast=True)


@triton.jit
def _inverse_of_root(x):
    """1/√x, rounded twice."""
    if x.dtype == tl.float64:
        return 1.0 / tl.sqrt(x)
    else:
        return tl.div_rn(1.0, tl.sqrt_rn(x))  # float32's own / and sqrt are approximate


@triton.jit
def _load_chunk(row_ptr, keep, start, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(PAIRS, BLOCK_D) features from ``start``; 0 outside."""
    offs_d = start + tl.arange(0, BLOCK_D)
    return tl.load(
        row_ptr[:, None] + offs_d[None, :], mask=keep[:, None] & (offs_d < DIM)[None, :], other=0.0
    )


@triton.jit
def _store_chunk(row_ptr, value, keep, start, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = start + tl.arange(0, BLOCK_D)
    tl.store(
        row_ptr[:, None] + offs_d[None, :], value, mask=keep[:, None] & (offs_d < DIM)[None, :]
    )


@triton.jit
def _measure(
    row_ptr, keep, WIDE: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """(PAIRS,) of each row x: its lift 2^k, 1/‖2^k·x‖ and 1/‖x‖, both 0 for an all-zero row."""
    largest = tl.zeros((PAIRS,), WIDE)
    squares = tl.zeros((PAIRS, BLOCK_D), WIDE)
    lift = _lift(largest)
    for start in range(0, DIM, BLOCK_D):
        x = _load_chunk(row_ptr, keep, start, DIM, BLOCK_D).to(WIDE)
        earlier = lift
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
        lift = _lift(largest)
        lowered = lift * _lift(earlier)  # 2^(k − earlier k) ≤ 1
        x *= lift[:, None]
        squares = squares * (lowered * lowered)[:, None] + x * x
    total = tl.sum(squares, 1)  # a NaN in the row makes this NaN; a maximum would miss it
    total = tl.where(largest == float("inf"), float("nan"), total)
    zero = total == 0
    inverse = tl.where(zero, 0.0, _inverse_of_root(tl.where(zero, 1.0, total)))
    inv_norm = inverse * lift
    MOST: tl.constexpr = (
        1.7976931348623157e308 if lift.dtype == tl.float64 else 3.4028234663852886e38
    )
    return lift, inverse, tl.where(inv_norm > MOST, MOST, inv_norm)


@triton.jit
def _as_stored(lift, inverse, inv_norm):
    """The power of two by which a half-precision row is stored, and 1/‖row‖ then.

    It is 1 for a largest element from 2⁻³⁰ up to 2³⁰, where products of two rows stay in the range
    of float32.
    """
    LIMIT: tl.constexpr = 1073741824.0  # 2³⁰
    extreme = (lift > LIMIT) | (lift * LIMIT <= 1)
    return tl.where(extreme, lift, 1.0), tl.where(extreme, inverse, inv_norm)


@triton.jit(do_not_specialize=["n_pairs"])
def unit_rows_kernel(
    z1_ptr,  # (n_pairs, DIM) with row stride stride1
    z2_ptr,  # (n_pairs, DIM) with row stride stride2
    # (2·n_pairs, DIM) out with row stride ``stride``: unit rows; in half precision the rows as
    # given, extreme ones times a power of two
    f_ptr,
    scale_ptr,  # (2·n_pairs,) out, 1/‖f‖ in half precision
    inv_norm_ptr,  # (2·n_pairs,) out, float32 or float64
    pos_ptr,  # (2·n_pairs,) out, likewise
    stride1,
    stride2,
    stride,
    n_pairs,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    WIDE: tl.constexpr = pos_ptr.dtype.element_ty
    RAW: tl.constexpr = f_ptr.dtype.element_ty != WIDE
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    keep = pair < n_pairs
    from1, from2 = z1_ptr + pair * stride1, z2_ptr + pair * stride2
    to1, to2 = f_ptr + pair * stride, f_ptr + (pair + n_pairs) * stride

    lift1, inverse1, inv_norm1 = _measure(from1, keep, WIDE, DIM, PAIRS, BLOCK_D)
    lift2, inverse2, inv_norm2 = _measure(from2, keep, WIDE, DIM, PAIRS, BLOCK_D)
    if RAW:
        stored1, scale1 = _as_stored(lift1, inverse1, inv_norm1)
        stored2, scale2 = _as_stored(lift2, inverse2, inv_norm2)
    products = tl.zeros((PAIRS, BLOCK_D), WIDE)
    for start in range(0, DIM, BLOCK_D):
        x1 = _load_chunk(from1, keep, start, DIM, BLOCK_D).to(WIDE)
        x2 = _load_chunk(from2, keep, start, DIM, BLOCK_D).to(WIDE)
        y1, y2 = x1 * lift1[:, None], x2 * lift2[:, None]
        if RAW:
            x1 *= stored1[:, None]
            x2 *= stored2[:, None]
        else:
            y1 *= inverse1[:, None]
            y2 *= inverse2[:, None]
            x1, x2 = y1, y2
        products += y1 * y2
        _store_chunk(to1, x1.to(f_ptr.dtype.element_ty), keep, start, DIM, BLOCK_D)
        _store_chunk(to2, x2.to(f_ptr.dtype.element_ty), keep, start, DIM, BLOCK_D)
    pos = tl.sum(products, 1)
    if RAW:
        pos = pos * inverse1 * inverse2
        # after the loads: a store between them would make the compiler read a row twice
        tl.store(scale_ptr + pair, scale1, mask=keep)
        tl.store(scale_ptr + pair + n_pairs, scale2, mask=keep)
    tl.store(pos_ptr + pair, pos, mask=keep)
    tl.store(pos_ptr + pair + n_pairs, pos, mask=keep)
    tl.store(inv_norm_ptr + pair, inv_norm1, mask=keep)
    tl.store(inv_norm_ptr + pair + n_pairs, inv_norm2, mask=keep)


@triton.jit
def _load_pair(
    d_ptr,
    f_ptr,
    stride,
    pair,
    n_pairs,
    scale1,
    scale2,
    q,
    keep,
    start,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(PAIRS, BLOCK_D) of a chunk: both unit rows, both gradients with the positive's part."""
    WIDE: tl.constexpr = d_ptr.dtype.element_ty
    other = pair + n_pairs
    u1 = _load_chunk(f_ptr + pair * stride, keep, start, DIM, BLOCK_D).to(WIDE)
    u2 = _load_chunk(f_ptr + other * stride, keep, start, DIM, BLOCK_D).to(WIDE)
    if len(scale1):
        u1 *= scale1[0][:, None]
        u2 *= scale2[0][:, None]
    g1 = _load_chunk(d_ptr + pair * DIM, keep, start, DIM, BLOCK_D)
    g2 = _load_chunk(d_ptr + other * DIM, keep, start, DIM, BLOCK_D)
    return u1, u2, g1 - q[:, None] * u2, g2 - q[:, None] * u1


@triton.jit(do_not_specialize=["n_pairs"], do_not_specialize_on_alignment=["q_ptr"])
def finish_rows_kernel(
    d_ptr,  # (2·n_pairs, DIM) in and out
    f_ptr,  # (2·n_pairs, DIM) with row stride ``stride``
    scale_ptr,  # (2·n_pairs,) or None
    inv_norm_ptr,  # (2·n_pairs,)
    q_ptr,  # (n_pairs,), or (2·n_pairs,) where BOTH rows of a pair are anchors
    stride,
    n_pairs,
    BOTH: tl.constexpr,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    WIDE: tl.constexpr = d_ptr.dtype.element_ty
    n_pairs = n_pairs.to(tl.int64)
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    keep = pair < n_pairs
    inv_norm1 = tl.load(inv_norm_ptr + pair, mask=keep, other=0.0)
    inv_norm2 = tl.load(inv_norm_ptr + pair + n_pairs, mask=keep, other=0.0)
    scale1, scale2 = (), ()
    if scale_ptr is not None:
        scale1 = (tl.load(scale_ptr + pair, mask=keep, other=0.0),)
        scale2 = (tl.load(scale_ptr + pair + n_pairs, mask=keep, other=0.0),)
    q = tl.load(q_ptr + pair, mask=keep, other=0.0)
    if BOTH:
        q += tl.load(q_ptr + pair + n_pairs, mask=keep, other=0.0)

    along1 = tl.zeros((PAIRS, BLOCK_D), WIDE)
    along2 = tl.zeros((PAIRS, BLOCK_D), WIDE)
    for start in range(0, DIM, BLOCK_D):
        u1, u2, g1, g2 = _load_pair(
            d_ptr, f_ptr, stride, pair, n_pairs, scale1, scale2, q, keep, start, DIM, BLOCK_D
        )
        along1 += u1 * g1
        along2 += u2 * g2
    sum1, sum2 = tl.sum(along1, 1)[:, None], tl.sum(along2, 1)[:, None]
    for start in range(0, DIM, BLOCK_D):
        u1, u2, g1, g2 = _load_pair(
            d_ptr, f_ptr, stride, pair, n_pairs, scale1, scale2, q, keep, start, DIM, BLOCK_D
        )
        _store_chunk(
            d_ptr + pair * DIM, (g1 - u1 * sum1) * inv_norm1[:, None], keep, start, DIM, BLOCK_D
        )
        _store_chunk(
            d_ptr + (pair + n_pairs) * DIM,
            (g2 - u2 * sum2) * inv_norm2[:, None],
            keep,
            start,
            DIM,
            BLOCK_D,
        )


def tile(dim: int) -> dict[str, int]:
    """PAIRS, BLOCK_D and num_warps for rows of ``dim`` features.

    A thread holds 16 elements of each view, unless there are few rows.
    """
    block_d = min(max(triton.next_power_of_2(dim), 16), MAX_BLOCK_D)
    return {
        "PAIRS": min(max(1, 2048 // block_d), 32),
        "BLOCK_D": block_d,
        "num_warps": max(4, block_d // 512),
    }


def unit_rows(z1: Tensor, z2: Tensor) -> NormalizedRows:
    """The stacked rows of a cosine loss, in one launch.

    Args:
        z1, z2: (N, D) float32, float64, bfloat16 or float16, any strides.

    Returns:
        The rows. An all-zero row has inv_norm 0; inf and NaN make a row NaN.
    """
    z1, z2 = (z if z.stride(1) == 1 else z.contiguous() for z in (z1, z2))
    n, dim = z1.shape
    rows, config = NormalizedRows.empty(z1), tile(dim)
    launch(
        unit_rows_kernel, (triton.cdiv(n, config["PAIRS"]),), z1,
        z1, z2, *rows, z1.stride(0), z2.stride(0), rows.f.stride(0), n, DIM=dim, **config,
    )  # fmt: skip
    return rows


def finish_rows(d: Tensor, f: Tensor, scale: Tensor | None, inv_norm: Tensor, q: Tensor) -> None:
    """d ← (g − F⟨F, g⟩)/‖z‖ with g = d − q·F of the partner, in place and in one launch.

    Args:
        d: (2N, D) Σ_j (g_ij + g_ji) F_j, contiguous, in the dtype of inv_norm.
        f: (2N, D), scale: (2N,) and inv_norm: (2N,) as `unit_rows` returns them; scale is None
            where rows are not of half precision.
        q: (N,) one per pair, or (2N,) one per row; a pair's two are added.
    """
    n, dim = f.shape[0] // 2, f.shape[1]
    config = tile(dim)
    launch(
        finish_rows_kernel, (triton.cdiv(n, config["PAIRS"]),), d,
        d, f, scale, inv_norm, q.contiguous(), f.stride(0), n, BOTH=q.shape[0] > n, DIM=dim,
        **config,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def rounded_rows_kernel(
    f_ptr,  # (rows, DIM) with row stride ``stride``
    out_ptr,  # (rows, DIM) out with row stride ``out_stride``
    stride,
    out_stride,
    rows,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,  # here: rows of a program
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    keep = row < rows
    for start in range(0, DIM, BLOCK_D):
        x = _load_chunk(f_ptr + row * stride, keep, start, DIM, BLOCK_D)
        _store_chunk(out_ptr + row * out_stride, rounded_to_tf32(x), keep, start, DIM, BLOCK_D)


def rounded_rows(f: Tensor) -> Tensor:
    """f (rows, D) float32 as TF32 numbers, in one launch; its rows begin at multiples of 16 bytes.

    The tensor cores cut off the bits that TF32 does not have. That makes every similarity too small
    by a part of 2⁻¹⁰ in the mean, where rounding errors have either sign.
    """
    n, dim = f.shape
    config = tile(dim)
    out = f.new_empty(n, -(-dim // 4) * 4)[:, :dim]
    launch(
        rounded_rows_kernel, (triton.cdiv(n, config["PAIRS"]),), f,
        f, out, f.stride(0), out.stride(0), n, DIM=dim, **config,
    )  # fmt: skip
    return out


# --- vectors of the anchors -----------------------------------------------------------------------

#: Anchors of a program: few, so that where launches dominate each has one wave of programs.
BLOCK = 128
#: Slices of a workspace that a program reads at a time.
BLOCK_SLICES = 16
#: Vectors that a row step takes at most.
MOST_VECTORS = 6


@triton.jit(
    do_not_specialize=["n_neg", "divisor", "anchors", "out_stride"],
    do_not_specialize_on_alignment=[
        "v0_ptr",
        "v1_ptr",
        "v2_ptr",
        "v3_ptr",
        "v4_ptr",
        "v5_ptr",
        "out_ptr",
    ],
)
def row_step_kernel(
    v0_ptr,  # (anchors,) float32 or float64, all of one dtype; None from number len(STRIDES) on
    v1_ptr,  # (members of a tuple are specialised on their alignment, which depends on the anchors)
    v2_ptr,
    v3_ptr,
    v4_ptr,
    v5_ptr,
    tau_ptr,  # ()
    n_neg,
    divisor,
    out_ptr,  # (OUTPUTS, anchors) out, with row stride out_stride
    anchors,
    out_stride,
    FUNCTION: tl.constexpr,  # of `trace.row_function`
    STRIDES: tl.constexpr,  # of the vectors: 0 for an expanded number
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = row < anchors
    ptrs, v = (v0_ptr, v1_ptr, v2_ptr, v3_ptr, v4_ptr, v5_ptr), ()
    for k in tl.static_range(len(STRIDES)):
        v = v + (tl.load(ptrs[k] + row * STRIDES[k], mask=keep, other=1.0),)
    tau = tl.load(tau_ptr)
    out = FUNCTION(v, (tau, n_neg.to(tau.dtype), divisor.to(tau.dtype)))
    if OUTPUTS == 1:
        out = (out,)
    for k in tl.static_range(OUTPUTS):
        tl.store(out_ptr + k * out_stride.to(tl.int64) + row, out[k], mask=keep)


def row_step(
    vectors: tuple[Tensor, ...],
    tau: Tensor,
    n_neg: int,
    divisor: int,
    anchors: int,
    function: Any,
    outputs: int,
) -> Tensor:
    """The outputs (outputs, anchors) of a traced row step.

    ``vectors`` are (anchors,), or expanded to it, in the dtype of tau ().
    """
    vectors = tuple(v if v.stride(0) in (0, 1) else v.contiguous() for v in vectors)
    strides = tuple(v.stride(0) for v in vectors)
    out = empty_vectors(tau, outputs, anchors)
    absent = (None,) * (MOST_VECTORS - len(vectors))
    launch(
        row_step_kernel, (triton.cdiv(anchors, BLOCK),), tau,
        *vectors, *absent, tau, n_neg, divisor, out, anchors, out.stride(0),
        FUNCTION=function, STRIDES=strides, OUTPUTS=outputs, BLOCK=BLOCK,
    )  # fmt: skip
    return out


@triton.jit
def _slices(ptr, first, slices, stride, row, keep, other, BLOCK_SLICES: tl.constexpr):
    """(BLOCK_SLICES, BLOCK) of a row of slices, ``other`` where there is none."""
    number = first + tl.arange(0, BLOCK_SLICES)
    keep = (number < slices)[:, None] & keep[None, :]
    return tl.load(
        ptr + number.to(tl.int64)[:, None] * stride + row[None, :], mask=keep, other=other
    )


@triton.jit(
    do_not_specialize=[
        "slices",
        "anchors",
        "slice_stride",
        "slice_row",
        "out_row",
        "constant_shift",
    ],
    do_not_specialize_on_alignment=["slices_ptr", "out_ptr"],
)
def reduce_splits_kernel(
    slices_ptr,  # (slices, [largest,] SUMS, anchors), anchors next to each other
    out_ptr,  # ([shift,] SUMS, anchors) out, with stride out_row
    slices,
    anchors,
    slice_stride,
    slice_row,
    out_row,
    constant_shift,
    FORM: tl.constexpr,  # of the sweep
    SUMS: tl.constexpr,
    BLOCK_SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = row < anchors
    out_row = out_row.to(tl.int64)
    largest = tl.full((BLOCK,), float("-inf"), ACC)
    if FORM == "ONLINE" or FORM == "T_MAX":
        for first in range(0, slices, BLOCK_SLICES):
            x = _slices(
                slices_ptr, first, slices, slice_stride, row, keep, float("-inf"), BLOCK_SLICES
            )
            largest = larger(largest, largest_along(x, 0))
        tl.store(out_ptr + row, largest, mask=keep)
    if FORM == "CONSTANT":
        tl.store(out_ptr + row, tl.zeros((BLOCK,), ACC) + constant_shift, mask=keep)
    finite = tl.where(largest > float("-inf"), largest, 0.0)  # -inf: no pair of the row counts
    IN: tl.constexpr = 1 if FORM == "ONLINE" else 0
    OUT: tl.constexpr = 1 if FORM == "ONLINE" or FORM == "CONSTANT" else 0
    for k in tl.static_range(SUMS):
        total, comp = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
        for first in range(0, slices, BLOCK_SLICES):
            x = _slices(
                slices_ptr + (k + IN) * slice_row,
                first,
                slices,
                slice_stride,
                row,
                keep,
                0.0,
                BLOCK_SLICES,
            )
            if FORM == "ONLINE":
                own = _slices(
                    slices_ptr, first, slices, slice_stride, row, keep, float("-inf"), BLOCK_SLICES
                )
                x *= libdevice.exp(own - finite[None, :])
            y = tl.sum(x, 0) - comp
            new = total + y
            comp = tl.where(tl.abs(new) < float("inf"), (new - total) - y, 0.0)
            total = new
        tl.store(out_ptr + (k + OUT) * out_row + row, total, mask=keep)


def reduce_splits(workspace: Tensor, out: Tensor, form: str, constant_shift: float) -> None:
    """out ([shift,] sums, anchors) ← the sums of slices (slices, [largest,] sums, anchors).

    Args:
        form: of the sweep. T_MAX has the largest t alone; ONLINE: the sums of a slice are relative
            to the exponential of its largest log f; CONSTANT: only out has a row of shifts.
    """
    sums = {"T_MAX": 0, "ONLINE": workspace.shape[1] - 1}.get(form, workspace.shape[1])
    anchors = out.shape[1]
    launch(
        reduce_splits_kernel, (triton.cdiv(anchors, BLOCK),), out,
        workspace, out, workspace.shape[0], anchors, workspace.stride(0), workspace.stride(1),
        out.stride(0), constant_shift, FORM=form, SUMS=sums, BLOCK_SLICES=BLOCK_SLICES,
        BLOCK=BLOCK,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["anchors", "constant_shift"],
    do_not_specialize_on_alignment=["weight_ptr", "shift_ptr"],
)
def scaled_weights_kernel(
    weight_ptr,  # (anchors,)
    shift_ptr,  # (anchors,) or None
    out_ptr,  # (anchors,) out, with a shift
    largest_ptr,  # (programs,) out
    anchors,
    constant_shift,
    ROWS: tl.constexpr,  # of a program
    BLOCK: tl.constexpr,
):
    largest = tl.zeros((BLOCK,), weight_ptr.dtype.element_ty)
    for first in range(0, ROWS, BLOCK):
        row = tl.program_id(0) * ROWS + first + tl.arange(0, BLOCK)
        keep = row < anchors
        weight = tl.load(weight_ptr + row, mask=keep, other=0.0)
        if shift_ptr is not None:
            weight *= libdevice.exp(constant_shift - tl.load(shift_ptr + row, mask=keep, other=0.0))
            tl.store(out_ptr + row, weight, mask=keep)
        largest = tl.maximum(largest, tl.abs(weight))
    tl.store(largest_ptr + tl.program_id(0), tl.max(largest, 0))


#: Anchors of a program of `scaled_weights`; up to this many anchors take one launch.
ROWS_OF_WEIGHTS, BLOCK_OF_WEIGHTS = 4096, 1024


def scaled_weights(
    weight: Tensor, shift: Tensor | None, constant_shift: float
) -> tuple[Tensor, Tensor]:
    """weight·exp(constant_shift − shift) (anchors,), and its largest magnitude ().

    Without a shift it is the weight itself.
    """
    programs = triton.cdiv(weight.shape[0], ROWS_OF_WEIGHTS)
    out = weight if shift is None else weight.new_empty(weight.shape)
    largest = weight.new_empty(programs)
    launch(
        scaled_weights_kernel, (programs,), weight,
        weight, shift, out, largest, weight.shape[0], constant_shift, ROWS=ROWS_OF_WEIGHTS,
        BLOCK=BLOCK_OF_WEIGHTS,
    )  # fmt: skip
    return out, largest[0] if programs == 1 else largest.amax()
