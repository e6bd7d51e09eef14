"""How fast one checkout is beside another.

    python tests/same_speed.py OLD_CHECKOUT [--rounds R] [--only SUBSTRING] [--pairs 16,32,…]
                               [--strict] [--out FILE]

Two processes, one for each checkout, take turns at the same forward and backward, on one thread. A
row is the ratio of their medians, new ÷ old, with the quartiles of the rounds' own ratios; --strict
makes a ratio above 1.03 an error. A quiet machine is needed. ALPHACL_CPU_ISA=avx2 keeps both from
wider instructions.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1.03
#: Seconds of one turn, at least one step of the loss.
TURN = 0.15
SIZES, DIM = (256, 1024, 4096), 128
OBJECTIVES = (
    ("infonce", {}),
    ("triplet", {}),
    ("alpha_direct", {}),
    ("alpha_direct", {"detach_alpha": False}),
    ("alpha_square", {}),
)
DTYPES = ("float32", "bfloat16")


def cases(sizes: Sequence[int]) -> list[dict]:
    return [
        {"n": n, "negatives": negatives, "objective": name, "options": options, "dtype": dtype}
        for n in sizes
        for negatives in ("two_view", "cross_view")
        for name, options in OBJECTIVES
        for dtype in DTYPES
    ]


def title(case: dict) -> str:
    options = ",".join(f"{k}={v}" for k, v in case["options"].items())
    return f"{case['n']} {case['negatives']} {case['dtype']} {case['objective']}({options})"


def serve() -> None:
    """Seconds of a step for each case on the standard input, in one turn."""
    import torch

    from alphacl_fast import FusedAlphaCLLoss

    torch.set_num_threads(1)
    made: dict[str, tuple] = {}
    for line in sys.stdin:
        case = json.loads(line)
        if line not in made:
            made.clear()
            generator = torch.Generator().manual_seed(0)
            z = [
                torch.randn(case["n"], DIM, generator=generator).to(getattr(torch, case["dtype"]))
                for _ in range(2)
            ]
            loss = FusedAlphaCLLoss(
                case["objective"], negatives=case["negatives"], **case["options"]
            )
            made[line] = loss, [x.requires_grad_() for x in z]
            loss(*made[line][1]).backward()
        loss, z = made[line]
        steps, start = 0, time.perf_counter()
        while steps == 0 or time.perf_counter() - start < TURN:
            loss(*z).backward()
            steps += 1
        print((time.perf_counter() - start) / steps, flush=True)


class Checkout:
    """A process that times steps of one checkout."""

    def __init__(self, root: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(root), "--serve"],
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, case: dict) -> float:
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"the process of a checkout ended at {title(case)}")
        return float(answer)


def provenance(old: Path) -> dict:
    """What a row says about the machine and both checkouts."""
    import torch

    from alphacl_fast.backend import cpu
    from alphacl_fast.benchmarks import loss

    torch.set_num_threads(1)
    commit = subprocess.run(
        ["git", "-C", str(old), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return loss.provenance(torch.device("cpu")) | {
        "dim": DIM,
        "before": commit.stdout.strip() or None,
        "kernels": cpu.instruction_set(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="the other checkout, compiled")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each checkout in a row")
    parser.add_argument("--only", default="", help="only rows with this text")
    parser.add_argument("--pairs", default=",".join(map(str, SIZES)), help="sizes, in pairs")
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    parser.add_argument("--strict", action="store_true", help=f"a ratio above {LIMIT} is an error")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return 0
    print(shlex.join([sys.executable, *sys.argv]))
    print(f"{'new/old':>8} {'quartiles':>13}  {'old':>9}  loss and gradient, D = {DIM}", flush=True)
    old, new = Checkout(options.old.resolve()), Checkout(ROOT)
    slower = 0
    about = provenance(options.old.resolve()) if options.out else {}
    sizes = [*map(int, options.pairs.split(","))]
    for case in (c for c in cases(sizes) if options.only in title(c)):
        rounds = []
        for k in range(options.rounds + 1):  # whoever is first in one round is second in the next
            turns = (old, new) if k % 2 else (new, old)
            seconds = {checkout: checkout.seconds(case) for checkout in turns}
            rounds.append((seconds[old], seconds[new]))
        before, after = zip(*rounds[1:], strict=True)  # the first one warms up
        ratio = statistics.median(after) / statistics.median(before)
        each = sorted(b / a for a, b in rounds[1:])
        low, high = each[len(each) // 4], each[-1 - len(each) // 4]
        slower += ratio > LIMIT
        times = f"{ratio:8.3f} {low:6.3f}–{high:.3f}  {statistics.median(before) * 1e3:6.2f} ms"
        print(f"{times}  {title(case)}", flush=True)
        if options.out:
            found = {"loss": case["objective"], "pairs": case["n"], "over_before": ratio}
            named = {key: case[key] for key in ("negatives", "dtype", "options")}
            with options.out.open("a") as file:
                file.write(json.dumps(found | named | about) + "\n")
    for checkout in (old, new):
        checkout.process.stdin.close()
        checkout.process.wait()
    return 1 if options.strict and slower else 0


if __name__ == "__main__":
    sys.exit(main())
