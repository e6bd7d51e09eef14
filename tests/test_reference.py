"""The oracle against formulas written out here once more, from the paper's definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from family import BUILT_IN, MEMBERS, MODES, member_id, pair

from alphacl_fast import objectives
from alphacl_fast.backend import reference
from alphacl_fast.functional import SIMILARITIES, alpha_cl_loss

TAU = 0.3


def anchors_and_negatives(z1, z2, similarity, negatives, symmetric):
    """Plain loops: for every anchor the positive's and the negatives' (t, d²)."""
    unit = [z / z.norm(dim=1, keepdim=True) if similarity == "cosine" else z for z in (z1, z2)]

    def t(a, b):
        return -((a - b) ** 2).sum() / 2 if similarity == "euclidean" else a @ b

    n = len(z1)
    out = []
    towers = (
        [(0, 1)]
        if negatives == "one_view" or (negatives == "cross_view" and not symmetric)
        else [(0, 1), (1, 0)]
    )
    for own, other in towers:
        for i in range(n):
            a = unit[own][i]
            if negatives == "two_view":
                others = [unit[v][j] for v in (0, 1) for j in range(n) if j != i]
            else:
                others = [
                    unit[own if negatives == "one_view" else other][j] for j in range(n) if j != i
                ]
            out.append((t(a, unit[other][i]), torch.stack([t(a, b) for b in others])))
    return out


def naive_row(name, o, gap, d, tau):
    """L_i of a built-in objective from Δ_ij and d²_ij, straight from the definitions."""
    if name == "infonce":
        loss = torch.log(o["epsilon"] + torch.exp(gap / tau).sum())
        return tau * loss if o["temperature_scaled"] else loss
    if name == "mine":
        return torch.log(torch.exp(gap).sum())
    if name == "triplet":
        return (gap + o["margin"]).clamp(min=0).sum()
    if name == "soft_triplet":
        return tau * torch.log(1 + torch.exp(gap / tau + o["margin"]).sum())
    if name == "n_plus_1_tuplet":
        return torch.log(1 + torch.exp(gap).sum())
    if name == "lifted_structured":
        return torch.log(torch.exp(gap + o["margin"]).sum()).clamp(min=0) ** 2
    if name == "modified_triplet":
        return (1 / (1 + torch.exp(-o["scale"] * gap))).sum()
    if name == "triplet_contrastive":
        return gap.sum()
    if name == "uniform":
        return gap.mean()
    if name in ("alpha_square", "alpha_gamma"):
        a = min_player(name, o, d, tau)
    else:
        if name == "alpha_direct":
            w = torch.exp(
                -(d if o["exponent"] == 2 else d.clamp(min=0) ** (o["exponent"] / 2)) / tau
            )
        elif name == "alpha_entropy":
            w = torch.exp(-d / tau)
        else:
            w = (d.clamp(min=0) ** (o["exponent"] / 2) + tau) ** -o["order"]
        a = w / (w.sum() + o["alpha_eps"] * len(d)) if o.get("normalized", True) else w
    return ((a.detach() if o["detach_alpha"] else a) * gap).sum()


def min_player(name, o, d, tau):
    """Sparsemax by sorting (Martins and Astudillo 2016).

    The weights of α_gamma follow by bisection with an exactly differentiated root.
    """
    if name == "alpha_square":
        z = -d / tau
        ordered = z.sort(descending=True).values
        k = torch.arange(1, len(d) + 1, dtype=d.dtype)
        support = int((1 + k * ordered > ordered.cumsum(0)).sum())
        return (z - (ordered[:support].sum() - 1) / support).clamp(min=0)
    power = -1 / o["gamma"]
    low, high = d.min().item() - tau * len(d) ** o["gamma"], d.min().item()
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (low, mu) if ((d.detach() - mu) / tau).pow(power).sum() > 1 else (mu, high)
    mu = torch.as_tensor(low, dtype=d.dtype).detach().requires_grad_()
    total = ((d.detach() - mu) / tau).pow(power).sum()
    (slope,) = torch.autograd.grad(total, mu)
    mu = mu.detach() - (((d - mu.detach()) / tau).pow(power).sum() - 1) / slope
    return ((d - mu) / tau).pow(power)


@pytest.mark.parametrize("member", BUILT_IN, ids=member_id)
@pytest.mark.parametrize(("negatives", "symmetric"), MODES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_definitions(member, negatives, symmetric, similarity):
    z1, z2 = (z.requires_grad_() for z in pair(4, 3))
    objective = objectives.make(*member)
    c = 0.0 if similarity == "euclidean" else 1.0
    rows = anchors_and_negatives(z1, z2, similarity, negatives, symmetric)
    tau = torch.tensor(TAU, dtype=torch.float64, requires_grad=True)
    truth = torch.stack(
        [naive_row(objective.name, objective.options, t - p, c - t, tau) for p, t in rows]
    )
    ours = reference.row_losses(z1, z2, tau, objective, similarity, negatives, symmetric)
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)
    weights = torch.randn_like(truth)
    expected = torch.autograd.grad(
        (truth * weights).sum(), [z1, z2, tau], allow_unused=True, materialize_grads=True
    )
    actual = torch.autograd.grad(
        (ours * weights).sum(), [z1, z2, tau], allow_unused=True, materialize_grads=True
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


def test_infonce_is_cross_entropy():
    z1, z2 = pair(20, 8)
    f = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (f @ f.t() / TAU).fill_diagonal_(-math.inf)
    truth = F.cross_entropy(logits, torch.arange(40).roll(20))
    ours = alpha_cl_loss(z1, z2, temperature=TAU, backend="reference")
    assert abs(ours - truth) <= 1e-14
    clip = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).t() / TAU
    labels = torch.arange(20)
    truth = (F.cross_entropy(clip, labels) + F.cross_entropy(clip.t(), labels)) / 2
    assert (
        abs(
            alpha_cl_loss(z1, z2, temperature=TAU, negatives="cross_view", backend="reference")
            - truth
        )
        <= 1e-14
    )


# A detached α is a constant that finite differences cannot hold fixed; test_definitions covers
# those.
DIFFERENTIABLE = [m for m in MEMBERS if not getattr(objectives.make(*m), "detach_alpha", False)]


@pytest.mark.parametrize("member", DIFFERENTIABLE, ids=member_id)
def test_gradcheck(member):
    objective = objectives.make(*member)
    for negatives, symmetric in MODES:
        z1, z2 = (z.requires_grad_() for z in pair(4, 3, seed=3))
        tau = torch.tensor(
            0.4, dtype=torch.float64, requires_grad=objective.tau_gradient is not None
        )

        def loss(z1, z2, tau, negatives=negatives, symmetric=symmetric):
            return reference.row_losses(z1, z2, tau, objective, "cosine", negatives, symmetric)

        assert torch.autograd.gradcheck(loss, (z1, z2, tau))


def energy_terms(z1, z2, tau):
    t, pos = reference.negatives_and_positives(z1, z2, "cosine", "two_view", True)
    gap = t - pos[:, None]
    alpha = (t / tau).softmax(1)
    entropy = -(alpha * alpha.log()).sum(1)
    return gap, alpha, entropy


def test_infonce_is_the_minimum_over_alpha():
    """L_infonce(ε=0, scaled) = −min_α [E_α − R_H], R_H = τ·entropy: equality at the softmax,
    inequality elsewhere.
    """
    z1, z2 = pair(10, 6)
    loss = alpha_cl_loss(
        z1,
        z2,
        "infonce",
        epsilon=0.0,
        temperature_scaled=True,
        temperature=TAU,
        reduction="none",
        backend="reference",
    )
    gap, alpha, entropy = energy_terms(z1, z2, TAU)
    # E_α = Σ α (d² − d²_i) = −Σ α Δ
    torch.testing.assert_close(loss, (alpha * gap).sum(1) + TAU * entropy, rtol=1e-12, atol=1e-13)
    for _ in range(20):
        other = (torch.randn_like(gap) * 3).softmax(1)
        objective_value = -(other * gap).sum(1) + TAU * (other * other.log()).sum(1)
        assert (loss >= -objective_value - 1e-12).all()


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_alpha_entropy_is_scaled_infonce_gradient(similarity, backend):
    z1, z2 = (z.requires_grad_() for z in pair(12, 5))
    kwargs = {"temperature": TAU, "similarity": similarity, "backend": backend}
    entropy = torch.autograd.grad(alpha_cl_loss(z1, z2, "alpha_entropy", **kwargs), [z1, z2])
    infonce = torch.autograd.grad(alpha_cl_loss(z1, z2, "infonce", epsilon=0.0, **kwargs), [z1, z2])
    for a, b in zip(entropy, infonce, strict=True):
        torch.testing.assert_close(a, TAU * b, rtol=1e-12, atol=1e-15)


def test_uniform_is_difference_of_means():
    z1, z2 = pair(15, 4)
    f = F.normalize(torch.cat([z1, z2]), dim=1)
    s = f @ f.t()
    mask = ~torch.eye(15, dtype=torch.bool).repeat(2, 2)
    truth = s[mask].mean() - s.diagonal(15).mean()
    for backend in ("reference", "blocked"):
        assert abs(alpha_cl_loss(z1, z2, "uniform", backend=backend) - truth) < 1e-14


@pytest.mark.parametrize(
    "objective",
    [
        objectives.alpha_direct(),
        objectives.alpha_entropy(),
        objectives.alpha_inverse(),
        objectives.alpha_square(),
        objectives.alpha_gamma(),
        objectives.PairWeight(lambda d: torch.exp(-d)),
    ],
    ids=str,
)
@pytest.mark.parametrize("tau", [1e-3, 0.05, 0.5, 5.0])
def test_normalized_alpha_sums_to_one(objective, tau):
    z1, z2 = pair(30, 8)
    t, _ = reference.negatives_and_positives(z1, z2, "cosine", "two_view", True)
    alpha = reference.alpha(objective, t, torch.tensor(tau, dtype=torch.float64), 1.0)
    assert (alpha >= 0).all()
    torch.testing.assert_close(
        alpha.sum(1), torch.ones(60, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("tau", [1e-3, 0.05, 0.5, 5.0])
@pytest.mark.parametrize(
    ("objective", "slope"),
    # r′(α) of the separable regulariser: d² − r′(α) is one constant per row where α > 0 and larger
    # where α = 0
    [
        (objectives.alpha_square(), lambda a, tau: -tau * a),
        (objectives.alpha_gamma(gamma=2.0), lambda a, tau: tau * a**-2),
        (objectives.alpha_entropy(), lambda a, tau: -tau * (a.log() + 1)),
    ],
    ids=["square", "gamma", "entropy"],
)
def test_kkt_of_min_players(objective, slope, tau):
    z1, z2 = pair(30, 8)
    t, _ = reference.negatives_and_positives(z1, z2, "cosine", "two_view", True)
    alpha = reference.alpha(objective, t, torch.tensor(tau, dtype=torch.float64), 1.0)
    active = alpha > 1e-9  # below, log α and α^(−2) have lost their digits
    multiplier = (1 - t) - slope(alpha, tau)
    scale = multiplier[active].abs().max()
    low = multiplier.masked_fill(~active, math.inf).amin(1, keepdim=True)
    high = multiplier.masked_fill(~active, -math.inf).amax(1, keepdim=True)
    assert float((high - low).max() / scale) < 1e-7
    if objective.name == "alpha_square":
        assert ((multiplier >= high - 1e-9) | active).all()
        if tau <= 0.05:
            assert (alpha == 0).any()
