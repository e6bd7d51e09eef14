"""An adapter keeps the whole contract of the class that it replaces, entry by entry of `contracts`.

The package itself is the truth, in float64.
"""

import copy
import inspect
import itertools
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from contracts import METRIC_CALLS, TABLE
from ranks import forked
from torch import nn

from alphacl_fast.compat import entry

pytestmark = pytest.mark.xdist_group("packages")  # they take seconds to import

#: One entry for each class.
CLASSES = [*{contract.name: contract for contract in TABLE}.values()]
IDS = [contract.name for contract in CLASSES]
BOTH_CALLS = pytest.mark.parametrize("contract", TABLE, ids=[c.name for c in TABLE])
EACH_CLASS = pytest.mark.parametrize("contract", CLASSES, ids=IDS)
#: Those whose small batches are matrices.
SMALL = "open_clip", "pytorch_metric_learning", "sentence_transformers:Mul", "info_nce"
MATRICES = [c for c in TABLE if c.ours.startswith(SMALL)]


@pytest.fixture(autouse=True)
def sweeps(monkeypatch):
    """Small batches go through the sweeps, as large ones do."""
    monkeypatch.setattr(entry, "PAIRS_OF_A_MATRIX", 0)


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


@pytest.mark.parametrize("contract", MATRICES, ids=[c.name for c in MATRICES])
def test_small_batches(contract, monkeypatch):
    monkeypatch.setattr(entry, "PAIRS_OF_A_MATRIX", 1000)
    monkeypatch.setattr(entry.cpu, "load_error", lambda: "none")  # one step would be faster
    for pairs in (1, 6):
        test_values_and_gradients(contract, pairs)


METRIC = [c for c in CLASSES if c.ours.startswith("pytorch_metric_learning")]


@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("contract", METRIC, ids=[c.name for c in METRIC])
def test_odd_calls(contract, matrix, monkeypatch):
    """Empty batches, labels of any kind, what miners find: the package's value and gradient."""
    monkeypatch.setattr(entry, "PAIRS_OF_A_MATRIX", 1000 * matrix)
    for name, call in METRIC_CALLS.items():
        found = []
        for loss in contract.pair():
            z = contract.inputs(4)[0].requires_grad_()
            value = call(loss, z)
            found.append([value.detach(), *torch.autograd.grad(value, z, allow_unused=True)])
        (value, grad), (truth, true_grad) = found
        true_grad = torch.zeros_like(grad) if true_grad is None else true_grad
        torch.testing.assert_close(
            [value, grad], [truth, true_grad], rtol=1e-9, atol=1e-11, msg=name
        )


@EACH_CLASS
def test_copies(contract):
    """Copies and pickles of a loss give what it gives; its text names no address."""
    loss = contract.pair(**contract.settings[0])[0].double()
    tensors = contract.inputs(4)
    copies = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
    values = [contract.call(x, tensors) for x in (loss, *copies)]
    assert values[0] == values[1] == values[2]
    assert " at 0x" not in repr(loss)


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


PARTED = torch.bfloat16, torch.float32


@BOTH_CALLS
def test_the_dtype_of_a_loss(contract):
    """In half precision and under autocast, it is the package's."""
    for settings in contract.settings:
        ours, theirs = contract.pair(**settings)
        for (first, others), autocast in itertools.product(
            (2 * [torch.float32], 2 * [torch.bfloat16], 2 * [torch.float16], PARTED), (False, True)
        ):
            tensors = [
                x.to(others if k else first) if x.is_floating_point() else x
                for k, x in enumerate(contract.inputs(4))
            ]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                try:
                    expected = contract.call(theirs, tensors)
                except RuntimeError:  # an operation of theirs does not take it
                    continue
                value = contract.call(ours, tensors)
            assert value.dtype == expected.dtype, (settings, first, others, autocast)


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
        truth, _ = run(contract, theirs, [x.double() for x in mixed])
        rounding = torch.finfo(value.dtype).eps / 2
        assert abs(value - truth) <= (1e-5 + rounding) * max(1, abs(truth)), settings


# --- two processes --------------------------------------------------------------------------------


class Model(nn.Module):
    """A loss behind one linear layer for each tower; numbers, as a scale, are parameters."""

    def __init__(self, contract, loss, tensors):
        super().__init__()
        torch.manual_seed(0)
        self.contract, self.loss = contract, [loss]  # no module of this one
        self.layers = nn.ModuleList(
            nn.Linear(x.shape[1], x.shape[1], dtype=x.dtype) if is_tower(x) else nn.Identity()
            for x in tensors
        )
        self.numbers = nn.ParameterList(x.clone() for x in tensors if not x.dim())

    def forward(self, tensors):
        numbers = iter(self.numbers)
        made = [
            layer(x) if x.dim() else next(numbers)
            for layer, x in zip(self.layers, tensors, strict=True)
        ]
        return self.contract.call(*self.loss, made)


def is_tower(x):
    return x.dim() > 0 and x.is_floating_point()


def gradients(contract, loss, tensors):
    """The loss of this process; the gradients of encoders and of numbers after the second step."""
    model = nn.parallel.DistributedDataParallel(Model(contract, loss, tensors))
    mine = [x[dist.get_rank() :: 2] if x.dim() else x for x in tensors]
    for _ in range(2):  # a parameter without a gradient stops the second one
        model.zero_grad()
        value = model(mine)
        value.backward()
    parts = [
        torch.cat([p.grad.flatten() for p in part.parameters()] or [torch.ones(1)])
        for part in (model.module.layers, model.module.numbers)
    ]
    return value.detach(), *parts


def compare_over_ranks(places):
    """What ours gives next to what the package gives, for flags of entries of the table."""
    results = []
    for k, j in places:
        contract, flags = TABLE[k], TABLE[k].ranks[j]
        settings = dict(flags.settings)
        if contract.ours.startswith("open_clip"):
            settings |= {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
        losses, tensors = alike(contract, settings), contract.inputs(8)
        for buffer in (x for loss in losses for x in loss.buffers()):
            dist.broadcast(buffer, 0)
        if flags.wrapped is not None:
            from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

            losses = [DistributedLossWrapper(loss, flags.wrapped) for loss in losses]
        losses[0].load_state_dict(losses[1].state_dict())
        results.append([gradients(contract, loss, tensors) for loss in losses])
    return results


def test_processes_share_a_batch_as_theirs_do():
    """Losses are the package's on every process, and the gradients have the listed ratios."""
    for contract in CLASSES:
        contract.classes()  # imported here, once for both processes
    places = [(k, j) for k, contract in enumerate(TABLE) for j in range(len(contract.ranks))]
    page = (Path(__file__).parent.parent / "docs" / "compat.md").read_text()
    for of_rank in forked(2, compare_over_ranks, places):
        for (k, j), (ours, theirs) in zip(places, of_rank, strict=True):
            contract, flags = TABLE[k], TABLE[k].ranks[j]
            torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-12)
            ratio = "another direction" if flags.ratio is None else f"{flags.ratio:g}"
            assert f"| `{contract.name}` | {flags.text} | {ratio} |" in page
            if flags.ratio is None:
                assert (ours[1] - theirs[1]).norm() > 0.1 * ours[1].norm()
                continue
            torch.testing.assert_close(ours[1], flags.ratio * theirs[1], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(ours[2], theirs[2], rtol=1e-9, atol=1e-12)
