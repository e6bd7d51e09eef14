"""How fast a step of InfoNCE on the CPU is beside dense losses and beside the two sweeps, how fast
one of SigLIP is beside InfoNCE, what variants of InfoNCE and SupCon cost, and which fraction of a
large matrix product's rate InfoNCE reaches.

    python -m benchmarks.step [--parts infonce,siglip,…] [--sizes 16,32,…] [--threads 1]
                             [--rounds 15] [--no-compile] [--out FILE]

Contestants take turns in one process; a row holds the medians' ratios to ours. The two sweeps are
the path of calls that one native call cannot serve.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from alphacl_fast import (
    FusedAlphaCLLoss,
    MatryoshkaLoss,
    PairLoss,
    SigLipLoss,
    SupConLoss,
    native,
)
from alphacl_fast.benchmarks.loss import provenance
from alphacl_fast.journal import append

DIM, TAU = 128, 0.1
PARTS = ("infonce", "siglip", "variants", "supcon", "rate")
#: Rows, columns and terms of the matrix product whose rate is compared.
PRODUCT = 4096
#: Numbers of pairs, and features and dtypes, of the rates.
PAIRS = (512, 1024, 2048, 4096, 8192)
RATES = ((128, "float32", PAIRS), (128, "bfloat16", PAIRS), (512, "float32", PAIRS[:3]))
#: Bytes of a workspace that holds every tile of these sizes.
ALL_TILES = 2 << 30


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
        serves, native.serves = native.serves, lambda *call: False
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


def infonce(dense: Callable[..., Tensor], n: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """InfoNCE of n pairs: a row with the ratio of every contestant's median to ours."""
    z = [torch.randn(n, DIM, requires_grad=True) for _ in range(2)]
    ours, before = (FusedAlphaCLLoss(temperature=TAU, negatives=dense.__name__) for _ in range(2))
    contestants = {"ours": ours, "eager": dense, "two sweeps": without_steps(before)}
    if compiled:
        contestants["compile"] = torch.compile(dense)
    median = medians(contestants, z, rounds)
    faster = min(x for name, x in median.items() if name in ("eager", "compile"))
    return {
        "loss": "infonce", "negatives": dense.__name__, "pairs": n,
        "over_ours": over(median, "ours"), "faster_dense_over_ours": faster / median["ours"],
    }  # fmt: skip


def siglip(n: int, rounds: int) -> dict[str, Any]:
    """SigLIP of n pairs beside InfoNCE of the same rows, which keeps tiles or does not."""
    z = [torch.randn(n, DIM, requires_grad=True) for _ in range(2)]
    kept, again = (
        FusedAlphaCLLoss(temperature=TAU, negatives="cross_view", workspace=workspace)
        for workspace in (None, 0)
    )
    ours = SigLipLoss(1 / TAU, -10.0, learnable=False)
    contestants = {"ours": ours, "InfoNCE": kept, "InfoNCE, nothing kept": again}
    median = medians(contestants, z, rounds)
    return {"loss": "siglip", "pairs": n, "over_ours": over(median, "ours")}


def own_infonce() -> PairLoss:
    """InfoNCE as a user writes it, with constants of its own."""
    return PairLoss(phi=lambda x: TAU * torch.log1p(x), psi=lambda x: torch.exp(x / TAU))


def variants(n: int, rounds: int) -> dict[str, Any]:
    """What a user's function and options of InfoNCE cost beside InfoNCE of the same n pairs."""
    z = [torch.randn(n, DIM, requires_grad=True) for _ in range(2)]
    guide = tuple(torch.randn(n, DIM) for _ in range(2))
    ours, each = (FusedAlphaCLLoss(temperature=TAU, reduction=r) for r in ("mean", "none"))
    contestants = {
        "ours": ours,
        "own function": FusedAlphaCLLoss(own_infonce()),
        "reduction none": lambda *z: each(*z).mean(),
        "one side": lambda z1, z2: ours(z1, z2.detach()),
        "max_gap": FusedAlphaCLLoss(temperature=TAU, max_gap=0.1),
        "guide": lambda *z: ours(*z, guide=guide),
        "Matryoshka 128, 64, 32": MatryoshkaLoss(ours, (DIM, DIM // 2, DIM // 4)),
    }
    return {
        "loss": "variants",
        "pairs": n,
        "over_ours": over(medians(contestants, z, rounds), "ours"),
    }


def supcon(n: int, classes: int, rounds: int) -> dict[str, Any]:
    """SupCon's forms beside `alpha_cl_loss` on the halves, with the labels as ids."""
    z = [torch.randn(n, DIM, requires_grad=True) for _ in range(2)]
    ids = torch.randint(classes, (n,))
    loss = FusedAlphaCLLoss(temperature=TAU)

    def run(form: str) -> Callable[..., Tensor]:
        forms = SupConLoss(temperature=TAU, form=form)
        return lambda *z: forms(torch.cat(z), ids.repeat(2))

    contestants = {"ours": lambda *z: loss(*z, ids=ids)} | {
        form: run(form) for form in ("out", "in", "sincere")
    }
    median = medians(contestants, z, rounds)
    return {"loss": f"supcon, {classes} classes", "pairs": n, "over_ours": over(median, "ours")}


def rate(negatives: str, dim: int, dtype: str, pairs: int, rounds: int) -> dict[str, Any]:
    """Fraction of a large product's rate on 4n²D (8N²D in cross_view) operations, by workspace."""
    scalar = getattr(torch, dtype)
    z = [torch.randn(pairs, dim).to(scalar).requires_grad_() for _ in range(2)]
    a, b = torch.randn(2, PRODUCT, PRODUCT).to(scalar)
    contestants: dict[str, Callable[..., Tensor]] = {
        name: FusedAlphaCLLoss(temperature=TAU, negatives=negatives, workspace=workspace)
        for name, workspace in (("default", None), ("all tiles", ALL_TILES), ("none", 0))
    }
    times: dict[str, list[float]] = {name: [] for name in ("product", *contestants)}
    steps = max(1, int(0.05 / seconds(contestants["none"], z, 1)))
    for turn in range(rounds + 1):
        found = {}
        for name, loss in contestants.items():
            seconds(loss, z, 1)  # the product has emptied the caches
            found[name] = seconds(loss, z, steps)
        start = time.perf_counter()
        a @ b
        found["product"] = time.perf_counter() - start
        if turn:  # the first one warms up
            for name, each in found.items():
                times[name].append(each)
    median = {name: statistics.median(each) for name, each in times.items()}
    operations = (16 if negatives == "two_view" else 8) * pairs**2 * dim
    scale = operations / (2 * PRODUCT**3) * median.pop("product")
    return {
        "loss": "rate", "negatives": negatives, "dim": dim, "dtype": dtype, "pairs": pairs,
        "fractions": {name: scale / x for name, x in median.items()},
    }  # fmt: skip


def over(median: dict[str, float], name: str) -> dict[str, float]:
    """The others' medians over one contestant's."""
    return {other: x / median[name] for other, x in median.items() if other != name}


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    if "fractions" in row:
        found = ", ".join(f"{name} {x:.2f}" for name, x in row["fractions"].items())
        where = f"{row['negatives']} {row['pairs']}, D = {row['dim']}, {row['dtype']}"
        return f"fraction of the product's rate, {where}: {found}"
    ratios = [f"{name}/ours {ratio:.2f}" for name, ratio in row["over_ours"].items()]
    if "faster_dense_over_ours" in row:
        ratios.append(f"faster dense/ours {row['faster_dense_over_ours']:.2f}")
    return f"{row['loss']} {row.get('negatives', '')} {row['pairs']}: {', '.join(ratios)}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="separated by commas")
    parser.add_argument(
        "--sizes", default="16,32,64,128,256,512,1024,2048,4096",
        help=f"pairs; the rates have {PAIRS}",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    shared = {"dim": DIM, "temperature": TAU, "dtype": "float32", "rounds": options.rounds}
    shared |= provenance(torch.device("cpu"))
    sizes = [*map(int, options.sizes.split(","))]
    parts = options.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts must be some of {', '.join(PARTS)}, got {options.parts}")

    def rows() -> Iterator[dict[str, Any]]:
        if "infonce" in parts:
            for dense in (two_view, cross_view):
                for n in sizes:
                    torch._dynamo.reset()
                    yield infonce(dense, n, options.rounds, not options.no_compile)
        for name, measured in (("siglip", siglip), ("variants", variants)):
            if name in parts:
                yield from (measured(n, options.rounds) for n in sizes)
        if "supcon" in parts:
            yield from (supcon(max(sizes), k, options.rounds) for k in (10, 100, 1000))
        if "rate" in parts:
            for dim, dtype, pairs in RATES:
                for negatives in ("two_view", "cross_view"):
                    for n in pairs:
                        yield rate(negatives, dim, dtype, n, options.rounds)

    for row in rows():
        print(line(row), flush=True)
        if options.out:
            append(options.out, shared | row)


if __name__ == "__main__":
    main()
