"""Times tiles of both sweeps on this GPU and writes a table of the fastest: ``python -m alphacl_fast.kernels.tune``.

Every candidate must first give the default tile's numbers. What does not compile, needs more than a block may have or comes
out wrong is left out, and said. The table is kept up to date on disk, so that an interrupted run leaves what it has found.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from alphacl_fast.functional import alpha_cl_loss

from . import config
from .config import Tile

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def candidates(sweep: str, mode: str, dim: int) -> Iterator[Tile]:
    """Tiles worth a try, the most promising first."""
    features = config.power_of_two(dim)
    yield config.default(sweep, mode, dim)
    narrow = mode in ("fp32", "fp64")
    sizes = (32, 64) if narrow else (64, 128)
    chunks = [features] if features <= (64 if narrow else 256) else []
    if sweep == "row_sums":
        chunks += [c for c in (32, 64, 128) if c < features]
    elif not chunks:
        chunks = [32, 64]  # weights are written, so rows need not fit
    forms = (True, False) if sweep == "row_sums" else (False,)
    for chunk, both, rows, cols, warps, stages in itertools.product(chunks, forms, sizes, sizes, (4, 8), (2, 3)):
        if not both or rows == cols:
            yield Tile(rows, cols, chunk, warps, stages, both_sides=both)


def measure(tiles: dict[str, Tile], mode: str, dim: int, rows: int, gradient: bool) -> tuple[float, torch.Tensor]:
    """Median milliseconds of a loss (with its gradient), and the numbers it gave."""
    from triton.testing import do_bench

    generator = torch.Generator("cuda").manual_seed(0)
    dtype = _DTYPES.get(mode, torch.float32)
    precision = {"fp32": "ieee", "tf32": "tf32", "bf16x3": "bf16x3"}.get(mode)
    z1, z2 = (torch.randn(rows // 2, dim, device="cuda", generator=generator).to(dtype) for _ in range(2))
    if gradient:
        z1, z2 = z1.requires_grad_(), z2.requires_grad_()

    def run() -> torch.Tensor:
        with config.forced(**tiles):
            loss = alpha_cl_loss(z1, z2, backend="triton", precision=precision)
            if not gradient:
                return loss.detach().view(1)
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [z1, z2])])

    result = run()
    torch.cuda.synchronize()
    return float(do_bench(run, warmup=10, rep=60, return_mode="median")), result


def tune(mode: str, dim: int, rows: int, deadline: float, say=print) -> list[dict]:
    """Entries for both sweeps at one size; none for a sweep whose time had not come by the deadline (`time.monotonic`)."""
    entries, chosen = [], {}
    for sweep in ("row_sums", "pair_grad"):
        best, truth = None, None
        for tile in dict.fromkeys(candidates(sweep, mode, dim)):
            if time.monotonic() > deadline:
                say(f"{mode} D={dim} n={rows} {sweep}: out of time")
                break
            try:
                took, numbers = measure({**chosen, sweep: tile}, mode, dim, rows, sweep == "pair_grad")
            except Exception as error:  # a candidate that this device cannot run
                say(f"{mode} D={dim} n={rows} {sweep} {tile}: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
                continue
            truth = numbers if truth is None else truth
            error = float((numbers.double() - truth.double()).norm() / truth.double().norm())
            if not error < 0.02:
                say(f"{mode} D={dim} n={rows} {sweep} {tile}: off by {error:.1e}, left out")
                continue
            if best is None or took < best[0]:
                best = took, tile
                say(f"{mode} D={dim} n={rows} {sweep}: {took:.3f} ms with {tile}")
        if best is not None:
            chosen[sweep] = best[1]
            entries.append(config.entry(sweep, mode, dim, rows, best[1]))
    return entries


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m alphacl_fast.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--modes", default="bf16,tf32,fp32", type=lambda text: text.split(","), help=", ".join(config.MODES))
    parser.add_argument("--dims", default="128,512,256,64", type=lambda text: [int(x) for x in text.split(",")])
    parser.add_argument("--rows", default="65536,16384,1024", type=lambda text: [int(x) for x in text.split(",")], help="2N")
    parser.add_argument("--minutes", default=10.0, type=float, help="stop after so many")
    parser.add_argument("--out", type=Path, help="default: this device's table in the package")
    args = parser.parse_args(arguments)
    if unknown := set(args.modes) - set(config.MODES):
        parser.error(f"--modes must be of {', '.join(config.MODES)}, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        parser.error("a CUDA device must be there to be tuned for, got none")
    name = config.device_name(torch.device("cuda", torch.cuda.current_device()))
    out = args.out or config.FOLDER / f"{name}.json"
    kept = json.loads(out.read_text()) if out.exists() else []
    deadline = time.monotonic() + 60 * args.minutes
    for mode, dim, rows in itertools.product(args.modes, args.dims, args.rows):
        for entry in tune(mode, dim, rows, deadline, lambda text: print(text, flush=True)):
            same = ("sweep", "mode", "dim", "rows")
            kept = [e for e in kept if any(e[k] != entry[k] for k in same)] + [entry]
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{len(kept)} entries in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
