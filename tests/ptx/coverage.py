"""Which instructions of the kernels have been executed, and which may stay out."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable

import numpy as np

from . import cuda_launch
from .parse import Kernel

#: Least share of the instructions of a family of kernels that a full list executes, by a pattern of
#: their names. The general kernels of csrc/cuda hold every pair kind in every form. Their row_sums
#: also hold symmetric tiles, which the host asks for with bfloat16 alone: in the other dtypes two
#: fifths are never executed. Of the lengths of rows, `calls.every_kind` takes two for each dtype.
LEAST = (
    ("hopper", 0.97), ("FastPairGrad", 0.95), ("FastRowSums", 0.93), ("PairGrad", 0.8),
    ("RowSums", 0.53), ("UnitRows|FinishRows|RoundRows", 0.97), ("", 0.9),
)  # fmt: skip
#: Kernels that only sm_90a launches.
_OF_HOPPER = re.compile("hopper|RoundRows")
#: Least share of the instructions of all kernels that a short list runs.
SHORT = {"cuda-90a": 0.85, "cuda-80": 0.28, "triton-90": 0.9, "triton-80": 0.9}


def of_kernels(runs: Iterable[tuple[Kernel, np.ndarray]]) -> dict[str, dict]:
    """Of every kernel: instructions there, executed, and the texts of those that were not.

    ``runs``: as `Runner.executed` has them.
    """
    merged: dict[str, tuple[dict, set]] = {}
    for kernel, coverage in runs:
        name = kernel.name
        if name in ("row_sums", "pair_grad") or name.endswith("_kernel"):  # Triton's, by its text
            name = f"{name}-{zlib.crc32(kernel.text.encode()):08x}"
        texts, done = merged.setdefault(name, ({}, set()))
        for instruction, executed in zip(kernel.instructions, coverage, strict=True):
            texts[instruction.origin] = instruction.text
            if executed:
                done.add(instruction.origin)
    return {
        name: {
            "there": len(texts), "executed": len(done),
            "missing": Counter(_short(t) for k, t in texts.items() if k not in done),
        }
        for name, (texts, done) in merged.items()
    }  # fmt: skip


def _short(text: str) -> str:
    """An instruction without its registers' numbers."""
    return re.sub(r"(%[a-z]+)\d+", r"\1", text)[:80]


def never_launched(name: str, found: dict[str, dict]) -> list[str]:
    """Kernels of csrc/cuda that no case of a list has launched."""
    if not name.startswith("cuda"):
        return []
    hopper = name == "cuda-90a"
    known = cuda_launch.kernels(name.removeprefix("cuda-"))
    return [k for k in known if bool(_OF_HOPPER.search(k)) == hopper and k not in found]


def missing(name: str, found: dict[str, dict], full: bool) -> list[str]:
    """What should have been executed and was not."""
    if name == "cuda-90a":  # cuda-80 has the cases for the others
        found = {kernel: row for kernel, row in found.items() if _OF_HOPPER.search(kernel)}
    if not full:
        done, there = (sum(k[x] for k in found.values()) for x in ("executed", "there"))
        return (
            []
            if done >= SHORT[name] * there
            else [f"{name}: {done} of {there} instructions executed"]
        )
    bad = [f"{name}: {kernel} is never launched" for kernel in never_launched(name, found)]
    shares: dict[str, list[int]] = {}
    for kernel, row in found.items():
        family = next(pattern for pattern, _ in LEAST if re.search(pattern, kernel))
        share = shares.setdefault(family, [0, 0])
        share[0] += row["executed"]
        share[1] += row["there"]
    for family, (done, there) in shares.items():
        if done < dict(LEAST)[family] * there:
            bad.append(f"{name}: {done} of {there} instructions of {family} kernels are executed")
    return bad
