"""Times and peak memory over n × D × dtype × objective × mode, beside eager PyTorch, torch.compile and other packages.

    alphacl bench --n 1024,4096,16384 --negatives two_view,cross_view --out runs/bench

Every row is in OUT/rows.jsonl as soon as it is made, with device, versions and commit; in the end the tables are printed and
written to OUT/tables.md, and the growth with n is drawn in OUT/growth.png. A run into a folder that has rows adds to them, and
the tables show the newest of each. `benchmarks.loss` times a setting, `benchmarks.memory` measures one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from alphacl_fast import objectives, ops

from . import loss, memory, report
from .contestants import GPU_ONLY, RIVALS, missing, serves

DTYPES = ("float32", "float64", "bfloat16", "float16")
#: Matrices of n×n float32 that a dense loss may hold at once; a contestant that would not fit is not started.
DENSE_MATRICES = 8


def default_contestants(device: torch.device) -> list[str]:
    """The package's usable sweep backends, eager, compiled and the rivals for this kind of device."""
    served = {name: module.unsupported(device, torch.float32, None, "exp") for name, module in ops.SWEEP_BACKENDS.items()}
    ours = [name for name, reason in served.items() if reason is None]
    rivals = [name for name in RIVALS if device.type == "cuda" or name not in GPU_ONLY]
    return [*ours, "eager", "compiled", *rivals]


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 62


def why_not(contestant: str, setting: loss.Setting, device: torch.device) -> str | None:
    """Why a contestant that computes a setting's loss takes no part in it, or None."""
    name = contestant.partition("/")[0]
    absent = missing(name)
    if absent:
        return f"not installed: {absent}"
    rows = setting.n // 2 if setting.negatives == "cross_view" else setting.n
    if name not in (*ops.SWEEP_BACKENDS, "keops", *GPU_ONLY):
        needed, there = DENSE_MATRICES * 4 * rows**2, available_bytes(device)
        if needed > there:
            return f"its n×n matrices may take {needed / 1e9:.0f} GB of {there / 1e9:.0f} GB that are free"
    return None


def rows(
    settings: list[loss.Setting], contestants: list[str], measures: list[str], device: torch.device,
    repeats: tuple[int, int], budget: float, say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """All rows of a grid, as they come; ``say`` hears who is left out, and why, once."""
    said: set[tuple[str, str]] = set()

    def skip(contestant: str, why: str) -> None:
        if (contestant, why) not in said:
            said.add((contestant, why))
            say(f"{contestant} skipped: {why}")

    for setting in settings:
        here = []
        for contestant in contestants:
            name, _, own = contestant.partition("/")
            if not serves(name, own or setting.objective, setting.negatives):
                continue
            why = why_not(contestant, setting, device)
            if why is None:
                here.append(contestant)
            else:
                skip(contestant, why)
        for measure in measures:
            if measure != "memory":
                yield from loss.run(setting, here, repeats, device, budget, measure, skip)
            elif not memory.supported(device):
                skip("memory", f"peaks cannot be read on {sys.platform}")
            else:
                for contestant in here:
                    name, _, own = contestant.partition("/")
                    yield memory.measure(replace(setting, objective=own or setting.objective), name, device)


def _list(kind: type, valid: tuple | None = None):
    def parse(text: str) -> list:
        values = [kind(part) for part in text.split(",") if part]
        for value in values:
            if valid is not None and value not in valid:
                raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(map(str, valid))}")
        if not values:
            raise argparse.ArgumentTypeError("at least one value is needed")
        return values

    parse.__name__ = f"{kind.__name__} list"  # what argparse calls it
    return parse


def add_flags(parser: argparse.ArgumentParser) -> None:
    modes = ("two_view", "one_view", "cross_view")
    parser.add_argument("--n", type=_list(int), default=[1024, 4096],
                        help="rows 2N; several after commas, as everywhere here (default: 1024,4096)")  # fmt: skip
    parser.add_argument("--dim", type=_list(int), default=[128], help="features (default: 128)")
    parser.add_argument("--dtype", type=_list(str, DTYPES), default=["float32"],
                        help=f"of {', '.join(DTYPES)} (default: float32)")  # fmt: skip
    parser.add_argument("--objective", type=_list(str, objectives.names()), default=["infonce"],
                        help="names of objectives (default: infonce, the only one that others compute)")  # fmt: skip
    parser.add_argument("--negatives", type=_list(str, modes), default=["two_view"],
                        help=f"of {', '.join(modes)} (default: two_view)")  # fmt: skip
    parser.add_argument("--measure", type=_list(str, (*loss.MEASURES, "memory")), default=["loss+gradient", "memory"],
                        help="of loss, backward, loss+gradient, memory (default: loss+gradient,memory)")  # fmt: skip
    parser.add_argument("--contestants", type=_list(str), help="backends, eager, compiled, or "
                        f"{', '.join(RIVALS)} (default: all that run on the device)")  # fmt: skip
    parser.add_argument("--tau", type=float, default=0.5, help="temperature (default: 0.5)")
    parser.add_argument("--repeats", type=_list(int), default=[5, 25], help="fewest and most (default: 5,25)")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for the repeats of a table (default: 20)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of rows and tables (default: runs/bench)")


def run(given: argparse.Namespace, fail: Callable[[str], Any], say: Callable[[str], None]) -> int:
    """The command with parsed flags; ``fail`` ends it with a message, ``say`` reports."""
    known = {"eager", "compiled", *ops.SWEEP_BACKENDS, *RIVALS}
    for contestant in given.contestants or ():
        name, _, own = contestant.partition("/")
        if name not in known:
            fail(f"--contestants must be of {', '.join(sorted(known))}, got {name!r}")
        if own and own not in objectives.names():
            fail(f"--contestants: {own!r} is no objective")
    for flag, least in (("n", 4), ("dim", 1), ("repeats", 1)):
        if min(getattr(given, flag)) < least:
            fail(f"--{flag} must be at least {least}, got {min(getattr(given, flag))}")
    if any(n % 2 for n in given.n):
        fail(f"--n must be even, it counts both views; got {next(n for n in given.n if n % 2)}")
    for flag in ("tau", "budget"):
        if not 0 < getattr(given, flag) < float("inf"):
            fail(f"--{flag} must be a positive number, got {getattr(given, flag)}")
    if given.threads is not None and given.threads < 1:
        fail(f"--threads must be at least 1, got {given.threads}")
    try:
        device = torch.device(given.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {given.device}: {str(error).splitlines()[0]}")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    settings = [
        loss.Setting(n, dim, dtype, objective, negatives, given.tau)
        for negatives, dtype, objective, dim, n in itertools.product(
            given.negatives, given.dtype, given.objective, given.dim, given.n
        )
    ]
    contestants = given.contestants or default_contestants(device)
    start, made = time.monotonic(), 0
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        file = (given.out / "rows.jsonl").open("a")
    except OSError as error:
        fail(f"cannot write to {given.out}: {error.strerror}")
    with file:
        repeats = given.repeats[0], given.repeats[-1]
        for row in rows(settings, contestants, given.measure, device, repeats, given.budget, say):
            file.write(json.dumps(row) + "\n")
            file.flush()
            made += 1
            say(f"[{time.monotonic() - start:5.0f} s] {report.one_line(row)}")
    if not made:
        fail("nothing was measured: no contestant computes these settings here")
    written = report.write(report.read(given.out / "rows.jsonl"), given.out)
    print((given.out / "tables.md").read_text())
    print(f"written: {', '.join(map(str, written))}")
    return 0
