"""How a kernel is launched: by Triton, which binds and checks its arguments, or in a plan.

Triton's ``kernel[grid](…)`` looks at every argument to find the compiled kernel, which takes longer
than a small kernel runs. A plan (`alphacl_fast.launches`) keeps the compiled kernel that a recorded
launch found, and calls the launcher that Triton has compiled for its signature. The key of a plan
holds what Triton would have looked at: shapes, strides, dtypes, the device, and the alignment of
the inputs; all other buffers are aligned.

The launcher's arguments are not written down here, because they change from one version of Triton
to the next. A copy of the launcher, whose inner function only keeps what it receives, is called
once instead. Where that does not give one stream and known tensors, and in the interpreter, a plan
launches in the ordinary way (`through_handle`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import launches


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **options: Any):
    """``kernel[grid](*arguments, **options)`` on the device of ``like``."""
    recorder = launches.recorder()
    if recorder is None:
        with torch.cuda.device_of(like):
            kernel[grid](*arguments, **options)
        return
    # what the interpreter does on its own is no part of the step
    with torch.cuda.device_of(like), _disable_current_modes():
        compiled = kernel[grid](*arguments, **options)
    found = through_handle(kernel, compiled, grid, arguments, options)
    if found is None:
        recorder.launch(kernel[grid], arguments, options)
    else:
        recorder.kernel(*found, compiled)


def through_handle(
    kernel: Any,
    compiled: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[Callable[..., Any], list[Any], int, tuple[Any, Any, Any]] | None:
    """The launcher of a compiled kernel, its arguments, the position of the stream, and the hooks.

    The arguments hold tensors where the launcher may get addresses. None: Triton is another than
    expected, somebody watches its launches, or the kernel needs memory of its own.
    """
    hooks = hooks_of()
    run = getattr(compiled, "run", None)
    inner = getattr(run, "launch", None)
    ordered = bound(kernel, arguments, options)
    if hooks is None or inner is None or ordered is None or kernel.pre_run_hooks:
        return None
    received: list[tuple[Any, ...]] = []
    spy, stream = copy.copy(run), object()
    try:
        spy.launch = lambda *given: received.append(given)
        blocks = (*grid, 1, 1)[:3]
        spy(
            *blocks, stream, compiled.function, compiled.packed_metadata, None, None, None, *ordered
        )
    except (AttributeError, TypeError):
        return None
    (given,) = received or ((),)
    places = [k for k, x in enumerate(given) if x is stream]
    tail = given[len(given) - len(ordered) :]
    same = len(tail) == len(ordered) and all(a is b for a, b in zip(tail, ordered, strict=True))
    scratch = any(isinstance(x, Tensor) for x in given[: len(given) - len(ordered)])
    if len(places) != 1 or not same or scratch:
        return None
    return inner, list(given), places[0], hooks


def hooks_of() -> tuple[Any, Any, Any] | None:
    """Triton's settings and its hooks before and after a launch; None: they are in use."""
    settings = getattr(getattr(triton, "knobs", None), "runtime", None)
    if settings is None:
        return None
    hooks = settings.launch_enter_hook, settings.launch_exit_hook
    if any(hook is not None and getattr(hook, "calls", True) for hook in hooks):
        return None
    return settings, *hooks


def bound(
    kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, ...] | None:
    """The arguments of a kernel in the order of its parameters, without the compiler's options."""
    names = getattr(kernel, "arg_names", None)
    signature = getattr(kernel, "signature", None)
    if names is None or signature is None:
        return None
    own = {name: value for name, value in options.items() if name in names}
    given = signature.bind(*arguments, **own)
    given.apply_defaults()
    return tuple(given.arguments.values())
