"""Losses that one native call computes from the rows to the gradient (`backend.cpu_step`).

The call sees the objective as a recorded program. What it does not serve goes through the two
sweeps (`autograd`): several processes, transforms of torch.func.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .backend import cpu, cpu_step
from .bundles import accumulation_dtype
from .call import PLAIN, BoundCall, Guide, Layout, Loss, Need, SameId, plain  # noqa: F401
from .objectives import kind
from .program import record


def serves(call: BoundCall, need: Need | NeedGiven, with_guide: bool = False) -> bool:
    """Whether a call is computed natively, for plain tensors."""
    some_left_out = call.max_gap is not None or with_guide
    return not torch.compiler.is_compiling() and (
        call.backend == "cpu"
        and call.objective.recordable
        and None not in call.known
        and call.ranks is None
        and not (some_left_out and call.objective.counts_negatives)
        and all(cpu.uncompiled(function.key) is None for function in call.objective.functions)
    )


def readable(z: Tensor) -> bool:
    """Whether the compiled library can read plain rows (n, D)."""
    return (
        z.is_cpu
        and cpu.load_error() is None
        and plain(z)
        and z.layout == torch.strided
        and z.dim() == 2
        and z.dtype in _DTYPES
        and not z.is_neg()
        and not torch._C._functorch.is_legacy_batchedtensor(z)
    )


_DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}


class PlainFunction(torch.autograd.Function):
    """A function of plain tensors (`plain`); first derivatives only.

    It has no separate setup_context, which would cost as much as the rest of the function:
    torch.func goes through the two sweeps.
    """

    #: `apply` without its search for transforms: `plain` has found none.
    of_plain: Callable[..., tuple[Tensor | None, ...]]

    def __init_subclass__(cls) -> None:
        cls.of_plain = super(torch.autograd.Function, cls).apply


def prepared(call: BoundCall, z: Tensor, need: Need) -> cpu_step.Plan:
    """The plan of a call that is served, for views of the shape and dtype of z."""
    loss = Loss(
        call.objective, call.similarity, call.negatives, call.symmetric, call.reduction,
        call.max_gap,
    )  # fmt: skip
    plan = _plan(loss, z.shape, z.dtype, need, call.workspace, cpu.instruction_set())
    return plan.at(call.known[0] if len(call.known) == 1 else call.known)


@functools.lru_cache(maxsize=256)
def _plan(
    loss: Loss,
    shape: torch.Size,
    dtype: torch.dtype,
    need: Need,
    workspace: int | None,
    instruction_set: str,
) -> cpu_step.Plan:
    n, dim = shape
    layout = Layout.of(loss, n)
    wanted = (0 if need.z1 else n, 2 * n if need.z2 else n)
    batch = _batch(loss, layout, n, (n, dim, dtype), wanted, workspace)
    plan = _with_program(loss, batch, need.views > 0, need.tau)
    if loss.reduction == "none" and any(need):
        alone = Need(False, False, False)
        plan.alone = _plan(loss, shape, dtype, alone, workspace, instruction_set)
    return plan


class NeedGiven(NamedTuple):
    """Whose gradients are wanted of anchors with given positives."""

    z: bool
    others: bool
    pos: bool
    tau: bool
    bias: bool

    @classmethod
    def of(cls, *tensors: Tensor | None) -> NeedGiven:
        """Of these tensors, in the order of the fields; None where there is none."""
        grad = torch.is_grad_enabled()
        return cls(*(grad and x is not None and x.requires_grad for x in tensors))

    def wanted(self, layout: Layout) -> tuple[int, int]:
        """The range of rows whose gradient a step computes. The gradient in the bias, which only
        others have, needs it too: the sweep sums the weights of exactly these rows.
        """
        n, others = layout.anchors, (self.others or self.bias) and layout.rectangle
        return (0 if self.z else n, layout.rows if others else n)


def prepared_given(call: BoundCall, z: Tensor, layout: Layout, need: NeedGiven) -> cpu_step.Plan:
    """The plan of a call that is served, for anchors z (N, D) whose positives are given."""
    loss = Loss(
        call.objective, call.similarity, call.negatives, call.symmetric, call.reduction,
        call.max_gap,
    )  # fmt: skip
    sizes = (*z.shape, z.dtype)
    plan = _plan_given(loss, layout, sizes, need, call.workspace, cpu.instruction_set())
    return plan.at(call.known[0])


@functools.lru_cache(maxsize=256)
def _plan_given(
    loss: Loss,
    layout: Layout,
    sizes: tuple[int, int, torch.dtype],
    need: NeedGiven,
    workspace: int | None,
    instruction_set: str,
) -> cpu_step.Plan:
    n, dim, dtype = sizes
    wanted = need.wanted(layout)
    batch = _batch(loss, layout, n, (0, dim, dtype), wanted, workspace)._replace(similarity="dot")
    plan = _with_program(loss, batch, wanted[1] > wanted[0], need.tau)
    if loss.reduction == "none" and any(need):
        alone = NeedGiven(False, False, False, False, False)
        plan.alone = _plan_given(loss, layout, sizes, alone, workspace, instruction_set)
    return plan


def _batch(
    loss: Loss,
    layout: Layout,
    n: int,
    pairs: tuple[int, int, torch.dtype],
    wanted: tuple[int, int],
    workspace: int | None,
) -> cpu_step.Batch:
    """``pairs``: the first fields of a `Batch`."""
    return cpu_step.Batch(
        *pairs, layout.rows, layout.pairing(), layout.n_neg, loss.divisor(n), wanted,
        loss.reduction == "none", loss.objective.needs_negatives, loss.similarity,
        cpu_step.default_workspace() if workspace is None else workspace,
        loss.most_gap(accumulation_dtype(pairs[2])),
    )  # fmt: skip


def _with_program(
    loss: Loss, batch: cpu_step.Batch, gradient: bool, learn_tau: bool
) -> cpu_step.Plan:
    """The plan of a batch, with the gradient in the rows or in τ or without."""
    objective = loss.objective
    params, bound = objective.params(loss.c), kind(objective.kind)
    # t lies in [−1, 1]
    bound = bound.bind(params) if bound.log and loss.similarity == "cosine" else None

    def numbers_at(temperature: cpu_step.Temperature) -> cpu_step.Numbers:
        each = temperature if isinstance(temperature, tuple) else (temperature,)
        tau = objective.kind_tau(torch.tensor(temperature, dtype=torch.float64, device="cpu"))
        known = objective.known_numbers(each, batch.n_neg, accumulation_dtype(batch.dtype))
        values = dict(zip(objective.numbers, known, strict=True))
        log_range = None if bound is None else ops.range_at(bound, tau)
        return cpu_step.Numbers(tau.item(), log_range, objective.first_view_factor(*each), values)

    program = record(objective, gradient, learn_tau)
    return cpu_step.Plan(batch, program, objective.kind, params, numbers_at)


def loss_and_gradient(
    z1: Tensor,
    z2: Tensor,
    call: Loss,
    plan: cpu_step.Plan,
    same_id: SameId | None,
    guide: Guide | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The reduced loss, (dz1, dz2) in one tensor, and dτ; None where not needed."""
    value, dz, dtau = plan.run(z1, z2, same_id, None, guide)
    return call.reduce(value) if call.reduction == "none" else value, dz, dtau


def gradient(
    z1: Tensor,
    z2: Tensor,
    call: Loss,
    plan: cpu_step.Plan,
    same_id: SameId | None,
    grad: Tensor,
    guide: Guide | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dz1, dz2) in one tensor and dτ, for the gradient of every loss of reduction="none".

    The rows are solved again, which costs less than to keep what the forward made of them.
    """
    incoming = call.of_anchors(grad.to(plan.wide))
    return plan.run(z1, z2, same_id, incoming, guide)[1:]
