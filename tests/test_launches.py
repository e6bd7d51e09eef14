"""Plans of the GPU backends: a replayed step is the ordinary one, with less Python."""

import copy
import ctypes
import gc
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import types
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import square_tile
from counting import Eager, calls_of, eager, operators_of
from family import pair
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from alphacl_fast import FusedAlphaCLLoss, PairLoss, functional, launches, native, steps
from alphacl_fast.backend import cuda, gpu, triton
from alphacl_fast.functional import alpha_cl_loss

TESTS = Path(__file__).parent
needs_emulator = pytest.mark.skipif(
    not cuda.emulated(), reason="no emulated library (tests/conftest.py says why)"
)
BACKENDS = [pytest.param("cuda", marks=needs_emulator), "triton"]


@pytest.fixture(autouse=True)
def small_interpreted_tiles(monkeypatch):
    """Two row blocks, so that the interpreter has partial sums, and takes little time."""
    monkeypatch.setattr(triton, "tile", lambda sweep, mode, dim, n, device: square_tile(8, dim))


def plans(loss):
    """The plans that a module has."""
    return [x for x in (loss._call.ready or {}).values() if isinstance(x, launches.Plan)]


def step(loss, z1, z2, *more):
    """The loss, and the gradient of every view that wants one."""
    value = loss(z1, z2, *more)
    wants = [z for z in (z1, z2, loss.temperature) if getattr(z, "requires_grad", False)]
    grads = torch.autograd.grad(value, wants) if wants and torch.is_grad_enabled() else ()
    return value.detach(), *grads


def replayed(monkeypatch):
    """The plans that are run from now on."""
    ran, apply = [], steps._apply

    def note(plan, *inputs):
        ran.append(plan)
        return apply(plan, *inputs)

    monkeypatch.setattr(steps, "_apply", note)
    return ran


def assert_equal_to_ordinary(loss, make, monkeypatch, calls=2):
    """The third call and later ones give the bits of ordinary ones, from a plan."""
    for _ in range(2):
        step(loss, *make())
    ran = replayed(monkeypatch)
    for _ in range(calls):
        given = [*make()]
        ours = step(loss, *given)
        with monkeypatch.context() as patch:
            patch.setattr(steps, "again", lambda *_: (None, None))
            ordinary = step(loss, *given)
        assert all(map(torch.equal, ours, ordinary))
        assert [x.dtype for x in ours] == [x.dtype for x in ordinary]
    assert len(ran) == calls


# --- how much Python and PyTorch ------------------------------------------------------------------


@needs_emulator
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_cuda_calls_no_more_than_the_eager_loss(precision):
    """It is the cheapest eager loss, called as a function and as a module."""
    z1, z2 = (z.requires_grad_() for z in pair(12, 8, precision))
    for ours, theirs in (
        (partial(alpha_cl_loss, backend="cuda"), eager),
        (partial(alpha_cl_loss, objective="alpha_direct", alpha_eps=0.1, backend="cuda"), eager),
        (FusedAlphaCLLoss(backend="cuda"), Eager()),
    ):
        for _ in range(3):
            ours(z1, z2).backward()
            theirs(z1, z2).backward()
        calls, of_eager = (calls_of(lambda f=f: f(z1, z2).backward()) for f in (ours, theirs))
        assert len(calls) <= len(of_eager), calls
        assert "replay" in calls
        found, of_eager = (operators_of(lambda f=f: f(z1, z2).backward()) for f in (ours, theirs))
        assert len(found) <= len(of_eager), found


#: One process starts the process without a GPU.
one_worker = pytest.mark.xdist_group("launched")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What Triton's own launchers receive, from a process without a GPU (launched.py)."""
    compiler = shutil.which("gcc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("Triton's launchers need gcc, on Linux")
    import triton as package

    folder = tmp_path_factory.mktemp("libcuda")
    include = Path(package.__file__).parent / "backends" / "nvidia" / "include"
    stub = folder / "libcuda.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", f"-I{include}", "-o", stub, TESTS / "stub_libcuda.c"],
        check=True,
    )
    paths = {"TRITON_LIBCUDA_PATH": folder, "LD_LIBRARY_PATH": folder, "TRITON_CACHE_DIR": folder}
    environment = os.environ | {name: str(path) for name, path in paths.items()}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *sys.path])
    process = subprocess.run(
        [sys.executable, TESTS / "launched.py", stub],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(process.stdout)


@one_worker
@pytest.mark.parametrize(
    "case", ["probe 1 0", "probe 32 0", "probe 32 1", "module 0", "module 1", "function"]
)
def test_a_handle_launches_what_triton_would(case, launched):
    """The same kernels on the same grids and stream, with the same numbers and alignments.

    An integer 1 and an address that is no multiple of 16 bytes have kernels of their own.
    """
    found = launched[case]
    assert len(found["ordinary"]) == (1 if "probe" in case else 7)
    for ours, theirs in zip(found["replayed"], found["ordinary"], strict=True):
        for field in ("name", "handle", "head", "numbers"):
            assert ours[field] == theirs[field], (field, ours, theirs)
        assert [x % 16 for x in ours["pointers"]] == [x % 16 for x in theirs["pointers"]]
    first = found["replayed"][0]["pointers"]
    if "probe" in case:
        assert (found["kinds"], first[0]) == (["Kernel"], found["x"])
    else:
        assert first[:2] == found["views"]
        assert "replay" in found["calls"]


@one_worker
def test_kernels_are_specialised_on_what_the_key_holds(launched):
    handles = [launched[case]["replayed"][0]["handle"] for case in ("probe 1 0", "probe 32 0")]
    handles += [launched[f"module {k}"]["replayed"][0]["handle"] for k in (0, 1)]
    assert len({*handles}) == 4


@one_worker
def test_a_step_of_triton_calls_no_more_than_the_eager_loss(launched):
    z1, z2 = (z.requires_grad_() for z in pair(40, 16, torch.float32))
    for case, theirs in (("module 0", Eager()), ("function", eager)):
        for _ in range(2):
            theirs(z1, z2).backward()
        calls = calls_of(lambda f=theirs: f(z1, z2).backward())
        assert len(launched[case]["calls"]) <= len(calls), launched[case]["calls"]
        operators = operators_of(lambda f=theirs: f(z1, z2).backward())
        assert len(launched[case]["operators"]) <= len(operators), launched[case]["operators"]


@one_worker
def test_without_a_handle_a_plan_launches_in_the_ordinary_way(launched):
    found = launched["probe without a handle"]
    assert (found["kinds"], len(found["ordinary"])) == (["Operator"], 1)
    for ours, theirs in zip(found["replayed"], found["ordinary"], strict=True):
        assert all(ours[field] == theirs[field] for field in ("handle", "head", "numbers"))


class _Launcher:
    """Of a version of Triton: what reaches its inner function."""

    def __init__(self, reached):
        self.reached = reached

    def launch(self, *given):
        raise AssertionError("a copy is to be called")

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *rest):
        self.launch(*self.reached(stream, function, rest))


@pytest.mark.parametrize(
    ("reached", "known"),
    [
        (lambda stream, function, rest: (1, stream, function, *rest), True),
        (lambda stream, function, rest: (stream, stream, function, *rest), False),
        (lambda stream, function, rest: (1, 0, function, *rest), False),
        (lambda stream, function, rest: (1, stream, torch.empty(1), *rest), False),  # its memory
        (lambda stream, function, rest: (1, stream, function, *rest[::-1]), False),
        (lambda stream, function, rest: (1, stream, function, rest), False),
        (lambda stream, function, rest: None, False),
        (None, False),
    ],
)
def test_another_launcher_is_understood_or_left_alone(reached, known):
    from alphacl_fast.kernels import start

    def fn(a, b, c=3):
        pass

    kernel = types.SimpleNamespace(
        arg_names=["a", "b", "c"], signature=inspect.signature(fn), pre_run_hooks=[]
    )
    run = _Launcher(reached) if reached else object()
    compiled = types.SimpleNamespace(run=run, function=5, packed_metadata=())
    x = torch.zeros(2)
    found = start.through_handle(kernel, compiled, (2,), (x, 7), {"num_warps": 4})
    assert (found is not None) == known
    if known:
        call, values, stream, _ = found
        assert (call, stream, values[2:]) == (run.launch, 1, [5, x, 7, 3])
        kernel.pre_run_hooks.append(print)
        assert start.through_handle(kernel, compiled, (2,), (x, 7), {}) is None


@one_worker
def test_hooks_of_triton_see_every_launch(launched):
    """A profiler of Triton's launches gets the ordinary ones."""
    assert launched["hooked"] == [x["name"] for x in launched["module 0"]["ordinary"]]


# --- a replayed step is the ordinary one ----------------------------------------------------------

SETTINGS = [
    {},
    {"objective": "alpha_direct", "detach_alpha": False},
    {"objective": "triplet", "reduction": "sum"},
    {"negatives": "cross_view", "max_gap": 0.1},
    {"negatives": "one_view", "similarity": "euclidean"},
    {"negatives": "cross_view", "symmetric": False, "similarity": "dot"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bits(backend, settings, monkeypatch, poisoned):
    """Of other views than those of the recorded step."""
    loss = FusedAlphaCLLoss(**settings, backend=backend)
    make = partial(map, torch.Tensor.requires_grad_)
    assert_equal_to_ordinary(loss, lambda: make(pair(7, 6, torch.float32)), monkeypatch, calls=1)
    assert plans(loss)


@needs_emulator
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [6, 300])
def test_bits_of_dtypes(dtype, dim, monkeypatch):
    """Of rows in registers, and of long ones, whose weights a vendor product multiplies."""
    monkeypatch.setattr(gpu, "WORKSPACE", 1 << 14)  # runs of row blocks
    loss = FusedAlphaCLLoss(backend="cuda")
    make = partial(map, torch.Tensor.requires_grad_)
    assert_equal_to_ordinary(loss, lambda: make(pair(70, dim, dtype)), monkeypatch, calls=1)


@needs_emulator
def test_products_keep_their_precision(monkeypatch):
    """A plan sets it around the product, as the ordinary step does."""
    loss = FusedAlphaCLLoss(backend="cuda", precision="tf32")
    views = pair(70, 140, torch.float32)
    z1, z2 = (z.requires_grad_() for z in views)
    seen, product = [], torch.Tensor.__matmul__

    def note(a, b):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", note)
    ran = replayed(monkeypatch)
    before = torch.backends.cuda.matmul.fp32_precision
    for _ in range(3):
        seen.clear()
        step(loss, z1, z2)
        assert set(seen) == {"tf32"}
    assert len(ran) == 2
    assert torch.backends.cuda.matmul.fp32_precision == before


def _transposed():
    return [torch.randn(6, 9).t()[:8].requires_grad_() for _ in "12"]


def _halves():
    return torch.randn(16, 6).requires_grad_().chunk(2)


def _interleaved():
    return torch.randn(8, 2, 6).requires_grad_().unbind(1)


def _misaligned():
    return [torch.randn(49)[1:].view(8, 6).requires_grad_() for _ in "12"]


def _apart():
    return [torch.randn(8, 20)[:, 3:9].requires_grad_() for _ in "12"]


@needs_emulator
@pytest.mark.parametrize(
    ("make", "count"),
    [(_transposed, 2), (_misaligned, 2), (_apart, 2), (_halves, 1), (_interleaved, 2)],
)
def test_strides_and_alignments_have_plans_of_their_own(make, count, monkeypatch):
    """Halves of a tensor lie as other views do."""
    loss = FusedAlphaCLLoss(backend="cuda")
    for _ in range(3):
        step(loss, *(z.requires_grad_() for z in pair(8, 6, torch.float32)))
    assert len(plans(loss)) == 1
    assert_equal_to_ordinary(loss, make, monkeypatch)
    assert len(plans(loss)) == count


@needs_emulator
def test_views_that_end_with_their_memory(monkeypatch):
    """A plan that is recorded with views inside of a larger tensor serves others."""
    loss = FusedAlphaCLLoss(backend="cuda")
    large = torch.randn(30, 6)
    for _ in range(2):
        step(loss, large[:8].requires_grad_(), large[8:16].requires_grad_())
    ran = replayed(monkeypatch)
    step(loss, *(torch.randn(8, 6).requires_grad_() for _ in "12"))
    assert len(ran) == 1


def test_operators_whose_results_nobody_uses_are_left_out():
    plan = launches.record(lambda x: (x.sin(), x.cos().add_(x))[:1], (torch.ones(4),), {})
    names = [instruction.call.__name__ for instruction, _ in plan.instructions]
    assert len(names) == 3  # an operator in place is a use
    plan = launches.record(
        lambda x: ((y := x.sin()) * 2, y.cos(), x + 1)[::2], (torch.ones(4),), {}
    )
    freed = [register for _, registers in plan.instructions for register in registers]
    assert (len(plan.instructions), len({*freed})) == (3, 2)


def test_operators_see_views_where_they_begin():
    """Inputs, and parts of them, may lie anywhere in their storage."""
    memory = torch.randn(100)
    plan = launches.record(lambda x: (x[1:] * 2, x.sum()), (memory[:10],), {})
    x = memory[33:43]
    part, total = launches.replay(types.SimpleNamespace(), plan, x)
    assert torch.equal(part, x[1:] * 2)
    assert torch.equal(total, x.sum())


@needs_emulator
def test_wanted_gradients_change_between_calls(monkeypatch):
    loss = FusedAlphaCLLoss(backend="cuda")
    wanted = [(True, True), (True, False), (False, True), (False, False)] * 4
    ran = replayed(monkeypatch)
    for number, wants in enumerate(wanted):
        z1, z2 = (z.requires_grad_(w) for z, w in zip(pair(8, 6), wants, strict=True))
        ours = step(loss, z1, z2)
        with torch.no_grad():
            without = step(loss, z1, z2)
        theirs = step(FusedAlphaCLLoss(backend="cuda"), z1, z2)
        assert torch.equal(without[0], ours[0])
        assert all(map(torch.equal, ours, theirs))
        assert len(ours) == 1 + sum(wants), number
    assert len(ran) >= 20


@needs_emulator
def test_temperatures(monkeypatch):
    tau = torch.nn.Parameter(torch.tensor(0.4))
    loss = FusedAlphaCLLoss("alpha_direct", backend="cuda", temperature=0.3)
    learnt = FusedAlphaCLLoss(backend="cuda", temperature=tau)
    make = partial(map, torch.Tensor.requires_grad_)
    assert_equal_to_ordinary(loss, lambda: make(pair(8, 6)), monkeypatch)
    assert_equal_to_ordinary(learnt, lambda: make(pair(8, 6)), monkeypatch)
    before = step(learnt, *pair(8, 6))
    with torch.no_grad():
        tau.mul_(2)  # a value that the host reads is a part of the key
    z1, z2 = pair(8, 6)
    for _ in range(3):
        ours = step(learnt, z1, z2)
        theirs = step(FusedAlphaCLLoss(backend="cuda", temperature=tau), z1, z2)
        assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(before[0], ours[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_are_an_input(backend, monkeypatch):
    loss = FusedAlphaCLLoss(backend=backend)
    make = lambda: (*(z.requires_grad_() for z in pair(7, 6)), torch.randint(3, (7,)))  # noqa: E731
    assert_equal_to_ordinary(loss, make, monkeypatch, calls=1)


@needs_emulator
def test_ids_are_recorded_where_the_caller_has_them(monkeypatch):
    """They may lie on another device than the views; later calls bring them from there too."""
    inputs, record = [], launches.record

    def note(step, given, *more):
        inputs.extend(given)
        return record(step, given, *more)

    monkeypatch.setattr(launches, "record", note)
    monkeypatch.setattr(functional, "checked_ids", lambda name, ids, rows: ids.clone())
    loss, ids = FusedAlphaCLLoss(backend="cuda"), torch.randint(3, (7,))
    for _ in range(2):
        step(loss, *pair(7, 6), ids)
    assert inputs[3] is ids


@needs_emulator
def test_a_temperature_that_only_the_device_knows(monkeypatch):
    """Its value is no part of the key: one plan serves all."""
    monkeypatch.setattr(functional, "known", lambda given: None)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    tau = torch.nn.Parameter(torch.tensor(0.4))
    loss = FusedAlphaCLLoss(backend="cuda", temperature=tau)

    def make():
        with torch.no_grad():
            tau.mul_(0.9)
        return (z.requires_grad_() for z in pair(8, 6, torch.float32))

    assert_equal_to_ordinary(loss, make, monkeypatch, calls=3)
    assert len(plans(loss)) == 1


@needs_emulator
def test_autocast_does_not_reach_the_step(monkeypatch):
    loss = FusedAlphaCLLoss(backend="cuda")
    z1, z2 = (z.requires_grad_() for z in pair(70, 80, torch.float32))  # long rows: a product
    ordinary = step(loss, z1, z2)
    ran = replayed(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            assert all(map(torch.equal, step(loss, z1, z2), ordinary))
        assert torch.is_autocast_enabled("cpu")
    assert ran


@needs_emulator
def test_a_scaled_gradient_and_a_second_derivative():
    loss = FusedAlphaCLLoss(backend="cuda")
    z1, z2 = (z.requires_grad_() for z in pair(8, 6))
    grads = [torch.autograd.grad(loss(z1, z2) * 3, (z1, z2), retain_graph=True) for _ in "1234"]
    assert all(torch.equal(a, b) for later in grads for a, b in zip(later, grads[0], strict=True))
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(loss(z1, z2) * scale, z1, create_graph=True)
    (of_scale,) = torch.autograd.grad(g.sum(), scale, retain_graph=True)
    assert torch.allclose(of_scale, g.sum() / 2)
    with pytest.raises(RuntimeError, match="a second derivative of the loss"):
        torch.autograd.grad(g.square().sum(), z1)
    each = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    (many,) = torch.autograd.grad(loss(z1, z2), z1, each, is_grads_batched=True)
    assert torch.allclose(many, each.view(3, 1, 1) * grads[0][0] / 3)


# --- what a plan is made for, and what not --------------------------------------------------------


@needs_emulator
def test_what_cannot_be_replayed_says_why():
    loss = FusedAlphaCLLoss("alpha_square", backend="cuda")
    for _ in range(3):
        step(loss, *pair(8, 6))
    assert [*loss._call.ready.values()] == [
        "the host reads the result of aten::_local_scalar_dense"
    ]
    same = pair(8, 6)[0].requires_grad_()
    loss = FusedAlphaCLLoss(backend="cuda")
    for _ in range(3):
        loss(same, same).backward()
    assert [*loss._call.ready.values()] == ["two inputs share memory"]


@needs_emulator
def test_users_functions_and_single_losses_have_no_plan():
    z1, z2 = pair(8, 6)
    scale = 1.0
    for loss in (
        FusedAlphaCLLoss(reduction="none", backend="cuda"),
        FusedAlphaCLLoss(backend="blocked"),
        FusedAlphaCLLoss(PairLoss(None, lambda gap: torch.exp(scale * gap)), backend="triton"),
    ):
        for _ in range(3):
            loss(z1, z2)
        assert not plans(loss)


@needs_emulator
@pytest.mark.parametrize("backend", ["cuda", "auto"])
def test_watched_and_transformed_tensors_have_no_key(backend):
    """Neither a GPU's plans nor those of the CPU kernels, which serve "auto"."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    z1, z2 = pair(8, 6)
    call = FusedAlphaCLLoss(backend=backend)._call
    key = lambda *given: steps.again(*given, call)[1]  # noqa: E731
    assert key(z1, z2, 0.5)
    with Watch():
        assert key(z1, z2, 0.5) is None
    seen = []
    torch.func.vmap(lambda z: (seen.append(key(z, z2, 0.5)), z)[1])(z1[None])
    assert seen == [None]
    assert key(z1.to("meta"), z2.to("meta"), 0.5) is None
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(z1)
    assert key(fake, fake, 0.5) is None
    assert key(z1, z2.float(), 0.5) is None
    assert key(torch._neg_view(z1), z2, 0.5) is None
    assert key(z1, z2, True) is None
    assert key(z1, z2, torch.ones(2)) is None
    assert key(z1, z2, torch._neg_view(torch.tensor(-0.5))) is None
    assert key(z1.to_sparse(), z2, 0.5) != key(z1, z2, 0.5)
    torch.func.grad(lambda z: (seen.append(z), z.sum())[1])(z1)
    assert key(seen[-1], z2, 0.5) is None  # the transform has ended
    torch.func.vmap(lambda i: (seen.append(i), i)[1])(torch.zeros(1, 8, dtype=torch.int64))
    assert steps.again(z1, z2, 0.5, call, seen[-1])[1] is None


def test_no_key_without_plans(monkeypatch):
    z1, z2 = pair(8, 6)
    call = FusedAlphaCLLoss(backend="cuda")._call
    key = lambda *given: steps.again(*given, call)[1]  # noqa: E731
    assert key(z1, z2, 0.5) != key(z1, z2, 0.6)
    monkeypatch.setenv("ALPHACL_PLANS", "0")
    monkeypatch.setattr(steps, "enabled", steps._asked_for())
    assert key(z1, z2, 0.5) is None
    monkeypatch.setenv("ALPHACL_PLANS", "no")
    with pytest.raises(ValueError, match="ALPHACL_PLANS must be 0 or 1, got 'no'"):
        steps._asked_for()


def test_keys_tell_calls_apart():
    call = FusedAlphaCLLoss(backend="triton")._call
    z = torch.randn(6, 6)
    misaligned = torch.randn(37)[1:].view(6, 6)
    wanted, tau = z.clone().requires_grad_(), torch.tensor(0.5)
    given = [
        (z, z, 0.5), (z, z.t(), 0.5), (z.t(), z, 0.5), (z, misaligned, 0.5), (misaligned, z, 0.5),
        (z[:5], z[:5], 0.5), (z.double(), z.double(), 0.5), (wanted, z, 0.5), (z, wanted, 0.5),
        (z, z, 0.6), (z, z, tau), (z, z, tau.double()), (z, z, tau.clone().requires_grad_()),
    ]  # fmt: skip
    keys = [steps.again(*arguments, call)[1] for arguments in given]
    keys += [
        steps.again(z, z, 0.5, call, torch.arange(6, dtype=d))[1]
        for d in (torch.int64, torch.int32)
    ]
    with torch.no_grad():
        keys.append(steps.again(wanted, z, 0.5, call)[1])
    assert None not in keys
    assert len({*keys}) == len(keys)
    assert steps.again(z.clone(), z.clone(), 0.5, call)[1] == keys[0]


@needs_emulator
def test_bad_input_is_refused_whatever_has_a_plan():
    z1, z2 = pair(8, 6)
    for _ in range(4):
        alpha_cl_loss(z1, z2, backend="cuda")
    with pytest.raises(TypeError, match="symmetric must be True or False, got 1"):
        alpha_cl_loss(z1, z2, backend="cuda", symmetric=1)
    with pytest.raises(TypeError, match="temperature must be a float or a tensor, got bool"):
        alpha_cl_loss(z1, z2, backend="cuda", temperature=True)
    with pytest.raises(ValueError, match="z2 must have the shape of z1"):
        alpha_cl_loss(z1, z2[:, :5], backend="cuda")
    with pytest.raises(ValueError, match="similarity must be one of"):
        alpha_cl_loss(z1, z2, backend="cuda", similarity=["cosine"])
    gap = partial(alpha_cl_loss, z1, z2, backend="triton")
    assert gap(max_gap=1).isfinite()
    with pytest.raises(TypeError, match="max_gap must be None or a number, got True"):
        gap(max_gap=True)


@needs_emulator
def test_other_kernels_make_other_plans(monkeypatch):
    loss = FusedAlphaCLLoss(backend="cuda")
    views = pair(8, 6)
    ran = replayed(monkeypatch)
    for _ in range(3):
        loss(*views)
    assert len(ran) == 2
    for context in (cuda.symmetric(False), cuda.hopper(False)):
        with context:
            loss(*views)
        loss(*views)
    assert len(ran) == 2
    z1, z2 = pair(8, 6, torch.float32)
    for _ in range(3):
        loss(z1, z2)
    before, torch.backends.mkldnn.matmul.fp32_precision = "none", "bf16"
    try:
        loss(z1, z2)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert len(ran) == 4


# --- what it keeps --------------------------------------------------------------------------------


def _tensors_in(x):
    if isinstance(x, torch.Tensor):
        yield x
    for inner in x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else ():
        yield from _tensors_in(inner)


@needs_emulator
def test_no_tensor_stays_alive():
    loss = FusedAlphaCLLoss(backend="cuda")
    for _ in range(4):
        z1, z2 = (z.requires_grad_() for z in pair(8, 6))
        value = loss(z1, z2)
        value.backward()
    held = [weakref.ref(x) for x in (z1, z2, value)]
    del z1, z2, value
    gc.collect()
    assert not any(x() is not None for x in held)
    (plan,) = plans(loss)
    assert not [*_tensors_in(plan)]


@needs_emulator
def test_plans_are_few(monkeypatch):
    monkeypatch.setattr("alphacl_fast.call.MOST_READY", 3)
    loss = FusedAlphaCLLoss(backend="cuda")
    for number in range(8):
        for _ in range(2):
            loss(*pair(2 + number, 1, torch.float32))
        assert len(plans(loss)) >= 1
        assert len(loss._call.ready) <= 3
    loss = FusedAlphaCLLoss(backend="cuda")
    for _ in range(3):
        loss(*pair(4, 2))
    assert not copy.deepcopy(loss)._call.ready
    assert not pickle.loads(pickle.dumps(loss))._call.ready


@needs_emulator
def test_threads_share_a_plan():
    loss = FusedAlphaCLLoss(backend="cuda")
    batches = [[z.requires_grad_() for z in pair(20, 6)] for _ in range(4)]
    expected = [step(loss, *views) for views in batches]
    wrong = []

    def work(number):
        for _ in range(5):
            found = step(loss, *batches[number])
            wrong.extend(x for x, y in zip(found, expected[number], strict=True) if (x != y).any())

    workers = [threading.Thread(target=work, args=(k,)) for k in range(len(batches))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def _buffer(size, made, last):
    return types.SimpleNamespace(bytes=size, made=made, last=last, offset=None)


def test_buffers_share_bytes_only_apart_in_time():
    generator = torch.Generator().manual_seed(0)
    draw = lambda high: int(torch.randint(high, (), generator=generator))  # noqa: E731
    for _ in range(50):
        buffers = [_buffer(draw(2000), made := draw(10), made + draw(5)) for _ in range(12)]
        total = launches.layout(buffers)
        for k, x in enumerate(buffers):
            assert x.offset % launches.ALIGNMENT == 0
            assert x.offset + x.bytes <= total
            for y in buffers[:k]:
                apart = x.last < y.made or y.last < x.made
                disjoint = x.offset + x.bytes <= y.offset or y.offset + y.bytes <= x.offset
                assert apart or disjoint or not (x.bytes and y.bytes), (x, y)
    one_after_another = [_buffer(1000, k, k) for k in range(5)]
    assert launches.layout(one_after_another) == 1024


def test_unknown_tensors_and_numbers_are_not_recorded():
    x, foreign = torch.randn(4), torch.randn(4)
    for step, why in (
        (lambda x: (x + foreign,), "comes from outside of the step"),
        (lambda x: (x * float(x.sum()),), "the host reads the result of aten::_local_scalar_dense"),
        (lambda x: (x[x > 0],), "the shape of the result of aten::index is not known"),
        (lambda x: (torch.add(x, x, out=torch.empty(4)),), "has a tensor as an option"),
        (
            lambda x: (torch.ops.aten.rrelu_with_noise(x, torch.empty(4), 0.1, 0.3, True),),
            "returns something new and changes or returns an operand",
        ),
    ):
        with pytest.raises(launches.NotRecorded, match=why):
            launches.record(step, (x,), {})
    z = torch.randn(9, 4)
    common = [(x, x[1:]), (z[:8], z[1:]), (z[:, :3], z[:, 2:]), (z[:, :2], z[:, 1:3]), (z, z)]
    for both in common:
        with pytest.raises(launches.NotRecorded, match="two inputs share memory"):
            launches.record(lambda x, y: (x.sum() + y.sum(),), both, {})
    launches.record(lambda x, y: (x + y,), (z[:, :2], z[:, 2:]), {})
    with pytest.raises(launches.NotRecorded, match="comes from outside of the step"):
        launches.record(lambda x, y: (x[1:] + y[1:],), (z[:, :2], z[:, 2:]), {})


def test_tensors_in_inner_tuples_are_not_recorded():
    """Their addresses would be those of the recorded step."""
    watch, x = launches.Recorder((), {}), torch.ones(2)
    for values in (((x,),),), ((x, (x,)),), ([x, [x]],):
        with pytest.raises(launches.NotRecorded, match="tensors in tuples of tuples"):
            watch.launch(print, values, {})


def test_operators_without_a_result_are_recorded():
    def step(x):
        out = torch.zeros(4)
        torch._foreach_add_([out], 3)  # its operand does not depend on the input
        return (out + x,)

    x = torch.randn(4)
    plan = launches.record(step, (x,), {})
    (ours,) = launches.replay(types.SimpleNamespace(), plan, x)
    assert torch.equal(ours, x + 3)


def test_a_result_that_is_freed_may_be_followed_by_another_at_its_address():
    """Storages are told apart though the allocator gives an address twice."""

    def step(x):
        total = x.sum()
        for k in range(6):
            total = (x * k).sum() + total.clone()
        return (total,)

    plan = launches.record(step, (torch.randn(500),), {})
    x = torch.randn(500)
    (ours,) = launches.replay(types.SimpleNamespace(), plan, x)
    assert torch.equal(ours, step(x)[0])


# --- devices, streams and captures, without a GPU -------------------------------------------------


def _plan(device, instructions, about=None):
    return launches.Plan(
        device, 9, 0, (), (), tuple((x, ()) for x in instructions), (), None, about
    )


def test_kernels_start_on_the_current_stream(monkeypatch):
    """Of the plan's device, which may be another one at each call."""
    received, current = [], {1: 77}
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", current.get, raising=False)

    class Struct(ctypes.Structure):
        _fields_ = (("x", ctypes.c_void_p), ("n", ctypes.c_int64))

    def native(before, struct, stream):
        received.append((before, struct.x, struct.n, stream))

    x = torch.zeros(8)
    kernel = launches.Kernel(
        lambda *given: received.append(given), [3, None, None, 0.5, None, 7],
        ((1, 0, 8), (5, 0, 4)), ((4, 5, 6, tuple),), 5, 2, None,
    )  # fmt: skip
    content = bytes(Struct(None, 9))
    plan = _plan(
        torch.device("cuda", 1),
        [kernel, launches.Native(native, (1,), Struct, content, ((0, 0, 4),))],
    )
    for stream in (77, 78):
        current[1] = stream
        launches.replay(types.SimpleNamespace(), plan, x)
        at = x.data_ptr()
        assert received[-2:] == [(3, at + 8, stream, 0.5, (at + 4,)), (1, at + 4, 9, stream)]
    assert bytes(Struct(None, 9)) == content


def test_errors_of_the_library_name_the_function():
    def alphacl_cuda_sweep(struct, stream):
        return b"f must have 9 elements or more, got 8"

    plan = _plan(
        torch.device("cpu"),
        [launches.Native(alphacl_cuda_sweep, (), ctypes.c_int64 * 1, b"\0" * 8, ())],
    )
    with pytest.raises(RuntimeError, match="alphacl_fast: alphacl_cuda_sweep: f must have 9"):
        launches.replay(types.SimpleNamespace(), plan)


class _OnAnotherDevice:
    """As much of a tensor on the device cuda:1 as a key reads."""

    device, dtype, shape = torch.device("cuda", 1), torch.float32, torch.Size((4, 2))
    layout, requires_grad, is_cpu = torch.strided, False, False

    def __init__(self, address):
        self.address = address

    def data_ptr(self):
        return self.address

    def is_neg(self):
        return False

    def stride(self):
        return (2, 1)


@pytest.mark.parametrize("fails", [False, True])
def test_the_device_of_the_views_is_current_during_a_step(fails, monkeypatch):
    """And the other one again afterwards, as autocast is, also after an error."""
    current, seen = [0], []

    def exchange(device):
        before, current[0] = current[0], device
        return before

    def apply(plan, *inputs):
        seen.append((current[0], torch.is_autocast_enabled("cuda")))
        if fails:
            raise RuntimeError("out of memory")
        return (torch.ones(()),)

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    monkeypatch.setattr(torch._C, "_cuda_exchangeDevice", exchange, raising=False)
    monkeypatch.setattr(torch._C._functorch, "is_functorch_wrapped_tensor", lambda z: False)
    monkeypatch.setattr(native, "PLAIN", {_OnAnotherDevice})
    monkeypatch.setattr(steps, "_apply", apply)
    call = FusedAlphaCLLoss()._call
    z1, z2, moved = map(_OnAnotherDevice, (512, 1024, 1028))
    _, key = steps.again(z1, z2, 0.5, call)
    about = steps.About(None, 2, (torch.float32, None), ("triton", "first"))
    call.remember(key, _plan(z1.device, [], about))
    assert steps.again(z1, moved, 0.5, call)[0] is None
    torch.set_autocast_enabled("cuda", True)
    try:
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                steps.again(z1, z2, 0.5, call)
        else:
            assert steps.again(z1, z2, 0.5, call)[0] == (1, "triton", "first")
        assert torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert (seen, current) == ([(1, False)], [0])


@needs_emulator
def test_nothing_is_recorded_while_a_graph_is_captured(monkeypatch):
    """Else the graph would hold the step twice."""
    loss = FusedAlphaCLLoss(backend="cuda")
    views = pair(8, 6)
    with monkeypatch.context() as patch:
        patch.setattr(steps, "capturing", lambda z: True)
        for _ in range(3):
            loss(*views)
        assert not plans(loss)
    loss(*views)
    assert plans(loss)
