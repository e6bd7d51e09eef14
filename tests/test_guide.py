"""A guide's false negatives do not count: losses and gradients as in dense code."""

import re

import pytest
import torch
import torch.distributed as dist
from family import BUILT_IN, CUSTOM, every_setting, is_due, member_id, pair, relative_error
from torch.nn.functional import normalize

from alphacl_fast import FusedAlphaCLLoss, loss_against, objectives, ops
from alphacl_fast.backend import cpu, cpu_step
from alphacl_fast.functional import REDUCTIONS, alpha_cl_loss

N, TAU = 12, 0.3


def guides(seed=5):
    """Embeddings of another width, whose positives are not always the nearest."""
    g1, g2 = pair(N, 7, torch.float32, noise=1.5, seed=seed)
    return g1, g2


def dense(z1, z2, objective, negatives, symmetric, similarity, margin, ids=None):
    """(anchors,) losses with a mask of all pairs."""
    own = torch.arange(N) if ids is None else ids
    if similarity == "cosine":
        z1, z2 = normalize(z1), normalize(z2)
    g1, g2 = (normalize(g.double()) for g in guides())
    sides = {
        "two_view": [(torch.cat([z1, z2]), torch.cat([z1, z2]), torch.cat([g1, g2])) * 1],
        "one_view": [(z1, z1, g1)],
        "cross_view": [(z1, z2, g1), (z2, z1, g2)][: 1 + symmetric],
    }[negatives]
    losses = []
    for a, b, g in sides:
        copies = len(a) // N
        other = {"two_view": g, "one_view": g, "cross_view": g2 if g is g1 else g1}[negatives]
        names = own.repeat(copies)
        positive = (z1 * z2).sum(1).repeat(copies)
        limit = (g1 * g2).sum(1).repeat(copies) - margin
        keep = (g @ other.t() <= limit[:, None]) & (names[:, None] != names)
        assert 0 < keep.sum() < len(a) * (len(b) - 2)
        t = a @ b.t()
        gap = t - positive[:, None]
        if objective == "infonce":
            losses.append(((gap / TAU).exp() * keep).sum(1).log1p())
        elif objective == "triplet":
            losses.append(((gap + 1).clamp(min=0) * keep).sum(1))
        else:  # uniform
            losses.append((gap * keep).sum(1) / keep.sum(1).clamp(min=1))
    return torch.cat(losses)


MODES = [("two_view", True), ("one_view", True), ("cross_view", True), ("cross_view", False)]


@pytest.mark.parametrize("objective", ["infonce", "triplet", "uniform"])
@pytest.mark.parametrize(("negatives", "symmetric"), MODES)
def test_equals_dense_code(objective, negatives, symmetric, small_tiles):
    ids = torch.arange(N) % 9
    for similarity, margin, given in (
        ("cosine", 0.0, None),
        ("dot", 0.2, ids),
        ("cosine", -0.1, ids),
    ):
        z1, z2 = (z.requires_grad_() for z in pair(N, 6, noise=1.0))
        setting = {"negatives": negatives, "symmetric": symmetric, "similarity": similarity}
        truth = dense(z1, z2, objective, **setting, margin=margin, ids=given)
        rest = {"temperature": TAU, "guide": guides(), "guide_margin": margin, "ids": given}
        ours = alpha_cl_loss(z1, z2, objective, **setting, **rest)
        torch.testing.assert_close(ours, truth.mean())
        expected = torch.autograd.grad(truth.mean(), (z1, z2), allow_unused=True)
        found = torch.autograd.grad(ours, (z1, z2), allow_unused=True)
        torch.testing.assert_close(found, expected)
        each = alpha_cl_loss(z1, z2, objective, **setting, **rest, reduction="none")
        if negatives == "cross_view" and symmetric:
            truth = truth.view(2, -1).mean(0)
        torch.testing.assert_close(each, truth)


#: With a guide; the kernels of "cpu" need the compiled library.
SERVING = ["blocked"] if cpu.load_error() else ["cpu", "blocked"]


def evaluate(z1, z2, member=("infonce", {}), tau=0.3, **setting):
    """[loss, dz1, dz2(, dτ)] for a fixed weighting of the output."""
    objective = objectives.make(*member)
    leaves = [z1.detach().clone().requires_grad_(), z2.detach().clone().requires_grad_()]
    wide = torch.float64 if z1.dtype == torch.float64 else torch.float32
    learnt = objective.tau_gradient is not None
    leaves.append(torch.tensor(tau, dtype=wide, requires_grad=learnt))
    loss = alpha_cl_loss(*leaves[:2], objective, temperature=leaves[2], **setting)
    weights = torch.linspace(-0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    leaves = leaves[: 2 + learnt]
    found = torch.autograd.grad((loss * weights).sum(), leaves, materialize_grads=True)
    return [loss.detach(), *found]


@pytest.mark.parametrize("member", BUILT_IN + CUSTOM, ids=member_id)
def test_equals_reference(member, small_tiles, poisoned):
    """The oracle gives each anchor a list of its own; margins, ids and max_gap change in turn."""
    z1, z2 = pair(9, 6, noise=1.0)
    guide = pair(9, 5, torch.float32, noise=1.0, seed=3)
    ids = torch.tensor([3, 1, 3, 7, 7, 8, -2, 9, 5])
    kind = objectives.make(*member).kind or "exp"
    for k, (negatives, symmetric, similarity) in enumerate(every_setting()):
        turn = k + (BUILT_IN + CUSTOM).index(member)
        if not is_due(turn, 4):
            continue
        given = {
            "negatives": negatives, "symmetric": symmetric, "similarity": similarity,
            "guide": guide, "guide_margin": (0.0, 0.3, -0.3)[turn // 4 % 3],
            "ids": ids if turn // 4 % 2 else None, "max_gap": 0.5 if turn % 5 == 0 else None,
            "reduction": REDUCTIONS[turn % 3],
        }  # fmt: skip
        truth = evaluate(z1, z2, member, backend="reference", **given)
        for backend in SERVING:
            if ops.unsupported(backend, z1.device, z1.dtype, None, kind):
                continue
            ours = evaluate(z1, z2, member, backend=backend, **given)
            for a, b in zip(ours, truth, strict=True):
                floor = max(1e-3, 1e-2 * float(truth[1].norm()))
                assert relative_error(a, b, floor) < 1e-9, (backend, given)


SETS = [] if cpu.load_error() else [name for name, here in cpu.instruction_sets().items() if here]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set(name, dtype):
    """Several blocks, and features of the guide beyond one chain of additions."""
    z1, z2 = pair(75, 20, dtype, noise=1.0)
    guide = pair(75, 150, torch.float32, noise=1.0, seed=3)
    bound = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 2e-2)
    for similarity, member in (
        ("cosine", ("infonce", {})), ("dot", ("infonce", {})), ("cosine", ("triplet", {})),
        ("euclidean", ("alpha_direct", {})), ("cosine", ("alpha_square", {})),
    ):  # fmt: skip
        setting = {"similarity": similarity, "guide": guide}
        with cpu.forced_instruction_set(name):
            ours = evaluate(z1, z2, member, backend="cpu", **setting)
        truth = evaluate(z1.double(), z2.double(), member, backend="blocked", **setting)
        for a, b in zip(ours, truth, strict=True):
            assert relative_error(a, b, floor=1e-3) < bound, (similarity, member)


@pytest.mark.parametrize("member", [("infonce", {}), ("alpha_direct", {}), ("triplet", {})])
@pytest.mark.parametrize("negatives", ["two_view", "cross_view"])
def test_same_bits_for_any_workspace_and_threads(member, negatives, monkeypatch):
    """One sweep computes the guide's similarities, or both do; a kept tile has its marks."""
    z1, z2 = pair(150, 9, torch.float32, noise=1.0)
    for similarity in ("cosine", "dot"):
        setting = {"negatives": negatives, "similarity": similarity, "guide": guides_of(150)}
        found = []
        for threads in (1, 3):
            monkeypatch.setattr(cpu, "_threads", lambda *args, n=threads: n)
            for workspace in (0, 100_000, 1 << 26):
                found.append(evaluate(z1, z2, member, workspace=workspace, **setting))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def guides_of(n):
    return pair(n, 7, torch.float32, noise=1.5, seed=5)


@pytest.mark.parametrize("backend", [*SERVING, "reference"])
def test_copies_of_the_positive_count(backend):
    """Their similarity to the anchor equals the positive's, in whatever order it was added up."""
    for dim in (3, 64, 700, 3000):
        g1 = torch.randn(24, dim, generator=torch.Generator().manual_seed(dim))
        guide = g1, torch.randn(6, dim).repeat_interleave(4, 0)
        z1, z2 = pair(24, 5, torch.float32)
        setting = {"negatives": "cross_view", "symmetric": False, "reduction": "none"}
        setting |= {"guide": guide, "backend": backend}
        a, b = (normalize(g).double() for g in guide)
        t, own = a @ b.t(), (a * b).sum(1, keepdim=True)
        keep = (t <= own + 1e-6) & ~torch.eye(24, dtype=torch.bool)
        assert ((t - own).abs() < 1e-6).sum() == 24 * 4
        gap = normalize(z1).double() @ normalize(z2).double().t()
        gap = gap - gap.diagonal()[:, None]
        truth = ((gap / 0.3).exp() * keep).sum(1).log1p().float()
        torch.testing.assert_close(alpha_cl_loss(z1, z2, temperature=0.3, **setting), truth)


@pytest.mark.parametrize("backend", SERVING)
def test_whole_numbers_at_the_limit_count(backend):
    """`loss_against` compares with the number given: a similarity that equals it counts."""
    z, y = (normalize(x) for x in pair(N, 6, torch.float32, noise=1.0))
    eye = torch.eye(4)
    g, h = eye[torch.arange(N) % 4], eye[torch.arange(N) // 3 % 4]
    threshold = torch.arange(N).float() % 2  # the similarities are 0 and 1
    keep = g @ h.t() <= threshold[:, None]
    gap = z @ y.t()
    truth = ((gap / 0.5).exp() * keep).sum(1).log1p()
    given = {"guide": (g, h, threshold), "backend": backend, "reduction": "none"}
    torch.testing.assert_close(loss_against(z, y, torch.zeros(N), **given), truth)


@pytest.mark.skipif(bool(cpu.load_error()), reason="no compiled CPU backend")
def test_a_step_computes_the_guides_similarities_once(monkeypatch):
    """InfoNCE is one native step with the guide; what counts its negatives goes by sweeps."""
    steps = []
    run = cpu_step.Plan.run
    monkeypatch.setattr(cpu_step.Plan, "run", lambda *a: steps.append(1) or run(*a))
    z1, z2 = pair(20, 6, torch.float32)
    for member, reduction, count in (
        (("infonce", {}), "mean", 1), (("infonce", {}), "none", 2),
        (("alpha_direct", {"alpha_eps": 0.1}), "mean", 0),
    ):  # fmt: skip
        steps.clear()
        evaluate(z1, z2, member, reduction=reduction, guide=guides_of(20))
        assert len(steps) == count, member


@pytest.mark.parametrize("backend", SERVING)
def test_nan(backend):
    """A similarity of the guide that is no number is not above any; other NaN are not lost."""
    z1, z2 = pair(8, 4)
    g1, g2 = guides_of(8)
    g1[3, 1] = torch.nan
    for member in (("infonce", {}), ("triplet", {}), ("alpha_square", {})):
        setting = {"guide": (g1, g2), "negatives": "one_view", "reduction": "none"}
        losses = evaluate(z1, z2, member, backend=backend, **setting)[0]
        assert losses.isfinite().all()
        z = z1.clone()
        z[5, 0] = torch.nan
        losses = evaluate(z, z2, member, backend=backend, **setting)[0]
        assert losses[3:6:2].isnan().all()


def test_learnt_temperature():
    z1, z2 = pair(N, 6, noise=1.0)
    tau = torch.tensor(TAU, dtype=torch.float64, requires_grad=True)

    def of(tau):
        return alpha_cl_loss(z1, z2, temperature=tau, guide=guides())

    (found,) = torch.autograd.grad(of(tau), tau)
    step = 1e-6
    slope = (of(tau.detach() + step) - of(tau.detach() - step)) / (2 * step)
    torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-9)


def test_explicit_negatives():
    z, y = (normalize(x) for x in pair(N, 6, noise=1.0))
    g, h = guides()
    positive, threshold = torch.linspace(0, 0.5, N).double(), torch.linspace(-0.5, 0.5, N)
    keep = normalize(g).double() @ normalize(h).double().t() <= threshold[:, None].double()
    assert 20 < keep.sum() < 130
    gap = z @ y.t() - positive[:, None]
    truth = ((gap / 0.5).exp() * keep).sum(1).log1p().mean()
    ours = loss_against(z, y, positive, guide=(g, h, threshold))
    torch.testing.assert_close(ours, truth)


def against_over_ranks(group, sizes, among, reduction):
    """The largest error of a rank's losses and gradients, which are averaged over the ranks."""
    rank, world = dist.get_rank(group), len(sizes)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    theirs = mine if among else slice(rank, None, world)
    z, y = (normalize(x) for x in pair(sum(sizes), 5, noise=1.0))
    g, h = pair(sum(sizes), 3, torch.float32, noise=1.5, seed=5)
    positive, threshold = (torch.linspace(a, 0.4, len(z)).double() for a in (0, -0.2))
    weights = torch.linspace(-0.5, 1.5, len(z)).double()
    found = []
    for own, others, options in (
        (slice(None), slice(None), {}),
        (mine, theirs, {"process_group": group}),
    ):
        leaves = [x[own].clone().requires_grad_() for x in (z, positive)]
        leaves += [] if among else [y[others].clone().requires_grad_()]
        loss = loss_against(
            leaves[0], None if among else leaves[2], leaves[1], "alpha_square", temperature=0.4,
            guide=(g[own], None if among else h[others], threshold[own]), reduction=reduction,
            max_gap=0.3, **options,
        )  # fmt: skip
        weight = torch.tensor(1.0) if reduction == "mean" else weights[own]
        if options and reduction == "none":
            weight = weight * world
        found.append([loss.detach(), *torch.autograd.grad((loss * weight).sum(), leaves)])
    truth, ours = found
    if reduction == "none":
        truth[0] = truth[0][mine]
    errors = [ours[0] - truth[0]]
    for a, b, cut in zip(ours[1:], truth[1:], (mine, mine, theirs), strict=False):
        errors.append(a / world - b[cut])
    return max(float(x.abs().max()) for x in errors if x.numel())


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("among", [False, True])
def test_explicit_negatives_over_processes(ranks, among):
    for sizes, reduction in (((5,), "mean"), ((5, 3), "none"), ((4, 0, 2), "mean")):
        options = {"sizes": sizes, "among": among, "reduction": reduction}
        assert max(ranks.run(len(sizes), against_over_ranks, **options)) < 1e-10


def refused_over_ranks(group, changes):
    z, y = pair(4, 3)
    options = {"guide": (z, y, z[:, 0]), **changes.get(dist.get_rank(group), {})}
    try:
        loss_against(z, y, z[:, 0], process_group=group, **options)
    except (TypeError, ValueError) as error:
        return str(error)


@pytest.mark.xdist_group("ranks")
def test_all_ranks_refuse(ranks):
    z, y = pair(4, 3)
    for changes, message in (
        ({1: {"guide": None}}, "every rank must make the same call, got .*guide of width 3"),
        ({1: {"guide": (z, y[:2], z[:, 0])}}, r"rank 1: guide\[1\] must have as many rows"),
        ({0: {"backend": "triton"}}, "rank 0: backend 'triton' cannot serve this call: guide"),
        ({1: {"objective": "nothing"}}, "rank 1: objective must be one of"),
    ):
        for text in ranks.run(2, refused_over_ranks, changes=changes):
            assert re.match(message, text), text


@pytest.mark.parametrize("among", [False, True])
def test_explicit_negatives_with_weights_or_temperatures(among):
    z, y = (normalize(x) for x in pair(N, 6, noise=1.0))
    g, h = guides()
    positive, threshold = torch.linspace(0, 0.5, N).double(), torch.linspace(-0.5, 0.5, N)
    tau, weights = torch.linspace(0.2, 0.5, N).double(), torch.linspace(-1, 0.5, N).double()
    others, of_guide = (z, g) if among else (y, h)
    keep = normalize(g).double() @ normalize(of_guide).double().t() <= threshold[:, None].double()
    if among:
        keep &= ~torch.eye(N, dtype=torch.bool)
    gap = z @ others.t() - positive[:, None]
    given = {"guide": (g, None if among else h, threshold), "reduction": "none"}
    for options, exponents in (
        ({"temperature": tau}, gap / tau[:, None]),
        ({"log_weights": weights}, gap / 0.5 + weights),
    ):
        ours = loss_against(z, None if among else y, positive, **options, **given)
        torch.testing.assert_close(ours, (exponents.exp() * keep).sum(1).log1p())


def test_nothing_left_gives_0():
    z1, z2 = (z.requires_grad_() for z in pair(N, 6))
    for objective in ("infonce", "uniform", "alpha_entropy"):
        loss = alpha_cl_loss(z1, z2, objective, guide=guides(), guide_margin=10.0)
        assert loss == 0
        assert all(not g.any() for g in torch.autograd.grad(loss, (z1, z2)))


def test_module_and_compiled_graph():
    z1, z2 = pair(N, 6, torch.float32)
    module = FusedAlphaCLLoss(negatives="cross_view", guide_margin=0.1)
    expected = alpha_cl_loss(z1, z2, negatives="cross_view", guide=guides(), guide_margin=0.1)
    assert module(z1, z2, guide=guides()) == expected != module(z1, z2)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda a, b, g, h: module(a, b, guide=(g, h)), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(z1, z2, *guides()), expected)


def test_explicit_negatives_in_a_compiled_graph():
    z, y = (normalize(x) for x in pair(N, 6, torch.float32))
    positive, threshold = torch.zeros(N), torch.zeros(N)
    for negatives, guide in ((y, (*guides(), threshold)), (None, (guides()[0], None, threshold))):

        def loss(z, others, *of_guide):
            return loss_against(z, others, positive, guide=of_guide)

        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        z = z.detach().requires_grad_()
        expected = loss(z, negatives, *guide)
        assert expected != loss_against(z, negatives, positive)
        found = compiled(z, negatives, *guide)
        torch.testing.assert_close(found, expected)
        truth = torch.autograd.grad(expected, z)
        torch.testing.assert_close(torch.autograd.grad(found, z), truth)


def test_the_guide_gets_no_gradient():
    z1, z2 = (z.requires_grad_() for z in pair(N, 6, torch.float32))
    guide = tuple(g.requires_grad_() for g in guides())
    alpha_cl_loss(z1, z2, guide=guide).backward()
    assert guide[0].grad is guide[1].grad is None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"guide": (torch.ones(N, 0),) * 2}, ValueError, r"guide\[0\] must have at least 1 column"),
        ({"guide": torch.ones(2)}, TypeError, r"guide must be None or \(g1, g2\)"),
        (
            {"guide": (torch.ones(N, 2), torch.ones(3, 2))},
            ValueError,
            r"guide\[1\] must have 12 rows",
        ),
        ({"guide": (torch.ones(N, 2), torch.ones(N, 3))}, ValueError, "one width .* got 2 and 3"),
        ({"guide": guides(), "guide_margin": "x"}, TypeError, "guide_margin must be a number"),
        ({"guide": guides(), "guide_margin": float("nan")}, ValueError, "guide_margin must be fin"),
        ({"guide": guides(), "backend": "triton"}, ValueError, "guide: not in .*; use cpu or bloc"),
    ],
)
def test_bad_arguments(given, error, message):
    z1, z2 = pair(N, 6)
    with pytest.raises(error, match=message):
        alpha_cl_loss(z1, z2, **given)
    if "guide_margin" in given:
        margin = {"guide_margin": given["guide_margin"]}
        with pytest.raises(error, match=message):
            FusedAlphaCLLoss(**margin)
        with pytest.raises(error, match=message):
            alpha_cl_loss(z1, z2, **margin)


def test_repr_shows_the_margin():
    assert "guide_margin=0.1" in repr(FusedAlphaCLLoss(guide_margin=0.1))
    assert "guide_margin" not in repr(FusedAlphaCLLoss())


def test_bad_guides_of_explicit_negatives():
    z, y = pair(N, 6)
    g, h = guides()
    one = torch.ones(N)
    for guide, message in (
        ((g, h), "guide must be None or"),
        ((g, h[:3], one), r"guide\[1\] must have as many rows as negatives"),
        ((g, h, one[:3]), r"guide\[2\] must be a floating-point tensor"),
        ((g, h[:, :2], one), r"guide\[1\] must have 7 columns, got 2"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            loss_against(z, y, z[:, 0], guide=guide)
    with pytest.raises(ValueError, match=r"guide\[1\] must be None with negatives=None"):
        loss_against(z, None, z[:, 0], guide=(g, h, one))
