"""Users' own functions in the CPU kernels: as the built-in losses, compiled once, and why not."""

import contextlib
import io
import os
import shlex
import shutil
import stat
import threading

import pytest
import torch
from family import pair, relative_error, two_sweeps

from alphacl_fast import FusedAlphaCLLoss, MinPlayer, PairLoss, PairWeight, cli, ops
from alphacl_fast.backend import cpu, cpu_functions
from alphacl_fast.functional import NEGATIVES, SIMILARITIES, alpha_cl_loss
from alphacl_fast.graph import UnsupportedFunction

if cpu.load_error():
    pytest.skip(f"no compiled CPU backend: {cpu.load_error()}", allow_module_level=True)
if shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

TAU, HERE = 0.3, (torch.device("cpu"), torch.float32, None)
#: A user's function, and the built-in objective that it equals.
PAIRS = {
    "infonce": (PairLoss(lambda x: torch.log1p(x), lambda x: torch.exp(x / TAU)), {}),
    "triplet": (PairLoss(None, lambda x: torch.relu(x + 0.4)), {"margin": 0.4}),
    "modified_triplet": (PairLoss(None, lambda x: torch.sigmoid(0.7 * x)), {"scale": 0.7}),
    "alpha_direct": (PairWeight(lambda d: torch.exp(d.clamp(min=0).square() / -TAU)), {}),
    "alpha_entropy": (
        PairWeight(lambda d: torch.exp(d / -TAU), detach_alpha=False), {"detach_alpha": False},
    ),
    "alpha_square": (MinPlayer(lambda x: torch.relu(x) / TAU), {}),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A folder of libraries that the tests of this module share."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALPHACL_CPU_COMPILE", "1")
        patch.setenv("ALPHACL_CACHE", str(folder))
        yield folder / "functions"


@pytest.fixture
def compilations(monkeypatch):
    """The commands that compiled something."""
    commands, run = [], cpu_functions.run

    def counted(command):
        if "-shared" in command:
            commands.append(command)
        return run(command)

    monkeypatch.setattr(cpu_functions, "run", counted)
    return commands


def as_new(monkeypatch):
    """This process knows no library yet."""
    monkeypatch.setattr(cpu_functions, "_libraries", {})


def evaluate(z1, z2, objective, backend="cpu", **options):
    """The loss and its gradients in both views."""
    views = [z.detach().requires_grad_() for z in (z1, z2)]
    loss = alpha_cl_loss(*views, objective, backend=backend, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), views)


def assert_close(ours, truth, bound):
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a, b, floor=1e-6) < bound


# --- as the built-in ones -------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_built_in_loss_and_the_reference(name, small_tiles, poisoned):
    own, options = PAIRS[name]
    z1, z2 = pair(23, 7)
    for negatives in NEGATIVES:
        for similarity in SIMILARITIES:
            setting = {"negatives": negatives, "similarity": similarity, "temperature": TAU}
            ours = evaluate(z1, z2, own, **setting)
            assert_close(ours, evaluate(z1, z2, name, **setting, **options), 1e-12)
            assert_close(ours, evaluate(z1, z2, own, "reference", **setting), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_built_in_loss_in_other_dtypes(name, dtype):
    own, options = PAIRS[name]
    z1, z2 = pair(120, 16, dtype)
    truth = evaluate(z1, z2, name, temperature=TAU, **options)
    assert_close(evaluate(z1, z2, own), truth, 1e-5 if dtype == torch.float32 else 1e-2)
    if name == "triplet":  # its code is the same, and no product can be fused into a sum
        assert all(map(torch.equal, evaluate(z1, z2, own), truth))


@pytest.mark.parametrize("name", PAIRS)
def test_all_are_native_steps(name, steps):
    evaluate(*pair(20, 4), PAIRS[name][0], "auto")
    assert steps


def test_a_min_player_of_ones_own_class_is_none(steps):
    """What it does with vectors may be no row step."""

    class Halfway(MinPlayer):
        def start_of_newton(self, p, t_max, low, high):
            return (low + high) / 2

    own, (z1, z2) = Halfway(lambda x: torch.relu(x) / TAU), pair(20, 4)
    assert_close(evaluate(z1, z2, own), evaluate(z1, z2, PAIRS["alpha_square"][0]), 1e-10)
    assert len(steps) == 1


@pytest.mark.parametrize("name", ["infonce", "triplet", "alpha_entropy", "alpha_square"])
def test_pairs_that_do_not_count(name):
    """Equal ids, negatives beyond a gap or by a guide: each anchor of a pair decides for itself."""
    own, _ = PAIRS[name]
    z1, z2 = pair(40, 6)
    ids, guide = torch.arange(40) // 3, pair(40, 3, seed=1)
    for options in (
        {"ids": ids}, {"max_gap": -0.2}, {"ids": ids, "max_gap": -0.5}, {"guide": guide},
    ):  # fmt: skip
        for reduction in ("mean", "none"):
            found = [evaluate(z1, z2, own, b, reduction=reduction, **options)
                     for b in ("cpu", "blocked")]  # fmt: skip
            assert_close(*found, 1e-12)
    alone = torch.zeros(40, dtype=torch.int64)
    assert all(not x.any() for x in evaluate(z1, z2, own, ids=alone))


def test_a_nan_is_where_it_belongs():
    z1, z2 = pair(20, 4)
    z1[3] = torch.nan
    for name, (own, options) in PAIRS.items():
        if name == "alpha_square":
            continue  # an iteration
        ours = evaluate(z1, z2, own, negatives="one_view", reduction="none")
        truth = evaluate(
            z1, z2, name, temperature=TAU, negatives="one_view", reduction="none", **options
        )
        for a, b in zip(ours, truth, strict=True):
            assert torch.equal(a.isnan(), b.isnan())


def test_excluded_pairs_do_not_matter():
    """ψ is infinite at the anchor itself, whose x would be 0 with unit rows of equal views."""
    own = PairLoss(None, lambda x: torch.log(-x))
    z1, _ = pair(20, 4)
    ours = evaluate(z1, z1, own)
    assert ours[0].isfinite()
    assert_close(ours, evaluate(z1, z1, own, "blocked"), 1e-10)


@pytest.mark.parametrize("native", [True, False])
def test_same_bits_for_any_number_of_threads(native, monkeypatch):
    if not native:
        two_sweeps(monkeypatch)
    z1, z2 = pair(150, 9, torch.float32)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(cpu, "_threads", lambda *args, threads=threads: threads)
        found.append(evaluate(z1, z2, PAIRS["infonce"][0]))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


def test_every_instruction_set(monkeypatch):
    """The functions have the vectors of the kernels that call them."""
    z1, z2 = pair(60, 9, torch.float32)
    name, (own, options) = "modified_triplet", PAIRS["modified_triplet"]
    usable = [isa for isa, here in cpu.instruction_sets().items() if here]
    for isa in usable[:: max(1, len(usable) - 1)]:  # the first and the last
        with cpu.forced_instruction_set(isa):
            assert_close(evaluate(z1, z2, own), evaluate(z1, z2, name, **options), 1e-5)


def test_compiled_graph(fresh_dynamo):
    class Psi:
        tau = TAU

        def __call__(self, x):
            return torch.exp(x / self.tau)

    psi = Psi()
    own = PairLoss(torch.log1p, psi)
    z1, z2 = pair(30, 6)
    compiled = torch.compile(lambda *z: alpha_cl_loss(*z, own), backend="aot_eager")
    for psi.tau in (TAU, 0.2):
        views = [z.clone().requires_grad_() for z in (z1, z2)]
        loss = compiled(*views)
        ours = loss.detach(), *torch.autograd.grad(loss, views)
        assert_close(ours, evaluate(z1, z2, own, "blocked"), 1e-10)


# --- compiled once --------------------------------------------------------------------------------


def scheduled(margin, power):
    """A function of two numbers that stand in a sum, a product, a power and a condition."""
    return PairLoss(
        None, lambda x: torch.where(x > margin - 3, (x + 4).pow(power) * margin + margin, 0.0)
    )


def test_a_constant_compiles_nothing(compilations):
    z1, z2 = pair(20, 5)
    for margin, power in ((0.3, 1.2), (0.25, 0.7), (-2.0, 0.7), (0.7, 0.7), (5.0, 3.3)):
        ours = evaluate(z1, z2, scheduled(margin, power))
        assert_close(ours, evaluate(z1, z2, scheduled(margin, power), "blocked"), 1e-10)
    assert len(compilations) == 1


def test_an_attribute_is_read_in_every_call(compilations):
    class Psi:
        def __call__(self, x):
            return torch.tanh(x * self.scale)

    psi, (z1, z2) = Psi(), pair(20, 5)
    psi.scale = 0.5
    own = PairLoss(None, psi)
    for psi.scale in (0.5, 0.8, 1.7):
        assert_close(evaluate(z1, z2, own), evaluate(z1, z2, own, "blocked"), 1e-10)
    assert len(compilations) == 1


def test_a_library_outlives_the_process(compilations, monkeypatch):
    z1, z2 = pair(20, 5)
    truth = evaluate(z1, z2, scheduled(0.3, 1.2))
    before = len(compilations)
    as_new(monkeypatch)
    assert all(map(torch.equal, evaluate(z1, z2, scheduled(0.3, 1.2)), truth))
    assert len(compilations) == before


def forget_alone(cache, source_of):
    """Leaves one library in the folder, that of a function, and returns its file."""
    for file in cache.iterdir():
        file.unlink()
    evaluate(*pair(6, 3), source_of)
    (file,) = cache.iterdir()
    return file


def test_a_damaged_library_is_compiled_again(cache, compilations, monkeypatch):
    z1, z2 = pair(20, 5)
    own = PAIRS["triplet"][0]
    truth = evaluate(z1, z2, own)
    as_new(monkeypatch)
    file = forget_alone(cache, own)
    content = file.read_bytes()
    for damaged in (content[:-100], content[:200] + b"x" + content[201:]):
        del compilations[:]
        as_new(monkeypatch)
        file.unlink()  # written in place, it would change under those who have loaded it
        file.write_bytes(damaged)
        assert all(map(torch.equal, evaluate(z1, z2, own), truth))
        assert len(compilations) == 1
        (file,) = cache.iterdir()
        assert file.read_bytes() != damaged


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_at_once(cache, compilations, monkeypatch, tmp_path):
    """Each of three processes, forked from a thread that is compiling, finds or makes the library;
    none sees another's half-written file.
    """
    own, (z1, z2) = PAIRS["triplet"][0], pair(20, 5)
    truth = evaluate(z1, z2, own)
    for file in cache.iterdir():
        file.unlink()
    as_new(monkeypatch)
    started, go_on = threading.Event(), threading.Event()
    counted = cpu_functions.run

    def slow(command):
        started.set()
        go_on.wait()
        return counted(command)

    monkeypatch.setattr(cpu_functions, "run", slow)
    thread = threading.Thread(target=evaluate, args=(z1, z2, own))
    thread.start()
    started.wait()  # the thread holds the lock
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                cpu_functions.run = counted
                same = all(map(torch.equal, evaluate(z1, z2, own), truth))
                os._exit(0 if same else 1)
            os._exit(2)
        children.append(child)
    go_on.set()
    thread.join()
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert {file.suffix for file in cache.iterdir()} == {".so"}
    as_new(monkeypatch)
    del compilations[:]
    assert all(map(torch.equal, evaluate(z1, z2, own), truth))
    assert not compilations


def test_threads_compile_once(compilations, monkeypatch, cache):
    for file in cache.iterdir():
        file.unlink()
    as_new(monkeypatch)
    z1, z2 = pair(20, 5)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(evaluate(z1, z2, PAIRS["triplet"][0])))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(compilations) == 1


# --- the folder -----------------------------------------------------------------------------------


def test_the_folder_is_private(cache):
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@pytest.mark.parametrize("bad", ["open to all", "a file"])
def test_without_a_usable_folder(bad, tmp_path, monkeypatch, compilations):
    """Nothing is loaded from where others can write; the function is compiled all the same."""
    monkeypatch.setenv("ALPHACL_CACHE", str(tmp_path))
    if bad == "a file":
        (tmp_path / "functions").write_text("")
    else:
        (tmp_path / "functions").mkdir()
        (tmp_path / "functions").chmod(0o777)
    as_new(monkeypatch)
    z1, z2 = pair(20, 5)
    own, options = PAIRS["triplet"]
    assert all(map(torch.equal, evaluate(z1, z2, own), evaluate(z1, z2, "triplet", **options)))
    assert len(compilations) == 1
    assert [file.name for file in tmp_path.rglob("*.so")] == []
    assert "not kept, because" in cpu.users_functions()


def test_where_the_folder_is(monkeypatch, tmp_path):
    monkeypatch.delenv("ALPHACL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cpu_functions._folder() == tmp_path / "xdg" / "alphacl_fast" / "functions"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cpu_functions._folder() == tmp_path / "home/.cache/alphacl_fast/functions"


# --- why not --------------------------------------------------------------------------------------


def refused(objective, reason):
    """`blocked` serves an objective, and whoever asks learns why."""
    z1, z2 = pair(12, 4)
    loss = FusedAlphaCLLoss(objective)
    assert f"cpu: {reason}" in repr(loss)
    loss(z1, z2)
    assert f"last call: blocked, first that serves float64 on cpu; skipped cpu: {reason}" in repr(
        loss
    )
    with pytest.raises(ValueError, match=r"^backend 'cpu' cannot serve this call: ") as error:
        alpha_cl_loss(z1, z2, objective, backend="cpu")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert reason in ops.unsupported("cpu", *HERE, objective.kind)


def test_switched_off(monkeypatch, compilations):
    monkeypatch.setenv("ALPHACL_CPU_COMPILE", "0")
    refused(PAIRS["triplet"][0], "ALPHACL_CPU_COMPILE=0 leaves users' functions uncompiled")
    assert cpu.users_functions() == "not compiled: ALPHACL_CPU_COMPILE=0"
    assert not compilations
    monkeypatch.setenv("ALPHACL_CPU_COMPILE", "no")
    with pytest.raises(ValueError, match="ALPHACL_CPU_COMPILE must be 0 or 1, got 'no'"):
        FusedAlphaCLLoss(PAIRS["triplet"][0])(*pair(12, 4))


def test_without_a_compiler(monkeypatch):
    as_new(monkeypatch)
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = "found no C++ compiler to compile it (no-such-compiler; CXX names another)"
    refused(PAIRS["triplet"][0], reason)
    assert cpu.users_functions() == f"not compiled: {reason}"


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    """Its first error is the reason; it is asked once."""
    as_new(monkeypatch)
    compiler = tmp_path / "a compiler"
    count = tmp_path / "count"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit 0\necho x >> "{count}"\n'
        "echo 'note: about to fail' >&2\necho 'function.cpp:1: error: no space left' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", shlex.quote(str(compiler)))
    reason = "the C++ compiler has not compiled it: function.cpp:1: error: no space left"
    refused(PAIRS["triplet"][0], reason)
    assert count.read_text() == "x\n"


@pytest.mark.parametrize(
    ("psi", "reason"),
    [
        (torch.special.erfinv, "psi uses erfinv: not in C++"),
        (lambda x: x.to(torch.float64).to(x.dtype), "psi uses a conversion to float64: not in C++"),
        (
            lambda x: torch.relu(x) if float(x.detach().sum()) < -1e9 else x.square(),
            "psi decides by values of its argument (aten._local_scalar_dense): use torch.where",
        ),
    ],
)
def test_what_cannot_be_printed(psi, reason, compilations):
    refused(PairLoss(None, psi), reason)
    assert not compilations


def test_a_phi_that_cannot_be_printed(steps):
    """φ is applied to N numbers: PyTorch does that, and the kernels serve ψ."""
    own = PairLoss(lambda x: torch.special.erfinv(x / 1e3), lambda x: torch.exp(x / TAU))
    z1, z2 = pair(20, 5)
    assert_close(evaluate(z1, z2, own), evaluate(z1, z2, own, "blocked"), 1e-10)
    assert not steps


def test_a_function_that_can_no_longer_be_printed():
    class Psi:
        function = staticmethod(torch.sinh)

        def __call__(self, x):
            return self.function(x)

    psi, (z1, z2) = Psi(), pair(20, 5)
    loss = FusedAlphaCLLoss(PairLoss(None, psi))
    loss(z1, z2)
    assert "last call: cpu" in repr(loss)
    psi.function = lambda x: torch.special.erfinv(x / 4)
    assert loss(z1, z2) == alpha_cl_loss(z1, z2, loss.objective, backend="blocked")
    assert "skipped cpu: psi uses erfinv" in repr(loss)
    with pytest.raises(UnsupportedFunction, match="psi uses erfinv"):
        cpu.compiled(loss.objective.kind, (), torch.float32)


def test_info_says_how(cache):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(["info"])
    (line,) = [x for x in out.getvalue().splitlines() if x.startswith("users' functions")]
    assert f"kept in {cache}" in line
    assert "compiled by" in line
