"""What a loss over many processes will cost: memory, work, messages and time of a step, for both
strategies.

Messages are counted exactly, operation by operation, as `alphacl_fast.distributed` sends them
(`tools/scaling.py` holds the count against real processes, byte for byte). Memory is a count of the
blocks that live at once. Time is a model: work at the rate of one device, messages at a stated
bandwidth, a stated latency for each. The objective is InfoNCE: two sweeps.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from .bundles import accumulation_dtype
from .call import Layout, Loss
from .objectives import make

#: Bytes of the message with which each process begins a call.
STATEMENT_BYTES = 1024
#: Scalars per anchor that travel with the rows: t⁺, and for the gradient also gain and shift. Sums
#: that travel back: base and Σ.
SCALARS, SUMS = (1, 3), 2
#: The first sweep's share of the floor of 8·D operations per pair; the gradient takes three
#: products.
FIRST_SWEEP = 1 / 4


def steps(world: int) -> range:
    """Distances to the blocks that a rank's own block meets at that rank."""
    return range(1, world // 2 + 1)


def aligned(size: int) -> int:
    """The bytes of a gathered message that holds this many; none is empty."""
    return max(-(-size // 16), 1) * 16


def messages(
    strategy: str,
    rank: int,
    sizes: tuple[int, ...],
    dim: int,
    dtype: torch.dtype,
    negatives: str,
    symmetric: bool = True,
) -> Counter[str]:
    """Bytes that one step of InfoNCE passes to each operation of `torch.distributed`.

    The temperature is fixed.

    all_gather and all_reduce count the bytes of the process's own tensor, reduce_scatter counts the
    tensors of all processes, and isend counts the bytes sent.
    """
    world = len(sizes)
    call = Loss(make("infonce"), "cosine", negatives, symmetric, "mean")
    layouts = [Layout.of(call, n) for n in sizes]
    wide, narrow = accumulation_dtype(dtype).itemsize, dtype.itemsize
    scaled = wide if narrow < wide else 0  # 1/‖z‖ beside raw rows

    def rows(layout: Layout) -> int:
        return layout.rows * (dim * narrow + scaled)

    def results(layout: Layout) -> tuple[int, int]:  # of the two sweeps
        return SUMS * layout.anchors * wide, layout.rows * dim * wide

    sent = Counter(all_gather=STATEMENT_BYTES, all_reduce=wide)  # agreeing on the call; the loss
    if strategy == "ring":
        for sweep in range(2):
            for step in steps(world):
                block, visitor = layouts[(rank + step - 1) % world], layouts[(rank + step) % world]
                sent["isend"] += (
                    rows(block) + SCALARS[sweep] * block.anchors * wide + results(visitor)[sweep]
                )
        return sent
    if world == 1:
        return sent

    sent["all_gather"] += aligned(max(map(rows, layouts)))
    anchors = max(layout.anchors for layout in layouts)
    for sweep in range(2):
        sent["all_gather"] += aligned(SCALARS[sweep] * anchors * wide)
        sent["reduce_scatter"] += world * max(results(layout)[sweep] for layout in layouts)
    sent["all_reduce"] += world * anchors * wide  # the bases of the sums
    return sent


def traffic(sent: Counter[str], world: int) -> float:
    """Bytes that leave a process if the collectives are optimal: rings of P − 1
    steps.
    """
    part = (world - 1) / world
    return (
        sent["isend"]
        + sent["all_gather"] * (world - 1)
        + sent["reduce_scatter"] * part
        + sent["all_reduce"] * 2 * part
    )


@dataclass(frozen=True)
class Plan:
    """One strategy's cost per device: bytes, operations, seconds."""

    strategy: str
    memory: float
    flops: float
    sent: float
    compute: float
    seconds: float

    @property
    def exposed(self) -> float:
        """Share of the step in which the device waits for messages."""
        return 1 - self.compute / self.seconds


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
) -> list[Plan]:
    """Costs of both strategies for a batch of pairs that is spread evenly.

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

    Returns:
        A list of two: the costs of "gather" and the costs of "ring".

    Raises:
        ValueError: fewer pairs than devices, or a number that is not positive.
    """
    for name, value in (("dim", dim), ("gpus", gpus), ("rate", rate), ("bandwidth", bandwidth)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if batch < max(gpus, 2):
        raise ValueError(f"batch must be at least 2 and the number of gpus, {gpus}, got {batch}")
    here = -(-batch // gpus)
    call = Loss(make("infonce"), "cosine", negatives, True, "mean")
    rows = Layout.of(call, here).rows
    pairs = {"two_view": 2 * batch**2, "one_view": batch**2 / 2, "cross_view": batch**2}[negatives]
    flops = 8 * dim * pairs / gpus
    compute = flops / rate
    # bytes of a block
    wide, narrow = (
        accumulation_dtype(dtype).itemsize * dim * rows,
        dtype.itemsize * dim * rows,
    )
    plans = []
    for strategy in ("gather", "ring"):
        sent = traffic(messages(strategy, 0, (here,) * gpus, dim, dtype, negatives), gpus)
        last = gpus // 2
        # the rows and results of all processes, and half of them again beside the own block
        if strategy == "gather":
            memory = narrow * (2 + gpus + last + 1) + wide * (gpus + last + 1 + 2)
            seconds = (
                compute
                + sent / bandwidth
                + 6 * latency * max(1, gpus.bit_length() - 1) * (gpus > 1)
            )
        else:
            memory = narrow * 6 + wide * 8
            seconds = _ring_seconds(compute, gpus, rows, dim, dtype, bandwidth, latency)
        plans.append(Plan(strategy, memory, flops, sent, compute, seconds))
    return plans


def _ring_seconds(
    compute: float,
    gpus: int,
    rows: int,
    dim: int,
    dtype: torch.dtype,
    bandwidth: float,
    latency: float,
) -> float:
    """Per sweep: the own block overlaps the first message, each rectangle the next message, and
    nothing overlaps the last result.
    """
    last = gpus // 2
    if not last:
        return compute
    wide = accumulation_dtype(dtype).itemsize
    total = 0.0
    for share, results in ((FIRST_SWEEP, SUMS * rows * wide), (1 - FIRST_SWEEP, rows * dim * wide)):
        rectangle = 2 * share * compute / gpus  # of two blocks; the own block is half of one
        block = latency + rows * dim * dtype.itemsize / bandwidth
        back = latency + results / bandwidth
        final = rectangle / 2 if gpus % 2 == 0 else rectangle
        total += (
            max(rectangle / 2, block) + (last - 1) * max(rectangle, block + back) + final + back
        )
    return total


def recommended(plans: list[Plan], memory: float | None) -> str:
    """The fastest strategy that fits into a device's memory, or why there is none."""
    fitting = [p for p in plans if memory is None or p.memory <= memory]
    return min(fitting, key=lambda p: p.seconds).strategy if fitting else "neither fits"
