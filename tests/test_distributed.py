"""Several processes against one, float64 over gloo: every objective, mode and strategy, unequal
batches, sub-groups.
"""

import copy
import functools
import itertools
import math
import pickle
import re
import sys

import pytest
import torch
import torch.distributed as dist
from family import MEMBERS, MODES, every_setting, in_turn, is_due, member_id, pair, rotated

from alphacl_fast import FusedAlphaCLLoss, distributed, objectives, ops, plan, verify_distributed
from alphacl_fast.functional import REDUCTIONS, alpha_cl_loss
from alphacl_fast.verify import relative_difference

pytestmark = pytest.mark.xdist_group("ranks")  # one worker starts the processes

#: How many pairs each rank has.
SPLITS = [(7,), (5, 3), (6, 0), (7, 1, 4), (3, 1, 4, 2), (3, 3, 3, 3)]
FLAT = ("gather", "ring")
STRATEGIES = (*FLAT, "two_level")
#: Ranks of a node by the number of ranks.
PER_NODE = {1: 1, 2: 1, 3: 3, 4: 2, 6: 2}
LIMIT = 1e-10


def how(strategy, world, per_node=None):
    """The arguments that ask for a strategy."""
    if strategy != "two_level":
        return {"strategy": strategy}
    return {"strategy": strategy, "ranks_per_node": per_node or PER_NODE[world]}


def differentiate(z1, z2, member, tau, reduction, weights, **options):
    """[loss, dz1, dz2(, dτ)] for given weights of the output."""
    objective = objectives.make(*member)
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    temperature = torch.tensor(
        tau, dtype=torch.float64, requires_grad=objective.tau_gradient is not None
    )
    loss = alpha_cl_loss(z1, z2, objective, temperature=temperature, reduction=reduction, **options)
    inputs = [z1, z2] + ([temperature] if temperature.requires_grad else [])
    return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), inputs)]


def residuals(
    group, cases, sizes, strategy, per_node=None, dim=5, tau=0.3, with_ids=False, more=None
):
    """Largest residual of each case (member, negatives, symmetric, similarity, reduction),
    gradients after averaging; ``more``: other options of each case, a guide for a guide_margin.
    """
    rank, world = dist.get_rank(group), len(sizes)
    total, first = sum(sizes), sum(sizes[:rank])
    mine = slice(first, first + sizes[rank])
    z1, z2 = pair(total, dim)
    z1, z2 = z1 / 2, z2 / 2
    guide = pair(total, 3, torch.float32, noise=1.5, seed=5)
    found = []
    for case, other_options in zip(cases, more or [{}] * len(cases), strict=True):
        member, negatives, symmetric, similarity, reduction = case
        options = {"negatives": negatives, "symmetric": symmetric, "similarity": similarity}
        views = 2 if negatives == "two_view" else 1
        weights = torch.tensor(1.7, dtype=torch.float64)
        here = weights
        if reduction == "none":
            weights = torch.linspace(-0.5, 1.5, views * total, dtype=torch.float64)
            # each process's own objective is averaged
            here = weights.view(views, total)[:, mine].flatten() * world
        ids = torch.arange(total) % 3
        of_all, own = ({"ids": x, **other_options} for x in (ids, ids[mine]))
        if not with_ids:
            del of_all["ids"], own["ids"]
        if "guide_margin" in other_options:
            of_all["guide"], own["guide"] = guide, tuple(g[mine] for g in guide)
        truth = differentiate(z1, z2, member, tau, reduction, weights, **of_all, **options)
        options |= {"process_group": group, **how(strategy, world, per_node), **own}
        result = differentiate(z1[mine], z2[mine], member, tau, reduction, here, **options)
        if reduction == "none":
            truth[0] = truth[0].view(views, total)[:, mine].flatten()
        worst = [relative_difference(result[0], truth[0])]
        worst += [
            relative_difference(value / world, whole[mine])
            for value, whole in zip(result[1:3], truth[1:3], strict=True)
        ]
        if len(truth) == 4:
            worst.append(relative_difference(result[3], truth[3]))
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
    bad = [
        f"{name}: {value:.1e}"
        for name, value in zip(names(cases), worst, strict=True)
        if value > limit
    ]
    print(f"largest residual of {len(cases)} cases, {sizes}, {strategy}: {max(worst):.1e}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("strategy", FLAT)
def test_every_objective_and_setting(ranks, strategy):
    """Each case by one strategy; in neighbouring modes, and for neighbouring members, by the other.

    `make test-all` runs every case by both.
    """
    turn = FLAT.index(strategy)
    cases = [case for k, case in enumerate(rotated()) if is_due(k + k // len(MODES) + turn, 2)]
    check(ranks, 3, cases, (7, 1, 4), strategy)


LEVELS = [((3, 1, 4, 2), 2), ((2, 1, 0, 3, 1, 2), 2), ((1, 2, 3, 0, 2, 1), 3)]


@pytest.mark.parametrize(("sizes", "per_node"), LEVELS, ids=["2x2", "3x2", "2x3"])
def test_two_levels(ranks, sizes, per_node):
    """Each case with one number of nodes; neighbouring modes and members with the others."""
    turn = LEVELS.index((sizes, per_node))
    cases = [case for k, case in enumerate(rotated()) if is_due(k + k // len(MODES) + turn, 3)]
    check(ranks, len(sizes), cases, sizes, "two_level", per_node=per_node)


@pytest.mark.parametrize("sizes", [(3, 2, 0, 0), (0, 0, 0, 0, 5, 0)], ids=["2x2", "3x2"])
def test_a_node_without_pairs(ranks, sizes):
    cases = [
        ((name, {}), *mode, "cosine", "mean")
        for name, mode in zip(("infonce", "triplet", "alpha_square", "uniform"), MODES, strict=True)
    ]
    check(ranks, len(sizes), cases, sizes, "two_level")


def cases_of(sizes, strategy):
    """Every second member in one setting with one reduction; `make test-all` takes them all."""
    split, by = SPLITS.index(sizes), FLAT.index(strategy)
    turn = len(FLAT) * split + by
    chosen = [m for k, m in enumerate(MEMBERS) if is_due(k + split + by, 2)]
    return [
        (member, *setting, reduction)
        for k, member in enumerate(chosen)
        for setting in in_turn(every_setting(), 5 * k + turn)
        for reduction in in_turn(REDUCTIONS, k + k // 3 + turn)
    ]


@pytest.mark.parametrize(
    ("sizes", "strategy"),
    [*itertools.product([(4, 1), (3, 0, 4)], FLAT), ((3, 0, 2, 1), "two_level")],
    ids=str,
)
def test_ids_are_compared_over_ranks(ranks, sizes, strategy):
    members = [
        ("infonce", {}),
        ("triplet", {}),
        ("alpha_direct", {"detach_alpha": False, "exponent": 2, "alpha_eps": 0.1}),
        ("alpha_square", {"detach_alpha": False}),
        ("alpha_gamma", {}),
        ("uniform", {}),
    ]
    cases = [
        (member, *mode, ("cosine", "euclidean")[k % 2], REDUCTIONS[(k + m) % 3])
        for m, member in enumerate(members)
        for k, mode in enumerate(MODES)
    ]
    check(ranks, len(sizes), cases, sizes, strategy, with_ids=True)


#: Largest Δ of a negative that counts, which a third of them and most of them have.
GAPS = {"cosine": (-1.0, -0.5), "dot": (-1.0, -0.5), "euclidean": (-1.3, -0.7)}
MARGINS = (0.3, 0.0)
LEFT_OUT = [((4,), "gather"), ((5, 3), "ring"), ((3, 0, 4), "gather"), ((3, 0, 4), "ring")]
LEFT_OUT.append(((3, 1, 4, 2), "two_level"))


@pytest.mark.parametrize(("sizes", "strategy"), LEFT_OUT, ids=str)
@pytest.mark.parametrize("by", ["max_gap", "guide_margin"])
def test_negatives_are_left_out_over_ranks(ranks, sizes, strategy, by):
    """Members, settings and reductions in turn; without ids and with them."""
    turn = LEFT_OUT.index((sizes, strategy))
    settings = [*every_setting()]
    for with_ids in (False, True):
        cases, more = [], []
        for k, member in enumerate(MEMBERS):
            if not is_due(k + turn, 3):
                continue
            (setting,) = in_turn(settings, k // 3 + 5 * turn)[:1]
            (reduction,) = in_turn(REDUCTIONS, k + with_ids)[:1]
            cases.append((member, *setting, reduction))
            values = GAPS[setting[2]] if by == "max_gap" else MARGINS
            more.append({by: values[k % 2]})
        check(ranks, len(sizes), cases, sizes, strategy, with_ids=with_ids, more=more)


def test_those_that_are_left_out_matter():
    """The comparisons above would pass if all negatives counted, or none."""
    z1, z2 = (z / 2 for z in pair(8, 5))
    guide = pair(8, 3, torch.float32, noise=1.5, seed=5)

    def counted(**options):
        """Negatives of an anchor, of 14."""
        return float(alpha_cl_loss(z1, z2, "triplet", margin=1e6, **options) / 1e6)

    assert counted() == pytest.approx(14, abs=0.01)
    for similarity, gaps in GAPS.items():
        few, most = (counted(similarity=similarity, max_gap=gap) for gap in gaps)
        assert 4 < few < 8 < most < 12
    for margin in MARGINS:
        assert 8 < counted(guide=guide, guide_margin=margin) < 12


@pytest.mark.parametrize("strategy", FLAT)
@pytest.mark.parametrize("sizes", SPLITS, ids=lambda sizes: "-".join(map(str, sizes)))
def test_every_objective_and_split(ranks, sizes, strategy):
    check(ranks, len(sizes), cases_of(sizes, strategy), sizes, strategy)


def test_every_setting_occurs_among_the_splits():
    """Each split meets every setting; each strategy every member, and every setting with every
    reduction; both together meet every member in every mode.
    """
    for sizes in SPLITS:
        cases = [case for strategy in FLAT for case in cases_of(sizes, strategy)]
        assert {case[1:4] for case in cases} == {*every_setting()}, sizes
    for strategy in FLAT:
        cases = [case for sizes in SPLITS for case in cases_of(sizes, strategy)]
        assert {member_id(case[0]) for case in cases} == {*map(member_id, MEMBERS)}
        assert {case[1:] for case in cases} == {
            (*setting, reduction) for setting in every_setting() for reduction in REDUCTIONS
        }
    cases = [case for split in itertools.product(SPLITS, FLAT) for case in cases_of(*split)]
    assert {(member_id(case[0]), case[1:3]) for case in cases} == {
        *itertools.product(map(member_id, MEMBERS), MODES)
    }


# Who computes what


def count_pairs(group, sizes, strategy, negatives, symmetric):
    """Pairs that this process hands to `row_sums` in one call, excluded ones not counted."""
    original, pairs = ops.row_sums, []

    def counting(operand, pairing, *arguments):
        split, partner, rows = pairing.split, pairing.partner, operand.f.shape[0]
        if split:
            pairs.append(split * (rows - split) - (split if partner else 0))
        else:
            pairs.append(rows * (rows - 1) // 2 - (rows // 2 if partner else 0))
        return original(operand, pairing, *arguments)

    ops.row_sums = counting
    try:
        with torch.no_grad():
            alpha_cl_loss(
                *pair(sizes[dist.get_rank(group)], 3),
                negatives=negatives,
                symmetric=symmetric,
                process_group=group,
                **how(strategy, len(sizes)),
            )
    finally:
        ops.row_sums = original
    return sum(pairs)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("negatives", "symmetric"), MODES)
def test_no_pair_is_computed_twice(ranks, strategy, negatives, symmetric):
    for sizes in ((5, 3), (7, 1, 4), (3, 1, 4, 2), (8, 8, 8, 8), (1, 2, 0, 3, 1, 2)):
        counts = ranks.run(
            len(sizes),
            count_pairs,
            sizes=sizes,
            strategy=strategy,
            negatives=negatives,
            symmetric=symmetric,
        )
        n = sum(sizes)
        assert (
            sum(counts)
            == {
                "two_view": n * (2 * n - 2),
                "one_view": n * (n - 1) // 2,
                "cross_view": n * (n - 1),
            }[negatives]
        )
        if sizes[0] == 8:
            assert max(counts) <= 1.01 * min(counts)


def test_the_shared_rectangle_is_cut_in_two():
    """Each pair of two blocks that are half the ring apart lies in exactly one of the two
    processes' rectangles.
    """
    for negatives, views in (("two_view", 2), ("one_view", 1)):
        seen = torch.zeros(3 * views, 5 * views)
        (mine, theirs, left), *more = distributed.meetings(0, 1, 2, negatives, (3, 5))
        assert left
        assert not more
        seen[mine, theirs] += 1
        ((mine, theirs, left),) = distributed.meetings(1, 0, 2, negatives, (3, 5))
        assert left
        seen[theirs, mine] += 1
        assert seen.eq(1).all()


def test_auto_gathers_small_batches_and_rings_large_ones(ranks):
    assert ranks.run(2, chosen_strategy, limit=2**28) == ["gather"] * 2
    assert ranks.run(2, chosen_strategy, limit=1) == ["ring"] * 2
    levels = {"limit": 1, "ranks_per_node": 2, "host": 1.0}  # a host so slow that steps matter
    assert ranks.run(6, chosen_strategy, **levels) == ["two_level"] * 6
    # nodes of different sizes
    levels["per_rank"] = ("2", "2", "2", "2", "1", "1")
    assert ranks.run(6, chosen_strategy, **{**levels, "ranks_per_node": None}) == ["ring"] * 6


def chosen_strategy(group, limit, ranks_per_node=None, host=None, per_rank=()):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "GATHER_BYTES", limit)
        if per_rank:
            patch.setenv("LOCAL_WORLD_SIZE", per_rank[dist.get_rank(group)])
        if host is not None:
            slow = functools.partial(plan.plan, host=host)
            patch.setattr(plan, "plan", slow)
            plan.recommended_ring.cache_clear()
        loss = FusedAlphaCLLoss(process_group=group, ranks_per_node=ranks_per_node)
        loss(*pair(3, 4))
        plan.recommended_ring.cache_clear()
        return repr(loss).split(" over ")[0].split("; ")[-1]


# Bad input, and processes that want different things


def outcome(group, changes):
    """What a call raises in this process; ``changes`` maps a rank to its arguments."""
    arguments = {"z": pair(4, 3), **changes.get(dist.get_rank(group), {}), "process_group": group}
    try:
        z1, z2 = arguments.pop("z")
        if arguments.pop("grad", False):
            z1 = z1.clone().requires_grad_()
        return float(alpha_cl_loss(z1, z2, **arguments).detach().sum())
    except Exception as error:
        return type(error), str(error)


A, B = pair(4, 3)
BAD = [
    (
        {1: {"z": (A, B[:3])}},
        ValueError,
        r"^rank 1: z2 must have the shape of z1 \(4, 3\), got \(3, 3\)$",
    ),
    (
        {0: {"z": (A.int(), B)}, 2: {"temperature": -1.0}},
        TypeError,
        r"^rank 0: z1 must .* rank 2: temperature must",
    ),
    (
        {1: {"z": (A[:, :2], B[:, :2])}},
        ValueError,
        "same number of features D, got 3 on rank 0 and 2 on rank 1",
    ),
    (
        {2: {"z": (A.float(), B.float())}},
        ValueError,
        "same dtype, got torch.float64 on rank 0 and torch.float32 on rank 2",
    ),
    (
        {1: {"objective": "mine"}},
        ValueError,
        r"same call, got infonce\(.* on rank 0 and mine\(\).* on rank 1",
    ),
    ({1: {"objective": "none of these"}}, ValueError, "^rank 1: objective must be one of"),
    ({1: {"similarity": "dot"}}, ValueError, "same call"),
    ({1: {"strategy": "ring"}}, ValueError, "same call"),
    (
        {2: {"temperature": 0.4}},
        ValueError,
        "same temperature, got 0.5 on rank 0 and 0.4 on rank 2",
    ),
    ({1: {"max_gap": 0.1}}, ValueError, "same call, got .*max_gap=None.* and .*max_gap=0.1"),
    ({2: {"max_gap": "x"}}, TypeError, "^rank 2: max_gap must be None or a number, got 'x'$"),
    ({1: {"guide": (A, B)}}, ValueError, "same call, got .*no ids on .* and .*guide of width 3"),
    (
        {r: {"guide": (A, B), "guide_margin": 0.1 * (r == 2)} for r in range(3)},
        ValueError,
        "guide_margin=0.0 on rank 0 and .*guide_margin=0.1 on rank 2",
    ),
    ({0: {"guide": (A, B[:3])}}, ValueError, r"^rank 0: guide\[1\] must have 4 rows"),
    ({1: {"guide_margin": "x"}}, TypeError, "^rank 1: guide_margin must be a number"),
    (
        {r: {"z": (A[:0], B[:0])} for r in range(3)},
        ValueError,
        r"at least 1 pair, got \(0, 0, 0\)",
    ),
    (
        {0: {"objective": objectives.PairLoss(None, torch.special.erfinv), "backend": "cpu"}},
        ValueError,
        "^rank 0: backend 'cpu' cannot",
    ),
    (
        {r: {"reduction": "none", "grad": r == 1} for r in range(3)},
        ValueError,
        "'none' every rank must want a gradient or",
    ),
]


def test_bad_input_on_one_process_raises_on_every_one(ranks):
    for changes, error, message in BAD:
        outcomes = ranks.run(3, outcome, changes=changes)
        assert outcomes[0][0] is error, outcomes
        assert outcomes == [outcomes[0]] * 3
        with pytest.raises(error, match=message):
            raise error(outcomes[0][1])
    values = ranks.run(3, outcome, changes={})
    assert values == [values[0]] * 3  # the processes are in step again


def test_one_process_may_want_no_gradient(ranks):
    values = ranks.run(3, outcome, changes={1: {"grad": True}})
    assert values == [values[0]] * 3


def gradient_of_the_first(group):
    rank = dist.get_rank(group)
    z1, z2 = (z[4 * rank : 4 * rank + 4].clone() for z in pair(12, 3))
    loss = alpha_cl_loss(z1.requires_grad_(rank == 0), z2, process_group=group)
    return torch.autograd.grad(loss, z1)[0] if rank == 0 else None


def test_one_process_alone_may_want_a_gradient(ranks):
    z1, z2 = pair(12, 3)
    (whole,) = torch.autograd.grad(alpha_cl_loss(z1.requires_grad_(), z2), z1)
    torch.testing.assert_close(
        ranks.run(3, gradient_of_the_first)[0] / 3, whole[:4], rtol=1e-10, atol=1e-12
    )


class Dropped(torch.autograd.Function):
    """The identity, without a gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def gradient_where_others_have_none(group):
    """dz1 of the first rank's row losses alone; the others' losses pass no gradient on."""
    rank = dist.get_rank(group)
    z1, z2 = (z[4 * rank : 4 * rank + 4] for z in pair(8, 3))
    losses = alpha_cl_loss(z1.requires_grad_(), z2, process_group=group, reduction="none")
    (losses if rank == 0 else Dropped.apply(losses)).sum().backward()
    return z1.grad


def test_a_rank_whose_loss_has_no_gradient_takes_part(ranks):
    z1, z2 = pair(8, 3)
    losses = alpha_cl_loss(z1.requires_grad_(), z2, reduction="none").view(2, 8)
    (whole,) = torch.autograd.grad(losses[:, :4].sum(), z1)
    found = torch.cat(ranks.run(2, gradient_where_others_have_none))
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-12)


def test_verify_distributed(ranks):
    first, *others = ranks.run(4, verified)
    assert all(other == first for other in others)
    assert {row["strategy"] for row in first} == {*STRATEGIES}
    assert {row["dtype"] for row in first} == {torch.float64, torch.float32, torch.bfloat16}
    exact = [row["residual"] for row in first if row["dtype"] == torch.float64]
    assert max(exact) < LIMIT
    assert max(row["of_tolerance"] for row in first) < 1
    large = [row for row in first if row["pairs"] != 7]
    assert len(large) == len(STRATEGIES)
    for row in large:  # of the smallest block
        assert 2 * (row["pairs"] - 2) * row["dim"] * row["dtype"].itemsize >= 8 * 2**20


def verified(group):
    return verify_distributed(group, objectives=("infonce", "alpha_square", "uniform"), print=None)


def without_a_row(dz):
    dz = dz.clone()
    dz[1] = 0
    return dz


FAULTS = {
    "x 0": lambda dz: dz * 0,
    "x 2": lambda dz: dz * 2,
    "x 1.01": lambda dz: dz * 1.01,
    "one row missing": without_a_row,
    "one NaN": lambda dz: dz.index_fill(0, torch.tensor([1]), torch.nan),
}


def wrong(group, fault, dtype):
    """What `verify_distributed` says of gradients that are wrong on one rank."""
    original = distributed.GlobalProblem.loss_and_gradient

    def faulty(self, need):
        loss, dz, dtau = original(self, need)
        return loss, FAULTS[fault](dz) if self.call.ranks.rank == 1 else dz, dtau

    distributed.GlobalProblem.loss_and_gradient = faulty
    try:
        options = {"objectives": ("infonce",), "pairs": 64, "dim": 64, "large_message": 0}
        verify_distributed(group, dtype=dtype, print=None, **options)
        return "passes"
    except RuntimeError as error:
        return str(error)
    finally:
        distributed.GlobalProblem.loss_and_gradient = original


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_verify_distributed_reports_wrong_gradients(ranks, dtype):
    for fault in FAULTS:
        reports = ranks.run(2, wrong, fault=fault, dtype=dtype)
        assert reports[0] == reports[1]
        assert re.match(r"residual of infonce \(\w+, \w+, torch\.\w+\) must be", reports[0]), fault


def test_relative_difference():
    one, zero = torch.ones(4, dtype=torch.float64) * 1e-30, torch.zeros(4, dtype=torch.float64)
    assert relative_difference(one, one) == relative_difference(zero, zero) == 0.0
    assert relative_difference(one * 1.01, one) == pytest.approx(0.01)
    assert relative_difference(zero, one) == 1.0
    for value, truth in (
        (one, zero),
        (one * torch.nan, one),
        (one, one * torch.nan),
        (one[:1], one),
    ):
        assert relative_difference(value, truth) == math.inf
    assert relative_difference(zero[:0], zero[:0]) == 0.0


def test_a_call_before_init_process_group_says_so():
    with pytest.raises(ValueError, match="before init_process_group"):
        FusedAlphaCLLoss(process_group="world")(*pair(4, 3))


# Training


def encoder():
    torch.manual_seed(1)
    layers = torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)
    return torch.nn.Sequential(*layers).double()


def trained(group, sizes, strategy, wrap, steps=3):
    """Largest difference of parameters and losses from those of one process, after a few steps
    of SGD.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    rank = dist.get_rank(group)
    first = sum(sizes[:rank])
    mine = slice(first, first + sizes[rank])
    x1, x2 = pair(sum(sizes), 6)
    losses, models = {}, {}
    for who, rows in (("one", slice(None)), ("all", mine)):
        model, temperature = encoder(), torch.nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
        options = {"process_group": group, **how(strategy, len(sizes))} if who == "all" else {}
        loss = FusedAlphaCLLoss(
            "infonce", temperature=temperature, temperature_range=(0.01, 1.0), **options
        )
        forward = model
        if who == "all" and wrap == "ddp":
            forward = DistributedDataParallel(model, process_group=group)
        if who == "all" and wrap == "fsdp":
            forward = fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
        optimizer = torch.optim.SGD([*forward.parameters(), temperature], lr=0.3, momentum=0.9)
        losses[who] = []
        for step in range(steps):
            optimizer.zero_grad()
            z1, z2 = forward(torch.cat([x1[rows], x2[rows]]) + step / 10).chunk(2)
            value = loss(z1, z2)
            value.backward()
            optimizer.step()
            losses[who].append(value.detach())
        full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in forward.parameters()]
        models[who] = [*(p.detach() for p in full), temperature.detach(), torch.stack(losses[who])]
    assert abs(losses["one"][0] - losses["one"][-1]) > 0.01
    return max(relative_difference(a, b) for a, b in zip(models["all"], models["one"], strict=True))


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_equals_one_process(ranks, strategy, wrap):
    sizes = (3, 1, 4, 2) if strategy == "two_level" else (7, 1, 4)
    found = ranks.run(len(sizes), trained, sizes=sizes, strategy=strategy, wrap=wrap)
    assert max(found) < LIMIT


def half_precision(group, strategy, dtype, negatives):
    rank, size = dist.get_rank(group), 6
    mine = slice(rank * size, (rank + 1) * size)
    z1, z2 = pair(3 * size, 16, dtype)
    results = []
    for rows, options in (
        (slice(None), {}),
        (mine, {"process_group": group, **how(strategy, 3)}),
    ):
        z = [x[rows].clone().requires_grad_() for x in (z1, z2)]
        loss = alpha_cl_loss(*z, "alpha_direct", negatives=negatives, **options)
        (loss * 3).backward()
        results.append((loss.detach(), *(x.grad for x in z)))
    (loss, *grads), (loss_here, *grads_here) = results
    assert loss_here.dtype == torch.float32
    assert all(g.dtype == dtype for g in grads_here)
    pairs = [(a.float() / 3, b[mine].float()) for a, b in zip(grads_here, grads, strict=True)]
    worst = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return abs(float(loss_here / loss) - 1), worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_without_rows_in_other_dtypes(ranks, strategy, dtype):
    """Rows of half precision travel with their scales, which an empty tensor must have too."""
    found = ranks.run(4, without_rows, strategy=strategy, dtype=dtype)
    assert max(found) < 2 * torch.finfo(dtype).eps


def without_rows(group, strategy, dtype):
    """Relative difference of the gradient from one process's; ranks 1 and 2 have no pairs."""
    rank, sizes = dist.get_rank(group), (4, 0, 0, 3)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    worst = 0.0
    for negatives in ("two_view", "cross_view"):
        z1, z2 = (z.requires_grad_() for z in pair(7, 16, dtype))
        (whole,) = torch.autograd.grad(alpha_cl_loss(z1, z2, negatives=negatives), z1)
        options = {"negatives": negatives, "process_group": group, **how(strategy, 4)}
        own = z1.detach()[mine].requires_grad_()
        loss = alpha_cl_loss(own, z2.detach()[mine], **options)
        found = torch.autograd.grad(loss, own)[0].to(torch.float64) / 4
        worst = max(worst, relative_difference(found, whole[mine]))
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(ranks, dtype):
    limit = 2 * torch.finfo(dtype).eps
    for strategy, negatives in itertools.product(STRATEGIES, ("two_view", "cross_view")):
        for loss, grads in ranks.run(
            3, half_precision, strategy=strategy, dtype=dtype, negatives=negatives
        ):
            assert loss < 3e-6
            assert grads < max(limit, 3e-6)


def compiled(group):
    loss = FusedAlphaCLLoss(process_group=group)
    z = [x.requires_grad_() for x in pair(5, 4)]
    results = []
    for function in (loss, torch.compile(loss, backend="eager")):
        value = function(*z)
        results.append([value.detach(), *torch.autograd.grad(value, z)])
    return max(relative_difference(a, b) for a, b in zip(*results, strict=True))


def test_torch_compile_leaves_the_call_as_it_is(ranks):
    assert ranks.run(1, compiled) == [0.0]


class Scaled:
    """A user's function without a name: its repr holds an address."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, gap):
        return torch.exp(self.scale * gap)


def nameless(group):
    loss = FusedAlphaCLLoss(
        objectives.PairLoss(None, Scaled(0.5 + dist.get_rank(group) * 0)), process_group=group
    )
    return float(loss(*pair(3, 4)))


def test_users_callables_without_a_name(ranks):
    first, second = ranks.run(2, nameless)
    assert first == second


def test_a_loss_of_the_world_can_be_pickled():
    loss = pickle.loads(pickle.dumps(FusedAlphaCLLoss(process_group="world", strategy="ring")))
    assert "process_group='world', strategy='ring'" in repr(loss)


def copied(group):
    loss = FusedAlphaCLLoss(process_group=group)
    again = copy.deepcopy(loss)
    return float(loss(*pair(3, 4)) - again(*pair(3, 4)))


def test_a_copied_loss_shares_the_group(ranks):
    assert ranks.run(2, copied) == [0.0, 0.0]


# Memory


def peak(group, strategy, pairs, dim, ranks_per_node=None):
    """Growth of this process's memory in a call, in bytes; see `ranks.map_large_blocks`."""

    def status(name):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

    generator = torch.Generator().manual_seed(dist.get_rank(group))
    z1, z2 = (torch.randn(pairs, dim, generator=generator).requires_grad_() for _ in range(2))
    loss = FusedAlphaCLLoss(process_group=group, strategy=strategy, ranks_per_node=ranks_per_node)
    loss(z1, z2)  # its workspace is too large to be kept
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = status("VmRSS")
    loss(z1, z2).backward()
    return status("VmHWM") - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_what_the_plan_says(ranks):
    """In rows that fill blocks of the kernels, so large that their workspace is given back.

    A ring's workspace is that of fewer rows, which are therefore longer.
    """
    pairs, found = 144, {}
    for world, strategy, per_node, dim in (
        (4, "gather", None, 8192),
        (3, "ring", None, 16_384),
        (6, "two_level", 2, 8192),
    ):
        options = {"strategy": strategy, "ranks_per_node": per_node}
        bytes_used = max(ranks.run(world, peak, pairs=pairs, dim=dim, **options))
        plans = plan.plan(
            world * pairs, dim, world, rate=1e12, dtype=torch.float32, ranks_per_node=per_node,
            device="cpu",
        )  # fmt: skip
        (planned,) = (p.memory for p in plans if p.strategy == strategy)
        block = 2 * pairs * dim * 4
        print(f"{strategy} of {world}: {bytes_used / block:.1f} blocks, {planned / block:.1f}")
        assert abs(bytes_used / planned - 1) < 0.05, (strategy, world)
        found[strategy] = bytes_used / block
    assert found["ring"] + 5 < found["gather"]


def test_planned_memory_of_a_ring_does_not_grow_with_the_ranks():
    few, many = (
        plan.plan(ranks * 1000, 64, ranks, rate=1e12, device="cpu")[1].memory for ranks in (6, 600)
    )
    assert few == many
