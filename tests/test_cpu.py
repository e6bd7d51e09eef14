"""The compiled CPU backend: every instruction set this machine has, threads, signals, and what
happens without it.
"""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from family import BUILT_IN, MODES, in_turn, loss_and_grads, member_id, pair, relative_error
from preloaded import Preloaded

from alphacl_fast import FusedAlphaCLLoss, PairLoss, ops
from alphacl_fast.backend import cpu
from alphacl_fast.bundles import PairFunction, Pairing, Rows, RowScalars, Term, Weight
from alphacl_fast.functional import alpha_cl_loss
from tools import build_cpu

ROOT = Path(__file__).parent.parent
if cpu.load_error():
    pytest.skip(f"no compiled CPU backend: {cpu.load_error()}", allow_module_level=True)
SETS = [name for name, here in cpu.instruction_sets().items() if here]
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory):
    """A process without threads, which has imported the backend."""
    modules = ("alphacl_fast.ops", "alphacl_fast.functional")
    with Preloaded(tmp_path_factory.mktemp("output"), *modules, folder=ROOT) as process:
        yield process


def set_blocks(monkeypatch, rows):
    monkeypatch.setattr(cpu, "block_rows", lambda n, sizes: rows)


@pytest.mark.parametrize("rows", [7, 48])
@pytest.mark.parametrize("member", BUILT_IN, ids=member_id)
def test_every_instruction_set(member, rows, monkeypatch, poisoned):
    """In each mode with one similarity, in turn; with all under `make test-all`."""
    set_blocks(monkeypatch, rows)
    z1, z2 = pair(11 if rows == 7 else 59, 9)
    turn = BUILT_IN.index(member) + (rows == 7)
    cases = [
        (*mode, similarity)
        for k, mode in enumerate(MODES)
        for similarity in in_turn(("cosine", "euclidean"), turn + k)
    ]
    for negatives, symmetric, similarity in cases:
        setting = {"negatives": negatives, "symmetric": symmetric, "similarity": similarity}
        truth = loss_and_grads(z1, z2, *member, backend="reference", **setting)
        for name in SETS:
            with cpu.forced_instruction_set(name):
                ours = loss_and_grads(z1, z2, *member, backend="cpu", **setting)
            for o, t in zip(ours, truth, strict=True):
                assert relative_error(o, t) < 1e-10, (name, setting)


@pytest.mark.parametrize(
    ("pairs", "dim", "rows"),
    [(13, 6, 5), (59, 33, 48), (130, 40, 31), (150, 70, 96), (210, 128, 240)],
)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_on_every_instruction_set(dtype, pairs, dim, rows, monkeypatch, poisoned):
    """Against float64 on the same rows: the gradient is as exact as its dtype, whatever
    multiplies it. In each mode with one similarity, in turn; with both under `make test-all`.
    """
    set_blocks(monkeypatch, rows)
    members = (
        BUILT_IN
        if pairs == 13
        else [("infonce", {}), ("alpha_square", {}), ("alpha_direct", {"detach_alpha": False})]
    )
    turn = HALF.index(dtype)
    cases = [
        (member, *mode, similarity)
        for (m, member), (k, mode) in itertools.product(enumerate(members), enumerate(MODES))
        for similarity in in_turn(("cosine", "dot"), m + k + turn)
    ]
    for member, negatives, symmetric, similarity in cases:
        if member == ("triplet", {"margin": 0.1}):
            continue  # with 26 rows a whole row's hinges can be inactive
        z1, z2 = pair(pairs, dim, dtype)
        if similarity == "dot":
            z1, z2 = z1 / 4, z2 / 4
        setting = {
            "negatives": negatives,
            "symmetric": symmetric,
            "similarity": similarity,
            "reduction": "none",
        }
        truth = loss_and_grads(z1.double(), z2.double(), *member, backend="reference", **setting)
        for name in SETS:
            with cpu.forced_instruction_set(name):
                ours = loss_and_grads(z1, z2, *member, backend="cpu", **setting)
            assert ours[0].dtype == torch.float32
            for what, o, t, bound in zip(
                ("loss", "dz1", "dz2"), ours, truth, (3e-5, 4e-3, 4e-3), strict=False
            ):
                error = float((o.double() - t).norm() / t.norm().clamp(min=1e-12))
                assert error < bound, (name, member, setting, what)


@pytest.mark.parametrize("name", SETS)
def test_unit_rows_of_any_magnitude(name):
    z1, z2 = pair(9, 37, torch.bfloat16)
    z1[3] = 0
    z1[4], z1[5] = z1[4].sign() * 3e38, z1[5].sign() * 5e-39  # the largest, and a denormal
    with cpu.forced_instruction_set(name):
        f, scale, inv_norm, pos = cpu.unit_rows(z1, z2)
    rows = torch.nn.functional.normalize(torch.cat([z1, z2]).double(), dim=1, eps=0)
    rows = rows.nan_to_num(0.0)
    assert relative_error(f.double() * scale.double().unsqueeze(1), rows) < 1e-6
    assert relative_error(pos[:9], (rows[:9] * rows[9:]).sum(1)) < 1e-6
    assert torch.isfinite(inv_norm).all()
    assert inv_norm[3] == 0


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-18, 1e18, 1e30, 1e33])
@pytest.mark.parametrize("name", SETS)
def test_bfloat16_ignores_the_scale_of_rows(name, scale):
    z1, z2 = pair(40, 32, torch.bfloat16)
    scale = 2.0 ** round(torch.tensor(scale).log2().item())
    with cpu.forced_instruction_set(name):
        base = loss_and_grads(z1, z2, "infonce", backend="cpu")
        scaled = loss_and_grads(z1 * scale, z2 * scale, "infonce", backend="cpu")
    assert relative_error(scaled[0], base[0]) < 1e-6
    for s, b in zip(scaled[1:3], base[1:3], strict=True):
        assert relative_error(s.double() * scale, b.double(), floor=1e-4) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("member", BUILT_IN, ids=member_id)
def test_same_bits_for_any_number_of_threads(member, dtype, monkeypatch):
    """Threads of the sweeps; PyTorch's own sums between them may depend on its setting.

    With one kind of negatives, in turn; with both under `make test-all`.
    """
    z1, z2 = pair(333, 24, dtype)
    turn = BUILT_IN.index(member) + dtype.itemsize // 4
    for negatives in in_turn(("two_view", "cross_view"), turn):
        results = []
        for threads in (1, 2, 2, 3, 8):
            monkeypatch.setattr(cpu, "_threads", lambda *args, threads=threads: threads)
            results.append(loss_and_grads(z1, z2, *member, backend="cpu", negatives=negatives))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_more_threads_than_blocks_and_small_batches(monkeypatch):
    monkeypatch.setattr(cpu, "_threads", lambda *args: 16)
    for pairs in (2, 3, 5, 25):
        z1, z2 = pair(pairs, 3)
        truth = loss_and_grads(z1, z2, "infonce", backend="reference")
        for o, t in zip(loss_and_grads(z1, z2, "infonce", backend="cpu"), truth, strict=True):
            assert relative_error(o, t) < 1e-10


def test_threads_follow_the_work():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert cpu._threads(64, 32, 0, False) == 1
        assert cpu._threads(4096, 128, 0, False) == 4
        assert cpu._threads(4096, 128, 2048, True) == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dim", [1, 2, 15, 16, 17, 47, 49, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SETS)
def test_any_number_of_features(name, dtype, dim):
    z1, z2 = pair(26, dim, dtype)
    with cpu.forced_instruction_set(name):
        ours = loss_and_grads(z1, z2, "infonce", backend="cpu", similarity="cosine")
    truth = loss_and_grads(
        z1.double(), z2.double(), "infonce", backend="reference", similarity="cosine"
    )
    for o, t in zip(ours[:3], truth[:3], strict=True):
        # with one feature all rows are ±1 and the gradient is 0, but for rounding
        least = 1.0 if dim == 1 else 1e-9
        error = float((o.double() - t).norm() / t.norm().clamp(min=least))
        assert error < {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 5e-3)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("negatives", ["two_view", "cross_view"])
@pytest.mark.parametrize("dim", [16, 128, 240])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SETS)
def test_gradients_of_whole_blocks(name, dtype, dim, negatives, wanted):
    """A whole block of rows whose width needs no padding has its gradient added up where it
    ends.
    """
    views = pair(290, dim, dtype)
    found = []
    for backend, precise in (("cpu", dtype), ("reference", torch.float64)):
        z1, z2 = (z.to(precise).requires_grad_(want) for z, want in zip(views, wanted, strict=True))
        with cpu.forced_instruction_set(name):
            loss = alpha_cl_loss(z1, z2, temperature=0.1, negatives=negatives, backend=backend)
            found.append(torch.autograd.grad(loss, [z for z in (z1, z2) if z.requires_grad]))
    for ours, truth in zip(*found, strict=True):
        assert (
            relative_error(ours, truth, floor=1e-9)
            < {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        )


def test_strided_expanded_and_transposed_inputs():
    base = torch.randn(6, 40, dtype=torch.float64)
    strided, row = (
        torch.randn(40, 12, dtype=torch.float64)[:, ::2],
        torch.randn(1, 6, dtype=torch.float64),
    )
    for z in (base.t(), strided, row.expand(40, 6)):
        truth = loss_and_grads(
            z.contiguous(), z.flip(0).contiguous(), "infonce", similarity="dot", backend="reference"
        )
        ours = loss_and_grads(z, z.flip(0), "infonce", similarity="dot", backend="cpu")
        for o, t in zip(ours, truth, strict=True):
            assert relative_error(o, t) < 1e-10


def test_a_nan_is_not_lost():
    for name in SETS:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for similarity in ("cosine", "dot"):
                z1, z2 = pair(60, 20, dtype)
                z1[7, 3] = torch.nan
                with cpu.forced_instruction_set(name):
                    loss, d1, *_ = loss_and_grads(
                        z1, z2, "infonce", similarity=similarity, backend="cpu"
                    )
                assert loss.isnan(), (name, dtype, similarity)
                assert d1[0].isnan().any(), (name, dtype, similarity)


def test_compiled_from_these_sources():
    """A library of other sources would be tested in vain: `make` or `pip install -e .` compiles
    again.
    """
    assert cpu._library().alphacl_cpu_sources().decode() == build_cpu.fingerprint()


def test_the_build_compiles_the_instruction_sets_of_the_package():
    assert tuple(build_cpu.INSTRUCTION_SETS) == cpu.INSTRUCTION_SETS


def test_the_driver_piece_by_piece():
    """Plan, prepare, schedule and collect by themselves (tests/cpp/test_driver.cpp)."""
    command = [sys.executable, "tests/cpp/run.py", "--sanitize", "none", "--only", "test_driver"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "all good" in run.stdout


def test_wrong_instruction_set_is_refused():
    with (
        pytest.raises(ValueError, match=r"instruction set must be one of \['portable'.*got 'sse9'"),
        cpu.forced_instruction_set("sse9"),
    ):
        pass  # fmt: skip


def test_instruction_set_from_the_environment(monkeypatch):
    monkeypatch.setattr(cpu, "_default_instruction_set", cpu._default_instruction_set.__wrapped__)
    monkeypatch.setenv("ALPHACL_CPU_ISA", "portable")
    assert (cpu.instruction_set(), cpu.kernels_for(torch.bfloat16)) == ("portable", "portable")
    monkeypatch.setenv("ALPHACL_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="ALPHACL_CPU_ISA must be one of"):
        alpha_cl_loss(torch.eye(3), torch.eye(3), backend="cpu")


def test_what_it_refuses(monkeypatch):
    monkeypatch.setenv("ALPHACL_CPU_COMPILE", "0")
    z1, z2 = pair(4, 3, torch.float32)
    with pytest.raises(
        ValueError,
        match="backend 'cpu' cannot serve this call: ALPHACL_CPU_COMPILE=0 leaves users' functions",
    ):
        FusedAlphaCLLoss(PairLoss(None, torch.exp), backend="cpu")(z1, z2)
    with pytest.raises(ValueError, match="precision='tf32'"):
        FusedAlphaCLLoss(backend="cpu", precision="tf32")(z1, z2)
    assert "runs on cpu, not cuda" in ops.SWEEP_BACKENDS["cpu"].unsupported(
        torch.device("cuda"), torch.float32, None, ""
    )
    loss = FusedAlphaCLLoss(PairLoss(None, torch.exp))
    loss(z1, z2)
    assert (
        "blocked, first that serves float32 on cpu; skipped cpu: ALPHACL_CPU_COMPILE=0 leaves"
        in repr(loss)
    )


def test_without_the_library(monkeypatch, tmp_path):
    """Imports, says why, and `auto` goes on with the next backend."""
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "_cpu.abi3.so")
    monkeypatch.setattr(cpu, "FAILURE", tmp_path / "_cpu_not_built.txt")
    cpu.FAILURE.write_text("c++: command not found\n")
    library, error = cpu._load()
    monkeypatch.setattr(cpu, "_LIBRARY", library)
    monkeypatch.setattr(cpu, "_LOAD_ERROR", error)
    assert "c++: command not found; reinstall with a C++ compiler" in ops.backends()["cpu"]
    z1, z2 = pair(4, 3, torch.float32)
    loss = FusedAlphaCLLoss()
    loss(z1, z2)
    assert "last call: blocked" in repr(loss)
    with pytest.raises(ValueError, match=r"not compiled: c.*command not found"):
        FusedAlphaCLLoss(backend="cpu")(z1, z2)
    cpu.LIBRARY.write_text("no library")
    assert cpu._load()[0] is None


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
@pytest.mark.parametrize(
    ("function", "objective"),
    [
        ("alphacl_cpu_sweep", "infonce"),
        ("alphacl_cpu_step", "infonce"),
        ("alphacl_cpu_step", "alpha_square"),
    ],
)
def test_ctrl_c_ends_a_sweep(function, objective, preloaded):
    """The signal comes while the native sweep runs, which alone would take hours: one that waits
    for its end runs into the watchdog.

    The second thread runs for the first time where the sweep lets go of the interpreter's lock:
    until then nothing blocks, and no switch of threads is due.
    """
    code = """
import os, signal, sys, threading, torch
from alphacl_fast import native
from alphacl_fast.backend import cpu
from alphacl_fast.functional import alpha_cl_loss

library, called = cpu._library(), threading.Event()
function = getattr(library, sys.argv[1])
if sys.argv[1] == "alphacl_cpu_sweep":
    native.serves = lambda *call: False

def watched(arguments):
    called.set()
    try:
        return function(arguments)
    except KeyboardInterrupt:
        print("stopped inside")
        raise

def press_ctrl_c():
    called.wait()
    os.kill(os.getpid(), signal.SIGINT)

torch.set_num_threads(2)
z = torch.randn(4_000_000, 2)
thread = threading.Thread(target=press_ctrl_c)
thread.start()
setattr(library, sys.argv[1], watched)
sys.setswitchinterval(1e6)
try:
    alpha_cl_loss(z, z + 0.1, sys.argv[2], backend="cpu")
except KeyboardInterrupt:
    print("and the call with it")
thread.join()
print(float(alpha_cl_loss(torch.eye(3), torch.eye(3), backend="cpu")) > 0)
"""
    run = preloaded.run(code, function, objective, folder=ROOT)
    expected = ["stopped inside", "and the call with it", "True"]
    assert run.stdout.splitlines() == expected, run.stderr


def test_several_python_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    z1, z2 = pair(150, 16)
    truth = loss_and_grads(z1, z2, "alpha_direct", backend="reference")
    with ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(loss_and_grads, z1, z2, "alpha_direct", backend="cpu") for _ in range(12)
        ]
        for future in futures:
            for o, t in zip(future.result(), truth, strict=True):
                assert relative_error(o, t) < 1e-10


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("n", "dim", "largest"), [(32_768, 16, 6), (16_384, 128, 4)])
def test_work_space_at_a_large_batch(n, dim, largest, preloaded):
    """The rows packed in two layouts, row vectors, and what each thread needs; the gradient adds up
    where it ends.

    ``largest``: MiB beyond the packed rows and the gradient. An n × n matrix would take 4 and
    1 GiB.
    """
    code = f"""
import torch
from alphacl_fast.bundles import PairFunction, Pairing, Rows, RowScalars, Term, Weight
from alphacl_fast.ops import pair_grad, row_sums

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(name))

def both_sweeps(n):
    rows, pairing = Rows(f[:n]), Pairing(0, n // 2, n)
    center, gain = torch.zeros(n), torch.ones(n)
    function = PairFunction("exp", (), torch.tensor(0.2), (-5.0, 5.0))
    base, total = row_sums(
        rows, pairing, function, RowScalars(center), (Term.SHIFT, Term.F), "", "cpu"
    )
    scalars = RowScalars(center, gain, base)
    df, *_ = pair_grad(rows, pairing, function, scalars, Weight.F, (), (0, n), "", "cpu")
    return total, df

torch.set_num_threads(2)
f = torch.nn.functional.normalize(torch.randn({n}, {dim}))
both_sweeps(2048)  # starts threads and loads code
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before = status("VmRSS")
total, df = both_sweeps({n})
grown = status("VmHWM") - before
print(grown, bool((total > 0).all()), bool(df.isfinite().all()))
"""
    run = preloaded.run(code, folder=ROOT)
    assert run.returncode == 0, run.stderr
    grown, *sound = run.stdout.split()
    matrix = n * dim * 4 / 2**20
    print(f"{float(grown) - 3 * matrix:.1f} MiB beyond the packed rows and the gradient")
    assert float(grown) < 3 * matrix + largest
    assert sound == ["True", "True"]


@pytest.mark.parametrize("split", [1, 3, 20, 39, 58])
@pytest.mark.parametrize("backend", ["cpu", "blocked"])
def test_rectangles_of_unequal_sides(backend, split, small_tiles, monkeypatch):
    """Rows [0, split) against the rest, as a rank of a distributed batch has them: against dense
    sums.
    """
    monkeypatch.setattr(cpu, "_threads", lambda *args: 3)
    n, tau = 60, torch.tensor(0.4, dtype=torch.float64)
    f = torch.nn.functional.normalize(torch.randn(n, 7, dtype=torch.float64))
    t = f[:split] @ f[split:].t()
    center = torch.zeros(n, dtype=torch.float64)
    pairing, function = Pairing(split, 0, n), PairFunction("exp", (), tau, (-2.5, 3.5))
    base, total = ops.row_sums(
        Rows(f), pairing, function, RowScalars(center), (Term.SHIFT, Term.F), "", backend
    )
    lse = torch.cat([(t / tau).logsumexp(1), (t / tau).logsumexp(0)])
    torch.testing.assert_close(base + total.log(), lse, rtol=1e-12, atol=1e-12)
    gain = torch.rand(n, dtype=torch.float64)
    scalars = RowScalars(center, gain, lse)
    df, *_ = ops.pair_grad(Rows(f), pairing, function, scalars, Weight.F, (), (0, n), "", backend)
    g = (gain[:split] / lse[:split].exp()).unsqueeze(1) * (t / tau).exp() + (t / tau).exp() * (
        gain / lse.exp()
    )[split:]
    torch.testing.assert_close(
        df, torch.cat([g @ f[split:], g.t() @ f[:split]]), rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("backend", ["cpu", "blocked"])
def test_infinite_similarity_of_an_excluded_pair(backend):
    z1, z2 = pair(20, 6, torch.float32)
    z1[3], z2[3] = 0.0, 0.1
    z1[3, 0] = 3e19  # only its product with itself leaves float32 …
    z1[:3, 0] = z1[4:, 0] = z2[:, 0] = 0.0  # … and no other row meets it
    for name in ("alpha_square", "alpha_direct", "triplet"):
        truth = loss_and_grads(
            z1.double(), z2.double(), name, similarity="dot", backend="reference"
        )
        ours = loss_and_grads(z1, z2, name, similarity="dot", backend=backend)
        assert torch.isfinite(ours[0])
        assert relative_error(ours[0], truth[0]) < 1e-5, name


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dim", [1024, 4096])
def test_nearly_equal_rows_of_many_features(name, dim):
    """Rounding along a long sum goes the same way for all of them and must not add up."""
    row = torch.randn(1, dim, dtype=torch.float64)
    z1, z2 = ((row + 1e-3 * torch.randn(40, dim, dtype=torch.float64)).float() for _ in range(2))
    truth = loss_and_grads(
        z1.double(), z2.double(), "alpha_direct", tau=0.07, backend="reference", reduction="none"
    )
    with cpu.forced_instruction_set(name):
        ours = loss_and_grads(z1, z2, "alpha_direct", tau=0.07, backend="cpu", reduction="none")
    eager = loss_and_grads(z1, z2, "alpha_direct", tau=0.07, backend="reference", reduction="none")
    error, bound = (float((x[0].double() - truth[0]).square().mean().sqrt()) for x in (ours, eager))
    assert error < 2 * bound + 2.4e-7, (error, bound)


def test_equal_weights_are_not_rounded():
    """A hinge weighs all active pairs alike.

    1/2N as a bfloat16 would be off by the same 0.2 % everywhere.
    """
    row = torch.randn(1, 32)
    z1, z2 = ((row + 0.05 * torch.randn(60, 32)).bfloat16() for _ in range(2))
    truth = loss_and_grads(
        z1.double(), z2.double(), "triplet", similarity="dot", backend="reference"
    )
    for name in SETS:
        with cpu.forced_instruction_set(name):
            ours = loss_and_grads(z1, z2, "triplet", similarity="dot", backend="cpu")
        for o, t in zip(ours[1:3], truth[1:3], strict=True):
            assert float((o.double() - t).norm() / t.norm()) < 4e-3, name


def test_half_precision_subnormals_survive_flushing():
    z1, z2 = (z * 2.0**-23 for z in pair(20, 8, torch.float16))
    base = loss_and_grads(z1, z2, "infonce", backend="cpu")
    torch.set_flush_denormal(True)
    try:
        for name in SETS:
            with cpu.forced_instruction_set(name):
                assert (
                    relative_error(loss_and_grads(z1, z2, "infonce", backend="cpu")[0], base[0])
                    < 1e-6
                )
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.skipif(
    shutil.which("valgrind") is None,
    reason="needs valgrind, whose processor has AVX2 but no AVX-512",
)
def test_no_illegal_instruction_on_an_older_processor():
    code = f"""
import ctypes
# In torch's place: torch itself would run for minutes here.
ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)
library = ctypes.CDLL({str(cpu.LIBRARY)!r})
mask = library.alphacl_cpu_instruction_sets()
sizes = [ctypes.c_int32() for _ in range(3)]
library.alphacl_cpu_kernels.restype = ctypes.c_char_p
print(mask >> 16, library.alphacl_cpu_kernels(1, 0, *map(ctypes.byref, sizes)))
"""
    run = subprocess.run(
        ["valgrind", "-q", sys.executable, "-c", code], capture_output=True, text=True
    )
    assert run.stdout.split() == ["3", "b'avx2'"], run.stderr[-500:]
