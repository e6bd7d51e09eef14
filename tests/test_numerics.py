"""Rounding, extreme temperatures, degenerate rows: against the float64 oracle on the same
(rounded) inputs.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from family import (
    BACKENDS,
    BUILT_IN,
    FULL,
    MEMBERS,
    MODES,
    SLOW,
    backends_for,
    in_turn,
    is_due,
    loss_and_grads,
    member_id,
    pair,
    relative_error,
    sampled,
    two_sweeps,
)

from alphacl_fast import (
    FusedAlphaCLLoss,
    MatryoshkaLoss,
    loss_against,
    objectives,
    ops,
    siglip_loss,
    supcon_loss,
    zoo,
)
from alphacl_fast.bundles import Term
from alphacl_fast.functional import SIMILARITIES, alpha_cl_loss

NORMALIZED = [
    "infonce",
    "alpha_direct",
    "alpha_entropy",
    "alpha_inverse",
    "alpha_square",
    "alpha_gamma",
    "soft_triplet",
]
#: Backends that run at full speed, and those that are interpreted or emulated.
FAST = [name for name in BACKENDS if name not in SLOW]
SLOW_HERE = [name for name in BACKENDS if name in SLOW]


def assert_as_good_as_eager(backends, member, batches, factor=2.0, few=None, **setting):
    """Over some float32 batches our RMS error is at most ``factor`` × eager's (the dense loss, same
    dtype) + one rounding. Slow backends meet the first ``few`` batches.

    One batch would compare two random numbers. Row losses and gradients are vectors; dτ is a single
    number per batch, whose RMS over a dozen batches is itself only known within a factor of 2,
    hence twice the bound.
    """
    assert backends, "nothing would be compared"
    fast, errors = [name for name in backends if name not in SLOW], {}
    for k, (z1, z2) in enumerate(batches):
        wide = z1.double(), z2.double()
        truth = loss_and_grads(*wide, *member, backend="reference", reduction="none", **setting)
        for backend in ("reference", *(backends if few is None or k < few else fast)):
            found = loss_and_grads(z1, z2, *member, backend=backend, reduction="none", **setting)
            for name, x, t in zip(("loss", "dz1", "dz2", "dtau"), found, truth, strict=False):
                assert backend == "reference" or torch.isfinite(x).all(), (backend, name)
                # dτ is a sum of terms of either sign and order 1: its rounding is not relative to
                # its value.
                floor = 0.1 if name == "dtau" else 1e-3
                errors.setdefault((backend, name), []).append(relative_error(x, t, floor) ** 2)

    def rms(squares):
        return (sum(squares) / len(squares)) ** 0.5

    for (backend, name), squares in errors.items():
        ours, eager = rms(squares), rms(errors["reference", name][: len(squares)])
        bound = (2 * factor if name == "dtau" else factor) * eager + 4 * torch.finfo(
            torch.float32
        ).eps
        assert ours <= bound, (backend, name, setting, ours, eager)


IN_TWO_MODES = [
    (member, mode)
    for (m, member), (k, mode) in itertools.product(enumerate(MEMBERS), enumerate(MODES))
    if is_due(m + k, 2)
]


@pytest.mark.parametrize(
    ("member", "mode"), IN_TWO_MODES, ids=[f"{mode}-{member_id(m)}" for m, mode in IN_TWO_MODES]
)
def test_float32_as_good_as_eager(member, mode, medium_tiles, poisoned):
    """In every second mode and in one similarity, which change from member to member; in all under
    `make test-all`.
    """
    # The hinge and the power weights have kinks at which float32 and float64 may differ; random
    # data stays away.
    batches = [pair(14, 12, torch.float32, seed=seed) for seed in range(12)]
    for similarity in in_turn(SIMILARITIES, MEMBERS.index(member) + MODES.index(mode)):
        # Rows of length about 1: with long ones a single pair carries each row's weight, and its
        # rounding is pure luck.
        length = 1.0 if similarity == "cosine" else 3.0
        if similarity == "dot" and member[1].get("exponent", 4) < 2:
            # At d² = 0 the slope of (d²)^0.75 has no bound, so the rounding of one pair there would
            # decide: rows this short keep d² away from 0.
            length = 12.0
        views = [(z1 / length, z2 / length) for z1, z2 in batches]
        setting = {"negatives": mode[0], "symmetric": mode[1], "similarity": similarity}
        assert_as_good_as_eager(backends_for(member), member, views, few=3, **setting)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NORMALIZED)
@pytest.mark.parametrize("tau", TAUS := [0.5, 0.05, 0.02])
def test_half_precision_inputs(dtype, name, tau, medium_tiles):
    """float32 loss, gradient of the input's dtype right to that dtype's rounding: normalised
    rows are never rounded.
    """
    z1, z2 = pair(40, 32, dtype)
    truth = loss_and_grads(z1.double(), z2.double(), name, tau=tau, backend="reference")
    turn = NORMALIZED.index(name) + TAUS.index(tau) + (dtype == torch.float16)
    for backend in BACKENDS:
        if backend in SLOW and not is_due(turn, 3):
            continue
        ours = loss_and_grads(z1, z2, name, tau=tau, backend=backend)
        assert ours[0].dtype == torch.float32
        assert ours[1].dtype == dtype
        assert relative_error(ours[0], truth[0]) < 1e-5, backend
        tiny = torch.finfo(
            dtype
        ).tiny  # below it a gradient has lost its digits to the dtype's range, not to us
        for o, t in zip(ours[1:3], truth[1:3], strict=True):
            representable = t.abs() > tiny
            error = (o.double() - t)[representable].norm() / t[representable].norm().clamp(
                min=1e-30
            )
            assert error < 0.5 * torch.finfo(dtype).eps, backend
            assert ((o.double() - t)[~representable].abs() <= tiny).all(), backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tau", [0.1, 0.05, 0.03, 0.02])
def test_converged_regime(backend, tau):
    """Positives all but coincide, negatives are orthogonal: the loss goes from 1e-2 to 1e-19.

    `softmax − onehot` cancels here (cross-entropy is off by 5 % at τ = 0.05 and by all of it at τ =
    0.03).
    """
    q, _ = torch.linalg.qr(torch.randn(140, 140, dtype=torch.float64))
    z1 = q[:128].float()
    z2 = (q[:128] + 0.01 * torch.randn(128, 140, dtype=torch.float64)).float()
    truth = loss_and_grads(z1.double(), z2.double(), "infonce", tau=tau, backend="reference")
    ours = loss_and_grads(z1, z2, "infonce", tau=tau, backend=backend)
    assert abs(float(truth[0])) < 0.02
    for o, t in zip(ours, truth, strict=True):
        assert relative_error(o, t, floor=0.0) < 1e-5
    if tau <= 0.05:  # the bar above means something: cross-entropy misses it by far
        views = [z.requires_grad_() for z in (z1, z2)]
        f = F.normalize(torch.cat(views), dim=1)
        logits = (f @ f.t() / tau).masked_fill(torch.eye(256, dtype=torch.bool), -math.inf)
        cross_entropy = F.cross_entropy(logits, torch.arange(256).roll(128))
        (grad,) = torch.autograd.grad(cross_entropy, z1)
        assert relative_error(-0.5 * grad, truth[1], floor=0.0) > (0.01 if tau == 0.05 else 0.3)


def views_of_positives(z1, z2):
    """t⁺ of unit rows."""
    return (F.normalize(z1, dim=1) * F.normalize(z2, dim=1)).sum(1)


def ids_of(*views):
    """Rows of both views, with the index of the pair as id."""
    return torch.cat(views), torch.arange(len(views[0])).repeat(len(views))


#: The public losses as functions of two views and τ, or what stands for it.
PUBLIC = {
    "loss_against": lambda x, y, tau: loss_against(
        F.normalize(x, dim=1), F.normalize(y, dim=1), views_of_positives(x, y), temperature=tau,
        ids=torch.arange(len(x)), negative_ids=torch.arange(len(x)),
    ),
    "siglip_loss": lambda x, y, tau: siglip_loss(x, y, scale=2 / tau, bias=-1 / tau),
    "MatryoshkaLoss": lambda x, y, tau: MatryoshkaLoss(
        FusedAlphaCLLoss(temperature=tau), (140, 139)
    )(x, y),
    **{
        f"supcon_loss({form})": lambda x, y, tau, form=form: supcon_loss(
            *ids_of(x, y), form=form, temperature=tau
        )
        for form in ("out", "in", "sincere")
    },
    "supcon_loss(three of an id)": lambda x, y, tau: supcon_loss(
        *ids_of(x, y, x + y), form="sincere", temperature=tau
    ),
    **{
        f"zoo.{name}": lambda x, y, tau, name=name: getattr(zoo, name)(x, y, temperature=tau)
        for name in ("dcl", "dclw", "debiased", "hcl", "dhel", "rince", "adnce", "macl")
    },
    "zoo.SogCLR": lambda x, y, tau: zoo.SogCLR(128, temperature=tau)(x, y, torch.arange(128)),
    "zoo.ISogCLR": lambda x, y, tau: zoo.ISogCLR(
        128, temperature=tau, temperature_range=(tau, tau)
    )(x, y, torch.arange(128)),
    "zoo.multi_similarity": lambda x, y, tau: zoo.multi_similarity(*ids_of(x, y), beta=1 / tau),
    "zoo.circle": lambda x, y, tau: zoo.circle(*ids_of(x, y), gamma=4 / tau),
    "zoo.tuplet_margin": lambda x, y, tau: zoo.tuplet_margin(*ids_of(x, y), scale=1 / tau),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_converged_regime_of_every_loss(name):
    """As above, where weights fall to 1e-12: the gradient keeps its digits in float32."""
    q, _ = torch.linalg.qr(torch.randn(140, 140, dtype=torch.float64))
    z1 = q[:128].float()
    z2 = (q[:128] + 0.01 * torch.randn(128, 140, dtype=torch.float64)).float()
    for tau in (0.1, 0.035):
        found = []
        for dtype in (torch.float32, torch.float64):
            leaves = [z.to(dtype).requires_grad_() for z in (z1, z2)]
            found.append(torch.autograd.grad(PUBLIC[name](*leaves, tau), leaves))
        for ours, truth in zip(*found, strict=True):
            assert relative_error(ours, truth, floor=0.0) < 2e-5, tau


TEMPERATURES = [
    (member, tau)
    for (m, member), (k, tau) in itertools.product(
        enumerate(BUILT_IN), enumerate([1e-3, 5e-3, 0.02, 0.1, 1.0, 5.0])
    )
    if is_due(m + k, 2)
]


@pytest.mark.parametrize(
    ("member", "tau"), TEMPERATURES, ids=[f"{tau}-{member_id(m)}" for m, tau in TEMPERATURES]
)
def test_temperatures(member, tau, small_tiles):
    """Each member at every second temperature; at all under `make test-all`."""
    z1, z2 = pair(17, 8, torch.float64)
    truth = loss_and_grads(z1, z2, *member, tau=tau, backend="reference")
    rounded = None
    if member[0] == "infonce":
        rounded = loss_and_grads(
            z1.float().double(), z2.float().double(), *member, tau=tau, backend="reference"
        )
    for backend in backends_for(member):
        ours = loss_and_grads(z1, z2, *member, tau=tau, backend=backend)
        for o, t in zip(ours, truth, strict=True):
            assert relative_error(o, t, floor=max(1e-3, float(t.abs().max()) * 1e-3)) < 1e-8, (
                backend
            )
        single = loss_and_grads(z1.float(), z2.float(), *member, tau=tau, backend=backend)
        assert all(torch.isfinite(x).all() for x in single), backend
        if rounded:
            for o, t in zip(single, rounded, strict=True):
                # α itself is only that good in float32
                assert relative_error(o, t) < 2e-6 + 2e-7 / tau, backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_cosine_ignores_the_scale_of_rows(backend, scale):
    z1, z2 = pair(20, 6, torch.float32)
    for name in ("infonce", "uniform"):
        base = loss_and_grads(z1, z2, name, backend=backend)
        scaled = loss_and_grads(z1 * scale, z2 * scale, name, backend=backend)
        assert relative_error(scaled[0], base[0]) < 1e-5
        for s, b in zip(scaled[1:3], base[1:3], strict=True):
            assert relative_error(s.double() * scale, b) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("raw", [False, True], ids=["unit_rows", "torch"])
def test_rows_of_every_length_in_one_batch(backend, dtype, raw, monkeypatch):
    """Lengths from 2⁻¹⁰⁰ to 2¹⁰⁰, whose products float32 does not hold: a power of two changes
    nothing, whether the backend or PyTorch normalises.
    """
    if raw:
        monkeypatch.setattr(ops, "has", lambda backend, step: False)
    z1, z2 = pair(20, 17, dtype)
    lengths = (2.0 ** torch.linspace(-100, 100, 20).round()).unsqueeze(1)
    base = loss_and_grads(z1, z2, "infonce", backend=backend)
    scaled = loss_and_grads(
        (z1 * lengths).to(dtype), (z2 * lengths.flip(0)).to(dtype), "infonce", backend=backend
    )
    assert relative_error(scaled[0], base[0]) < 1e-5
    for s, b, by in zip(scaled[1:3], base[1:3], (lengths, lengths.flip(0)), strict=True):
        # float32 rounds products of rows that are scaled apart elsewhere
        assert relative_error(s.double() * by, b.double()) < (1e-5 if dtype.itemsize > 2 else 2**-8)


LARGE_LOGITS = [
    ("alpha_square", {"detach_alpha": False}),
    ("alpha_gamma", {"detach_alpha": False}),
    ("alpha_entropy", {}),
    ("soft_triplet", {}),
    ("infonce", {"epsilon": 0.0, "temperature_scaled": True}),
]


@pytest.mark.parametrize("member", LARGE_LOGITS, ids=member_id)
@pytest.mark.parametrize("tau", [1e-3, 0.05])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_small_temperatures_and_long_rows_in_float32(member, tau, scale):
    """Where |t|/τ is large, terms of size |t|/τ must not be subtracted from each other.

    Slow backends meet one similarity, and a min player's many sweeps once; all under `make
    test-all`.
    """
    batches = [
        (z1 * scale, z2 * scale)
        for z1, z2 in (pair(30, 16, torch.float32, seed=seed) for seed in range(8))
    ]
    many_sweeps = isinstance(objectives.make(*member), objectives.MinPlayer)
    case = 2 * (tau == 0.05) + (scale == 10)
    turn = LARGE_LOGITS.index(member) + case
    for k, similarity in enumerate(SIMILARITIES):
        slow_too = is_due(k + turn, 3) and is_due(case, 4 if many_sweeps else 1)
        backends = [name for name in BACKENDS if name not in SLOW or slow_too]
        assert_as_good_as_eager(
            backends, member, batches, factor=3.0, tau=tau, similarity=similarity
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_min_player_of_enormous_similarities(backend):
    z1, z2 = pair(8, 4, torch.float32)
    out = loss_and_grads(z1 * 1e10, z2 * 1e10, "alpha_square", similarity="dot", backend=backend)
    truth = loss_and_grads(
        z1.double() * 1e10,
        z2.double() * 1e10,
        "alpha_square",
        similarity="dot",
        backend="reference",
    )
    for o, t in zip(out, truth, strict=True):
        assert relative_error(o, t) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["alpha_square", "alpha_gamma"])
def test_min_player_of_equal_similarities(backend, name):
    """Every negative weighs 1/|Neg|: the root lies at the very end of Newton's bracket."""
    z1, z2 = torch.ones(12, 6, dtype=torch.float64), pair(12, 6)[1]
    losses = alpha_cl_loss(
        z1, z2, name, temperature=0.3, negatives="one_view", reduction="none", backend=backend
    )
    torch.testing.assert_close(losses, 1 - F.cosine_similarity(z1, z2), rtol=1e-10, atol=1e-12)


def degenerate_batches():
    z = torch.randn(12, 6)
    duplicated = z[:3].repeat(4, 1)
    return {
        "all rows equal": (torch.ones(12, 6), torch.ones(12, 6)),
        "duplicated": (duplicated, duplicated.clone()),
        "antipodal positives": (z, -z),
        "zero rows": (torch.cat([z[:6], torch.zeros(6, 6)]), torch.cat([torch.zeros(3, 6), z[3:]])),
        "all zero": (torch.zeros(12, 6), torch.zeros(12, 6)),
        "huge": (z * 1e18, z * 1e18 + 1e18),
        "largest": (torch.full((12, 6), 3e38), z.sign() * 3e38),
        "tiny": (z * 1e-38, z * 1e-38),
        "denormal": (z * 1e-42, z * 1e-42),
    }


@pytest.mark.parametrize(("backend", "member"), **sampled(BUILT_IN))
@pytest.mark.parametrize("tau", [1e-3, 0.5])
def test_degenerate_rows_stay_finite(backend, member, tau, small_tiles):
    """In one mode, which changes from batch to batch; in all under `make test-all`."""
    turn = BUILT_IN.index(member) + (tau < 0.1)
    for k, (case, views) in enumerate(degenerate_batches().items()):
        for negatives, symmetric in in_turn(MODES, k + turn):
            setting = {"tau": tau, "negatives": negatives, "symmetric": symmetric}
            out = loss_and_grads(*views, *member, backend=backend, **setting)
            for name, x in zip(("loss", "dz1", "dz2", "dtau"), out, strict=False):
                assert torch.isfinite(x).all(), (case, name, setting, x)


@pytest.mark.parametrize(("backend", "member"), **sampled(BUILT_IN))
@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
def test_degenerate_rows_unnormalized(backend, similarity, member, small_tiles):
    """In one mode, which changes from batch to batch; in all under `make test-all`."""
    batches = degenerate_batches()
    for case in ("huge", "largest"):
        del batches[case]  # t ~ 1e36: the products of such numbers leave float32's range
    turn = BUILT_IN.index(member) + (similarity == "dot")
    for k, (case, views) in enumerate(batches.items()):
        for negatives, symmetric in in_turn(MODES, k + turn):
            setting = {"similarity": similarity, "negatives": negatives, "symmetric": symmetric}
            out = loss_and_grads(*views, *member, tau=0.05, backend=backend, **setting)
            for name, x in zip(("loss", "dz1", "dz2", "dtau"), out, strict=False):
                assert torch.isfinite(x).all(), (case, name, setting, x)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("negatives", "symmetric"), MODES)
def test_zero_row_has_zero_gradient(negatives, symmetric, backend):
    z1, z2 = pair(8, 4)
    z1[3] = 0
    setting = {"negatives": negatives, "symmetric": symmetric, "backend": backend}
    _, d1, d2, *_ = loss_and_grads(z1, z2, "infonce", **setting)
    assert (d1[3] == 0).all()
    assert (d1[2] != 0).all()
    assert torch.isfinite(d2).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_euclidean_far_from_the_origin(backend):
    z1, z2 = pair(40, 16)
    z1, z2 = (z1 + 100).float(), (z2 + 100).float()
    truth = loss_and_grads(
        z1.double(), z2.double(), "infonce", similarity="euclidean", backend="reference"
    )
    ours = loss_and_grads(z1, z2, "infonce", similarity="euclidean", backend=backend)
    for o, t in zip(ours, truth, strict=True):
        assert relative_error(o, t) < 1e-4  # a plain Gram matrix of the rows as given: 0.3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["alpha_square", "alpha_gamma"])
@pytest.mark.parametrize("tau", [1e-3, 0.05, 1.0])
def test_float32_min_players_sum_to_one(backend, name, tau, monkeypatch):
    from alphacl_fast.autograd import Sweeps

    two_sweeps(monkeypatch)  # a native step is recorded, and its sums are not seen here
    masses = []
    original = objectives.MinPlayer.solve

    def spy(self, p, learn_tau):
        rows = original(self, p, learn_tau)
        masses.append(p.sums((Term.F,), shift=rows.shift, argument_offset=rows.argument_offset)[0])
        assert isinstance(p, Sweeps)
        return rows

    monkeypatch.setattr(objectives.MinPlayer, "solve", spy)
    # several tiles of 512 rows, or of 256
    z1, z2 = pair(500 if FULL or backend not in SLOW else 250, 32, torch.float32)
    loss_and_grads(z1, z2, name, tau=tau, backend=backend)
    assert float((masses[0] - 1).abs().max()) < 2e-6


@pytest.mark.parametrize(
    "name", ["infonce", "alpha_direct", "alpha_square", "modified_triplet", "mine"]
)
def test_float32_at_real_size(name):
    """More tiles than one, at sizes where float32 sums could drift.

    (Of millions of hinges some flip in the last digit. Solving takes an interpreter many sweeps.)
    """
    for backends, n in ((FAST, 560), (SLOW_HERE, 125 if name == "alpha_square" else 250)):
        batches = [pair(n, 24, torch.float32, seed=seed) for seed in range(3)]
        assert_as_good_as_eager(backends, (name, {}), batches)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("name", ["uniform", "triplet_contrastive"])
def test_closed_forms_do_not_round_in_one_direction(name, similarity):
    """Sums over n equal numbers: one after the other they lose 1e-5 of the gradient at this
    size.
    """
    z1, z2 = pair(1283, 16, torch.float32)
    truth = loss_and_grads(z1.double(), z2.double(), name, similarity=similarity)
    ours = loss_and_grads(z1, z2, name, similarity=similarity)
    for o, t in zip(ours[1:], truth[1:], strict=True):
        assert relative_error(o, t, floor=0.0) < 1e-6
