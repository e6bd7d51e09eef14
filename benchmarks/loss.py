"""Time one setting: loss, gradient or both of several implementations, interleaved in one process.

An implementation is a backend of this package or a baseline of `benchmarks.baselines`, optionally
with its own objective after a slash ("cpu/alpha_direct"); rows and flags call it a contestant. On a
CPU only ratios are kept: every time is divided by the time of a 4096³ GEMM of the same dtype in the
same run. Work counts as 4n²D floating-point operations (two_view; 8N²D for cross_view), whatever an
implementation does. An implementation whose gradient is wrong is not timed. `benchmarks.bench`
measures a grid of settings with this module, and `tools.gpu` its own list of them on GPUs.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import alphacl_fast
from alphacl_fast import ops
from alphacl_fast.accuracy import matmul_precision, structured_rows
from alphacl_fast.backend import cpu
from alphacl_fast.journal import Row

from .baselines import BASELINES, TASKS, Loss, make, missing

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

    def loss(self, name: str) -> Loss:
        """Build the loss of a baseline, or of a backend of this package."""
        return make(name, self.objective, self.negatives, self.tau)

    def views(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw two (N, D) views that require a gradient."""
        views = structured_rows(2, self.n // 2, self.dim, device, torch.float32)
        return tuple(z.to(self.torch_dtype).requires_grad_() for z in views)


@dataclass(frozen=True)
class Effort:
    """How long, and on which data, the implementations of a table are checked and timed."""

    repeats: tuple[int, int] = (5, 25)  # fewest and most rounds
    budget: float = 30.0  # seconds that the rounds should fit into
    gemm_side: int = GEMM  # side of the GEMM's matrices
    sample: float = 0.02  # seconds of consecutive calls per measurement
    inputs: int = 1  # sets of inputs, which successive calls take in turn
    checked_rows: int = 1024  # most rows on which gradients are checked
    own_gate: float = 1.0  # this package's backends may have so much of the gate; baselines all


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


def peak_extra_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Measure a call's peak GPU memory, in bytes on top of earlier allocations.

    On a CPU the call runs and the result is None.
    """
    if device.type != "cuda":
        run()
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    calls: Mapping[str, int],
) -> dict[str, list[float]]:
    """Time each run ``repeats`` times, in turn, after a warm-up round.

    Args:
        runs: name → function; "gemm" takes part in a fifth of the rounds only.
        device: where they run.
        repeats: number of rounds.
        calls: name → calls per measurement.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            if name == "gemm" and repeat % max(1, repeats // 5):
                continue
            took = seconds(run, device, calls[name])
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


def relative_error(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    return max(float((o.double() - t).norm() / t.norm()) for o, t in zip(ours, truth, strict=True))


@functools.lru_cache(maxsize=2)
def _solved(setting: Setting, device: torch.device) -> tuple[tuple[Tensor, ...], ...]:
    """Draw views, and compute `scaled_gradient` on them in float64."""
    views = setting.views(device)
    wide = [z.detach().double().requires_grad_() for z in views]
    blocked = setting.n > 4096 or setting.objective in TASKS
    exact = setting.loss("blocked" if blocked else "reference")
    return views, scaled_gradient(exact, *wide)


def gradient_error(loss: Loss, setting: Setting, device: torch.device, rows: int = 1024) -> float:
    """Compare the gradient with float64 on the same inputs, of ``rows`` rows at most."""
    views, truth = _solved(replace(setting, n=min(setting.n, rows)), device)
    return relative_error(scaled_gradient(loss, *views), truth)


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


def heading(benchmark: str, name: str, setting: Setting, device: torch.device) -> Row:
    """Start the row of one implementation: the columns that all benchmarks share."""
    return {
        "benchmark": benchmark,
        "contestant": name,
        "version": version(name),
        "kernels": kernels(name, setting, device),
        **asdict(setting),
    }


def statistics_of(setting: Setting, took: list[float], gemms: list[float], side: int) -> Row:
    """Compute the columns of one implementation's times.

    Args:
        setting: the problem that it solved.
        took: seconds of its calls.
        gemms: seconds of GEMMs in the same run.
        side: side of the GEMMs' matrices.
    """
    quantiles = torch.tensor(took).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()
    found = dict(zip(("median", "p20", "p80"), quantiles, strict=True))
    gemm = statistics.median(gemms)
    return {
        "repeats": len(took),
        **{f"{label}_in_gemms": value / gemm for label, value in found.items()},
        "fraction_of_gemm_rate": setting.work / found["median"] / (2 * side**3 / gemm),
        **{f"{label}_ms": 1e3 * value for label, value in {**found, "gemm": gemm}.items()},
    }


def checked(
    name: str, setting: Setting, device: torch.device, effort: Effort
) -> tuple[Loss | None, Row]:
    """Build an implementation and check its gradient.

    Returns:
        The loss, None if it cannot be timed; and the columns that say so.
    """
    if absent := missing(name):
        return None, {"status": "skipped", "error": absent}
    try:
        loss = setting.loss(name)
        error = gradient_error(loss, setting, device, effort.checked_rows)
    except Exception as problem:
        return None, failure(problem)
    gate = setting.gate * (effort.own_gate if name in ops.SWEEP_BACKENDS else 1)
    if error <= gate:
        return loss, {"status": "ok", "gradient_error": error}
    why = f"gradient error {error:.2e} of {setting.objective} exceeds {gate:.2e}: not timed"
    return None, {"status": "wrong", "error": why, "gradient_error": error}


def failure(error: Exception) -> Row:
    status = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "error"
    return {"status": status, "error": f"{type(error).__name__}: {str(error)[:400]}"}


def run(
    setting: Setting,
    contestants: list[str],
    device: torch.device,
    effort: Effort,
    measure: str = "loss+gradient",
    needs: str | None = None,
) -> Iterator[Row]:
    """Check and time one setting; yields one row per implementation, with its ``status``.

    Args:
        setting: the problem.
        contestants: "NAME" or "NAME/OBJECTIVE" of each implementation.
        device: where to run.
        effort: how long to measure.
        measure: one of ``MEASURES``.
        needs: an implementation without which none is timed.
    """
    torch.manual_seed(0)
    with matmul_precision(setting.dtype):
        losses, owns, rows = {}, {}, {}
        for contestant in contestants:
            name, own = parse(contestant, setting)
            owns[contestant] = own
            loss, found = checked(name, own, device, effort)
            rows[contestant] = {**heading(measure, name, own, device), **found}
            if loss is None:
                yield rows[contestant]
            else:
                losses[contestant] = loss
        _solved.cache_clear()
        if not losses or needs not in (None, *losses):
            return
        sets = [setting.views(device) for _ in range(effort.inputs)]
        side = effort.gemm_side
        a, b = (torch.randn(side, side, device=device).to(setting.torch_dtype) for _ in range(2))
        runs: dict[str, Callable[[], Any]] = {"gemm": lambda: a @ b}
        for key, loss in losses.items():
            try:
                turns = itertools.cycle([timed(measure, loss, *views) for views in sets])
                runs[key] = lambda turns=turns: next(turns)()
                # The first call also loads kernels, and compiles for these sizes.
                rows[key]["peak_extra_bytes"] = peak_extra_bytes(runs[key], device)
            except torch.OutOfMemoryError as problem:  # the check's inputs were smaller
                runs.pop(key, None)
                yield {**rows[key], **failure(problem)}
        if len(runs) == 1:  # the GEMM alone
            return
        runs["gemm"]()
        rough = {key: seconds(run, device) for key, run in runs.items()}
        calls = {key: max(1, round(effort.sample / took)) for key, took in rough.items()}
        one_round = sum(calls[key] * took for key, took in rough.items() if key != "gemm")
        fewest, most = effort.repeats
        rounds = max(fewest, min(most, int(effort.budget / one_round)))
        times = interleaved(runs, device, rounds, calls)
        gemms = times.pop("gemm")
        medians = {key: statistics.median(took) for key, took in times.items()}
        for key, took in times.items():
            row = rows[key] | statistics_of(owns[key], took, gemms, side)
            if measure != "loss+gradient":
                row["fraction_of_gemm_rate"] = None
            if device.type != "cuda":  # absolute times only from a machine that runs nothing else
                row |= {label: None for label in row if label.endswith("_ms")}
            for other in ("eager", "compiled"):
                base = medians.get(other)
                row[f"speedup_over_{other}"] = base and base / medians[key]
            yield {**row, "calls_per_sample": calls[key]}
