"""``alphacl tune``: time the Triton kernels' tiles on this GPU and write a table of the fastest.

A tile takes part once its numbers agree with the default tile's. One that does not compile, needs
more than a block may have or gives other numbers is reported and left out. Candidates run in a
child process with a watchdog, so one that hangs or breaks the device costs its own row, and the
next goes on in a new process. The table is written again at every win, so a run that is cut short
keeps what it has found.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .functional import alpha_cl_loss
from .journal import Row, interrupting, replaced
from .kernels import config
from .kernels.config import Tile
from .subprocess_pool import Lane, Pool, Task

#: Largest relative difference from the numbers of the default tile.
AGREEMENT = 0.02
#: Seconds that a candidate may take, which includes its compilation.
LIMIT = 60.0
#: The columns that name a line of a table.
PLACE = ("sweep", "mode", "dim", "rows")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


# --- the candidates -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A tile of a sweep, to be timed at one size; ``rows`` counts both views' rows."""

    sweep: str
    mode: str
    dim: int
    rows: int
    tile: Tile

    @property
    def place(self) -> tuple[str, str, int, int]:
        """The line of a table that it may become."""
        return self.sweep, self.mode, self.dim, self.rows


def tiles(sweep: str, mode: str, dim: int, capability: tuple[int, int]) -> Iterator[Tile]:
    """Yield tiles that are worth a try, the most promising first."""
    features = config.power_of_two(dim)
    yield config.default(sweep, mode, dim, capability)
    narrow = mode in ("fp32", "fp64")
    sizes = (32, 64) if narrow else (64, 128)
    chunks = [features] if features <= (64 if narrow else 256) else []
    if sweep == "row_sums":
        chunks += [c for c in (32, 64, 128) if c < features]
    elif not chunks:
        chunks = [32, 64]  # weights are written, so rows need not fit
    forms = (True, False) if sweep == "row_sums" else (False,)
    choices = itertools.product(chunks, forms, sizes, sizes, (4, 8), (2, 3))
    for chunk, symmetric, rows, cols, warps, stages in choices:
        if not symmetric or rows == cols:
            yield Tile(rows, cols, chunk, warps, stages, symmetric=symmetric)


def candidates(
    sizes: Iterable[tuple[str, int, int]], capability: tuple[int, int]
) -> list[Candidate]:
    """List the candidates of each size (mode, features, rows) in the order in which they are timed.

    pair_grad comes first, because it takes more of the time of a step.
    """
    return [
        Candidate(sweep, mode, dim, rows, tile)
        for mode, dim, rows in sizes
        for sweep in ("pair_grad", "row_sums")
        for tile in dict.fromkeys(tiles(sweep, mode, dim, capability))
    ]


# --- in the child ---------------------------------------------------------------------------------


def step(candidate: Candidate, device: torch.device) -> Callable[[], Tensor]:
    """Build a loss, for pair_grad with its gradient, that uses the tile and returns the numbers."""
    mode, dim, gradient = candidate.mode, candidate.dim, candidate.sweep == "pair_grad"
    generator = torch.Generator(device).manual_seed(0)
    dtype = _DTYPES.get(mode, torch.float32)
    precision = {"fp32": "ieee", "tf32": "tf32", "bf16x3": "bf16x3"}.get(mode)
    z1, z2 = (
        torch.randn(candidate.rows // 2, dim, device=device, generator=generator)
        .to(dtype)
        .requires_grad_(gradient)
        for _ in range(2)
    )

    def run() -> Tensor:
        with config.forced(**{candidate.sweep: candidate.tile}):
            loss = alpha_cl_loss(z1, z2, backend="triton", precision=precision)
            if not gradient:
                return loss.detach().view(1)
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [z1, z2])])

    return run


@functools.lru_cache(maxsize=2)
def _expected(place: tuple[str, str, int, int], device: torch.device) -> Tensor:
    """Compute the numbers of the default tile that every device can run."""
    return step(Candidate(*place, config.default(*place[:3])), device)().double()


def time_tile(candidate: Candidate, device: str) -> Iterator[Row]:
    """Time one candidate, unless it does not run or gives other numbers than the default tile."""
    from triton.testing import do_bench

    here = torch.device(device)
    row = {"benchmark": "tune", **asdict(candidate)}
    run = step(candidate, here)
    expected = _expected(candidate.place, here)
    try:
        numbers = run().double()
    except Exception as error:
        # the pool synchronises after the row, and so finds an illegal address
        text = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
        yield {**row, "status": "left out", "error": text}
        return
    off = float((numbers - expected).norm() / expected.norm())
    if not off < AGREEMENT:
        yield {**row, "status": "left out", "error": f"off by {off:.1e}"}
        return
    took = do_bench(run, warmup=5, rep=40, return_mode="median")
    yield {**row, "status": "ok", "median_ms": float(took)}


# --- the table ------------------------------------------------------------------------------------


class Table:
    """The fastest tiles in a file; what it held of other sizes stays.

    Args:
        file: the table's file, which need not exist.
        attempt: carries out a write, as `journal.Journal.attempt` does.

    Attributes:
        entries: place → line of the table.
        best: place → milliseconds of the fastest tile of this run.
    """

    def __init__(self, file: Path, attempt: Callable[[str, Callable[[], object]], bool]) -> None:
        self.file, self.attempt = file, attempt
        self.entries = _entries(file)
        self.best: dict[tuple, float] = {}

    def follow(self, row: Row) -> bool:
        """Take note of a row; if it is a win, write the table and return True."""
        if (row["benchmark"], row["status"]) != ("tune", "ok"):
            return False
        place = tuple(row[name] for name in PLACE)
        if not row["median_ms"] < self.best.get(place, math.inf):
            return False
        self.best[place] = row["median_ms"]
        self.entries[place] = config.entry(*place, Tile(**row["tile"]))
        self.attempt(self.file.name, self.write)
        return True

    def write(self) -> None:
        """Write the table, all of it or nothing."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replaced(self.file) as partial:
            partial.write_text(json.dumps([*self.entries.values()], indent=1) + "\n")


def _entries(file: Path) -> dict[tuple, dict[str, Any]]:
    """Read the lines of a table by place, none where there is no file."""
    if not file.exists():
        return {}
    try:
        return {tuple(line[name] for name in PLACE): line for line in json.loads(file.read_text())}
    except (ValueError, TypeError, KeyError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} must be a table of tiles or absent, got {problem}") from error


# --- the command ----------------------------------------------------------------------------------


def told(row: Row) -> str:
    """Describe a candidate's row in one line."""
    where = f"{row['mode']} D={row['dim']} n={row['rows']} {row['sweep']}"
    tile = "×".join(str(x) for x in row["tile"].values() if x)
    if row["status"] == "ok":
        return f"{where}: {row['median_ms']:.3f} ms with {tile}"
    return f"{where}: {tile} is left out: {row['error']}"


def search(
    items: list[Candidate],
    device: str,
    table: Table,
    until: float,
    function: str = f"{__name__}:time_tile",
) -> int:
    """Time candidates in child processes and print what they find.

    Args:
        items: the candidates in their order.
        device: the GPU.
        table: it gets the fastest tiles.
        until: the end, a value of `time.monotonic`.
        function: times a candidate in the child, as `time_tile` does.

    Returns:
        How many candidates had no time.
    """

    def follow(row: Row) -> None:
        if table.follow(row) or row["status"] != "ok":
            print(told(row), flush=True)

    task = Task(function, tuple(items), {"device": device}, {"benchmark": "tune"}, LIMIT, 0, 0)
    with contextlib.closing(Pool(os.devnull, preload=__name__)) as pool:
        left = pool.run([Lane(deque([task]))], until, follow)
    return sum(len(task.items) for task, _ in left)


def run(given: argparse.Namespace, fail: Callable[[str], Any]) -> int:
    """Run the command with parsed flags; ``fail`` ends it with a message.

    Returns:
        The exit status: 0 if a tile was timed, 1 if none was, 130 or 143 after SIGINT or SIGTERM.
    """
    if unknown := set(given.modes) - set(config.MODES):
        fail(f"--modes must be of {', '.join(config.MODES)}, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        fail("tune needs a CUDA device, got none")
    name = config.device_name(torch.device("cuda", torch.cuda.current_device()))
    out = given.out or config.FOLDER / f"{name}.json"

    def attempt(what: str, write: Callable[[], object]) -> bool:
        try:
            write()
        except OSError as error:
            fail(f"cannot write to {out}: {error.strerror}")
        return True

    try:
        table = Table(out, attempt)
    except (ValueError, OSError) as error:
        fail(str(error))
    sizes = itertools.product(given.modes, given.dims, given.rows)
    items = candidates(sizes, torch.cuda.get_device_capability())
    try:
        with interrupting():
            left = search(items, "cuda", table, time.monotonic() + 60 * given.minutes)
    except KeyboardInterrupt as signal:
        print(f"alphacl: interrupted, {len(table.best)} new entries in {out}", file=sys.stderr)
        return 128 + signal.args[0]
    if left:
        print(f"{left} of {len(items)} candidates were not timed: the time was up")
    print(f"{len(table.best)} new entries of {len(table.entries)} in {out}")
    return 0 if table.best else 1
