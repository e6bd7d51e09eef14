"""Losses that one native call computes from the views to the gradient (`backend.cpu_step`).

The call sees the objective as a recorded program. What it does not serve goes through the two
sweeps (`autograd`): several processes, gradients of single anchors, other similarities than cosine,
users' functions, transforms of torch.func.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .autograd import Need, only_once, views_of
from .backend import cpu, cpu_step
from .call import BoundCall, Call, Layout, Loss, SameId
from .objectives import Objective, kind
from .program import record


def serves(call: BoundCall, need: Need) -> bool:
    """Whether a call is computed natively, for plain tensors."""
    return not torch.compiler.is_compiling() and (
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


_PLAIN = {Tensor, torch.nn.Parameter}


def prepared(call: BoundCall, z: Tensor, need: Need) -> cpu_step.Plan:
    """The plan of a call that is served, for views of the shape and dtype of z."""
    return _plan(
        call.objective, call.negatives, call.symmetric, call.reduction, z.shape, z.dtype,
        call.temperature, need, call.workspace, cpu.instruction_set(),
    )  # fmt: skip


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


def loss(
    z1: Tensor,
    z2: Tensor,
    tau: Tensor | None,
    call: Loss,
    plan: cpu_step.Plan,
    need: Need,
    ids: Tensor | None = None,
) -> Tensor:
    """The reduced loss, differentiable; ``tau`` is read only if its gradient is needed."""
    if any(need):
        return _Loss.apply(z1, z2, tau, call, plan, need, ids)
    return loss_and_gradient(z1, z2, call, plan, ids)[0]


def loss_and_gradient(
    z1: Tensor, z2: Tensor, call: Loss, plan: cpu_step.Plan, ids: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The reduced loss, (dz1, dz2) in one tensor, and dτ; None where not needed."""
    same_id = None if ids is None else SameId.of_views(ids, call, z1.shape[0], plan.wide)
    value, dz, dtau = plan.run(z1, z2, same_id)
    return call.reduce(value) if call.reduction == "none" else value, dz, dtau


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
        tau: Tensor | None,
        call: Loss,
        plan: cpu_step.Plan,
        need: Need,
        ids: Tensor | None,
    ) -> Tensor:
        value, dz, dtau = loss_and_gradient(z1, z2, call, plan, ids)
        ctx.need, ctx.dtypes = need, (z1.dtype, None if tau is None else tau.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dz, dtau)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        with torch.no_grad():
            # float32 until it is scaled: a half-precision gradient of 1e-8 would vanish before
            # GradScaler sees it
            dz, dtau = (
                None if x is None else (x * grad).to(dtype)
                for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            )
        if torch.is_grad_enabled():
            dz, dtau = only_once((dz, dtau), (torch.zeros((), requires_grad=True),))
        return *views_of(dz, ctx.need), dtau, None, None, None, None


# --- calls like one before ------------------------------------------------------------------------


class Ready(NamedTuple):
    """What has been checked and prepared for all calls with the same key."""

    plan: cpu_step.Plan
    why: str  #: this backend serves them


def key_of(z1: Tensor, z2: Tensor, temperature: float | Tensor) -> Key | None:
    """What the checks and the plan of a call depend on, or None where a call is not plain."""
    if not plain(z1, z2):
        return None
    value, learnt = temperature, False
    if isinstance(temperature, Tensor):
        if not (plain(temperature) and temperature.is_cpu and temperature.numel() == 1):
            return None
        value, learnt = temperature.detach().item(), temperature.requires_grad
    elif type(temperature) is not float:
        return None
    grad = torch.is_grad_enabled()
    return (
        z1.shape, z2.shape, z1.dtype, z2.dtype, z1.is_cpu, z2.is_cpu, z1.layout, z2.layout,
        Need(grad and z1.requires_grad, grad and z2.requires_grad, grad and learnt), learnt,
        value, isinstance(temperature, Tensor), cpu._LIBRARY, cpu.instruction_set(),
    )  # fmt: skip


def again(
    z1: Tensor, z2: Tensor, temperature: float | Tensor, call: Call, key: Key
) -> tuple[Tensor, str, str] | None:
    """The loss, its backend and why it serves the call, if one like it has been made before."""
    ready = call.ready.get(key)
    if ready is None:
        return None
    need = key[_NEED]
    tau = temperature.reshape(()) if need.tau else None
    return loss(z1, z2, tau, call, ready.plan, need), "cpu", ready.why


Key = tuple[Any, ...]
_NEED = 8


def remember(call: Call, key: Key, plan: cpu_step.Plan, why: str) -> None:
    """Lets `again` serve the next call of this key."""
    if len(call.ready) >= 64:  # a learnt temperature is another one at every step
        call.ready.clear()
    call.ready[key] = Ready(plan, why)
