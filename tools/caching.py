"""One step of gradient caching at several batch sizes: time and memory, each in a fresh process.

    python -m tools.caching --batches 2048 8192 32768 --micro-batch 512

writes one row per batch to benchmarks/results/caching.jsonl. The network is `alphacl train`'s small one, images are random.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "caching.jsonl"


def _peak_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def measure(batch: int, micro_batch: int, size: int, channels: int) -> dict:
    """One warmed-up step in this process."""
    from alphacl_fast import FusedAlphaCLLoss
    from alphacl_fast.train import Config, gradient, models

    dataset = {1: "digits", 3: "cifar10"}[channels]
    net = models.build(Config.create(dataset=dataset, encoder="small", image_size=size)).train()
    loss, device = FusedAlphaCLLoss(), torch.device("cpu")

    def embed(views):
        return net(torch.cat(views)).chunk(2)

    def parts(images):
        views = torch.randint(0, 256, (2, images, channels, size, size), dtype=torch.uint8)
        return list(zip(*(x.split(micro_batch) for x in views), strict=True))

    gradient.in_parts(net, embed, loss, parts(2 * micro_batch), device)
    small, views = _peak_bytes(), parts(batch)
    start, in_loss = time.perf_counter(), 0.0
    _, in_loss = gradient.in_parts(net, embed, loss, views, device)
    seconds = time.perf_counter() - start
    return {
        "batch": batch, "micro_batch": micro_batch, "image": [channels, size, size], "seconds": seconds,
        "loss_seconds": in_loss, "pairs_per_s": batch / seconds, "peak_mib": _peak_bytes() / 2**20,
        "growth_mib": (_peak_bytes() - small) / 2**20, "images_mib": 2 * batch * channels * size**2 / 2**20,
        "embeddings_mib": 2 * batch * 128 * 4 / 2**20, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0], "machine": platform.machine(), "torch": torch.__version__,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[2048, 8192, 32_768])
    parser.add_argument("--micro-batch", type=int, default=512)
    parser.add_argument("--size", type=int, default=8, help="side of the images")
    parser.add_argument("--channels", type=int, default=1, choices=(1, 3))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.here:
        print(json.dumps(measure(given.batches[0], given.micro_batch, given.size, given.channels)))
        return
    with open(RESULTS, "a") as file:
        for batch in given.batches:
            command = [sys.executable, "-m", "tools.caching", "--here", "--batches", str(batch), "--micro-batch",
                       str(given.micro_batch), "--size", str(given.size), "--channels", str(given.channels)]  # fmt: skip
            row = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            print(row, flush=True)
            file.write(row + "\n")


if __name__ == "__main__":
    main()
