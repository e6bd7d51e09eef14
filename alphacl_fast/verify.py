"""`verify_distributed`: compares a live process group's loss with one process's.

    torchrun --nproc-per-node=4 -m alphacl_fast.verify

checks gloo, or NCCL where every process has a GPU; in a script, call `verify_distributed` between
its own steps.
"""

import builtins
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .bundles import accumulation_dtype
from .functional import NEGATIVES, alpha_cl_loss
from .objectives import make, names
from .process_groups import ProcessGroup

#: What rounding explains of a relative difference, by the dtype of the compared tensor. A gradient
#: that is wrong by 1 %, or lacks one row of 1,024, lies above every bound.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 5e-3,
}
LARGE_MESSAGE = 8 * 2**20
_LARGE_DIM = 16_384  # few long rows: bytes without much work


class _Setting(NamedTuple):
    """One comparison of the table."""

    objective: str
    negatives: str
    strategy: str
    ranks_per_node: int | None
    dtype: torch.dtype
    pairs: int
    dim: int


def relative_difference(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖/‖truth‖ in float64.

    It is 0 for two tensors of zeros or without elements, and infinite where one tensor holds a NaN,
    where the shapes differ, or where only the truth is 0.

    Args:
        value: the tensor that is checked, of any dtype.
        truth: the expected tensor, with the shape of ``value``.
    """
    if value.shape != truth.shape:
        return math.inf
    value, truth = value.detach().to(torch.float64), truth.detach().to(torch.float64)
    difference, norm = float((value - truth).norm()), float(truth.norm())
    if difference == 0:
        return 0.0
    return difference / norm if norm > 0 and math.isfinite(difference) else math.inf


def verify_distributed(
    process_group: Any = "world",
    *,
    objectives: tuple[str, ...] | None = None,
    pairs: int = 7,
    dim: int = 16,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    tolerance: float | None = None,
    large_message: int = LARGE_MESSAGE,
    print: Callable[[str], None] | None = builtins.print,
) -> list[dict[str, Any]]:
    """Compares a group's loss and gradients with one process's; every rank must call it.

    Each process has its own number of pairs, up to ``pairs``, and computes the whole batch by
    itself as well. Every objective is compared with every kind of negatives under every strategy.
    Gradients are compared after averaging them as DDP does. The difference of two tensors is the
    norm of their difference, divided by the norm of the expected tensor (`relative_difference`).

    Args:
        process_group: see `alphacl_fast.functional.alpha_cl_loss`.
        objectives: names; all by default.
        pairs: the most pairs of a process.
        dim: features of an embedding.
        dtype: dtype of the embeddings; None takes float64, float32 and bfloat16 in turn.
        device: device of the embeddings.
        tolerance: bound on every relative difference; None takes the one for the dtype of the
            compared tensor: 1e-10 for float64, 2e-5 for float32, 2e-3 for float16 and 5e-3 for
            bfloat16. The loss and the gradient in τ are float32 where the embeddings are narrower.
        large_message: bytes of a process's block in one more comparison of InfoNCE per strategy,
            since some faults of a network show in large messages alone; 0 leaves it out. The dtype
            is ``dtype``, or float32.
        print: receives a table, line by line, on the group's first process; None for silence.

    Returns:
        One dict per dtype, objective, negatives and strategy, with the largest ``residual`` of all
        processes and the share of its ``tolerance`` that it takes (``of_tolerance``); the same on
        every rank. Rows of large messages have their number of ``pairs``.

    Raises:
        RuntimeError: on every process, if a difference exceeds its tolerance; names the worst.
    """
    handle = ProcessGroup(process_group, "auto").handle()
    rank, world = dist.get_rank(handle), dist.get_world_size(handle)
    rows = []
    for setting in _settings(world, objectives or names(), pairs, dim, dtype, large_message):
        found = _compare(setting, handle, rank, world, device, tolerance)
        worst = torch.tensor(found, dtype=torch.float64, device=device)
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=handle)
        residual, of_tolerance = worst.tolist()
        rows.append({**setting._asdict(), "residual": residual, "of_tolerance": of_tolerance})
    if print is not None and rank == 0:
        _print_table(rows, world, pairs, device, print)
    worst = max(rows, key=lambda row: row["of_tolerance"])
    if not worst["of_tolerance"] <= 1:
        where = "{objective} ({negatives}, {strategy}, {dtype})".format(**worst)
        bound = worst["residual"] / worst["of_tolerance"]
        raise RuntimeError(
            f"residual of {where} must be at most {bound:.1g}, got {worst['residual']:.3g}"
        )
    return rows


def _settings(
    world: int,
    objectives: tuple[str, ...],
    pairs: int,
    dim: int,
    dtype: torch.dtype | None,
    large_message: int,
) -> Iterator[_Setting]:
    """All comparisons; those with the same expected tensors follow one another."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16) if dtype is None else (dtype,)
    strategies = [("gather", None), ("ring", None), ("two_level", _ranks_per_node(world))]
    for narrow in dtypes:
        for objective, negatives in product(objectives, NEGATIVES):
            for strategy, per_node in strategies:
                yield _Setting(objective, negatives, strategy, per_node, narrow, pairs, dim)
    if large_message:
        narrow, width = dtype or torch.float32, max(dim, _LARGE_DIM)
        most = 2 + -(-large_message // (2 * width * narrow.itemsize))  # the least has 2 fewer
        for strategy, per_node in strategies:
            yield _Setting("infonce", "two_view", strategy, per_node, narrow, most, width)


def _ranks_per_node(world: int) -> int:
    """LOCAL_WORLD_SIZE if the group consists of such nodes, else its smallest divisor above 1."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    if local.isdigit() and int(local) < world and world % int(local) == 0:
        return int(local)
    return next((k for k in range(2, world) if world % k == 0), world)


def _compare(
    setting: _Setting,
    handle: dist.ProcessGroup,
    rank: int,
    world: int,
    device: torch.device | str,
    tolerance: float | None,
) -> tuple[float, float]:
    """The largest relative difference on this rank, and the largest share of a tolerance."""
    sizes = [setting.pairs - r % 3 for r in range(world)]
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    whole = _whole(setting._replace(strategy="", ranks_per_node=None), sum(sizes), device)
    z1, z2 = _views(sum(sizes), setting.dim, setting.dtype, device)
    loss, dz1, dz2, *dtau = _differentiate(
        z1[mine],
        z2[mine],
        setting.objective,
        negatives=setting.negatives,
        process_group=handle,
        strategy=setting.strategy,
        ranks_per_node=setting.ranks_per_node,
    )
    averaged = [dz.to(torch.float64) / world for dz in (dz1, dz2)]
    truth = [whole[0], whole[1][mine], whole[2][mine], *whole[3:]]
    worst, of_tolerance = 0.0, 0.0
    for value, expected in zip([loss, *averaged, *dtau], truth, strict=True):
        difference = relative_difference(value, expected)
        worst = max(worst, difference)
        of_tolerance = max(of_tolerance, difference / (tolerance or TOLERANCES[expected.dtype]))
    return worst, of_tolerance


@functools.lru_cache(maxsize=1)
def _whole(setting: _Setting, total: int, device: torch.device | str) -> list[Tensor]:
    """Loss and gradients of the whole batch; neighbouring settings share them."""
    views = _views(total, setting.dim, setting.dtype, device)
    return _differentiate(*views, setting.objective, negatives=setting.negatives)


@functools.lru_cache(maxsize=1)
def _views(
    total: int, dim: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Two correlated views, the same on every process."""
    made = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu"}
    views = torch.randn(2, total, dim, dtype=torch.float64, **made)
    views[1] = views[0] + views[1] / 2
    z1, z2 = views.to(device, dtype)
    return z1, z2


def _print_table(
    rows: list[dict[str, Any]],
    world: int,
    pairs: int,
    device: torch.device | str,
    print: Callable[[str], None],
) -> None:
    print(f"{world} processes with up to {pairs} pairs each, {device}; relative differences")
    for row in rows:
        dtype = str(row["dtype"]).removeprefix("torch.")
        large = f"  {row['pairs']} pairs" if row["pairs"] != pairs else ""
        print(
            "{objective:22} {negatives:12} {strategy:10} ".format(**row)
            + f"{dtype:9} {row['residual']:.1e}{large}"
        )


def _differentiate(z1: Tensor, z2: Tensor, objective: str, **options: Any) -> list[Tensor]:
    """[loss, dz1, dz2(, dτ)]."""
    z1, z2 = z1.detach().requires_grad_(), z2.detach().requires_grad_()
    wide = accumulation_dtype(z1.dtype)
    learnt = make(objective).tau_gradient is not None
    temperature = torch.tensor(0.3, dtype=wide, device=z1.device, requires_grad=learnt)
    loss = alpha_cl_loss(z1, z2, objective, temperature=temperature, **options)
    return [loss.detach(), *torch.autograd.grad(loss, [z1, z2] + ([temperature] if learnt else []))]


def main() -> int:
    """The check that `torchrun -m alphacl_fast.verify` runs in each process."""
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= local_world
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        verify_distributed(device="cuda" if on_gpu else "cpu")
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
