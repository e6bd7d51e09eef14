"""What a loss over many processes will cost: memory, work, messages and time of a step, for each
strategy.

Messages are counted exactly, operation by operation, as `alphacl_fast.distributed` sends them
(`tools/scaling.py` holds the count against real processes, byte for byte). Memory is a count of the
blocks that live at once. Time is a model: work at the rate of one device, messages at a stated
bandwidth, a stated latency for each, and the host's own time for each step. The objective is
InfoNCE: two sweeps.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .bundles import accumulation_dtype
from .call import Layout, Loss
from .objectives import make

__all__ = ["Plan", "messages", "plan", "recommended", "traffic"]

#: Bytes of the message with which each process begins a call.
STATEMENT_BYTES = 1024
#: Scalars per anchor that travel with the rows: t⁺, and for the gradient also gain and shift. Sums
#: that travel back: base and Σ.
SCALARS, SUMS = (1, 3), 2
#: The first sweep's share of the floor of 8·D operations per pair; the gradient takes three
#: products.
FIRST_SWEEP = 1 / 4
#: Seconds that the host takes for a step of a ring, and for the statement of a process; a block of
#: a gather takes a fifth of a step. Measured by `python -m tools.scaling --host` (docs/scaling.md).
HOST_STEP, HOST_STATEMENT = 270e-6, 2e-6
HOST_BLOCK = 1 / 5
#: What `recommended_ring` takes for the rate of a device, in FLOP/s at 8·D per pair of rows.
RATES = {"cuda": 300e12}
CPU_RATE = 0.1e12
#: Numbers of a tile in which the CPU kernels can keep the gradient of a block of rows, and the most
#: rows of a block.
_TILE, _BLOCK_ROWS = 45_000, 192


def steps(world: int) -> range:
    """Distances to the blocks that a rank's own block meets at that rank."""
    return range(1, world // 2 + 1)


def aligned(size: int) -> int:
    """The bytes of a gathered message that holds this many; none is empty."""
    return max(-(-size // 16), 1) * 16


# --- messages -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """One step of InfoNCE, in bytes."""

    layouts: list[Layout]
    dim: int
    dtype: torch.dtype

    @property
    def wide(self) -> int:
        return accumulation_dtype(self.dtype).itemsize

    def rows(self, rank: int) -> int:
        """A block's rows; beside raw rows travels 1/‖z‖."""
        narrow = self.dtype.itemsize
        return self.layouts[rank].rows * (
            self.dim * narrow + (self.wide if narrow < self.wide else 0)
        )

    def scalars(self, rank: int, sweep: int) -> int:
        return SCALARS[sweep] * self.layouts[rank].anchors * self.wide

    def results(self, rank: int, sweep: int) -> int:
        layout = self.layouts[rank]
        return (layout.rows * self.dim if sweep else SUMS * layout.anchors) * self.wide

    def travelling(self, rank: int, stride: int) -> int:
        """Bytes that a process sends around the ring of every ``stride``-th process.

        Empty messages travel as one element.
        """
        world, sent = len(self.layouts), 0
        for sweep in range(2):
            for step in steps(world // stride):
                block = (rank + (step - 1) * stride) % world
                visitor = (rank + step * stride) % world
                sent += max(self.rows(block) + self.scalars(block, sweep), 1)
                sent += max(self.results(visitor, sweep), self.wide)
        return sent

    def gathered(self, members: range, gloo: bool, label: str) -> Counter[str]:
        """Bytes of a gather among some processes, and of the way home."""
        sent: Counter[str] = Counter()
        sent[f"{label}all_gather"] = aligned(max(map(self.rows, members)))
        for sweep in range(2):
            sent[f"{label}all_gather"] += aligned(max(self.scalars(r, sweep) for r in members))
            largest = max(self.results(r, sweep) for r in members)
            if gloo:  # one message for each of the others
                sent[f"{label}isend"] += (len(members) - 1) * max(largest, self.wide)
            else:
                sent[f"{label}reduce_scatter"] += len(members) * largest
        anchors = max(self.layouts[r].anchors for r in members)
        sent[f"{label}all_reduce"] += len(members) * anchors * self.wide  # the bases of the sums
        return sent


def messages(
    strategy: str,
    rank: int,
    sizes: tuple[int, ...],
    dim: int,
    dtype: torch.dtype,
    negatives: str,
    symmetric: bool = True,
    *,
    ranks_per_node: int = 1,
    gloo: bool = False,
) -> Counter[str]:
    """Bytes that one step of InfoNCE passes to each operation of `torch.distributed`.

    The temperature is fixed.

    Args:
        strategy: "gather", "ring" or "two_level".
        rank: the process.
        sizes: pairs of each process.
        dim: features of an embedding.
        dtype: dtype of the embeddings.
        negatives: "two_view", "one_view" or "cross_view".
        symmetric: whether both directions of "cross_view" are computed.
        ranks_per_node: neighbouring processes that share a node, for "two_level".
        gloo: whether the messages travel by gloo, where a reduce-scatter is a message to each of
            the other processes.

    Returns:
        all_gather and all_reduce count the bytes of the process's own tensor, reduce_scatter counts
        the tensors of all processes, and isend counts the bytes sent. The prefix ``node_`` belongs
        to the group of a node that is not the whole group.
    """
    world = len(sizes)
    call = Loss(make("infonce"), "cosine", negatives, symmetric, "mean")
    step = _Step([Layout.of(call, n) for n in sizes], dim, dtype)
    sent = Counter(all_gather=STATEMENT_BYTES, all_reduce=step.wide)  # the agreement; the loss
    if strategy == "ring":
        sent["isend"] += step.travelling(rank, 1)
    elif strategy == "two_level":
        first = rank - rank % ranks_per_node
        label = "node_" if ranks_per_node < world else ""
        sent += step.gathered(range(first, first + ranks_per_node), gloo, label)
        sent["isend"] += step.travelling(rank, ranks_per_node)
    elif world > 1:
        sent += step.gathered(range(world), gloo, "")
    return sent


def traffic(sent: Counter[str], world: int, ranks_per_node: int = 1) -> float:
    """Bytes that leave a process if the collectives are optimal: rings of P − 1 steps."""
    return sum(
        sent[f"{label}isend"]
        + sent[f"{label}all_gather"] * (size - 1)
        + sent[f"{label}reduce_scatter"] * (size - 1) / size
        + sent[f"{label}all_reduce"] * 2 * (size - 1) / size
        for label, size in (("", world), ("node_", ranks_per_node))
    )


# --- costs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One strategy's cost per device: bytes, operations, seconds.

    Attributes:
        strategy: "gather", "ring" or "two_level".
        memory: bytes that the loss takes beside the embeddings.
        flops: operations, counted as 8·D per pair of rows.
        sent: bytes that leave the device.
        compute: seconds of work.
        seconds: of a step.
        host: seconds that the host needs to start the step's operations.
    """

    strategy: str
    memory: float
    flops: float
    sent: float
    compute: float
    seconds: float
    host: float = 0.0

    @property
    def exposed(self) -> float:
        """Share of the step in which the device waits for messages or for the host."""
        return 1 - self.compute / self.seconds


@dataclass(frozen=True)
class _Machine:
    bandwidth: float
    node_bandwidth: float
    latency: float
    host: float


def plan(
    batch: int,
    dim: int,
    gpus: int,
    *,
    rate: float,
    bandwidth: float = 50e9,
    latency: float = 20e-6,
    dtype: torch.dtype = torch.bfloat16,
    negatives: str = "two_view",
    ranks_per_node: int | None = None,
    node_bandwidth: float = 300e9,
    host: float = HOST_STEP,
    device: str | None = None,
) -> list[Plan]:
    """Costs of the strategies for a batch of pairs that is spread evenly.

    Args:
        batch: pairs of all devices together.
        dim: features of an embedding.
        gpus: number of devices.
        rate: FLOP/s of one device, counted as 8·D per pair of rows (measure it with
            `alphacl_fast.rate.measured_rate`).
        bandwidth: bytes/s that leave a device while as many arrive.
        latency: seconds until a message begins to flow.
        dtype: dtype of the embeddings.
        negatives: "two_view", "one_view" or "cross_view" (see
            `alphacl_fast.functional.alpha_cl_loss`).
        ranks_per_node: devices of a node, a divisor of ``gpus``, for the costs of "two_level".
            None leaves that strategy out.
        node_bandwidth: bytes/s from a device to the others of its node; "two_level" alone counts
            with it.
        host: seconds that the host takes for a step of a ring; a block of a gather takes a fifth.
        device: "cuda" or "cpu", whose kernels' workspace is counted: the CPU kernels keep copies
            of the rows at hand. None: the type that this machine would compute on.

    Returns:
        The costs of "gather", of "ring", and with ``ranks_per_node`` of "two_level".

    Raises:
        ValueError: fewer pairs than devices, a number that is not positive, or nodes that do not
            divide the devices.
    """
    positive = {
        "dim": dim, "gpus": gpus, "rate": rate, "bandwidth": bandwidth,
        "node_bandwidth": node_bandwidth,
    }  # fmt: skip
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if not host >= 0:
        raise ValueError(f"host must be at least 0, got {host}")
    if batch < max(gpus, 2):
        raise ValueError(f"batch must be at least 2 and the number of gpus, {gpus}, got {batch}")
    if ranks_per_node is not None and (ranks_per_node < 1 or gpus % ranks_per_node):
        raise ValueError(
            f"ranks_per_node must divide the number of gpus, {gpus}, got {ranks_per_node}"
        )
    here = -(-batch // gpus)
    call = Loss(make("infonce"), "cosine", negatives, True, "mean")
    step = _Step([Layout.of(call, here)] * gpus, dim, dtype)
    pairs = {"two_view": 2 * batch**2, "one_view": batch**2 / 2, "cross_view": batch**2}[negatives]
    flops = 8 * dim * pairs / gpus
    compute = flops / rate
    machine = _Machine(bandwidth, node_bandwidth, latency, host)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    plans = []
    per_node = {"gather": 1, "ring": 1, "two_level": ranks_per_node}
    for strategy, size in per_node.items():
        if size is None:
            continue
        counted = messages(strategy, 0, (here,) * gpus, dim, dtype, negatives, ranks_per_node=size)
        sent = traffic(counted, gpus, size)
        memory = _memory(strategy, gpus, size, step, negatives, device)
        if strategy == "gather":
            seconds, hosts = _gather_seconds(compute, gpus, sent, machine)
        else:
            seconds, hosts = _ring_seconds(compute, gpus, size, step, machine)
        plans.append(Plan(strategy, memory, flops, sent, compute, seconds, hosts))
    return plans


class _Moment(NamedTuple):
    """Blocks that live while the gradient kernel runs, beside those that live all the time."""

    joined: float  # that the kernel has at hand: rows, and their gradient
    rows: int  # that travel or visit
    results: int  # of those


def _moments(nodes: int, group: int, negatives: str) -> Iterator[_Moment]:
    """The work among a group that has gathered its rows, and each step of the ring of groups."""
    cross = negatives == "cross_view"  # one view of each block in each rectangle
    last = group // 2
    guests = last - 0.5 if group % 2 == 0 and not cross else last  # half of the last is met here
    joined = (1 + guests) / 2 if cross else 1 + guests
    yield _Moment(max(1.0, joined), 2 * (nodes > 1), 0)  # a block goes, and one comes
    for step in steps(nodes):
        visitor = 0.5 if 2 * step == nodes and not cross else 1.0
        joined = (visitor + group) / 2 if cross else visitor + group
        behind = 2 * (step > 1)  # results that arrive, and those that go
        yield _Moment(joined, 1 + (step < nodes // 2), 1 + behind)


def _memory(
    strategy: str, gpus: int, per_node: int, step: _Step, negatives: str, device: str
) -> float:
    """Bytes that live at once, at the peak of the gradient sweep."""
    rows = step.layouts[0].rows
    narrow, wide = (size * step.dim * rows for size in (step.dtype.itemsize, step.wide))
    group = {"gather": gpus, "ring": 1, "two_level": per_node}[strategy]
    gathered = 0 if strategy == "ring" or gpus == 1 else group * narrow
    peak = max(
        moment.joined * (narrow + wide + _workspace(moment.joined * rows, step, rows, device))
        + moment.rows * narrow
        + moment.results * wide
        for moment in _moments(gpus // group, group, negatives)
    )
    return narrow + gathered + group * wide + peak


def _workspace(rows: float, step: _Step, of_block: int, device: str) -> float:
    """Bytes of the kernels' own copies, per block."""
    if device != "cpu":
        return 0.0
    dim = step.dim
    apart = min(rows / 16, _BLOCK_ROWS) * dim > _TILE  # gradients do not fit into a tile
    return dim * of_block * (2 * step.dtype.itemsize + (step.wide if apart else 0))


def _agreement(gpus: int, machine: _Machine) -> tuple[float, float]:
    """Seconds of the all-gather that begins a call, and of the host in it."""
    if gpus == 1:
        return 0.0, 0.0
    host = machine.host + gpus * HOST_STATEMENT
    flow = (gpus - 1) * STATEMENT_BYTES / machine.bandwidth
    return machine.latency * math.ceil(math.log2(gpus)) + flow + host, host


def _gather_seconds(
    compute: float, gpus: int, sent: float, machine: _Machine
) -> tuple[float, float]:
    """Nothing overlaps; the host goes through the blocks while the device waits for messages or
    works.
    """
    agreement, first = _agreement(gpus, machine)
    if gpus == 1:
        return compute, 0.0
    host = 2 * gpus * HOST_BLOCK * machine.host
    collectives = 6 * machine.latency * math.ceil(math.log2(gpus))
    return agreement + max(compute + sent / machine.bandwidth + collectives, host), first + host


def _ring_seconds(
    compute: float, gpus: int, per_node: int, step: _Step, machine: _Machine
) -> tuple[float, float]:
    """Per sweep: the work within a node overlaps the first message, each rectangle the next message
    and the host's next step, and nothing overlaps the last result.
    """
    nodes = gpus // per_node
    last = nodes // 2
    if gpus == 1:
        return compute, 0.0
    seconds, hosts = _agreement(gpus, machine)
    others = per_node - 1
    for sweep, share in ((0, FIRST_SWEEP), (1, 1 - FIRST_SWEEP)):
        rectangle = 2 * share * compute / nodes  # of two nodes; a node's own is half of one
        gathered = (0 if sweep else step.rows(0)) + step.scalars(0, sweep)
        scattered = step.results(0, sweep)
        within = others * (gathered + scattered) / machine.node_bandwidth
        within += 2 * machine.latency * math.ceil(math.log2(per_node)) if others else 0.0
        own = rectangle / 2 + within
        here = machine.host * (1 + others * HOST_BLOCK)
        hosts += here + last * machine.host
        if not last:
            seconds += max(own, here)
            continue
        block = machine.latency + (step.rows(0) + step.scalars(0, sweep)) / machine.bandwidth
        back = machine.latency + step.results(0, sweep) / machine.bandwidth
        final = rectangle / 2 if nodes % 2 == 0 else rectangle
        seconds += max(own, block, here)
        seconds += (last - 1) * max(rectangle, block + back, machine.host)
        seconds += max(final, machine.host) + back
    return seconds, hosts


def recommended(plans: list[Plan], memory: float | None) -> str:
    """The fastest strategy that fits into a device's memory, or why there is none."""
    fitting = [p for p in plans if memory is None or p.memory <= memory]
    if not fitting:
        return "neither fits" if len(plans) == 2 else "none fits"
    return min(fitting, key=lambda p: p.seconds).strategy


@functools.lru_cache(maxsize=64)
def recommended_ring(
    pairs: int, dim: int, ranks: int, ranks_per_node: int, dtype: torch.dtype, negatives: str,
    device: str,
) -> str:  # fmt: skip
    """ "two_level" where it is predicted to be faster than "ring" by 3 % and more, else "ring".

    Args:
        pairs: of all ranks.
        device: type of the embeddings' device.
    """
    rate = RATES.get(device, CPU_RATE)
    _, ring, levels = plan(
        max(pairs, ranks, 2), dim, ranks, rate=rate, dtype=dtype, negatives=negatives,
        ranks_per_node=ranks_per_node, device=device,
    )  # fmt: skip
    return "two_level" if levels.seconds < 0.97 * ring.seconds else "ring"
