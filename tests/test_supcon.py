"""`supcon_loss` and `SupConLoss` against the formulas of arXiv:2004.11362 and arXiv:2309.14277."""

import copy
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from conftest import set_tiles
from family import BACKENDS, SLOW, in_turn, pair, relative_error
from torch.nn.functional import normalize

from alphacl_fast import SupConLoss, same_id, supcon_loss
from alphacl_fast.backend import cpu
from alphacl_fast.functional import REDUCTIONS

FORMS = ["out", "in", "sincere"]
#: Ids (n,) for n rows: groups of any size, one of them a row alone; two rows each; one id.
IDS = {
    "any": lambda n: ((torch.arange(n) ** 2) % 7 - 3).index_fill(0, torch.tensor([n // 2]), 9),
    "pairs": lambda n: torch.arange(n).flip(0) // 2,
    "one": lambda n: torch.full((n,), 4),
    "all": lambda n: torch.arange(n),
}


def dense(z, ids, form="out", temperature=0.1, reference=None, reference_ids=None):
    """(n,) losses by the definition, 0 for an anchor without a positive."""
    x = normalize(z, dim=1)
    own = reference is None
    y, other_ids = (x, ids) if own else (normalize(reference, dim=1), reference_ids)
    s = x @ y.t() / temperature
    itself = torch.eye(len(x), dtype=torch.bool) if own else torch.zeros_like(s, dtype=torch.bool)
    same = (ids[:, None] == other_ids) & ~itself
    count = same.sum(1).clamp(min=1)
    others = s.masked_fill(ids[:, None] == other_ids, -torch.inf)
    if form == "sincere":
        pairs = torch.logaddexp(s, others.logsumexp(1, keepdim=True)) - s
        losses = torch.where(same, pairs, 0.0).sum(1) / count
    else:
        total = s.masked_fill(itself, -torch.inf).logsumexp(1)
        if form == "out":
            losses = total - torch.where(same, s, 0.0).sum(1) / count
        else:
            filled = torch.where(same.any(1)[:, None], s.masked_fill(~same, -torch.inf), 0.0)
            losses = total - filled.logsumexp(1) + count.to(s.dtype).log()
    return torch.where(same.any(1), losses, 0.0)


def reduced(losses, ids, reduction, other_ids=None):
    if reduction == "none":
        return losses
    if other_ids is None:
        count = ((ids[:, None] == ids).sum(1) > 1).sum()
    else:
        count = (ids[:, None] == other_ids).any(1).sum()
    return losses.sum() / (count.clamp(min=1) if reduction == "mean" else 1)


def differentiated(value, leaves):
    weights = torch.linspace(1.0, -0.5, value.numel(), dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), leaves)]


def assert_equal(ours, truth, bound=1e-11):
    for k, (a, b) in enumerate(zip(ours, truth, strict=True)):
        assert relative_error(a, b) < bound, k


def leaves_of(z, tau=0.3, *more):
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    leaves = [z.clone().requires_grad_(), torch.tensor(tau, dtype=wide, requires_grad=True)]
    return leaves + [x.clone().requires_grad_() for x in more]


@pytest.fixture
def small_blocks(monkeypatch):
    """Sweeps and blocks are cut; the last of each is ragged."""
    set_tiles(monkeypatch, 16)
    monkeypatch.setitem(same_id.BLOCK_SIZES, "cpu", same_id.BlockSize(3, 5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", IDS)
def test_equals_the_dense_formula(backend, form, kind, small_blocks, poisoned):
    n = 9 if backend in SLOW else 23
    ids, turn = IDS[kind](n), FORMS.index(form) + [*IDS].index(kind)
    for reduction in in_turn(REDUCTIONS, turn) if backend in SLOW else REDUCTIONS:
        z, tau = leaves = leaves_of(pair(n, 6)[0])
        truth = differentiated(reduced(dense(z, ids, form, tau), ids, reduction), leaves)
        options = {"form": form, "temperature": tau, "reduction": reduction, "backend": backend}
        assert_equal(differentiated(supcon_loss(z, ids, **options), leaves), truth)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [1, 8, 40])
def test_reference_rows(form, m, small_blocks, poisoned):
    """Anchors among rows of their own, some of whose ids no anchor has, and the other way round."""
    ids, reference_ids = IDS["any"](17), IDS["any"](m).abs() - 1
    for reduction in REDUCTIONS:
        z, tau, reference = leaves = leaves_of(pair(17, 6)[0], 0.2, pair(m, 6, seed=1)[0])
        losses = dense(z, ids, form, tau, reference, reference_ids)
        truth = differentiated(reduced(losses, ids, reduction, reference_ids), leaves)
        ours = supcon_loss(
            z,
            ids,
            form=form,
            temperature=tau,
            reference=reference,
            reference_ids=reference_ids,
            reduction=reduction,
        )
        assert_equal(differentiated(ours, leaves), truth)


@pytest.mark.parametrize("narrow", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_ids_of_a_dtype_that_cannot_hold_the_other_ids(narrow):
    """None of the large numbers is an id of the other side, whatever its last bits are."""
    ids = torch.tensor([0, 1, 0, 2, 5, 1])
    other_ids = torch.tensor([2**8, 2**16 + 1, 2**32 + 2, 2**8 + 5, 1, 2, 0, 0])
    z, reference = pair(6, 4)[0], pair(8, 4, seed=1)[0]
    for form in FORMS:
        for sides in ((ids.to(narrow), other_ids), (other_ids[:6], ids.to(narrow))):
            truth = dense(z, sides[0], form, 0.2, reference[: len(sides[1])], sides[1])
            ours = supcon_loss(
                z, sides[0], form=form, temperature=0.2, reference=reference[: len(sides[1])],
                reference_ids=sides[1], reduction="none",
            )  # fmt: skip
            assert_equal([ours], [truth])
            assert sides[0].dtype != sides[1].dtype
            assert 0 < (truth == 0).sum() < 6


def test_each_gradient_alone():
    """What needs no gradient changes nothing in the gradient of the rest."""
    ids, whole = IDS["any"](12), None
    for needed in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        leaves = leaves_of(pair(12, 5)[0], 0.2, pair(9, 5, seed=1)[0])
        for leaf, k in zip(leaves, needed, strict=True):
            leaf.requires_grad_(bool(k))
        z, tau, reference = leaves
        supcon_loss(
            z, ids, temperature=tau, reference=reference, reference_ids=IDS["any"](9)
        ).backward()
        found = [x.grad for x in leaves]
        whole = whole or found
        for k, a, b in zip(needed, found, whole, strict=True):
            assert (a is not None) == bool(k)
            if k:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def gaps(z, ids, form, tau):
    """The loss as a careful eager program has it: log1p of sums of exponentials of gaps."""
    x, others = normalize(z, dim=1), ids[:, None] != ids
    s = x @ x.t()
    losses = []
    for i in range(len(z)):
        (p,) = torch.nonzero((ids == ids[i]) & (torch.arange(len(z)) != i), as_tuple=True)
        if not len(p):
            continue
        relative = ((s[i][None, :] - s[i, p][:, None]) / tau).exp()  # (positives, rows)
        if form == "sincere":
            losses.append((relative * others[i]).sum(1).log1p().mean())
        elif form == "out":
            rest = torch.ones_like(relative)
            rest[torch.arange(len(p)), p] = 0
            rest[:, i] = 0
            losses.append((relative * rest).sum(1).log1p().mean())
        else:
            share = (relative[0] * others[i]).sum() / relative[0, p].sum()
            losses.append(math.log(len(p)) + share.log1p())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_once_trained(form, size, backend):
    """Groups that all but coincide, others orthogonal: the share of N(i) in the softmax over A(i)
    falls from 1e-3 to 1e-12, and the gradient keeps its digits.
    """
    if backend in SLOW and size != 3:
        pytest.skip("a slow backend runs one size")
    groups = 12
    q, _ = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))
    ids = torch.arange(groups).repeat_interleave(size)
    for tau in [0.05] if backend in SLOW else [0.1, 0.05, 0.035]:
        ours, eager = 0.0, 0.0
        for spread in (0.0, 1e-3, 1e-2):
            noise = spread * torch.randn(len(ids), 16, dtype=torch.float64)
            z = (q[ids] + noise).float()
            results = {}
            for who, dtype in (("truth", torch.float64), ("eager", torch.float32)):
                leaf = z.to(dtype).requires_grad_()
                results[who] = torch.autograd.grad(gaps(leaf, ids, form, tau), leaf)[0]
            leaf = z.clone().requires_grad_()
            loss = supcon_loss(leaf, ids, form=form, temperature=tau, backend=backend)
            (found,) = torch.autograd.grad(loss, leaf)
            ours += relative_error(found, results["truth"], 0.0) ** 2
            eager += relative_error(results["eager"], results["truth"], 0.0) ** 2
        assert ours**0.5 <= 2 * eager**0.5 + 2e-6


def test_one_id_and_no_positives():
    z = pair(10, 4)[0].requires_grad_()
    loss = supcon_loss(z, IDS["one"](10), form="sincere")
    assert loss == 0
    assert (torch.autograd.grad(loss, z)[0] == 0).all()
    torch.testing.assert_close(
        supcon_loss(z, IDS["one"](10), temperature=0.3), dense(z, IDS["one"](10), "out", 0.3).mean()
    )
    for form in FORMS:
        for reduction in REDUCTIONS:
            loss = supcon_loss(z, IDS["all"](10), form=form, reduction=reduction)
            assert (loss == 0).all()
            assert (torch.autograd.grad(loss.sum(), z)[0] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_small_temperatures_stay_finite(form):
    """Exponents of ±2000, of positives and negatives."""
    ids = IDS["any"](21)
    leaf = pair(21, 3, torch.float32)[0].requires_grad_()
    wide = leaf.detach().double().requires_grad_()
    truth = differentiated(dense(wide, ids, form, 1e-3), [wide])
    options = {"form": form, "temperature": 1e-3, "reduction": "none"}
    assert_equal(differentiated(supcon_loss(leaf, ids, **options), [leaf]), truth, 2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision(form, dtype):
    leaf, ids = pair(20, 16, dtype)[0].requires_grad_(), IDS["any"](20)
    wide = leaf.detach().double().requires_grad_()
    truth = differentiated(reduced(dense(wide, ids, form, 0.1), ids, "mean"), [wide])
    ours = differentiated(supcon_loss(leaf, ids, form=form), [leaf])
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    assert relative_error(ours[0], truth[0]) < 1e-5
    assert relative_error(ours[1], truth[1]) < torch.finfo(dtype).eps


def test_nan_comes_out():
    z = pair(8, 4)[0]
    z[3, 1] = torch.nan
    for form in FORMS:
        assert supcon_loss(z, IDS["pairs"](8), form=form).isnan()


def test_no_matrix_of_pairs():
    """One id for all rows is the worst case of blocks."""
    n = 3000
    z = torch.randn(n, 8, requires_grad=True)
    largest = 0

    def keep(x):
        nonlocal largest
        largest = max(largest, x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        supcon_loss(z, IDS["one"](n)).backward()
    assert largest <= 8 * n
    blocks = [*same_id.Groups.among(IDS["one"](n)).blocks()]
    assert max((i.stop - i.start) * (j.stop - j.start) for i, j in blocks) <= 64 * n
    assert sum(i.stop - i.start for i, _ in blocks) == n


def test_blocks_cost_what_the_groups_cost():
    for size in (1, 4, 40, 400):
        n = 4000
        blocks = [*same_id.Groups.among(torch.arange(n) // size).blocks()]
        pairs = sum((i.stop - i.start) * (j.stop - j.start) for i, j in blocks)
        assert pairs <= n * max(2 * size, 2 * same_id.BLOCK_SIZES["cpu"].least)
        rows = [row for i, _ in blocks for row in range(i.start, i.stop)]
        assert rows == [*range(n)]


def test_module():
    z, ids = pair(12, 5)[0], IDS["any"](12)
    tau = torch.nn.Parameter(torch.tensor(0.2))
    loss = SupConLoss("in", tau, reduction="sum")
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    expected = supcon_loss(z, ids, form="in", temperature=0.2, reduction="sum")
    torch.testing.assert_close(loss(z, ids), expected, rtol=1e-6, atol=0)
    loss(z, ids).backward()
    assert tau.grad != 0
    assert repr(loss).startswith(
        "SupConLoss(form='in', temperature=0.2 (learnable), similarity='cosine', reduction="
    )
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert other(z, ids) == loss(z, ids)
    assert [name for name, _ in SupConLoss(temperature=torch.tensor(0.1)).named_buffers()]
    prototypes = torch.randn(7, 5, dtype=torch.float64)
    same = {"reference": prototypes, "reference_ids": torch.arange(7) - 3}
    assert SupConLoss()(z, ids, **same) == supcon_loss(z, ids, **same)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "outside"}, "form must be one of 'out', 'in', 'sincere', got 'outside'"),
        ({"reference": torch.zeros(3, 4).double()}, "must be given together, got no reference_ids"),
        ({"reference_ids": torch.arange(3)}, "must be given together, got no reference"),
        (
            {"reference": torch.zeros(3, 5), "reference_ids": torch.arange(3)},
            "reference must have the width, dtype and device of z",
        ),
        (
            {"reference": torch.zeros(3, 4).double(), "reference_ids": torch.arange(2)},
            r"reference_ids must be an integer tensor of shape \(3,\)",
        ),
        ({"ids": torch.zeros(6)}, "ids must be an integer tensor"),
        ({"temperature": 0.0}, "temperature must be finite and > 0"),
        ({"reduction": "median"}, "reduction must be one of"),
        ({"backend": "reference"}, "backend must not be 'reference'"),
        ({"process_group": "moon"}, "process_group must be None"),
    ],
)
def test_refuses(options, message):
    given = {"ids": torch.arange(6), **options}
    with pytest.raises((TypeError, ValueError), match=message):
        supcon_loss(pair(6, 4)[0], **given)
    if not {"reference", "reference_ids", "ids"} & {*options}:
        with pytest.raises((TypeError, ValueError), match=message):
            SupConLoss(**options)


def test_a_second_derivative_raises():
    z = pair(8, 3)[0].requires_grad_()
    (dz,) = torch.autograd.grad(supcon_loss(z, IDS["any"](8)), z, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dz.sum().backward()


# --- processes ------------------------------------------------------------------------------------


def parts(group, sizes, form, reduction, references):
    """The largest error of a rank's loss and gradients, which are averaged over the ranks as DDP
    does.
    """
    rank, world = dist.get_rank(group), len(sizes)
    total, first = sum(sizes), sum(sizes[:rank])
    mine = slice(first, first + sizes[rank])
    ids, z = torch.arange(total) % 3, pair(total, 5)[0]
    rows, cut = pair(8, 5, seed=1)[1], slice(rank, None, world)
    row_ids = torch.arange(8) % 4
    weights = torch.linspace(-0.5, 1.5, total if reduction == "none" else 1).double()
    here = weights[mine] * world if reduction == "none" else weights
    whole, part = slice(None), slice(first, first + sizes[rank])
    found = []
    for own, theirs, weight, options in (
        (whole, whole, weights, {}),
        (part, cut, here, {"process_group": group}),
    ):
        leaves = leaves_of(z[own], 0.4, *([rows[theirs]] if references else []))
        if references:
            options = {"reference": leaves[2], "reference_ids": row_ids[theirs], **options}
        loss = supcon_loss(
            leaves[0], ids[own], form=form, temperature=leaves[1], reduction=reduction, **options
        )
        found.append([loss.detach(), *torch.autograd.grad((loss * weight).sum(), leaves)])
    truth, ours = found
    if reduction == "none":
        truth[0] = truth[0][mine]
    truth[1], ours[1] = truth[1][mine], ours[1] / world
    if references:
        truth[3], ours[3] = truth[3][cut], ours[3] / world
    assert all(a.shape == b.shape for a, b in zip(ours, truth, strict=True))
    return max(float((a - b).abs().max()) for a, b in zip(ours, truth, strict=True) if a.numel())


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("sizes", [(7,), (1, 0), (3, 1, 4)])
@pytest.mark.parametrize("references", [False, True])
def test_processes_share_a_batch(ranks, sizes, references):
    for k, (form, reduction) in enumerate((f, r) for f in FORMS for r in REDUCTIONS):
        if len(sizes) == 3 or k % 4 == 0:
            options = {"form": form, "reduction": reduction, "references": references}
            assert max(ranks.run(len(sizes), parts, sizes=sizes, **options)) < 1e-10


@pytest.mark.parametrize("form", ["out", "in", "sincere"])
def test_loss_and_gradient_take_two_sweeps(form, monkeypatch):
    """The second one reads what the first has kept. A step with given positives, which a call
    without a reduction takes, would solve the rows again.
    """
    sweeps, run = [], cpu._run
    monkeypatch.setattr(cpu, "_run", lambda *a, **k: (sweeps.append(a), run(*a, **k)))
    z, ids = pair(60, 8, torch.float32)[0].requires_grad_(), torch.arange(60) % 7
    supcon_loss(z, ids, form=form, reduction="none").sum().backward()
    sweeps.clear()
    supcon_loss(z, ids, form=form).backward()
    assert len(sweeps) == 2


def refused(group, options):
    """The error of this rank, which has a value of its own for some options."""
    rank = dist.get_rank(group)
    given = {name: x[rank] if isinstance(x, list) else x for name, x in options.items()}
    n = given.pop("n", 4)
    try:
        supcon_loss(pair(n, 3)[0], torch.arange(n) // 2, process_group=group, **given)
    except (TypeError, ValueError) as error:
        return str(error)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "all ranks together must have at least 1 row"),
        ({"temperature": [0.1, 0.2]}, "the same call, got D=3"),
        ({"form": ["in", "out"]}, "form='in'"),
        ({"temperature": [0.1, -1.0]}, "rank 1: temperature must be finite"),
        ({"reference_ids": [None, torch.arange(3)]}, "rank 1: reference and reference_ids"),
    ],
)
def test_all_ranks_refuse(ranks, options, message):
    assert all(message in text for text in ranks.run(2, refused, options=options))
