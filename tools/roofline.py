"""Predict times of the GPU kernels from counts and rates; only some of the rates are measured.

``python -m tools.roofline`` prints the tables of docs/roofline.md, and ``--write FILE`` renews them
there, between the marks; ``--device`` and ``--set gemm=6e14`` change the machine. The work is one
step of two_view InfoNCE, loss and gradient, in bfloat16 where no dtype is named.

If everything overlaps, a kernel takes the time of its busiest resource ("bound"). Products,
pointwise work and shuffles of a tile depend on each other: a program that does one after the other
takes their sum ("in order"), and one that works on two tiles at a time lies between ("overlapped").
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from alphacl_fast.backend import filling
from alphacl_fast.benchmarks.report import filled, markdown

SIZES = (1024, 4096, 16384, 65536, 262144, 1048576)
DIMS = (64, 96, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Device:
    """Rates per second of all multiprocessors (SM); docs/roofline.md gives their sources."""

    name: str
    sms: int
    clock: float  # Hz
    gemm: float  # FLOP/s of a large bf16 product
    hbm: float  # bytes/s
    l2: float  # bytes/s
    l2_bytes: float
    exp_per_clock: int = 16  # an SM's
    issue_per_clock: int = 128
    shuffle_per_clock: int = 32
    shared_per_clock: int = 128  # bytes
    gap: float = 2e-6  # s from a small kernel to the next

    def rates(self) -> dict[str, float]:
        """What each resource of `Work` does in a second."""
        clocks = self.sms * self.clock
        return {
            "tensor": self.gemm, "exp": clocks * self.exp_per_clock,
            "issue": clocks * self.issue_per_clock, "shuffle": clocks * self.shuffle_per_clock,
            "shared": clocks * self.shared_per_clock, "L2": self.l2, "HBM": self.hbm,
        }  # fmt: skip


DEVICES = {
    "H200": Device("H200", 132, 1.98e9, 788e12, 4.3e12, 5.5e12, 50e6),
    "H100": Device("H100", 132, 1.98e9, 798e12, 3.0e12, 5.5e12, 40e6),
}
#: Launches of an InfoNCE step with its backward pass that is not captured in a CUDA graph, as
#: tests/test_triton.py counts them.
LAUNCHES = 12
#: Share of the shorter resources' time that the overlapped kernels hide.
OVERLAP = 0.7
#: Features for which csrc/cuda/hopper.h has kernels, which overlap.
HOPPER_DIMS = (64, 128, 256)
#: Instructions per pair of a sweep's inner loop at D = 128, counted in the machine code (SASS) of
#: triton 3.6.0 and nvcc 13.0. tests/test_ptx_sass.py checks the counts of hopper.h. "hopper
#: float16" and "hopper tf32" are the same kernels for these dtypes. The gradient of TF32 rows
#: includes each pair's share of transposing a tile.
ISSUE = {
    ("hopper", "sums"): 5.6, ("hopper", "gradient"): 7.6, ("triton", "sums"): 9.5,
    ("triton", "gradient"): 12.3, ("triton", "sums of both sides"): 15.7,
    ("hopper", "sums of both sides"): 8.4, ("hopper float16", "sums"): 5.6,
    ("hopper float16", "gradient"): 9.6, ("hopper float16", "sums of both sides"): 8.4,
    ("hopper tf32", "sums"): 6.4, ("hopper tf32", "gradient"): 14.9,
    ("hopper tf32", "sums of both sides"): 9.5,
}  # fmt: skip
#: Warps, and shuffles of a thread for the columns of a 128 × 128 tile: three steps in each of which
#: a thread sends a quarter of the columns, or recursive halving.
BOTH_SIDES = {
    "triton": (4, 96),
    **dict.fromkeys(("hopper", "hopper float16", "hopper tf32"), (8, 28)),
}
#: Bytes of the longest rows that a block of hopper.h keeps in registers, as an operand of the first
#: sweep. The second sweep of TF32 rows always does.
IN_REGISTERS = 256
#: The most programs that share a row block.
MOST_PARTS = 32
#: Bytes of rows that stay in shared memory beside the ring of column tiles.
RESIDENT = 128 * 1024


@dataclass(frozen=True)
class Arithmetic:
    """How rows are multiplied."""

    item: int = 2  # bytes of a feature
    gemm: float = 1.0  # rate of a large product relative to one of bfloat16
    roundings: int = 0  # launches that round the rows, one for each sweep


#: TF32 has half of bfloat16's rate (datasheet), in cuBLAS as in wgmma.
ARITHMETICS = {
    "bfloat16": Arithmetic(),
    "float16": Arithmetic(),
    "tf32": Arithmetic(4, 0.5, 2),
}


@dataclass(frozen=True)
class Tile:
    rows: int
    cols: int


@dataclass(frozen=True)
class Work:
    """What a kernel asks of each resource, and the share of the SMs' time that it fills."""

    flop: float = 0
    exp: float = 0
    issue: float = 0  # instructions × lanes
    shuffle: float = 0  # likewise
    shared: float = 0  # bytes
    l2: float = 0
    hbm: float = 0
    fill: float = 1

    def seconds(self, device: Device) -> dict[str, float]:
        """Of each resource alone; those of an SM stand still where no program runs."""
        *amounts, fill = astuple(self)
        return {
            name: amount / rate / (1 if name in ("L2", "HBM") else fill)
            for (name, rate), amount in zip(device.rates().items(), amounts, strict=True)
        }

    def time(self, device: Device, overlap: float) -> float:
        """Seconds where a share of what can be hidden is hidden: 1 is the bound, 0 in order."""
        t = self.seconds(device)
        dependent = (t["tensor"], max(t["exp"], t["issue"]), t["shuffle"])
        return max(*t.values(), overlap * max(dependent) + (1 - overlap) * sum(dependent))


# --- counts ---------------------------------------------------------------------------------------


def tile_count(n: int, tile: Tile, both: bool) -> int:
    """Count the tiles of a sweep over n² pairs: the square, or (both sides) a triangle."""
    blocks = math.ceil(n / tile.rows)
    return blocks * (blocks + 1) // 2 if both else blocks * math.ceil(n / tile.cols)


def parts(n: int, tile: Tile, both: bool, device: Device) -> tuple[int, float]:
    """Choose how many programs share a row block, and the share of the SMs' time they fill."""
    blocks = math.ceil(n / tile.rows)
    ring = blocks // 2 + 1 if both else math.ceil(n / tile.cols)
    count = filling.splits_of(blocks, ring, device.sms, MOST_PARTS)
    return count, filling.fill(blocks, ring, count, device.sms)


def sweep(
    n: int,
    dim: int,
    tile: Tile,
    gradient: bool,
    both: bool,
    device: Device,
    engine: str = "triton",
    product: bool = True,
    item: int = 2,
) -> Work:
    """One sweep of rows whose features have ``item`` bytes; the sums alone have a both-sides form.

    Without ``product`` a gradient sweep writes W in bfloat16 instead of multiplying it.
    """
    # features of a tile in shared memory and products; zeros beyond dim
    held = 1 << (dim - 1).bit_length()
    tiles, (count, fill), blocks = (
        tile_count(n, tile, both),
        parts(n, tile, both, device),
        math.ceil(n / tile.rows),
    )
    # a warpgroup multiplies 64 rows at a time
    area, groups = tile.rows * tile.cols, math.ceil(tile.rows / 64)
    own_bytes, cols_bytes = item * tile.rows * held, item * tile.cols * held
    stays = own_bytes <= RESIDENT
    transposes = engine == "hopper tf32" and gradient
    in_registers = engine.startswith("hopper") and not gradient and item * held <= IN_REGISTERS
    in_registers = in_registers or transposes
    products, shuffle = 1, 0.0
    shared = cols_bytes + (not stays) * own_bytes  # tiles that arrive
    shared += 2 * transposes * cols_bytes  # read and written
    # operands of S; each warpgroup reads the columns
    shared += (not in_registers) * own_bytes + groups * cols_bytes
    slots, width = count, dim if gradient else 1
    if gradient and product:
        products += 1
        shared += groups * cols_bytes
    elif both:
        warps, shuffles = BOTH_SIDES[engine]
        shuffle = tiles * 32 * warps * shuffles
        slots += blocks // 2
    # parts are read and added
    written = 2 * n * n if not product else 4 * n * width * (1 if slots == 1 else 2 * slots + 1)
    # rings in step with each other read a row from memory once
    waves = math.ceil(blocks * count / device.sms)
    return Work(
        flop=tiles * products * 2 * area * held,
        exp=tiles * area,
        issue=tiles
        * area
        * ISSUE[engine, ("gradient" if gradient else "sums") + " of both sides" * both],
        shuffle=shuffle,
        shared=tiles * shared,
        l2=tiles * item * dim * (tile.cols + (not stays) * tile.rows),
        hbm=item * n * dim * (waves if item * n * dim > device.l2_bytes else 1) + written,
        fill=fill,
    )


def vendor_product(n: int, dim: int) -> Work:
    """dF = W·F with W from memory."""
    return Work(flop=2 * n * n * dim, hbm=2 * n * n + 6 * n * dim)


def row_kernels(n: int, dim: int, item: int = 2, roundings: int = 0) -> dict[str, Work]:
    kernels = {
        "unit_rows": Work(hbm=2 * item * n * dim),
        "finish_rows": Work(hbm=(item + 8) * n * dim),
    }
    if roundings:
        kernels["rounded_rows"] = Work(hbm=roundings * 2 * item * n * dim)
    return kernels


# --- kernels of a step ----------------------------------------------------------------------------


def forms(
    n: int, dim: int, device: Device, engine: str
) -> tuple[dict[str, list[Work]], dict[str, list[Work]]]:
    """List both sweeps in every form that fits; ``engine`` has the row-block forms."""
    square, item = Tile(128, 128), 4 if engine == "hopper tf32" else 2
    sums = {
        "row-block": [sweep(n, dim, square, False, False, device, engine, item=item)],
        "symmetric": [sweep(n, dim, square, False, True, device, engine, item=item)],
    }
    gradient = {}
    if item * dim <= 512:
        own = square if item * dim <= 256 else Tile(128, 64)
        gradient["row-block"] = [sweep(n, dim, own, True, False, device, engine, item=item)]
    if dim >= 256:
        gradient["W in memory"] = [
            sweep(n, dim, square, True, False, device, product=False),
            vendor_product(n, dim),
        ]
    return sums, gradient


class Step(NamedTuple):
    """A predicted step.

    Attributes:
        time: seconds.
        fraction: fraction of the product's rate on 4n²D.
        sums: form of the first sweep, and the resource that limits its slowest kernel.
        gradient: the same of the second sweep.
    """

    time: float
    fraction: float
    sums: str
    gradient: str


def step(n: int, dim: int, device: Device, overlap: float, dtype: str = "bfloat16") -> Step:
    """Choose the fastest forms for n rows of ``dim`` features.

    With ``overlap`` 0 (in order) the kernels are Triton's, except for TF32: only the kernels of
    hopper.h have been counted in it.
    """
    arithmetic = ARITHMETICS[dtype]
    device = replace(device, gemm=device.gemm * arithmetic.gemm)
    total, chosen = (LAUNCHES + arithmetic.roundings) * device.gap, []
    engine = "hopper" if overlap and dim in HOPPER_DIMS else "triton"
    if dtype != "bfloat16":
        engine = "hopper tf32" if dtype == "tf32" else engine.replace("hopper", "hopper float16")
    rows = list(row_kernels(n, dim, arithmetic.item, arithmetic.roundings).values())
    for choices in (*forms(n, dim, device, engine), {"rows": rows}):
        times = {name: [w.time(device, overlap) for w in works] for name, works in choices.items()}
        name = min(times, key=lambda name: sum(times[name]))
        total += sum(times[name])
        slowest = choices[name][times[name].index(max(times[name]))].seconds(device)
        chosen.append(f"{name} ({max(slowest, key=slowest.__getitem__)})")
    return Step(total, 4 * n * n * dim / total / device.gemm, *chosen[:2])


# --- tables ---------------------------------------------------------------------------------------

#: Names of the degrees of overlap.
LEVELS = {"bound": 1, "overlapped": OVERLAP, "in order": 0}
TARGETS = ((65536, 128, 0.60), (16384, 128, 0.50), (16384, 512, 0.60), (65536, 512, 0.60))
#: Dtypes and features of the table of the other dtypes.
OTHERS = (("float16", 64), ("float16", 128), ("float16", 256), ("tf32", 64), ("tf32", 128))


def _duration(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}" if ms else "–"


def _amount(x: float) -> str:
    power = int(math.log10(x or 1) // 3)
    return f"{x / 1000**power:.3g} {' kMGTP'[power]}" if x else "–"


def kernel_tables(n: int, dim: int, device: Device) -> list[str]:
    """What each kernel asks of each resource, and how long that alone would take."""
    kernels = {}
    for engine in ("triton", "hopper") if dim in HOPPER_DIMS else ("triton",):
        for sweep_name, works in zip(
            ("sums", "gradient"), forms(n, dim, device, engine), strict=True
        ):
            for form, (work, *_) in works.items():
                kernels[f"{sweep_name}, {form}, {engine}"] = work
    kernels |= row_kernels(n, dim)
    amounts, times = [], []
    for name, work in kernels.items():
        *asked, fill = astuple(work)
        amounts.append([name, *map(_amount, asked), f"{fill:.2f}"])
        levels = [work.time(device, overlap) for overlap in LEVELS.values()]
        times.append([name, *map(_duration, (*work.seconds(device).values(), *levels))])
    columns = "FLOP", "exp", "instructions × lanes", "shuffles", "shared B", "L2 B", "HBM B"
    return [
        f"Amounts, n = {n:,}, D = {dim}:",
        "",
        *markdown(["kernel", *columns, "SMs filled"], amounts),
        "",
        "Milliseconds of each resource alone, and of the kernel (predictions):",
        "",
        *markdown(["kernel", *device.rates(), *LEVELS], times),
    ]


def tables(device: Device) -> str:
    def steps(n: int, dim: int) -> list[Step]:
        return [step(n, dim, device, overlap) for overlap in LEVELS.values()]

    targets, every = [], []
    for n, dim, target in TARGETS:
        fractions = [s.fraction for s in steps(n, dim)]
        verdicts = ["yes" if fraction >= target else "no" for fraction in fractions[:0:-1]]
        shown = [f"{fraction:.2f}" for fraction in (target, *fractions)]
        targets.append([f"{n:,}", dim, *shown, *verdicts])
    for dim, n in itertools.product(DIMS, SIZES):
        found = steps(n, dim)
        fractions = [f"{s.fraction:.2f}" for s in found]
        times = [_duration(s.time) for s in found]
        every.append([dim, f"{n:,}", found[1].sums, found[1].gradient, *times, *fractions])
    reached = "reached in order", "reached overlapped"
    lines = [
        "Against the project's targets (predictions):",
        "",
        *markdown(["n", "D", "target", *LEVELS, *reached], targets),
        "",
        "Step times in ms and fractions of the product's rate on 4n²D, "
        f"{device.name} (predictions):",
        "",
        *markdown(
            [
                "D",
                "n",
                "sums (limit)",
                "gradient (limit)",
                *LEVELS,
                *(f"fraction, {x}" for x in LEVELS),
            ],
            every,
        ),
    ]
    others = []
    for dtype, dim in OTHERS:
        found = [step(65536, dim, device, overlap, dtype) for overlap in LEVELS.values()]
        times = [_duration(s.time) for s in found]
        fractions = [f"{s.fraction:.2f}" for s in found]
        others.append([dtype, dim, found[1].sums, found[1].gradient, *times, *fractions])
    lines += [
        "",
        "Other dtypes at n = 65,536, with fractions of their own product's rate (predictions):",
        "",
        *markdown(
            [
                "dtype",
                "D",
                "sums (limit)",
                "gradient (limit)",
                *LEVELS,
                *(f"fraction, {x}" for x in LEVELS),
            ],
            others,
        ),
    ]
    for dim in (128, 512):
        lines += ["", *kernel_tables(65536, dim, device)]
    return "\n".join(lines) + "\n"


MARKS = "<!-- tables: python -m tools.roofline -->", "<!-- end of tables -->"


def renewed(page: str, device: Device) -> str:
    """A page with the tables between its marks written anew; ValueError if there are none."""
    return filled(page, [tables(device)], *MARKS)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.roofline", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", choices=sorted(DEVICES), default="H200")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a number of the device"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="page whose tables are renewed")
    args = parser.parse_args(argv)
    device = DEVICES[args.device]
    numbers = {field: type(known) for field, known in vars(device).items() if field != "name"}
    for change in args.set:
        name, _, value = change.partition("=")
        if name not in numbers:
            parser.error(f"--set must name one of {', '.join(numbers)}, got {name!r}")
        device = replace(device, **{name: numbers[name](float(value))})
    if args.write is None:
        print(tables(device))
    else:
        args.write.write_text(renewed(args.write.read_text(), device))


if __name__ == "__main__":
    main()
