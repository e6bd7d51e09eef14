"""Times loss + gradient of backends and of eager PyTorch, interleaved, in one process; one JSON row per contestant.

    python -m benchmarks.loss --n 16384 --dim 128 --out benchmarks/results/cpu.jsonl

On a CPU only ratios are kept: every time is divided by that of a 4096³ product of the same dtype in the same run. Work is
counted as 4n²D floating-point operations (two_view; 8N²D for cross_view), whatever a contestant does. A contestant whose
gradient is wrong is not timed. A contestant is a backend, ``eager`` or a rival of `benchmarks.contestants`, with an objective
of its own after a slash if need be: ``--contestants cpu,cpu/alpha_direct,cpu/triplet``. Absent rivals are skipped by name.
`benchmarks.gpu` measures on GPUs with the functions of this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import alphacl_fast
from alphacl_fast import ops
from alphacl_fast.backend import cpu
from alphacl_fast.functional import alpha_cl_loss

from .contestants import Loss, make, missing

GEMM = 4096


@dataclass(frozen=True)
class Setting:
    """What every contestant of a table computes. ``dtype`` "tf32" is float32 rows, multiplied as torch is set to."""

    n: int  # rows, 2N
    dim: int = 128
    dtype: str = "float32"
    objective: str = "infonce"
    negatives: str = "two_view"
    tau: float = 0.5

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)

    @property
    def work(self) -> float:
        """Floating-point operations of loss and gradient."""
        return (2 if self.negatives == "cross_view" else 4) * self.n**2 * self.dim

    @property
    def gate(self) -> float:
        """Largest relative gradient error that the dtype can explain; rows rounded after normalisation included."""
        return {"tf32": 2**-7, "bfloat16": 2**-5, "float16": 2**-8}.get(self.dtype, 64 * torch.finfo(self.torch_dtype).eps)

    def views(self, device: torch.device, pairs: int | None = None) -> tuple[Tensor, Tensor]:
        """Two (N, D) views that require grad."""
        z1, z2 = structured_rows(2, self.n // 2 if pairs is None else pairs, self.dim, device, torch.float32)
        return z1.to(self.torch_dtype).requires_grad_(), z2.to(self.torch_dtype).requires_grad_()


def structured_rows(
    views: int, rows: int, dim: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator | None = None
) -> list[Tensor]:
    """``views`` random (rows, dim) tensors that share a mean and a few directions, spread over all features.

    Of rows without structure the negatives' part of a gradient is a few per cent, so that no check in bfloat16 would see it.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    mean, directions = normal(1, dim), normal(6, dim) / 6**0.5
    return [0.5 * mean + 0.7 * normal(rows, 6) @ directions + 0.5 * normal(rows, dim) for _ in range(views)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Time of one of ``calls`` calls in a row, on a GPU by events."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    synchronize(device)
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    synchronize(device)
    return begin.elapsed_time(end) / 1e3 / calls


def interleaved(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int, calls: Mapping[str, int] | None = None,
    seldom: tuple[str, ...] = (),
) -> dict[str, list[float]]:  # fmt: skip
    """``repeats`` times of each run (a fifth of that for those in ``seldom``), taken in turn, after a round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            if name in seldom and repeat % max(1, repeats // 5):
                continue
            took = seconds(run, device, (calls or {}).get(name, 1))
            if repeat:
                times[name].append(took)
    return times


def gradient(loss: Loss, z1: Tensor, z2: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(z1, z2), [z1, z2])


def scaled_gradient(loss: Loss, z1: Tensor, z2: Tensor) -> tuple[Tensor, ...]:
    """That of N times the loss, which float16 can hold."""
    value = loss(z1, z2)
    return torch.autograd.grad(value, [z1, z2], torch.full_like(value, z1.shape[0]))


def oracle(setting: Setting, z1: Tensor, z2: Tensor, backend: str = "reference") -> tuple[Tensor, ...]:
    """`scaled_gradient` in float64."""
    wide = [z.detach().double().requires_grad_() for z in (z1, z2)]
    fixed = {"temperature": setting.tau, "negatives": setting.negatives, "backend": backend}
    return scaled_gradient(lambda a, b: alpha_cl_loss(a, b, setting.objective, **fixed), *wide)


def relative_error(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    return max(float((o.double() - t).norm() / t.norm()) for o, t in zip(ours, truth, strict=True))


def verify(loss: Loss, setting: Setting, device: torch.device) -> float:
    """Relative gradient error at a small size against the float64 oracle on the same inputs.

    Raises:
        SystemExit: larger than the dtype can explain.
    """
    views = setting.views(device, min(setting.n // 2, 512))
    error = relative_error(scaled_gradient(loss, *views), oracle(setting, *views))
    if not error <= setting.gate:
        raise SystemExit(f"benchmarks.loss: gradient error {error:.2e} exceeds {setting.gate:.2e}: not timed")
    return error


def commit() -> str | None:
    """The checkout's commit, or what ALPHACL_COMMIT says where there is no git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        found = ""
    return os.environ.get("ALPHACL_COMMIT") or found or None


def provenance(device: torch.device) -> dict[str, Any]:
    """Where the rows come from: device, versions, commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": name, "capability": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else None,
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
        "alphacl_fast": alphacl_fast.__version__, "commit": commit(),
    }  # fmt: skip


def kernels(contestant: str, setting: Setting, device: torch.device) -> Any:
    """What serves a contestant: the CPU backend's instruction set, or what ``configuration`` of another backend says."""
    if contestant == "cpu":
        return cpu.engine(setting.torch_dtype)
    describe = getattr(ops.SWEEP_BACKENDS.get(contestant), "configuration", None)
    return describe(setting.torch_dtype, setting.dim, setting.n, device) if describe else None


def result(
    setting: Setting, contestant: str, times: Mapping[str, list[float]], key: str, device: torch.device, gemm_side: int
) -> dict[str, Any]:
    """The row of one contestant, whose times stand under ``key`` beside those of "gemm"."""
    low, median, high = (float(torch.tensor(times[key]).quantile(q)) for q in (0.2, 0.5, 0.8))
    gemm = statistics.median(times["gemm"])
    milliseconds = 1e3 if device.type == "cuda" else None  # absolute times only of a machine that runs nothing else
    return {
        "benchmark": "loss+gradient", "contestant": contestant, "objective": setting.objective,
        "negatives": setting.negatives, "kernels": kernels(contestant, setting, device), "n": setting.n,
        "dim": setting.dim, "dtype": setting.dtype, "repeats": len(times[key]),
        "median_in_gemms": median / gemm, "p20_in_gemms": low / gemm, "p80_in_gemms": high / gemm,
        "fraction_of_gemm_rate": setting.work / median / (2 * gemm_side**3 / gemm),
        **{f"{name}_ms": milliseconds and value * milliseconds for name, value in
           (("median", median), ("p20", low), ("p80", high), ("gemm", gemm))},
    }  # fmt: skip


def run(setting: Setting, contestants: list[str], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """All rows of one setting; a contestant may name an objective of its own after a slash."""
    torch.manual_seed(0)
    views = setting.views(device)
    settings, losses = {}, {}
    for contestant in contestants:
        name, _, own = contestant.partition("/")
        if missing(name):
            print(f"{name} skipped: {missing(name)}", file=sys.stderr)
            continue
        settings[contestant] = replace(setting, objective=own or setting.objective)
        losses[contestant] = make(name, settings[contestant].objective, setting.negatives, setting.tau)
    errors = {key: verify(loss, settings[key], device) for key, loss in losses.items()}
    a = torch.randn(GEMM, GEMM, device=device).to(setting.torch_dtype)
    runs = {"gemm": lambda: a @ a, **{key: lambda loss=loss: gradient(loss, *views) for key, loss in losses.items()}}
    times = interleaved(runs, device, repeats, seldom=("gemm",))
    eager = statistics.median(times["eager"]) if "eager" in times else None
    return [
        {
            **result(settings[key], key.partition("/")[0], times, key, device, GEMM), "gradient_error": errors[key],
            "speedup_over_eager": eager and eager / statistics.median(times[key]), **provenance(device),
        }
        for key in losses
    ]  # fmt: skip


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
    setting = Setting(args.n, args.dim, args.dtype, args.objective, args.negatives, args.tau)
    try:
        rows = run(setting, args.contestants, args.repeats, torch.device(args.device))
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
