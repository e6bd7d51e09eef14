"""Several processes against one, float64 over gloo: every objective, mode and strategy, unequal batches, sub-groups."""

import copy
import itertools
import sys

import pytest
import torch
import torch.distributed as dist
from family import BUILT_IN, MEMBERS, MODES, every_setting, member_id, pair
from ranks import GROUPS, Failed, Ranks

from alphacl_fast import FusedAlphaCLLoss, distributed, objectives, ops
from alphacl_fast.functional import alpha_cl_loss

SPLITS = {1: [(7,)], 2: [(5, 3), (6, 0)], 3: [(7, 1, 4)], 4: [(3, 1, 4, 2), (3, 3, 3, 3)]}
STRATEGIES = ("gather", "ring")
LIMIT = 1e-10


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as started:
        yield started


def residual(value, truth):
    return float((value - truth).abs().max() / truth.abs().max().clamp(min=1.0)) if truth.numel() else 0.0


def differentiate(z1, z2, member, tau, reduction, weights, **options):
    """[loss, dz1, dz2(, dτ)] for given weights of the output."""
    objective = objectives.make(*member)
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    temperature = torch.tensor(tau, dtype=torch.float64, requires_grad=objective.tau_gradient is not None)
    loss = alpha_cl_loss(z1, z2, objective, temperature=temperature, reduction=reduction, **options)
    inputs = [z1, z2] + ([temperature] if temperature.requires_grad else [])
    return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), inputs)]


def residuals(group, cases, sizes, strategy, dim=5, tau=0.3, dtype=torch.float64):
    """Largest residual of each case (member, negatives, symmetric, similarity, reduction), gradients after averaging."""
    rank, world = dist.get_rank(group), len(sizes)
    total, first = sum(sizes), sum(sizes[:rank])
    mine = slice(first, first + sizes[rank])
    z1, z2 = pair(total, dim)
    z1, z2 = z1 / 2, z2 / 2
    found = []
    for member, negatives, symmetric, similarity, reduction in cases:
        options = {"negatives": negatives, "symmetric": symmetric, "similarity": similarity}
        views = 2 if negatives == "two_view" else 1
        weights = torch.tensor(1.7, dtype=torch.float64)
        here = weights
        if reduction == "none":
            weights = torch.linspace(-0.5, 1.5, views * total, dtype=torch.float64)
            here = weights.view(views, total)[:, mine].flatten() * world  # each process's own objective is averaged
        truth = differentiate(z1, z2, member, tau, reduction, weights, **options)
        result = differentiate(
            z1[mine], z2[mine], member, tau, reduction, here, process_group=group, strategy=strategy, **options
        )
        if reduction == "none":
            truth[0] = truth[0].view(views, total)[:, mine].flatten()
        worst = [residual(result[0], truth[0])]
        worst += [residual(value / world, whole[mine]) for value, whole in zip(result[1:3], truth[1:3], strict=True)]
        if len(truth) == 4:
            worst.append(residual(result[3], truth[3]))
            gathered = [torch.empty_like(result[3]) for _ in sizes]
            dist.all_gather(gathered, result[3], group=group)
            assert all(torch.equal(other, result[3]) for other in gathered)
        assert all(x == x for x in worst), member
        found.append(max(worst))
    return found


def names(cases):
    return [f"{member_id(member)} {rest}" for member, *rest in cases]


def check(ranks, size, cases, sizes, strategy, limit=LIMIT, **options):
    results = ranks.run(size, residuals, cases=cases, sizes=sizes, strategy=strategy, **options)
    worst = [max(each) for each in zip(*results, strict=True)]
    bad = [f"{name}: {value:.1e}" for name, value in zip(names(cases), worst, strict=True) if value > limit]
    assert not bad, "\n".join(bad)
    return max(worst)


EVERY = [
    (member, negatives, symmetric, similarity, reduction)
    for k, member in enumerate(MEMBERS)
    for j, (negatives, symmetric, similarity) in enumerate(every_setting())
    for reduction in (("mean", "none", "sum")[(k + j) % 3],)
]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_objective_and_setting(ranks, strategy):
    """Half of the cases by one strategy, half by the other; which half, changes from member to member."""
    settings = len(every_setting())
    cases = [case for k, case in enumerate(EVERY) if (k + k // settings) % 2 == STRATEGIES.index(strategy)]
    check(ranks, 3, cases, (7, 1, 4), strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("size", "sizes"), [(size, split) for size, splits in SPLITS.items() for split in splits])
def test_every_objective_and_split(ranks, size, sizes, strategy):
    """Each member in one setting, another one for another split, so that all settings occur."""
    settings = every_setting()
    shift = sum(sizes) + size + (strategy == "ring")
    cases = [
        (member, *settings[(5 * k + shift) % len(settings)], ("mean", "none", "sum")[(k + shift) % 3])
        for k, member in enumerate(MEMBERS)
    ]
    check(ranks, size, cases, sizes, strategy)
