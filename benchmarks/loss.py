"""Times loss + gradient of backends and of eager PyTorch, interleaved, in one process; one JSON row per contestant.

    python -m benchmarks.loss --n 16384 --dim 128 --out benchmarks/results/cpu.jsonl

On a CPU only ratios are kept: every time is divided by that of a 4096³ product of the same dtype in the same run. Work is
counted as 4n²D floating-point operations (two_view; 8N²D for cross_view), whatever a contestant does. A contestant whose
gradient is wrong is not timed. A contestant is a backend, ``eager`` or a rival of `benchmarks.contestants`, with an objective
of its own after a slash if need be: ``--contestants cpu,cpu/alpha_direct,cpu/triplet``. Absent rivals are skipped by name.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import alphacl_fast
from alphacl_fast.backend import cpu
from alphacl_fast.functional import alpha_cl_loss

from .contestants import Loss, make, missing

GEMM = 4096


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def gradient(loss: Loss, z1: Tensor, z2: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(z1, z2), [z1, z2])


def split(contestant: str, objective: str) -> tuple[str, str]:
    """Name and objective of a contestant."""
    name, _, own = contestant.partition("/")
    return name, own or objective


def verify(loss: Loss, objective: str, args: argparse.Namespace, device: torch.device) -> float:
    """Relative gradient error at a small size against the float64 oracle on the same inputs.

    Raises:
        SystemExit: larger than the dtype can explain.
    """
    pairs = min(args.n // 2, 512)
    z1, z2 = (torch.randn(pairs, args.dim, device=device).to(args.torch_dtype).requires_grad_() for _ in range(2))
    ours = gradient(loss, z1, z2)
    wide = [z.detach().double().requires_grad_() for z in (z1, z2)]
    truth = torch.autograd.grad(
        alpha_cl_loss(
            *wide, objective, temperature=args.tau, negatives=args.negatives, backend="reference"
        ),
        wide,
    )  # fmt: skip
    error = max(float((o.double() - t).norm() / t.norm()) for o, t in zip(ours, truth, strict=True))
    bound = 64 * torch.finfo(args.torch_dtype).eps
    if not error <= bound:
        raise SystemExit(f"benchmarks.loss: gradient error {error:.2e} exceeds {bound:.2e}: not timed")
    return error


def provenance(device: torch.device) -> dict[str, Any]:
    """Where the rows come from: device, versions, commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": name, "capability": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else None,
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
        "alphacl_fast": alphacl_fast.__version__, "commit": commit or None,
    }  # fmt: skip


def kernels(contestant: str, dtype: torch.dtype) -> str | None:
    """Instruction set of the compiled CPU backend."""
    return cpu.engine(dtype) if split(contestant, "")[0] == "cpu" else None


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one setting."""
    device = torch.device(args.device)
    args.torch_dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    pairs = args.n // 2
    z1, z2 = (torch.randn(pairs, args.dim, device=device).to(args.torch_dtype).requires_grad_() for _ in range(2))
    losses = {}
    for contestant in args.contestants:
        name, objective = split(contestant, args.objective)
        if missing(name):
            print(f"{name} skipped: {missing(name)}", file=sys.stderr)
            continue
        losses[contestant] = make(name, objective, args.negatives, args.tau)
    errors = {name: verify(loss, split(name, args.objective)[1], args, device) for name, loss in losses.items()}
    a = torch.randn(GEMM, GEMM, device=device).to(args.torch_dtype)
    times: dict[str, list[float]] = {name: [] for name in ("gemm", *losses)}
    for repeat in range(args.repeats + 1):
        order = [("gemm", lambda: a @ a)] if repeat % max(1, args.repeats // 5) == 0 else []
        order += [(name, lambda loss=loss: gradient(loss, z1, z2)) for name, loss in losses.items()]
        for name, call in order:
            took = seconds(call, device)
            if repeat:  # the first round warms up
                times[name].append(took)
    gemm = statistics.median(times["gemm"])
    work = (4 * args.n**2 if args.negatives != "cross_view" else 8 * pairs**2) * args.dim
    rows = []
    for name in losses:
        low, median, high = (float(torch.tensor(times[name]).quantile(q)) for q in (0.2, 0.5, 0.8))
        row = {
            "benchmark": "loss+gradient", "contestant": split(name, "")[0], "objective": split(name, args.objective)[1],
            "negatives": args.negatives, "kernels": kernels(name, args.torch_dtype),
            "n": args.n, "dim": args.dim, "dtype": args.dtype, "repeats": args.repeats, "gradient_error": errors[name],
            "median_in_gemms": median / gemm, "p20_in_gemms": low / gemm, "p80_in_gemms": high / gemm,
            "fraction_of_gemm_rate": work / median / (2 * GEMM**3 / gemm),
            "speedup_over_eager": statistics.median(times["eager"]) / median if "eager" in times else None,
            "median_ms": median * 1e3 if device.type == "cuda" else None, **provenance(device),
        }  # fmt: skip
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=4096, help="rows, 2N (default: 4096)")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"))
    parser.add_argument("--objective", default="infonce", choices=alphacl_fast.objectives.names())
    parser.add_argument("--negatives", default="two_view", choices=("two_view", "one_view", "cross_view"))
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--contestants", default="eager,blocked,cpu", type=lambda text: text.split(","))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="append the rows to this file (JSON lines)")
    args = parser.parse_args(arguments)
    if args.n < 4 or args.n % 2:
        parser.error(f"--n must be even and at least 4, got {args.n}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        rows = run(args)
    except ValueError as error:
        parser.error(str(error))
    for row in rows:
        speedup = row["speedup_over_eager"]
        print(
            f"{row['contestant']:>10}  {row['objective']} {row['negatives']} n={row['n']} D={row['dim']} {row['dtype']}: "
            f"{row['fraction_of_gemm_rate']:.3f} of the GEMM rate"
            + (f", {speedup:.2f}x eager" if speedup else "")
            + f", gradient error {row['gradient_error']:.1e}"
        )
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
