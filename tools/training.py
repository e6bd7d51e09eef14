"""Measure training throughput by the loss's backend, and the loss's share of a step.

    python -m tools.training --batches 512 2048 8192 --out benchmarks/results/cpu.jsonl

A step equals `alphacl train`'s: gradient caching over micro-batches, then Adam; the network is its
small one, on random images, so that no data loader takes part. Backends take turns; each gets one
row per batch, with medians. On a CPU throughput is kept only relative to ``reference``, the dense
loss in plain PyTorch, in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from alphacl_fast import FusedAlphaCLLoss
from alphacl_fast.benchmarks.loss import provenance, synchronize
from alphacl_fast.journal import append
from alphacl_fast.train import Config, gradient, models

DATASETS = {1: "digits", 3: "cifar10"}  # number of channels → a data set that has it

Views = tuple[torch.Tensor, torch.Tensor]


def random_views(images: int, micro_batch: int, channels: int, size: int) -> list[Views]:
    """Draw two uint8 views of random images, in micro-batches."""
    views = torch.randint(0, 256, (2, images, channels, size, size), dtype=torch.uint8)
    return list(zip(*(x.split(micro_batch) for x in views), strict=True))


class Step:
    """One optimizer step of the small network with one backend."""

    def __init__(self, views: list[Views], backend: str = "auto", objective: str = "infonce"):
        self.views, (_, channels, size, _) = views, views[0][0].shape
        self.device = views[0][0].device
        torch.manual_seed(0)
        config = Config.create(dataset=DATASETS[channels], encoder="small", image_size=size)
        self.net = models.build(config).to(self.device).train()
        self.loss = FusedAlphaCLLoss(objective, backend=backend)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)

    def embed(self, views: Views) -> Views:
        return self.net(torch.cat(views)).chunk(2)

    def __call__(self) -> tuple[float, float]:
        """Run the step; return its seconds, and the seconds in the loss."""
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        value, in_loss = gradient.in_parts(self.net, self.embed, self.loss, self.views, self.device)
        self.optimizer.step()
        synchronize(self.device)
        if not torch.isfinite(value):
            raise RuntimeError(f"the loss became {value.item()}")
        return time.perf_counter() - start, in_loss


def run(batch: int, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure a batch size with the command's flags; yields one row per backend."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = random_views(batch, given.micro_batch, 1, given.size)
    views = [(x1.to(device), x2.to(device)) for x1, x2 in parts]
    steps = {name: Step(views, name, given.objective) for name in given.backends}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for repeat in range(given.repeats + 1):
        for name, step in steps.items():
            took = step()
            if repeat:  # the first round warms up
                times[name].append(took)
    medians = {name: statistics.median(s for s, _ in values) for name, values in times.items()}
    dense, cpu = medians.get("reference"), device.type == "cpu"
    for name, values in times.items():
        share = statistics.median(in_loss / seconds for seconds, in_loss in values)
        yield {
            "benchmark": "training", "contestant": name, "objective": given.objective,
            "negatives": "two_view", "batch_size": batch, "micro_batch": given.micro_batch,
            "image_size": given.size, "n": 2 * batch, "dim": 128, "dtype": "float32",
            "repeats": given.repeats, "speedup_over_reference": dense and dense / medians[name],
            "loss_share": share if cpu else None,  # a GPU host's clock sees launches only
            "images_per_s": None if cpu else batch / medians[name], **provenance(device),
        }  # fmt: skip


def flags(description: str, batches: list[int]) -> argparse.ArgumentParser:
    """Build a parser with the flags that say how large a step is."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=batches)
    parser.add_argument("--micro-batch", type=int, default=512)
    parser.add_argument("--size", type=int, default=8, help="side of the images")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = flags(__doc__, [512, 2048])
    parser.add_argument("--backends", nargs="+", default=["reference", "blocked", "auto"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--objective", default="infonce")
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    given = parser.parse_args(arguments)
    for batch in given.batches:
        for row in run(batch, given):
            share, speedup = row["loss_share"], row["speedup_over_reference"]
            text = f"{speedup:.2f} x reference" if speedup else "no reference"
            text += f", {share:.1%} of the step in the loss" if share is not None else ""
            print(f"batch {batch} {row['contestant']}: {text}", flush=True)
            if given.out:
                append(given.out, row)


if __name__ == "__main__":
    main()
