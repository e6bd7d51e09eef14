"""Interprets the kernels' PTX: ``python tests/ptx/run.py [--full] [cuda-80 cuda-90a triton-90 …]``.

Prints a line for each case, then for each list the instructions that were executed, the largest
error of each arithmetic and the cost. ``--json FILE`` keeps the results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":  # the imports below read it
    os.environ.pop("TRITON_INTERPRET", None)
for folder in (Path(__file__).parents[2], Path(__file__).parents[1]):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402
from ptx import cases, coverage, cuda_launch, nvcc, triton_launch  # noqa: E402
from ptx.runner import Runner, rare_collections  # noqa: E402

LISTS = ("cuda-90a", "cuda-80", "triton-90", "triton-80")
#: The list that has no short version.
FULL_ALONE = ("triton-120",)


def of_list(name: str, full: bool) -> list[cases.Case]:
    backend, arch = name.split("-")
    listed = (cases.cuda_cases if backend == "cuda" else cases.triton_cases)(arch)
    return [case for case in listed if full or case.short]


@contextlib.contextmanager
def launches(name: str, runner: Runner) -> Iterator[None]:
    backend, arch = name.split("-")
    of_backend = cuda_launch if backend == "cuda" else triton_launch
    with rare_collections(), of_backend.interpreted(arch, runner):
        yield
    runner.retire()


def run_list(name: str, full: bool) -> dict:
    """Runs the cases of a list; what there is to say of it, as JSON."""
    runner, results = Runner(), []
    begin = time.process_time()
    with launches(name, runner):
        for case in of_list(name, full):
            result = cases.run(case, runner)
            results.append({**asdict(result), "mode": case.mode})
            print(_line(results[-1]), flush=True)
    return {
        "list": name, "results": results, "cpu": time.process_time() - begin,
        "coverage": coverage.of_kernels(runner.executed()),
    }  # fmt: skip


def _line(row: dict) -> str:
    word = "ok  " if row["ok"] else "FAIL"
    errors = " ".join(f"{x:.1e}" for x in row["errors"])
    why = row["problem"][:300] or "; ".join(row["hazards"][:3])
    return f"{word} {row['case']}: {errors} {row['steps']} steps, {row['cpu']:.1f} s {why}"


def summary(found: dict) -> str:
    rows = found["results"]
    steps, seconds = sum(r["steps"] for r in rows), sum(r["seconds"] for r in rows)
    worst = {}
    for row in rows:
        if row["errors"]:
            worst[row["mode"]] = [*map(max, row["errors"], worst.get(row["mode"], (0, 0)))]
    done, there = (sum(k[x] for k in found["coverage"].values()) for x in ("executed", "there"))
    return (
        f"{found['list']}: {len(rows)} cases, {found['cpu']:.0f} s of CPU, {steps} instructions of "
        f"warps at {1e6 * seconds / max(steps, 1):.1f} µs; {done} of {there} instructions executed "
        f"({100 * done / max(there, 1):.1f} %); largest errors of losses and "
        "gradients: " + ", ".join(f"{m} {a:.1e} {b:.1e}" for m, (a, b) in worst.items())
    )


def failures(found: dict, full: bool) -> list[str]:
    bad = [
        f"{r['case']}: {r['problem'] or r['hazards'] or r['errors']}"
        for r in found["results"]
        if not r["ok"]
    ]
    return bad + coverage.missing(found["list"], found["coverage"], full)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lists", nargs="*")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for name in given.lists or (*LISTS, *(FULL_ALONE if given.full else ())):
        if name.startswith("cuda") and nvcc.missing():
            print(f"{name} is left out: {nvcc.missing()}")
            continue
        found.append(run_list(name, given.full))
        print(summary(found[-1]), flush=True)
    bad = [text for result in found for text in failures(result, given.full)]
    print("\n".join(bad))
    if given.json:
        given.json.write_text(json.dumps({"found": found, "failures": bad}))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
