"""Measures times of loss and gradient, the kernels of a step, and replays of a CUDA graph.

On a CPU, where the script is tried out, a captured step just runs again, and PyTorch's operators
take the place of kernels.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphacl_fast import ops
from alphacl_fast.accuracy import status
from alphacl_fast.backend import cuda
from alphacl_fast.benchmarks import loss as benchmark
from alphacl_fast.benchmarks.loss import Effort, Setting, gradient, scaled_gradient
from alphacl_fast.journal import Row
from alphacl_fast.kernels import config

from . import engines


@dataclass(frozen=True)
class Timing:
    """An engine or a baseline, and the problem that it solves; ``n`` counts both views' rows."""

    contestant: str
    n: int
    dim: int = 128
    dtype: str = "bfloat16"
    objective: str = "infonce"
    negatives: str = "two_view"

    @property
    def setting(self) -> Setting:
        return Setting(self.n, self.dim, self.dtype, self.objective, self.negatives)

    @property
    def backend(self) -> str:
        return engines.backend_of(self.contestant)

    def within(self) -> contextlib.AbstractContextManager[Any]:
        return engines.within(self.contestant, self.dim, self.setting.torch_dtype)


# --- the device -----------------------------------------------------------------------------------


def identify(item: Row, device: str) -> Iterator[Row]:
    """Describe the machine; tell which engines serve it, and why the others do not."""
    here = torch.device(device)
    row = benchmark.provenance(here)
    with contextlib.suppress(ImportError):
        import triton

        row["triton"] = triton.__version__
    if here.type == "cuda":
        properties = torch.cuda.get_device_properties(here)
        row |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "table": config.device_name(here),
            "cuda": torch.version.cuda, "driver": driver_version(),
        }  # fmt: skip
    names = ["cpu", "blocked"] if here.type == "cpu" else list(engines.ENGINES)
    refused = {
        name: ops.unsupported(engines.backend_of(name), here, torch.bfloat16, None, "exp")
        for name in names
        if engines.backend_of(name) in ops.SWEEP_BACKENDS
    }
    if refused.get("cuda_hopper", "") is None and not cuda._has_hopper(here):
        refused["cuda_hopper"] = "the library or the device has no warpgroup kernels (sm_90a)"
    yield {**row, "benchmark": "device", "status": "ok", "refused": refused}


def driver_version() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=5).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said[0] if said else None


@contextlib.contextmanager
def synchronization_forbidden(device: torch.device) -> Iterator[None]:
    """Raise an error on any host–device synchronisation."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(
    step: Callable[..., tuple[Tensor, ...]], views: tuple[Tensor, ...], device: torch.device
) -> Callable:
    """Capture ``step`` in a CUDA graph; return a function that replays it.

    The function takes new views, or none to use the last ones again. On a CPU it runs the step.
    """
    static = [z.detach().clone().requires_grad_() for z in views]
    outputs: tuple[Tensor, ...] = ()
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(*static)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step(*static)

    def replay(*new: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            for mine, theirs in zip(static, new, strict=False):
                mine.copy_(theirs)
        if device.type != "cuda":
            return step(*static)
        graph.replay()
        return outputs

    return replay


def device_events(
    run: Callable[[], Any], device: torch.device, steps: int
) -> list[tuple[str, float]]:
    """List (name, microseconds) of the kernels that ``steps`` calls launch.

    On a CPU, list PyTorch's operators.
    """
    wanted = ("kernel", "gpu_memcpy", "gpu_memset") if device.type == "cuda" else ("cpu_op",)
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    run()
    benchmark.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            run()
        benchmark.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [
        (event["name"], float(event["dur"]))
        for event in events
        if event.get("cat") in wanted and "dur" in event
    ]


class Warm:
    """A step (loss and gradient), after its first call."""

    def __init__(self, timing: Timing, device: str) -> None:
        self.device = torch.device(device)
        setting = timing.setting
        self.loss, self.views = setting.loss(timing.backend), setting.views(self.device)
        self()
        benchmark.synchronize(self.device)

    def __call__(self) -> None:
        gradient(self.loss, *self.views)


# --- tasks ----------------------------------------------------------------------------------------


def measure(timing: Timing, device: str, effort: Effort) -> Iterator[Row]:
    """Time loss + gradient, unless the gradient is wrong.

    For this package's engines, rows about the replay of a CUDA graph and about kernels follow.
    """
    here, setting, name = torch.device(device), timing.setting, timing.contestant
    compiled: list[str] = []
    listening = engines.heard(compiled) if timing.backend == "triton" else contextlib.nullcontext()
    with timing.within(), listening:
        (row,) = benchmark.run(setting, [timing.backend], here, effort)
        yield {**row, "contestant": name, "compiled": compiled}
        if row["status"] != "ok" or name not in engines.ENGINES:
            return
        about = {**asdict(timing), "status": "ok"}
        step = Warm(timing, device)
        replay = captured(functools.partial(gradient, step.loss), step.views, here)
        runs = {"launched": step, "replay": replay}
        calls = dict.fromkeys(runs, row["calls_per_sample"])
        times = benchmark.interleaved(runs, here, 5, calls)
        before, replayed = map(statistics.median, times.values())
        yield {
            **about, "benchmark": "graph replay",
            "median_ms": replayed * 1e3 if here.type == "cuda" else None,
            "graph_over_launched": replayed / before,
        }  # fmt: skip
        yield {**about, "benchmark": "kernels", **kernels_of(step)}


def kernels_of(step: Warm) -> Row:
    """Measure the kernels of a step: their number and time in all, and those of each kernel."""
    steps, found = 3, defaultdict(list)
    for kernel, took in device_events(step, step.device, steps):
        found[kernel[:80]].append(took)
    slowest = sorted(found.items(), key=lambda item: -sum(item[1]))
    return {
        "launches": sum(map(len, found.values())) / steps,
        "microseconds": sum(map(sum, found.values())) / steps,
        "kernels_us": {name: (sum(t) / steps, len(t) / steps) for name, t in slowest[:12]},
    }


def no_synchronization(timing: Timing, device: str) -> Iterator[Row]:
    """Check that a warm step does not synchronise with the host."""
    with timing.within():
        step = Warm(timing, device)
        with synchronization_forbidden(step.device):
            step()
    yield {"benchmark": "synchronization", **asdict(timing), "status": "ok"}


def graph_replay(timing: Timing, device: str) -> Iterator[Row]:
    """Check that a captured step equals an ordinary step on new inputs."""
    here, setting = torch.device(device), timing.setting
    with timing.within():
        exact = functools.partial(scaled_gradient, setting.loss(timing.backend))
        replay = captured(exact, setting.views(here), here)
        errors = []
        for _ in range(2):
            views = setting.views(here)
            truth = tuple(g.double() for g in exact(*views))
            errors.append(benchmark.relative_error(replay(*views), truth))
    bound = 4 * torch.finfo(setting.torch_dtype).eps
    good = max(errors) <= bound
    bad = "" if good else f"gradient of a replayed graph {max(errors):.1e} > {bound:.1e}"
    yield {"benchmark": "graph", **asdict(timing), **status(bad), "errors": errors}
