"""Times tiles and keeps the fastest: pair_grad first, whose share of the time is larger.

Candidates are compiled ahead on the CPUs while one process times them in turn. The table is written
again at every win, so a run that is cut short keeps what it has found.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from alphacl_fast import tune
from alphacl_fast.journal import Row, replaced
from alphacl_fast.kernels import config
from alphacl_fast.kernels.config import Tile

#: (arithmetic, features, rows) in the order of their worth.
SIZES = (
    ("bf16", 128, 65536), ("bf16", 512, 32768), ("bf16", 128, 16384), ("bf16", 256, 32768),
    ("bf16", 64, 32768), ("tf32", 128, 16384), ("bf16", 1024, 32768), ("bf16", 128, 1024),
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A tile of a sweep, to be timed at one size."""

    sweep: str
    mode: str
    dim: int
    rows: int
    tile: Tile

    @property
    def place(self) -> tuple[str, str, int, int]:
        """The line of a table that it may become."""
        return self.sweep, self.mode, self.dim, self.rows


def candidates() -> list[Candidate]:
    """All candidates in the order in which they are timed."""
    return [
        Candidate(sweep, mode, dim, rows, tile)
        for mode, dim, rows in SIZES
        for sweep in ("pair_grad", "row_sums")
        for tile in dict.fromkeys(tune.candidates(sweep, mode, dim))
    ]


def step(candidate: Candidate, device: torch.device) -> Callable[[], Tensor]:
    """A loss, for pair_grad with its gradient, that uses the tile; returns the numbers."""
    tiles = {candidate.sweep: candidate.tile}
    size = candidate.mode, candidate.dim, candidate.rows
    return tune.step(tiles, *size, candidate.sweep == "pair_grad", device)


@functools.lru_cache(maxsize=2)
def _expected(place: tuple[str, str, int, int], device: torch.device) -> Tensor:
    candidate = Candidate(*place, config.default(*place[:3]))
    return step(candidate, device)().double()


def time_tile(candidate: Candidate, device: str) -> Iterator[Row]:
    """Time one candidate; one that does not run or gives other numbers is left out."""
    from triton.testing import do_bench

    here = torch.device(device)
    row = {"benchmark": "tune", **asdict(candidate)}
    run = step(candidate, here)
    expected = _expected(candidate.place, here)
    try:
        numbers = run().double()
    except Exception as error:
        # An illegal address comes out of the next synchronisation, which the pool makes.
        text = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
        yield {**row, "status": "left out", "error": text}
        return
    off = float((numbers - expected).norm() / expected.norm())
    if not off < tune.AGREEMENT:
        yield {**row, "status": "left out", "error": f"off by {off:.1e}"}
        return
    took = do_bench(run, warmup=5, rep=40, return_mode="median")
    yield {**row, "status": "ok", "median_ms": float(took)}


class Table:
    """The fastest tiles so far, in a file."""

    def __init__(self, file: Path, attempt: Callable[[str, Callable[[], object]], bool]) -> None:
        self.file, self.attempt = file, attempt
        self.best: dict[tuple[str, str, int, int], tuple[float, Tile]] = {}

    def follow(self, row: Row) -> None:
        """Take note of a row; write the table if it is a win."""
        if row["benchmark"] != "tune" or row["status"] != "ok":
            return
        place = row["sweep"], row["mode"], row["dim"], row["rows"]
        if place not in self.best or row["median_ms"] < self.best[place][0]:
            self.best[place] = row["median_ms"], Tile(**row["tile"])
            self.attempt(self.file.name, self.write)

    def write(self) -> None:
        """Write the table, all of it or nothing."""
        entries = [config.entry(*place, tile) for place, (_, tile) in self.best.items()]
        with replaced(self.file) as partial:
            partial.write_text(json.dumps(entries, indent=1) + "\n")
