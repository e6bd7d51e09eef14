"""The loss as one opaque operator, for torch.compile: a graph holds it whole, whatever the batch size and the objective do.

Traced piece by piece, the sizes that the sweeps compare would be guards of the graph, and a min player's iteration would break
it. Eager calls do not come here: they need no operator around the loss, and save the row scalars of ``reduction="none"``,
which a graph computes once more in its backward.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .autograd import Call, Groups, Problem, accumulation_dtype, features_of_views
from .objectives import registered

_LIBRARY = torch.library.Library("alphacl_fast", "FRAGMENT")
_CALL = (
    "float? host_tau, str objective, str similarity, str negatives, bool symmetric, str reduction, str backend, "
    "str precision, bool[] need"
)
_LIBRARY.define(f"loss(Tensor z1, Tensor z2, Tensor tau, Tensor? ids, {_CALL}) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(f"loss_grad(Tensor z1, Tensor z2, Tensor tau, Tensor? ids, Tensor grad, {_CALL}) -> (Tensor, Tensor)")


def loss(z1: Tensor, z2: Tensor, tau: Tensor, call: Call, ids: Tensor | None = None) -> Tensor:
    """() or one value per anchor, differentiable; called inside torch.compile only."""
    grad = torch.is_grad_enabled()
    need = [grad and x.requires_grad for x in (z1, z2, tau)]
    return torch.ops.alphacl_fast.loss(
        z1, z2, tau, ids, call.tau, call.objective.key, call.similarity, call.negatives, call.symmetric, call.reduction,
        call.backend, call.precision, need,
    )[0]  # fmt: skip


def _on_its_own(function):
    """The operator runs where the graph does, maybe inside autocast, and below autograd, which users' functions need."""

    @functools.wraps(function)
    def run(z1, *arguments):
        included, none = torch._C._dispatch_tls_local_include_set(), torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
        keys = torch._C._ForceDispatchKeyGuard(included, none)
        with keys, torch.autocast(z1.device.type, enabled=False), torch.no_grad():
            return function(z1, *arguments)

    return run


def _problem(
    z1, z2, tau, ids, host_tau, objective, similarity, negatives, symmetric, reduction, backend, precision
) -> Problem:
    registered(objective).check()
    call = Call(registered(objective), similarity, negatives, symmetric, reduction, backend, host_tau, precision)
    wide = accumulation_dtype(z1.dtype)
    groups = Groups.of_views(ids, call, z1.shape[0], wide)
    return Problem(*features_of_views(z1, z2, call), tau.to(wide), call, groups=groups)


@_on_its_own
def _loss(z1, z2, tau, ids, *call_and_need):
    *call, need = call_and_need
    problem = _problem(z1, z2, tau, ids, *call)
    if not any(need) or problem.call.reduction == "none":
        value, dz, dtau = problem.call.reduce(problem.solve(learn_tau=False).loss), None, None
    else:
        value, dz, dtau = problem.loss_and_gradient(tuple(need))
    return value, _or_nothing(dz, value), _or_nothing(dtau, value)


@_on_its_own
def _loss_grad(z1, z2, tau, ids, grad, *call_and_need):
    *call, need = call_and_need
    problem = _problem(z1, z2, tau, ids, *call)
    dz, dtau = problem.gradient(problem.solve(learn_tau=need[2]), grad, tuple(need))
    return _or_nothing(dz, grad), _or_nothing(dtau, grad)


def _or_nothing(x: Tensor | None, like: Tensor) -> Tensor:
    """An operator's outputs are tensors, each of its own."""
    return like.new_empty(0, dtype=accumulation_dtype(like.dtype)) if x is None else x


def _gradients_fake(z1, tau, need):
    wide = accumulation_dtype(z1.dtype)
    views = need[0] + need[1]
    dz = z1.new_empty((z1.shape[0] * views, z1.shape[1]), dtype=wide) if views else None
    dtau = tau.new_empty((), dtype=wide) if need[2] else None
    return _or_nothing(dz, z1), _or_nothing(dtau, z1)


def _loss_fake(z1, z2, tau, ids, host_tau, objective, similarity, negatives, symmetric, reduction, backend, precision, need):
    n = z1.shape[0]
    shape = () if reduction != "none" else (2 * n if negatives == "two_view" else n,)
    none = reduction == "none"
    return z1.new_empty(shape, dtype=accumulation_dtype(z1.dtype)), *_gradients_fake(z1, tau, [x and not none for x in need])


def _loss_grad_fake(z1, z2, tau, ids, grad, *call_and_need):
    return _gradients_fake(z1, tau, call_and_need[-1])


def _setup(ctx, inputs, output) -> None:
    z1, z2, tau, ids, *ctx.call = inputs
    gradients = () if "none" in ctx.call else output[1:]  # of all arguments only the reduction is called so
    ctx.save_for_backward(z1, z2, tau, ids, *gradients)


def _backward(ctx, grad, *_):
    z1, z2, tau, ids, *gradients = ctx.saved_tensors
    need_1, need_2, need_tau = ctx.call[-1]
    if torch.is_grad_enabled():
        raise RuntimeError("a second derivative of the loss was asked for (create_graph=True), it has first ones only")
    if gradients:
        dz, dtau = (x * grad for x in gradients)
    else:
        dz, dtau = torch.ops.alphacl_fast.loss_grad(z1, z2, tau, ids, grad, *ctx.call)
    n = z1.shape[0]
    dz = dz.to(z1.dtype) if need_1 or need_2 else dz
    of_inputs = (dz[:n] if need_1 else None), (dz[-n:] if need_2 else None), dtau.to(tau.dtype) if need_tau else None
    return *of_inputs, None, *(None for _ in ctx.call)


for _name, _function, _fake in (("loss", _loss, _loss_fake), ("loss_grad", _loss_grad, _loss_grad_fake)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"alphacl_fast::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("alphacl_fast::loss", _backward, setup_context=_setup, lib=_LIBRARY)
