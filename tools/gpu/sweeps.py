"""Compares the two operators alone with float64: layouts, splits, NaN, repeated bits.

The operators get InfoNCE's arguments, which the fastest kernels of every backend serve: they
compute the sums of exp(t/τ) relative to a constant shift, and their gradient. Small sizes come
first: two rows, then one ragged tile, then several tiles.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import ModuleType

import torch
from torch import Tensor

from alphacl_fast import ops
from alphacl_fast.accuracy import (
    ARITHMETIC,
    deterministic,
    fill_with_nan,
    matmul_precision,
    other_bits,
    same_bits,
    status,
    structured_rows,
)
from alphacl_fast.backend import blocked
from alphacl_fast.bundles import PairFunction, Pairing, Rows, RowScalars, Term, Weight
from alphacl_fast.journal import Row

from . import engines

TAU = 0.5
#: Largest relative error of the sums and of the gradient, by dtype.
BOUNDS = {"bfloat16": (1e-5, 4e-3), "tf32": (2e-3, 4e-3), "float32": (1e-5, 1e-5)}
#: The error of the worst row, relative to the root mean square of the rows, may be so many bounds.
WORST_ROW = 16
#: Layout → (split, partner, anchors) in halves of the rows.
LAYOUTS = {
    "triangle": (0, 0, 2), "triangle without pairs": (0, 1, 2),
    "rectangle": (1, 0, 2), "rectangle without pairs": (1, 1, 2),
}  # fmt: skip
SIZES = (2, 130, 1000, 4130)


@dataclass(frozen=True)
class Sweep:
    """One check of both operators.

    Attributes:
        engine: a key of `engines.ENGINES`.
        n, dim: the numbers of rows and of features.
        dtype: a key of `BOUNDS`.
        layout: a key of `LAYOUTS`.
        splits: the splits of a schedule; 0 leaves the number to the package.
        nan: whether a row is NaN.
        runs: the number of runs, which must all give the bits of the first.
    """

    engine: str
    n: int
    dim: int = 128
    dtype: str = "bfloat16"
    layout: str = "triangle"
    splits: int = 0
    nan: bool = False
    runs: int = 20


def table(engine: str, layout: str, sizes: tuple[int, ...] = SIZES) -> tuple[Sweep, ...]:
    """List the sweeps that one process checks: every size, split and kind of rows."""
    found = [
        Sweep(engine, n, layout=layout, splits=splits)
        for n, splits in itertools.product(sizes, (0, 1, 2, 3))
        if n > 2 or not splits
    ]
    found += [Sweep(engine, sizes[1], layout=layout, nan=True)]
    found += [Sweep(engine, sizes[2], dim, layout=layout, runs=3) for dim in (64, 256)]
    if engine == "cuda_hopper":
        found += [Sweep(engine, sizes[1], dim, "float16", layout, runs=3) for dim in (64, 256)]
        found += [Sweep(engine, sizes[1], dim, "tf32", layout, runs=3) for dim in (64, 128)]
        found += [Sweep(engine, sizes[1], 20, "tf32", layout, nan=True, runs=3)]
    elif engine != "triton_64":  # which serves bfloat16 alone
        found += [
            Sweep(engine, sizes[1], 20, dtype, layout, nan=nan, runs=3)
            for dtype, nan in itertools.product(("tf32", "float32"), (False, True))
        ]
    return tuple(found)


def check(sweep: Sweep, device: str) -> Iterator[Row]:
    """Check the sums and the gradient against float64, and that runs repeat their bits."""
    start = time.perf_counter()
    here = torch.device(device)
    dtype, precision = ARITHMETIC[sweep.dtype]
    row = {"benchmark": "sweep", **asdict(sweep)}
    backend = engines.backend_of(sweep.engine)
    if reason := ops.unsupported(backend, here, dtype, precision, "exp"):
        yield {**row, "status": "refused", "error": reason}
        return
    rows = rows_of(sweep, here)
    serving = ops.SWEEP_BACKENDS[backend]
    with (
        deterministic(True),  # new memory is NaN
        matmul_precision(sweep.dtype),
        engines.within(sweep.engine, sweep.dim, dtype),
        engines.splits(sweep.splits),
    ):
        ours, *again = (compute(serving, rows, sweep, precision or "") for _ in range(sweep.runs))
    wide = Rows(*(None if x is None else x.double() for x in rows))
    truth = compute(blocked, wide, sweep, "")
    different = sum(not same_bits(ours, other) for other in again)
    wrong = other_bits(different, len(again))
    errors = {}
    for name, x, exact, bound in zip(("sums", "df"), ours, truth, BOUNDS[sweep.dtype], strict=True):
        counted = comparable(sweep, len(exact)).to(exact.device)
        x, exact = x.double()[counted], exact[counted]
        if not torch.equal(x.isnan(), exact.isnan()):
            mine, theirs = (int(y.isnan().sum()) for y in (x, exact))
            wrong.append(f"{mine} elements of {name} are NaN, not {theirs}")
            continue
        off, size = (x - exact).nan_to_num(), exact.nan_to_num()
        each = size.norm().clamp(min=1e-30)
        worst = off.reshape(len(off), -1).norm(dim=1).max() * len(off) ** 0.5 / each
        errors[name] = float(off.norm() / each), float(worst)
        if not (errors[name][0] <= bound and errors[name][1] <= WORST_ROW * bound):
            wrong.append(f"{name}: error {errors[name][0]:.1e}, worst row {errors[name][1]:.1e}")
    yield {
        **row, **status("; ".join(wrong)), "errors": errors, "repeatable": not different,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def rows_of(sweep: Sweep, device: torch.device) -> Rows:
    """Draw rows of unit length; in half precision, rows and the inverses of their lengths."""
    dtype, _ = ARITHMETIC[sweep.dtype]
    generator = torch.Generator(device).manual_seed(sweep.n)
    (f,) = structured_rows(1, sweep.n, sweep.dim, device, torch.float32, generator)
    unit = dtype == torch.float32
    f = torch.nn.functional.normalize(f, dim=1) if unit else f.to(dtype)
    if sweep.nan:
        fill_with_nan(f[sweep.n // 3])
    return Rows(f, None if unit else 1 / f.float().norm(dim=1))


def comparable(sweep: Sweep, rows: int) -> Tensor:
    """Mark the rows to compare: the weight of a NaN row's partner with it may be 0 or NaN."""
    counted = torch.ones(rows, dtype=torch.bool)
    if sweep.nan and "without" in sweep.layout:
        counted[(sweep.n // 3 + sweep.n // 2) % sweep.n] = False
    return counted


def compute(backend: ModuleType, rows: Rows, sweep: Sweep, precision: str) -> tuple[Tensor, Tensor]:
    """Compute (anchors,) sums of exp(t/τ), and the (n, D) gradient Σ_j (g_ij + g_ji)·F_j."""
    wide = torch.promote_types(rows.f.dtype, torch.float32)
    split, partner, anchors = (share * sweep.n // 2 for share in LAYOUTS[sweep.layout])
    pairing = Pairing(split, partner, anchors)
    ones = torch.ones(anchors, dtype=wide, device=rows.f.device)
    tau = torch.tensor(TAU, dtype=wide, device=rows.f.device)
    function = PairFunction("exp", (), tau, (-1 / TAU, 1 / TAU))
    scalars = RowScalars(0 * ones)
    shift, sums = backend.row_sums(
        rows, pairing, function, scalars, (Term.SHIFT, Term.F), precision
    )
    scalars = scalars._replace(row_weight=ones / sweep.n, shift=0 * ones)
    df, _, _ = backend.pair_grad(
        rows, pairing, function, scalars, Weight.F, (), (0, sweep.n), precision
    )
    return sums.double() * shift.double().exp(), df
