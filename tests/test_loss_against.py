"""`loss_against` with log-weights of the negatives, a temperature per anchor, and processes."""

import pytest
import torch
import torch.distributed as dist
from conftest import set_tiles
from family import BACKENDS, SLOW, pair, relative_error

from alphacl_fast import loss_against, objectives
from alphacl_fast.functional import REDUCTIONS

#: (objective, its options, φ(ℓ, τ) of ℓ = log Σ_j e^{w_j} exp(Δ_ij/τ), whether it depends on τ)
EXPONENTIAL = [
    ("infonce", {}, lambda ell, tau: torch.logaddexp(ell, torch.zeros_like(ell)), True),
    ("infonce", {"epsilon": 0.0, "temperature_scaled": True}, lambda ell, tau: tau * ell, True),
    (
        "soft_triplet",
        {"margin": 0.3},
        lambda ell, tau: tau * torch.logaddexp(ell + 0.3, torch.zeros_like(ell)),
        True,
    ),
    ("mine", {}, lambda ell, tau: ell, False),
    ("lifted_structured", {}, lambda ell, tau: torch.relu(ell + 1).square(), False),
]


def dense(z, negatives, positive, phi, uses_tau, *, tau=0.5, w=None, ids=None, negative_ids=None):
    """(n,) losses by the definition; τ is a number or (n,)."""
    own = negatives is None
    other = z if own else negatives
    gap = z @ other.t() - positive[:, None]
    tau = torch.as_tensor(tau, dtype=z.dtype).expand(len(z)) if uses_tau else torch.ones(len(z))
    logits = gap / tau[:, None].to(z.dtype)
    if w is not None:
        logits = logits + w
    excluded = torch.zeros_like(gap, dtype=torch.bool)
    if own:
        excluded |= torch.eye(len(z), dtype=torch.bool)
    if ids is not None:
        excluded |= ids[:, None] == (ids if own else negative_ids)
    return phi(logits.masked_fill(excluded, -torch.inf).logsumexp(1), tau)


def differentiated(value, leaves):
    weights = torch.linspace(1.0, -0.5, value.numel(), dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), leaves)]


def assert_equal(ours, truth, bound=1e-11):
    for k, (a, b) in enumerate(zip(ours, truth, strict=True)):
        assert relative_error(a, b) < bound, k


def leaves_for(n, m, seed=0):
    """z (n, 5), negatives (m, 5), t⁺ (n,), w (m,)."""
    z, _ = pair(n, 5, seed=seed)
    negatives, w = pair(m, 5, seed=seed + 1)
    given = z / 2, negatives / 2, (z / 2).square().sum(1) - 0.3, w[:, 0] * 2
    return [x.clone().requires_grad_() for x in given]


def tau_leaf(value=0.4):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", EXPONENTIAL, ids=lambda c: f"{c[0]}{len(c[1])}")
@pytest.mark.parametrize("among", [False, True])
def test_log_weights(backend, case, among, monkeypatch, poisoned):
    """Each gradient is exact, that in w too; among themselves rows weigh as negatives only."""
    set_tiles(monkeypatch, 16)
    name, options, phi, uses_tau = case
    if backend in SLOW and (name != "infonce" or len(options) != 2 * among):
        pytest.skip("a slow backend runs InfoNCE")
    n, m = (7, 9) if backend in SLOW else (21, 33)
    z, negatives, positive, w = leaves_for(n, n if among else m)
    tau = tau_leaf()
    leaves = [z, positive, w] + [tau] * uses_tau + [negatives] * (not among)
    against = None if among else negatives
    truth = dense(z, against, positive, phi, uses_tau, tau=tau, w=w)
    ours = loss_against(
        z,
        against,
        positive,
        name,
        temperature=tau if uses_tau else 0.4,
        log_weights=w,
        reduction="none",
        backend=backend,
        **options,
    )
    assert_equal(differentiated(ours, leaves), differentiated(truth, leaves))
    if backend not in SLOW:
        (alone,) = torch.autograd.grad(
            loss_against(
                z.detach(), None if among else negatives.detach(), positive.detach(), name,
                temperature=0.4, log_weights=w, backend=backend, **options,
            ),
            w,
        )  # fmt: skip
        (expected,) = torch.autograd.grad(
            dense(z, against, positive, phi, uses_tau, tau=0.4, w=w).mean(), w
        )
        assert relative_error(alone, expected) < 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("among", [False, True])
def test_log_weights_of_minus_infinity(among, backend):
    """Such a row is nobody's negative; among themselves it is an anchor as before."""
    n, m = (7, 9) if backend in SLOW else (21, 33)
    z, negatives, positive, w = leaves_for(n, n if among else m)
    with torch.no_grad():
        w[1::3] = -torch.inf
    counts = w > -torch.inf
    for k, (most, tau) in enumerate(
        [(None, 0.4), (0.1, tau_leaf()), (0.1, tau_leaf(0.2).expand(n))]
    ):
        leaves = [z, positive, w] + [negatives] * (not among) + [tau] * (k > 0)
        gap = z @ (z if among else negatives).t() - positive[:, None]
        keep = counts & ~(gap > (most or torch.inf))
        if among:
            keep &= ~torch.eye(n, dtype=torch.bool)
        each = tau.view(-1, 1) if k else tau
        terms = (gap / each + torch.where(counts, w, 0.0)).exp() * keep
        ours = loss_against(
            z, None if among else negatives, positive, temperature=tau, log_weights=w,
            max_gap=most, reduction="none", backend=backend,
        )  # fmt: skip
        truth = differentiated(terms.sum(1).log1p(), leaves)
        assert_equal(differentiated(ours, leaves), truth)
        assert all(x.isfinite().all() for x in truth)


def test_log_weights_with_ids():
    z, negatives, positive, w = leaves = leaves_for(12, 20)
    _, _, phi, _ = EXPONENTIAL[0]
    ids = {"ids": torch.arange(12) % 4, "negative_ids": torch.arange(20) % 6}
    truth = dense(z, negatives, positive, phi, True, w=w, **ids)
    ours = loss_against(z, negatives, positive, log_weights=w, reduction="none", **ids)
    assert_equal(differentiated(ours, leaves), differentiated(truth, leaves))


def test_log_weights_do_not_depend_on_the_temperature():
    """e^{w_j} stays where e^{Δ/τ} leaves the range of float32."""
    z, negatives, positive, w = (x.float() for x in leaves_for(12, 20))
    truth = dense(
        z.double(), negatives.double(), positive.double(), EXPONENTIAL[0][2], True, tau=1e-3,
        w=w.double(),
    )  # fmt: skip
    ours = loss_against(z, negatives, positive, temperature=1e-3, log_weights=w, reduction="none")
    assert relative_error(ours, truth) < 1e-6


@pytest.mark.parametrize("case", EXPONENTIAL[:3], ids=lambda c: f"{c[0]}{len(c[1])}")
@pytest.mark.parametrize("among", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
def test_temperature_per_anchor(case, among, with_ids, monkeypatch, poisoned):
    set_tiles(monkeypatch, 16)
    name, options, phi, _ = case
    z, negatives, positive, w = leaves_for(21, 21 if among else 33)
    tau = torch.linspace(0.2, 1.5, 21, dtype=torch.float64).requires_grad_()
    leaves = [z, positive, w, tau] + [negatives] * (not among)
    ids = {"ids": torch.arange(21) % 5} if with_ids else {}
    if with_ids and not among:
        ids["negative_ids"] = torch.arange(33) % 7
    against = None if among else negatives
    truth = dense(z, against, positive, phi, True, tau=tau, w=w, **ids)
    for reduction in REDUCTIONS:
        ours = loss_against(
            z, against, positive, name, temperature=tau, log_weights=w, reduction=reduction,
            **ids, **options,
        )  # fmt: skip
        expected = truth if reduction == "none" else getattr(truth, reduction)()
        found = [ours.detach(), *torch.autograd.grad(ours.sum(), leaves)]
        wanted = torch.autograd.grad(expected.sum(), leaves, retain_graph=True)
        assert_equal(found, [expected.detach(), *wanted])


def test_one_temperature_for_all_is_the_same():
    z, negatives, positive, _ = leaves_for(9, 14)
    one = loss_against(z, negatives, positive, temperature=0.3)
    each = loss_against(z, negatives, positive, temperature=torch.full((9,), 0.3).double())
    torch.testing.assert_close(one, each)
    tensor = torch.tensor([0.3], dtype=torch.float64)
    assert loss_against(z, negatives, positive, temperature=tensor) == one


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("alpha_direct", {"log_weights": torch.zeros(6)}, "log_weights must be None unless"),
        ("triplet", {"log_weights": torch.zeros(6)}, "got log_weights with triplet"),
        ("infonce", {"log_weights": torch.zeros(4)}, r"log_weights must be .* shape \(6,\)"),
        ("infonce", {"log_weights": torch.arange(6)}, "log_weights must be a floating-point"),
        ("infonce", {"temperature": torch.ones(6)}, r"temperature must be .* shape \(4,\)"),
        ("infonce", {"temperature": -torch.ones(4)}, "temperature must be between 1e-15"),
        ("alpha_direct", {"temperature": torch.ones(4)}, "temperature must have one element"),
        ("mine", {"temperature": torch.ones(4)}, "temperature must have one element with mine"),
    ],
)
def test_refuses(objective, options, message):
    z, negatives, positive, _ = leaves_for(4, 6)
    with pytest.raises(ValueError, match=message):
        loss_against(z, negatives, positive, objective, **options)


# --- processes ------------------------------------------------------------------------------------


def parts(group, sizes, among, with_ids, reduction, objective):
    """The largest error of a rank's loss and gradients, which are averaged over the ranks as DDP
    does.
    """
    rank, world = dist.get_rank(group), len(sizes)
    total, first = sum(sizes), sum(sizes[:rank])
    mine = slice(first, first + sizes[rank])
    theirs = mine if among else slice(rank, None, world)
    given = leaves_for(total, total if among else 11)
    ids, negative_ids = torch.arange(total) % 3, torch.arange(len(given[1])) % 4
    exponential = objectives.make(objective).kind == "exp"
    weights = torch.linspace(-0.5, 1.5, total if reduction == "none" else 1).double()
    here = weights[mine] * world if reduction == "none" else weights
    found = []
    for own, others, weight, options in (
        (slice(None), slice(None), weights, {}),
        (mine, theirs, here, {"process_group": group}),
    ):
        cuts = own, others, own, others
        z, negatives, positive, w = leaves = [
            x.detach()[cut].clone().requires_grad_() for x, cut in zip(given, cuts, strict=True)
        ]
        leaves = [z, positive] + [w] * exponential + [negatives] * (not among)
        tau = tau_leaf()
        if exponential:
            leaves.append(tau)
            options = {"log_weights": w, **options}
        if with_ids:
            options = {"ids": ids[own], **options}
            if not among:
                options = {"negative_ids": negative_ids[others], **options}
        loss = loss_against(
            z, None if among else negatives, positive, objective, reduction=reduction,
            temperature=tau if exponential else 0.4, max_gap=0.5 if with_ids else None, **options,
        )  # fmt: skip
        found.append([loss.detach(), *torch.autograd.grad((loss * weight).sum(), leaves)])
    truth, ours = found
    if reduction == "none":
        truth[0] = truth[0][mine]
    kinds = [mine, mine] + [theirs] * exponential + [theirs] * (not among)
    for k, cut in enumerate(kinds, 1):
        truth[k], ours[k] = truth[k][cut], ours[k] / world
    assert all(a.shape == b.shape for a, b in zip(ours, truth, strict=True))
    return max(float((a - b).abs().max()) for a, b in zip(ours, truth, strict=True) if a.numel())


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("among", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
def test_processes_share_a_batch(ranks, among, with_ids):
    for k, sizes in enumerate([(5, 3), (1, 0, 2)]):
        options = {"sizes": sizes, "among": among, "with_ids": with_ids}
        options |= {"reduction": REDUCTIONS[2 * k], "objective": "infonce"}
        assert max(ranks.run(len(sizes), parts, **options)) < 1e-10
    options |= {"objective": "alpha_square", "reduction": "mean"}
    assert max(ranks.run(3, parts, **options)) < 1e-10


def tempered(group, sizes, shape):
    """The largest error of a rank's loss and gradients, with a temperature for each anchor or one
    for all.
    """
    rank, world = dist.get_rank(group), len(sizes)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    z, negatives, positive, _ = leaves_for(sum(sizes), 2 * sum(sizes))
    each = torch.linspace(0.2, 0.6, sum(sizes)).double()
    found = []
    for own, others, options in (
        (slice(None), slice(None), {}),
        (mine, slice(rank, None, world), {"process_group": group}),
    ):
        tau = each[own] if shape == "each" else torch.full(shape, 0.3).double()
        leaves = [x.detach()[own].clone() for x in (z, positive)]
        leaves = [x.requires_grad_() for x in (*leaves, negatives.detach()[others].clone(), tau)]
        options = {"max_gap": 0.5 if shape == "each" else None, **options}
        loss = loss_against(leaves[0], leaves[2], leaves[1], temperature=tau, **options)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    truth, ours = found
    errors = [ours[0] - truth[0], ours[1] / world - truth[1][mine]]
    errors += [ours[2] / world - truth[2][mine], ours[3] / world - truth[3][rank::world]]
    errors.append(ours[4] / world - truth[4][mine] if shape == "each" else ours[4] - truth[4])
    return max(float(x.abs().max()) for x in errors if x.numel())


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("shape", ["each", (), (1,)], ids=str)
def test_temperatures_over_processes(ranks, shape):
    """(1,) on a rank with one anchor is one per anchor exactly if it is so on the others, or if
    their values differ.
    """
    for sizes in ((3, 1, 0), (2, 1), (1, 1), (1,)):
        assert max(ranks.run(len(sizes), tempered, sizes=sizes, shape=shape)) < 1e-10


def refused(group, options):
    rank = dist.get_rank(group)
    given = {name: x[rank] if isinstance(x, list) else x for name, x in options.items()}
    z, negatives, positive, _ = leaves_for(given.pop("n", 4), 5)
    try:
        loss_against(z, negatives, positive, process_group=group, **given)
    except (TypeError, ValueError) as error:
        return str(error)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": [0.1, 0.2]}, "same temperature, got 0.1 on rank 0 and 0.2 on rank 1"),
        (
            {"temperature": [torch.full((4,), 0.1), torch.tensor(0.1)]},
            "same temperature, got one per anchor on rank 0 and 0.1 on rank 1",
        ),
        ({"log_weights": [None, torch.zeros(3)]}, "rank 1: log_weights must be"),
        ({"n": 0}, "all ranks together must have at least 1 row"),
        (
            {"n": 1, "objective": "mine", "temperature": [torch.tensor([x]) for x in (0.1, 0.2)]},
            "temperature must have one element with mine",
        ),
    ],
)
def test_all_ranks_refuse(ranks, options, message):
    assert all(message in text for text in ranks.run(2, refused, options=options))
