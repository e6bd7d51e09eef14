"""Holds the message count of `alphacl plan` against 2 to 8 real processes; writes the tables and the plot of docs/scaling.md.

    python -m tools.scaling --simulate       # gloo processes on this machine; rows go to benchmarks/results/scaling.jsonl
    python -m tools.scaling --write          # docs/scaling.md and docs/scaling.png, from those rows and the plan
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from alphacl_fast.functional import alpha_cl_loss
from alphacl_fast.plan import messages, plan, traffic

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "scaling.jsonl"
MARK = "<!-- tables: python -m tools.scaling --write -->"
#: (pairs, devices) of the table.
SCALES = ((65_536, 8), (1_000_000, 16), (4_000_000, 64), (16_000_000, 256), (100_000_000, 1024))
DIM, RATE, BANDWIDTH = 512, 300e12, 50e9


class Recorder:
    """Counts what this process hands to `torch.distributed` while it is entered, as `alphacl_fast.plan.messages` does."""

    FUNCTIONS = (("all_gather_into_tensor", 1), ("reduce_scatter_tensor", 1), ("all_reduce", 0))

    def __enter__(self) -> Counter[str]:
        self.sent: Counter[str] = Counter()
        self._originals = {name: getattr(dist, name) for name, _ in self.FUNCTIONS}
        self._batch = dist.batch_isend_irecv
        for name, argument in self.FUNCTIONS:
            setattr(dist, name, self._counting(name, argument))
        dist.batch_isend_irecv = self._sending
        return self.sent

    def __exit__(self, *_) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)
        dist.batch_isend_irecv = self._batch

    def _counting(self, name: str, argument: int):
        def call(*arguments, **options):
            self.sent[name.replace("_into_tensor", "").replace("_tensor", "")] += arguments[argument].nbytes
            return self._originals[name](*arguments, **options)

        return call

    def _sending(self, operations):
        self.sent["isend"] += sum(o.tensor.nbytes for o in operations if o.op is dist.isend)
        return self._batch(operations)


def recorded(group, sizes: tuple[int, ...], dim: int, dtype: torch.dtype, strategy: str, negatives: str) -> Counter[str]:
    """What this process of a group sends in one step of InfoNCE."""
    pairs = sizes[dist.get_rank(group)]
    z1, z2 = (torch.randn(pairs, dim).to(dtype).requires_grad_() for _ in range(2))
    with Recorder() as sent:
        alpha_cl_loss(z1, z2, negatives=negatives, process_group=group, strategy=strategy).backward()
    return sent


def _process(rank: int, world: int, store: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=world, store=dist.FileStore(store, world), timeout=timedelta(seconds=120)
    )
    for sizes in (tuple(64 for _ in range(world)), tuple(64 + 8 * (r % 3) for r in range(world))):
        for dtype in (torch.float32, torch.bfloat16):
            for strategy in ("gather", "ring"):
                for negatives in ("two_view", "cross_view"):
                    sent = recorded(dist.group.WORLD, sizes, 32, dtype, strategy, negatives)
                    results.put((rank, sizes, str(dtype).removeprefix("torch."), strategy, negatives, dict(sent)))
    dist.barrier()
    dist.destroy_process_group()


def simulate(worlds: range = range(2, 9)) -> None:
    """Runs that many processes and writes what each sent beside what the plan says. Raises where they differ."""
    rows = []
    for world in worlds:
        results = processes.get_context("spawn").SimpleQueue()
        store = os.path.join(tempfile.mkdtemp(), "store")
        context = processes.spawn(_process, (world, store, results), world, join=False)
        answers = [results.get() for _ in range(16 * world)]
        context.join()
        for rank, sizes, dtype, strategy, negatives, sent in answers:
            expected = messages(strategy, rank, sizes, 32, getattr(torch, dtype), negatives)
            if +Counter(sent) != +expected:
                raise AssertionError(f"{world} processes, rank {rank}, {strategy}, {negatives}: {sent}, not {dict(expected)}")
            rows.append({"processes": world, "rank": rank, "pairs": sizes, "dim": 32, "dtype": dtype, "strategy": strategy,
                         "negatives": negatives, "sent": sent, "predicted": dict(+expected), "torch": torch.__version__})
        print(f"{world} processes: {16 * world} counts equal", flush=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tables() -> str:
    """The part of docs/scaling.md that is computed."""
    lines = [
        "| pairs | devices | strategy | memory (GB) | work (TFLOP) | messages (GB) | step (s) | waiting |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for batch, gpus in SCALES:
        for p in plan(batch, DIM, gpus, rate=RATE, bandwidth=BANDWIDTH):
            cells = (f"{batch:,}", f"{gpus:,}", p.strategy, f"{p.memory / 1e9:,.2f}", f"{p.flops / 1e12:,.1f}",
                     f"{p.sent / 1e9:,.2f}", f"{p.seconds:,.3g}", f"{100 * p.exposed:.1f} %")  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "", "Bytes that all processes sent in one step (64 pairs each, 32 features), recorded and predicted:", "",
        "| processes | strategy | rows | recorded | predicted |", "|---|---|---|---|---|",
    ]
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    for world in sorted({row["processes"] for row in rows}):
        for strategy in ("gather", "ring"):
            for dtype in ("float32", "bfloat16"):
                wanted = {"processes": world, "strategy": strategy, "dtype": dtype, "negatives": "two_view"}
                chosen = [row for row in rows if wanted.items() <= row.items() and set(row["pairs"]) == {64}]
                totals = [sum(traffic(Counter(row[kind]), world) for row in chosen) for kind in ("sent", "predicted")]
                lines.append(f"| {world} | {strategy} | {dtype} | {totals[0]:,.0f} | {totals[1]:,.0f} |")
    return "\n".join(lines) + "\n"


def plot(path: Path) -> None:
    """Predicted step time of 4 M pairs over the number of devices."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    devices = [2**k for k in range(3, 11)]
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for k, strategy in enumerate(("gather", "ring")):
        times = [plan(4_000_000, DIM, gpus, rate=RATE, bandwidth=BANDWIDTH)[k].seconds for gpus in devices]
        axes.loglog(devices, times, "o-", base=2, label=strategy)
    ideal = [plan(4_000_000, DIM, gpus, rate=RATE, bandwidth=BANDWIDTH)[0].compute for gpus in devices]
    axes.loglog(devices, ideal, "k:", base=2, label="work alone")
    axes.set(xlabel="devices", ylabel="predicted seconds per step", title="4 M pairs, 512 features, bfloat16")
    axes.legend()
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(arguments)
    if given.simulate:
        simulate()
    if given.write:
        page = ROOT / "docs" / "scaling.md"
        head, mark, _ = page.read_text().partition(MARK)
        assert mark, f"{page} has no line {MARK}"
        page.write_text(f"{head}{MARK}\n\n{tables()}")
        plot(ROOT / "docs" / "scaling.png")
    if not given.simulate and not given.write:
        print(tables())


if __name__ == "__main__":
    main()
