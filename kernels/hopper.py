"""Both sweeps of the "fixed" form on Hopper, in Gluon: bfloat16 rows, one exponential per pair, no maximum.

Plain Triton waits for every product S = F_I·F_Jᵀ before the exponentials of its tile. Here a program of three partitions keeps
the tensor cores busy meanwhile:

* one **producer** warp copies column tiles (F_J and the row scalars of J) into a ring of stages, by TMA;
* two **consumer** warpgroups own BLOCK_M/2 rows each. While one takes the exponentials of tile k, its S of tile k + 1 is being
  multiplied, then W_k·F_k, for which it waits only after it has asked for the S of tile k + 2.

A stage is ``full`` when its bytes have arrived and ``free`` when both consumers have read it. Rows come in logical order
(kernels/sweeps.py), so the excluded pairs, ``r_i >> SHIFT == r_j >> SHIFT``, lie in the program's own block of columns. A walk
begins there and goes on through the other blocks in ascending order, so that a ragged one comes last unless it is the own one.
Only first and last blocks are masked. TMA reads zeros beyond the last row, and a walk has at least two blocks, if need be of
nothing but zeros.

ptxas decides whether the products really overlap: tests/test_hopper.py compiles every tile below and fails if they are
"serialized" or a register is spilled; the places of the waits were chosen by that. tests/gluon_emulator.py runs this very
source on a CPU.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .config import Tile

__all__ = ["GRAD_TILES", "SUM_TILES", "ahead_of_time", "most_splits", "pair_grad", "row_sums"]

#: The tile of each number of features that can be served.
GRAD_TILES = {
    64: Tile(128, 128, 64, 4, 4, engine="gluon"),
    128: Tile(128, 128, 128, 4, 4, engine="gluon"),
    256: Tile(128, 64, 256, 4, 4, engine="gluon"),
}
SUM_TILES = {
    64: Tile(128, 128, 64, 4, 4, engine="gluon"),
    128: Tile(128, 128, 128, 4, 4, engine="gluon"),
    256: Tile(128, 128, 256, 4, 2, engine="gluon"),
}
# 240 registers for a thread of either consumer (the first has what the others leave) and 24 for the producer make 64 K.
_WORKER_WARPS = gl.constexpr([4, 1])
_WORKER_REGISTERS = gl.constexpr([240, 24])

_LOG2E = gl.constexpr(1.4426950408889634)


class Ring(NamedTuple):
    """Shared memory: the program's rows, the stages of column tiles, and when they are full and free."""

    rows: Any  # (2, BLOCK_M/2, D) bf16
    cols: Any  # (STAGES, BLOCK_N, D) bf16
    scale: Any  # (STAGES, BLOCK_N) fp32
    r: Any  # (STAGES, BLOCK_N) fp32, r_j·scale_j; row_sums has none
    rows_full: Any  # (1,) barrier
    full: Any  # (STAGES, 1)
    free: Any  # (STAGES, 1)


class Walk(NamedTuple):
    """The columns of a program: ``count`` tiles from the block at position ``first`` of its walk on."""

    own: Any
    first: Any
    count: Any


class Row(NamedTuple):
    """A consumer's rows, (BLOCK_M/2,) each; ``r`` is r_i in pair_grad, center_i in row_sums."""

    group: Any  # r_i >> SHIFT, int32
    scale: Any
    slope: Any  # of a linear kind: log2 f(t) = slope·S·scale_j
    r: Any


# --- what both sweeps do ----------------------------------------------------------------------------------------------


@gluon.jit
def _open(rows_desc, cols_desc, scale_desc, r_desc, STAGES: gl.constexpr):
    """Allocates the ring and makes its barriers known to TMA."""
    BLOCK_N: gl.constexpr = cols_desc.block_type.shape[0]
    HALF: gl.constexpr = rows_desc.block_type.shape[0]
    D: gl.constexpr = rows_desc.block_type.shape[1]
    rows = gl.allocate_shared_memory(gl.bfloat16, [2, HALF, D], rows_desc.layout)
    cols = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, D], cols_desc.layout)
    scale = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], scale_desc.layout)
    r = scale
    if r_desc is not None:
        r = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], r_desc.layout)
    rows_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(rows_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    return Ring(rows, cols, scale, r, rows_full, full, free)


@gluon.jit
def _walk(n, BLOCK_M: gl.constexpr, TILES: gl.constexpr):
    """The share of program (block, split) in the blocks of columns; TILES tiles make a block."""
    blocks = gl.maximum(gl.cdiv(n, BLOCK_M), 2)
    first = blocks * gl.program_id(1) // gl.num_programs(1)
    end = blocks * (gl.program_id(1) + 1) // gl.num_programs(1)
    return Walk(gl.program_id(0), first, (end - first) * TILES)


@gluon.jit
def _first_col(k, walk, BLOCK_N: gl.constexpr, TILES: gl.constexpr):
    """Where tile k of a walk begins: its own block is at position 0, the others follow in ascending order."""
    position = walk.first + k // TILES
    block = gl.where(position == 0, walk.own, gl.where(position <= walk.own, position - 1, position))
    return (block * TILES + k % TILES) * BLOCK_N


@gluon.jit
def _produce(rows_desc, cols_desc, scale_desc, r_desc, ring, walk, TILES: gl.constexpr):
    """Copies the rows, and column tiles into every stage that is free."""
    STAGES: gl.constexpr = ring.cols.shape[0]
    BLOCK_N: gl.constexpr = ring.cols.shape[1]
    HALF: gl.constexpr = ring.rows.shape[1]
    mbarrier.expect(ring.rows_full, 2 * rows_desc.block_type.nbytes)
    for half in gl.static_range(2):
        first_row = (2 * walk.own + half) * HALF
        tma.async_copy_global_to_shared(rows_desc, [first_row, 0], ring.rows_full, ring.rows.index(half))
    for k in range(walk.count):
        stage = k % STAGES
        full = ring.full.index(stage)
        col = _first_col(k, walk, BLOCK_N, TILES)
        # A fresh barrier counts the phase before its first as passed: in the first round every stage is free.
        mbarrier.wait(ring.free.index(stage), ((k // STAGES) & 1) ^ 1)
        if r_desc is not None:
            mbarrier.expect(full, cols_desc.block_type.nbytes + scale_desc.block_type.nbytes + r_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(r_desc, [col], full, ring.r.index(stage))
        else:
            mbarrier.expect(full, cols_desc.block_type.nbytes + scale_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(scale_desc, [col], full, ring.scale.index(stage))
        tma.async_copy_global_to_shared(cols_desc, [col, 0], full, ring.cols.index(stage))


@gluon.jit
def _load_row(i, n, scale_ptr, r_ptr, tau, SHIFT: gl.constexpr, LINEAR: gl.constexpr, LOG_F: gl.constexpr):
    scale = gl.load(scale_ptr + i, mask=i < n, other=0.0)
    slope = scale
    if LINEAR:
        slope = LOG_F(scale, tau) * _LOG2E
    r = scale
    if r_ptr is not None:
        r = gl.load(r_ptr + i, mask=i < n, other=0.0)
    return Row(i >> SHIFT, scale, slope, r)


@gluon.jit
def _begin_product(k, ring, rows, L: gl.constexpr):
    """Starts S = F_I·F_Jᵀ (BLOCK_M/2, BLOCK_N) of tile k as soon as the tile is there."""
    STAGES: gl.constexpr = ring.cols.shape[0]
    SHAPE: gl.constexpr = (rows.shape[0], ring.cols.shape[1])
    mbarrier.wait(ring.full.index(k % STAGES), (k // STAGES) & 1)
    zeros = gl.zeros(SHAPE, gl.float32, L)
    return warpgroup_mma(rows, ring.cols.index(k % STAGES).permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def _exp(s, row, tau, middle, LINEAR: gl.constexpr, LOG_F: gl.constexpr):
    """E = exp(log f(t) − middle) with t = scale_i·s, s = S·scale_j; ``middle`` comes in units of log 2."""
    if LINEAR:
        return gl.exp2(s * row.slope[:, None] - middle)
    else:
        return gl.exp2(LOG_F(s * row.scale[:, None], tau) * _LOG2E - middle)


# --- sweep 2 ----------------------------------------------------------------------------------------------------------


@gluon.jit
def _weights(
    S, row, scale, r, col, tau, middle,
    L: gl.constexpr, MASKED: gl.constexpr, SHIFT: gl.constexpr, LINEAR: gl.constexpr, LOG_F: gl.constexpr,
):  # fmt: skip
    """W = E·(r_i + r_j)·scale_j in bf16, 0 at excluded pairs. Columns beyond the last have scale_j = r_j = 0, so W = 0."""
    scale_j = scale.load(gl.SliceLayout(0, L))[None, :]
    r_j = r.load(gl.SliceLayout(0, L))[None, :]
    W = _exp(S * scale_j, row, tau, middle, LINEAR, LOG_F) * (row.r[:, None] * scale_j + r_j)
    if MASKED:
        j = col + gl.arange(0, S.shape[1], gl.SliceLayout(0, L))
        W = gl.where(row.group[:, None] == (j >> SHIFT)[None, :], 0.0, W)
    return W.to(gl.bfloat16)


@gluon.jit
def _grad_step(
    k, S, dF, rows, row, ring, col, tau, middle, H: gl.constexpr, L: gl.constexpr, G: gl.constexpr,
    FIRST: gl.constexpr, LAST: gl.constexpr, MASKED: gl.constexpr,
    SHIFT: gl.constexpr, LINEAR: gl.constexpr, LOG_F: gl.constexpr,
):  # fmt: skip
    """Adds W·F_J of tile k, whose S is there; returns the S of the next tile, and dF unfinished."""
    STAGES: gl.constexpr = ring.cols.shape[0]
    M: gl.constexpr = S.shape[0]
    N: gl.constexpr = S.shape[1] // 2
    stage = k % STAGES
    if not LAST:
        S_next = _begin_product(k + 1, ring, rows, L)
    # Before the exponentials, for the registers of W_{k−1} are those of W_k: later, ptxas runs out of them.
    if not FIRST:
        if LAST:
            dF = warpgroup_mma_wait(0, [dF])
        else:
            dF = warpgroup_mma_wait(1, [dF])
            mbarrier.arrive(ring.free.index((k - 1) % STAGES), count=1)
    # By halves: one is multiplied during the exponentials of the other.
    S_halves = gl.split(gl.permute(gl.reshape(S, [M, 2, N]), [0, 2, 1]))
    for part in gl.static_range(2):
        W = _weights(
            gl.convert_layout(S_halves[part], H, assert_trivial=True), row,
            ring.scale.index(stage).slice(part * N, N), ring.r.index(stage).slice(part * N, N), col + part * N, tau, middle,
            H, MASKED, SHIFT, LINEAR, LOG_F,
        )  # fmt: skip
        W = gl.convert_layout(W, gl.DotOperandLayout(0, G, 2), assert_trivial=True)
        dF = warpgroup_mma(W, ring.cols.index(stage).slice(part * N, N), dF, is_async=True)
    if not LAST:
        S = warpgroup_mma_wait(2, [S_next])
    return S, dF


@gluon.jit
def _consume_grad(
    half: gl.constexpr, out_ptr, scale_ptr, r_ptr, tau_ptr, middle, n, ring, walk,
    TILES: gl.constexpr, SHIFT: gl.constexpr, LINEAR: gl.constexpr, LOG_F: gl.constexpr,
):  # fmt: skip
    """dF of one half of the rows."""
    M: gl.constexpr = ring.rows.shape[1]
    N: gl.constexpr = ring.cols.shape[1]
    D: gl.constexpr = ring.rows.shape[2]
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    H: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N // 2, 16])
    G: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    tau = gl.load(tau_ptr)
    middle = middle * _LOG2E
    i = (2 * walk.own + half) * M + gl.arange(0, M, gl.SliceLayout(1, H))
    row = _load_row(i, n, scale_ptr, r_ptr, tau, SHIFT, LINEAR, LOG_F)
    rows = ring.rows.index(half)
    mbarrier.wait(ring.rows_full, 0)
    S = warpgroup_mma_wait(0, [_begin_product(0, ring, rows, L)])
    dF = warpgroup_mma_init(gl.zeros([M, D], gl.float32, G))
    col = _first_col(0, walk, N, TILES)
    for k in gl.static_range(TILES):
        S, dF = _grad_step(
            k, S, dF, rows, row, ring, col + k * N, tau, middle, H, L, G, k == 0, False, True, SHIFT, LINEAR, LOG_F
        )
    # Two tiles a turn save the copy of S to where the next turn expects it. With more features registers do not suffice.
    TURN: gl.constexpr = 2 if D <= 64 else 1
    rest = walk.count - 1 - (walk.count - 1 - TILES) % TURN
    for k in range(TILES, rest, TURN):
        for u in gl.static_range(TURN):
            S, dF = _grad_step(
                k + u, S, dF, rows, row, ring, 0, tau, middle, H, L, G, False, False, False, SHIFT, LINEAR, LOG_F
            )
    if TURN > 1:
        for k in range(rest, walk.count - 1):
            S, dF = _grad_step(k, S, dF, rows, row, ring, 0, tau, middle, H, L, G, False, False, False, SHIFT, LINEAR, LOG_F)
    S, dF = _grad_step(
        walk.count - 1, S, dF, rows, row, ring, 0, tau, middle, H, L, G, False, True, False, SHIFT, LINEAR, LOG_F
    )
    dF = warpgroup_mma_wait(0, [dF])
    # Numbered anew, for row numbers kept through the loop would cost registers there.
    i = (2 * gl.program_id(0) + half) * M + gl.arange(0, M, gl.SliceLayout(1, G))
    out_row = gl.cast(gl.program_id(1), gl.int64) * n + i
    gl.store(out_ptr + out_row[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, G))[None, :], dF, mask=(i < n)[:, None])


@gluon.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["scale_ptr", "r_ptr", "tau_ptr"])
def _grad_kernel(
    rows_desc, cols_desc, scale_desc, r_desc, out_ptr, scale_ptr, r_ptr, tau_ptr, middle, n,
    STAGES: gl.constexpr, SHIFT: gl.constexpr, LINEAR: gl.constexpr, LOG_F: gl.constexpr,
):  # fmt: skip
    """dF of row block program_id(0) from the share program_id(1) of the columns."""
    BLOCK_M: gl.constexpr = 2 * rows_desc.block_type.shape[0]
    TILES: gl.constexpr = BLOCK_M // cols_desc.block_type.shape[0]
    ring = _open(rows_desc, cols_desc, scale_desc, r_desc, STAGES)
    walk = _walk(n, BLOCK_M, TILES)
    gl.warp_specialize(
        [
            (_consume_grad, (0, out_ptr, scale_ptr, r_ptr, tau_ptr, middle, n, ring, walk, TILES, SHIFT, LINEAR, LOG_F)),
            (_consume_grad, (1, out_ptr, scale_ptr, r_ptr, tau_ptr, middle, n, ring, walk, TILES, SHIFT, LINEAR, LOG_F)),
            (_produce, (rows_desc, cols_desc, scale_desc, r_desc, ring, walk, TILES)),
        ],
        _WORKER_WARPS,
        _WORKER_REGISTERS,
    )


# --- sweep 1 ----------------------------------------------------------------------------------------------------------


@gluon.jit
def _add(total, lost, x):
    """Compensated total + x: a row's sums arrive over thousands of tiles."""
    y = x - lost
    new = total + y
    return new, (new - total) - y


@gluon.jit
def _sum_step(
    k, S, sums, rows, row, ring, col, tau, middle, n, L: gl.constexpr, LAST: gl.constexpr, MASKED: gl.constexpr,
    SHIFT: gl.constexpr, LINEAR: gl.constexpr, LOG_F: gl.constexpr, MOMENT: gl.constexpr,
):  # fmt: skip
    """Adds tile k, whose S is there; returns the S of the next tile and the sums."""
    STAGES: gl.constexpr = ring.cols.shape[0]
    total, lost, moment, moment_lost = sums
    if not LAST:
        S_next = _begin_product(k + 1, ring, rows, L)
    s = S * ring.scale.index(k % STAGES).load(gl.SliceLayout(0, L))[None, :]
    E = _exp(s, row, tau, middle, LINEAR, LOG_F)
    if MASKED:
        j = col + gl.arange(0, S.shape[1], gl.SliceLayout(0, L))
        E = gl.where((j < n)[None, :] & (row.group[:, None] != (j >> SHIFT)[None, :]), E, 0.0)
    total, lost = _add(total, lost, gl.sum(E, axis=1))
    if MOMENT:
        u = s * row.scale[:, None] - row.r[:, None]
        moment, moment_lost = _add(moment, moment_lost, gl.sum(E * u, axis=1))
    if not LAST:
        mbarrier.arrive(ring.free.index(k % STAGES), count=1)
        S = warpgroup_mma_wait(0, [S_next])
    return S, (total, lost, moment, moment_lost)


@gluon.jit
def _consume_sums(
    half: gl.constexpr, out_ptr, scale_ptr, center_ptr, tau_ptr, middle, n, ring, walk,
    TILES: gl.constexpr, SHIFT: gl.constexpr, LINEAR: gl.constexpr, LOG_F: gl.constexpr,
):  # fmt: skip
    """Sums of one half of the rows."""
    M: gl.constexpr = ring.rows.shape[1]
    N: gl.constexpr = ring.cols.shape[1]
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    MOMENT: gl.constexpr = center_ptr is not None
    tau = gl.load(tau_ptr)
    middle = middle * _LOG2E
    i = (2 * walk.own + half) * M + gl.arange(0, M, gl.SliceLayout(1, L))
    row = _load_row(i, n, scale_ptr, center_ptr, tau, SHIFT, LINEAR, LOG_F)
    rows = ring.rows.index(half)
    mbarrier.wait(ring.rows_full, 0)
    S = warpgroup_mma_wait(0, [_begin_product(0, ring, rows, L)])
    zeros = gl.zeros([M], gl.float32, gl.SliceLayout(1, L))
    sums = (zeros, zeros, zeros, zeros)
    col = _first_col(0, walk, N, TILES)
    for k in gl.static_range(TILES):
        S, sums = _sum_step(
            k, S, sums, rows, row, ring, col + k * N, tau, middle, n, L, False, True, SHIFT, LINEAR, LOG_F, MOMENT
        )
    # Two tiles a turn save the copy of S to where the next turn expects it.
    rest = walk.count - TILES - walk.count % 2
    for k in range(TILES, rest, 2):
        for u in gl.static_range(2):
            S, sums = _sum_step(
                k + u, S, sums, rows, row, ring, 0, tau, middle, n, L, False, False, SHIFT, LINEAR, LOG_F, MOMENT
            )
    for k in range(rest, walk.count - 1):
        col = _first_col(k, walk, N, TILES)
        S, sums = _sum_step(
            k, S, sums, rows, row, ring, col, tau, middle, n, L, False, True, SHIFT, LINEAR, LOG_F, MOMENT
        )  # fmt: skip
    last = walk.count - 1
    col = _first_col(last, walk, N, TILES)
    S, sums = _sum_step(
        last, S, sums, rows, row, ring, col, tau, middle, n, L, True, True, SHIFT, LINEAR, LOG_F, MOMENT
    )  # fmt: skip
    total, lost, moment, moment_lost = sums
    TERMS: gl.constexpr = 2 if MOMENT else 1
    ptrs = out_ptr + gl.cast(gl.program_id(1), gl.int64) * TERMS * n + i
    gl.store(ptrs, total - lost, mask=i < n)
    if MOMENT:
        gl.store(ptrs + n, moment - moment_lost, mask=i < n)


@gluon.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["scale_ptr", "center_ptr", "tau_ptr"])
def _sum_kernel(
    rows_desc, cols_desc, scale_desc, out_ptr, scale_ptr, center_ptr, tau_ptr, middle, n,
    STAGES: gl.constexpr, SHIFT: gl.constexpr, LINEAR: gl.constexpr, LOG_F: gl.constexpr,
):  # fmt: skip
    """Sums of row block program_id(0) over the share program_id(1) of the columns."""
    BLOCK_M: gl.constexpr = 2 * rows_desc.block_type.shape[0]
    TILES: gl.constexpr = BLOCK_M // cols_desc.block_type.shape[0]
    ring = _open(rows_desc, cols_desc, scale_desc, None, STAGES)
    walk = _walk(n, BLOCK_M, TILES)
    gl.warp_specialize(
        [
            (_consume_sums, (0, out_ptr, scale_ptr, center_ptr, tau_ptr, middle, n, ring, walk, TILES, SHIFT, LINEAR, LOG_F)),
            (_consume_sums, (1, out_ptr, scale_ptr, center_ptr, tau_ptr, middle, n, ring, walk, TILES, SHIFT, LINEAR, LOG_F)),
            (_produce, (rows_desc, cols_desc, scale_desc, None, ring, walk, TILES)),
        ],
        _WORKER_WARPS,
        _WORKER_REGISTERS,
    )


# --- launches ---------------------------------------------------------------------------------------------------------


def pair_grad(
    rows: Tensor,
    cols: Tensor,
    scale_rows: Tensor,
    scale_cols: Tensor,
    r_rows: Tensor,
    r_cols: Tensor,
    tau: Tensor,
    middle: float,
    log_f: Any,
    shift: int,
    splits: int = 1,
    tile: Tile | None = None,
    linear: bool = False,
) -> Tensor:
    """Parts of dF_i = Σ_j E_ij·(r_i + r_j)·F_j, E_ij = exp(log f(t_ij) − middle), t_ij = scale_i·scale_j·⟨f_i, f_j⟩.

    Args:
        rows, cols: (n, D) bfloat16, contiguous, in logical order; the same tensor but in a rectangle.
        scale_rows, scale_cols, r_rows, r_cols: (n,) float32, in the same order; r is zero where a side has no anchors.
        tau: () float32. middle: such that |log f − middle| ≤ 64.
        log_f: Triton function (x, tau) → log f(x) of a few instructions; with logarithms or fractional powers, which are
            software, registers spill. linear: it is x times a number.
        shift: pairs with i >> shift == j >> shift do not count: 1 in two_view, else 0.
        splits: programs that share a row's columns, each of which writes one part.
        tile: its rows, cols and stages are used; default `GRAD_TILES`.

    Returns:
        (splits, n, D) float32 in logical order, to be summed over the first dimension.

    Raises:
        ValueError: a shape, dtype, layout, tile or number of splits that the kernel cannot serve.
    """
    tile = _checked(rows, cols, (scale_rows, scale_cols, r_rows, r_cols), splits, tile, GRAD_TILES, 3)
    n, d = rows.shape
    out = rows.new_empty((splits, n, d), dtype=torch.float32)
    _grad_kernel[(triton.cdiv(n, tile.rows), splits)](
        _described(rows, tile.rows // 2, d),
        _described(cols, tile.cols, d),
        _described(scale_cols, tile.cols),
        _described(r_cols * scale_cols, tile.cols),
        out, scale_rows, r_rows, tau, middle, n,
        STAGES=tile.stages, SHIFT=shift, LINEAR=linear, LOG_F=log_f, num_warps=4,
    )  # fmt: skip
    return out


def row_sums(
    rows: Tensor,
    cols: Tensor,
    scale_rows: Tensor,
    scale_cols: Tensor,
    center: Tensor | None,
    tau: Tensor,
    middle: float,
    log_f: Any,
    shift: int,
    splits: int = 1,
    tile: Tile | None = None,
    linear: bool = False,
) -> Tensor:
    """Parts of Σ_j E_ij and, if there is a center (n,) float32, of Σ_j E_ij·(t_ij − center_i).

    All else as in `pair_grad`, with the default `SUM_TILES`. Returns (splits, 1 or 2, n) float32 in logical order.
    """
    vectors = (scale_rows, scale_cols) if center is None else (scale_rows, scale_cols, center)
    tile = _checked(rows, cols, vectors, splits, tile, SUM_TILES, 2)
    n, d = rows.shape
    out = rows.new_empty((splits, len(vectors) - 1, n), dtype=torch.float32)
    _sum_kernel[(triton.cdiv(n, tile.rows), splits)](
        _described(rows, tile.rows // 2, d),
        _described(cols, tile.cols, d),
        _described(scale_cols, tile.cols),
        out, scale_rows, center, tau, middle, n,
        STAGES=tile.stages, SHIFT=shift, LINEAR=linear, LOG_F=log_f, num_warps=4,
    )  # fmt: skip
    return out


def most_splits(n: int, tile: Tile) -> int:
    """How many programs may share the columns of n rows: each takes two blocks at least."""
    return max(triton.cdiv(n, tile.rows) // 2, 1)


def _checked(
    rows: Tensor,
    cols: Tensor,
    vectors: tuple[Tensor, ...],
    splits: int,
    tile: Tile | None,
    tiles: dict[int, Tile],
    least_stages: int,
) -> Tile:
    n, d = rows.shape
    if tile is None:
        if d not in tiles:
            raise ValueError(f"rows must have {sorted(tiles)} features, got {d}")
        tile = tiles[d]
    if tile.rows % tile.cols or tile.stages < least_stages:
        raise ValueError(f"tile must have rows that are a multiple of cols, and at least {least_stages} stages, got {tile}")
    for name, matrix in (("rows", rows), ("cols", cols)):
        if matrix.shape != (n, d) or matrix.dtype != torch.bfloat16 or not matrix.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous ({n}, {d}) bfloat16, got {tuple(matrix.shape)} {matrix.dtype} "
                f"with strides {matrix.stride()}"
            )
    for vector in vectors:
        if vector.shape != (n,) or vector.dtype != torch.float32 or not vector.is_contiguous():
            raise ValueError(
                f"row scalars must be contiguous ({n},) float32, got {tuple(vector.shape)} {vector.dtype} "
                f"with strides {vector.stride()}"
            )
    if not 1 <= splits <= most_splits(n, tile):
        raise ValueError(f"splits must be 1 to {most_splits(n, tile)} for {n} rows, got {splits}")
    return tile


def _described(x: Tensor, *block: int) -> TensorDescriptor:
    """For TMA, which reads from multiples of 16 bytes only."""
    if x.data_ptr() % 16:
        x = x.clone()
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float32
    return TensorDescriptor.from_tensor(x, list(block), gl.NVMMASharedLayout.get_default_for(list(block), dtype))


def ahead_of_time(
    sweep: str, tile: Tile, log_f: Any, shift: int = 1, linear: bool = False, moment: bool = False
) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """Kernel, signature and constexprs of a launch, for `kernels.resources.compile_for`; sweep: pair_grad or row_sums."""

    def described(dtype: Any, *block: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for(list(block), dtype)
        return f"tensordesc<{dtype.name}[{','.join(map(str, block))}],{layout!r}>"

    vector = described(gl.float32, tile.cols)
    signature = {
        "rows_desc": described(gl.bfloat16, tile.rows // 2, tile.features),
        "cols_desc": described(gl.bfloat16, tile.cols, tile.features),
        "scale_desc": vector,
        **dict.fromkeys(("out_ptr", "scale_ptr", "tau_ptr"), "*fp32"),
        "middle": "fp32",
        "n": "i32",
    }
    constexprs = {"STAGES": tile.stages, "SHIFT": shift, "LINEAR": linear, "LOG_F": log_f}
    if sweep == "pair_grad":
        return _grad_kernel, signature | {"r_desc": vector, "r_ptr": "*fp32"}, constexprs
    if moment:
        return _sum_kernel, signature | {"center_ptr": "*fp32"}, constexprs
    return _sum_kernel, signature, constexprs | {"center_ptr": None}
