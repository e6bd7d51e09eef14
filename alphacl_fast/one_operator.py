"""A public loss as one operator of a compiled graph, whatever the loss is made of.

A loss that walks over blocks, sorts ids or composes other losses cannot be traced piece by piece.
`one_operator` puts the whole function behind one operator, which calls it eagerly. What crosses the
schema is the function's name, its tensors and its other arguments as text, so a graph that
`torch.export` has saved means the same in any process. (`compiled_op` does this for the losses of
two views without a second call of autograd.)
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional
from .autograd import SECOND_DERIVATIVE
from .bundles import accumulation_dtype
from .call import as_operator
from .compiled_op import on_its_own, refuse_to_export
from .objectives import Objective, registered
from .tracing import breaks_the_graph, constant_in_a_graph

_LIBRARY = torch.library.Library("alphacl_fast", "FRAGMENT")
_SETTINGS = "Tensor[] tensors, str loss, str[] names, str settings, bool[] needed"
_LIBRARY.define(f"whole_loss({_SETTINGS}) -> (Tensor, Tensor[])")
_LIBRARY.define(f"whole_loss_grad({_SETTINGS}, Tensor grad) -> Tensor[]")


#: (n rows, the call's settings) → the shape of the losses of reduction="none".
Losses = Callable[[int, dict[str, Any]], tuple[int, ...]]


class _Loss(NamedTuple):
    function: Callable[..., Tensor]
    rows: tuple[str, ...]  # the arguments that hold embeddings; all have one dtype
    losses: Losses
    reduction: str  # its default; "none" for a function without this argument


#: The public losses by name.
_LOSSES: dict[str, _Loss] = {}


def one_operator(
    *rows: str, losses: Losses = lambda n, settings: (n,)
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Makes a loss one operator of a compiled graph, and of tensors without data.

    Rows of several dtypes are promoted to one. With a process group the call breaks the graph.

    Args:
        *rows: the names of the arguments that hold embeddings.
        losses: (n rows, the arguments that are no tensors) → the shape of the losses that
            ``reduction="none"`` gives.
    """

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        parameters = inspect.signature(function).parameters
        positional = tuple(n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)
        reduction = parameters["reduction"].default if "reduction" in parameters else "none"
        label = function.__name__
        _LOSSES[label] = _Loss(function, rows, losses, reduction)
        over_ranks = breaks_the_graph(function)

        @wraps(function)
        def loss(*arguments: Any, **options: Any) -> Tensor:
            given = {**dict(zip(positional, arguments, strict=False)), **options}
            if len(given) < len(arguments) + len(options):
                return function(*arguments, **options)  # raises
            there = [name for name in rows if name in given]
            for name, x in zip(there, functional.of_one_dtype(*map(given.get, there)), strict=True):
                given[name] = x
            if not any(isinstance(x, Tensor) and as_operator(x) for x in given.values()):
                return function(**given)
            if given.get("process_group") is not None:
                return over_ranks(**given)
            return _record(label, given)

        return loss

    return decorate


def _record(name: str, given: dict[str, Any]) -> Tensor:
    """The loss as an operator of the graph that is being made."""
    tensors, names, settings = [], [], []
    for argument, value in _spread(given).items():
        if isinstance(value, Tensor):
            names.append(argument)
            tensors.append(value)
        elif isinstance(value, float) and functional.changes(value):
            names.append(f"{argument} as float")
            tensors.append(torch.ones((), dtype=torch.float64, device="cpu") * value)
        elif isinstance(value, Objective):
            refuse_to_export(value)
            settings.append((argument, value.key, True))
        else:
            settings.append((argument, value, False))
    grad = torch.is_grad_enabled()
    needed = [grad and x.requires_grad for x in tensors]
    text = _as_text(tuple(settings))
    return torch.ops.alphacl_fast.whole_loss(tensors, name, names, text, needed)[0]


def _spread(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with an entry of its own for each member of a tuple that holds tensors."""
    spread = {}
    for argument, value in given.items():
        if isinstance(value, (tuple, list)) and any(isinstance(x, Tensor) for x in value):
            spread.update({f"{argument} [{k}]": x for k, x in enumerate(value)})
        else:
            spread[argument] = value
    return spread


def _put_together(spread: dict[str, Any]) -> dict[str, Any]:
    """The arguments that `_spread` was given."""
    given: dict[str, Any] = {}
    members: dict[str, dict[int, Any]] = {}
    for name, value in spread.items():
        argument, of_tuple, place = name.partition(" [")
        if of_tuple:
            members.setdefault(argument, {})[int(place[:-1])] = value
        else:
            given[name] = value
    return given | {name: tuple(found[k] for k in sorted(found)) for name, found in members.items()}


@constant_in_a_graph
def _as_text(settings: tuple[tuple[str, Any, bool], ...]) -> str:
    """Arguments that are no tensors; the third entry says whether one is an objective's key."""
    return json.dumps(settings)


# --- the operators --------------------------------------------------------------------------------


def _call(tensors: list[Tensor], loss: str, names: list[str], settings: str) -> Tensor:
    given = dict(zip(names, tensors, strict=True))
    for argument in names:
        if argument.endswith(" as float"):
            given[argument.removesuffix(" as float")] = given.pop(argument).item()
    for argument, value, is_key in json.loads(settings):
        given[argument] = registered(value) if is_key else value
    return _LOSSES[loss].function(**_put_together(given))


def _deferred(tensors: list[Tensor], loss: str, settings: str, needed: list[bool]) -> bool:
    """Whether the gradient waits for the incoming one: of several losses, or in half precision.

    A half-precision gradient of 1e-8 would vanish before GradScaler's factor arrives.
    """
    half = any(n and x.dtype.itemsize < 4 for n, x in zip(needed, tensors, strict=True))
    return half or _reduction(loss, settings) == "none"


def _reduction(loss: str, settings: str) -> str:
    return _given(settings).get("reduction", _LOSSES[loss].reduction)


def _given(settings: str) -> dict[str, Any]:
    return {argument: value for argument, value, _ in json.loads(settings)}


def _leaves(tensors: list[Tensor], needed: list[bool]) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [x.detach().requires_grad_(n) for x, n in zip(tensors, needed, strict=True)]
    return leaves, [x for x in leaves if x.requires_grad]


def _gradients(value: Tensor, leaves: list[Tensor], grad: Tensor | None) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in leaves]
    found = torch.autograd.grad(value, leaves, grad, allow_unused=True, materialize_grads=True)
    # two leaves may share a gradient, and an operator's outputs may not
    return [x.clone(memory_format=torch.contiguous_format) for x in found]


@on_its_own
def _whole_loss(tensors, loss, names, settings, needed):
    if not any(needed) or _deferred(tensors, loss, settings, needed):
        return _call(tensors, loss, names, settings), []
    with torch.enable_grad():
        leaves, wanted = _leaves(tensors, needed)
        value = _call(leaves, loss, names, settings)
        return value.detach(), _gradients(value, wanted, None)


@on_its_own
def _whole_loss_grad(tensors, loss, names, settings, needed, grad):
    with torch.enable_grad():
        leaves, wanted = _leaves(tensors, needed)
        return _gradients(_call(leaves, loss, names, settings), wanted, grad)


def _fake_gradients(tensors: list[Tensor], needed: list[bool]) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, n in zip(tensors, needed, strict=True) if n]


def _whole_loss_fake(tensors, loss, names, settings, needed):
    rows = tensors[names.index(_LOSSES[loss].rows[0])]
    none = _reduction(loss, settings) == "none"
    shape = _LOSSES[loss].losses(rows.shape[0], _given(settings)) if none else ()
    value = rows.new_empty(shape, dtype=accumulation_dtype(rows.dtype))
    deferred = _deferred(tensors, loss, settings, needed)
    return value, [] if deferred else _fake_gradients(tensors, needed)


def _whole_loss_grad_fake(tensors, loss, names, settings, needed, grad):
    return _fake_gradients(tensors, needed)


def _setup(ctx, inputs, output) -> None:
    tensors, *ctx.settings, ctx.needed = inputs
    ctx.deferred = _deferred(tensors, ctx.settings[0], ctx.settings[2], ctx.needed)
    ctx.save_for_backward(*(tensors if ctx.deferred else output[1]))


def _backward(ctx, grad, _):
    if torch.is_grad_enabled():
        raise RuntimeError(SECOND_DERIVATIVE)
    found = [*ctx.saved_tensors]
    if ctx.deferred:
        found = torch.ops.alphacl_fast.whole_loss_grad(found, *ctx.settings, ctx.needed, grad)
    else:
        found = [(x * grad).to(x.dtype) for x in found]
    rest = iter(found)
    return [next(rest) if needed else None for needed in ctx.needed], *(None,) * 4


for _name, _function, _fake in (
    ("whole_loss", _whole_loss, _whole_loss_fake),
    ("whole_loss_grad", _whole_loss_grad, _whole_loss_grad_fake),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"alphacl_fast::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "alphacl_fast::whole_loss", _backward, setup_context=_setup, lib=_LIBRARY
)
