"""`micro_batched`: embeddings of a batch whose activations would not fit into memory at once.

A contrastive loss depends on the network through the embeddings alone, which are small. So the
encoder runs on one micro-batch after the other, each in an activation checkpoint: only inputs and
embeddings stay, and the backward runs the encoder again, one micro-batch at a time. This is
gradient caching (Gao et al., arXiv:2101.06983) as a graph of autograd, for any loss and trainer.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["micro_batched"]


def micro_batched(encoder: Callable[[Any], Any], inputs: Any, size: int) -> Any:
    """The embeddings ``encoder(inputs)``, with a graph, in the activation memory of ``size`` rows.

    Use it in place of ``encoder(inputs)``; the loss and the backward pass stay as they are. The
    gradient is exact for the whole batch. The encoder runs once to embed a micro-batch and again in
    the backward pass, with the same random numbers (dropout) and the same autocast.

    Batch normalisation is the exception: it sees the statistics of one micro-batch at a time, so
    the result differs from ``encoder(inputs)``, although its gradient is exact. Running statistics
    are updated once for each micro-batch if ``encoder`` is a module. Synchronised batch
    normalisation needs the same number of micro-batches on all ranks.

    To reduce the gradients of a DistributedDataParallel model once per step, pass the wrapped model
    itself, or call `micro_batched` inside the ``forward`` of the module that is wrapped. Models of
    ``fully_shard`` (FSDP2) work too; they gather their parameters for every micro-batch.

    Args:
        encoder: maps a micro-batch to its embeddings, row by row: a module or a function that takes
            one argument of the structure of ``inputs``. Use a lambda for keyword arguments.
        inputs: a tensor, or dicts, tuples and lists of tensors, such as token ids and an attention
            mask, in any nesting. All tensors have the same first dimension N ≥ 1, which is split;
            tensors without dimensions and non-tensors are passed to every micro-batch.
        size: the rows of a micro-batch, ≥ 1. The last micro-batch may be smaller; a batch with
            N ≤ size is embedded in one pass, without a second one.

    Returns:
        What the encoder returns, with the rows of all micro-batches: a tensor (N, …), or dicts,
        tuples and lists of such tensors. Non-tensors are those of the first micro-batch.

    Raises:
        TypeError: ``encoder`` cannot be called, or ``size`` is not an integer.
        ValueError: ``size`` < 1; ``inputs`` have no tensor with N ≥ 1 rows, or tensors of different
            N; the encoder returns more or fewer rows than it was given.

    Source: Gao et al., arXiv:2101.06983; Chen et al., arXiv:1604.06174 (activation checkpoints).
    """
    if not callable(encoder):
        raise TypeError(f"encoder must be a module or a function, got {type(encoder).__name__}")
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"size must be a number of rows, got {size!r}")
    if size < 1:
        raise ValueError(f"size must be ≥ 1, got {size}")
    rows = _checked_rows(inputs)
    if isinstance(encoder, nn.parallel.DistributedDataParallel):
        return _through_ddp(encoder, inputs, size)
    if rows <= size:
        return _checked_output(encoder(inputs), rows)
    starts = range(0, rows, size)
    return _joined([_embedded(encoder, _cut(inputs, k, k + size)) for k in starts])


def _through_ddp(model: nn.parallel.DistributedDataParallel, inputs: Any, size: int) -> Any:
    """The wrapper's own forward, once in a step, around the micro-batches of its module."""
    module = model.module
    model.module = _InMicroBatches(module, size)
    try:
        return model(inputs)
    finally:
        model.module = module


class _InMicroBatches(nn.Module):
    def __init__(self, module: nn.Module, size: int) -> None:
        super().__init__()
        self.module, self.size = module, size

    def forward(self, inputs: Any) -> Any:
        return micro_batched(self.module, inputs, self.size)


def _embedded(encoder: Callable[[Any], Any], part: Any) -> Any:
    """The embeddings of a micro-batch, whose activations do not stay."""
    # a checkpoint keeps the random numbers of the devices of its tensors, which it must see itself
    tensors = list(_tensors(part))
    rows = _checked_rows(part)

    def run(*tensors: Tensor) -> Any:
        return _checked_output(encoder(_filled(part, iter(tensors))), rows)

    if not torch.is_grad_enabled():
        return run(*tensors)
    if torch.compiler.is_compiling():  # a graph replays the forward without writing to buffers
        return checkpoint(run, *tensors, use_reentrant=False)

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _statistics_kept(encoder)

    return checkpoint(run, *tensors, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _statistics_kept(encoder: Callable[[Any], Any]) -> Iterator[None]:
    """Batch normalisation as it is, but what it does to its running statistics is forgotten."""
    modules = encoder.modules() if isinstance(encoder, nn.Module) else ()
    layers = [m for m in modules if isinstance(m, _BatchNorm) and m.training]
    kept = [dict(layer.named_buffers(recurse=False)) for layer in layers]
    for layer, buffers in zip(layers, kept, strict=True):
        for name, buffer in buffers.items():
            setattr(layer, name, buffer.clone())
    try:
        yield
    finally:
        for layer, buffers in zip(layers, kept, strict=True):
            for name, buffer in buffers.items():
                setattr(layer, name, buffer)


# --- nested tensors -------------------------------------------------------------------------------


def _map(change: Callable[[Any], Any], *values: Any) -> Any:
    """``change`` of the leaves of values of one structure, in the structure of the first."""
    first = values[0]
    if isinstance(first, Mapping):
        changed = {key: _map(change, *(value[key] for value in values)) for key in first}
        if not isinstance(first, MutableMapping):
            return changed
        same = copy.copy(first)  # a tokenizer's output has methods that encoders call
        for key, value in changed.items():
            same[key] = value
        return same
    if isinstance(first, tuple | list):
        changed = [_map(change, *each) for each in zip(*values, strict=True)]
        return type(first)(*changed) if hasattr(first, "_fields") else type(first)(changed)
    return change(*values)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors, in a fixed order."""
    found: list[Tensor] = []
    _map(lambda x: found.append(x) if isinstance(x, Tensor) else None, value)
    yield from found


def _filled(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same structure with other tensors, in the order of `_tensors`."""
    return _map(lambda x: next(tensors) if isinstance(x, Tensor) else x, value)


def _cut(value: Any, start: int, stop: int) -> Any:
    return _map(lambda x: x[start:stop] if isinstance(x, Tensor) and x.dim() else x, value)


def _joined(parts: Sequence[Any]) -> Any:
    """The outputs of all micro-batches as one."""

    def join(*leaves: Any) -> Any:
        if isinstance(leaves[0], Tensor) and leaves[0].dim():
            return torch.cat(leaves)
        return leaves[0]

    return _map(join, *parts)


def _checked_rows(inputs: Any) -> int:
    """N; raises ValueError unless all tensors have it."""
    shapes = [tuple(x.shape) for x in _tensors(inputs) if x.dim()]
    if not shapes:
        raise ValueError(
            "inputs must be a tensor of N rows, or dicts, tuples and lists of them, "
            f"got {type(inputs).__name__} without a tensor that has rows"
        )
    if len({shape[0] for shape in shapes}) > 1 or shapes[0][0] < 1:
        raise ValueError(
            "inputs must have tensors with the same number N ≥ 1 of rows, "
            f"got shapes {', '.join(map(str, shapes))}"
        )
    return shapes[0][0]


def _checked_output(output: Any, rows: int) -> Any:
    """The embeddings; raises ValueError unless all have a row for each row of the micro-batch."""
    shapes = [tuple(x.shape) for x in _tensors(output) if x.dim()]
    if not shapes or any(shape[0] != rows for shape in shapes):
        raise ValueError(
            f"encoder must return tensors of one row for each of the {rows} rows that it was "
            f"given, got {', '.join(map(str, shapes)) or type(output).__name__}"
        )
    return output
