"""What users' functions read: any change is seen, and without one nothing is executed."""

import math
import os
import shlex
import shutil
import types

import pytest
import torch
from family import pair, relative_error
from torch.nn import functional

from alphacl_fast import FusedAlphaCLLoss, MinPlayer, PairLoss, PairWeight
from alphacl_fast.backend import cpu, cpu_functions
from alphacl_fast.functional import alpha_cl_loss
from alphacl_fast.objectives import _CustomFunction
from alphacl_fast.reads import look

MARGIN = 0.5

needs_native = pytest.mark.skipif(
    cpu.load_error() is not None
    or shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) is None,
    reason="no compiled CPU backend, or no C++ compiler",
)


@pytest.fixture(scope="module", autouse=True)
def compiling(tmp_path_factory):
    """Users' functions are compiled, where that is possible, and for this module alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_functions, "_libraries", {})
        patch.setenv("ALPHACL_CPU_COMPILE", "1")
        patch.setenv("ALPHACL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def helper(x):
    return torch.tanh(x * MARGIN)


def scaled(x, by=0.5, *, to=1.0):
    return torch.tanh(x * by) * to


# --- changes: each returns a function and what changes its values ---------------------------------


def of_closure(monkeypatch):
    margin = 0.5

    def change():
        nonlocal margin
        margin = 0.7

    return lambda x: torch.tanh(x * margin), change


def of_zeros_sign(monkeypatch):
    """Equal numbers that are not the same."""
    zero = 0.0

    def change():
        nonlocal zero
        zero = -0.0

    return lambda x: torch.copysign(x, zero), change


def of_global(monkeypatch):
    return lambda x: torch.tanh(x * MARGIN), lambda: monkeypatch.setitem(globals(), "MARGIN", 0.7)


def of_a_function_that_it_calls(monkeypatch):
    return lambda x: helper(x) + x, lambda: monkeypatch.setitem(globals(), "MARGIN", 0.7)


def of_a_rebound_function(monkeypatch):
    return lambda x: helper(x) + x, lambda: monkeypatch.setitem(globals(), "helper", torch.sin)


def of_a_list(monkeypatch):
    margins = [0.5]
    return lambda x: torch.tanh(x * margins[0]), lambda: margins.append(margins.pop() + 0.2)


def of_a_tensor(monkeypatch):
    margin = torch.tensor(0.5, dtype=torch.float64)
    return lambda x: torch.tanh(x * margin.to(x.dtype)), lambda: margin.fill_(0.7)


def of_an_object(monkeypatch):
    settings = types.SimpleNamespace(margin=0.5)
    return lambda x: torch.tanh(x * settings.margin), lambda: setattr(settings, "margin", 0.7)


def of_a_module(monkeypatch):
    monkeypatch.setattr(math, "margin", 0.5, raising=False)
    return lambda x: torch.tanh(x * math.margin), lambda: setattr(math, "margin", 0.7)


def of_a_default(monkeypatch):
    return scaled, lambda: monkeypatch.setattr(scaled, "__defaults__", (0.7,))


def of_a_named_default(monkeypatch):
    return scaled, lambda: monkeypatch.setitem(scaled.__kwdefaults__, "to", 0.7)


def of_its_code(monkeypatch):
    return scaled, lambda: monkeypatch.setattr(scaled, "__code__", other.__code__)


def other(x, by=0.5, *, to=1.0):
    return torch.sin(x * by) * to


def of_an_operation(monkeypatch):
    return lambda x: torch.tanh(x), lambda: monkeypatch.setattr(torch, "tanh", torch.sin)


def of_a_method(monkeypatch):
    return lambda x: x.tanh(), lambda: monkeypatch.setattr(torch.Tensor, "tanh", torch.Tensor.sin)


def of_a_tuple(monkeypatch):
    margins = 0.5, ([0.5],)
    inner = margins[1][0]
    return lambda x: torch.tanh(x * margins[1][0][0]), lambda: inner.append(inner.pop() + 0.2)


def of_a_callable_object(monkeypatch):
    class Psi:
        margin = 0.5

        def __call__(self, x):
            return torch.tanh(x * self.margin)

    psi = Psi()
    return psi, lambda: setattr(psi, "margin", 0.7)


def of_its_own_calls(monkeypatch):
    """A function that changes a variable of its closure."""
    margin = 0.5

    def psi(x):
        nonlocal margin
        margin = margin
        return torch.tanh(x * margin)

    def change():
        nonlocal margin
        margin = 0.7

    return psi, change


CHANGES = [f for name, f in list(globals().items()) if name.startswith("of_")]


@pytest.mark.parametrize("make", CHANGES, ids=lambda f: f.__name__)
def test_a_change_is_seen(make, monkeypatch):
    psi, change = make(monkeypatch)
    z1, z2 = pair(9, 5)
    loss = FusedAlphaCLLoss(PairLoss(None, psi))
    before = [loss(z1, z2) for _ in range(3)]  # the later ones are prepared
    change()
    after = loss(z1, z2)
    fresh = FusedAlphaCLLoss(PairLoss(None, lambda x: psi(x)), backend="blocked")(z1, z2)
    assert relative_error(after, fresh) < 1e-10
    assert after != before[-1]
    assert before[0] == before[-1]


@pytest.mark.parametrize("known", [True, False])
def test_a_change_moves_the_bracket_of_a_min_player(known):
    """The numbers between which a min player searches follow from its function."""
    scale, settings = 0.2, types.SimpleNamespace(scale=0.2)
    h = (lambda x: torch.relu(x) / scale) if known else (lambda x: torch.relu(x) / settings.scale)
    z1, z2 = pair(9, 5)
    loss = FusedAlphaCLLoss(MinPlayer(h))
    for scale in (0.2, 0.2, 30.0, 0.01):
        settings.scale = scale
        ours = loss(z1, z2)
        built_in = alpha_cl_loss(z1, z2, "alpha_square", temperature=scale)
        assert relative_error(ours, built_in) < 1e-10


def test_a_change_in_a_forward_is_that_of_its_backward():
    """reduction="none" solves the rows again in the backward."""
    margin = 0.5
    loss = FusedAlphaCLLoss(PairLoss(None, lambda x: torch.tanh(x * margin)), reduction="none")
    gradients = []
    for margin in (0.5, 0.5, 0.7):  # noqa: B007
        z1, z2 = (z.requires_grad_() for z in pair(9, 5))
        loss(z1, z2).sum().backward()
        gradients.append(z1.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[1], gradients[2])


@pytest.fixture
def executions(monkeypatch):
    """The users' functions that were executed."""
    executed, call = [], _CustomFunction.__call__

    def counted(self, x):
        executed.append(self.name)
        return call(self, x)

    monkeypatch.setattr(_CustomFunction, "__call__", counted)
    return executed


def smooth(x):
    return functional.softplus(abs(x) + max(MARGIN, 0.1)) * math.exp(MARGIN) / math.pi


@needs_native
@pytest.mark.parametrize(
    "objective",
    [
        PairLoss(lambda x: MARGIN * torch.log1p(x), lambda x: torch.exp(x / MARGIN)),
        PairLoss(None, lambda x, by=(0.5, 2): torch.where(x > by[0], helper(x), smooth(x))),
        PairWeight(lambda d: torch.exp(-d / MARGIN)),
        MinPlayer(lambda x: torch.relu(x) / MARGIN),
        PairLoss(None, functional.softplus),
        PairLoss(None, torch.exp),
    ],
    ids=["PairLoss", "helpers", "PairWeight", "MinPlayer", "softplus", "exp"],
)
def test_without_a_change_nothing_is_executed(objective, executions):
    assert all(look(function.fn) is not None for function in objective.functions)
    z1, z2 = pair(9, 5)
    loss = FusedAlphaCLLoss(objective, backend="cpu")
    first = loss(z1, z2)
    executions.clear()
    assert loss(z1, z2) == first
    assert alpha_cl_loss(z1, z2, objective, backend="cpu") == first
    assert not executions


@pytest.mark.parametrize(
    "psi",
    [
        torch.nn.Softplus(),
        lambda x: x * torch.rand(()),
        lambda x: x * torch.tensor(1.0),
        lambda x: sum([x]),
        lambda x: sum(y for y in (x, x)),
        lambda x: x * eval("MARGIN"),
    ],
)
def test_functions_of_which_nothing_is_known(psi):
    assert look(psi) is None


def test_a_mode_that_replaces_operations_is_seen():
    class Sines(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return torch.sin(*args) if function is torch.tanh else function(*args, **kwargs or {})

    function = _CustomFunction(lambda x: torch.tanh(x), "psi")
    before = function.values()
    with Sines():
        assert look(function.fn) is None
        assert function.values() != before
    assert function.values() == before


def test_a_function_that_calls_itself():
    def psi(x):
        return x if True else psi(x)

    assert look(psi) is None
