"""The two calls: what they do, in the order of its worth.

The time of a phase is when it ends at the latest, in seconds after the call's begin; a phase that
is done early leaves its time to the next. Predicted seconds are estimates for an H200 with 16
cores.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from alphacl_fast import tune
from alphacl_fast.accuracy import ARITHMETIC, REPRESENTATIVES, Case
from alphacl_fast.benchmarks.baselines import PACKAGES, serves
from alphacl_fast.benchmarks.loss import Effort
from alphacl_fast.journal import Row
from alphacl_fast.subprocess_pool import Lane, Task, cores

from . import checks, sweeps
from .ahead import Machine, distinct, pack
from .engines import backend_of
from .schedule import Phase
from .sweeps import Sweep
from .timings import Timing

#: Seconds of the calls, the summary and the archive included.
SECONDS = {1: 170, 2: 310}
#: Engines in the order of their worth.
ORDER = ("cuda_hopper", "triton", "cuda_mma", "triton_64", "cuda", "cpu", "blocked")
#: Benchmark, as the rows call it → the function that makes its rows.
FUNCTIONS = {
    "device": "tools.gpu.timings:identify",
    "compile": "tools.gpu.ahead:compile_item",
    "compile tile": "tools.gpu.ahead:compile_item",
    "sweep": "tools.gpu.sweeps:check",
    "check": "alphacl_fast.accuracy:check",
    "graph": "tools.gpu.timings:graph_replay",
    "synchronization": "tools.gpu.timings:no_synchronization",
    "loss+gradient": "tools.gpu.timings:measure",
    "tune": "alphacl_fast.tune:time_tile",
    "sanitize": "tools.gpu.sanitizer:watch",
}
#: Benchmarks that call 2 runs again where call 1 failed, and the class of their items.
CHECKED = {"sweep": Sweep, "check": Case, "graph": Timing, "synchronization": Timing}
#: Statuses after which an item is run again, the most important first.
AGAIN = ("failed", "error", "crashed", "timeout", "unfinished", "not run")


@dataclass
class Session:
    """The settings from which the phases of a call are planned.

    Attributes:
        out: folder of the results.
        cache: Triton's cache, on a local disk.
        device: "cuda", or "cpu" to try the script.
        workers: the number of processes that run side by side.
        earlier: rows of earlier calls.
        attempt: carries out a write, as `journal.Journal.attempt` does.
        machine: the GPU; `identified` fills it in.
        refused: engine → why it does not serve, or None if it does.
        tuned: the table of tiles that children use.
    """

    out: Path
    cache: Path
    device: str
    workers: int
    earlier: list[Row]
    attempt: Callable[[str, Callable[[], Any]], bool]
    machine: Machine = field(default_factory=Machine)
    refused: dict[str, str | None] | None = None
    tuned: Path | None = None

    @property
    def tiny(self) -> bool:
        """Return whether problems are small enough to try the script on any machine."""
        return self.device == "cpu"

    @property
    def rows(self) -> tuple[int, ...]:
        """The sizes of the sweeps."""
        return (2, 12, 20, 34) if self.tiny else sweeps.SIZES

    @property
    def dims(self) -> tuple[int, ...]:
        return (16, 24) if self.tiny else checks.DIMS

    @property
    def pairs(self) -> tuple[int, int]:
        """The fewest and the most pairs of a check."""
        return (20, 33) if self.tiny else (1000, 1537)

    @property
    def effort(self) -> Effort:
        few = {"repeats": (2, 2), "gemm_side": 64, "sample": 1e-4}
        more = {"repeats": (3, 15), "gemm_side": 8192, "sample": 0.02, "inputs": 3}
        return Effort(
            budget=1.0, checked_rows=1 << 16, own_gate=0.25, **(few if self.tiny else more)
        )

    def timing(self, contestant: str, n: int, dim: int = 128, **other: str) -> Timing:
        if self.tiny:
            n, dim = max(16, min(128, n // 1024)), max(8, dim // 16)
        return Timing(contestant, n, dim, **other)

    @property
    def engines(self) -> list[str]:
        """The engines that serve the device."""
        if self.refused is None:
            raise RuntimeError("the device was not identified")
        return [name for name in ORDER if self.refused.get(name, "unknown") is None]

    def among(self, *wanted: str) -> list[str]:
        """List the wanted engines that serve; on a CPU, the engines that take their places."""
        found = [name for name in wanted if name in self.engines]
        return found or [name for name in self.engines if name in ("cpu", "blocked")]

    def task(self, benchmark: str, items: Iterable[Any], **given: Any) -> Task:
        """Make a task on the session's device; ``given`` are fields of `Task`."""
        function, about = FUNCTIONS[benchmark], {"benchmark": benchmark}
        environment = {"TRITON_CACHE_DIR": str(self.cache), "TRITON_STORE_BINARY_ONLY": "1"}
        if self.tuned is not None:
            environment["ALPHACL_TUNED"] = str(self.tuned)
        if "timings" not in function:  # repeatable GEMMs are slower
            environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        arguments = {"device": self.device, **given.pop("arguments", {})}
        return Task(function, tuple(items), arguments, about, environment=environment, **given)

    def save(self) -> None:
        """Write the kernels compiled so far to the archive."""
        archive = self.out / "cache.tar.gz"
        if any(self.cache.glob("*/*.cubin")):
            self.attempt(archive.name, lambda: pack(self.cache, archive))

    def identified(self, row: Row) -> None:
        """Take note of the device."""
        if row["benchmark"] != "device" or row["status"] != "ok":
            return
        self.refused = row["refused"]
        if self.device != "cpu":
            capability = int(row["capability"].replace(".", ""))
            self.machine = Machine(capability, row["multiprocessors"], row["table"])


def side_by_side(tasks: Iterable[Task], workers: int) -> list[Lane]:
    return [Lane(deque(tasks), workers)]


# --- call 1 ---------------------------------------------------------------------------------------


def first(s: Session) -> list[Phase]:
    """Compile ahead; check against float64, the fast kernels first; time the headline table."""
    return [
        identification(s),
        Phase("ahead", 35, lambda: ahead(s, items_of_call_1(s)), after=s.save),
        Phase("correct", 80, lambda: side_by_side(correct(s), s.workers)),
        Phase("forms", 120, lambda: side_by_side(forms(s), s.workers)),
        Phase("headline", 163, lambda: side_by_side(headline(s, HEADLINE), 1)),
    ]


def identification(s: Session) -> Phase:
    """Identify the device; as nothing else runs without that, a cold machine gets time for it."""
    task = s.task("device", [{}], limit=30, startup=6, predicted=3)
    return Phase("device", 34, lambda: side_by_side([task], 1), follow=s.identified)


def ahead(s: Session, items: Iterable[Any], benchmark: str = "compile") -> list[Lane]:
    """Plan a task for each item that launches Triton kernels."""
    claims = s.cache / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    tasks = (
        replace(
            s.task(benchmark, [item], limit=30, startup=0.3, predicted=3),
            arguments={"machine": s.machine, "claims": str(claims), "benchmark": benchmark},
        )
        for item in distinct(filter(triton_serves, items), s.machine)
    )
    return side_by_side(tasks, s.workers)


def triton_serves(item: Any) -> bool:
    named = (getattr(item, column, None) for column in ("engine", "contestant", "backend"))
    name = next(filter(None, named), "triton")
    return backend_of(name) == "triton"


def items_of_call_1(s: Session) -> Iterator[Any]:
    """Yield the items of call 1; those that are compiled first have the most important kernels."""
    for task in itertools.chain(headline(s, HEADLINE[:1]), correct(s), headline(s, HEADLINE)):
        yield from task.items
    for task in forms(s):
        yield from task.items


def correct(s: Session) -> Iterator[Task]:
    """Check both operators in every layout, then NaN through the whole loss."""
    engines = s.among("cuda_hopper", "triton", "cuda_mma", "triton_64")
    for layout, engine in itertools.product(sweeps.LAYOUTS, engines):
        table = sweeps.table(engine, layout, s.rows)
        yield s.task("sweep", table, predicted=0.3)
    dims = s.dims[:1] if s.tiny else (128, 16)
    for engine in s.among("triton", "cuda"):
        dtypes = ("bfloat16", "tf32", "float16", "float32")
        case = Case(engine, pairs=s.pairs[0] // 4 + 1, nan=True, runs=20)
        cases = [
            replace(case, dtype=dtype, negatives=negatives, dim=dim)
            for dtype, negatives, dim in itertools.product(dtypes, ("two_view", "cross_view"), dims)
        ]
        yield s.task("check", cases, predicted=0.5)


def forms(s: Session) -> Iterator[Task]:
    """Check one case per form and dtype; then CUDA graphs, and that no step synchronises."""
    engines = s.among("triton", "cuda")
    for (objective, options), engine in itertools.product(REPRESENTATIVES, engines):
        dim = 128 if 128 in s.dims else s.dims[0]
        case = Case(engine, objective, tuple(options.items()), dim=dim, runs=2)
        pairs = s.pairs[0] + 7
        cases = [replace(case, dtype=dtype, pairs=pairs) for dtype in ARITHMETIC]
        yield s.task("check", cases, predicted=0.5)
    for benchmark, n in (("graph", 2046), ("synchronization", 2048)):
        objectives = ("infonce", "alpha_direct", "triplet")
        steps = [
            s.timing(engine, n, objective=objective)
            for objective, engine in itertools.product(objectives, engines)
        ]
        yield s.task(benchmark, steps, predicted=0.7)


#: (rows, features, other columns) of the headline table.
HEADLINE = ((65536, 128, {}), (16384, 128, {}), (32768, 512, {}))
#: What call 2 adds.
MORE = (
    (16384, 128, {"dtype": "tf32"}), (32768, 256, {}), (32768, 64, {}), (4096, 128, {}),
    (32768, 128, {"negatives": "cross_view"}), (32768, 128, {"objective": "alpha_direct"}),
    (32768, 128, {"objective": "triplet"}), (32768, 1024, {}), (1024, 128, {}),
    (16384, 128, {"dtype": "float32"}), (1 << 20, 128, {}),
)  # fmt: skip


def headline(s: Session, points: Iterable[tuple[int, int, dict]]) -> Iterator[Task]:
    """Time each contestant in a process of its own, which also times a GEMM to compare with."""
    for n, dim, other in points:
        contestants = [*s.among("triton", "cuda", "triton_64")]
        if n < 1 << 20 and other.get("objective", "infonce") == "infonce":
            contestants.append("eager")
        for name in contestants:
            yield measurement(s, s.timing(name, n, dim, **other))


def measurement(s: Session, timing: Timing, **other: Any) -> Task:
    given = {"arguments": {"effort": s.effort}, "startup": 1.5, "predicted": 2.5, **other}
    return s.task("loss+gradient", [timing], **given)


# --- call 2 ---------------------------------------------------------------------------------------


def second(s: Session) -> list[Phase]:
    """Run again what failed; tune, and measure with the tuned tiles; rivals; random checks."""
    table = tune.Table(s.out / "tuned.json", s.attempt)

    def use_table() -> None:
        s.tuned = table.file if table.entries else None

    return [
        identification(s),
        Phase("recheck", 40, lambda: side_by_side(again(s), s.workers)),
        Phase("tune ahead", 55, lambda: compile_tiles(s, tiles_of(s)[:60]), after=s.save),
        Phase("tune", 150, lambda: tuning(s), follow=table.follow, after=use_table),
        Phase("tuned headline", 200, lambda: side_by_side(tuned_headline(s), 1)),
        Phase("rivals", 245, lambda: side_by_side(rivals(s), 1)),
        Phase("sanitize", 265, lambda: side_by_side(sanitize(s), 2)),
        Phase("random", 302, lambda: side_by_side(random_checks(s), s.workers)),
    ]  # fmt: skip


def again(s: Session) -> Iterator[Task]:
    """Run again what failed, each item in a process of its own; then what call 1 has left.

    An item's newest row counts. A call that was ended has no rows of its last items, and of many
    items that were not run only the first have rows.
    """
    newest = {
        (row["benchmark"], item_of(CHECKED[row["benchmark"]], row)): row.get("status")
        for row in s.earlier
        if row["benchmark"] in CHECKED
    }
    failed = [known for known, status in newest.items() if status in AGAIN]
    for benchmark, item in sorted(failed, key=lambda known: AGAIN.index(newest[known])):
        yield s.task(benchmark, [item])
    for task in itertools.chain(correct(s), forms(s)):
        left = [item for item in task.items if (task.about["benchmark"], item) not in newest]
        if left:
            yield replace(task, items=tuple(left))


def item_of(kind: type, row: Row) -> Any:
    """Make the item that a row is about."""
    given = {f.name: row[f.name] for f in fields(kind) if f.name in row}
    if "options" in given:
        given["options"] = tuple(map(tuple, given["options"]))
    return kind(**given)


#: The sizes (arithmetic, features, rows) whose tiles are tuned, in the order of their worth.
TUNED = (
    ("bf16", 128, 65536), ("bf16", 512, 32768), ("bf16", 128, 16384), ("bf16", 256, 32768),
    ("bf16", 64, 32768), ("tf32", 128, 16384), ("bf16", 1024, 32768), ("bf16", 128, 1024),
)  # fmt: skip


def tiles_of(s: Session) -> list[tune.Candidate]:
    capability = divmod(s.machine.capability, 10)
    return tune.candidates(TUNED, capability) if "triton" in s.engines else []


def compile_tiles(s: Session, candidates: list[tune.Candidate]) -> list[Lane]:
    return ahead(s, candidates, "compile tile")


def tuning(s: Session) -> list[Lane]:
    """Let one process time the candidates while the others compile the later ones."""
    listed = tiles_of(s)
    if not listed:
        return []
    (compiling,) = compile_tiles(s, listed[60:])
    compiling.size = max(1, s.workers - 1)
    timing = s.task("tune", listed, limit=10, startup=3.0, predicted=0.3)
    return [Lane(deque([timing])), compiling]


def tuned_headline(s: Session) -> Iterator[Task]:
    """Time the headline table again, then torch.compile, then more sizes and forms."""
    yield from headline(s, HEADLINE)
    yield measurement(s, s.timing("compiled", 16384), limit=40, predicted=12.0)
    yield from headline(s, MORE)


def rivals(s: Session) -> Iterator[Task]:
    """Time other packages in cross_view, and our engines at the same size and precision."""
    ours = s.among("triton", "cuda")
    for dtype, names in (("bfloat16", PACKAGES), ("tf32", ("inf_cl",))):
        for name in (*ours, *names):
            if serves(name, "infonce", "cross_view"):
                timing = s.timing(name, 32768, dtype=dtype, negatives="cross_view")
                yield measurement(s, timing, limit=20, predicted=3.0)


def sanitize(s: Session) -> Iterator[Task]:
    """Run the memory checker on both backends, and the race checker on the CUDA kernels."""
    given = {"seconds": 16.0, "log": str(s.out / "children.log")}
    for backend, checker in (("cuda", "memcheck"), ("triton", "memcheck"), ("cuda", "racecheck")):
        if backend in s.among(backend):
            item = {"backend": backend, "checker": checker}
            yield s.task("sanitize", [item], arguments=given, limit=25, predicted=5)


def random_checks(s: Session) -> Iterator[Task]:
    """Run the table of checks, six cases to a process; call 1 has checked one of each form."""
    engines = s.among("triton", "cuda", "blocked")
    table = list(itertools.islice(checks.cases(engines, s.dims, s.pairs), 3000))
    for k in range(0, len(table), 6):
        yield s.task("check", table[k : k + 6], predicted=0.5)


CALLS: dict[int, Callable[[Session], list[Phase]]] = {1: first, 2: second}


def default_workers() -> int:
    """Leave two cores to the process that runs the call and to the system, and use 14 at most."""
    return max(1, min(14, cores() - 2))
