"""Steps of the GPU backends that equal one before: checked and decided once, then replayed.

The first call of a key runs as any other. The second is recorded (`launches`), and from then on the
plan serves. A call whose tensors anybody watches or transforms has no key.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import eager, launches, native, ops
from .autograd import SECOND_DERIVATIVE, AlphaCLFunction
from .call import BoundCall, Call, Need
from .objectives import ClosedForm, is_built_in


def _asked_for() -> bool:
    """Whether steps are to be recorded and replayed: unless ALPHACL_PLANS is 0."""
    given = os.environ.get("ALPHACL_PLANS", "1")
    if given not in ("0", "1"):
        raise ValueError(f"ALPHACL_PLANS must be 0 or 1, got {given!r}")
    return given == "1"


enabled = _asked_for()
#: Backends that launch kernels. On other devices than GPUs a plan is made only where one of them
#: was asked for by name.
LAUNCHING = {"triton", "cuda"}


class About(NamedTuple):
    """What the backward of a step and its caller need besides the tensors."""

    need: Need
    views: int
    dtypes: tuple[torch.dtype, torch.dtype | None]  # of the embeddings and of the temperature
    served: tuple[str, str]  # the backend, and why


class _Step(torch.autograd.Function):
    """(loss, its gradient in both views, its gradient in τ) by a plan; first derivatives only.

    The gradients are outputs because a gradient that arrives at them belongs to a second
    derivative, which raises (`autograd.AlphaCLFunction`).
    """

    forward = staticmethod(launches.replay)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, of_dz: Tensor | None, of_dtau: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if of_dz is not None or of_dtau is not None:
            raise RuntimeError(SECOND_DERIVATIVE)
        dz, dtau = ctx.saved_tensors
        (need_z1, need_z2, _), views, (dtype, dtype_of_tau), _ = ctx.about
        dz1 = dz2 = None
        if grad is not None and dz is not None:
            # float32 until it is scaled, as GradScaler needs it
            dz = dz * grad
            if dz.dtype != dtype:
                dz = dz.to(dtype)
            n = dz.shape[0] // views
            dz1, dz2 = (dz[:n] if need_z1 else None), (dz[-n:] if need_z2 else None)
        dtau = None if grad is None or dtau is None else (dtau * grad).to(dtype_of_tau)
        return None, dz1, dz2, dtau, None


#: Without what `Function.apply` does for torch.func, whose tensors have no key.
_apply = super(torch.autograd.Function, _Step).apply

_facts = operator.attrgetter("__class__", "shape", "dtype", "device", "requires_grad")
if hasattr(torch._C, "_get_fp32_precision_getter"):
    _getter = torch._C._get_fp32_precision_getter
    #: The setting that float32 products follow, by the type of the device.
    _PRECISION = {
        "cuda": functools.partial(_getter, "cuda", "matmul"),
        "cpu": functools.partial(_getter, "mkldnn", "matmul"),
    }
else:
    _PRECISION = dict.fromkeys(("cuda", "cpu"), torch._C._get_float32_matmul_precision)
_NO_KEY = None, None
#: What `Call.ready` holds for a key after its first call; later it holds the plan, or the reason
#: why there is none.
_SEEN = True


def again(
    z1: Tensor, z2: Tensor, temperature: Any, call: Call, ids: Tensor | None = None
) -> eager.Found:
    """The loss of a call whose key has a plan, and the key, if it has one; not for compiled graphs.

    `eager` has the plans of the CPU kernels. This is one function without a call of Python but the
    plan's, because every step pays for it.
    """
    if type(z1) not in native.PLAIN or type(z2) not in native.PLAIN:
        return _NO_KEY
    device = z1.device
    kind = device.type
    if kind == "cpu" and call.backend not in LAUNCHING:
        return _NO_KEY if ids is not None else eager.again(z1, z2, temperature, call)
    if not enabled or kind not in ("cuda", "cpu"):
        return _NO_KEY
    if (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or z1.layout is not torch.strided
        or z2.layout is not torch.strided
        or torch._C._functorch.is_functorch_wrapped_tensor(z1)  # of a transform that has ended
        or torch._C._functorch.is_functorch_wrapped_tensor(z2)
        or z1.dtype is not z2.dtype
        or z1.is_neg()
        or z2.is_neg()
        or call.process_group is not None
    ):
        return _NO_KEY
    tau = None
    if type(temperature) is float:
        of_tau = temperature
    elif (
        type(temperature) in native.PLAIN
        and temperature.layout is torch.strided
        and temperature.numel() == 1
        and not temperature.is_neg()
        and not torch._C._functorch.is_functorch_wrapped_tensor(temperature)
    ):
        tau, value = temperature, temperature.item() if temperature.is_cpu else None
        of_tau = _facts(tau), tau.data_ptr() % 16, value
    else:
        return _NO_KEY
    of_ids = None
    if ids is not None:
        if (
            type(ids) is not Tensor
            or ids.layout is not torch.strided
            or torch._C._functorch.is_functorch_wrapped_tensor(ids)
        ):
            return _NO_KEY
        of_ids = _facts(ids), ids.stride(), ids.data_ptr() % 16
    key = (
        _facts(z1), z1.stride(), z1.data_ptr() % 16, _facts(z2), z2.stride(), z2.data_ptr() % 16,
        of_tau, of_ids, torch.is_grad_enabled(), _PRECISION[kind](), launches.epoch,
    )  # fmt: skip
    plan = call.ready.get(key) if call.ready else None
    if type(plan) is not launches.Plan:
        return None, key
    if plan.hooks is not None:
        settings, enter, leave = plan.hooks
        same = settings.launch_enter_hook is enter and settings.launch_exit_hook is leave
        if not same or getattr(enter, "calls", None) or getattr(leave, "calls", None):
            return None, key
    autocast = torch.is_autocast_enabled(kind)
    other = kind == "cuda" and torch._C._cuda_getDevice() != device.index
    try:
        if autocast:
            torch.set_autocast_enabled(kind, False)
        if other:
            before = torch._C._cuda_exchangeDevice(device.index)
        loss = _apply(plan, z1, z2, tau, ids)[0]
    finally:
        if autocast:
            torch.set_autocast_enabled(kind, True)
        if other:
            torch._C._cuda_exchangeDevice(before)
    return (loss, *plan.about.served), key


def prepare(
    inputs: tuple[Tensor | None, ...],
    tau_of: Callable[[Tensor], Tensor],
    call: Call,
    bound: BoundCall,
    key: Any,
    why: str,
) -> bool:
    """Makes the plan of a key that has been seen before; whether there is one now.

    ``inputs``: z1, z2, the temperature if it is a tensor, ids. ``tau_of(z1)``: the temperature as
    it is bound, where it is no tensor.
    """
    if (
        bound.backend not in LAUNCHING
        or bound.reduction == "none"
        or isinstance(bound.objective, ClosedForm)
        or not is_built_in(bound.objective)
    ):
        return False
    if not (call.ready and key in call.ready):
        call.remember(key, _SEEN)
        return False
    if call.ready.get(key) is not _SEEN or capturing(inputs[0]):
        return False
    z1, z2, temperature, _ = inputs
    need = Need.of(z1, z2, torch.empty(()) if temperature is None else temperature)
    dtypes = z1.dtype, None if temperature is None else temperature.dtype

    def step(
        z1: Tensor, z2: Tensor, tau: Tensor | None, ids: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        tau = tau_of(z1) if tau is None else tau.reshape(()).to(z1.device)
        ids = None if ids is None else ids.to(z1.device)
        return (*AlphaCLFunction.forward(z1, z2, tau, bound, need, ids), None, None)[:3]

    about = About(need, need.views, dtypes, (bound.backend, why))
    try:
        plan = launches.record(step, inputs, ops.IMPLEMENTATIONS, about)
    except launches.NotRecorded as error:
        call.remember(key, str(error))
        return False
    call.remember(key, plan)
    return True


def capturing(z: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which must not hold the recorded step as well."""
    return z.is_cuda and torch.cuda.is_current_stream_capturing()
