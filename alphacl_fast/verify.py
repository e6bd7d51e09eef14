"""`verify_distributed`: compares a live process group's loss with one process's.

    torchrun --nproc-per-node=4 -m alphacl_fast.verify

checks gloo, or NCCL where every process has a GPU; in a script, call `verify_distributed` between
its own steps.
"""

import builtins
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .bundles import accumulation_dtype
from .distributed import ProcessGroup
from .functional import NEGATIVES, alpha_cl_loss
from .objectives import make, names


def verify_distributed(
    process_group: Any = "world",
    *,
    objectives: tuple[str, ...] | None = None,
    pairs: int = 7,
    dim: int = 16,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    tolerance: float = 1e-10,
    print: Callable[[str], None] | None = builtins.print,
) -> list[dict[str, Any]]:
    """Compares a group's loss and gradients with one process's; every rank must call it.

    Each process has its own number of pairs, up to ``pairs``, and computes the whole batch by
    itself as well. Gradients are compared after averaging them as DDP does.

    Args:
        process_group: see `alphacl_fast.functional.alpha_cl_loss`.
        objectives: names; all by default.
        pairs: the most pairs of a process.
        dim: features of an embedding.
        dtype: dtype of the embeddings.
        device: device of the embeddings.
        tolerance: bound on the largest relative difference; 1e-10 suits float64.
        print: receives a table, line by line, on the group's first process; None for silence.

    Returns:
        One dict per objective, negatives and strategy, with the largest ``residual`` of all
        processes; the same everywhere.

    Raises:
        RuntimeError: on every process, if a residual exceeds ``tolerance``; names the worst.
    """
    handle = ProcessGroup(process_group, "auto").handle()
    rank, world = dist.get_rank(handle), dist.get_world_size(handle)
    sizes = [pairs - r % 3 for r in range(world)]
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, sum(sizes), dim, generator=generator, dtype=torch.float64)
    views[1] = views[0] + views[1] / 2
    z1, z2 = views.to(device, dtype)
    rows = []
    for objective in objectives or names():
        for negatives in NEGATIVES:
            whole = _differentiate(z1, z2, objective, negatives=negatives)
            for strategy in ("gather", "ring"):
                options = {"process_group": handle, "strategy": strategy, "negatives": negatives}
                loss, dz1, dz2, *dtau = _differentiate(z1[mine], z2[mine], objective, **options)
                here = [loss, dz1 / world, dz2 / world, *dtau]
                truth = [whole[0], whole[1][mine], whole[2][mine], *whole[3:]]
                residual = torch.stack(
                    [_difference(a, b) for a, b in zip(here, truth, strict=True)]
                ).max()
                dist.all_reduce(residual, dist.ReduceOp.MAX, group=handle)
                setting = {"objective": objective, "negatives": negatives, "strategy": strategy}
                rows.append({**setting, "residual": residual.item()})
    if print is not None and rank == 0:
        pairs_of_each = ", ".join(map(str, sizes))
        print(f"{world} processes with {pairs_of_each} pairs of {dim} features, {dtype}, {device}")
        for row in rows:
            print("{objective:22} {negatives:12} {strategy:8} {residual:.1e}".format(**row))
    worst = max(rows, key=lambda row: row["residual"])
    if not worst["residual"] <= tolerance:
        where = "{objective} ({negatives}, {strategy})".format(**worst)
        raise RuntimeError(
            f"residual of {where} must be at most {tolerance:g}, got {worst['residual']:.3g}"
        )
    return rows


def _differentiate(z1: Tensor, z2: Tensor, objective: str, **options: Any) -> list[Tensor]:
    """[loss, dz1, dz2(, dτ)]."""
    z1, z2 = z1.detach().requires_grad_(), z2.detach().requires_grad_()
    wide = accumulation_dtype(z1.dtype)
    learnt = make(objective).tau_gradient is not None
    temperature = torch.tensor(0.3, dtype=wide, device=z1.device, requires_grad=learnt)
    loss = alpha_cl_loss(z1, z2, objective, temperature=temperature, **options)
    return [loss.detach(), *torch.autograd.grad(loss, [z1, z2] + ([temperature] if learnt else []))]


def _difference(value: Tensor, truth: Tensor) -> Tensor:
    """Largest difference, relative to the largest element, or 1; NaN counts as infinite."""
    if not truth.numel():
        return truth.new_zeros((), dtype=torch.float64)
    value, truth = value.to(torch.float64), truth.to(torch.float64)
    return ((value - truth).abs().max() / truth.abs().max().clamp(min=1.0)).nan_to_num(
        nan=torch.inf
    )


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
