"""How a sweep is tiled: tuned tables by device, conservative defaults otherwise.

A table is `tuned/<device>.json`, written by ``alphacl tune``: a list of entries
``{"sweep", "mode", "dim", "rows", "tile": {…}}``. Among the entries of its sweep, its arithmetic
and its power of two of features a call takes the one nearest in log(rows). The environment
variable ALPHACL_TUNED names another table.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import launches

#: Arithmetic of a sweep: the input's dtype, and for float32 the precision of its products.
MODES = ("bf16", "fp16", "tf32", "bf16x3", "fp32", "fp64")
FOLDER = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Tile:
    """Shape of a program's tile and the compiler's options.

    Attributes:
        rows: BLOCK_M.
        cols: BLOCK_N.
        features: BLOCK_D. Longer rows are multiplied in chunks of so many features, and cuBLAS
            computes their gradient.
        warps: `num_warps` of Triton.
        stages: `num_stages` of Triton.
        symmetric: `row_sums` reads each similarity once (docs/design.md); needs rows = cols.
        max_registers: per thread; None leaves it to the compiler.
        resident: programs that a multiprocessor runs at a time.
    """

    rows: int
    cols: int
    features: int
    warps: int
    stages: int
    symmetric: bool = False
    max_registers: int | None = None
    resident: int = 2

    def __post_init__(self) -> None:
        if self.symmetric and self.rows != self.cols:
            raise ValueError(
                f"cols must equal rows ({self.rows}) for symmetric tiles, got {self.cols}"
            )


def power_of_two(x: int, least: int = 16) -> int:
    """The smallest power of two that is at least x and ``least``."""
    return max(least, 1 << (x - 1).bit_length())


#: Tiles of long rows for sm_120 alone, where the others would spill at 128 registers.
_ON_SM_120 = {
    ("row_sums", "tf32"): Tile(64, 64, 32, 8, 2),
    ("pair_grad", "bf16"): Tile(64, 64, 64, 8, 3, max_registers=232, resident=1),
}


def default(sweep: str, mode: str, dim: int, capability: tuple[int, int] = (8, 0)) -> Tile:
    """A tile that compiles without spills (tools/triton_resources.py).

    ``sweep`` is row_sums or pair_grad for one exponential a pair, row_sums_moments if that has
    several sums, else row_sums_plain or pair_grad_plain, which take more registers (several values
    of a pair, each with row scalars). A pair_grad that compares ids ends with _ids.
    """
    features, plain = power_of_two(dim), "_plain" in sweep
    kind = "row_sums" if sweep.startswith("row_sums") else "pair_grad"
    long = features > (128 if plain or kind == "row_sums" else 256)
    if capability[0] == 12 and long and (kind, mode) in _ON_SM_120:
        return _ON_SM_120[kind, mode]
    if mode == "bf16" and capability[0] == 9:
        return _on_hopper(sweep, features)
    if mode == "fp64":
        return Tile(32, 32, min(features, 32), 4, 1)
    if kind == "row_sums":
        if mode != "bf16":
            return Tile(64, 64, min(features, 32), 8, 3)
        if long:  # up to 512 features three stages would spill on sm_120
            return Tile(64, 128, 64, 4, 2 if features <= 512 else 3)
        return Tile(64, 64, features, 8, 2) if plain else Tile(64, 128, features, 4, 2)
    if mode == "bf16":
        if long:
            return Tile(64, 64, 64, 8, 3, resident=1)
        # one program per SM in any case; ptxas alone spills at 128 registers on sm_100
        if features > 128:
            return Tile(64, 64, features, 8, 2, max_registers=232, resident=1)
        return Tile(64, 64, features, 8 if plain else 4, 2)
    if features > (64 if mode in ("fp32", "bf16x3") or plain else 128):
        return Tile(64, 32, 32, 8, 2)
    return Tile(32, 32, features, 4, 1) if mode == "fp32" else Tile(64, 32, features, 8, 2)


def _on_hopper(sweep: str, features: int) -> Tile:
    """bfloat16 tiles for wgmma, of 128 rows: they read half as much from L2 as tiles of 64 do.

    Symmetric tiles of several sums would spill, and wgmma would be serialised where ids are
    compared at 128 features.
    """
    plain = "_plain" in sweep
    if sweep.startswith("row_sums"):
        held, stages = (features, 2) if 64 < features <= 256 else (min(features, 64), 3)
        return Tile(128, 128, held, 8, stages, symmetric=sweep == "row_sums", resident=1)
    if features > 256 or (plain and features > 128):
        return Tile(128, 64 if plain else 128, 64, 8, 3, resident=1)
    if features == 128 and sweep.endswith("_ids"):
        return Tile(64, 64, features, 4, 2)
    return Tile(128, 64 if plain or features > 64 else 128, features, 8, 2, resident=1)


def choose(
    sweep: str, mode: str, dim: int, rows: int, device: torch.device, capability: tuple[int, int]
) -> Tile:
    """The tile of a call: the nearest tuned entry in log(rows) for its features, or the default."""
    without_ids = sweep.removesuffix("_ids")
    if (forced := _forced.get(without_ids.removesuffix("_moments"))) is not None:
        return forced
    tuned = (
        e for e in table(device_name(device))
        if (e["sweep"], e["mode"], power_of_two(e["dim"])) == (without_ids, mode, power_of_two(dim))
    )  # fmt: skip
    nearest = min(tuned, key=lambda e: abs(math.log2(e["rows"] / rows)), default=None)
    return default(sweep, mode, dim, capability) if nearest is None else Tile(**nearest["tile"])


_forced: dict[str, Tile] = {}


@contextlib.contextmanager
def forced(**tiles: Tile) -> Iterator[None]:
    """Within the context, sweeps named by keyword (row_sums, pair_grad) use these tiles."""
    before = dict(_forced)
    _forced.update(tiles)
    launches.forget()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        launches.forget()


@functools.cache
def device_name(device: torch.device) -> str:
    """File name of a device's table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_").lower()


@functools.cache
def table(device: str) -> tuple[dict, ...]:
    """The tuned entries of a device, none where it has no table."""
    override = os.environ.get("ALPHACL_TUNED")
    path = Path(override) if override else FOLDER / f"{device}.json"
    if not path.exists():
        if override:
            raise FileNotFoundError(f"ALPHACL_TUNED must name a table of tiles, got {override}")
        return ()
    return tuple(json.loads(path.read_text()))


def entry(sweep: str, mode: str, dim: int, rows: int, tile: Tile) -> dict:
    """A line of a table."""
    return {"sweep": sweep, "mode": mode, "dim": dim, "rows": rows, "tile": asdict(tile)}
