"""The kernels of warpgroups (csrc/cuda/hopper.h), run by the emulated device layer, whose products
and copies are done when it suits a kernel least."""

import ctypes
import os

import pytest
import torch
from family import MODES, is_due, loss_and_grads, member_id, pair, relative_error

from alphacl_fast import FusedAlphaCLLoss
from alphacl_fast.backend import blocked, cuda, gpu
from alphacl_fast.bundles import PairFunction, Pairing, Rows, RowScalars, Term, Weight
from alphacl_fast.functional import alpha_cl_loss

pytestmark = pytest.mark.skipif(
    not cuda.emulated(), reason="no emulated library (tests/conftest.py says why)"
)

#: 300 rows: three tiles of 128, of 64 five, the last one ragged, and more than there are stages for
#: long rows.
PAIRS = 150
#: One of each fast kind: exp, power, gibbs.
MEMBERS = [("infonce", {}), ("alpha_direct", {}), ("alpha_entropy", {})]
#: Rows of every kernel, and what is missing to a box of 64.
DIMS = [24, 64, 104, 128, 200, 256]


@pytest.fixture(autouse=True)
def _required():
    """A launch that these kernels do not serve, though they should, fails."""
    with cuda.hopper(True):
        yield


@pytest.fixture
def many_processors(monkeypatch):
    """So that schedules have splits."""
    monkeypatch.setattr(gpu, "multiprocessors_of", lambda device: 10)


@pytest.fixture
def schedule():
    set_schedule = ctypes.CDLL(os.environ["ALPHACL_CUDA_EMULATED"]).alphacl_cuda_schedule
    yield set_schedule
    set_schedule(0)


def every_second_mode(turn):
    return [mode for k, mode in enumerate(MODES) if is_due(turn + k, 2)]


#: Largest relative errors of gradients in the inputs' dtype; those of float16 are subnormal.
ROUNDED = {torch.bfloat16: 4e-3, torch.float16: 4e-3}
DTYPES = [*ROUNDED]


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def assert_close(ours, truth, setting):
    """Losses and dτ are float32, gradients of the inputs' dtype."""
    for value, expected in zip(ours, truth, strict=True):
        assert relative_error(value, expected) < ROUNDED.get(value.dtype, 2e-6), setting


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("member", MEMBERS, ids=member_id)
def test_against_float64(member, dim, poisoned):
    """In every second mode, which changes with member and dim; in all under `make test-all`."""
    turn = MEMBERS.index(member) + DIMS.index(dim)
    for number, (negatives, symmetric) in enumerate(every_second_mode(turn)):
        z1, z2 = pair(PAIRS, dim, DTYPES[(turn // 2 + number) % 2])
        setting = {"negatives": negatives, "symmetric": symmetric}
        truth = loss_and_grads(z1.double(), z2.double(), *member, backend="reference", **setting)
        ours = loss_and_grads(z1, z2, *member, backend="cuda", **setting)
        assert_close(ours, truth, setting)
        with cuda.hopper(False), cuda.symmetric(False):
            others = loss_and_grads(z1, z2, *member, backend="cuda", **setting)
        for a, b in zip(ours, others, strict=True):
            assert relative_error(a, b) < ROUNDED.get(a.dtype, 2e-6) / 2, setting


@pytest.mark.parametrize("pairs", [2, 33, 64, 65, 128, 129])
def test_sizes(pairs, many_processors, poisoned):
    for negatives, symmetric in MODES:
        z1, z2 = pair(pairs, 40, torch.bfloat16)
        setting = {"negatives": negatives, "symmetric": symmetric}
        truth = loss_and_grads(z1.double(), z2.double(), "infonce", backend="reference", **setting)
        assert_close(
            loss_and_grads(z1, z2, "infonce", backend="cuda", **setting), truth, (pairs, setting)
        )


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_stages_go_round(dim, schedule, poisoned):
    """More tiles than there are stages; the order of threads and copies changes no bit."""
    # 620 rows: five tiles of 128 columns or ten of 64, and at most four stages
    z1, z2 = pair(310, dim, torch.float16 if dim == 64 else torch.bfloat16)
    truth = loss_and_grads(z1.double(), z2.double(), "infonce", backend="reference")
    first = loss_and_grads(z1, z2, "infonce", backend="cuda")
    assert_close(first, truth, dim)
    for seed in (1, 5):
        schedule(seed)
        again = loss_and_grads(z1, z2, "infonce", backend="cuda")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), seed


@pytest.mark.parametrize("dim", [40, 128, 256])
@pytest.mark.parametrize("member", MEMBERS[:2], ids=member_id)
def test_no_order_of_threads_changes_a_bit(member, dim, many_processors, schedule):
    """In every second mode, which changes with member and dim; in all under `make test-all`."""
    for negatives, symmetric in every_second_mode(MEMBERS.index(member) + dim // 128):
        z1, z2 = pair(PAIRS, dim, torch.float16 if dim == 128 else torch.bfloat16)
        setting = {"negatives": negatives, "symmetric": symmetric}
        results = []
        for seed in (0, 1, 3):
            schedule(seed)
            results.append(loss_and_grads(z1, z2, *member, backend="cuda", **setting))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), setting
        truth = loss_and_grads(z1.double(), z2.double(), *member, backend="reference", **setting)
        assert_close(results[0], truth, setting)


def test_one_sided_gradients(poisoned):
    """Rows of one view against all: a block of rows next to each other, columns in pairs."""
    for negatives, symmetric in MODES:
        views = pair(PAIRS, 64, torch.bfloat16)
        for side in (0, 1):
            grads = []
            for backend, wide in (("reference", True), ("cuda", False)):
                inputs = [z.double() if wide else z.clone() for z in views]
                inputs[side].requires_grad_()
                loss = alpha_cl_loss(
                    *inputs,
                    "alpha_direct",
                    temperature=0.3,
                    negatives=negatives,
                    symmetric=symmetric,
                    backend=backend,
                )
                grads += torch.autograd.grad(loss, inputs[side])
            assert float((grads[1].double() - grads[0]).norm() / grads[0].norm()) < 4e-3


# --- float16 weights ------------------------------------------------------------------------------


def gradient_of_rows(f, row_weight, kind, params, tau, split):
    """`pair_grad` of rows before ``split``, which alone are anchors, against the others."""
    backend, wide = (cuda, torch.float32) if f.dtype == torch.float16 else (blocked, torch.float64)
    function = PairFunction(kind, params, torch.tensor(tau, dtype=wide), (-1.01 / tau, 1.01 / tau))
    weights = row_weight.to(wide)
    scalars = RowScalars(torch.zeros_like(weights), weights, torch.zeros_like(weights))
    df, *_ = backend.pair_grad(
        Rows(f), Pairing(split, 0, split), function, scalars, Weight.F, (), (0, len(f)), ""
    )
    return df.double()


def relative_errors_of_rows(f, row_weight, kind, params, tau, split):
    """The largest error of a row of the gradient, relative to the row."""
    ours = gradient_of_rows(f, row_weight, kind, params, tau, split)
    truth = gradient_of_rows(f.double(), row_weight.double(), kind, params, tau, split)
    return float(((ours - truth).norm(dim=1) / truth.norm(dim=1)).max())


def unit_rows(count, dim):
    return torch.nn.functional.normalize(torch.randn(count, dim), dim=1).to(torch.float16)


@pytest.mark.parametrize("kind", ["exp", "power"])
@pytest.mark.parametrize("dim", [40, 128, 200])
def test_small_float16_weights_keep_their_digits(kind, dim):
    """Weights far below what float16 represents, in rows whose weights rise and fall by tiles."""
    f, split = unit_rows(420, dim), 140
    place = torch.linspace(-1, 1, split).abs()
    for weight in ((-80 * place).exp2(), (80 * place - 80).exp2()):
        for tau in (1.0, 0.05):
            error = relative_errors_of_rows(f, weight, kind, KINDS[kind], tau, split)
            assert error < 6e-4, (tau, error)


def test_a_large_float16_weight_late_in_a_row():
    """Every tile has a pair whose weight is up to 2¹⁰⁰ times as large as those before."""
    split, tau = 130, 0.016
    f = unit_rows(split + 384, 64)
    for tile in range(3):  # of columns, with a row nearer and nearer to the first one
        at = split + 128 * tile + 7
        mixed = (tile - 1) * f[0].double() + 0.1 * f[at].double()
        f[at] = torch.nn.functional.normalize(mixed, dim=0).to(torch.float16)
    for weight in (1.0, 2.0**-60):
        weights = torch.ones(split)
        weights[0] = weight
        error = relative_errors_of_rows(f, weights, "exp", (), tau, split)
        assert error < 6e-4, (weight, error)


def test_float16_weights_of_nothing_and_of_nan():
    """Rows without weight have the gradient 0, and NaN spoils no other row."""
    f, split = unit_rows(420, 72), 140
    weight = torch.ones(split)
    weight[3:70] = 0
    clean = gradient_of_rows(f, weight, "exp", (), 0.1, split)
    assert not clean[3:70].any()
    assert clean[70:].any(1).all()
    f[100] = torch.nan
    weight[5] = torch.nan
    spoilt = gradient_of_rows(f, weight, "exp", (), 0.1, split)
    others = [k for k in range(split) if k not in (5, 100) and k not in range(3, 70)]
    assert spoilt[[5, 100]].isnan().all()
    assert spoilt[split:].isnan().all()
    assert relative_error(spoilt[others], clean[others]) < 6e-4


# --- the operators alone --------------------------------------------------------------------------

LOG_RANGE = (-4.0, 4.0)
TERMS = (Term.SHIFT, Term.F, Term.F_MOMENT)


def sweeps(backend, rows, kind, params, pairing, wanted=None, precision=""):
    """Both sweeps of one call; the gradient of the ``wanted`` rows, of all by default."""
    generator, n = torch.Generator().manual_seed(1), len(rows.f)
    wide = torch.float32 if rows.f.dtype == torch.bfloat16 else rows.f.dtype
    scalars = RowScalars(
        *(torch.rand(n, generator=generator).to(wide)[: pairing.anchors] for _ in range(3))
    )
    function = PairFunction(kind, params, torch.tensor(0.5, dtype=wide), LOG_RANGE)
    operands = rows, pairing, function
    sums = backend.row_sums(*operands, scalars._replace(shift=None), TERMS, precision)
    df, _, _ = backend.pair_grad(*operands, scalars, Weight.F, (), wanted or (0, n), precision)
    return sums, df


KINDS = {"exp": (), "gibbs": (1.0,), "power": (1.0, 2.0)}
LAYOUTS = [(0, 75, 150), (0, 0, 150), (75, 75, 150), (75, 75, 75), (60, 0, 150), (140, 0, 140)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [100, 250])
def test_layouts(kind, dim, many_processors, poisoned):
    """Every layout of regions; NaN between the features of two rows, and behind the last row."""
    n = 150
    wide = torch.full((n + 40, dim + 16 - dim % 8), torch.nan, dtype=torch.bfloat16)
    wide[:n, :dim] = torch.randn(n, dim) / dim**0.5
    f, scale = wide[:n, :dim], torch.rand(n) + 0.5
    for layout in LAYOUTS:
        ours = sweeps(cuda, Rows(f, scale), kind, KINDS[kind], Pairing(*layout))
        truth = sweeps(
            blocked, Rows(f.double(), scale.double()), kind, KINDS[kind], Pairing(*layout)
        )
        # Sums are relative to exp(shift), which each backend chooses.
        ratio = (ours[0][0].double() - truth[0][0]).exp()
        for k in (1, 2):
            assert relative_error(ours[0][k].double() * ratio, truth[0][k]) < 2e-6, (layout, k)
        assert relative_error(ours[1], truth[1]) < 4e-3, layout


ROWS = [4, 128, 130, 256, 384, 390, 520]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", ROWS)
def test_both_sides_of_a_tile(kind, n, many_processors, monkeypatch, poisoned):
    """One sum takes symmetric tiles: even and odd rings, rows that do not exist, runs of distances.

    The other kernels read every similarity twice. In every third layout, which changes with kind
    and n; in all under `make test-all`.
    """
    f, scale = torch.randn(n, 72).to(torch.bfloat16) / 8, torch.rand(n) + 0.5
    function = PairFunction(kind, KINDS[kind], torch.tensor(0.5), LOG_RANGE)
    turn, half = [*KINDS].index(kind) + ROWS.index(n), n // 2
    layouts = (0, half, n), (0, 0, n), (half, half, n), (half, 0, n)
    for layout in (x for k, x in enumerate(layouts) if is_due(turn + k, 3)):
        operands = (
            Rows(f, scale),
            Pairing(*layout),
            function,
            RowScalars(None),
            (Term.SHIFT, Term.F),
        )
        results = []
        for symmetric, workspace in ((None, gpu.WORKSPACE), (None, 12 * n), (False, 1 << 28)):
            monkeypatch.setattr(gpu, "WORKSPACE", workspace)
            with cuda.symmetric(symmetric):
                results.append(cuda.row_sums(*operands, ""))
        both, in_runs, one = (x[0].double().exp() * x[1].double() for x in results)
        assert relative_error(both, one) < 2e-6, layout
        assert relative_error(in_runs, one) < 2e-6, layout
        wide = Rows(f.double(), scale.double())
        double = function._replace(tau=torch.tensor(0.5, dtype=torch.float64))
        truth = blocked.row_sums(wide, operands[1], double, *operands[3:], "")
        assert relative_error(both, truth[0].exp() * truth[1]) < 2e-6, layout


def test_rows_that_are_no_columns_do_not_leak(poisoned):
    """The last tile of a rectangle's first side reaches into the second side's rows."""
    f = torch.randn(200, 64).to(torch.bfloat16)
    clean = sweeps(cuda, Rows(f), "exp", (), Pairing(70, 0, 200), (70, 200))
    f[90] = torch.inf
    f[120] = torch.nan
    spoilt = sweeps(cuda, Rows(f), "exp", (), Pairing(70, 0, 200), (70, 200))
    others = [row for row in range(70, 200) if row not in (90, 120)]
    assert torch.equal(clean[0][:, others], spoilt[0][:, others])
    others = [row - 70 for row in others]
    assert torch.equal(clean[1][others], spoilt[1][others])


def test_which_kernels_are_taken(monkeypatch):
    f, calls = torch.randn(40, 24).to(torch.bfloat16), []
    original = gpu._symmetric_sums
    monkeypatch.setattr(gpu, "_symmetric_sums", lambda *args: (calls.append(1), original(*args)))
    results = []
    for wanted in (None, False, True):
        with cuda.hopper(wanted):
            results.append(sweeps(cuda, Rows(f / 5), "exp", (), Pairing(0, 20, 40)))
        assert len(calls) == (0 if wanted is None else 1)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))
    with cuda.symmetric(True):
        sweeps(cuda, Rows(f / 5), "exp", (), Pairing(0, 20, 40))
    assert len(calls) == 2
    odd = torch.randn(40, 25).to(torch.bfloat16)
    with (
        cuda.symmetric(False),
        pytest.raises(RuntimeError, match=r"required of the kernels of hopper\.h"),
    ):
        sweeps(cuda, Rows(odd / 5), "exp", (), Pairing(0, 20, 40))
    with cuda.hopper(None):
        sweeps(cuda, Rows(odd / 5), "exp", (), Pairing(0, 20, 40))


# --- TF32 -----------------------------------------------------------------------------------------

#: Largest relative errors of losses with dτ, and of gradients.
OF_TF32 = (3e-5, 3e-4)


def tf32(*args, **setting):
    """Losses with dτ, and the gradients of both views."""
    loss, first, second, *rest = loss_and_grads(*args, backend="cuda", precision="tf32", **setting)
    return (loss, *rest), (first, second)


def float64(z1, z2, *member, **setting):
    loss, first, second, *rest = loss_and_grads(
        z1.double(), z2.double(), *member, backend="reference", **setting
    )
    return (loss, *rest), (first, second)


def errors_of(ours, truth):
    return [
        max(relative_error(a, b) for a, b in zip(*groups, strict=True))
        for groups in zip(ours, truth, strict=True)
    ]


@pytest.mark.parametrize("dim", [23, 64, 104, 128])
@pytest.mark.parametrize("member", MEMBERS, ids=member_id)
def test_tf32_against_float64(member, dim, poisoned):
    """And against mma.sync, which multiplies the same numbers. 23: rows of no vector load."""
    turn = MEMBERS.index(member) + dim // 32
    for negatives, symmetric in every_second_mode(turn):
        z1, z2 = pair(PAIRS, dim, torch.float32)
        setting = {"negatives": negatives, "symmetric": symmetric}
        ours, truth = tf32(z1, z2, *member, **setting), float64(z1, z2, *member, **setting)
        errors = errors_of(ours, truth)
        assert all(e < most for e, most in zip(errors, OF_TF32, strict=True)), (setting, errors)
        with cuda.hopper(False):
            others = tf32(z1, z2, *member, **setting)
        assert max(errors_of(ours, others)) < 2e-5, setting


@pytest.mark.parametrize("pairs", [1, 2, 33, 64, 65, 128, 129])
def test_sizes_of_tf32(pairs, many_processors, poisoned):
    """Fewer tiles than stages, which the rows pass through."""
    for negatives, symmetric in MODES:
        z1, z2 = pair(pairs, 100, torch.float32)
        setting = {"negatives": negatives, "symmetric": symmetric}
        ours, truth = (f(z1, z2, "infonce", **setting) for f in (tf32, float64))
        # few rows: errors of a loss do not average out
        assert errors_of(ours, truth)[0] < 10 * OF_TF32[0], setting
        with cuda.hopper(False):
            others = tf32(z1, z2, "infonce", **setting)
        assert max(errors_of(ours, others)) < 2e-5, setting


@pytest.mark.parametrize("dim", [64, 128])
def test_the_stages_of_tf32_go_round(dim, schedule, poisoned):
    """620 rows: five tiles of 128 columns or ten of 64, and three stages."""
    z1, z2 = pair(310, dim, torch.float32)
    first, truth = tf32(z1, z2, "infonce"), float64(z1, z2, "infonce")
    assert all(e < most for e, most in zip(errors_of(first, truth), OF_TF32, strict=True))
    for seed in (1, 6):
        schedule(seed)
        again = tf32(z1, z2, "infonce")
        same = (
            torch.equal(a, b)
            for x in zip(first, again, strict=True)
            for a, b in zip(*x, strict=True)
        )
        assert all(same), seed


def test_operands_that_are_cut_off_are_noticed(monkeypatch):
    z1, z2 = pair(PAIRS, 64, torch.float32)

    def cut_off(f):
        return (f.view(torch.int32) & ~0x1FFF).view(torch.float32)

    def loss_error():
        return errors_of(tf32(z1, z2, "infonce"), float64(z1, z2, "infonce"))[0]

    before = loss_error(), error_in_one_direction(64, "exp")
    monkeypatch.setattr(cuda, "rounded_rows", cut_off)
    after = loss_error(), error_in_one_direction(64, "exp")
    most = OF_TF32[0], IN_ONE_DIRECTION
    assert all(a < b < c / 2 for a, b, c in zip(before, most, after, strict=True)), (before, after)


#: Largest relative error of the gradient of rows that point in nearly the same direction. Roundings
#: average out, and what is cut off does not: 2⁻¹² or more is left of it.
IN_ONE_DIRECTION = 1.2e-4


def error_in_one_direction(dim, kind):
    noise = torch.randn(300, dim, generator=torch.Generator().manual_seed(3))
    f = torch.nn.functional.normalize(1 + 0.2 * noise, dim=1)
    operands = kind, KINDS[kind], Pairing(0, 0, 300)
    ours = sweeps(cuda, Rows(f), *operands, precision="tf32")
    truth = sweeps(blocked, Rows(f.double()), *operands)
    return relative_error(ours[1], truth[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [64, 100])
def test_gradients_of_rows_in_one_direction(dim, kind):
    """Rows and weights are rounded to nearest."""
    assert error_in_one_direction(dim, kind) < IN_ONE_DIRECTION


def test_rows_are_rounded_to_tf32():
    """To nearest, ties away from 0; NaN and infinity stay what they are."""
    bits = [0x3F801000, 0x3F800FFF, 0xBF801000, 0x3F802FFF, 0x7F7FFFFF, 0x7F800000, 0xFF800000,
            0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x00000FFF, 0x80000000, 0]  # fmt: skip
    wanted = [0x3F802000, 0x3F800000, 0xBF802000, 0x3F802000, 0x7F800000, 0x7F800000, 0xFF800000,
              None, None, None, 0, 0x80000000, 0]  # fmt: skip
    wide = torch.full((3, 17), torch.nan)
    f = wide[:, 1:14]
    f.copy_(torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32))
    rounded = cuda.rounded_rows(f)
    assert rounded.stride(0) % 4 == 0
    for row in rounded:
        for got, value in zip(row.contiguous().view(torch.int32).tolist(), wanted, strict=True):
            assert got % 2**32 == value if value is not None else (got & 0x7FFFFFFF) > 0x7F800000


@pytest.mark.parametrize("dim", [64, 128])
def test_nan_in_rows_of_tf32(dim):
    """One feature of a row: what it meets is NaN, and nothing else."""
    z1, z2 = pair(PAIRS, dim, torch.float32)
    z1[5, 3] = torch.nan
    setting = {"negatives": "cross_view", "symmetric": False, "reduction": "none"}

    def found(views, **how):
        z1, z2 = (z.clone().requires_grad_() for z in views)
        losses = alpha_cl_loss(z1, z2, "alpha_direct", temperature=0.3, **setting, **how)
        return losses.detach(), *torch.autograd.grad(losses.sum(), (z1, z2))

    ours = found((z1, z2), backend="cuda", precision="tf32")
    truth = found((z1.double(), z2.double()), backend="reference")
    for a, b in zip(ours, truth, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        known = ~b.isnan()
        assert not known.any() or relative_error(a[known], b[known]) < OF_TF32[1]


def test_launches_that_round_rows(monkeypatch):
    """Each sweep on warpgroups has one more launch; the tiles of mma.sync are rounded by itself."""
    z1, z2 = pair(20, 24, torch.float32)
    started, run = [], cuda._run
    monkeypatch.setattr(cuda, "_run", lambda name, *how: (started.append(name), run(name, *how)))

    def launches_of(precision):
        started.clear()
        loss_and_grads(z1, z2, "infonce", backend="cuda", precision=precision)
        return [name.removeprefix("alphacl_cuda_") for name in started]

    assert launches_of("tf32") == ["rows", *["rounded_rows", "sweep"] * 2, "rows"]
    with cuda.hopper(None):
        assert launches_of("ieee") == ["rows", "sweep", "sweep", "rows"]
    with cuda.hopper(False):
        assert launches_of("tf32") == ["rows", "sweep", "sweep", "rows"]


def test_a_plan_rounds_the_rows_of_every_step(many_processors):
    """The second call is recorded, the third one replayed for other views."""
    loss = FusedAlphaCLLoss(backend="cuda", precision="tf32")
    for seed in range(4):
        torch.manual_seed(seed)
        z1, z2 = (z.requires_grad_() for z in pair(70, 40, torch.float32))
        value = loss(z1, z2)
        grads = torch.autograd.grad(value, (z1, z2))
        with cuda.hopper(False):
            other = FusedAlphaCLLoss(backend="cuda", precision="tf32")(z1, z2)
            wanted = torch.autograd.grad(other, (z1, z2))
        assert relative_error(value.detach(), other.detach()) < 1e-6
        assert max(map(relative_error, grads, wanted)) < 2e-5, seed


def test_layouts_of_tf32(many_processors, poisoned):
    """Every layout of regions, of rows that begin anywhere."""
    n, dim = 150, 101
    wide = torch.full((n + 40, dim + 2), torch.nan)
    wide[:n, :dim] = torch.randn(n, dim) / dim**0.5
    f, scale = wide[:n, :dim], torch.rand(n) + 0.5
    for kind, layout in zip([*KINDS, *KINDS], LAYOUTS, strict=True):
        operands = kind, KINDS[kind], Pairing(*layout)
        ours = sweeps(cuda, Rows(f, scale), *operands, precision="tf32")
        truth = sweeps(blocked, Rows(f.double(), scale.double()), *operands)
        ratio = (ours[0][0].double() - truth[0][0]).exp()
        for k in (1, 2):
            assert relative_error(ours[0][k].double() * ratio, truth[0][k]) < 1e-4, (layout, k)
        # of weights and rows of either sign
        assert relative_error(ours[1], truth[1]) < 2 * OF_TF32[1], layout


def test_longer_rows_of_tf32_take_other_kernels():
    assert cuda.has_wgmma_kernels("tf32", "exp", (), 128)
    assert not cuda.has_wgmma_kernels("tf32", "exp", (), 129)
    assert not cuda.has_wgmma_kernels("fp32", "exp", (), 64)
    f, operands = torch.randn(40, 132) / 12, ("exp", (), Pairing(0, 20, 40))
    ours = sweeps(cuda, Rows(f), *operands, precision="tf32")
    truth = sweeps(blocked, Rows(f.double()), *operands)
    assert relative_error(ours[1], truth[1]) < 2 * OF_TF32[1]
