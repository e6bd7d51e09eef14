"""Compare `alphacl plan`'s message counts with real processes; write docs/scaling.md's tables.

    python -m tools.scaling --simulate  # 2 to 6 gloo processes on this machine
    python -m tools.scaling --host      # the host's time for a step; needs a quiet machine
    python -m tools.scaling --write     # docs/scaling.md and docs/scaling.png

The first two write rows to benchmarks/results/scaling.jsonl and scaling_host.jsonl, the third reads
them and the plan.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import platform
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from alphacl_fast.benchmarks.report import figure, markdown
from alphacl_fast.call import Need
from alphacl_fast.distributed import Ranks, global_loss
from alphacl_fast.functional import alpha_cl_loss, bind, make_call
from alphacl_fast.journal import read
from alphacl_fast.plan import STATEMENT_BYTES, messages, plan, traffic
from alphacl_fast.process_groups import Arrival, ProcessGroup, Statement

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "scaling.jsonl"
HOST_RESULTS = RESULTS.with_name("scaling_host.jsonl")
MARK = "<!-- tables: python -m tools.scaling --write -->"
#: (pairs, devices) of the table's rows.
SCALES = (
    (65_536, 8),
    (1_000_000, 16),
    (1_000_000, 64),
    (1_000_000, 1024),
    (4_000_000, 64),
    (16_000_000, 256),
    (100_000_000, 1024),
)
DIM = 512
MACHINE = {"rate": 300e12, "bandwidth": 50e9, "device": "cuda"}
NODE = 8  # devices of a node
STRATEGIES, MODES = ("gather", "ring", "two_level"), ("two_view", "cross_view")
DTYPES = ("float32", "bfloat16")
SIMULATED = 32  # features in the simulation


@contextmanager
def recorder(world: int):
    """Count the bytes handed to `torch.distributed` inside, like `alphacl_fast.plan.messages`.

    Messages in a smaller group than ``world`` processes are those of a node.
    """
    sent: Counter[str] = Counter()

    def counting(name, label, size, group_of):
        original = getattr(dist, name)

        def call(*arguments, **options):
            size_of_group = dist.get_world_size(group_of(arguments, options))
            prefix = "node_" if size_of_group < world else ""
            sent[prefix + label] += size(*arguments[:2])
            return original(*arguments, **options)

        return mock.patch.object(dist, name, call)

    def given(arguments, options):
        return options["group"]

    with (
        counting("all_gather_into_tensor", "all_gather", lambda out, mine: mine.nbytes, given),
        counting("reduce_scatter_tensor", "reduce_scatter", lambda out, mine: mine.nbytes, given),
        counting("all_reduce", "all_reduce", lambda mine, *_: mine.nbytes, given),
        counting(
            "batch_isend_irecv",
            "isend",
            lambda steps: sum(o.tensor.nbytes for o in steps if o.op is dist.isend),
            lambda arguments, _: arguments[0][0].group,
        ),
    ):
        yield sent


def recorded(
    group,
    sizes: tuple[int, ...],
    dim: int,
    dtype: torch.dtype,
    strategy: str,
    negatives: str,
    ranks_per_node: int | None = None,
) -> Counter[str]:
    """Count the bytes that this process sends in one InfoNCE step."""
    pairs = sizes[dist.get_rank(group)]
    z1, z2 = (torch.randn(pairs, dim).to(dtype).requires_grad_() for _ in range(2))
    settings = {"negatives": negatives, "process_group": group, "strategy": strategy}
    with recorder(len(sizes)) as sent:
        alpha_cl_loss(z1, z2, ranks_per_node=ranks_per_node, **settings).backward()
    return sent


def ranks_per_node(world: int) -> int:
    """The smallest number of processes of a node that makes several nodes, or all of them."""
    return next((k for k in range(2, world) if world % k == 0), world)


def _process(rank: int, world: int, store: str, results) -> None:
    torch.set_num_threads(1)
    files, limit = dist.FileStore(store, world), timedelta(seconds=120)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=files, timeout=limit)
    even, uneven = (64,) * world, tuple(64 + 8 * (r % 3) for r in range(world))
    for sizes, dtype, strategy, negatives in itertools.product(
        (even, uneven), DTYPES, STRATEGIES, MODES
    ):
        nodes = ranks_per_node(world) if strategy == "two_level" else None
        case = getattr(torch, dtype), strategy, negatives, nodes
        sent = recorded(dist.group.WORLD, sizes, SIMULATED, *case)
        results.put((rank, sizes, dtype, strategy, negatives, dict(sent)))
    dist.barrier()
    dist.destroy_process_group()


def simulate(worlds: range = range(2, 7)) -> None:
    """Record the bytes that each of several processes sends, and compare them with the plan.

    Raises:
        AssertionError: they differ.
    """
    rows = []
    for world in worlds:
        results = processes.get_context("spawn").SimpleQueue()
        store = os.path.join(tempfile.mkdtemp(), "store")
        context = processes.spawn(_process, (world, store, results), world, join=False)
        count = 2 * len(DTYPES) * len(STRATEGIES) * len(MODES) * world
        answers = [results.get() for _ in range(count)]
        context.join()
        for rank, sizes, dtype, strategy, negatives, sent in answers:
            nodes = ranks_per_node(world) if strategy == "two_level" else 1
            expected = +messages(
                strategy, rank, sizes, SIMULATED, getattr(torch, dtype), negatives,
                ranks_per_node=nodes, gloo=True,
            )  # fmt: skip
            if +Counter(sent) != expected:
                case = f"{world} processes, rank {rank}, {strategy}, {negatives}"
                raise AssertionError(f"{case}: {sent}, not {dict(expected)}")
            rows.append({
                "processes": world, "rank": rank, "pairs": sizes, "dim": SIMULATED, "dtype": dtype,
                "strategy": strategy, "negatives": negatives, "ranks_per_node": nodes, "sent": sent,
                "predicted": expected, "torch": torch.__version__,
            })  # fmt: skip
        print(f"{world} processes: {count} counts equal", flush=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True)
class _Silent(Ranks):
    """Ranks whose messages go nowhere: what is left is the host's time."""

    def all_reduce(self, x, op=None):
        return x.clone()

    def all_gather(self, x):
        return x.new_zeros(self.world, x.numel())

    def reduce_scatter(self, x):
        return x.new_zeros(x.shape[1])

    def exchange(self, outgoing, to, size, source, tag):
        return Arrival(self, outgoing.new_zeros(size), outgoing, size, [], [])


def _step_seconds(world: int, strategy: str, repetitions: int = 5) -> float:
    """The fastest step of one rank of many, with one pair of 8 features on each."""
    ranks = _Silent(None, 0, world, (1,) * world, Need(True, True, False), strategy)
    call = make_call(
        "infonce", {}, similarity="cosine", negatives="two_view", reduction="mean",
        backend="auto", precision=None, process_group=ProcessGroup("world", "auto"),
    )  # fmt: skip
    z1, z2 = (torch.randn(1, 8, requires_grad=True) for _ in range(2))
    tau, bound, _ = bind(z1, z2, 0.5, call)
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        global_loss(z1, z2, tau, replace(bound, ranks=ranks))
        times.append(time.perf_counter() - start)
    return min(times)


def measure_host() -> None:
    """Write the host's time for a step of a ring, a block of a gather, and a statement."""
    torch.set_num_threads(1)
    few, many = 32, 512
    ring, gather = (
        _step_seconds(many, strategy) - _step_seconds(few, strategy)
        for strategy in ("ring", "gather")
    )
    message = pickle.dumps(Statement(None, "x" * 200)).ljust(STATEMENT_BYTES, b"\0")
    received, times = torch.frombuffer(bytearray(message * many), dtype=torch.uint8), []
    for _ in range(5):
        start = time.perf_counter()
        messages = [x.numpy().tobytes() for x in received.view(many, -1).unbind()]
        len({message[16:] for message in messages})
        times.append(time.perf_counter() - start)
    row = {
        "ring_step": ring / (many - few),  # two sweeps of (many - few)/2 steps
        "gather_block": gather / (2 * (many - few)),
        "statement": min(times) / many,
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    print(", ".join(f"{name} {1e6 * row[name]:.1f} µs" for name in list(row)[:3]))
    HOST_RESULTS.write_text(json.dumps(row) + "\n")


def tables() -> str:
    """Format the computed part of docs/scaling.md."""
    header = (
        "pairs", "devices", "strategy", "memory (GB)", "work (TFLOP)", "messages (GB)", "step (s)",
        "waiting",
    )  # fmt: skip
    plans = [
        (
            f"{batch:,}", f"{gpus:,}", p.strategy, f"{p.memory / 1e9:,.2f}",
            f"{p.flops / 1e12:,.1f}", f"{p.sent / 1e9:,.2f}", f"{p.seconds:,.3g}",
            f"{100 * p.exposed:.1f} %",
        )
        for batch, gpus in SCALES
        for p in plan(batch, DIM, gpus, ranks_per_node=NODE if gpus > NODE else None, **MACHINE)
    ]  # fmt: skip
    totals: dict[tuple, Counter[str]] = {}
    for row in read(RESULTS):
        if row["negatives"] == "two_view" and set(row["pairs"]) == {64}:
            case = row["processes"], row["strategy"], row["dtype"]
            total = totals.setdefault(case, Counter())
            for kind in ("sent", "predicted"):
                total[kind] += traffic(Counter(row[kind]), case[0], row["ranks_per_node"])
    order = [*STRATEGIES, *DTYPES]
    cases = sorted(totals, key=lambda case: (case[0], *map(order.index, case[1:])))
    lines = [
        *markdown(header, plans), "",
        "Bytes that all processes sent in one step (64 pairs each, 32 features). Both columns put "
        "counts of operations through the same formula for collectives; the first column's counts "
        "were recorded in processes, the second column's are predicted:", "",
        *markdown(
            ("processes", "strategy", "rows", "recorded", "predicted"),
            ((*case, *(f"{total:,.0f}" for total in totals[case].values())) for case in cases),
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def plot(path: Path) -> None:
    """Plot the predicted step time of 1 M pairs against the number of devices."""
    devices = [2**k for k in range(3, 11)]
    plans = [plan(1_000_000, DIM, gpus, ranks_per_node=NODE, **MACHINE) for gpus in devices]
    with figure(path, 1, 1, 6, 3.6) as ((axis,),):
        for k, strategy in enumerate(STRATEGIES):
            axis.loglog(devices, [p[k].seconds for p in plans], "o-", base=2, label=strategy)
        axis.loglog(devices, [p[0].compute for p in plans], "k:", base=2, label="work alone")
        title = "1 M pairs, 512 features, bfloat16"
        axis.set(xlabel="devices", ylabel="predicted seconds per step", title=title)
        axis.legend()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(arguments)
    if given.simulate:
        simulate()
    if given.host:
        measure_host()
    if given.write:
        page = ROOT / "docs" / "scaling.md"
        head, mark, _ = page.read_text().partition(MARK)
        assert mark, f"{page} has no line {MARK}"
        page.write_text(f"{head}{MARK}\n\n{tables()}")
        plot(ROOT / "docs" / "scaling.png")
    if not (given.simulate or given.host or given.write):
        print(tables())


if __name__ == "__main__":
    main()
