"""Eager calls of losses that `native` serves: checked once, then prepared for calls like them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .autograd import (
    first_derivative,
    for_each_gradient,
    in_dtypes,
    only_once,
    scaled,
    views_of,
)
from .backend import cpu, cpu_step
from .call import Call, Loss, Need, SameId


def loss(
    z1: Tensor,
    z2: Tensor,
    tau: Tensor | None,
    call: Loss,
    plan: cpu_step.Plan,
    need: Need,
    ids: Tensor | None = None,
) -> Tensor:
    """The reduced loss, differentiable; ``tau`` is read only if its gradient is needed.

    ``plan`` computes the gradients that are needed.
    """
    same_id = SameId.of_views(ids, call, z1.shape[0], plan.wide)
    if any(need):
        function = _Losses if call.reduction == "none" else _Loss
        return function.apply(z1, z2, tau, call, plan, need, same_id)[0]
    return native.loss_and_gradient(z1, z2, call, plan, same_id)[0]


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
        same_id: SameId | None,
    ) -> tuple[Tensor | None, ...]:
        outputs = native.loss_and_gradient(z1, z2, call, plan, same_id)
        ctx.need, ctx.dtypes = need, (z1.dtype, None if tau is None else tau.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *of_saved: Tensor | None) -> _Gradients:
        if not first_derivative(grad, of_saved):
            return (None,) * 7
        # in the accumulation dtype: a half-precision gradient of 1e-8 would vanish before
        # GradScaler sees it
        dz, dtau = scaled(ctx.saved_tensors, grad, ctx.dtypes)
        return *views_of(dz, ctx.need), dtau, None, None, None, None


class _Losses(torch.autograd.Function):
    """One loss per anchor; the backward solves the rows again, for the gradient of each."""

    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor,
        tau: Tensor | None,
        call: Loss,
        plan: cpu_step.Plan,
        need: Need,
        same_id: SameId | None,
    ) -> tuple[Tensor]:
        ctx.call, ctx.plan, ctx.need = call, plan, need
        ctx.dtypes = z1.dtype, None if tau is None else tau.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z1, z2, tau, *(same_id or ()))
        return (native.loss_and_gradient(z1, z2, call, plan.forward, same_id)[0],)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> _Gradients:
        if grad is None:
            return (None,) * 7
        z1, z2, tau, *same_id = ctx.saved_tensors

        def run(grad: Tensor) -> tuple[Tensor | None, ...]:
            found = native.gradient(z1, z2, ctx.call, ctx.plan, same_id or None, grad)
            return in_dtypes(found, ctx.dtypes)

        with torch.no_grad():
            found = for_each_gradient(run, grad)
        dz, dtau = only_once(found, (grad, z1, z2, tau))
        return *views_of(dz, ctx.need), dtau, None, None, None, None


_Gradients = tuple[Tensor | None, ...]


# --- calls like one before ------------------------------------------------------------------------


class Prepared(NamedTuple):
    """What has been checked and prepared for all calls with the same key."""

    plan: cpu_step.Plan
    why: str  #: this backend serves them


def key_of(z1: Tensor, z2: Tensor, temperature: float | Tensor) -> Key | None:
    """What the checks and the plan of a call depend on, or None where a call is not plain."""
    if cpu._LIBRARY is None or not native.plain(z1, z2):
        return None
    value, learnt = temperature, False
    if isinstance(temperature, Tensor):
        if not (native.plain(temperature) and temperature.is_cpu and temperature.numel() == 1):
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
    ready = call.ready and call.ready.get(key)
    if not ready:
        return None
    need = key[_NEED]
    tau = temperature.reshape(()) if need.tau else None
    return loss(z1, z2, tau, call, ready.plan, need), "cpu", ready.why


Key = tuple[Any, ...]
_NEED = 8


def remember(call: Call, key: Key, plan: cpu_step.Plan, why: str) -> None:
    """Lets `again` serve the next call of this key."""
    call.remember(key, Prepared(plan, why))
