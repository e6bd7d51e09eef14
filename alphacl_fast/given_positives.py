"""Eager losses with given positives that `native` serves: values and first derivatives.

The rows are anchors z (N, D) that meet other rows (M, D), or one another, and the similarity of
each anchor with its positive is given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import eager, native
from .autograd import first_derivative, for_each_gradient, in_dtypes, only_once
from .backend import cpu, cpu_step
from .call import Layout, Loss, SameId
from .eager import keep_of_step, scaled_once


class Prepared(NamedTuple):
    """What has been checked and prepared for all calls that are alike."""

    call: Loss
    layout: Layout
    plan: cpu_step.Plan
    need: native.NeedGiven

    def at(self, temperature: float | Tensor) -> Prepared | None:
        """The same at a temperature, or None where it is not allowed."""
        value = temperature if type(temperature) is float else temperature.detach().item()
        if value == self.plan.temperature:
            return self
        return self._replace(plan=self.plan.at(value)) if eager.allowed(value) else None

    def loss(
        self,
        z: Tensor,
        others: Tensor | None,
        pos: Tensor,
        tau: float | Tensor,
        bias: Tensor | None = None,
        same_id: SameId | None = None,
    ) -> Tensor:
        """The reduced loss, differentiable; τ is read only if its gradient is needed."""
        tau = tau if self.need.tau else None
        if not any(self.need):
            return self.plan.run_given(z, others, pos, bias, (False, False), same_id)[0]
        function = _Losses if self.call.reduction == "none" else _Loss
        return function.of_plain(z, others, pos, tau, bias, self, same_id)[0]

    def run(self, *tensors: Any) -> tuple[Tensor | None, ...]:
        """z, others, pos, bias, ids and the gradient of every loss → loss and all gradients."""
        z, others, pos, bias, *rest = tensors
        return self.plan.run_given(z, others, pos, bias, (self.need.pos, self.need.bias), *rest)

    def gradients(self, found: tuple[Tensor | None, ...], n: int) -> tuple[Tensor | None, ...]:
        """Those of z, others, pos, τ and bias, of what a step has found for n anchors."""
        (dz, dtau, dpos, dbias), need = found, self.need
        own = n - min(n, self.plan.batch.wanted[0])  # rows of dz that belong to z
        return (
            dz[:own] if need.z else None,
            dz[own:] if need.others else None,
            dpos,
            dtau,
            dbias,
        )


def key_of(given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What the checks and the plan of a call depend on but the temperature's value, or None where a
    call is not plain.

    ``given``: z, negatives, positive, temperature, ids and more, tensors or what stands for them.
    """
    if cpu.load_error() is not None:
        return None
    temperature = given[3]
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        return None
    grad, key = torch.is_grad_enabled(), [cpu.instruction_set()]
    for x in given:
        if not isinstance(x, Tensor):
            if not (x is None or type(x) in (bool, float)):
                return None
            key.append(float if type(x) is float else x)
            continue
        if not (x.is_cpu and native.plain(x)) or x.is_neg():
            return None
        key += (x.shape, x.dtype, x.layout, grad and x.requires_grad)
    return (*key, cpu._LIBRARY)


def _dtypes(z: Tensor, pos: Tensor, tau: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
    """Those of the gradients, in the order in which a step gives them."""
    return tuple(None if x is None else x.dtype for x in (z, tau, pos, bias))


class _Loss(native.PlainFunction):
    """The loss with its gradient, which waits for the incoming one."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        others: Tensor | None,
        pos: Tensor,
        tau: Tensor | None,
        bias: Tensor | None,
        prepared: Prepared,
        same_id: SameId | None,
    ) -> tuple[Tensor | None, ...]:
        outputs = prepared.run(z, others, pos, bias, same_id)
        ctx.prepared, ctx.n = prepared, len(z)
        keep_of_step(ctx, outputs[1:], _dtypes(z, pos, tau, bias))
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *of_saved: Tensor | None) -> _Gradients:
        if not first_derivative(grad, of_saved):
            return (None,) * 7
        return *ctx.prepared.gradients(scaled_once(ctx, grad), ctx.n), None, None


class _Losses(native.PlainFunction):
    """One loss per anchor; the backward solves the rows again, for the gradient of each."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        others: Tensor | None,
        pos: Tensor,
        tau: Tensor | None,
        bias: Tensor | None,
        prepared: Prepared,
        same_id: SameId | None,
    ) -> tuple[Tensor]:
        ctx.prepared, ctx.dtypes = prepared, _dtypes(z, pos, tau, bias)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, others, pos, tau, bias, *(same_id or ()))
        plan = prepared.plan.forward
        return (plan.run_given(z, others, pos, bias, (False, False), same_id)[0],)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> _Gradients:
        if grad is None:
            return (None,) * 7
        z, others, pos, tau, bias, *same_id = ctx.saved_tensors
        prepared = ctx.prepared

        def run(grad: Tensor) -> tuple[Tensor | None, ...]:
            incoming = grad.to(prepared.plan.wide)
            found = prepared.run(z, others, pos, bias, same_id or None, incoming)[1:]
            return prepared.gradients(in_dtypes(found, ctx.dtypes), len(z))

        with torch.no_grad():
            found = for_each_gradient(run, grad)
        return *only_once(found, (grad, z, others, pos, tau, bias)), None, None


_Gradients = tuple[Tensor | None, ...]
