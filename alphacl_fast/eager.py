"""Eager calls of losses that `native` serves: checked once, then prepared for calls like them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .autograd import (
    SECOND_DERIVATIVE,
    for_each_gradient,
    in_dtypes,
    only_once,
    scaled,
    scaled_in_place,
    views_of,
)
from .backend import cpu, cpu_functions, cpu_step
from .call import LARGEST_LOGIT, LARGEST_TAU, LEAST_TAU, BoundCall, Call, Guide, Need, SameId
from .reads import Reading, all_unchanged

#: What each of the users' functions of a call reads; None where that cannot be told.
Readings = tuple[Reading | None, ...]


class Prepared(NamedTuple):
    """What has been checked and prepared for all calls that are alike."""

    call: BoundCall
    plan: cpu_step.Plan
    need: Need
    why: str  #: this backend serves them
    dtypes: tuple[torch.dtype, torch.dtype]  #: of the embeddings and of τ
    #: (z1, z2, τ, this, ids and the guide as the sweeps take them) → the reduced loss,
    #: differentiable, and outputs that are not the caller's; τ is read only if its gradient is
    #: needed
    losses: Callable[..., tuple[Tensor | None, ...]]
    readings: Readings  #: of users' functions, from before they were checked


def prepare(
    z1: Tensor, tau: Tensor, call: BoundCall, need: Need, why: str, readings: Readings
) -> Prepared:
    """Prepares a call that `native` serves, for views of the shape and dtype of z1; ``readings``:
    what `Objective.look` returned before the call was checked.
    """
    if not any(need):
        losses = _without_gradient
    else:
        losses = (_Losses if call.reduction == "none" else _Loss).of_plain
    plan = native.prepared(call, z1, need)
    return Prepared(call, plan, need, why, (z1.dtype, tau.dtype), losses, readings)


def _without_gradient(
    z1: Tensor,
    z2: Tensor,
    tau: Tensor | None,
    prepared: Prepared,
    same_id: SameId | None,
    guide: Guide | None,
) -> tuple[Tensor]:
    return (native.loss_and_gradient(z1, z2, prepared.call, prepared.plan, same_id, guide)[0],)


class _Loss(native.PlainFunction):
    """The loss with its gradient, which waits for the incoming one."""

    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor,
        tau: Tensor | None,
        prepared: Prepared,
        same_id: SameId | None,
        guide: Guide | None,
    ) -> tuple[Tensor | None, ...]:
        outputs = prepared.plan.run(z1, z2, same_id, None, guide)
        ctx.need = prepared.need
        keep_of_step(ctx, outputs[1:], prepared.dtypes)
        return outputs

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, of_dz: Tensor | None, of_dtau: Tensor | None
    ) -> _Gradients:
        if of_dz is not None or of_dtau is not None:
            raise RuntimeError(SECOND_DERIVATIVE)
        if grad is None:
            return _NO_GRADIENTS
        dz, dtau = scaled_once(ctx, grad)
        return *views_of(dz, ctx.need), dtau, None, None, None


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


def keep_of_step(
    ctx: Any, gradients: tuple[Tensor | None, ...], dtypes: tuple[torch.dtype | None, ...]
) -> None:
    """Saves gradients of a loss that is one number for its backward, which returns these dtypes.

    They are in the accumulation dtype: a half-precision gradient of 1e-8 would vanish before
    GradScaler sees it.
    """
    ctx.dtypes, ctx.hooked = dtypes, _hooks_of_saved_tensors(False) is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)


def scaled_once(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """What `keep_of_step` has kept, times the incoming gradient, each in its dtype."""
    scale = scaled_in_place if not ctx.hooked and _read_once(grad) else scaled
    return scale(ctx.saved_tensors, grad, ctx.dtypes)


class _Losses(native.PlainFunction):
    """One loss per anchor; the backward solves the rows again, for the gradient of each."""

    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor,
        tau: Tensor | None,
        prepared: Prepared,
        same_id: SameId | None,
        guide: Guide | None,
    ) -> tuple[Tensor]:
        ctx.prepared = prepared
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z1, z2, tau, *(guide or (None, None)), *(same_id or ()))
        call, plan = prepared.call, prepared.plan.forward
        return (native.loss_and_gradient(z1, z2, call, plan, same_id, guide)[0],)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> _Gradients:
        if grad is None:
            return _NO_GRADIENTS
        z1, z2, tau, *guide_and_ids = ctx.saved_tensors
        guide, same_id = guide_and_ids[:2], guide_and_ids[2:]
        guide = None if guide[0] is None else guide
        call, plan, need, _, dtypes, *_ = ctx.prepared

        def run(grad: Tensor) -> tuple[Tensor | None, ...]:
            found = native.gradient(z1, z2, call, plan, same_id or None, grad, guide)
            return in_dtypes(found, dtypes)

        with torch.no_grad():
            found = for_each_gradient(run, grad)
        dz, dtau = only_once(found, (grad, z1, z2, tau))
        return *views_of(dz, need), dtau, None, None, None


_Gradients = tuple[Tensor | None, ...]
_NO_GRADIENTS = (None,) * 6


# --- calls like one before ------------------------------------------------------------------------

#: τ, or SigLIP's scale and bias.
Temperature = float | Tensor | tuple[float | Tensor, float | Tensor]
#: The loss, its backend and why that backend; and the key of the call, if it has one.
Found = tuple[tuple[Tensor, str, str] | None, Any]
_facts = operator.attrgetter("shape", "dtype", "device", "layout", "requires_grad")


def again(z1: Tensor, z2: Tensor, temperature: Temperature, call: Call) -> Found:
    """The loss of a call like one that was prepared before, and the call's key.

    The key holds everything that the checks and the plan depend on, except the temperature's value.
    A call has no key if its views differ in dtype, or if a mode or a transform intercepts
    operations on its tensors. This is one long function because every step pays for each Python
    call.
    """
    if (
        type(z1) not in native.PLAIN
        or type(z2) not in native.PLAIN
        or z1.dtype is not z2.dtype
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or torch._C._functorch.is_functorch_wrapped_tensor(z1)  # of a transform that has ended
        or torch._C._functorch.is_functorch_wrapped_tensor(z2)
        or z1.is_neg()  # a plan reads memory
        or z2.is_neg()
        or call.process_group is not None
        or cpu._LIBRARY is None
    ):
        return None, None
    value, of_value = temperature, None
    if type(temperature) is not float:
        known = _of_tensors(temperature)
        if known is None:
            return None, None
        value, of_value = known
    key = _facts(z1), _facts(z2), of_value, torch.is_grad_enabled(), cpu._LIBRARY, cpu._forced
    prepared = call.ready.get(key) if call.ready else None
    if prepared is None:
        return None, key
    readings = prepared.readings
    if readings and not (all_unchanged(readings) and cpu_functions.asked_for()):
        return None, key  # a user's function may have changed
    if value != prepared.plan.temperature:
        if not allowed(value):
            return None, None  # the checks will say so
        prepared = call.ready[key] = prepared._replace(plan=prepared.plan.at(value))
    tau = _learnt(temperature, prepared.plan.like) if prepared.need.tau else None
    return (prepared.losses(z1, z2, tau, prepared, None, None)[0], "cpu", prepared.why), key


def _of_tensors(temperature: Any) -> tuple[cpu_step.Temperature, tuple[Any, ...]] | None:
    """The value of a temperature that is not a float, or of a scale and a bias, and what else a
    plan depends on; None where it is not plain.
    """
    several = type(temperature) is tuple
    values, facts = [], []
    for x in temperature if several else (temperature,):
        if type(x) is float:
            values.append(x)
            facts.append(float)
        elif native.plain(x) and x.is_cpu and x.numel() == 1 and not x.is_neg():
            values.append(x.detach().item())
            facts.append(_facts(x))
        else:
            return None
    return (tuple(values) if several else values[0]), tuple(facts)


def _learnt(temperature: Temperature, like: Tensor) -> Tensor:
    """τ as the function of a loss takes it, or a scale and a bias in one tensor."""
    if type(temperature) is not tuple:
        return temperature.reshape(())
    numbers = [
        x.reshape(()).to(like) if isinstance(x, Tensor) else like.new_full((), x)
        for x in temperature
    ]
    return torch.stack(numbers)


def allowed(value: cpu_step.Temperature) -> bool:
    if type(value) is tuple:
        return all(abs(x) <= LARGEST_LOGIT for x in value)
    return LEAST_TAU <= value <= LARGEST_TAU
