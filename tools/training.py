"""Training throughput and the loss's share of the step, with one flag changed: ``--backend`` of `alphacl train`.

    python -m tools.training --batches 512 2048 8192 --out benchmarks/results/cpu.jsonl

A step is `alphacl train`'s: the gradient of one batch in micro-batches (gradient caching), then Adam; of its small network on
random images, so that no loader takes part. Backends take turns, one row per backend and batch with the medians. On a CPU
throughput is kept only relative to that of ``reference``, the dense loss in plain PyTorch, in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from alphacl_fast import FusedAlphaCLLoss
from alphacl_fast.benchmarks.loss import provenance, synchronize
from alphacl_fast.train import Config, gradient, models

BACKENDS = ("reference", "blocked", "auto")


class Step:
    """One optimizer step of a small network with one backend."""

    def __init__(self, views: list[tuple[torch.Tensor, torch.Tensor]], backend: str, objective: str, size: int) -> None:
        self.device = views[0][0].device
        torch.manual_seed(0)
        self.net = models.build(Config.create(dataset="digits", encoder="small", image_size=size)).to(self.device).train()
        self.loss = FusedAlphaCLLoss(objective, backend=backend)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)
        self.views = views

    def embed(self, views: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.net(torch.cat(views)).chunk(2)

    def __call__(self) -> tuple[float, float]:
        """Seconds of the step, and of the loss in it."""
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        value, in_loss = gradient.in_parts(self.net, self.embed, self.loss, self.views, self.device)
        self.optimizer.step()
        synchronize(self.device)
        if not torch.isfinite(value):
            raise RuntimeError(f"the loss became {value.item()}")
        return time.perf_counter() - start, in_loss


def run(
    batch: int, micro_batch: int, backends: tuple[str, ...], repeats: int, objective: str, size: int
) -> list[dict[str, Any]]:
    """The rows of one batch size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.randint(0, 256, (2, batch, 1, size, size), dtype=torch.uint8).to(device)
    views = list(zip(*(x.split(micro_batch) for x in images), strict=True))
    steps = {name: Step(views, name, objective, size) for name in backends}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in backends}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            took = step()
            if repeat:
                times[name].append(took)
    medians = {name: statistics.median(seconds for seconds, _ in values) for name, values in times.items()}
    rows = []
    for name, values in times.items():
        share = statistics.median(in_loss / seconds for seconds, in_loss in values)
        rows.append({
            "benchmark": "training", "contestant": name, "objective": objective, "negatives": "two_view", "batch_size": batch,
            "micro_batch": micro_batch, "image_size": size, "n": 2 * batch, "dim": 128, "dtype": "float32", "repeats": repeats,
            "speedup_over_reference": medians["reference"] / medians[name] if "reference" in medians else None,
            "loss_share": share if device.type == "cpu" else None,  # elsewhere the host's clock sees the launch only
            "images_per_s": batch / medians[name] if device.type == "cuda" else None, **provenance(device),
        })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--micro-batch", type=int, default=512)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--objective", default="infonce")
    parser.add_argument("--size", type=int, default=8, help="side of the images")
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    given = parser.parse_args(arguments)
    for batch in given.batches:
        for row in run(batch, given.micro_batch, tuple(given.backends), given.repeats, given.objective, given.size):
            share = f", {row['loss_share']:.1%} of the step in the loss" if row["loss_share"] is not None else ""
            ratio = f"{row['speedup_over_reference']:.2f} x reference" if row["speedup_over_reference"] else "no reference"
            print(f"batch {batch} {row['contestant']}: {ratio}{share}", flush=True)
            if given.out:
                with given.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
