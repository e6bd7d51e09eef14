"""What the GPU backends share: which rows a launch serves against which columns, and how results in parts come together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

#: Bytes of scratch that a sweep allocates at most for partial sums, and for weights of rows too wide for registers.
SCRATCH = 256 << 20


class Group(NamedTuple):
    """Rows that one launch serves against the columns they meet."""

    row_start: int
    n_rows: int
    col_start: int
    n_cols: int
    rows_paired: bool  # a block of rows holds rows of one view and then their partners
    cols_paired: bool
    exclude: bool
    triangle: bool
    rows_anchor: bool
    cols_anchor: bool


def groups_of(n: int, split: int, partner: int, anchors: int) -> list[Group]:
    """All rows: of a triangle one group, of a rectangle one per side."""
    if split:
        if partner not in (0, split):
            raise ValueError(f"partner must be 0 or split ({split}) in a rectangle, got {partner}")
        symmetric = anchors > split
        return [
            Group(0, split, split, n - split, False, False, partner > 0, False, True, symmetric),
            Group(split, n - split, 0, split, False, False, partner > 0, False, symmetric, True),
        ]
    if partner not in (0, n // 2) or (partner and n % 2):
        raise ValueError(f"partner must be 0 or half of the rows ({n}), got {partner}")
    return [Group(0, n, 0, n, partner > 0, partner > 0, True, True, True, True)]


def view_group(n: int, half: int, start: int) -> Group:
    """The rows of one view of two_view against all rows."""
    return Group(start, half, 0, n, False, True, True, False, True, True)


def jobs_of(groups: list[Group], n: int, lo: int, hi: int, terms: bool) -> list[tuple[Group, bool]]:
    """Groups with whether their gradient is wanted; those that are launched for nothing left out.

    Raises ValueError for a range [lo, hi) that is not made of whole views.
    """
    if groups[0].rows_paired and (lo, hi) != (0, n):  # two_view, not all rows: each view is a group of its own
        groups = [view_group(n, n // 2, 0), view_group(n, n // 2, n // 2)]
    jobs = []
    for group in groups:
        begin, end = group.row_start, group.row_start + group.n_rows
        wants = lo <= begin and end <= hi and lo < hi
        if not wants and max(lo, begin) < min(hi, end):
            raise ValueError(f"[lo, hi) must hold whole views, rows {begin} to {end}, got {lo} to {hi}")
        if wants or (terms and group.rows_anchor):
            jobs.append((group, wants))
    return jobs


def fitting(bytes_each: int) -> int:
    """How many fit into the scratch, at least one."""
    return max(1, SCRATCH // bytes_each)


def row_runs(blocks: int, bytes_of_block: int) -> Iterator[tuple[int, int]]:
    """(first row block, number of them) so that what they write fits into the scratch."""
    run = fitting(bytes_of_block)
    for first in range(0, blocks, run):
        yield first, min(run, blocks - first)


def clear(slot: Tensor, form: str) -> None:
    """Fills a slot with the sums of no pairs; in place."""
    slot.zero_()
    if form in ("running", "max"):
        slot[0].fill_(-torch.inf)


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Within the context torch multiplies float32 matrices on GPUs at this precision (three-pass bfloat16 as IEEE)."""
    matmul = torch.backends.cuda.matmul
    name, wanted = ("fp32_precision", precision) if hasattr(matmul, "fp32_precision") else ("allow_tf32", precision == "tf32")
    before = getattr(matmul, name)
    setattr(matmul, name, "ieee" if wanted == "bf16x3" else wanted)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def multiply_weights(w: Tensor, f: Tensor, group: Group, first: int, size: int, precision: str, df: Tensor, lo: int) -> None:
    """df ← W·F by a vendor product, for the row blocks of ``size`` rows from ``first`` on.

    Args:
        w: (blocks·size, n_cols) weights in the order of the blocks' rows; of rows that do not exist anything.
        f: (rows, D). precision: of a float32 product. df: (hi − lo, D) gradient of the rows from ``lo`` on.
    """
    columns, dim = f[group.col_start : group.col_start + group.n_cols], f.shape[1]
    if w.is_cuda and w.itemsize == 2:
        product = torch.mm(w, columns, out_dtype=torch.float32)
    else:
        with matmul_precision(precision):
            product = w.to(df.dtype) @ columns.to(df.dtype)
    if group.rows_paired:  # a block's first half are rows of one view, its second half their partners
        first_pair = first * size // 2
        out = df.view(2, -1, dim)[:, first_pair : first_pair + len(w) // 2]
        out.copy_(product.view(-1, 2, size // 2, dim).transpose(0, 1).flatten(1, 2)[:, : out.shape[1]])
    else:
        begin, rows = group.row_start + first * size - lo, min(len(w), group.n_rows - first * size)
        df[begin : begin + rows] = product[:rows]
