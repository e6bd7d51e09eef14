"""The loss as one operator for torch.compile: a graph holds it as a whole, for any batch size and
objective.

If dynamo traced the loss piece by piece, the sizes that the sweeps compare would become guards of
the graph, and a min player's iteration would break it. Eager calls do not come here: they need no
operator around the loss, and they save the solution of ``reduction="none"``, which a graph
recomputes in its backward.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import native, ops
from .autograd import SECOND_DERIVATIVE, Problem, views_of
from .bundles import accumulation_dtype
from .call import BoundCall, Need, SameId
from .objectives import Objective, is_of_this_process, names, registered
from .tracing import constant_in_a_graph

_LIBRARY = torch.library.Library("alphacl_fast", "FRAGMENT")


class _Options(NamedTuple):
    """`BoundCall` and the wanted gradients, as an operator schema can hold them."""

    objective: str
    similarity: str
    negatives: str
    symmetric: bool
    reduction: str
    max_gap: float | None
    backend: str
    temperature: float | None
    precision: str
    workspace: int | None
    need: list[bool]

    def bound(self, tau: Tensor) -> tuple[BoundCall, Need]:
        """The call and the wanted gradients.

        It checks the objective, whose attributes may have changed since the graph was made.
        """
        objective = registered(self.objective)
        objective.check()
        known = self.temperature
        if known is None and tau.is_cpu and tau.numel() == 1:
            known = tau.item()
        fields = {**self._asdict(), "objective": objective, "known": (known,)}
        need, _ = fields.pop("need"), fields.pop("temperature")
        return BoundCall(**fields), Need(*need)


_SCHEMA = ops.schema(_Options)
_LIBRARY.define(
    f"loss(Tensor z1, Tensor z2, Tensor tau, Tensor? ids, {_SCHEMA}) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    f"loss_grad(Tensor z1, Tensor z2, Tensor tau, Tensor? ids, Tensor grad, {_SCHEMA}) -> "
    "(Tensor, Tensor)"
)


def loss(z1: Tensor, z2: Tensor, tau: Tensor, call: BoundCall, ids: Tensor | None = None) -> Tensor:
    """() or one value per anchor, differentiable; called inside torch.compile, or without data.

    Raises:
        ValueError: torch.export meets an objective that another process could not find.
    """
    refuse_to_export(call.objective)
    grad = torch.is_grad_enabled()
    options = _Options(
        call.objective.key,
        call.similarity,
        call.negatives,
        call.symmetric,
        call.reduction,
        call.max_gap,
        call.backend,
        call.temperature,
        call.precision,
        call.workspace,
        [grad and x.requires_grad for x in (z1, z2, tau)],
    )
    return torch.ops.alphacl_fast.loss(z1, z2, tau, ids, *options)[0]


def refuse_to_export(objective: Objective) -> None:
    """Raises ValueError where torch.export meets a user's object."""
    _refuse_to_export(objective.key, objective.name)


@constant_in_a_graph  # for dynamo every graph is exported
def _refuse_to_export(key: str, name: str) -> None:
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.4
    if is_of_this_process(key) and exporting():
        raise ValueError(
            f"torch.export must have a named objective ({', '.join(names())}), got {name} of your "
            "own functions: an exported file holds a name and options, and no Python code"
        )


def on_its_own(function):
    """Runs an operator outside autocast, where users' functions can be differentiated.

    An operator's implementation runs below autograd, which users' functions need.
    """

    @functools.wraps(function)
    def run(first, *arguments):
        z1 = first[0] if isinstance(first, list | tuple) else first
        included, none = (
            torch._C._dispatch_tls_local_include_set(),
            torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined),
        )
        keys = torch._C._ForceDispatchKeyGuard(included, none)
        with keys, torch.autocast(z1.device.type, enabled=False), torch.no_grad():
            return function(first, *arguments)

    return run


@on_its_own
def _loss(z1, z2, tau, ids, *options):
    call, need = _Options(*options).bound(tau)
    if call.reduction == "none":
        need = Need(False, False, False)  # the backward solves the rows again
    if native.serves(call, need):
        plan = native.prepared(call, z1, need)
        same_id = SameId.of_views(ids, call, len(z1), plan.wide)
        value, dz, dtau = native.loss_and_gradient(z1, z2, call, plan, same_id)
        return value, _or_nothing(dz, value), _or_nothing(dtau, value)
    problem = Problem.of_views(z1, z2, tau, call, ids)
    if not any(need):
        value, dz, dtau = problem.reduce(problem.solve(learn_tau=False).loss), None, None
    else:
        value, dz, dtau = problem.loss_and_gradient(need)
    return value, _or_nothing(dz, value), _or_nothing(dtau, value)


@on_its_own
def _loss_grad(z1, z2, tau, ids, grad, *options):
    call, need = _Options(*options).bound(tau)
    if native.serves(call, need):
        plan = native.prepared(call, z1, need)
        same_id = SameId.of_views(ids, call, len(z1), plan.wide)
        dz, dtau = native.gradient(z1, z2, call, plan, same_id, grad)
        return _or_nothing(dz, grad), _or_nothing(dtau, grad)
    problem = Problem.of_views(z1, z2, tau, call, ids)
    dz, dtau = problem.gradient(problem.solve(learn_tau=need.tau), grad, need)
    return _or_nothing(dz, grad), _or_nothing(dtau, grad)


def _or_nothing(x: Tensor | None, like: Tensor) -> Tensor:
    """An empty tensor for None: every output of an operator is a tensor of its own."""
    return like.new_empty(0, dtype=accumulation_dtype(like.dtype)) if x is None else x


def _gradients_fake(z1: Tensor, tau: Tensor, need: Need):
    wide = accumulation_dtype(z1.dtype)
    shape = z1.shape[0] * need.views, z1.shape[1]
    dz = z1.new_empty(shape, dtype=wide) if need.views else None
    dtau = tau.new_empty(tau.shape, dtype=wide) if need.tau else None
    return _or_nothing(dz, z1), _or_nothing(dtau, z1)


def _loss_fake(z1, z2, tau, ids, *options):
    options, n = _Options(*options), z1.shape[0]
    none = options.reduction == "none"
    shape = () if not none else (2 * n if options.negatives == "two_view" else n,)
    value = z1.new_empty(shape, dtype=accumulation_dtype(z1.dtype))
    need = Need(*(x and not none for x in options.need))
    return value, *_gradients_fake(z1, tau, need)


def _loss_grad_fake(z1, z2, tau, ids, grad, *options):
    return _gradients_fake(z1, tau, Need(*_Options(*options).need))


def _setup(ctx, inputs, output) -> None:
    z1, z2, tau, ids, *options = inputs
    ctx.options = _Options(*options)
    gradients = () if ctx.options.reduction == "none" else output[1:]
    ctx.save_for_backward(z1, z2, tau, ids, *gradients)


def _backward(ctx, grad, *_):
    z1, z2, tau, ids, *gradients = ctx.saved_tensors
    need = Need(*ctx.options.need)
    if torch.is_grad_enabled():
        raise RuntimeError(SECOND_DERIVATIVE)
    if gradients:
        dz, dtau = (x * grad for x in gradients)
    else:
        dz, dtau = torch.ops.alphacl_fast.loss_grad(z1, z2, tau, ids, grad, *ctx.options)
    dz = dz.to(z1.dtype) if need.views else None
    dtau = dtau.to(tau.dtype) if need.tau else None
    return *views_of(dz, need), dtau, None, *(None for _ in ctx.options)


for _name, _function, _fake in (
    ("loss", _loss, _loss_fake),
    ("loss_grad", _loss_grad, _loss_grad_fake),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"alphacl_fast::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("alphacl_fast::loss", _backward, setup_context=_setup, lib=_LIBRARY)
