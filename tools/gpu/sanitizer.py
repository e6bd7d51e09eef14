"""Runs small ragged shapes under compute-sanitizer.

The tool may refuse a device (in some virtual machines it does), which is no failure of a kernel.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
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
#: What the tool says when it cannot watch. The program's own messages begin otherwise.
_REFUSED = re.compile(
    r"^=+ (?:Error: .*(?:not supported|initialization failed)|Internal Sanitizer Error).*"
    r"|CUDA error 999.*",
    re.M,
)
#: The last lines of memcheck and racecheck. A hazard counts, whether it is an error or a warning.
_FOUND = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazards? displayed")
#: Exit statuses of a command that was killed: by `timeout`, or with it.
_KILLED = (-9, 137)


def watch(item: Row, device: str, seconds: float, log: str) -> Iterator[Row]:
    """Run `small_shapes` of a backend under one of the tool's checkers.

    Args:
        item: ``backend`` and ``checker`` (memcheck, racecheck).
        device: the GPU.
        seconds: the time limit, after which `timeout` kills the tool, also if this process is
            gone.
        log: the file that gets the tool's output.
    """
    row, tool = {"benchmark": "sanitize", **item}, shutil.which(TOOL)
    if tool is None:
        yield {**row, "status": "absent", "error": f"{TOOL} is not on the PATH"}
        return
    quiet = ["--report-api-errors", "no"] if item["checker"] == "memcheck" else []
    command = [
        "timeout", "--signal=KILL", f"{seconds}",
        tool, "--tool", item["checker"], "--target-processes", "application-only", *quiet,
        "--print-limit", "10",
        sys.executable, "-m", "tools.gpu.sanitizer", item["backend"], device, f"{seconds / 2:.0f}",
    ]  # fmt: skip
    # gives every tensor its own bounds
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    )  # fmt: skip
    with contextlib.suppress(OSError), Path(log).open("a") as file:
        file.write(f"$ {' '.join(command)}\n{done.stdout}\n")
    yield {**row, **verdict(done.returncode, done.stdout)}


def verdict(code: int, said: str) -> Row:
    """Judge a run: it has failed only if the tool has found errors in kernels.

    Args:
        code: the exit status.
        said: the output.
    """
    found = [int(errors or hazards) for errors, hazards in _FOUND.findall(said)]
    if refused := _REFUSED.search(said):
        return {"status": "refused", "error": refused[0].strip()[:200]}
    if found and sum(found):
        return {"status": "failed", "errors_found": sum(found), "error": f"{sum(found)} errors"}
    if code in _KILLED:
        return {"status": "unfinished", "error": "it was killed, most likely at its time limit"}
    if code or not found:
        last = (said.strip().splitlines() or ["nothing"])[-1][:200]
        return {"status": "refused", "error": f"exit status {code}; its last line is: {last}"}
    return {"status": "ok", "error": None, "errors_found": 0}


def small_shapes(backend: str, device: str, seconds: str) -> int:
    """Run forms of the sweeps on small ragged shapes until the time is up; return their number.

    The first shape is run in any case.
    """
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
