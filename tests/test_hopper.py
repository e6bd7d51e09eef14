"""kernels/hopper.py: its source run by an emulator against float64, and what the compiler makes of it for sm_90a."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

if __name__ != "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="this version of triton has no Gluon")

from alphacl_fast.kernels import hopper, trace  # noqa: E402
from alphacl_fast.kernels.config import Tile  # noqa: E402
from alphacl_fast.kernels.resources import Resources, compile_for, limits  # noqa: E402

if __name__ != "__main__":
    from gluon_emulator import Emulated, EmulationError

pytestmark = pytest.mark.xdist_group("hopper")  # one worker makes what its tests share
ROOT = Path(__file__).parent.parent
SOURCE = (ROOT / "kernels" / "hopper.py").read_text()
TAU, MIDDLE = 0.4, 0.3
LINEAR, POWER = trace.pair_functions("exp", ()).f, trace.pair_functions("power", (1.0, 2.0)).f


def by_power(t):
    return -((1 - t).clamp(min=0) ** 2) / TAU


# --- the emulated kernels against float64 -------------------------------------------------------------------------------


class Problem:
    """Rows in logical order with their scalars, and the two sweeps in float64."""

    def __init__(self, n, d=16, shift=1, rectangle=False, log_f=None):
        generator = torch.Generator().manual_seed(n)
        self.shift, self.log_f = shift, log_f or (lambda t: t / TAU)
        self.rows = torch.randn(n, d, generator=generator).bfloat16()
        self.cols = torch.randn(n, d, generator=generator).bfloat16() if rectangle else self.rows
        self.scale_rows, self.scale_cols = (1 / x.float().norm(dim=1) for x in (self.rows, self.cols))
        r = torch.rand(2, n, generator=generator) / n
        self.r_rows, self.r_cols = r if rectangle else (r[0], r[0])
        self.center = torch.rand(n, generator=generator)
        self.tau = torch.tensor(TAU)
        t = self.scale_rows.double()[:, None] * self.scale_cols.double() * (self.rows.double() @ self.cols.double().T)
        group = torch.arange(n) >> shift
        self.e = torch.exp(self.log_f(t) - MIDDLE).masked_fill(group[:, None] == group, 0.0)
        self.t = t

    def pair_grad(self, launch, splits=1, tile=None, log_f=LINEAR, linear=True):
        parts = launch(
            self.rows, self.cols, self.scale_rows, self.scale_cols, self.r_rows, self.r_cols, self.tau, MIDDLE, log_f,
            self.shift, splits, tile, linear,
        )  # fmt: skip
        assert parts.shape == (splits, *self.rows.shape)
        assert parts.dtype == torch.float32
        return parts.sum(0)

    def row_sums(self, launch, center, splits=1, tile=None, log_f=LINEAR, linear=True):
        parts = launch(
            self.rows, self.cols, self.scale_rows, self.scale_cols, center, self.tau, MIDDLE, log_f, self.shift, splits, tile,
            linear,
        )  # fmt: skip
        assert parts.shape == (splits, 1 if center is None else 2, len(self.rows))
        assert parts.dtype == torch.float32
        return parts.sum(0)

    def check_grad(self, got):
        """W is rounded to bfloat16 (2⁻⁹ of each weight, and W's own rounding before that); a wrong pair is 1/n and more."""
        w = self.e * (self.r_rows.double()[:, None] + self.r_cols.double()) * self.scale_cols.double()
        cols = self.cols.double()
        assert ((got - w @ cols).abs() <= 2**-8.9 * (w @ cols.abs())).all()

    def check_sums(self, got):
        u = self.t - self.center.double()[:, None]
        for row, term in zip(got, (self.e, self.e * u), strict=False):
            assert ((row - term.sum(1)).abs() <= 4e-6 * term.abs().sum(1)).all()


@pytest.fixture
def launch(monkeypatch):
    """``launch(sweep, seed)``: a launcher whose kernels are emulated."""
    kernels = {}

    def emulate(sweep, seed=0, module=hopper):
        for name in ("_grad_kernel", "_sum_kernel"):
            kernel = kernels.setdefault((module, name), getattr(module, name))
            monkeypatch.setattr(module, name, Emulated(kernel, seed))
        return getattr(module, sweep)

    return emulate


def tiny(cols, stages, features=16):
    return Tile(32, cols, features, 4, stages, engine="gluon")


SHAPES = [  # n, cols, stages, splits, shift, rectangle: one block and less, ragged blocks, ragged and empty tiles
    (1, 32, 3, 1, 0, False),
    (2, 16, 3, 1, 1, False),
    (20, 16, 4, 1, 1, False),
    (32, 32, 3, 1, 0, False),
    (34, 16, 3, 1, 1, False),
    (70, 32, 4, 1, 0, True),
    (96, 32, 3, 1, 1, False),
    (97, 16, 3, 1, 0, True),
    (130, 32, 3, 2, 1, False),
    (158, 16, 3, 2, 1, False),
    (200, 32, 4, 3, 0, True),
    (258, 32, 3, 4, 1, False),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES)
def test_pair_grad(launch, shape):
    n, cols, stages, splits, shift, rectangle = shape
    problem = Problem(n, shift=shift, rectangle=rectangle)
    results = [problem.pair_grad(launch("pair_grad", seed), splits, tiny(cols, stages)) for seed in range(3)]
    problem.check_grad(results[0])
    assert all(torch.equal(results[0], other) for other in results)  # whatever the schedule


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("moment", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_row_sums(launch, shape, moment):
    n, cols, stages, splits, shift, rectangle = shape
    problem = Problem(n, shift=shift, rectangle=rectangle)
    center = problem.center if moment else None
    tile = tiny(cols, stages - 1)
    results = [problem.row_sums(launch("row_sums", seed), center, splits, tile) for seed in range(3)]
    problem.check_sums(results[0])
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("sweep", ["pair_grad", "row_sums"])
def test_a_kind_that_is_not_linear(launch, sweep):
    problem = Problem(90, log_f=by_power)
    if sweep == "pair_grad":
        problem.check_grad(problem.pair_grad(launch(sweep), 1, tiny(16, 3), POWER, False))
    else:
        problem.check_sums(problem.row_sums(launch(sweep), problem.center, 1, tiny(16, 3), POWER, False))


@pytest.mark.parametrize("seed", range(3))
def test_many_features(launch, seed):  # one tile a turn
    problem = Problem(100, d=128)
    problem.check_grad(problem.pair_grad(launch("pair_grad", seed), 1, tiny(32, 3, 128)))


def test_scalars_that_begin_anywhere(launch):  # the second half of a cross_view's scalars
    problem = Problem(50, rectangle=True, shift=0)
    problem.scale_cols = torch.cat([torch.zeros(1), problem.scale_cols])[1:]
    assert problem.scale_cols.data_ptr() % 16
    problem.check_grad(problem.pair_grad(launch("pair_grad"), 1, tiny(32, 3)))
    problem.check_sums(problem.row_sums(launch("row_sums"), problem.center, 1, tiny(32, 3)))


@pytest.mark.parametrize(("change", "message"), [
    ({"tile": None}, r"features, got 16"),
    ({"tile": tiny(32, 2)}, "3 stages"),
    ({"tile": Tile(32, 24, 16, 4, 3)}, "multiple of cols"),
    ({"splits": 2}, "splits must be 1 to 1 for 40 rows, got 2"),
    ({"rows": torch.zeros(40, 16)}, "rows must be .* bfloat16, got .* torch.float32"),
    ({"cols": torch.zeros(41, 16).bfloat16()}, r"cols must be contiguous \(40, 16\) bfloat16, got \(41, 16\)"),
    ({"r_cols": torch.zeros(40, 2)[:, 0]}, r"row scalars .* strides \(2,\)"),
])  # fmt: skip
def test_refused(change, message):
    problem = Problem(40)
    arguments = {"splits": 1, "tile": tiny(32, 3)}
    for name, value in change.items():
        if name in arguments:
            arguments[name] = value
        else:
            setattr(problem, name, value)
    with pytest.raises(ValueError, match=message):
        problem.pair_grad(hopper.pair_grad, **arguments)


# --- what the emulator finds --------------------------------------------------------------------------------------------

MUTANTS = {
    "S is read before it is there": ("pair_grad", "warpgroup_mma_wait(2, [S_next])", "warpgroup_mma_wait(3, [S_next])"),
    "dF is continued unfinished": ("pair_grad", "warpgroup_mma_wait(1, [dF])", "warpgroup_mma_wait(2, [dF])"),
    "a stage is freed before it is read": ("pair_grad", "free.index((k - 1) % STAGES)", "free.index(k % STAGES)"),
    "a stage is never freed": ("pair_grad", "mbarrier.arrive(ring.free.index((k - 1) % STAGES), count=1)", "pass"),
    "nobody waits for a free stage": (
        "pair_grad", "mbarrier.wait(ring.free.index(stage), ((k // STAGES) & 1) ^ 1)", "pass",
    ),
    "the phase of free": ("pair_grad", "((k // STAGES) & 1) ^ 1", "(k // STAGES) & 1"),
    "the phase of full": ("pair_grad", "ring.full.index(k % STAGES), (k // STAGES) & 1", "ring.full.index(k % STAGES), 0"),
    "nobody waits for a tile": ("pair_grad", "mbarrier.wait(ring.full.index(k % STAGES), (k // STAGES) & 1)", "pass"),
    "nobody waits for the rows": ("pair_grad", "mbarrier.wait(ring.rows_full, 0)", "pass"),
    "too few bytes of the rows": ("pair_grad", "2 * rows_desc.block_type.nbytes", "rows_desc.block_type.nbytes"),
    "too few bytes of a tile": ("pair_grad", " + r_desc.block_type.nbytes)", ")"),
    "too many bytes of a tile": ("pair_grad", " + r_desc.block_type.nbytes)", " + 2 * r_desc.block_type.nbytes)"),
    "one consumer frees a stage for both": ("pair_grad", "free.index(stage), count=2", "free.index(stage), count=1"),
    "a copy for which nobody waits": ("pair_grad", "range(walk.count)", "range(walk.count + 1)"),
    "no fence": ("pair_grad", "    fence_async_shared()\n", ""),
    "no mask": ("pair_grad", "W = gl.where(row.group[:, None] == (j >> SHIFT)[None, :], 0.0, W)", "pass"),
    "halves exchanged": ("pair_grad", "S_halves[part]", "S_halves[1 - part]"),
    "the walk misses a block": ("pair_grad", "position <= walk.own", "position < walk.own"),
    "shares overlap": ("pair_grad", "end = blocks * (gl.program_id(1) + 1)", "end = 1 + blocks * (gl.program_id(1) + 1)"),
    "parts in one place": ("pair_grad", "gl.cast(gl.program_id(1), gl.int64) * n + i", "i"),
    "rows beyond the last are stored": ("pair_grad", ", dF, mask=(i < n)[:, None])", ", dF)"),
    "a tile is left out": ("pair_grad", "range(rest, walk.count - 1)", "range(rest, walk.count - 2)"),
    "S is read before it is there (sums)": ("row_sums", "warpgroup_mma_wait(0, [S_next])", "warpgroup_mma_wait(1, [S_next])"),
    "scales are read from a free stage": (
        "row_sums", "    s = S * ring", "    mbarrier.arrive(ring.free.index(k % STAGES), count=1)\n    s = S * ring",
    ),
    "a ragged tile is not masked": ("row_sums", "(j < n)[None, :] & ", ""),
    "a ragged tile is taken for a whole one": ("row_sums", "- TILES - walk.count % 2", "- 1"),
    "moments without their center": ("row_sums", " - row.r[:, None]", ""),
}  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_the_emulator_finds_a_defect(launch, tmp_path, name):
    """Every change of the source is found under one schedule or another; the source itself stands all of them."""
    sweep, old, new = MUTANTS.get(name, ("pair_grad", "", ""))
    assert old in SOURCE
    path = tmp_path / "hopper_mutant.py"
    path.write_text(SOURCE.replace(old, new) if old else SOURCE)
    spec = importlib.util.spec_from_file_location("alphacl_fast.kernels.hopper_mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    problem, found = Problem(170), 0  # 6 tiles a program, one of them ragged
    for seed in range(8):
        try:
            if sweep == "pair_grad":
                problem.check_grad(problem.pair_grad(launch(sweep, seed, mutant), 2, tiny(16, 3)))
            else:
                problem.check_sums(problem.row_sums(launch(sweep, seed, mutant), problem.center, 2, tiny(16, 2)))
        except (EmulationError, AssertionError):
            found += 1
            break
    assert (found > 0) == (name is not None)


# --- what the compiler makes of it --------------------------------------------------------------------------------------


def compile_everything():
    """Resources of every tile that is offered, and the specialisations of launches of different sizes."""
    cases = {}
    for d, tile in hopper.GRAD_TILES.items():
        cases[f"pair_grad {d} linear"] = hopper.ahead_of_time("pair_grad", tile, LINEAR, linear=True)
        cases[f"pair_grad {d} power"] = hopper.ahead_of_time("pair_grad", tile, POWER, shift=0)
    for d, tile in hopper.SUM_TILES.items():
        cases[f"row_sums {d} linear"] = hopper.ahead_of_time("row_sums", tile, LINEAR, linear=True)
        cases[f"row_sums {d} power, moment"] = hopper.ahead_of_time("row_sums", tile, POWER, moment=True)
    found = {}
    for name, (kernel, signature, constexprs) in cases.items():
        r = compile_for(kernel, signature, constexprs, 90)
        found[name] = {**asdict(r), "sass": "", "ptx": "", "unguarded": unguarded_arrivals(r.ptx)}
    return {"cases": found, "specialisations": [specialisation(n) for n in (1, 1000, 1024)]}


def unguarded_arrivals(ptx):
    """Arrivals at `free` that one thread may make before its warpgroup's other warps have read the stage: the emulator
    has no warps, and it is the compiler that puts a barrier of the warpgroup before such an arrival."""
    events = re.findall(r"bar\.sync|ld\.shared\.|wgmma\.wait_group|mbarrier\.arrive\.shared", ptx)
    return [before for before, event in pairwise(events) if event.startswith("mbarrier") and before != "bar.sync"]


def specialisation(n):
    """What a launch for n rows is compiled for, without a device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, x, tile = hopper._grad_kernel, torch.zeros(n, 64).bfloat16(), hopper.GRAD_TILES[64]
    v = torch.zeros(n + 1)[1:]
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    described = hopper._described(x, tile.rows // 2, 64), hopper._described(x, tile.cols, 64), *[hopper._described(v, 128)] * 2
    _, specialised, _ = bind(*described, torch.zeros(4), v, v, v[:1], 1.0, n, STAGES=4, SHIFT=1, LINEAR=True, LOG_F=None)
    return str(specialised)


@pytest.fixture(scope="module")
def compiled():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    "case", ["pair_grad {} linear", "pair_grad {} power", "row_sums {} linear", "row_sums {} power, moment"]
)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_products_overlap(compiled, case, d):
    found = dict(compiled["cases"][case.format(d)])
    assert found.pop("unguarded") == []
    found = Resources(**found)
    assert found.spill_bytes == 0
    assert not found.serialized
    assert found.shared <= limits(90).shared_per_block
    assert found.threads == 12 * 32
    assert found.ptx_mma.keys() == {"wgmma.mma_async"}
    assert found.count("^UTMALDG") > 0
    # A wait stands once a step (twice in pair_grad) and once before the first and after the last, never after each product.
    assert found.instructions["HGMMA"] >= 2 * found.count(r"^WARPGROUP\.DEPBAR")
    assert found.count(r"^MUFU\.EX2") > 0


def test_no_recompilation(compiled):
    assert len(set(compiled["specialisations"])) == 1


if __name__ == "__main__":
    print(json.dumps(compile_everything()))
