"""Normalisation before the sweeps and its derivative after them, a launch each: `unit_rows`, `finish_rows` of docs/design.md.

A program owns PAIRS positive pairs, both rows of each, and walks their features in chunks of BLOCK_D. Up to MAX_BLOCK_D
features there is one chunk: the loops fold away, and with them the second read of a row.

Squares of a row could leave the range of its dtype, so it is first multiplied by the power of two that brings its largest
element to [1, 2). That is exact, and so is taking it back, but where the result itself leaves the range.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Features that a program holds at a time.
MAX_BLOCK_D = 4096


@triton.jit
def _lift(largest):
    """Power of two that brings a magnitude to [1, 2), or near it where the power itself would leave the normal range."""
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
    return tl.load(row_ptr[:, None] + offs_d[None, :], mask=keep[:, None] & (offs_d < DIM)[None, :], other=0.0)


@triton.jit
def _store_chunk(row_ptr, value, keep, start, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = start + tl.arange(0, BLOCK_D)
    tl.store(row_ptr[:, None] + offs_d[None, :], value, mask=keep[:, None] & (offs_d < DIM)[None, :])


@triton.jit
def _measure(row_ptr, keep, WIDE: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr, BLOCK_D: tl.constexpr):
    """(PAIRS,) of each row x: its lift 2^k, 1/‖2^k·x‖ and 1/‖x‖; the last two are 0 for an all-zero row."""
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
    total = tl.sum(squares, 1)  # NaN if there is one in the row, which a maximum would miss
    total = tl.where(largest == float("inf"), float("nan"), total)
    zero = total == 0
    inverse = tl.where(zero, 0.0, _inverse_of_root(tl.where(zero, 1.0, total)))
    inv_norm = inverse * lift
    MOST: tl.constexpr = 1.7976931348623157e308 if lift.dtype == tl.float64 else 3.4028234663852886e38
    return lift, inverse, tl.where(inv_norm > MOST, MOST, inv_norm)


@triton.jit(do_not_specialize=["n_pairs"])
def unit_rows_kernel(
    z1_ptr,  # (n_pairs, DIM) with row stride stride1
    z2_ptr,  # (n_pairs, DIM) with row stride stride2
    f_ptr,  # (2·n_pairs, DIM) out: unit rows, or the rows as they are in half precision
    inv_norm_ptr,  # (2·n_pairs,) out, float32 or float64
    pos_ptr,  # (n_pairs,) out, likewise
    stride1,
    stride2,
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
    to1, to2 = f_ptr + pair * DIM, f_ptr + (pair + n_pairs) * DIM

    lift1, inverse1, inv_norm1 = _measure(from1, keep, WIDE, DIM, PAIRS, BLOCK_D)
    lift2, inverse2, inv_norm2 = _measure(from2, keep, WIDE, DIM, PAIRS, BLOCK_D)
    products = tl.zeros((PAIRS, BLOCK_D), WIDE)
    for start in range(0, DIM, BLOCK_D):
        x1 = _load_chunk(from1, keep, start, DIM, BLOCK_D)
        x2 = _load_chunk(from2, keep, start, DIM, BLOCK_D)
        y1, y2 = x1.to(WIDE) * lift1[:, None], x2.to(WIDE) * lift2[:, None]
        if not RAW:
            y1 *= inverse1[:, None]
            y2 *= inverse2[:, None]
            x1, x2 = y1, y2
        products += y1 * y2
        _store_chunk(to1, x1, keep, start, DIM, BLOCK_D)
        _store_chunk(to2, x2, keep, start, DIM, BLOCK_D)
    pos = tl.sum(products, 1)
    if RAW:
        pos = pos * inverse1 * inverse2
    tl.store(pos_ptr + pair, pos, mask=keep)
    tl.store(inv_norm_ptr + pair, inv_norm1, mask=keep)
    tl.store(inv_norm_ptr + pair + n_pairs, inv_norm2, mask=keep)


@triton.jit
def _load_pair(
    d_ptr, f_ptr, pair, n_pairs, inv_norm1, inv_norm2, q, keep, start,
    DIM: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(PAIRS, BLOCK_D) of a chunk: both unit rows, both gradients with what comes through the positive."""
    WIDE: tl.constexpr = d_ptr.dtype.element_ty
    row1, row2 = pair * DIM, (pair + n_pairs) * DIM
    u1 = _load_chunk(f_ptr + row1, keep, start, DIM, BLOCK_D).to(WIDE)
    u2 = _load_chunk(f_ptr + row2, keep, start, DIM, BLOCK_D).to(WIDE)
    if f_ptr.dtype.element_ty != WIDE:
        u1 *= inv_norm1[:, None]
        u2 *= inv_norm2[:, None]
    g1 = _load_chunk(d_ptr + row1, keep, start, DIM, BLOCK_D)
    g2 = _load_chunk(d_ptr + row2, keep, start, DIM, BLOCK_D)
    for part in tl.static_range(1, PARTS):
        part_ptr = d_ptr + n_pairs * (2 * part * DIM)
        g1 += _load_chunk(part_ptr + row1, keep, start, DIM, BLOCK_D)
        g2 += _load_chunk(part_ptr + row2, keep, start, DIM, BLOCK_D)
    return u1, u2, g1 - q[:, None] * u2, g2 - q[:, None] * u1


@triton.jit(do_not_specialize=["n_pairs"])
def finish_rows_kernel(
    d_ptr,  # (PARTS, 2·n_pairs, DIM) in; the first part is the output
    f_ptr,  # (2·n_pairs, DIM)
    inv_norm_ptr,  # (2·n_pairs,)
    q_ptr,  # (n_pairs,)
    n_pairs,
    DIM: tl.constexpr,
    PARTS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    WIDE: tl.constexpr = d_ptr.dtype.element_ty
    n_pairs = n_pairs.to(tl.int64)
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    keep = pair < n_pairs
    inv_norm1 = tl.load(inv_norm_ptr + pair, mask=keep, other=0.0)
    inv_norm2 = tl.load(inv_norm_ptr + pair + n_pairs, mask=keep, other=0.0)
    q = tl.load(q_ptr + pair, mask=keep, other=0.0)

    along1 = tl.zeros((PAIRS, BLOCK_D), WIDE)
    along2 = tl.zeros((PAIRS, BLOCK_D), WIDE)
    for start in range(0, DIM, BLOCK_D):
        u1, u2, g1, g2 = _load_pair(
            d_ptr, f_ptr, pair, n_pairs, inv_norm1, inv_norm2, q, keep, start, DIM, PARTS, BLOCK_D
        )
        along1 += u1 * g1
        along2 += u2 * g2
    sum1, sum2 = tl.sum(along1, 1)[:, None], tl.sum(along2, 1)[:, None]
    for start in range(0, DIM, BLOCK_D):
        u1, u2, g1, g2 = _load_pair(
            d_ptr, f_ptr, pair, n_pairs, inv_norm1, inv_norm2, q, keep, start, DIM, PARTS, BLOCK_D
        )
        _store_chunk(d_ptr + pair * DIM, (g1 - u1 * sum1) * inv_norm1[:, None], keep, start, DIM, BLOCK_D)
        _store_chunk(d_ptr + (pair + n_pairs) * DIM, (g2 - u2 * sum2) * inv_norm2[:, None], keep, start, DIM, BLOCK_D)


def tile(dim: int) -> dict[str, int]:
    """PAIRS, BLOCK_D and num_warps for rows of ``dim`` features: 16 elements of each view to a thread, or few rows."""
    block_d = min(max(triton.next_power_of_2(dim), 16), MAX_BLOCK_D)
    return {"PAIRS": min(max(1, 2048 // block_d), 32), "BLOCK_D": block_d, "num_warps": max(4, block_d // 512)}


def unit_rows(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stacked rows for cosine, 1/‖z‖ and t⁺ of the positive pairs, in one launch.

    Args:
        z1, z2: (N, D) float32, float64, bfloat16 or float16, any strides.

    Returns:
        f (2N, D) in the inputs' dtype: unit rows, but as given in half precision; inv_norm (2N,) and pos (N,) in float64 for
        float64, else float32. An all-zero row has inv_norm 0; inf and NaN make NaN of a row.
    """
    z1, z2 = (z if z.stride(1) == 1 else z.contiguous() for z in (z1, z2))
    n, dim = z1.shape
    wide = torch.float64 if z1.dtype == torch.float64 else torch.float32
    f = z1.new_empty((2 * n, dim))
    inv_norm, pos = z1.new_empty(2 * n, dtype=wide), z1.new_empty(n, dtype=wide)
    config = tile(dim)
    with torch.cuda.device_of(z1):
        unit_rows_kernel[(triton.cdiv(n, config["PAIRS"]),)](
            z1, z2, f, inv_norm, pos, z1.stride(0), z2.stride(0), n, DIM=dim, **config
        )
    return f, inv_norm, pos


def finish_rows(d: Tensor, f: Tensor, inv_norm: Tensor, q: Tensor) -> None:
    """d ← (g − F⟨F, g⟩)/‖z‖ with g = d − q·F of the partner, in place and in one launch.

    Args:
        d: (2N, D) Σ_j (g_ij + g_ji) F_j, contiguous, in the dtype of inv_norm; or (P, 2N, D), parts of it that are added in
            their order, of which the first receives the result.
        f: (2N, D) and inv_norm: (2N,) as `unit_rows` returns them; q: (N,) of the pairs.
    """
    n, dim = q.shape[0], f.shape[1]
    config = tile(dim)
    with torch.cuda.device_of(d):
        finish_rows_kernel[(triton.cdiv(n, config["PAIRS"]),)](
            d, f, inv_norm, q.contiguous(), n, DIM=dim, PARTS=d.shape[0] if d.dim() == 3 else 1, **config
        )
