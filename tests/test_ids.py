"""False negatives by ids: rows with one id are no negatives of each other, in every backend as
in a plain loop.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from family import (
    BACKENDS,
    BUILT_IN,
    MEMBERS,
    MODES,
    REPRESENTATIVE,
    SERVED,
    SLOW,
    Largest,
    assert_same_gradients,
    every_setting,
    in_turn,
    is_due,
    loss_and_grads,
    member_id,
    members_for,
    pair,
    relative_error,
    saved_bytes,
)

from alphacl_fast import FusedAlphaCLLoss, functional, loss_against, objectives, ops
from alphacl_fast.backend import blocked, reference, triton
from alphacl_fast.bundles import PairFunction, Pairing, Rows, RowScalars, Term, Weight
from alphacl_fast.call import Layout, SameId
from alphacl_fast.functional import REDUCTIONS, SIMILARITIES, alpha_cl_loss
from alphacl_fast.kernels.config import Tile

IDS = torch.tensor([-3, 7, -3, 7, 7, 2**40])
WITH_IDS = [name for name in BACKENDS if "ids" in ops.SWEEP_BACKENDS[name].OPTIONAL_OPERANDS]


def evaluate(z1, z2, member, ids, *, tau=0.3, **setting):
    """[loss, dz1, dz2(, dτ)] for a fixed weighting of the output; ids (N,) or None."""
    objective = objectives.make(*member)
    leaves = [z1.detach().clone().requires_grad_(), z2.detach().clone().requires_grad_()]
    learn_tau = objective.tau_gradient is not None
    wide = torch.float64 if z1.dtype == torch.float64 else torch.float32
    temperature = torch.tensor(tau, dtype=wide, requires_grad=learn_tau)
    loss = alpha_cl_loss(
        *leaves, objective, temperature=temperature if learn_tau else tau, ids=ids, **setting
    )
    weights = torch.linspace(-0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return [
        loss.detach(),
        *torch.autograd.grad((loss * weights).sum(), leaves + [temperature] * learn_tau),
    ]


def assert_same(ours, truth, bound=1e-10):
    for name, a, b in zip(("loss", "dz1", "dz2", "dtau")[: len(truth)], ours, truth, strict=True):
        floor = max(1e-3, 1e-2 * float(truth[1].double().norm()))
        assert relative_error(a, b, floor) < bound, (name, relative_error(a, b, floor))


def backends_of(member, setting):
    """Slow backends meet a member in one setting, a representative one in three; under `make
    test-all` in all of them.
    """
    values, value = every_setting(), setting
    if member not in REPRESENTATIVE:
        values, value = MODES, setting[:2]
    slow_too = is_due(BUILT_IN.index(member) + values.index(value), 4)
    return [name for name in WITH_IDS if name not in SLOW or slow_too]


def built_in_for(backend):
    return [member for member in members_for(backend) if member in BUILT_IN]


#: Representative members in every setting, the others in every mode with one similarity, which
#: changes from case to case; under `make test-all` all in all.
CASES = [
    (member, (*mode, similarity))
    for (m, member), (k, mode) in itertools.product(enumerate(BUILT_IN), enumerate(MODES))
    for similarity in (SIMILARITIES if member in REPRESENTATIVE else in_turn(SIMILARITIES, m + k))
]


def reductions_of(member, setting):
    """One, which changes from case to case; all under `make test-all`."""
    return in_turn(REDUCTIONS, BUILT_IN.index(member) + every_setting().index(setting))


def test_every_pair_of_values_occurs():
    axes = zip(
        *(
            (BUILT_IN.index(member), setting[:2], setting[2], reduction)
            for member, setting in CASES
            for reduction in reductions_of(member, setting)
        ),
        strict=True,
    )
    for first, second in itertools.combinations(axes, 2):
        assert {*zip(first, second, strict=True)} == {*itertools.product(first, second)}


@pytest.mark.parametrize(
    ("member", "setting"),
    CASES,
    ids=["-".join(map(str, (member_id(m), *setting))) for m, setting in CASES],
)
def test_equals_reference(member, setting, small_tiles, poisoned):
    z1, z2 = pair(len(IDS), 6)
    negatives, symmetric, similarity = setting
    given = {"negatives": negatives, "symmetric": symmetric, "similarity": similarity}
    for reduction in reductions_of(member, setting):
        given["reduction"] = reduction
        truth = evaluate(z1, z2, member, IDS, backend="reference", **given)
        for backend in backends_of(member, setting):
            assert_same(evaluate(z1, z2, member, IDS, backend=backend, **given), truth)


CUSTOM = [
    (backend, member)
    for backend, member in SERVED
    if member not in BUILT_IN and backend in WITH_IDS
]


@pytest.mark.parametrize(
    ("backend", "member"), CUSTOM, ids=[f"{b}-{member_id(m)}" for b, m in CUSTOM]
)
def test_users_functions(backend, member, small_tiles):
    """In every fifth setting, on a slow backend in one; with one reduction; under `make test-all`
    in all settings with all reductions.
    """
    z1, z2 = pair(len(IDS), 6)
    turn, every = MEMBERS.index(member), 12 if backend in SLOW else 5
    settings = [s for k, s in enumerate(every_setting()) if is_due(k - turn, every)]
    for setting, reduction in itertools.product(settings, in_turn(REDUCTIONS, turn)):
        negatives, symmetric, similarity = setting
        given = {
            "negatives": negatives,
            "symmetric": symmetric,
            "similarity": similarity,
            "reduction": reduction,
        }
        truth = evaluate(z1, z2, member, IDS, backend="reference", **given)
        assert_same(evaluate(z1, z2, member, IDS, backend=backend, **given), truth)


def test_the_oracle_leaves_out_what_is_said():
    """Anchor by anchor, InfoNCE written out."""
    z1, z2 = (F.normalize(z) for z in pair(6, 4))
    ids, both = [0, 1, 0, 2, 1, 3], torch.cat([z1, z2])
    expected = []
    for i in range(12):
        negatives = torch.stack([both[j] for j in range(12) if ids[j % 6] != ids[i % 6]])
        expected.append(
            torch.log1p(((negatives @ both[i] - both[i] @ both[(i + 6) % 12]) / 0.2).exp().sum())
        )
    got = alpha_cl_loss(
        z1, z2, temperature=0.2, reduction="none", backend="reference", ids=torch.tensor(ids)
    )
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", WITH_IDS)
def test_distinct_ids_change_nothing(backend):
    z1, z2 = pair(14, 5)
    for k, member in enumerate(built_in_for(backend)):
        for negatives, symmetric, similarity in in_turn(every_setting(), k):
            given = {
                "negatives": negatives,
                "symmetric": symmetric,
                "similarity": similarity,
                "backend": backend,
            }
            ours = evaluate(z1, z2, member, torch.randperm(14) * 1000, **given)
            assert_same(ours, evaluate(z1, z2, member, None, **given), 1e-12)


@pytest.mark.parametrize("backend", ["reference", *WITH_IDS])
def test_a_temperature_has_a_gradient_without_negatives(backend):
    ids = torch.zeros(5, dtype=torch.long)
    found = loss_and_grads(*pair(5, 3), "infonce", learn_tau=True, backend=backend, ids=ids)
    assert len(found) == 4
    assert not any(x.any() for x in found)


@pytest.mark.parametrize("backend", WITH_IDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_anchors_without_negatives(backend, reduction):
    """All of one id: nothing to learn. All but one: that one's rows are the negatives of the
    others. A third of the members for each reduction, in one setting; `make test-all` runs all.
    """
    z1, z2 = pair(9, 5)
    turn = REDUCTIONS.index(reduction)
    cases = [
        (member, setting)
        for k, member in enumerate(built_in_for(backend))
        if is_due(k - turn, 3)
        for setting in in_turn(every_setting(), 5 * k + 2)
    ]
    for member, (negatives, symmetric, similarity) in cases:
        given = {
            "negatives": negatives,
            "symmetric": symmetric,
            "similarity": similarity,
            "reduction": reduction,
        }
        for x in evaluate(z1, z2, member, torch.full((9,), 4), backend=backend, **given):
            assert not x.any(), member_id(member)
        ids = torch.tensor([0] * 8 + [1])
        truth = evaluate(z1, z2, member, ids, backend="reference", **given)
        assert_same(evaluate(z1, z2, member, ids, backend=backend, **given), truth)


@pytest.mark.parametrize("backend", WITH_IDS)
def test_some_anchors_without_negatives(backend):
    """In loss_against an anchor may have none while others have some: its loss is 0, and "mean"
    counts it.
    """
    z, queue = (F.normalize(x) for x in pair(8, 5))
    positive = torch.linspace(-0.5, 0.9, 8, dtype=torch.float64)
    ids, queue_ids = torch.tensor([0, 1, 0, 2, 0, 3, 0, 0]), torch.zeros(8, dtype=torch.long)
    for member in (
        MEMBERS
        if backend == "blocked"
        else [*REPRESENTATIVE, ("alpha_square", {}), ("uniform", {})]
    ):
        objective = objectives.make(*member)
        learn_tau = objective.tau_gradient is not None
        leaves = [x.clone().requires_grad_() for x in (z, queue, positive)]
        tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=learn_tau)
        losses = loss_against(
            *leaves,
            objective,
            temperature=tau,
            reduction="none",
            backend=backend,
            ids=ids,
            negative_ids=queue_ids,
        )
        assert torch.equal(losses == 0, ids == 0), member_id(member)
        total = loss_against(
            *leaves, objective, temperature=tau, backend=backend, ids=ids, negative_ids=queue_ids
        )
        torch.testing.assert_close(total, losses.mean())
        grads = torch.autograd.grad(losses.sum(), leaves + [tau] * learn_tau)
        assert all(x.isfinite().all() for x in grads)
        assert not grads[0][ids == 0].any()
        assert not grads[2][ids == 0].any()
        some = [x[ids != 0].detach().requires_grad_() for x in (z, positive)]
        others = loss_against(
            some[0],
            leaves[1],
            some[1],
            objective,
            temperature=tau,
            reduction="none",
            backend=backend,
        )
        torch.testing.assert_close(losses[ids != 0], others, rtol=1e-10, atol=1e-12)
        expected = torch.autograd.grad(
            others.sum(), [some[0], leaves[1], some[1]] + [tau] * learn_tau
        )
        for a, b in zip(
            (grads[0][ids != 0], grads[1], grads[2][ids != 0], *grads[3:]), expected, strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("member", "negatives", "similarity"),
    [
        (("infonce", {}), "two_view", "cosine"),
        (("infonce", {}), "cross_view", "euclidean"),
        (("triplet", {}), "two_view", "cosine"),
        (("alpha_direct", {"detach_alpha": False}), "cross_view", "euclidean"),
        (("alpha_square", {}), "two_view", "cosine"),
        (("uniform", {}), "cross_view", "euclidean"),
    ],
)
def test_many_tiles(member, negatives, similarity):
    """Sizes beyond one tile of the compiled kernels, ragged.

    Ids by class, by instance, and one large group.
    """
    n = 601
    z1, z2 = pair(n, 8)
    for ids in (
        torch.arange(n) % 10,
        torch.arange(n) // 2 * 7,
        (torch.arange(n) * (torch.arange(n) < 90)),
    ):
        results = [
            evaluate(
                z1,
                z2,
                member,
                ids,
                tau=0.2,
                backend=name,
                negatives=negatives,
                similarity=similarity,
            )
            for name in ("cpu", "blocked")
        ]
        assert_same(*results, 1e-9)
    if member[0] != "alpha_square":
        assert_same(results[0], dense(z1, z2, member, ids, 0.2, negatives, similarity), 1e-9)


def dense(z1, z2, member, ids, tau, negatives, similarity):
    """The same with all pairs that do not count at a similarity of their own: the oracle's loop
    would take minutes.
    """
    objective = objectives.make(*member)
    leaves = [z.detach().clone().requires_grad_() for z in (z1, z2)]
    learn_tau = objective.tau_gradient is not None
    temperature = torch.tensor(tau, dtype=torch.float64, requires_grad=learn_tau)
    rows = [reference.normalized(z) if similarity == "cosine" else z for z in leaves]
    c = 0.0 if similarity == "euclidean" else 1.0
    cross = reference.similarities(*rows, similarity)
    pos = cross.diagonal()
    if negatives == "two_view":
        both, names, other_names = torch.cat(rows), ids.repeat(2), ids.repeat(2)
        t, pos = reference.similarities(both, both, similarity), pos.repeat(2)
    else:
        t, pos, names, other_names = (
            torch.cat([cross, cross.t()]),
            pos.repeat(2),
            ids.repeat(2),
            ids,
        )
    losses = []
    # rows with as many negatives at a time
    for size in (names[:, None] != other_names).sum(1).unique():
        rows = ((names[:, None] != other_names).sum(1) == size).nonzero()[:, 0]
        kept = t[rows][names[rows, None] != other_names].view(len(rows), -1)
        losses.append(reference.of_similarities(objective, kept, pos[rows], temperature, c).sum())
    loss = sum(losses) / len(t)
    return [loss.detach(), *torch.autograd.grad(loss / -2, leaves + [temperature] * learn_tau)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", WITH_IDS)
def test_dtypes(backend, dtype):
    n = 130 if backend not in SLOW else 24
    z1, z2 = pair(n, 16, dtype)
    ids = torch.arange(n) % 7
    for member in (*REPRESENTATIVE, ("alpha_square", {})):
        for tau in (0.3, 0.01) if member[0] == "infonce" else (0.3,):
            truth = evaluate(z1.double(), z2.double(), member, ids, tau=tau, backend="blocked")
            ours = evaluate(z1, z2, member, ids, tau=tau, backend=backend)
            assert ours[1].dtype == dtype
            for a, b in zip(ours, truth, strict=True):
                assert relative_error(a, b) < {
                    torch.float32: 1e-5,
                    torch.bfloat16: 8e-3,
                    torch.float16: 1e-3,
                }[dtype] * (1 if tau > 0.1 else 3)


@pytest.mark.skipif(triton._missing() is not None, reason=str(triton._missing()))
def test_forms_of_the_triton_kernels(monkeypatch):
    """Both sides of a tile at once, shared rings, rows wider than a tile."""
    z1, z2 = pair(len(IDS), 6)
    square = ("alpha_square", {"detach_alpha": False})
    for features, both, member, negatives, similarity in (
        (8, True, ("infonce", {}), "two_view", "cosine"),
        (8, True, square, "cross_view", "euclidean"),
        (4, False, ("infonce", {}), "cross_view", "euclidean"),
        (8, False, ("infonce", {}), "two_view", "cosine"),
    ):
        shape = Tile(4, 4, features, warps=4, stages=1, symmetric=both)
        monkeypatch.setattr(triton, "tile", lambda sweep, mode, dim, n, device, shape=shape: shape)
        given = {"negatives": negatives, "similarity": similarity}
        truth = evaluate(z1, z2, member, IDS, backend="reference", **given)
        assert_same(evaluate(z1, z2, member, IDS, backend="triton", **given), truth)


# --- anchors against any negatives ----------------------------------------------------------------


@pytest.mark.parametrize("m", [None, 7])
@pytest.mark.parametrize("member", MEMBERS, ids=member_id)
def test_loss_against_equals_a_loop(member, m):
    objective = objectives.make(*member)
    generator = torch.Generator().manual_seed(3)
    z, other = (
        torch.randn(k, 4, generator=generator, dtype=torch.float64) / 2 for k in (9, m or 1)
    )
    positive, weights = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    ids, other_ids = torch.tensor([0, 5, 2, 5, 1, 0, 0, 4, 8]), torch.tensor([5, 0, 0, 2, 9, 0, 3])
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=objective.tau_gradient is not None)
    leaves = [
        x.requires_grad_() for x in ([z, positive] if m is None else [z, positive, other])
    ] + [tau] * tau.requires_grad
    rows, names = (z, ids) if m is None else (other, other_ids)
    truth = torch.stack(
        [
            reference.of_similarities(
                objective, (rows[names != ids[i]] @ z[i])[None], positive[i : i + 1], tau, 1.0
            )[0]
            for i in range(9)
        ]
    )
    ours = loss_against(
        z,
        None if m is None else other,
        positive,
        objective,
        temperature=tau,
        reduction="none",
        ids=ids,
        negative_ids=None if m is None else other_ids,
    )
    assert_same_gradients(ours, truth, weights, leaves)


# --- everything around ----------------------------------------------------------------------------


def test_module_and_integer_types():
    z1, z2 = pair(12, 4)
    loss = FusedAlphaCLLoss("alpha_direct")
    ids = torch.arange(12) % 5
    expected = loss(z1, z2, ids)
    assert expected != loss(z1, z2)
    for dtype in functional.INTEGERS:
        assert loss(z1, z2, ids.to(dtype)) == expected
    assert loss(z1, z2, ids.repeat_interleave(2)[::2]) == expected
    with torch.no_grad():
        torch.testing.assert_close(loss(z1.requires_grad_(), z2, ids=ids), expected)


@pytest.mark.parametrize(("rectangle", "anchors"), [(False, 40), (True, 17), (True, 40)])
def test_groups(rectangle, anchors):
    ids = torch.randint(-3, 4, (40,)) * 2**60
    split = 17 if rectangle else 0
    groups = SameId.make(ids, Layout(40, split, 0, anchors, 39, rectangle), torch.float32)
    assert torch.equal(groups.ids[:, None] == groups.ids, ids[:, None] == ids)
    assert groups.ids.dtype == torch.int32
    assert int(groups.ids.min()) == 0
    assert int(groups.ids.max()) == len(ids.unique()) - 1
    side = torch.arange(40) < split
    strangers = ids[:, None] != ids
    if rectangle:
        strangers &= side[:, None] != side
    assert torch.equal(groups.n_neg, strangers.sum(1)[:anchors].clamp(min=1).float())
    assert torch.equal(groups.empty, strangers.sum(1)[:anchors] == 0)


@pytest.mark.parametrize("backend", ["cpu", "blocked"])
@pytest.mark.parametrize(
    "member", [*REPRESENTATIVE, ("alpha_square", {}), ("uniform", {})], ids=member_id
)
def test_no_matrix_of_all_pairs(member, backend, monkeypatch):
    n, d, tile = 256, 8, 64
    monkeypatch.setattr(blocked, "tile_size", lambda rows, device: tile)
    z1, z2 = (z.requires_grad_() for z in pair(n, d, torch.float32))
    for reduction in ("mean", "none"):
        with saved_bytes() as saved, Largest() as largest:
            loss = FusedAlphaCLLoss(objectives.make(*member), reduction=reduction, backend=backend)
            loss(z1, z2, torch.arange(n) % 9).sum().backward()
        rows_bytes = 2 * n * d * 4
        assert sum(saved.values()) <= 9 * rows_bytes
        assert largest.bytes <= max(tile * tile * 4, 2 * rows_bytes)


@pytest.mark.parametrize("backend", ["cpu", "blocked"])
def test_what_lies_in_a_pair_left_out_does_not_matter(backend):
    """Two rows of one id whose product overflows."""
    z1, z2 = (z * 1e15 for z in pair(12, 6, torch.float32))  # other products are finite
    z1[:, 0] = z2[:, 0] = 0
    for k in (4, 5):
        z1[k] = 0
        z1[k, 0] = 3e38
    ids = torch.tensor([0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10])
    ours = evaluate(z1, z2, ("triplet", {}), ids, similarity="dot", backend=backend)
    truth = evaluate(
        z1.double(), z2.double(), ("triplet", {}), ids, similarity="dot", backend="reference"
    )
    assert relative_error(ours[1], truth[1]) < 1e-5
    assert not evaluate(z1, z2, ("triplet", {}), None, similarity="dot", backend=backend)[
        0
    ].isfinite()


def test_one_grouping_per_step(monkeypatch):
    """Ids are put in order once, and nothing of it is read on the host."""
    calls = []
    make = SameId.make.__func__
    monkeypatch.setattr(
        SameId, "make", classmethod(lambda cls, *a: calls.append(1) or make(cls, *a))
    )
    z1, z2 = pair(len(IDS), 4)
    for reduction in REDUCTIONS:
        for name in ("infonce", "alpha_square", "uniform"):
            calls.clear()
            evaluate(z1, z2, (name, {}), IDS, reduction=reduction)
            assert len(calls) == 1
    meta = SameId.make(
        torch.empty(9, dtype=torch.long, device="meta"), Layout(9, 0, 0, 9, 8, False), torch.float32
    )
    assert meta.n_neg.shape == (9,)


COMPILED = [
    (member, reduction)
    for k, member in enumerate([*REPRESENTATIVE, ("alpha_square", {}), ("uniform", {})])
    for reduction in in_turn(("mean", "none"), k)
]


@pytest.mark.parametrize(
    ("member", "reduction"), COMPILED, ids=[f"{member_id(m)}-{x}" for m, x in COMPILED]
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_dynamo")
def test_in_a_compiled_graph(member, reduction):
    loss = FusedAlphaCLLoss(*member[:1], reduction=reduction, **member[1])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (10, 13):
        ids = torch.arange(n) // 3
        leaves = [z.requires_grad_() for z in pair(n, 4)]
        a, b = (
            torch.autograd.grad(f(*leaves, ids).square().sum(), leaves) for f in (loss, compiled)
        )
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_operators_pass_opcheck():
    objective, z1, z2 = objectives.make("alpha_direct"), *pair(6, 4)
    tau, ids = torch.tensor(0.3, dtype=torch.float64), torch.tensor([0, 1, 0, 2, 3, 1])
    rest = (
        objective.key,
        "cosine",
        "two_view",
        True,
        "mean",
        None,
        "blocked",
        0.3,
        "",
        None,
        [True, True, False],
    )
    torch.library.opcheck(
        torch.ops.alphacl_fast.loss.default,
        (z1, z2, tau, ids, *rest),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    row = torch.zeros(6, dtype=torch.float64)
    pairing, function = Pairing(0, 0, 6, ids.int()), PairFunction("exp", (), tau, (-4.0, 4.0))
    operands = *Rows(F.normalize(z1)), *pairing, *function
    for backend in ("cpu", "blocked"):
        torch.library.opcheck(
            ops.ROW_SUMS, (*operands, *RowScalars(row), [Term.SHIFT, Term.F], "", backend)
        )
        scalars = RowScalars(row, row + 1, row)
        torch.library.opcheck(ops.PAIR_GRAD, (*operands, *scalars, Weight.F, [], 0, 6, "", backend))


def test_errors():
    z1, z2 = pair(6, 4)
    ids = torch.arange(6)
    for given, error, message in (
        ([0] * 6, TypeError, r"ids must be an integer tensor of shape \(6,\), got list"),
        (ids.float(), TypeError, r"ids must be an integer tensor of shape \(6,\), got float32"),
        (ids == 2, TypeError, r"ids must be an integer tensor of shape \(6,\), got bool"),
        (ids[:5], ValueError, r"ids must be an integer tensor of shape \(6,\), got shape \(5,\)"),
        (
            ids[:, None],
            ValueError,
            r"ids must be an integer tensor of shape \(6,\), got shape \(6, 1\)",
        ),
    ):
        for backend in ("auto", "reference"):
            with pytest.raises(error, match=message):
                alpha_cl_loss(z1, z2, ids=given, backend=backend)
        with pytest.raises(error, match=message):
            loss_against(z1, None, z1[:, 0], ids=given)
    for given, message in (
        (
            {"negatives": None, "ids": ids, "negative_ids": ids},
            "negative_ids must be given exactly .* with negatives=None",
        ),
        (
            {"negatives": z2, "negative_ids": ids},
            "negative_ids must be given exactly .* with ids=None",
        ),
        (
            {"negatives": z2, "ids": ids},
            "negative_ids must be given exactly if negatives and ids are, got None",
        ),
        (
            {"negatives": z2, "ids": ids, "negative_ids": ids[:4]},
            r"negative_ids must be an integer tensor of shape \(6,\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            loss_against(z1, positive=z1[:, 0], **given)


def test_auto_passes_over_a_backend_without_ids(monkeypatch):
    for name in ("cpu", "triton"):
        monkeypatch.setattr(ops.SWEEP_BACKENDS[name], "unsupported", lambda *call: "left out")
    monkeypatch.setattr(ops.SWEEP_BACKENDS["cuda"], "unsupported", lambda *call: None)
    call = torch.device("cuda"), torch.float32, None, "exp"
    assert ops.choose("auto", *call, ("ids",))[0] == "cuda"
    monkeypatch.setattr(ops.SWEEP_BACKENDS["cuda"], "OPTIONAL_OPERANDS", set())
    name, why = ops.choose("auto", *call, ("ids",))
    assert (name, "cuda: ids: not in this backend" in why) == ("blocked", True)
    assert ops.choose("auto", *call)[0] == "cuda"
    with pytest.raises(ValueError, match="ids: not in this backend; use cpu or triton or blocked"):
        ops.choose("cuda", *call, ("ids",))


def test_a_mask_that_forgets_is_found(monkeypatch):
    """The comparisons above can fail: one pair of a group that counts is seen."""
    original = blocked.equal_ids

    def forgetful(a, b):
        mask = original(a, b).clone()
        mask[0, 2] = mask[2, 0] = False
        return mask

    monkeypatch.setattr(blocked, "equal_ids", forgetful)
    z1, z2 = pair(len(IDS), 6)
    for member in (
        ("infonce", {}),
        ("alpha_direct", {"detach_alpha": False}),
        ("alpha_entropy", {}),
    ):
        truth = evaluate(z1, z2, member, IDS, backend="reference")
        with pytest.raises(AssertionError):
            assert_same(evaluate(z1, z2, member, IDS, backend="blocked"), truth, 1e-6)
