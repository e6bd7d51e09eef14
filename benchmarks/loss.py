"""Times one setting: loss, gradient or both of several contestants, interleaved, in one process; one row per contestant.

On a CPU only ratios are kept: every time is divided by that of a 4096³ product of the same dtype in the same run. Work is
counted as 4n²D floating-point operations (two_view; 8N²D for cross_view), whatever a contestant does. A contestant whose
gradient is wrong is not timed. A contestant is a backend, ``eager``, ``compiled`` or a rival of `benchmarks.contestants`, with
an objective of its own after a slash if need be ("cpu/alpha_direct"). `benchmarks.bench` measures a grid of settings with it,
`tools.gpu` uses its functions on GPUs.
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

from .contestants import PACKAGES, Loss, make

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


def value(loss: Loss, z1: Tensor, z2: Tensor) -> Tensor:
    with torch.no_grad():
        return loss(z1, z2)


#: What is timed: the loss without a graph, as in evaluation; its backward alone; and both, as in training. A fused loss has
#: its gradient ready when the forward is over, so that its backward alone says little.
MEASURES = ("loss", "backward", "loss+gradient")


def timed(measure: str, loss: Loss, z1: Tensor, z2: Tensor) -> Callable[[], Any]:
    """What is run for a measure."""
    if measure == "backward":
        with _buffers_kept():
            result = loss(z1, z2)
        return lambda: torch.autograd.grad(result, [z1, z2], retain_graph=True)
    return functools.partial(value if measure == "loss" else gradient, loss, z1, z2)


def _buffers_kept() -> contextlib.AbstractContextManager[Any]:
    """In it torch.compile makes backwards that can run again; by default they take the graph's buffers for their own."""
    from torch._functorch import config

    torch.compiler.reset()
    return config.patch(donated_buffer=False) if hasattr(config, "donated_buffer") else contextlib.nullcontext()


def scaled_gradient(loss: Loss, z1: Tensor, z2: Tensor) -> tuple[Tensor, ...]:
    """That of N times the loss, which float16 can hold."""
    result = loss(z1, z2)
    return torch.autograd.grad(result, [z1, z2], torch.full_like(result, z1.shape[0]))


def oracle(setting: Setting, z1: Tensor, z2: Tensor, backend: str = "reference") -> tuple[Tensor, ...]:
    """`scaled_gradient` in float64."""
    wide = [z.detach().double().requires_grad_() for z in (z1, z2)]
    fixed = {"temperature": setting.tau, "negatives": setting.negatives, "backend": backend}
    return scaled_gradient(lambda a, b: alpha_cl_loss(a, b, setting.objective, **fixed), *wide)


def relative_error(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    return max(float((o.double() - t).norm() / t.norm()) for o, t in zip(ours, truth, strict=True))


class WrongGradient(Exception):
    """A contestant's gradient is further from float64 than its dtype can explain."""


def verify(loss: Loss, setting: Setting, device: torch.device) -> float:
    """Relative gradient error at a small size against the float64 oracle on the same inputs.

    Raises:
        WrongGradient: larger than the dtype can explain.
    """
    views = setting.views(device, min(setting.n // 2, 512))
    error = relative_error(scaled_gradient(loss, *views), oracle(setting, *views))
    if not error <= setting.gate:
        raise WrongGradient(f"gradient error {error:.2e} exceeds {setting.gate:.2e}: not timed")
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
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name, "capability": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else None,
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
        "alphacl_fast": alphacl_fast.__version__, "commit": commit(),
    }  # fmt: skip


@functools.cache
def processor() -> str:
    """The CPU's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({platform.machine()})" if names and names[0] else platform.machine()


def version(contestant: str) -> str | None:
    """Package and version of a rival."""
    package = PACKAGES.get(contestant)
    try:
        return package and f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return None


def kernels(contestant: str, setting: Setting, device: torch.device) -> Any:
    """What serves a contestant: the CPU backend's instruction set, or what ``configuration`` of another backend says."""
    if contestant == "cpu":
        return cpu.kernels_for(setting.torch_dtype)
    describe = getattr(ops.SWEEP_BACKENDS.get(contestant), "configuration", None)
    return describe(setting.torch_dtype, setting.dim, setting.n, device) if describe else None


def result(
    setting: Setting, contestant: str, times: Mapping[str, list[float]], key: str, device: torch.device, gemm_side: int,
    measure: str = "loss+gradient",
) -> dict[str, Any]:  # fmt: skip
    """The row of one contestant, whose times stand under ``key`` beside those of "gemm"."""
    low, median, high = (float(torch.tensor(times[key]).quantile(q)) for q in (0.2, 0.5, 0.8))
    gemm = statistics.median(times["gemm"])
    milliseconds = 1e3 if device.type == "cuda" else None  # absolute times only of a machine that runs nothing else
    return {
        "benchmark": measure, "contestant": contestant, "version": version(contestant), "objective": setting.objective,
        "negatives": setting.negatives, "kernels": kernels(contestant, setting, device), "n": setting.n,
        "dim": setting.dim, "dtype": setting.dtype, "repeats": len(times[key]),
        "median_in_gemms": median / gemm, "p20_in_gemms": low / gemm, "p80_in_gemms": high / gemm,
        "fraction_of_gemm_rate": setting.work / median / (2 * gemm_side**3 / gemm) if measure == "loss+gradient" else None,
        **{f"{name}_ms": milliseconds and value * milliseconds for name, value in
           (("median", median), ("p20", low), ("p80", high), ("gemm", gemm))},
    }  # fmt: skip


def run(
    setting: Setting, contestants: list[str], repeats: tuple[int, int], device: torch.device, budget: float = 30.0,
    measure: str = "loss+gradient", skipped: Callable[[str, str], None] = lambda contestant, why: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """All rows of one setting; as many repeats as fit into ``budget`` seconds, within ``repeats``."""
    torch.manual_seed(0)
    views = setting.views(device)
    settings, losses, errors = {}, {}, {}
    for contestant in contestants:
        name, _, own = contestant.partition("/")
        settings[contestant] = replace(setting, objective=own or setting.objective)
        loss = make(name, settings[contestant].objective, setting.negatives, setting.tau)
        try:
            errors[contestant] = verify(loss, settings[contestant], device)
        except WrongGradient as error:
            skipped(contestant, str(error))
            continue
        losses[contestant] = loss
    if not losses:
        return []
    a = torch.randn(GEMM, GEMM, device=device).to(setting.torch_dtype)
    runs = {"gemm": lambda: a @ a, **{key: timed(measure, loss, *views) for key, loss in losses.items()}}
    for run in runs.values():  # torch.compile compiles for these sizes
        run()
    rough = {name: seconds(run, device) for name, run in runs.items()}
    calls = {name: max(1, round(0.02 / took)) for name, took in rough.items()}
    one_round = sum(calls[name] * took for name, took in rough.items() if name != "gemm")
    times = interleaved(runs, device, max(repeats[0], min(repeats[1], int(budget / one_round))), calls, seldom=("gemm",))
    eager = statistics.median(times["eager"]) if "eager" in times else None
    return [
        {
            **result(settings[key], key.partition("/")[0], times, key, device, GEMM, measure), "gradient_error": errors[key],
            "speedup_over_eager": eager and eager / statistics.median(times[key]), "load_before": os.getloadavg()[0],
            **provenance(device),
        }
        for key in losses
    ]  # fmt: skip
