"""Measure a step of gradient caching at several batch sizes: time and memory, in fresh processes.

    python -m tools.caching --batches 2048 8192 32768 --micro-batch 512

appends one row per batch to benchmarks/results/caching.jsonl. The network is `alphacl train`'s
small one, on random images.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
from pathlib import Path

import torch

from alphacl_fast.benchmarks.memory import process_bytes
from alphacl_fast.journal import append

from .training import Step, flags, random_views

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "caching.jsonl"


def measure(batch: int, micro_batch: int, size: int, channels: int) -> dict:
    """Measure one step in this process, after a small one has warmed it up."""
    step = Step(random_views(2 * micro_batch, micro_batch, channels, size))
    step()
    before = process_bytes("VmHWM")
    step.views = random_views(batch, micro_batch, channels, size)
    seconds, in_loss = step()
    peak = process_bytes("VmHWM")
    return {
        "batch": batch, "micro_batch": micro_batch, "image": [channels, size, size],
        "seconds": seconds, "loss_seconds": in_loss, "pairs_per_s": batch / seconds,
        "peak_mib": peak / 2**20, "growth_mib": (peak - before) / 2**20,
        "images_mib": 2 * batch * channels * size**2 / 2**20,
        "embeddings_mib": 2 * batch * 128 * 4 / 2**20, "threads": torch.get_num_threads(),
        "cores": os.cpu_count(), "load_before": os.getloadavg()[0],
        "machine": platform.machine(), "torch": torch.__version__,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = flags(__doc__, [2048, 8192, 32_768])
    parser.add_argument("--channels", type=int, default=1, choices=(1, 3))
    given = parser.parse_args(arguments)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for batch in given.batches:
            row = pool.apply(measure, (batch, given.micro_batch, given.size, given.channels))
            print(json.dumps(row), flush=True)
            append(RESULTS, row)


if __name__ == "__main__":
    main()
