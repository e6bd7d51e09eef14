"""The tasks that `tools.gpu` runs in child processes: checks against float64, timings, profiles.

Every task yields rows. `alphacl_fast.accuracy` has the check itself and its tolerances.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphacl_fast import ops
from alphacl_fast.accuracy import (
    ARITHMETIC,
    CUSTOM,
    MEMBERS,
    MODES,
    REPRESENTATIVES,
    Case,
    correlated_views,
    evaluate,
    matmul_precision,
    status,
)
from alphacl_fast.benchmarks import loss as benchmark
from alphacl_fast.benchmarks.loss import Effort, Row, Setting, gradient, scaled_gradient
from alphacl_fast.functional import NEGATIVES, SIMILARITIES

# --- the device, with substitutes on a CPU --------------------------------------------------------


def provenance(device: torch.device) -> Row:
    """Describe the machine; every row of a run contains this."""
    row = benchmark.provenance(device)
    with contextlib.suppress(ImportError):
        import triton

        row["triton"] = triton.__version__
    if device.type == "cuda":
        row |= {
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "cuda": torch.version.cuda,
        }
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            lines = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split()
            row["driver"] = lines[0] if lines else None
    return row


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
    """Capture ``step`` in a CUDA graph: a function of new views, or of none to reuse the last.

    On a CPU the step just runs again.
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
    run: Callable[[], Any], device: torch.device, steps: int = 3
) -> list[tuple[str, float]]:
    """List (name, microseconds) of the kernels, or on a CPU of PyTorch's operators, in a call."""
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


# --- checks ---------------------------------------------------------------------------------------

DIMS = (64, 96, 128, 200, 256, 512, 1024, 4096)


def grid(**axes: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def cases(
    backends: list[str], dims: tuple[int, ...] = DIMS, pairs: tuple[int, int] = (1000, 1537)
) -> Iterator[Case]:
    """Yield distinct cases: the most important first, then the whole table in random order."""
    picks = random.Random(0)
    compiled = [name for name in backends if name != "blocked"] or backends
    every = [*MEMBERS, *((name, {}) for name in CUSTOM)]
    both, reductions, either = ("bfloat16", "float32"), ("mean", "none"), (False, True)
    axes = {"mode": MODES, "similarity": SIMILARITIES}
    table = list(
        grid(member=every, dtype=ARITHMETIC, **axes, reduction=reductions, learn_tau=either)
    )
    picks.shuffle(table)
    careful = {"reduction": "none", "deterministic": True, "learn_tau": True}
    seen: set[Case] = set()
    for fields in itertools.chain(
        (
            {**fields, **more}
            for fields in grid(backend=backends, dtype=ARITHMETIC)
            for more in ({"reduction": "mean", "deterministic": False}, careful)
        ),
        grid(dtype=both, backend=compiled, member=every),
        grid(dtype=["bfloat16"], member=REPRESENTATIVES, **axes, backend=compiled),
        grid(dtype=["float32"], member=REPRESENTATIVES, **axes, backend=backends),
        grid(dtype=(*both, "tf32", "float16"), dim=dims, backend=compiled, member=MEMBERS[:3:2]),
        grid(tau=(0.05, 0.01), dtype=both, backend=compiled, learn_tau=either),
        (
            {**fields, "dim": picks.choice(dims), "backend": name}
            for k, fields in enumerate(table)
            for name in (backends if k % 10 == 0 else compiled)
        ),
    ):  # fmt: skip
        member, options = fields.pop("member", MEMBERS[0])
        negatives, symmetric = fields.pop("mode", MODES[0])
        drawn = {
            "reduction": picks.choice(reductions), "deterministic": picks.random() < 0.5,
            "dim": 128 if 128 in dims else dims[0],
        }  # fmt: skip
        case = Case(
            objective=member, options=tuple(options.items()), negatives=negatives,
            symmetric=symmetric, pairs=0, **drawn | fields,
        )  # fmt: skip
        if case not in seen and case.sensible():
            seen.add(case)
            yield replace(case, pairs=picks.randint(*pairs))


class Warm:
    """A step (loss and gradient) of a backend, after its first call."""

    def __init__(self, benchmark_name: str, setting: Setting, backend: str, device: str) -> None:
        self.device = torch.device(device)
        self.loss, self.views = setting.loss(backend), setting.views(self.device)
        about = {"benchmark": benchmark_name, "backend": backend, **asdict(setting)}
        self.row: Row = {**about, "status": "ok"}
        self()
        benchmark.synchronize(self.device)

    def __call__(self) -> None:
        gradient(self.loss, *self.views)

    def kernels(self, steps: int) -> dict[str, tuple[float, float]]:
        """List kernels, the slowest first, with microseconds and launches of a step."""
        events = device_events(self, self.device, steps)
        found: dict[str, list[float]] = defaultdict(list)
        for kernel, took in events:
            found[kernel].append(took)
        each = {kernel: (sum(took) / steps, len(took) / steps) for kernel, took in found.items()}
        return dict(sorted(each.items(), key=lambda item: -item[1][0]))


def no_synchronization(setting: Setting, backend: str, device: str) -> Iterator[Row]:
    """Check that a warm step does not synchronise with the host."""
    step = Warm("synchronization", setting, backend, device)
    with synchronization_forbidden(step.device):
        step()
    yield step.row


def graph_replay(setting: Setting, backend: str, device: str) -> Iterator[Row]:
    """Check that a captured step equals an ordinary step on new inputs."""
    step = Warm("graph", setting, backend, device)
    exact = functools.partial(scaled_gradient, step.loss)
    replay = captured(exact, step.views, step.device)
    errors = []
    for _ in range(2):
        views = setting.views(step.device)
        truth = tuple(g.double() for g in exact(*views))
        errors.append(benchmark.relative_error(replay(*views), truth))
    bound = 4 * torch.finfo(setting.torch_dtype).eps
    good = max(errors) <= bound
    bad = "" if good else f"gradient of a replayed graph {max(errors):.1e} > {bound:.1e}"
    yield {**step.row, **status(bad), "errors": errors}


def launches(setting: Setting, backend: str, device: str) -> Iterator[Row]:
    """Count the kernels that a step launches."""
    step = Warm("launches", setting, backend, device)
    counts = {name[:80]: count for name, (_, count) in step.kernels(3).items()}
    yield {**step.row, "launches": sum(counts.values()), "kernels": counts}


# --- timings --------------------------------------------------------------------------------------


def measure(
    setting: Setting,
    contestants: list[str],
    device: str,
    effort: Effort,
    graph: bool = False,
    needs: str | None = None,
) -> Iterator[Row]:
    """Time loss + gradient with `benchmarks.loss.run`; one row per implementation.

    Args:
        setting: the problem.
        contestants: names of the implementations; one whose gradient is wrong is not timed.
        device: where to run.
        effort: how long to measure.
        graph: whether to time replays of a CUDA graph too, which have no launch overhead.
        needs: an implementation without which none is timed.
    """
    here = torch.device(device)
    for row in benchmark.run(setting, contestants, here, effort, needs=needs):
        yield row
        name = row["contestant"]
        if not graph or row["status"] != "ok" or name not in ops.SWEEP_BACKENDS:
            continue
        with matmul_precision(setting.dtype):
            step = functools.partial(gradient, setting.loss(name))
            views = setting.views(here)
            launched = functools.partial(step, *views)
            runs = {"launched": launched, "replay": captured(step, views, here)}
            calls = dict.fromkeys(runs, row["calls_per_sample"])
            times = benchmark.interleaved(runs, here, 5, calls)
        before, replayed = map(statistics.median, times.values())
        yield {
            **benchmark.heading("graph replay", name, setting, here), "status": "ok",
            "median_ms": replayed * 1e3 if here.type == "cuda" else None,
            "graph_over_launched": replayed / before,
        }  # fmt: skip


def profile(setting: Setting, backends: list[str], device: str, out: str) -> Iterator[Row]:
    """Write the kernels of each backend's step to a text file; one row per backend."""
    lines = []
    for name in backends:
        step = Warm("profile", setting, name, device)
        kernels = step.kernels(5)
        total = sum(took for took, _ in kernels.values())
        shares = {kernel: took / (total or 1.0) for kernel, (took, _) in kernels.items()}
        lines += [f"{name}: {setting}", f"{'µs/step':>10} {'launches':>9} {'share':>6}  kernel"]
        lines += [
            f"{took:10.1f} {number:9.1f} {shares[kernel]:6.1%}  {kernel}"
            for kernel, (took, number) in itertools.islice(kernels.items(), 40)
        ]
        yield {
            **step.row, "microseconds": total,
            "launches": sum(number for _, number in kernels.values()),
            "top": {k[:80]: share for k, share in itertools.islice(shares.items(), 6)},
        }  # fmt: skip
        lines.append("")
    Path(out).write_text("\n".join(lines))


# --- for compute-sanitizer ------------------------------------------------------------------------


def small_shapes(backend: str, device: str, seconds: str) -> int:
    """Run every form of the sweeps on small ragged shapes while time lasts; return the count."""
    here, end = torch.device(device), time.monotonic() + float(seconds)
    table = grid(
        shape=((65, 128), (3, 128), (130, 200)), dtype=("bfloat16", "float32"),
        member=REPRESENTATIVES, negatives=NEGATIVES,
    )  # fmt: skip
    for done, fields in enumerate(table, 1):
        pairs, dim = fields.pop("shape")
        member, options = fields.pop("member")
        case = Case(
            backend, member, tuple(options.items()), pairs=pairs, dim=dim,
            reduction=("none", "mean")[done % 2], **fields,
        )  # fmt: skip
        evaluate(case, *correlated_views(case, here), backend, None)
        benchmark.synchronize(here)
        if time.monotonic() > end:
            break
    return done


if __name__ == "__main__":
    print(f"{small_shapes(*sys.argv[1:])} shapes")
