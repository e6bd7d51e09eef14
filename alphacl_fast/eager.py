"""Eager calls of losses that `native` serves: checked once, then prepared for calls like them."""

from __future__ import annotations

from collections.abc import Callable
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
    scaled_in_place,
    views_of,
)
from .backend import cpu, cpu_step
from .call import LARGEST_LOGIT, LARGEST_TAU, LEAST_TAU, Call, Loss, Need, SameId


class Prepared(NamedTuple):
    """What has been checked and prepared for all calls that are alike."""

    call: Loss
    plan: cpu_step.Plan
    need: Need
    why: str  #: this backend serves them

    def loss(self, z1: Tensor, z2: Tensor, tau: Tensor | None, ids: Tensor | None = None) -> Tensor:
        """The reduced loss, differentiable; ``tau`` is read only if its gradient is needed."""
        call, plan, need, _ = self
        same_id = None if ids is None else SameId.of_views(ids, call, z1.shape[0], plan.wide)
        if not any(need):
            return native.loss_and_gradient(z1, z2, call, plan, same_id)[0]
        if call.reduction == "none":
            return _Losses.apply(z1, z2, tau, self, same_id)[0]
        return _Loss.of_plain(z1, z2, tau, self, same_id)[0]


class _Loss(torch.autograd.Function):
    """The loss with its gradient, which waits for the incoming one; first derivatives only.

    It has no separate setup_context, which would cost as much as the rest of the function:
    torch.func goes through `autograd.AlphaCLFunction`.
    """

    @classmethod
    def of_plain(cls, *operands: Any) -> tuple[Tensor | None, ...]:
        """`apply` without its search for transforms: `native.plain` has found none."""
        return super(torch.autograd.Function, cls).apply(*map(_unwrapped, operands))

    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor,
        tau: Tensor | None,
        prepared: Prepared,
        same_id: SameId | None,
    ) -> tuple[Tensor | None, ...]:
        outputs = prepared.plan.run(z1, z2, same_id)
        ctx.need, ctx.dtypes = prepared.need, (z1.dtype, None if tau is None else tau.dtype)
        ctx.hooked = _hooks_of_saved_tensors(False) is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *of_saved: Tensor | None) -> _Gradients:
        if not first_derivative(grad, of_saved):
            return (None,) * 5
        # in the accumulation dtype: a half-precision gradient of 1e-8 would vanish before
        # GradScaler sees it
        scale = scaled_in_place if not ctx.hooked and _read_once(grad) else scaled
        dz, dtau = scale(ctx.saved_tensors, grad, ctx.dtypes)
        return *views_of(dz, ctx.need), dtau, None, None


def _unwrapped(x: Any) -> Any:
    """A tensor without the wrapper of a torch.func transform that has ended."""
    return torch._C._functorch.unwrap_if_dead(x) if isinstance(x, Tensor) else x


def _read_once(grad: Tensor) -> bool:
    """Whether a backward may overwrite what was saved for it: its graph is not kept, and no
    derivative of the gradient is taken.
    """
    return (
        not _graph_is_kept()
        and not torch.is_grad_enabled()
        and native.plain(grad)
        and not torch._C._functorch.is_legacy_batchedtensor(grad)
    )


# torch < 2.6 does not say; the graph may then be kept
_graph_is_kept: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)
# hooks of the user (torch.autograd.graph.saved_tensors_hooks) may keep what was saved; older
# versions of torch do not say whether there are any
_hooks_of_saved_tensors: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: True
)


class _Losses(torch.autograd.Function):
    """One loss per anchor; the backward solves the rows again, for the gradient of each."""

    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor,
        tau: Tensor | None,
        prepared: Prepared,
        same_id: SameId | None,
    ) -> tuple[Tensor]:
        ctx.prepared = prepared
        ctx.dtypes = z1.dtype, None if tau is None else tau.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z1, z2, tau, *(same_id or ()))
        call, plan = prepared.call, prepared.plan.forward
        return (native.loss_and_gradient(z1, z2, call, plan, same_id)[0],)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> _Gradients:
        if grad is None:
            return (None,) * 5
        z1, z2, tau, *same_id = ctx.saved_tensors
        call, plan, need, _ = ctx.prepared

        def run(grad: Tensor) -> tuple[Tensor | None, ...]:
            found = native.gradient(z1, z2, call, plan, same_id or None, grad)
            return in_dtypes(found, ctx.dtypes)

        with torch.no_grad():
            found = for_each_gradient(run, grad)
        dz, dtau = only_once(found, (grad, z1, z2, tau))
        return *views_of(dz, need), dtau, None, None


_Gradients = tuple[Tensor | None, ...]


# --- calls like one before ------------------------------------------------------------------------


def key_of(z1: Tensor, z2: Tensor, temperature: Temperature) -> Key | None:
    """What the checks and the plan of a call depend on but the temperature's value, or None where a
    call is not plain.
    """
    if cpu._LIBRARY is None or not native.plain(z1, z2) or z1.dtype != z2.dtype:
        return None
    if z1.is_neg() or z2.is_neg():  # a plan reads memory
        return None
    learnt, dtypes = False, []
    for x in temperature if type(temperature) is tuple else (temperature,):
        if type(x) is float:
            dtypes.append(float)
            continue
        if not (isinstance(x, Tensor) and native.plain(x) and x.is_cpu and x.numel() == 1):
            return None
        dtypes.append(x.dtype)
        learnt = learnt or x.requires_grad
    grad = torch.is_grad_enabled()
    return (
        z1.shape, z2.shape, z1.dtype, z1.is_cpu, z2.is_cpu, z1.layout, z2.layout,
        grad and z1.requires_grad, grad and z2.requires_grad, grad, learnt, *dtypes,
        cpu._LIBRARY, cpu.instruction_set(),
    )  # fmt: skip


def again(
    z1: Tensor, z2: Tensor, temperature: Temperature, call: Call, key: Key
) -> tuple[Tensor, str, str] | None:
    """The loss, its backend and why it serves the call, if one like it has been made before."""
    prepared = call.ready and call.ready.get(key)
    if not prepared:
        return None
    several = type(temperature) is tuple
    value = tuple(map(_value, temperature)) if several else _value(temperature)
    if value != prepared.plan.temperature:
        if not _allowed(value):
            return None  # the checks will say so
        prepared = call.ready[key] = prepared._replace(plan=prepared.plan.at(value))
    tau = None
    if prepared.need.tau:
        like = prepared.plan.like
        tau = torch.stack([_number(x, like) for x in temperature]) if several else temperature
        tau = tau if several else tau.reshape(())
    return prepared.loss(z1, z2, tau), "cpu", prepared.why


def _value(x: float | Tensor) -> float:
    return x if type(x) is float else x.detach().item()


def _number(x: float | Tensor, like: Tensor) -> Tensor:
    return x.reshape(()).to(like) if isinstance(x, Tensor) else like.new_full((), x)


def _allowed(value: cpu_step.Temperature) -> bool:
    if type(value) is tuple:
        return all(abs(x) <= LARGEST_LOGIT for x in value)
    return LEAST_TAU <= value <= LARGEST_TAU


#: τ, or SigLIP's scale and bias.
Temperature = float | Tensor | tuple[float | Tensor, float | Tensor]
Key = tuple[Any, ...]


def remember(call: Call, key: Key, prepared: Prepared) -> None:
    """Lets `again` serve the next call of this key."""
    call.remember(key, prepared)
