"""Losses that one native call computes from the views to the gradient (`backend.cpu_step`).

The call sees the objective as a recorded program. What it does not serve goes through the two
sweeps (`autograd`): several processes, explicit negatives, min players, transforms of torch.func.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import ops
from .backend import cpu, cpu_step
from .call import BoundCall, Guide, Layout, Loss, Need, SameId
from .objectives import kind
from .program import record


def serves(call: BoundCall, need: Need, with_guide: bool = False) -> bool:
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


def plain(*tensors: Tensor) -> bool:
    """Whether operations on these tensors are not watched or transformed by anybody."""
    for x in tensors:
        # wrapped: of a transform that has ended
        if type(x) not in PLAIN or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
    return (
        not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
    )


PLAIN = {Tensor, torch.nn.Parameter}


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
    (n, dim), objective = shape, loss.objective
    layout, params = Layout.of(loss, n), objective.params(loss.c)
    wanted = (0 if need.z1 else n, 2 * n if need.z2 else n)
    batch = cpu_step.Batch(
        n, dim, dtype, layout.rows, layout.pairing(), layout.n_neg, loss.divisor(n), wanted,
        loss.reduction == "none", objective.needs_negatives,
        loss.similarity,
        cpu_step.default_workspace() if workspace is None else workspace, loss.max_gap,
    )  # fmt: skip

    bound = kind(objective.kind)
    # t lies in [−1, 1]
    bound = bound.bind(params) if bound.log and loss.similarity == "cosine" else None

    def numbers_at(temperature: cpu_step.Temperature) -> cpu_step.Numbers:
        each = temperature if isinstance(temperature, tuple) else (temperature,)
        tau = objective.kind_tau(torch.tensor(temperature, dtype=torch.float64, device="cpu"))
        values = dict(zip(objective.numbers, objective.known_numbers(*each), strict=True))
        log_range = None if bound is None else ops.range_at(bound, tau)
        return cpu_step.Numbers(tau.item(), log_range, objective.first_view_factor(*each), values)

    program = record(objective, need.views > 0, need.tau)
    plan = cpu_step.Plan(batch, program, objective.kind, params, numbers_at)
    if loss.reduction == "none" and any(need):
        alone = Need(False, False, False)
        plan.alone = _plan(loss, shape, dtype, alone, workspace, instruction_set)
    return plan


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
