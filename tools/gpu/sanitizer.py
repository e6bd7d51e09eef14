"""Small ragged shapes under compute-sanitizer.

The tool may refuse a device (under some virtual machines it does); that says nothing of a kernel.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from alphacl_fast.accuracy import REPRESENTATIVES, Case, correlated_views, evaluate
from alphacl_fast.benchmarks.loss import synchronize
from alphacl_fast.functional import NEGATIVES
from alphacl_fast.journal import Row

TOOL = "compute-sanitizer"
#: What the tool says when it cannot watch.
_REFUSED = re.compile(r".*(?:not supported|unable to|initialization failed|error 999).*", re.I)
_FOUND = re.compile(r"ERROR SUMMARY: (\d+) error")


def watch(item: Row, device: str, seconds: float, log: str) -> Iterator[Row]:
    """Run `small_shapes` of a backend under one of the tool's checkers.

    Args:
        item: ``backend`` and ``checker`` (memcheck, racecheck).
        device: where to run.
        seconds: time limit.
        log: file that gets what the tool says.
    """
    row, tool = {"benchmark": "sanitize", **item}, shutil.which(TOOL)
    if tool is None:
        yield {**row, "status": "absent", "error": f"{TOOL} is not on the PATH"}
        return
    command = [
        tool, "--tool", item["checker"], "--target-processes", "application-only",
        "--report-api-errors", "no", "--print-limit", "10",
        sys.executable, "-m", "tools.gpu.sanitizer", item["backend"], device, f"{seconds / 2:.0f}",
    ]  # fmt: skip
    # gives every tensor its own bounds
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code, said = run(command, seconds, environment)
    with contextlib.suppress(OSError), Path(log).open("a") as file:
        file.write(f"$ {' '.join(command)}\n{said}\n")
    yield {**row, **verdict(code, said)}


def run(command: list[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """Exit status (None: killed at the time limit) and output of a command."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=seconds)
        return process.returncode, said
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and its children
        return None, process.communicate()[0]


def verdict(code: int | None, said: str) -> Row:
    """Columns of the result: "failed" only where the tool has found errors in kernels."""
    found = [int(k) for k in _FOUND.findall(said)]
    if refused := _REFUSED.search(said):
        return {"status": "refused", "error": refused[0].strip()[:200]}
    if found and sum(found):
        return {"status": "failed", "errors_found": sum(found), "error": f"{sum(found)} errors"}
    if code is None:
        return {"status": "unfinished", "error": "its time was up"}
    if code or not found:
        last = (said.strip().splitlines() or ["nothing"])[-1][:200]
        return {"status": "refused", "error": f"exit status {code}, no summary; it said: {last}"}
    return {"status": "ok", "error": None, "errors_found": 0}


def small_shapes(backend: str, device: str, seconds: str) -> int:
    """Run every form of the sweeps on small ragged shapes while time lasts; return the count."""
    here, end = torch.device(device), time.monotonic() + float(seconds)
    shapes, dtypes = ((65, 128), (3, 128), (130, 200)), ("bfloat16", "float32")
    table = itertools.product(shapes, dtypes, REPRESENTATIVES, NEGATIVES)
    done = 0
    for (pairs, dim), dtype, (member, options), negatives in table:
        case = Case(
            backend, member, tuple(options.items()), dtype, negatives, pairs=pairs, dim=dim,
            reduction=("none", "mean")[done % 2],
        )  # fmt: skip
        views = correlated_views(case, here)
        evaluate(case, *views, backend, None)
        synchronize(here)
        done += 1
        if time.monotonic() > end:
            break
    return done


if __name__ == "__main__":
    print(f"{small_shapes(*sys.argv[1:])} shapes")
