"""What the adapters share: tensors and processes of a call, the dtype of a loss, blocks of rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import functional, shared_rows
from ..backend import cpu
from ..call import without_autocast

#: The pairs of a block of `in_blocks`, by device: 4 MiB of float32 similarities stay in a CPU's
#: cache; a GPU needs more work for each operation.
PAIRS_OF_A_BLOCK = {"cpu": 1 << 20, "cuda": 1 << 22}
#: Up to so many pairs, blocks are kept for the backward, as a package keeps its matrices.
PAIRS_KEPT = 1 << 26
#: Up to so many pairs, a CPU is faster with the matrix of all of them than with sweeps.
PAIRS_OF_A_MATRIX = 1 << 17


def world(wanted: bool) -> str | None:
    """The process group of a loss that is to meet all processes; one process needs none."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return "world" if wanted and several else None


def everyone(rows: Tensor, group: str | None) -> tuple[Tensor, int]:
    """The rows of all processes, which receive the gradients of all, and where one's own begin."""
    if group is None:
        return rows, 0
    made = functional.make_group(group, "auto")
    text = f"D={rows.shape[1]}, dtype={rows.dtype}"
    sharing = shared_rows.agree(made, text, (len(rows),), None)
    return sharing.share(rows, 0)[0], sharing.place(0).start


def check_pair(name: str, x: Any, other_name: str, y: Any, group: str | None) -> None:
    """Raises, in the names of the adapter's arguments, unless both have rows of one shape.

    Among several processes the library's own checks make all of them raise.
    """
    if group is not None:
        return
    functional.check_rows(name, x, fewest=1)
    functional.check_rows(other_name, y, fewest=1)
    if x.shape != y.shape:
        raise ValueError(
            f"{other_name} must have the shape of {name} {tuple(x.shape)}, got {tuple(y.shape)}"
        )


def own_ids(rows: Tensor, group: str | None) -> Tensor:
    """(N,) numbers of the rows (N, D) that no row of another process has."""
    first = 0 if group is None else dist.get_rank() << 32
    return torch.arange(first, first + len(rows), device=rows.device)


def in_graph(loss: Tensor, *others: Tensor | float | None) -> Tensor:
    """The loss with gradient 0 in the tensors on which its value does not depend.

    A parameter without any gradient would stop DistributedDataParallel.
    """
    for x in others:
        if isinstance(x, Tensor) and x.requires_grad:
            loss = loss + (x * 0).sum().to(loss.device, loss.dtype)
    return loss


def loss_dtype(
    dtype: torch.dtype, device: torch.device, of_logits: Callable[[Tensor], Tensor]
) -> torch.dtype:
    """The dtype in which a package gives its loss.

    Outside autocast it is the dtype of the embeddings. Autocast changes the dtype of some
    operations, which differ between devices; the package's operation is applied to one logit to
    find out.

    Args:
        dtype: of the embeddings.
        device: where they are.
        of_logits: the operation that makes the loss of logits (1, 1).
    """
    if not _autocasts(device):
        return dtype
    with torch.no_grad():
        row = torch.ones(1, 1, dtype=dtype, device=device)
        return of_logits(row @ row.t()).dtype


def cross_entropy(logits: Tensor) -> Tensor:
    """For `loss_dtype`."""
    return F.cross_entropy(logits, torch.zeros(1, dtype=torch.long, device=logits.device))


def log_sum_exp(logits: Tensor) -> Tensor:
    """For `loss_dtype`."""
    return logits.logsumexp(1)


def _autocasts(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def as_called(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """A user's function, to be called under the autocast of now, which `in_blocks` turns off."""
    if not _autocasts(device):
        return function
    dtype = torch.get_autocast_dtype(device.type)

    @functools.wraps(function)
    def called(*arguments: Any) -> Tensor:
        with torch.autocast(device.type, dtype):
            return function(*arguments)

    return called


def is_small(rows: int, columns: int, device: torch.device, in_one_step: bool = False) -> bool:
    """Whether all pairs are best computed as one matrix; a compiled graph serves every size.

    ``in_one_step``: one step of the CPU kernels could compute the loss, and would be faster.
    """
    few = rows * columns <= PAIRS_OF_A_MATRIX
    few = few and not (in_one_step and cpu.load_error() is None)
    return few and device.type == "cpu" and not torch.compiler.is_compiling()


def in_blocks(
    function: Callable[[slice], Tensor], rows: int, columns: int, device: torch.device
) -> Tensor:
    """Concatenates what a function makes of blocks of rows, each against all columns.

    Beyond `PAIRS_KEPT` the backward computes each block again, so that one block of pairs exists
    at a time. Nothing is computed in autocast's dtype.
    """
    pairs = PAIRS_OF_A_BLOCK.get(device.type, PAIRS_OF_A_BLOCK["cuda"])
    size = max(1, pairs // max(1, columns))
    blocks = [slice(k, min(k + size, rows)) for k in range(0, rows, size)]

    with without_autocast(device):
        if len(blocks) <= 1:
            return function(slice(0, rows))
        if rows * columns > PAIRS_KEPT:
            again = {"use_reentrant": False, "preserve_rng_state": False}
            function = functools.partial(checkpoint, function, **again)
        return torch.cat([*map(function, blocks)])


def class_ids(*labels: Tensor) -> tuple[Tensor, ...]:
    """Integers for labels of any dtype: equal labels get equal integers, also across arguments."""
    if not any(x.is_floating_point() for x in labels):
        return tuple(x.long() for x in labels)
    _, ids = torch.unique(torch.cat(labels), return_inverse=True)
    return ids.split([len(x) for x in labels])
