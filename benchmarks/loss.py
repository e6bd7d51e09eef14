"""Time one setting: loss, gradient or both of several implementations, interleaved in one process.

An implementation is a backend of this package or a baseline of `benchmarks.baselines`, optionally
with its own objective after a slash ("cpu/alpha_direct"); rows and flags call it a contestant. On a
CPU only ratios are kept: every time is divided by the time of a 4096³ GEMM of the same dtype in the
same run. Work counts as 4n²D floating-point operations (two_view; 8N²D for cross_view), whatever an
implementation does. An implementation whose gradient is wrong is not timed. `benchmarks.bench`
measures a grid of settings with this module, and `tools.gpu` uses its functions on GPUs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import alphacl_fast
from alphacl_fast import ops
from alphacl_fast.backend import cpu
from alphacl_fast.functional import alpha_cl_loss

from .baselines import BASELINES, Loss, make

GEMM = 4096


@dataclass(frozen=True)
class Setting:
    """The problem that all implementations of a table solve.

    The dtype "tf32" means float32 rows, multiplied in the precision that torch is set to.
    """

    n: int  # rows of both views, 2N
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
        """Floating-point operations of loss and gradient, by convention."""
        return (2 if self.negatives == "cross_view" else 4) * self.n**2 * self.dim

    @property
    def gate(self) -> float:
        """Largest relative gradient error that the dtype explains, with rounded unit rows."""
        low = {"tf32": 2**-7, "bfloat16": 2**-5, "float16": 2**-8}
        return low.get(self.dtype, 64 * torch.finfo(self.torch_dtype).eps)

    def views(self, device: torch.device, pairs: int | None = None) -> tuple[Tensor, Tensor]:
        """Draw two (N, D) views that require a gradient."""
        pairs = self.n // 2 if pairs is None else pairs
        views = structured_rows(2, pairs, self.dim, device, torch.float32)
        z1, z2 = (z.to(self.torch_dtype).requires_grad_() for z in views)
        return z1, z2


def structured_rows(
    views: int,
    rows: int,
    dim: int,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Draw ``views`` random (rows, dim) tensors that share a mean and a few dense directions.

    With unstructured rows the negatives contribute only a few per cent of the gradient, and a check
    in bfloat16 would miss their errors.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    mean, directions = normal(1, dim), normal(6, dim) / 6**0.5
    return [
        0.5 * mean + 0.7 * normal(rows, 6) @ directions + 0.5 * normal(rows, dim)
        for _ in range(views)
    ]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Measure the mean time of ``calls`` consecutive calls; on a GPU with CUDA events."""
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
    runs: Mapping[str, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    calls: Mapping[str, int] | None = None,
    seldom: tuple[str, ...] = (),
) -> dict[str, list[float]]:
    """Time each run ``repeats`` times, in turn, after a warm-up round.

    Args:
        runs: name → function.
        device: where they run.
        repeats: number of rounds.
        calls: name → calls per measurement (default 1).
        seldom: names that take part in a fifth of the rounds only.
    """
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


def value(loss: Loss, z1: Tensor, z2: Tensor) -> Tensor:
    with torch.no_grad():
        return loss(z1, z2)


#: The loss without a graph, as in evaluation; its backward alone; both, as in training. A fused
#: loss computes its gradient in the forward, so its backward alone is not representative.
MEASURES = ("loss", "backward", "loss+gradient")


def timed(measure: str, loss: Loss, z1: Tensor, z2: Tensor) -> Callable[[], Any]:
    """Build the function to time for a measure."""
    if measure == "backward":
        with _buffers_kept():
            result = loss(z1, z2)
        return lambda: torch.autograd.grad(result, [z1, z2], retain_graph=True)
    return functools.partial(value if measure == "loss" else gradient, loss, z1, z2)


def _buffers_kept() -> contextlib.AbstractContextManager[Any]:
    """Let compiled backwards run repeatedly; by default they reuse the graph's buffers."""
    from torch._functorch import config

    torch.compiler.reset()
    known = hasattr(config, "donated_buffer")
    return config.patch(donated_buffer=False) if known else contextlib.nullcontext()


def scaled_gradient(loss: Loss, z1: Tensor, z2: Tensor) -> tuple[Tensor, ...]:
    """Compute the gradient of N times the loss, which float16 can represent."""
    result = loss(z1, z2)
    return torch.autograd.grad(result, [z1, z2], torch.full_like(result, z1.shape[0]))


def oracle(
    setting: Setting, z1: Tensor, z2: Tensor, backend: str = "reference"
) -> tuple[Tensor, ...]:
    """Compute `scaled_gradient` in float64."""
    wide = [z.detach().double().requires_grad_() for z in (z1, z2)]
    fixed = {"temperature": setting.tau, "negatives": setting.negatives, "backend": backend}
    loss = functools.partial(alpha_cl_loss, objective=setting.objective, **fixed)
    return scaled_gradient(loss, *wide)


def relative_error(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    return max(float((o.double() - t).norm() / t.norm()) for o, t in zip(ours, truth, strict=True))


class WrongGradient(Exception):
    """The gradient's error exceeds what the dtype explains."""


def verify(loss: Loss, setting: Setting, device: torch.device) -> float:
    """Compare the gradient with the float64 oracle on the same inputs, at a small size.

    Returns:
        The relative error.

    Raises:
        WrongGradient: the error is larger than the dtype explains.
    """
    views = setting.views(device, min(setting.n // 2, 512))
    error = relative_error(scaled_gradient(loss, *views), oracle(setting, *views))
    if not error <= setting.gate:
        raise WrongGradient(f"gradient error {error:.2e} exceeds {setting.gate:.2e}: not timed")
    return error


def commit() -> str | None:
    """Return the checkout's commit, or ALPHACL_COMMIT outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        folder = Path(__file__).parent
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()
    except OSError:
        found = ""
    return os.environ.get("ALPHACL_COMMIT") or found or None


def provenance(device: torch.device) -> dict[str, Any]:
    """Describe where rows come from: device, versions, commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "capability": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "alphacl_fast": alphacl_fast.__version__,
        "commit": commit(),
    }


@functools.cache
def processor() -> str:
    """Return the CPU's name if the system knows it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({platform.machine()})" if names and names[0] else platform.machine()


def version(name: str) -> str | None:
    """Return package and version of a baseline."""
    package = BASELINES[name].package if name in BASELINES else None
    try:
        return package and f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return None


def kernels(name: str, setting: Setting, device: torch.device) -> Any:
    """Describe a backend's kernels: the CPU's instruction set, or another one's configuration."""
    if name == "cpu":
        return cpu.kernels_for(setting.torch_dtype)
    describe = getattr(ops.SWEEP_BACKENDS.get(name), "configuration", None)
    return describe(setting.torch_dtype, setting.dim, setting.n, device) if describe else None


def parse(contestant: str, setting: Setting) -> tuple[str, Setting]:
    """Split "NAME" or "NAME/OBJECTIVE" into the implementation's name and its own setting."""
    name, _, objective = contestant.partition("/")
    return name, replace(setting, objective=objective or setting.objective)


def heading(benchmark: str, name: str, setting: Setting, device: torch.device) -> dict[str, Any]:
    """Start the row of one implementation: the columns that all benchmarks share."""
    return {
        "benchmark": benchmark,
        "contestant": name,
        "version": version(name),
        "objective": setting.objective,
        "negatives": setting.negatives,
        "kernels": kernels(name, setting, device),
        "n": setting.n,
        "dim": setting.dim,
        "dtype": setting.dtype,
    }


def result(
    setting: Setting,
    name: str,
    times: Mapping[str, list[float]],
    key: str,
    device: torch.device,
    gemm_side: int,
    measure: str = "loss+gradient",
) -> dict[str, Any]:
    """Build the row of one implementation.

    Args:
        setting: the problem that it solved.
        name: name of the implementation.
        times: seconds of its calls, under ``key``, and of GEMMs in the same run, under "gemm".
        key: see ``times``.
        device: where it ran.
        gemm_side: side of the GEMMs' matrices.
        measure: one of ``MEASURES``.
    """
    quantiles = torch.tensor(times[key]).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()
    found = dict(zip(("median", "p20", "p80"), quantiles, strict=True))
    gemm = statistics.median(times["gemm"])
    rate = setting.work / found["median"] / (2 * gemm_side**3 / gemm)
    row = heading(measure, name, setting, device) | {"repeats": len(times[key])}
    row |= {f"{label}_in_gemms": took / gemm for label, took in found.items()}
    row["fraction_of_gemm_rate"] = rate if measure == "loss+gradient" else None
    for label, took in {**found, "gemm": gemm}.items():
        # Absolute times are kept only from a machine that runs nothing else.
        row[f"{label}_ms"] = 1e3 * took if device.type == "cuda" else None
    return row


def run(
    setting: Setting,
    contestants: list[str],
    repeats: tuple[int, int],
    device: torch.device,
    budget: float = 30.0,
    measure: str = "loss+gradient",
    skipped: Callable[[str, str], None] = lambda contestant, why: None,
) -> list[dict[str, Any]]:
    """Time one setting; returns one row per implementation.

    Args:
        setting: the problem.
        contestants: "NAME" or "NAME/OBJECTIVE" of each implementation.
        repeats: fewest and most rounds.
        device: where to run.
        budget: seconds that the rounds should fit into.
        measure: one of ``MEASURES``.
        skipped: called with an implementation whose gradient is wrong, and the error.
    """
    torch.manual_seed(0)
    views = setting.views(device)
    losses, errors = {}, {}
    for contestant in contestants:
        name, own = parse(contestant, setting)
        loss = make(name, own.objective, own.negatives, own.tau)
        try:
            errors[contestant] = verify(loss, own, device)
        except WrongGradient as error:
            skipped(contestant, str(error))
            continue
        losses[contestant] = loss
    if not losses:
        return []
    a = torch.randn(GEMM, GEMM, device=device).to(setting.torch_dtype)
    runs = {"gemm": lambda: a @ a}
    runs |= {key: timed(measure, loss, *views) for key, loss in losses.items()}
    for run in runs.values():  # torch.compile compiles for these sizes
        run()
    rough = {key: seconds(run, device) for key, run in runs.items()}
    calls = {key: max(1, round(0.02 / took)) for key, took in rough.items()}
    one_round = sum(calls[key] * took for key, took in rough.items() if key != "gemm")
    rounds = max(repeats[0], min(repeats[1], int(budget / one_round)))
    times = interleaved(runs, device, rounds, calls, seldom=("gemm",))
    eager = statistics.median(times["eager"]) if "eager" in times else None
    rows = []
    for key in losses:
        name, own = parse(key, setting)
        row = result(own, name, times, key, device, GEMM, measure)
        row["gradient_error"] = errors[key]
        row["speedup_over_eager"] = eager and eager / statistics.median(times[key])
        rows.append({**row, "load_before": os.getloadavg()[0], **provenance(device)})
    return rows
