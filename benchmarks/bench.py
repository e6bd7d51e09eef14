"""Measure times and peak memory over n × D × dtype × objective × mode, for backends and baselines.

    alphacl bench --n 1024,4096,16384 --negatives two_view,cross_view --out runs/bench

Every row is appended to OUT/rows.jsonl at once, with device, versions and commit. At the end the
tables are printed and written to OUT/tables.md, and growth with n is plotted in OUT/growth.png. A
run into a folder that already has rows adds to them; the tables show the newest of each.
`benchmarks.loss` times a setting, `benchmarks.memory` measures its memory.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from alphacl_fast import journal, objectives, ops

from . import loss, memory, report
from .baselines import BASELINES, TASKS, missing, serves

DTYPES = ("float32", "float64", "bfloat16", "float16")
#: A dense loss may hold this many n×n matrices of float32; it is skipped if they do not fit.
DENSE_MATRICES = 8


def refusals(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Say of each sweep backend why it does not serve a device and dtype, or None."""
    modules = ops.SWEEP_BACKENDS.items()
    return {name: module.unsupported(device, dtype, None, "exp") for name, module in modules}


def default_contestants(device: torch.device) -> list[str]:
    """List the package's usable sweep backends, and the baselines for this kind of device."""
    refused = refusals(device, torch.float32)
    names = [name for name, reason in refused.items() if reason is None]
    gpu = device.type == "cuda"
    return names + [name for name, found in BASELINES.items() if gpu or not found.gpu_only]


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 62


def why_not(name: str, setting: loss.Setting, device: torch.device) -> str | None:
    """Say why an implementation that computes the setting's loss is skipped, if it is."""
    if absent := missing(name):
        return f"not installed: {absent}"
    rows = setting.n // 2 if setting.negatives == "cross_view" else setting.n
    if name in BASELINES and name != "keops" and not BASELINES[name].gpu_only:
        needed, there = DENSE_MATRICES * 4 * rows**2, available_bytes(device)
        if needed > there:
            return (
                f"its n×n matrices may take {needed / 1e9:.0f} GB of {there / 1e9:.0f} GB "
                "that are free"
            )
    return None


def rows(
    settings: list[loss.Setting],
    contestants: list[str],
    measures: list[str],
    device: torch.device,
    effort: loss.Effort,
    say: Callable[[str], None],
) -> Iterator[loss.Row]:
    """Yield all rows of a grid as they are measured.

    Args:
        settings: the problems.
        contestants: "NAME" or "NAME/OBJECTIVE" of each implementation.
        measures: of `benchmarks.loss.MEASURES` and "memory".
        device, effort: as in `benchmarks.loss.run`.
        say: receives one line per implementation that is skipped, with the reason.
    """
    said: set[str] = set()

    def skip(contestant: str, why: str) -> None:
        line = f"{contestant} skipped: {why}"
        if line not in said:
            said.add(line)
            say(line)

    for setting in settings:
        here = []
        for contestant in contestants:
            name, own = loss.parse(contestant, setting)
            if not serves(name, own.objective, own.negatives):
                continue
            if why := why_not(name, own, device):
                skip(contestant, why)
            else:
                here.append(contestant)
        for measure in measures:
            if measure != "memory":
                for row in loss.run(setting, here, device, effort, measure):
                    if row["status"] == "ok":
                        where = loss.provenance(device)
                        yield {**row, "load_before": os.getloadavg()[0], **where}
                    else:
                        skip(row["contestant"], row["error"])
            elif not memory.supported(device):
                skip("memory", f"peaks cannot be read on {sys.platform}")
            else:
                for contestant in here:
                    name, own = loss.parse(contestant, setting)
                    yield memory.measure(own, name, device)


def run(given: argparse.Namespace, fail: Callable[[str], Any], say: Callable[[str], None]) -> int:
    """Run the command.

    Args:
        given: parsed flags.
        fail: ends the command with a message.
        say: reports progress.

    Returns:
        The exit status, 0.
    """
    known = {*ops.SWEEP_BACKENDS, *BASELINES}
    for contestant in given.contestants or ():
        name, _, own = contestant.partition("/")
        if name not in known:
            fail(f"--contestants must be of {', '.join(sorted(known))}, got {name!r}")
        if own and own not in (*objectives.names(), *TASKS):
            fail(f"--contestants: {own!r} is no objective")
    for flag, least in (("n", 4), ("dim", 1), ("repeats", 1)):
        if min(getattr(given, flag)) < least:
            fail(f"--{flag} must be at least {least}, got {min(getattr(given, flag))}")
    if odd := [n for n in given.n if n % 2]:
        fail(f"--n must be even, it counts both views; got {odd[0]}")
    for flag in ("tau", "budget"):
        if not 0 < getattr(given, flag) < float("inf"):
            fail(f"--{flag} must be a positive number, got {getattr(given, flag)}")
    if given.threads is not None and given.threads < 1:
        fail(f"--threads must be at least 1, got {given.threads}")
    try:
        found = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device(found)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {given.device}: {str(error).splitlines()[0]}")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    grid = itertools.product(given.negatives, given.objective, given.dtype, given.dim, given.n)
    settings = [loss.Setting(*reversed(point), given.tau) for point in grid]
    contestants = given.contestants or default_contestants(device)
    start, made, file = time.monotonic(), 0, given.out / "rows.jsonl"
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        fail(f"cannot write to {given.out}: {error.strerror}")
    effort = loss.Effort((given.repeats[0], given.repeats[-1]), given.budget, loss.GEMM)
    for row in rows(settings, contestants, given.measure, device, effort, say):
        journal.append(file, row)
        made += 1
        say(f"[{time.monotonic() - start:5.0f} s] {report.one_line(row)}")
    if not made:
        fail("nothing was measured: no contestant computes these settings here")
    written = report.write(report.read(file), given.out)
    print((given.out / "tables.md").read_text())
    print(f"written: {', '.join(map(str, written))}")
    return 0
