"""Losses that one native call computes from the views to the gradient (`backend.cpu_step`).

The call sees the objective as a recorded program. What it does not serve goes through the two
sweeps (`autograd`): several processes, gradients of single anchors, other similarities than cosine,
users' functions, transforms of torch.func.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import ops
from .autograd import Need, only_once, views_of
from .backend import cpu, cpu_step
from .call import BoundCall, Layout, SameId
from .objectives import Objective, kind
from .program import record


def serves(call: BoundCall, need: Need) -> bool:
    """Whether a call is computed natively, for plain tensors."""
    return (
        call.backend == "cpu"
        and call.similarity == "cosine"
        and call.objective.recordable
        and call.temperature is not None
        and call.ranks is None
        and (call.reduction != "none" or not any(need))
    )


def plain(*tensors: Tensor) -> bool:
    """Whether operations on these tensors are not watched or transformed by anybody."""
    return (
        all(type(x) in _PLAIN for x in tensors)
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def loss(z1: Tensor, z2: Tensor, tau: Tensor, call: BoundCall, ids: Tensor | None) -> Tensor:
    """The reduced loss, differentiable."""
    need = Need.of(z1, z2, tau)
    if any(need):
        return _Loss.apply(z1, z2, tau, call, need, ids)
    value, *_ = loss_and_gradient(z1, z2, call, need, ids)
    return call.reduce(value) if call.reduction == "none" else value


def loss_and_gradient(
    z1: Tensor, z2: Tensor, call: BoundCall, need: Need, ids: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss (with reduction="none" of every anchor), (dz1, dz2) in one tensor, and dτ."""
    plan = _plan(
        call.objective, call.negatives, call.symmetric, call.reduction, z1.shape, z1.dtype,
        call.temperature, need, call.workspace, cpu.instruction_set(),
    )  # fmt: skip
    same_id = SameId.of_views(ids, call, z1.shape[0], plan.wide)
    return plan.run(z1, z2, same_id)


@functools.lru_cache(maxsize=256)
def _plan(
    objective: Objective,
    negatives: str,
    symmetric: bool,
    reduction: str,
    shape: torch.Size,
    dtype: torch.dtype,
    tau: float,
    need: Need,
    workspace: int | None,
    instruction_set: str,
) -> cpu_step.Plan:
    n, dim = shape
    call = BoundCall(objective, "cosine", negatives, symmetric, reduction)
    layout, params = Layout.of(call, n), objective.params(call.c)
    wanted = (0 if need.z1 else n, 2 * n if need.z2 else n)
    batch = cpu_step.Batch(
        n, dim, dtype, layout.rows, layout.pairing(), layout.n_neg, call.divisor(n), wanted,
        need.tau, reduction == "none",
        cpu_step.default_workspace() if workspace is None else workspace,
    )  # fmt: skip
    seen = tau if objective.uses_temperature else 1.0
    log_range = ops.log_range(objective.kind, params, seen) if kind(objective.kind).log else None
    program = record(objective, need.views > 0, need.tau)
    return cpu_step.Plan(batch, program, objective.kind, params, seen, log_range)


class _Loss(torch.autograd.Function):
    """The loss with its gradient, which waits for the incoming one; first derivatives only.

    It has no separate setup_context, which would cost as much as the rest of the function:
    torch.func goes through `autograd.AlphaCLFunction`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor,
        tau: Tensor,
        call: BoundCall,
        need: Need,
        ids: Tensor | None,
    ) -> Tensor:
        value, dz, dtau = loss_and_gradient(z1, z2, call, need, ids)
        ctx.need, ctx.dtypes = need, (z1.dtype, tau.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dz, dtau)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        tensors = ctx.saved_tensors
        with torch.no_grad():
            # float32 until it is scaled: a half-precision gradient of 1e-8 would vanish before
            # GradScaler sees it
            scaled = (None if x is None else x * grad for x in tensors)
            dz, dtau = (
                None if x is None else x.to(dtype)
                for x, dtype in zip(scaled, ctx.dtypes, strict=True)
            )
        if torch.is_grad_enabled():
            dz, dtau = only_once((dz, dtau), (torch.zeros((), requires_grad=True),))
        return *views_of(dz, ctx.need), dtau, None, None, None
