"""How fast a step of InfoNCE on the CPU is beside dense losses and beside the two sweeps, and how
fast one of SigLIP is beside InfoNCE.

    python -m benchmarks.step [--sizes 32,64,…] [--threads 1] [--rounds 15] [--no-compile]

Contestants take turns in one process; a row holds the medians' ratios to ours. The two sweeps are
this package's other path, the one before there was a step in one call.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from alphacl_fast import FusedAlphaCLLoss, SigLipLoss, native
from alphacl_fast.backend import cpu

DIM, TAU = 128, 0.1


def two_view(z1: Tensor, z2: Tensor) -> Tensor:
    """SimCLR's loss as a dense matrix."""
    z, n = normalize(torch.cat([z1, z2])), len(z1)
    logits = (z @ z.t() / TAU).fill_diagonal_(-torch.inf)
    return cross_entropy(logits, torch.arange(2 * n).roll(n))


def cross_view(z1: Tensor, z2: Tensor) -> Tensor:
    """CLIP's loss as a dense matrix."""
    logits, target = normalize(z1) @ normalize(z2).t() / TAU, torch.arange(len(z1))
    return (cross_entropy(logits, target) + cross_entropy(logits.t(), target)) / 2


def without_steps(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss through the two sweeps."""

    def run(*z: Tensor) -> Tensor:
        serves, native.serves = native.serves, lambda call, need: False
        if loss._call.ready:
            loss._call.ready.clear()
        try:
            return loss(*z)
        finally:
            native.serves = serves

    return run


def seconds(function: Callable[..., Tensor], z: list[Tensor], steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        z[0].grad = z[1].grad = None
        function(*z).backward()
    return (time.perf_counter() - start) / steps


def medians(
    contestants: dict[str, Callable[..., Tensor]], z: list[Tensor], rounds: int
) -> dict[str, float]:
    """Seconds of every contestant, which take turns."""
    steps = max(1, min(200, int(0.05 / seconds(next(iter(contestants.values())), z, 2))))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, function in contestants.items():
            taken = seconds(function, z, steps)
            if turn:  # the first one warms up
                times[name].append(taken)
    return {name: statistics.median(each) for name, each in times.items()}


def row(dense: Callable[..., Tensor], n: int, rounds: int, compiled: bool) -> str:
    """Medians of all contestants for one size."""
    z = [torch.randn(n, DIM, requires_grad=True) for _ in range(2)]
    ours, before = (FusedAlphaCLLoss(temperature=TAU, negatives=dense.__name__) for _ in range(2))
    contestants = {"eager": dense, "ours": ours, "two sweeps": without_steps(before)}
    if compiled:
        contestants["compile"] = torch.compile(dense)
    median = medians(contestants, z, rounds)
    ratios = [
        f"{name}/ours {median[name] / median['ours']:5.2f}"
        for name in contestants
        if name != "ours"
    ]
    faster = min(x for name, x in median.items() if name in ("eager", "compile"))
    return (
        f"{dense.__name__:10} {n:6} {median['ours'] * 1e6:9.0f} µs  {'  '.join(ratios)}  "
        f"faster dense/ours {faster / median['ours']:5.2f}  "
        f"ours/two sweeps {median['ours'] / median['two sweeps']:5.2f}"
    )


def sigmoid_row(n: int, rounds: int) -> str:
    """SigLIP beside InfoNCE of the same rows, which keeps tiles or does not."""
    z = [torch.randn(n, DIM, requires_grad=True) for _ in range(2)]
    kept, again = (
        FusedAlphaCLLoss(temperature=TAU, negatives="cross_view", workspace=workspace)
        for workspace in (None, 0)
    )
    sigmoid = SigLipLoss(1 / TAU, -10.0, learnable=False)
    median = medians({"sigmoid": sigmoid, "InfoNCE": kept, "nothing kept": again}, z, rounds)
    ours = median["sigmoid"]
    ratios = [f"siglip/{name} {ours / median[name]:5.2f}" for name in ("InfoNCE", "nothing kept")]
    return f"siglip     {n:6} {ours * 1e6:9.0f} µs  " + "  ".join(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="32,64,128,256,512,1024,2048,4096")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"InfoNCE, float32, D = {DIM}, τ = {TAU}, loss and gradient, {options.threads} threads, "
        f"{cpu.kernels_for(torch.float32)} kernels, torch {torch.__version__}",
        flush=True,
    )
    for dense in (two_view, cross_view):
        for n in map(int, options.sizes.split(",")):
            torch._dynamo.reset()
            print(row(dense, n, options.rounds, not options.no_compile), flush=True)
    for n in map(int, options.sizes.split(",")):
        print(sigmoid_row(n, options.rounds), flush=True)


if __name__ == "__main__":
    main()
