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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphacl_fast import MinPlayer, PairLoss, PairWeight, objectives, ops
from alphacl_fast.benchmarks.baselines import make, missing
from alphacl_fast.benchmarks.loss import (
    Setting,
    gradient,
    interleaved,
    oracle,
    relative_error,
    result,
    scaled_gradient,
    seconds,
    structured_rows,
    synchronize,
)
from alphacl_fast.benchmarks.loss import provenance as base_provenance
from alphacl_fast.benchmarks.memory import peak_of_device
from alphacl_fast.functional import NEGATIVES, SIMILARITIES, alpha_cl_loss

Row = dict[str, Any]

# --- the device, with substitutes on a CPU ---------------------------------------------------------


def provenance(device: torch.device) -> Row:
    """Describe the machine; every row of a run contains this."""
    row = base_provenance(device)
    with contextlib.suppress(ImportError):
        import triton

        row["triton"] = triton.__version__
    if device.type == "cuda":
        row |= {"capability": ".".join(map(str, torch.cuda.get_device_capability(device))), "cuda": torch.version.cuda}
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            lines = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split()
            row["driver"] = lines[0] if lines else None
    return row


@contextlib.contextmanager
def matmul_precision(dtype: str) -> Iterator[None]:
    """Set torch's float32 GEMM precision: "tf32", or IEEE for every other name."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def peak_extra_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Measure `memory.peak_of_device`; on a CPU the call runs and the result is None."""
    if device.type == "cuda":
        return peak_of_device(run, device)
    run()
    return None


def captured(step: Callable[..., tuple[Tensor, ...]], views: tuple[Tensor, ...], device: torch.device) -> Callable:
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


def device_events(run: Callable[[], Any], device: torch.device, steps: int = 3) -> list[tuple[str, float]]:
    """List (name, microseconds) of the kernels, or on a CPU of PyTorch's operators, in a call."""
    wanted = ("kernel", "gpu_memcpy", "gpu_memset") if device.type == "cuda" else ("cpu_op",)
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    run()
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            run()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [(event["name"], float(event["dur"])) for event in events if event.get("cat") in wanted and "dur" in event]


# --- checks ---------------------------------------------------------------------------------------

MEMBERS: list[tuple[str, dict[str, Any]]] = [
    ("infonce", {}), ("alpha_direct", {}), ("triplet", {}), ("alpha_square", {}), ("modified_triplet", {}),
    ("alpha_inverse", {}), ("alpha_gamma", {}), ("alpha_entropy", {}), ("soft_triplet", {}), ("mine", {}),
    ("lifted_structured", {}), ("n_plus_1_tuplet", {}), ("uniform", {}), ("triplet_contrastive", {}),
    ("alpha_direct", {"detach_alpha": False}), ("alpha_square", {"detach_alpha": False}),
    ("alpha_gamma", {"detach_alpha": False, "gamma": 1.5}), ("alpha_direct", {"normalized": False}),
    ("infonce", {"epsilon": 0.0, "temperature_scaled": True}), ("infonce", {"epsilon": 0.3}),
    ("triplet", {"margin": 0.1}), ("soft_triplet", {"margin": -0.5}), ("modified_triplet", {"scale": 5.0}),
    ("alpha_direct", {"detach_alpha": False, "normalized": False}),
    ("alpha_direct", {"exponent": 2, "alpha_eps": 0.1, "detach_alpha": False}),
    ("alpha_direct", {"exponent": 1.5, "alpha_eps": 0.1, "detach_alpha": False}), ("alpha_direct", {"exponent": 3}),
    ("alpha_entropy", {"detach_alpha": False}), ("alpha_entropy", {"alpha_eps": 0.2}),
    ("alpha_inverse", {"detach_alpha": False, "order": 2, "exponent": 3}),
    ("alpha_inverse", {"normalized": False, "alpha_eps": 0.0}), ("alpha_inverse", {"exponent": 1, "alpha_eps": 0.5}),
]  # fmt: skip
#: Users' functions, which a backend must translate.
CUSTOM = {
    "custom_loss": lambda: PairLoss(lambda xi: torch.log1p(xi) + xi.square() / 1e6, lambda gap: gap.exp() + gap.sigmoid()),
    "custom_weight": lambda: PairWeight(lambda d: 1 / (1 + d.square()), detach_alpha=False, alpha_eps=0.1),
    "custom_min_player": lambda: MinPlayer(lambda x: torch.relu(x + 0.2).square(), detach_alpha=False),
}
#: One objective for each form of the sweeps.
REPRESENTATIVES = [("infonce", {}), ("alpha_direct", {}), ("triplet", {}), ("alpha_square", {})]
MODES = [("two_view", True), ("cross_view", True), ("one_view", True), ("cross_view", False)]
#: Name → dtype and GEMM precision.
ARITHMETIC: dict[str, tuple[torch.dtype, str | None]] = {
    "bfloat16": (torch.bfloat16, None), "float32": (torch.float32, "ieee"), "tf32": (torch.float32, "tf32"),
    "bf16x3": (torch.float32, "bf16x3"), "float16": (torch.float16, None), "float64": (torch.float64, None),
}  # fmt: skip
#: Tolerance bands of loss and gradient.
BANDS = {
    "float64": (1e-10, 1e-10), "float32": (2**-21, 2**-21), "bf16x3": (2**-16, 2**-16), "tf32": (2**-11, 2**-11),
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
        """Whether rounding may move single pairs across a kink, which changes their whole weight."""
        return self.objective in ("triplet", "custom_min_player") or (
            self.objective == "alpha_square" and not dict(self.options).get("detach_alpha", True)
        )


@functools.cache
def has_tau_gradient(objective: str, options: tuple[tuple[str, Any], ...]) -> bool:
    return Case("", objective, options).member().tau_gradient is not None


def cases(backends: list[str], dims: tuple[int, ...] = DIMS, pairs: tuple[int, int] = (1000, 1537)) -> Iterator[Case]:
    """Yield distinct cases: the most important first, then the whole table in random order."""
    picks = random.Random(0)
    compiled = [name for name in backends if name != "blocked"] or backends
    middle = 128 if 128 in dims else dims[0]

    def sized(**fields: Any) -> Case:
        return Case(**{"pairs": picks.randint(*pairs), "dim": middle, **fields})

    def ordered() -> Iterator[Case]:
        for name, dtype in itertools.product(backends, ARITHMETIC):
            yield sized(backend=name, dtype=dtype)
            yield sized(backend=name, dtype=dtype, deterministic=True, reduction="none", learn_tau=True)
        every = [*MEMBERS, *((name, {}) for name in CUSTOM)]
        for dtype, name in itertools.product(("bfloat16", "float32"), compiled):
            for k, (member, options) in enumerate(every):
                shared = {"backend": name, "objective": member, "options": tuple(options.items()), "dtype": dtype}
                yield sized(**shared, deterministic=k % 2 == 0, reduction=("none", "mean")[k % 2])
        for dtype, (member, options), (negatives, symmetric), similarity in itertools.product(
            ("bfloat16", "float32"), REPRESENTATIVES, MODES, SIMILARITIES
        ):
            for name in backends if dtype == "float32" else compiled:
                yield sized(
                    backend=name, objective=member, options=tuple(options.items()), dtype=dtype, negatives=negatives,
                    symmetric=symmetric, similarity=similarity, reduction=picks.choice(("mean", "none")),
                    deterministic=picks.random() < 0.5,
                )  # fmt: skip
        for dtype, dim, name in itertools.product(("bfloat16", "float32", "tf32", "float16"), dims, compiled):
            yield sized(backend=name, dtype=dtype, dim=dim, objective=picks.choice(("infonce", "triplet")))
        for tau, dtype, name in itertools.product((0.05, 0.01), ("bfloat16", "float32"), compiled):
            yield sized(backend=name, dtype=dtype, tau=tau)
            yield sized(backend=name, dtype=dtype, tau=tau, learn_tau=True, negatives="cross_view")
        table = list(itertools.product(every, ARITHMETIC, MODES, SIMILARITIES, ("mean", "none"), (False, True)))
        picks.shuffle(table)
        for k, ((member, options), dtype, (negatives, symmetric), similarity, reduction, learn_tau) in enumerate(table):
            for name in backends if k % 10 == 0 else compiled:
                yield sized(
                    backend=name, objective=member, options=tuple(options.items()), dtype=dtype, negatives=negatives,
                    symmetric=symmetric, similarity=similarity, reduction=reduction, learn_tau=learn_tau,
                    dim=picks.choice(dims), deterministic=k % 2 == 0,
                )  # fmt: skip

    seen: set[Case] = set()
    for case in ordered():
        anonymous = replace(case, pairs=0)
        if anonymous not in seen and case.sensible():
            seen.add(anonymous)
            yield case


def correlated_views(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw two views whose positives range from unrelated to equal, so no objective is zero.

    Rows that are not normalised have length about 1, so that no single pair dominates a row.
    """
    generator = torch.Generator(device).manual_seed(case.pairs)
    z1, other = structured_rows(2, case.pairs, case.dim, device, torch.float64, generator)
    likeness = torch.rand(case.pairs, 1, generator=generator, device=device, dtype=torch.float64)
    z2 = likeness * z1 + (1 - likeness.square()).sqrt() * other
    scale = 1.0 if case.similarity == "cosine" else case.dim**-0.5
    dtype, _ = ARITHMETIC[case.dtype]
    return (z1 * scale).to(dtype), (z2 * scale).to(dtype)


def evaluate(case: Case, z1: Tensor, z2: Tensor, backend: str, precision: str | None) -> dict[str, Tensor]:
    """Compute loss and gradients by name.

    Row losses get fixed weights; a mean is scaled by the number of rows to suit float16.
    """
    z1, z2 = z1.detach().clone().requires_grad_(), z2.detach().clone().requires_grad_()
    wide = torch.float64 if z1.dtype == torch.float64 else torch.float32
    temperature: float | Tensor = case.tau
    inputs = {"dz1": z1, "dz2": z2}
    if case.learn_tau:
        temperature = inputs["dtau"] = torch.full((), case.tau, dtype=wide, device=z1.device, requires_grad=True)
    loss = alpha_cl_loss(
        z1, z2, case.member(), temperature=temperature, similarity=case.similarity, negatives=case.negatives,
        symmetric=case.symmetric, reduction=case.reduction, backend=backend, precision=precision,
    )  # fmt: skip
    weights = torch.full_like(loss, case.pairs)
    if case.reduction == "none":
        weights = torch.linspace(-0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device)
    grads = torch.autograd.grad(loss, list(inputs.values()), weights)
    return {"loss": loss.detach(), **dict(zip(inputs, grads, strict=True))}


def error_and_bound(name: str, case: Case, ours: Tensor, eager: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """Compute (our error, the dense loss's, the bound), relative to the norm of the truth."""
    band = BANDS[case.dtype][name.startswith("dz")]
    size = truth.norm()
    if name == "dtau":  # terms of order 1 may cancel, so the error is not relative
        band, size = BANDS[case.dtype][0], size.clamp(min=0.1 * case.pairs)
    elif name == "loss":
        size = size.clamp(min=1e-3 * truth.numel() ** 0.5)
    if truth.dim() == 0:
        band *= 4
    if case.kinked and case.dtype != "float64":
        band = max(band, 1e-3)
    mine, theirs = (float((x.double() - truth).norm() / size) for x in (ours, eager))
    return mine, theirs, 2 * theirs + band


def worst_row(name: str, case: Case, ours: Tensor, eager: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """Compute the same for the worst row, relative to the rows' root mean square.

    A norm over all rows would hide a single wrong row.
    """
    size = truth.norm() / truth.shape[0] ** 0.5
    mine, theirs = (float((x.double() - truth).norm(dim=1).max() / size) for x in (ours, eager))
    band = 16 * BANDS[case.dtype][1]
    return mine, theirs, 2 * theirs + (max(band, 0.1) if case.kinked and case.dtype != "float64" else band)


def check(case: Case, device: str) -> Iterator[Row]:
    """Check loss and gradients against float64, and whether a second run gives the same bits."""
    start = time.perf_counter()
    here = torch.device(device)
    dtype, precision = ARITHMETIC[case.dtype]
    row = {"benchmark": "check", **asdict(case), "n": 2 * case.pairs, "options": dict(case.options)}
    with matmul_precision(case.dtype):
        reason = ops.SWEEP_BACKENDS[case.backend].unsupported(here, dtype, precision, case.member().kind)
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
    errors = {name: error_and_bound(name, case, x, eager[name], truth[name]) for name, x in ours.items()}
    errors |= {f"worst row of {name}": worst_row(name, case, ours[name], eager[name], truth[name]) for name in ("dz1", "dz2")}
    wrong = [f"{name} {mine:.1e} > {bound:.1e}" for name, (mine, _, bound) in errors.items() if not mine <= bound]
    if not same:
        wrong.append("a second run gave other bits")
    yield {
        **row, "status": "failed" if wrong else "ok", "error": "; ".join(wrong) or None, "errors": errors,
        "repeatable": same if case.deterministic else None, "seconds": time.perf_counter() - start,
    }  # fmt: skip


def no_synchronization(setting: Setting, backend: str, device: str) -> Iterator[Row]:
    """Check that a warm step (loss and gradient) does not synchronise with the host."""
    here = torch.device(device)
    loss, views = make(backend, setting.objective, setting.negatives, setting.tau), setting.views(here)
    gradient(loss, *views)
    synchronize(here)
    with synchronization_forbidden(here):
        gradient(loss, *views)
    yield {"benchmark": "synchronization", "backend": backend, **asdict(setting), "status": "ok"}


def graph_replay(setting: Setting, backend: str, device: str) -> Iterator[Row]:
    """Check that a captured step equals an ordinary step on new inputs."""
    here = torch.device(device)
    loss = make(backend, setting.objective, setting.negatives, setting.tau)
    replay = captured(lambda a, b: scaled_gradient(loss, a, b), setting.views(here), here)
    errors = []
    for _ in range(2):
        views = setting.views(here)
        errors.append(relative_error(replay(*views), tuple(g.double() for g in scaled_gradient(loss, *views))))
    bound = 4 * torch.finfo(setting.torch_dtype).eps
    bad = None if max(errors) <= bound else f"gradient of a replayed graph {max(errors):.1e} > {bound:.1e}"
    yield {
        "benchmark": "graph", "backend": backend, **asdict(setting), "status": "failed" if bad else "ok", "error": bad,
        "errors": errors,
    }  # fmt: skip


def launches(setting: Setting, backend: str, device: str) -> Iterator[Row]:
    """Count the kernels that a step launches."""
    here = torch.device(device)
    loss, views = make(backend, setting.objective, setting.negatives, setting.tau), setting.views(here)
    names = Counter(name for name, _ in device_events(lambda: gradient(loss, *views), here))
    per_step = {name[:80]: count / 3 for name, count in names.most_common()}
    yield {
        "benchmark": "launches", "backend": backend, **asdict(setting), "status": "ok", "launches": sum(per_step.values()),
        "kernels": per_step,
    }  # fmt: skip


# --- timings --------------------------------------------------------------------------------------


def heading(setting: Setting, contestant: str, label: Row) -> Row:
    """Start a row that has no time of its own."""
    return {"benchmark": "loss+gradient", "contestant": contestant, **asdict(setting), **label}


def measure(
    setting: Setting,
    contestants: list[str],
    device: str,
    *,
    gemm_side: int = 8192,
    sample: float = 0.02,
    budget: float = 3.0,
    repeats: tuple[int, int] = (5, 25),
    gate_rows: int = 1 << 16,
    graph: bool = False,
    needs: str | None = None,
    label: Row | None = None,
) -> Iterator[Row]:
    """Time loss + gradient, interleaved with a GEMM of the same dtype; one row per implementation.

    Args:
        setting: the problem.
        contestants: names of the implementations; one whose gradient is wrong is not timed.
        device: where to run.
        gemm_side: side of the GEMM's matrices.
        sample: seconds of consecutive calls per measurement, over three sets of inputs.
        budget: seconds that the measurements should fit into.
        repeats: fewest and most measurements.
        gate_rows: most rows at which the gradient is checked.
        graph: whether to time replays of a CUDA graph too, which have no launch overhead.
        needs: an implementation without which none is timed.
        label: columns to add to the rows.
    """
    here = torch.device(device)
    torch.manual_seed(0)
    label = label or {}
    with matmul_precision(setting.dtype):
        losses, errors = {}, {}
        gated = replace(setting, n=min(setting.n, gate_rows))
        views = gated.views(here)
        truth = oracle(gated, *views, backend="blocked" if gated.n > 4096 else "reference")
        for name in contestants:
            about = heading(setting, name, label)
            if missing(name):
                yield {**about, "status": "skipped", "error": missing(name)}
                continue
            try:
                loss = make(name, setting.objective, setting.negatives, setting.tau)
                errors[name] = relative_error(scaled_gradient(loss, *views), truth)
            except Exception as error:
                status = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "error"
                yield {**about, "status": status, "error": f"{type(error).__name__}: {str(error)[:400]}"}
                continue
            gate = setting.gate / 4 if name in ops.SWEEP_BACKENDS else setting.gate  # baselines round unit rows
            if not errors[name] <= gate:
                why = f"gradient error {errors[name]:.1e} > {gate:.1e}: not timed"
                yield {**about, "status": "wrong", "error": why, "gradient_error": errors[name]}
                continue
            losses[name] = loss
        del truth, views
        if losses and (needs is None or needs in losses):
            yield from _timed(setting, losses, errors, here, gemm_side, sample, budget, repeats, graph, label)


def _timed(setting, losses, errors, device, gemm_side, sample, budget, repeats, graph, label) -> Iterator[Row]:
    """Time the implementations that have passed the check."""
    sets = [setting.views(device) for _ in range(3)]
    a, b = (torch.randn(gemm_side, gemm_side, device=device).to(setting.torch_dtype) for _ in range(2))
    turns = {name: itertools.cycle(sets) for name in losses}
    runs: dict[str, Callable[[], Any]] = {"gemm": lambda: a @ b}
    runs |= {name: lambda name=name, loss=loss: gradient(loss, *next(turns[name])) for name, loss in losses.items()}
    extra = {}
    for name in list(losses):
        try:
            extra[name] = peak_extra_bytes(runs[name], device)
        except torch.OutOfMemoryError as error:  # the check's inputs were smaller
            del losses[name], runs[name]
            yield {**heading(setting, name, label), "status": "out of memory", "error": str(error)[:200]}
    rough = {name: seconds(run, device, 2) for name, run in runs.items()}
    calls = {name: max(1, min(200, round(sample / took))) for name, took in rough.items()}
    round_takes = sum(calls[name] * took for name, took in rough.items())
    times = interleaved(runs, device, max(repeats[0], min(repeats[1], int(budget / round_takes))), calls)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name in losses:
        over = {
            f"speedup_over_{other}": medians[other] / medians[name] if other in medians else None
            for other in ("eager", "compiled")
        }
        yield {
            **result(setting, name, times, name, device, gemm_side), "status": "ok", "gradient_error": errors[name],
            "peak_extra_bytes": extra[name], "calls_per_sample": calls[name], **over, "tau": setting.tau, **label,
        }  # fmt: skip
    for name in [name for name in losses if graph and name in ops.SWEEP_BACKENDS]:
        replay = captured(lambda x, y, loss=losses[name]: gradient(loss, x, y), sets[0], device)
        replayed = statistics.median(seconds(replay, device, calls[name]) for _ in range(5))
        yield {
            **heading(setting, name, label), "benchmark": "graph replay", "status": "ok",
            "median_ms": replayed * 1e3 if device.type == "cuda" else None, "graph_over_launched": replayed / medians[name],
        }  # fmt: skip


def profile(setting: Setting, backends: list[str], device: str, out: str) -> Iterator[Row]:
    """Write the kernels of each backend's step to a text file; one row per backend."""
    here = torch.device(device)
    lines = []
    for name in backends:
        loss, views = make(name, setting.objective, setting.negatives, setting.tau), setting.views(here)
        gradient(loss, *views)
        events = device_events(lambda loss=loss, views=views: gradient(loss, *views), here, steps=5)
        total: Counter[str] = Counter()
        count: Counter[str] = Counter()
        for kernel, took in events:
            total[kernel] += took
            count[kernel] += 1
        everything = sum(total.values()) or 1.0
        lines += [f"{name}: {setting}", f"{'µs/step':>10} {'launches':>9} {'share':>6}  kernel"]
        lines += [f"{t / 5:10.1f} {count[k] / 5:9.1f} {t / everything:6.1%}  {k}" for k, t in total.most_common(40)] + [""]
        yield {
            "benchmark": "profile", "backend": name, **asdict(setting), "status": "ok", "microseconds": everything / 5,
            "launches": sum(count.values()) / 5, "top": {k[:80]: t / everything for k, t in total.most_common(6)},
        }  # fmt: skip
    Path(out).write_text("\n".join(lines))


# --- for compute-sanitizer ------------------------------------------------------------------------


def small_shapes(backend: str, device: str, seconds: str) -> int:
    """Run every form of the sweeps on small ragged shapes while time lasts; return the count."""
    here, end = torch.device(device), time.monotonic() + float(seconds)
    done = 0
    for (pairs, dim), dtype, (member, options), negatives in itertools.product(
        ((65, 128), (3, 128), (130, 200)), ("bfloat16", "float32"), REPRESENTATIVES, NEGATIVES
    ):
        case = Case(backend, member, tuple(options.items()), dtype, negatives, pairs=pairs, dim=dim)
        case = replace(case, reduction=("mean", "none")[done % 2])
        evaluate(case, *correlated_views(case, here), backend, None)
        synchronize(here)
        done += 1
        if time.monotonic() > end:
            break
    return done


if __name__ == "__main__":
    print(f"{small_shapes(*sys.argv[1:])} shapes")
