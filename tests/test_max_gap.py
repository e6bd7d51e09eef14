"""Negatives that are far more similar than the positive do not count: every backend against the
oracle, which drops them from each anchor's own list.
"""

import itertools

import pytest
import torch
from family import (
    BACKENDS,
    FULL,
    MEMBERS,
    MODES,
    REPRESENTATIVE,
    SLOW,
    in_turn,
    is_due,
    member_id,
    pair,
    relative_error,
)
from torch.nn.functional import normalize

from alphacl_fast import (
    FusedAlphaCLLoss,
    PairLoss,
    alpha,
    alpha_summary,
    loss_against,
    objectives,
    ops,
)
from alphacl_fast.backend import cpu
from alphacl_fast.functional import REDUCTIONS, SIMILARITIES, alpha_cl_loss

SERVING = [name for name in BACKENDS if "max_gap" in ops.SWEEP_BACKENDS[name].OPTIONAL_OPERANDS]
#: Some negatives are left out, half of them, all.
GAPS = {"cosine": (0.2, -0.3, -2.5), "dot": (2.0, -1.0, -100.0), "euclidean": (-1.0, -4.0, -99.0)}


def evaluate(z1, z2, member, tau=0.3, **setting):
    """[loss, dz1, dz2(, dτ)] for a fixed weighting of the output."""
    objective = objectives.make(*member)
    leaves = [z1.detach().clone().requires_grad_(), z2.detach().clone().requires_grad_()]
    learn_tau = objective.tau_gradient is not None
    wide = torch.float64 if z1.dtype == torch.float64 else torch.float32
    temperature = torch.tensor(tau, dtype=wide, requires_grad=learn_tau)
    loss = alpha_cl_loss(*leaves, objective, temperature=temperature, **setting)
    weights = torch.linspace(-0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    wanted = leaves + [temperature] * learn_tau
    found = torch.autograd.grad((loss * weights).sum(), wanted, materialize_grads=True)
    return [loss.detach(), *found]


def backends_for(objective, turn):
    kind = objective.kind or "exp"
    place = torch.device("cpu"), torch.float64, None, kind
    able = [name for name in SERVING if ops.SWEEP_BACKENDS[name].unsupported(*place) is None]
    return [name for name in able if name not in SLOW or is_due(turn, 12)]


def cases(member):
    """(mode, similarity, place of the gap in the table, reduction, whether with ids, turn of the
    slow backends): representative members in every mode and similarity, the others in every mode
    with one similarity; the rest changes from case to case. `make test-all` takes all similarities
    and gaps.
    """
    m = MEMBERS.index(member)
    for (k, mode), (j, similarity) in itertools.product(enumerate(MODES), enumerate(SIMILARITIES)):
        turn = m + 3 * k + j
        if member in REPRESENTATIVE or is_due(m + k - j, 3):
            slow_turn = turn if member in REPRESENTATIVE else 3 * (m - k)
            for gap in in_turn(range(3), m // 3 + k + j):
                reduction = REDUCTIONS[(m // 9 + k) % 3]
                yield mode, similarity, gap, reduction, turn % 2 == 1, slow_turn


def test_every_pair_of_values_occurs():
    axes = zip(
        *((MEMBERS.index(member), *case[:-1]) for member in MEMBERS for case in cases(member)),
        strict=True,
    )
    for first, second in itertools.combinations(axes, 2):
        assert {*zip(first, second, strict=True)} == {*itertools.product(first, second)}


@pytest.mark.parametrize("member", MEMBERS, ids=member_id)
def test_equals_reference(member, small_tiles, poisoned):
    z1, z2 = pair(9, 6, noise=1.0)
    ids = torch.tensor([3, 1, 3, 7, 7, 8, -2, 9, 5])
    for (negatives, symmetric), similarity, gap, reduction, with_ids, slow_turn in cases(member):
        given = {
            "negatives": negatives,
            "symmetric": symmetric,
            "similarity": similarity,
            "max_gap": GAPS[similarity][gap],
            "reduction": reduction,
            "ids": ids if with_ids else None,
        }
        truth = evaluate(z1, z2, member, backend="reference", **given)
        for backend in backends_for(objectives.make(*member), slow_turn):
            ours = evaluate(z1, z2, member, backend=backend, **given)
            for a, b in zip(ours, truth, strict=True):
                floor = max(1e-3, 1e-2 * float(truth[1].norm()))
                assert relative_error(a, b, floor) < 1e-9, (backend, given)


INSTRUCTION_SETS = [] if cpu.load_error() else [k for k, v in cpu.instruction_sets().items() if v]


@pytest.mark.parametrize("name", ["infonce", "alpha_direct", "alpha_square"])
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_every_instruction_set(instructions, name):
    """With several tiles; "dot" has no constant shift."""
    z1, z2 = pair(75, 20, noise=1.0)
    for similarity in ("cosine", "dot"):
        gap = GAPS[similarity][1]
        found = {}
        for backend in ("cpu", "blocked"):
            with cpu.forced_instruction_set(instructions):
                found[backend] = evaluate(
                    z1, z2, (name, {}), similarity=similarity, max_gap=gap, backend=backend
                )
        for a, b in zip(found["cpu"], found["blocked"], strict=True):
            assert relative_error(a, b) < 1e-9, similarity


def test_cases_leave_out_some_negatives():
    """The tables above would pass without the mask if their gaps left out nothing."""
    z1, z2 = pair(9, 6, noise=1.0)
    for similarity, gaps in GAPS.items():
        shares = []
        for gap in gaps:
            found = alpha(z1, z2, "uniform", similarity=similarity, max_gap=gap)
            shares.append(float((found > 0).sum() / (18 * 16)))
        assert 0.5 < shares[0] < 1
        assert 0.05 < shares[1] < 0.95
        assert shares[2] == 0


@pytest.mark.parametrize("backend", [b for b in SERVING if FULL or b not in SLOW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(backend, dtype):
    """The edge lies in the widest of 400 intervals, so that rounding moves no pair over it."""
    z1, z2 = pair(40, 16, dtype=dtype, noise=0.6)
    rows = normalize(torch.cat([z1, z2]).double())
    gaps = (rows @ rows.t() - (rows[:40] * rows[40:]).sum(1).repeat(2)[:, None]).flatten().sort()[0]
    middle = int((gaps < -0.1).sum())
    near = gaps[middle : middle + 400]
    widest = (near[1:] - near[:-1]).argmax()
    gap = float(near[widest : widest + 2].mean())
    truth = evaluate(z1.double(), z2.double(), ("infonce", {}), max_gap=gap, backend="reference")
    ours = evaluate(z1, z2, ("infonce", {}), max_gap=gap, backend=backend)
    eps = torch.finfo(dtype).eps
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a, b) < max(4 * eps, 1e-6)


@pytest.mark.parametrize("backend", SERVING)
def test_an_infinite_gap_changes_nothing(backend):
    z1, z2 = pair(6 if backend in SLOW else 33, 5)
    for member in [("infonce", {}), ("uniform", {}), ("alpha_direct", {"alpha_eps": 0.1})]:
        everything = evaluate(z1, z2, member, backend=backend)
        limited = evaluate(z1, z2, member, backend=backend, max_gap=float("inf"))
        torch.testing.assert_close(limited, everything, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [*SERVING, "reference"])
def test_copies_of_the_positive_have_no_gap(backend, dtype):
    """However their similarities are rounded: a gap of 0 leaves none of them out."""
    z1, _ = pair(9, 64, dtype=dtype)
    copies = z1[:1].expand(9, -1)
    for anchors in (z1, copies):
        losses = alpha_cl_loss(
            anchors, copies, negatives="cross_view", symmetric=False, max_gap=0.0,
            reduction="none", backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(losses, torch.full_like(losses, 9).log(), rtol=1e-5, atol=0)
    loss = alpha_cl_loss(copies, copies, max_gap=0.0, backend=backend)
    torch.testing.assert_close(loss, torch.full_like(loss, 17).log(), rtol=1e-5, atol=0)


def test_masked_softmax_of_qwen3_embedding():
    """Its term for the documents (arXiv:2506.05176, equation 1): m = 0 where s > s⁺ + 0.1."""
    query, document = pair(24, 8, noise=1.5)
    a, b = normalize(query), normalize(document)
    s = a @ b.t()
    keep = (s <= s.diagonal()[:, None] + 0.1) | torch.eye(24, dtype=torch.bool)
    assert not keep.all()
    dense = (s / 0.05).masked_fill(~keep, -torch.inf).logsumexp(1) - s.diagonal() / 0.05
    setting = {"negatives": "cross_view", "symmetric": False, "reduction": "none"}
    ours = alpha_cl_loss(query, document, temperature=0.05, max_gap=0.1, **setting)
    torch.testing.assert_close(ours, dense)


def test_nan_rows_stay_nan():
    """A similarity that is no number is not larger than any limit."""
    z1, z2 = pair(8, 4)
    z1[3, 1] = torch.nan
    for backend in [b for b in SERVING if b not in SLOW]:
        for member in (("infonce", {}), ("triplet", {}), ("uniform", {})):
            loss = evaluate(z1, z2, member, backend=backend, max_gap=0.1, reduction="none")[0]
            assert loss.isnan().all(), (backend, member)


@pytest.mark.parametrize("backend", [b for b in SERVING if b not in SLOW])
def test_explicit_negatives(backend):
    z, y = (normalize(x) for x in pair(12, 6, noise=1.0))
    positive = torch.linspace(-0.2, 0.4, 12, dtype=torch.float64)
    for objective in ("infonce", "uniform", "triplet", "alpha_entropy"):
        for negatives in (y, None):
            leaves = [x.clone().requires_grad_() for x in (z, positive)]
            t = leaves[0] @ (leaves[0] if negatives is None else negatives).t()
            gap = t - leaves[1][:, None]
            keep = gap <= 0.3
            if negatives is None:
                keep &= ~torch.eye(12, dtype=torch.bool)
            assert 20 < keep.sum() < 120
            n_neg = keep.sum(1)
            weight = torch.softmax((t / 0.5).masked_fill(~keep, -torch.inf), 1).detach()
            dense = {
                "infonce": (gap / 0.5).exp().mul(keep).sum(1).log1p(),
                "uniform": (gap * keep).sum(1) / n_neg.clamp(min=1),
                "triplet": (gap + 1).clamp(min=0).mul(keep).sum(1),
                "alpha_entropy": (weight.nan_to_num() * gap).sum(1),
            }[objective]
            setting = {"reduction": "none", "max_gap": 0.3, "backend": backend}
            ours = loss_against(leaves[0], negatives, leaves[1], objective, **setting)
            torch.testing.assert_close(ours, dense)
            expected = torch.autograd.grad(dense.square().sum(), leaves)
            found = torch.autograd.grad(ours.square().sum(), leaves)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("among", [False, True])
@pytest.mark.parametrize("backend", SERVING)
def test_gaps_have_neither_weights_nor_temperatures(backend, among):
    """The oracle weighs and divides the gaps that are left; large weights reorder all terms."""
    n = 7 if backend in SLOW else 33
    z, y = (normalize(x) for x in pair(n, 6, noise=1.0))
    positive = torch.linspace(-0.2, 0.4, n, dtype=torch.float64)
    tau = torch.linspace(0.1, 0.6, n, dtype=torch.float64)
    weights = torch.linspace(-3, 2, n, dtype=torch.float64).roll(n // 2)
    for options in (
        {"temperature": tau},
        {"log_weights": weights},
        {"log_weights": weights, "temperature": tau},
    ):
        leaves = [x.clone().requires_grad_() for x in (z, positive, *options.values())]
        given = dict(zip(options, leaves[2:], strict=True))
        t = leaves[0] @ (leaves[0] if among else y).t()
        gap = t - leaves[1][:, None]
        keep = (gap <= 0.3) & ~(among & torch.eye(n, dtype=torch.bool))
        assert n < keep.sum() < n * (n - 2)
        exponents = gap / given.get("temperature", torch.tensor(0.5)).view(-1, 1)
        dense = ((exponents + given.get("log_weights", 0)).exp() * keep).sum(1).log1p()
        setting = {"reduction": "none", "max_gap": 0.3, "backend": backend}
        ours = loss_against(leaves[0], None if among else y, leaves[1], **given, **setting)
        torch.testing.assert_close(ours, dense)
        expected = torch.autograd.grad(dense.square().sum(), leaves)
        torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), leaves), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", SERVING)
def test_gaps_at_the_edge_count_whatever_their_weights(backend, dtype):
    """Of whole numbers no gap is rounded; t plus a weight is, and would be beyond the edge or not.

    With several tiles, whose columns are anchors too.
    """
    n = 70
    z, y = (torch.randint(-2, 3, (n, 4)).to(dtype) for _ in range(2))
    weights = torch.linspace(-3, 2, n).roll(n // 2)
    positive = torch.randint(-1, 2, (n,)).float()
    for among in (False, True):
        leaves = [x.clone().requires_grad_() for x in (z, positive, weights)]
        given = {"log_weights": leaves[2], "max_gap": 1.0, "temperature": 2.0}
        negatives = None if among else y
        setting = {"reduction": "none", "backend": backend}
        ours = loss_against(*leaves[:1], negatives, leaves[1], **given, **setting)
        exact = [x.detach().double().requires_grad_() for x in leaves]
        gap = exact[0] @ (exact[0] if among else y.double()).t() - exact[1][:, None]
        keep = (gap <= 1) & ~(among & torch.eye(n, dtype=torch.bool))
        assert (gap == 1).sum() > 300
        dense = ((gap / 2 + exact[2]).exp() * keep).sum(1).log1p()
        torch.testing.assert_close(ours.double(), dense, rtol=1e-5, atol=1e-6)
        for a, b in zip(
            torch.autograd.grad(ours.sum(), leaves),
            torch.autograd.grad(dense.sum(), exact),
            strict=True,
        ):
            assert relative_error(a, b) < max(torch.finfo(a.dtype).eps, 1e-5)


def test_module_compiled_graph_and_pickled_copy():
    import pickle

    z1, z2 = pair(11, 6, torch.float32)
    for name in ("infonce", "triplet_contrastive"):
        module = FusedAlphaCLLoss(name, max_gap=0.05)
        assert "max_gap=0.05" in repr(module)
        assert repr(module).startswith(f"FusedAlphaCLLoss({name}(")
        expected = module(z1, z2)
        assert expected != FusedAlphaCLLoss(name)(z1, z2)
        torch.testing.assert_close(pickle.loads(pickle.dumps(module))(z1, z2), expected)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(z1, z2), expected)


def test_gaps_and_margins_change_in_a_compiled_graph():
    z1, z2 = pair(11, 6, torch.float32)
    guide = pair(11, 4, torch.float32, seed=3)

    def loss(z1, z2, gap):
        guided = alpha_cl_loss(z1, z2, guide=guide, guide_margin=gap)
        return alpha_cl_loss(z1, z2, max_gap=gap) + guided

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for gap in (0.3, 0.2, 0.1, 0.0, -0.1):
        torch.testing.assert_close(compiled(z1, z2, gap), loss(z1, z2, gap))


def test_weights_made_visible():
    z1, z2 = pair(10, 5, noise=1.0)
    setting = {"max_gap": 0.1, "temperature": 0.3}
    a = alpha(z1, z2, "alpha_entropy", **setting)
    rows = normalize(torch.cat([z1, z2]))
    t, positive = rows @ rows.t(), (rows[:10] * rows[10:]).sum(1).repeat(2)
    assert a[t > positive[:, None] + 0.1].eq(0).all()
    torch.testing.assert_close(a.sum(1), (a.sum(1) > 0).double())
    module = FusedAlphaCLLoss("alpha_entropy", **setting)
    everything = alpha_summary(z1, z2, "alpha_entropy", temperature=0.3)
    assert module.alpha_summary(z1, z2).entropy.mean() < everything.entropy.mean()


@pytest.mark.parametrize("gap", [True, "0.1", torch.tensor(0.1)])
def test_wrong_type(gap):
    with pytest.raises(TypeError, match="max_gap must be None or a number"):
        FusedAlphaCLLoss(max_gap=gap)


def test_refusals():
    z1, z2 = pair(4, 3)
    with pytest.raises(ValueError, match="max_gap must be None or a number, got nan"):
        alpha_cl_loss(z1, z2, max_gap=float("nan"))
    with pytest.raises(ValueError, match="backend must not be 'reference' with max_gap"):
        alpha(z1, z2, max_gap=0.1, backend="reference")


def test_a_users_outer_function_is_not_asked_about_no_negatives():
    z1, z2 = pair(5, 3)
    shifted = PairLoss(lambda xi: torch.log(xi + 2), lambda gap: gap.exp())
    assert alpha_cl_loss(z1, z2, shifted, max_gap=-2.5) == 0
