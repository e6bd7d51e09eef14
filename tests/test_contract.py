"""An adapter keeps the whole contract of the class that it replaces, entry by entry of `contracts`.

The package itself is the truth, in float64.
"""

import inspect

import pytest
import torch
from contracts import TABLE
from torch import nn

pytestmark = pytest.mark.xdist_group("packages")  # they take seconds to import

#: One entry for each class.
CLASSES = [*{contract.name: contract for contract in TABLE}.values()]
IDS = [contract.name for contract in CLASSES]
BOTH_CALLS = pytest.mark.parametrize("contract", TABLE, ids=[c.name for c in TABLE])
EACH_CLASS = pytest.mark.parametrize("contract", CLASSES, ids=IDS)


def parameters(function):
    """Those that have a name of their own, without self."""
    named = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    return {p.name: p for p in named if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


@EACH_CLASS
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures(contract, method):
    """Every parameter of theirs has its place and its default in ours, but for what is listed."""
    ours, theirs = (parameters(getattr(c, method)) for c in contract.classes())
    assert [*ours][: len(theirs)] == [*theirs]
    for name, parameter in theirs.items():
        given = ours[name].default
        excused = (
            name in contract.parameters or (name == "labels" and given is None)
            or given == parameter.default
        )  # fmt: skip
        assert excused, f"{name} is {given!r}, in the package {parameter.default!r}"


def attributes(loss):
    """Public names that people read: what the constructor sets, and what the class adds."""
    held = {*vars(loss), *loss._modules, *loss._buffers, *loss._parameters}
    added = {*dir(type(loss))} - {*dir(nn.Module)}
    return {name for name in held | added if not name.startswith("_")} - {"training"}


@EACH_CLASS
def test_attributes(contract):
    ours, theirs = contract.pair()
    assert attributes(theirs) - {*dir(ours)} <= {*contract.other}
    for name in attributes(theirs):
        value = getattr(theirs, name)
        if isinstance(value, (bool, int, float, str, tuple, type(None))) and name != "citation":
            assert getattr(ours, name) == value, name


@EACH_CLASS
def test_state_dicts_are_the_same(contract):
    """A checkpoint from before the change of import loads, and one from after it loads there."""
    for settings in contract.settings:
        ours, theirs = (nn.ModuleDict({"criterion": x}) for x in contract.pair(**settings))
        for source, target in ((ours, theirs), (theirs, ours)):
            target.load_state_dict(source.state_dict(), strict=True)


def run(contract, loss, tensors):
    """Loss and gradients; zeros for what the loss does not depend on."""
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in tensors]
    value = contract.call(loss, leaves)
    value.backward()
    grads = [x.grad for x in leaves if x.is_floating_point()]
    return value.detach(), grads


def alike(contract, settings):
    """Both losses with the same state, in float64."""
    losses = [loss.double() for loss in contract.pair(**settings)]
    for ours, theirs in zip(*(loss.buffers() for loss in losses), strict=True):
        ours.copy_(theirs)
    return losses


@BOTH_CALLS
@pytest.mark.parametrize("pairs", [1, 2, 3, 11])
def test_values_and_gradients(contract, pairs):
    """Also in a second step, which meets what the first one left in a bank."""
    tensors = contract.inputs(pairs)
    for settings in contract.settings:
        ours, theirs = alike(contract, settings)
        for _ in range(2):
            value, grads = run(contract, ours, tensors)
            assert all(x is not None for x in grads), "an argument is not in the graph"
            if pairs in contract.small:
                assert value == 0
                assert not any(x.any() for x in grads)
                continue
            truth, true_grads = run(contract, theirs, tensors)
            assert abs(value - truth) <= 1e-9 * max(1, abs(truth)), settings
            for mine, other in zip(grads, true_grads, strict=True):
                other = torch.zeros_like(mine) if other is None else other
                assert (mine - other).norm() <= 1e-9 * other.norm() + 1e-11, settings


@BOTH_CALLS
def test_criterion_on_another_device(contract):
    """Where the package's loss goes along with the embeddings, ours does."""
    for settings in contract.settings:
        tensors = [x.to("meta").float() for x in contract.inputs(4)]
        ours, theirs = contract.pair(**settings)
        try:
            expected = contract.call(theirs, tensors)
        except (RuntimeError, NotImplementedError):  # it needs the numbers of its arguments
            continue
        assert contract.call(ours, tensors).device == expected.device


@pytest.mark.parametrize(
    "contract", [c for c in TABLE if c.towers > 1], ids=[c.name for c in TABLE if c.towers > 1]
)
def test_dtypes_mixed_under_autocast(contract):
    """Every tower keeps its dtype and gets its gradient in it."""
    tensors = [x.float() for x in contract.inputs(6)]
    for settings in contract.settings:
        ours, theirs = alike(contract, settings)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = [x.bfloat16() if k == 1 else x for k, x in enumerate(tensors)]
            value, grads = run(contract, ours, mixed)
        assert [g.dtype for g in grads] == [x.dtype for x in mixed if x.is_floating_point()]
        assert value.dtype == torch.float32
        truth, _ = run(contract, theirs, [x.double() for x in mixed])
        assert abs(value - truth) <= 2e-3 * max(1, abs(truth)), settings
