"""``alphacl tune``: time the Triton kernels' tiles on this GPU and write a table of the fastest.

A candidate takes part once its numbers agree with the default tile's. One that does not compile,
needs more than a block may have or gives other numbers is reported and left out. The table is
rewritten after every size, so an interrupted run keeps its results.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .functional import alpha_cl_loss
from .kernels import config
from .kernels.config import Tile

#: Largest relative difference from the numbers of the default tile.
AGREEMENT = 0.02
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
    choices = itertools.product(chunks, forms, sizes, sizes, (4, 8), (2, 3))
    for chunk, symmetric, rows, cols, warps, stages in choices:
        if not symmetric or rows == cols:
            yield Tile(rows, cols, chunk, warps, stages, symmetric=symmetric)


def step(
    tiles: dict[str, Tile], mode: str, dim: int, rows: int, gradient: bool, device: torch.device
) -> Callable[[], torch.Tensor]:
    """A loss (with its gradient) that uses the tiles; returns the numbers."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = _DTYPES.get(mode, torch.float32)
    precision = {"fp32": "ieee", "tf32": "tf32", "bf16x3": "bf16x3"}.get(mode)
    z1, z2 = (
        torch.randn(rows // 2, dim, device=device, generator=generator)
        .to(dtype)
        .requires_grad_(gradient)
        for _ in range(2)
    )

    def run() -> torch.Tensor:
        with config.forced(**tiles):
            loss = alpha_cl_loss(z1, z2, backend="triton", precision=precision)
            if not gradient:
                return loss.detach().view(1)
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [z1, z2])])

    return run


def measure(
    tiles: dict[str, Tile], mode: str, dim: int, rows: int, gradient: bool
) -> tuple[float, torch.Tensor]:
    """Median milliseconds of a `step` on the GPU, and the numbers it gave."""
    from triton.testing import do_bench

    run = step(tiles, mode, dim, rows, gradient, torch.device("cuda"))
    result = run()
    torch.cuda.synchronize()
    return float(do_bench(run, warmup=10, rep=60, return_mode="median")), result


def tune(mode: str, dim: int, rows: int, deadline: float, say=print) -> list[dict]:
    """Table entries of both sweeps at one size, as far as there is time for them.

    ``deadline`` is a value of `time.monotonic`.
    """
    entries, chosen = [], {}
    for sweep in ("row_sums", "pair_grad"):
        best, truth, here = None, None, f"{mode} D={dim} n={rows} {sweep}"
        for tile in dict.fromkeys(candidates(sweep, mode, dim)):
            if time.monotonic() > deadline:
                say(f"{here}: out of time")
                break
            tiles = {**chosen, sweep: tile}
            try:
                took, numbers = measure(tiles, mode, dim, rows, sweep == "pair_grad")
            except Exception as error:  # a candidate that this device cannot run
                reason = str(error).partition("\n")[0][:80]
                say(f"{here} {tile}: {type(error).__name__}: {reason}")
                continue
            truth = numbers if truth is None else truth
            error = float((numbers.double() - truth.double()).norm() / truth.double().norm())
            if not error < AGREEMENT:
                say(f"{here} {tile}: off by {error:.1e}, left out")
                continue
            if best is None or took < best[0]:
                best = took, tile
                say(f"{here}: {took:.3f} ms with {tile}")
        if best is not None:
            chosen[sweep] = best[1]
            entries.append(config.entry(sweep, mode, dim, rows, best[1]))
    return entries


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``alphacl tune``; commas separate the values of a list."""
    for name, kind, default, text in (
        ("--modes", str, "bf16,tf32,fp32", f"of {', '.join(config.MODES)}"),
        ("--dims", int, "128,512,256,64", "feature dimensions"),
        ("--rows", int, "65536,16384,1024", "rows 2N"),
    ):
        text += f" (default: {default})"
        parser.add_argument(name, type=_list(kind), default=default, help=text)
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit (default: 10)")
    parser.add_argument("--out", type=Path, help="default: this device's table in the package")


def _list(kind: type) -> Callable[[str], list]:
    def parse(text: str) -> list:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"{kind.__name__} list"  # argparse's errors name it
    return parse


def run(given: argparse.Namespace, fail: Callable[[str], Any]) -> int:
    """Run the command with parsed flags; ``fail`` ends it with a message."""
    if unknown := set(given.modes) - set(config.MODES):
        fail(f"--modes must be of {', '.join(config.MODES)}, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        fail("tune needs a CUDA device, got none")
    name = config.device_name(torch.device("cuda", torch.cuda.current_device()))
    out = given.out or config.FOLDER / f"{name}.json"
    kept = json.loads(out.read_text()) if out.exists() else []
    deadline = time.monotonic() + 60 * given.minutes
    for mode, dim, rows in itertools.product(given.modes, given.dims, given.rows):
        for entry in tune(mode, dim, rows, deadline, lambda text: print(text, flush=True)):
            same = ("sweep", "mode", "dim", "rows")
            kept = [e for e in kept if any(e[k] != entry[k] for k in same)] + [entry]
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{len(kept)} entries in {out}")
    return 0
