"""The tasks that `tools.gpu` runs in child processes: checks against float64, timings, profiles.

Every task yields rows. Tolerances: a float32 result may have twice the error of the dense loss in
the same dtype (and the same GEMM precision) plus a band. The band is four roundings where GEMMs are
IEEE, and one rounding of an operand where they use TF32 or three bfloat16 products. For
half-precision input the dense loss is computed in float32, so the gradient's band is a quarter of
the dtype's eps. Scalars (a mean loss, a temperature's gradient) get four bands, because one of two
random errors may be zero by luck.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphacl_fast import MinPlayer, PairLoss, PairWeight, objectives, ops
from alphacl_fast.benchmarks import loss as benchmark
from alphacl_fast.benchmarks.loss import Effort, Row, Setting, gradient, scaled_gradient
from alphacl_fast.functional import NEGATIVES, SIMILARITIES, alpha_cl_loss

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
def deterministic(on: bool) -> Iterator[None]:
    """Use deterministic algorithms, and fill new allocations with NaN."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


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

#: One objective for each form of the sweeps.
REPRESENTATIVES = [("infonce", {}), ("alpha_direct", {}), ("triplet", {}), ("alpha_square", {})]
THROUGH = {"detach_alpha": False}
MEMBERS: list[tuple[str, dict[str, Any]]] = [
    *REPRESENTATIVES,
    *((name, {}) for name in objectives.names() if (name, {}) not in REPRESENTATIVES),
    *((name, THROUGH) for name in ("alpha_direct", "alpha_square", "alpha_entropy")),
    ("alpha_gamma", {**THROUGH, "gamma": 1.5}), ("alpha_direct", {"normalized": False}),
    ("infonce", {"epsilon": 0.0, "temperature_scaled": True}), ("infonce", {"epsilon": 0.3}),
    ("triplet", {"margin": 0.1}), ("soft_triplet", {"margin": -0.5}),
    ("modified_triplet", {"scale": 5.0}), ("alpha_direct", {**THROUGH, "normalized": False}),
    *(("alpha_direct", {**THROUGH, "exponent": q, "alpha_eps": 0.1}) for q in (2, 1.5)),
    ("alpha_direct", {"exponent": 3}), ("alpha_entropy", {"alpha_eps": 0.2}),
    ("alpha_inverse", {**THROUGH, "order": 2, "exponent": 3}),
    ("alpha_inverse", {"normalized": False, "alpha_eps": 0.0}),
    ("alpha_inverse", {"exponent": 1, "alpha_eps": 0.5}),
]  # fmt: skip
#: Users' functions, which a backend must translate.
CUSTOM = {
    "custom_loss": lambda: PairLoss(
        lambda xi: torch.log1p(xi) + xi.square() / 1e6, lambda gap: gap.exp() + gap.sigmoid()
    ),
    "custom_weight": lambda: PairWeight(
        lambda d: 1 / (1 + d.square()), detach_alpha=False, alpha_eps=0.1
    ),
    "custom_min_player": lambda: MinPlayer(
        lambda x: torch.relu(x + 0.2).square(), detach_alpha=False
    ),
}
MODES = [("two_view", True), ("cross_view", True), ("one_view", True), ("cross_view", False)]
#: Name → dtype and GEMM precision.
ARITHMETIC: dict[str, tuple[torch.dtype, str | None]] = {
    "bfloat16": (torch.bfloat16, None), "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bf16x3": (torch.float32, "bf16x3"), "float16": (torch.float16, None),
    "float64": (torch.float64, None),
}  # fmt: skip
#: Tolerance bands of loss and gradient.
BANDS = {
    "float64": (1e-10, 1e-10), "float32": (2**-21, 2**-21), "bf16x3": (2**-16, 2**-16),
    "tf32": (2**-11, 2**-11),
    "bfloat16": (2**-17, 2**-9), "float16": (2**-17, 2**-12),
}  # fmt: skip
DIMS = (64, 96, 128, 200, 256, 512, 1024, 4096)


@dataclass(frozen=True)
class Case:
    """One check of a backend against float64."""

    backend: str
    objective: str = "infonce"
    options: tuple[tuple[str, Any], ...] = ()
    dtype: str = "bfloat16"
    negatives: str = "two_view"
    symmetric: bool = True
    similarity: str = "cosine"
    reduction: str = "mean"
    learn_tau: bool = False
    tau: float = 0.3
    pairs: int = 1283
    dim: int = 128
    deterministic: bool = False

    def member(self) -> objectives.Objective:
        if self.objective in CUSTOM:
            return CUSTOM[self.objective]()
        return objectives.make(self.objective, dict(self.options))

    def sensible(self) -> bool:
        """Whether the requested gradients exist and are insensitive to rounding."""
        # For "dot", d² = 1 − t crosses 0, where its lower powers have unbounded slope.
        steep = self.similarity == "dot" and dict(self.options).get("exponent", 4) < 2
        return not steep and (not self.learn_tau or has_tau_gradient(self.objective, self.options))

    @property
    def kinked(self) -> bool:
        """Whether rounding may move single pairs across a kink, which changes their weight."""
        return self.objective in ("triplet", "custom_min_player") or (
            self.objective == "alpha_square" and not dict(self.options).get("detach_alpha", True)
        )


@functools.cache
def has_tau_gradient(objective: str, options: tuple[tuple[str, Any], ...]) -> bool:
    return Case("", objective, options).member().tau_gradient is not None


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


def correlated_views(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw two views whose positives range from unrelated to equal, so no objective is zero.

    Rows that are not normalised have length about 1, so that no single pair dominates a row.
    """
    generator = torch.Generator(device).manual_seed(case.pairs)
    size = 2, case.pairs, case.dim
    z1, other = benchmark.structured_rows(*size, device, torch.float64, generator)
    likeness = torch.rand(case.pairs, 1, generator=generator, device=device, dtype=torch.float64)
    z2 = likeness * z1 + (1 - likeness.square()).sqrt() * other
    scale = 1.0 if case.similarity == "cosine" else case.dim**-0.5
    dtype, _ = ARITHMETIC[case.dtype]
    return (z1 * scale).to(dtype), (z2 * scale).to(dtype)


def evaluate(
    case: Case, z1: Tensor, z2: Tensor, backend: str, precision: str | None
) -> dict[str, Tensor]:
    """Compute loss and gradients by name.

    Row losses get fixed weights; a mean is scaled by the number of rows to suit float16.
    """
    z1, z2 = z1.detach().clone().requires_grad_(), z2.detach().clone().requires_grad_()
    wide = torch.promote_types(z1.dtype, torch.float32)
    inputs = {"dz1": z1, "dz2": z2}
    if case.learn_tau:
        tau = torch.tensor(case.tau, dtype=wide, device=z1.device)
        inputs["dtau"] = tau.requires_grad_()
    loss = alpha_cl_loss(
        z1, z2, case.member(), temperature=inputs.get("dtau", case.tau), backend=backend,
        precision=precision, similarity=case.similarity, negatives=case.negatives,
        symmetric=case.symmetric, reduction=case.reduction,
    )  # fmt: skip
    weights = torch.full_like(loss, case.pairs)
    if case.reduction == "none":
        weights = torch.linspace(-0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device)
    grads = torch.autograd.grad(loss, list(inputs.values()), weights)
    return {"loss": loss.detach(), **dict(zip(inputs, grads, strict=True))}


def compared(
    case: Case, ours: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor]
) -> dict[str, tuple[float, float, float]]:
    """Compute (our error, the dense loss's, the bound) of every result.

    Errors are relative to the norm of the truth. Gradients of rows also have the error of their
    worst row, relative to the root mean square of the rows: a norm over all rows would hide a
    single wrong one.
    """
    low, high = BANDS[case.dtype]
    kink = case.kinked and case.dtype != "float64"
    found = {}

    for name, exact in truth.items():
        size = exact.norm()
        if name == "dtau":  # terms of order 1 may cancel, so the error is not relative
            size = size.clamp(min=0.1 * case.pairs)
        elif name == "loss":
            size = size.clamp(min=1e-3 * exact.numel() ** 0.5)
        off = [x[name].double() - exact for x in (ours, eager)]
        mine, theirs = (float(x.norm() / size) for x in off)
        band = (high if name.startswith("dz") else low) * (1 if exact.dim() else 4)
        found[name] = mine, theirs, 2 * theirs + max(band, 1e-3 * kink)
        if name.startswith("dz"):
            size = size / exact.shape[0] ** 0.5
            mine, theirs = (float(x.norm(dim=1).max() / size) for x in off)
            found[f"worst row of {name}"] = mine, theirs, 2 * theirs + max(16 * high, 0.1 * kink)
    return found


def check(case: Case, device: str) -> Iterator[Row]:
    """Check loss and gradients against float64, and whether a second run gives the same bits."""
    start = time.perf_counter()
    here = torch.device(device)
    dtype, precision = ARITHMETIC[case.dtype]
    row = {"benchmark": "check", **asdict(case), "n": 2 * case.pairs, "options": dict(case.options)}
    with benchmark.matmul_precision(case.dtype):
        serving = ops.SWEEP_BACKENDS[case.backend]
        reason = serving.unsupported(here, dtype, precision, case.member().kind)
        if reason:
            yield {**row, "status": "refused", "error": reason}
            return
        z1, z2 = correlated_views(case, here)
        truth = evaluate(case, z1.double(), z2.double(), "reference", None)
        eager = evaluate(case, z1, z2, "reference", None)
        with deterministic(case.deterministic):
            ours = evaluate(case, z1, z2, case.backend, precision)
            again = evaluate(case, z1, z2, case.backend, precision) if case.deterministic else ours
    same = all(torch.equal(x, again[name]) for name, x in ours.items())
    errors = compared(case, ours, eager, truth)
    wrong = [
        f"{name} {mine:.1e} > {bound:.1e}"
        for name, (mine, _, bound) in errors.items()
        if not mine <= bound
    ]
    if not same:
        wrong.append("a second run gave other bits")
    yield {
        **row, **status("; ".join(wrong)), "errors": errors,
        "repeatable": same if case.deterministic else None,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def status(error: str) -> Row:
    return {"status": "failed" if error else "ok", "error": error or None}


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
        with benchmark.matmul_precision(setting.dtype):
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
