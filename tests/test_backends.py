"""The sweep backends against the oracle, from one table: every objective × mode × similarity ×
reduction.
"""

import itertools

import pytest
import torch
from conftest import set_tiles
from family import (
    BACKENDS,
    MEMBERS,
    MODES,
    REPRESENTATIVE,
    SERVED,
    SLOW,
    backends_for,
    every_setting,
    in_turn,
    is_due,
    loss_and_grads,
    member_id,
    members_for,
    pair,
    relative_error,
    rotated,
    served_by,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from alphacl_fast import objectives, ops
from alphacl_fast.backend import blocked, cpu
from alphacl_fast.bundles import PairFunction, Pairing, Rows, RowScalars, Term, Weight
from alphacl_fast.functional import NEGATIVES, REDUCTIONS, SIMILARITIES, alpha_cl_loss

#: The CUDA kernels have a table of their own, at sizes of their tiles: tests/test_cuda.py.
HERE = [name for name in BACKENDS if name != "cuda"]
ROTATED = [(MEMBERS.index(member), *rest) for member, *rest in rotated()]


def backends_of(member, setting, reduction):
    """Slow backends run every second case of `rotated`, the others all."""
    m, mode = MEMBERS.index(member), MODES.index(setting[:2])
    interpreted = (m, *setting, reduction) in ROTATED and is_due(m + mode, 2)
    return [name for name in HERE if (name, member) in SERVED and (name not in SLOW or interpreted)]


def reductions_of(member, setting):
    """The reductions to test: all for representative members, otherwise the one of `rotated`, or
    one in turn in a setting that `rotated` leaves out.
    """
    if member in REPRESENTATIVE:
        return REDUCTIONS
    m = MEMBERS.index(member)
    here = [case[-1] for case in ROTATED if case[:-1] == (m, *setting)]
    return here or in_turn(REDUCTIONS, m + every_setting().index(setting))


def test_every_pair_of_values_occurs():
    axes = zip(
        *(
            (member, (negatives, symmetric), *rest)
            for member, negatives, symmetric, *rest in ROTATED
        ),
        strict=True,
    )
    for first, second in itertools.combinations(axes, 2):
        assert {*zip(first, second, strict=True)} == {*itertools.product(first, second)}


@pytest.mark.parametrize(
    "setting", every_setting(), ids=lambda setting: "-".join(map(str, setting))
)
@pytest.mark.parametrize("member", MEMBERS, ids=member_id)
def test_equals_reference(member, setting, small_tiles, poisoned):
    # several tiles in every mode, the last ones ragged
    z1, z2 = pair(7 if setting[0] == "two_view" else 9, 6)
    for reduction in reductions_of(member, setting):
        given = {**setting_of(setting), "reduction": reduction}
        truth = loss_and_grads(z1, z2, *member, backend="reference", **given)
        for backend in backends_of(member, setting, reduction):
            ours = loss_and_grads(z1, z2, *member, backend=backend, **given)
            for name, a, b in zip(("loss", "dz1", "dz2", "dtau"), ours, truth, strict=False):
                assert relative_error(a, b) < 1e-10, (backend, name, reduction)
            if backend in SLOW and member not in REPRESENTATIVE:
                continue  # without a gradient their kernels are the same
            with torch.no_grad():
                value = alpha_cl_loss(
                    z1, z2, objectives.make(*member), temperature=0.3, backend=backend, **given
                )
            assert relative_error(value, truth[0]) < 1e-10, (backend, reduction)


def setting_of(setting):
    return dict(zip(("negatives", "symmetric", "similarity"), setting, strict=True))


#: Member and setting of each case of `rotated`.
ONE_SIDED = [
    (MEMBERS[m], tuple(setting))
    for m, *setting in dict.fromkeys(tuple(case[:-1]) for case in ROTATED)
]


@pytest.mark.parametrize(
    ("member", "setting"),
    ONE_SIDED,
    ids=["-".join(map(str, (member_id(m), *setting))) for m, setting in ONE_SIDED],
)
def test_one_sided_gradient(member, setting, small_tiles, poisoned):
    objective, views = objectives.make(*member), pair(7, 4)
    case = MEMBERS.index(member), *setting
    reductions = [reduction for *rest, reduction in ROTATED if tuple(rest) == case]

    def one_sided(backend, side, reduction):
        leaves = [view.clone().requires_grad_(k == side) for k, view in enumerate(views)]
        loss = alpha_cl_loss(
            *leaves,
            objective,
            temperature=0.3,
            reduction=reduction,
            backend=backend,
            **setting_of(setting),
        )
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaves[side])

    for reduction, side in itertools.product(reductions, (0, 1)):
        expected = one_sided("reference", side, reduction)
        for backend in backends_for(member):
            for ours, truth in zip(one_sided(backend, side, reduction), expected, strict=True):
                assert relative_error(ours, truth) < 1e-10, (backend, side, reduction)


@pytest.mark.parametrize("backend", HERE)
def test_any_shape(backend):
    @settings(max_examples=20 if backend in SLOW else 60, deadline=None)
    @given(
        n=st.integers(2, 23),
        d=st.integers(1, 9),
        tile=st.integers(1, 12),
        member=st.sampled_from(served_by(backend)),
        negatives=st.sampled_from(NEGATIVES),
        similarity=st.sampled_from(SIMILARITIES),
        reduction=st.sampled_from(REDUCTIONS),
        tau=st.floats(0.02, 5.0),
        symmetric=st.booleans(),
    )
    def search(n, d, tile, member, **setting):
        with pytest.MonkeyPatch.context() as patch:
            set_tiles(patch, tile)
            z1, z2 = pair(n, d, seed=n * 31 + d)
            truth = loss_and_grads(z1, z2, *member, backend="reference", **setting)
            ours = loss_and_grads(z1, z2, *member, backend=backend, **setting)
        for a, b in zip(ours, truth, strict=True):
            assert relative_error(a, b, floor=max(1e-3, float(b.abs().max()) * 1e-3)) < 1e-8

    search()


@pytest.mark.parametrize("member", MEMBERS, ids=member_id)
def test_derivatives_of_the_formulas(member):
    """df and dtau of every pair kind, and φ′, are the derivatives of f and φ."""
    objective = objectives.make(*member)
    if isinstance(objective, objectives.ClosedForm):
        return
    log = objectives.kind(objective.kind).log
    kind = objectives.kind(objective.kind).bind(objective.params(1.0))
    x = torch.linspace(-1.9, -0.05, 40, dtype=torch.float64).requires_grad_()
    tau = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(kind.f(x, tau).sum(), x)
    torch.testing.assert_close(kind.df(x.detach(), tau.detach()), dx, rtol=1e-12, atol=1e-14)
    if kind.dtau is not None:
        for value in x.detach():
            (dtau,) = torch.autograd.grad(kind.f(value, tau), tau)
            torch.testing.assert_close(kind.dtau(value, tau.detach()), dtau, rtol=1e-12, atol=1e-14)
    if hasattr(objective, "dphi"):
        xi = torch.linspace(-3, 40, 50, dtype=torch.float64)
        if not log:
            xi = xi.abs() + 0.1
        xi.requires_grad_()
        (dphi,) = torch.autograd.grad(objective.phi(xi, tau.detach()).sum(), xi)
        torch.testing.assert_close(
            objective.dphi(xi.detach(), tau.detach()), dphi, rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_batch_order_does_not_matter(backend, symmetric, small_tiles):
    z1, z2 = pair(14, 5)
    order = torch.randperm(14)
    for negatives in NEGATIVES:
        a = loss_and_grads(
            z1, z2, "alpha_direct", backend=backend, negatives=negatives, symmetric=symmetric
        )
        b = loss_and_grads(
            z1[order],
            z2[order],
            "alpha_direct",
            backend=backend,
            negatives=negatives,
            symmetric=symmetric,
        )
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x[order] if x.dim() else x, y, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_repeatable(backend):
    z1, z2 = pair(600 if backend == "cpu" else 300, 16, torch.float32)  # several tiles
    for member in members_for(backend):
        first, second = (
            loss_and_grads(z1, z2, *member, backend=backend, learn_tau=False) for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), member_id(member)


#: The backends that run on threads of the CPU, with the members that they serve.
THREADED = [(backend, member) for backend, member in SERVED if backend not in SLOW]


@pytest.mark.parametrize(
    ("backend", "member"), THREADED, ids=[f"{b}-{member_id(m)}" for b, m in THREADED]
)
def test_bitwise_repeatable_on_several_threads(backend, member, one_thread, monkeypatch):
    """Which thread takes which tile, and when, differs between calls; no bit of a result does.

    Most calls, and those of most tiles, are of the representative members, which have every form of
    a sweep.
    """
    monkeypatch.setattr(blocked, "tile_size", lambda n, device: min(n, 24))
    monkeypatch.setattr(cpu, "WORK_PER_THREAD", 1)
    monkeypatch.setattr(cpu, "block_rows", lambda n, sizes: min(n, 24))
    n = 150 if backend == "cpu" or member in REPRESENTATIVE else 75
    z1, z2 = pair(n, 16, torch.float32)
    torch.set_num_threads(4)
    calls = 6 if member in REPRESENTATIVE else 3
    first, *others = (
        loss_and_grads(z1, z2, *member, backend=backend, learn_tau=False) for _ in range(calls)
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["uniform", "triplet_contrastive"])
def test_closed_forms_do_no_pairwise_work(backend, name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a sweep ran")

    for module in ops.SWEEP_BACKENDS.values():
        monkeypatch.setattr(module, "row_sums", refuse)
        monkeypatch.setattr(module, "pair_grad", refuse)
    z1, z2 = pair(200_000, 4, torch.float32)  # (2·200,000)² would be 640 GB
    loss = loss_and_grads(z1, z2, name, backend=backend)
    assert all(torch.isfinite(x).all() for x in loss)


SWEEPS = {  # objective: (row_sums, pair_grad) calls of loss + gradient
    "triplet": (0, 1),
    "modified_triplet": (0, 1),
    "infonce": (1, 1),
    "soft_triplet": (1, 1),
    "alpha_direct": (1, 1),
    "alpha_entropy": (1, 1),
    "alpha_inverse": (1, 1),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_number_of_sweeps(name, monkeypatch):
    calls = {"row_sums": 0, "pair_grad": 0}
    for op in calls:
        original = getattr(blocked, op)

        def counted(*args, op=op, original=original):
            calls[op] += 1
            return original(*args)

        monkeypatch.setattr(blocked, op, counted)
    z1, z2 = pair(20, 4)
    loss_and_grads(z1, z2, name, backend="blocked", learn_tau=False)
    assert (calls["row_sums"], calls["pair_grad"]) == SWEEPS[name]
    with torch.no_grad():
        alpha_cl_loss(z1, z2, name, backend="blocked")
    assert (calls["row_sums"], calls["pair_grad"]) == (SWEEPS[name][0] + 1, 1)


@pytest.mark.parametrize("threads", [2, 3, 10])
@pytest.mark.parametrize("inference", [False, True])
def test_workers_share_the_tiles(threads, inference, small_tiles, poisoned):
    """Several workers, each with its own accumulators: same numbers, same bits every time,
    settings restored. A fifth of the cases for each number of workers; `make test-all` runs all.
    """
    z1, z2 = pair(22, 6, torch.float64)
    before = torch.get_num_threads()
    similarities = (
        {"similarity": "cosine"},
        {"similarity": "euclidean", "negatives": "cross_view"},
    )
    members = [*REPRESENTATIVE, ("alpha_square", {}), MEMBERS[-1]]
    for k, (member, setting) in enumerate(itertools.product(members, similarities)):
        if not is_due(k - threads - 2 * inference, 5):
            continue

        def run(member=member, setting=setting):
            if not inference:
                return loss_and_grads(z1, z2, *member, backend="blocked", **setting)
            with torch.inference_mode():
                return [
                    alpha_cl_loss(z1, z2, objectives.make(*member), backend="blocked", **setting)
                ]

        one = run()
        torch.set_num_threads(threads)
        try:
            first, second = run(), run()
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        for a, b, c in zip(one, first, second, strict=True):
            assert torch.equal(b, c)
            assert relative_error(b, a) < 1e-11


def test_error_in_a_worker_reaches_the_caller(small_tiles):
    calls = []

    def psi(x):
        calls.append(len(x))
        if len(x) == 5:
            raise RuntimeError("no such tile")
        return x.exp()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="no such tile"):
            alpha_cl_loss(*pair(31, 6), objectives.PairLoss(None, psi), backend="blocked")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("left", "right"), [(7, 19), (19, 7), (1, 12), (12, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rectangle_of_two_processes_rows(backend, left, right, both, small_tiles):
    """Sides of different lengths, no excluded pairs: what losses over several processes consist of.

    Against dense sums.
    """
    rows = pair(left + right, 6)[0] / 4
    t = rows[:left] @ rows[left:].t()
    anchors = left + right if both else left
    center = torch.linspace(-0.2, 0.3, anchors, dtype=torch.float64)
    gain = torch.linspace(0.5, 1.5, anchors, dtype=torch.float64)
    tau = torch.tensor(0.3, dtype=torch.float64)

    def sides(of):  # of (t, center, gain) as (anchor, other)
        first = of(t, center[:left, None], gain[:left, None])
        return [first, of(t.t(), center[left:, None], gain[left:, None])] if both else [first]

    pairing, exp, hinge_kind = (
        Pairing(left, 0, anchors),
        PairFunction("exp", (), tau),
        PairFunction("hinge", (0.1,), tau),
    )

    def sums_of(function, terms, **scalars):
        return ops.row_sums(
            Rows(rows), pairing, function, RowScalars(center, **scalars), terms, "", backend
        )

    base, total, moment = sums_of(exp, (Term.SHIFT, Term.F, Term.F_MOMENT))
    log_sum = torch.cat([(x / tau).logsumexp(1) for x in sides(lambda t, c, g: t)])
    torch.testing.assert_close(base + total.log(), log_sum, rtol=1e-12, atol=1e-12)
    mean = torch.cat(sides(lambda t, c, g: ((t / tau).softmax(1) * (t - c)).sum(1)))
    torch.testing.assert_close(moment / total, mean, rtol=1e-11, atol=1e-12)

    shift = log_sum
    weights = sides(lambda t, c, g: g * (t / tau).softmax(1))
    g = weights[0] + weights[1].t() if both else weights[0]
    expected = torch.cat([g @ rows[left:], g.t() @ rows[:left]])
    df, _, _ = ops.pair_grad(
        Rows(rows),
        pairing,
        exp,
        RowScalars(center, gain, shift),
        Weight.F,
        (),
        (0, left + right),
        "",
        backend,
    )
    torch.testing.assert_close(df, expected, rtol=1e-11, atol=1e-12)

    hinge = sides(lambda t, c, g: torch.relu(t - c + 0.1))
    sums = sums_of(hinge_kind, (Term.F, Term.DF), shift=center)
    torch.testing.assert_close(
        sums[0], torch.cat([x.sum(1) for x in hinge]), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        sums[1], torch.cat([(x > 0).double().sum(1) for x in hinge]), rtol=0, atol=0
    )
    (largest,) = sums_of(hinge_kind, (Term.T_MAX,))
    torch.testing.assert_close(
        largest, torch.cat([x.amax(1) for x in sides(lambda t, c, g: t)]), rtol=1e-13, atol=1e-14
    )
