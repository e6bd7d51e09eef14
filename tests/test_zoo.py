"""Named losses against dense float64 formulas, and against the classes of the packages that have
them.
"""

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import set_tiles
from family import BACKENDS, SLOW, is_due, pair, relative_error

from alphacl_fast import same_id, zoo

# --- the definitions ------------------------------------------------------------------------------


def of_two_views(z1, z2, tau):
    """exp(s⁺/τ) (2N,), and exp(s/τ) of the negatives (2N, 2N), 0 elsewhere."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    n, s = len(z1), z @ z.t()
    i = torch.arange(2 * n)
    negative = (i[:, None] % n) != (i % n)
    return s.diagonal(n).repeat(2), s, negative


def dcl(z1, z2, temperature=0.1):
    positive, s, negative = of_two_views(z1, z2, temperature)
    return ((s / temperature).exp() * negative).sum(1).log() - positive / temperature


def dclw(z1, z2, temperature=0.1, sigma=0.5):
    positive, s, negative = of_two_views(z1, z2, temperature)
    w = 2 - len(z1) * torch.softmax(positive[: len(z1)].detach() / sigma, 0).repeat(2)
    return ((s / temperature).exp() * negative).sum(1).log() - w * positive / temperature


def debiased(z1, z2, temperature=0.5, tau_plus=0.1, beta=0.0):
    positive, s, negative = of_two_views(z1, z2, temperature)
    m, own, e = 2 * len(z1) - 2, (positive / temperature).exp(), (s / temperature).exp()
    important = e**beta * negative
    total = m * (important * e).sum(1) / important.sum(1)
    g = (total - tau_plus * m * own) / (1 - tau_plus)
    return -(
        own / (own + g.clamp(min=m * torch.as_tensor(-1 / temperature, dtype=z1.dtype).exp()))
    ).log()


def hcl(z1, z2, temperature=0.5, tau_plus=0.1, beta=1.0):
    return debiased(z1, z2, temperature, tau_plus, beta)


def dhel(z1, z2, temperature=0.3):
    x, y = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    others = 1 - torch.eye(len(x), dtype=x.dtype)
    first, second = (((a @ a.t() / temperature).exp() * others).sum(1).log() for a in (x, y))
    return first + second - (x * y).sum(1) / temperature


def rince(z1, z2, temperature=0.5, q=0.5, lam=0.025):
    positive, s, negative = of_two_views(z1, z2, temperature)
    own, total = (positive / temperature).exp(), ((s / temperature).exp() * negative).sum(1)
    return -(own**q) / q + (lam * (own + total)) ** q / q


def adnce(z1, z2, temperature=0.5, mu=0.7, sigma=1.0):
    positive, s, negative = of_two_views(z1, z2, temperature)
    w = ((s - mu).square() / (-2 * sigma**2)).exp().detach() * negative
    w = w / (w.sum(1, keepdim=True) / (2 * len(z1) - 2))
    own = (positive / temperature).exp()
    return -(own / (own + (w * (s / temperature).exp()).sum(1))).log()


def macl(z1, z2, temperature=0.1, alpha=0.5, initial_alignment=0.0):
    positive, s, negative = of_two_views(z1, z2, temperature)
    tau = temperature * (1 + alpha * (positive.detach().mean() - initial_alignment))
    own = (positive / tau).exp()
    p = own / (own + ((s / tau).exp() * negative).sum(1))
    return -p.log() / (1 - p).detach()


def masks(z, ids):
    """s, positives and negatives (n, n)."""
    rows, same = F.normalize(z, dim=1), ids[:, None] == ids
    return rows @ rows.t(), same & ~torch.eye(len(z), dtype=torch.bool), ~same


def multi_similarity(z, ids, alpha=2.0, beta=50.0, base=0.5):
    s, positive, negative = masks(z, ids)
    below = (-alpha * (s - base)).exp() * positive
    above = (beta * (s - base)).exp() * negative
    return (1 + below.sum(1)).log() / alpha + (1 + above.sum(1)).log() / beta


def circle(z, ids, margin=0.25, gamma=256.0):
    s, positive, negative = masks(z, ids)
    above = gamma * torch.relu(s.detach() + margin) * (s - margin)
    below = -gamma * torch.relu(1 + margin - s.detach()) * (s - 1 + margin)
    total = log_sum_exp(above, negative) + log_sum_exp(below, positive)
    return torch.where(positive.any(1) & negative.any(1), log1p_exp(total), 0.0)


def tuplet_margin(z, ids, margin=5.73, scale=64.0):
    s, positive, negative = masks(z, ids)
    edge = 1 - torch.finfo(z.dtype).eps
    angle = torch.where(positive, s, 0.0).clamp(-edge, edge).acos()
    logits = scale * (s[:, None, :] - (angle - math.radians(margin)).cos()[:, :, None])
    pairs = log1p_exp(log_sum_exp(logits, negative[:, None, :]))
    return torch.where(positive, pairs, 0.0).sum(1)


def log_sum_exp(x, mask):
    """Over the last dimension; −1e9 without any term."""
    return torch.where(mask, x, -1e9).logsumexp(-1)


def log1p_exp(x):
    return torch.logaddexp(x, torch.zeros_like(x))


VIEWS = [
    ("dcl", {}),
    ("dcl", {"temperature": 0.03}),
    ("dclw", {}),
    ("dclw", {"sigma": 0.2, "temperature": 0.3}),
    ("debiased", {}),
    ("debiased", {"tau_plus": 0.0}),
    ("debiased", {"tau_plus": 0.6, "temperature": 0.2}),
    ("hcl", {}),
    ("hcl", {"beta": 0.0}),
    ("hcl", {"beta": 2.5, "tau_plus": 0.02, "temperature": 0.2}),
    ("dhel", {}),
    ("dhel", {"temperature": 0.05}),
    ("rince", {}),
    ("rince", {"q": 1.0, "lam": 0.5}),
    ("rince", {"q": 0.1, "temperature": 0.1}),
    ("adnce", {}),
    ("adnce", {"mu": -0.2, "sigma": 0.3, "temperature": 0.1}),
    ("macl", {}),
    ("macl", {"alpha": 1.0, "initial_alignment": 0.6, "temperature": 0.2}),
]
ROWS = [
    ("multi_similarity", {}),
    ("multi_similarity", {"alpha": 8.0, "beta": 5.0, "base": -0.1}),
    ("circle", {}),
    ("circle", {"margin": 0.4, "gamma": 80.0}),
    ("circle", {"margin": 0.0, "gamma": 3.0}),
    ("tuplet_margin", {}),
    ("tuplet_margin", {"margin": 40.0, "scale": 5.0}),
]
#: Labels (n,) for n rows: of any counts, with one row alone; two rows each; one label; all differ.
LABELS = {
    "any": lambda n: ((torch.arange(n) ** 2) % 7 - 3).index_fill(0, torch.tensor([n // 2]), 9),
    "pairs": lambda n: torch.arange(n) // 2,
    "one": lambda n: torch.zeros(n, dtype=torch.long),
    "all": lambda n: torch.arange(n),
}


def case_id(case):
    name, options = case
    return f"{name}({','.join(f'{k}={v}' for k, v in options.items())})"


def backends_of(name):
    """The backends that serve a loss: adnce and circle consist of users' functions."""
    if name in ("adnce", "circle"):
        return [b for b in BACKENDS if b in ("blocked", "triton")]
    return BACKENDS


def every(cases):
    """Every case on every backend, on slow ones the first case of a name."""
    return [
        pytest.param(backend, case, id=f"{backend}-{case_id(case)}")
        for k, case in enumerate(cases)
        for backend in backends_of(case[0])
        if backend not in SLOW or is_due(any(case[0] == name for name, _ in cases[:k]), 2)
    ]


def differentiated(value, leaves):
    weights = torch.linspace(1.0, -0.5, value.numel(), dtype=value.dtype).view(value.shape)
    gradients = torch.autograd.grad((value * weights).sum(), leaves, retain_graph=True)
    return [value.detach(), *gradients]


def assert_equal(ours, truth, bound=1e-11):
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a, b) < bound


def leaves_of(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize(("backend", "case"), every(VIEWS))
def test_of_views_equals_the_formula(backend, case, monkeypatch, poisoned):
    set_tiles(monkeypatch, 16)
    name, options = case
    n = 7 if backend in SLOW else 21
    leaves = leaves_of(*pair(n, 6))
    truth = globals()[name](*leaves, **options)
    ours = getattr(zoo, name)(*leaves, reduction="none", backend=backend, **options)
    assert_equal(differentiated(ours, leaves), differentiated(truth, leaves))
    if backend in SLOW:
        return
    for reduction in ("mean", "sum"):
        ours = getattr(zoo, name)(*leaves, reduction=reduction, backend=backend, **options)
        reduced = getattr(truth, reduction)()
        assert_equal(differentiated(ours, leaves), differentiated(reduced, leaves))


@pytest.mark.parametrize(("backend", "case"), every(ROWS))
def test_of_rows_equals_the_formula(backend, case, monkeypatch, poisoned):
    """Labels of any counts, in blocks of which the last is ragged."""
    set_tiles(monkeypatch, 16)
    monkeypatch.setitem(same_id.BLOCK_SIZES, "cpu", same_id.BlockSize(3, 5))
    name, options = case
    n = 9 if backend in SLOW else 23
    for labels in ["any"] if backend in SLOW else LABELS:
        ids = LABELS[labels](n)
        (z,) = leaves = leaves_of(pair(n, 6)[0])
        truth = globals()[name](z, ids, **options)
        ours = getattr(zoo, name)(z, ids, reduction="none", backend=backend, **options)
        assert_equal(differentiated(ours, leaves), differentiated(truth, leaves))
        for reduction in ("mean", "sum"):
            ours = getattr(zoo, name)(z, ids, reduction=reduction, backend=backend, **options)
            expected = truth.sum() / (divisor(name, z, ids) if reduction == "mean" else 1)
            assert_equal(differentiated(ours, leaves), differentiated(expected, leaves))


def divisor(name, z, ids):
    """What a mean divides by."""
    _, positive, negative = masks(z, ids)
    of = {
        "multi_similarity": torch.tensor(len(z)),
        "circle": (positive.any(1) & negative.any(1)).sum(),
        "tuplet_margin": positive.sum(),
    }
    return of[name].clamp(min=1)


# --- other packages -------------------------------------------------------------------------------


def package(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.mark.parametrize(
    ("name", "module", "of_class", "bound"),
    [
        ("dcl", "lightly.loss.dcl_loss", "DCLLoss", 1e-11),
        ("dclw", "lightly.loss.dcl_loss", "DCLWLoss", 1e-11),
        # the class adds 1e-8 to 1 − P
        ("macl", "lightly.loss.macl_loss", "MACLLoss", 1e-6),
    ],
)
def test_lightly(name, module, of_class, bound):
    theirs = getattr(package(module), of_class)()
    leaves = leaves_of(*pair(19, 8))
    truth = differentiated(theirs(*leaves), leaves)
    assert_equal(differentiated(getattr(zoo, name)(*leaves), leaves), truth, bound)


@pytest.mark.parametrize("labels", ["any", "pairs"])
@pytest.mark.parametrize(
    ("name", "of_class", "options", "theirs"),
    [
        ("multi_similarity", "MultiSimilarityLoss", {}, {}),
        ("circle", "CircleLoss", {"margin": 0.25, "gamma": 256.0}, {"m": 0.25, "gamma": 256}),
        ("tuplet_margin", "TupletMarginLoss", {}, {}),
    ],
)
def test_pytorch_metric_learning(name, of_class, options, theirs, labels):
    theirs = getattr(package("pytorch_metric_learning.losses"), of_class)(**theirs)
    (z,) = leaves = leaves_of(pair(20, 8)[0])
    ids = LABELS[labels](20)
    truth = differentiated(theirs(z, ids), leaves)
    assert_equal(differentiated(getattr(zoo, name)(z, ids, **options), leaves), truth)


# --- float32, half precision, NaN -----------------------------------------------------------------


@pytest.mark.parametrize("case", VIEWS + ROWS, ids=case_id)
def test_float32_is_as_good_as_eager(case):
    """Over some batches, at the start of training."""
    name, options = case
    errors = {"ours": 0.0, "eager": 0.0}
    for seed in range(6):
        z1, z2 = pair(24, 16, torch.float32, seed=seed)
        given = [z1, z2] if case in VIEWS else [z1]
        rest = [] if case in VIEWS else [LABELS["any"](24)]
        results = {}
        for who, dtype in (("truth", torch.float64), ("ours", torch.float32)):
            leaves = leaves_of(*(x.to(dtype) for x in given))
            function = globals()[name] if who == "truth" else getattr(zoo, name)
            none = {} if who == "truth" else {"reduction": "none"}
            results[who] = differentiated(function(*leaves, *rest, **none, **options), leaves)
        leaves = leaves_of(*given)
        results["eager"] = differentiated(globals()[name](*leaves, *rest, **options), leaves)
        for who in errors:
            pairs = zip(results[who], results["truth"], strict=True)
            errors[who] += sum(relative_error(a, b, 1e-6) ** 2 for a, b in pairs)
    # the band: our logarithms round exponents of size |s|/τ, which eager sums may not have
    assert errors["ours"] ** 0.5 <= 2 * errors["eager"] ** 0.5 + 2e-6


def test_circle_of_extreme_rows_in_float32():
    """Exponents from −16 to 240 in one batch, where e²⁴⁰ is not a float32."""
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1e-3], [1e-3, 1.0], [-1.0, 0.1]])
    ids = torch.tensor([0, 0, 1, 1, 0])
    wide, narrow = z.double().requires_grad_(), z.requires_grad_()
    truth = differentiated(circle(wide, ids), [wide])
    ours = differentiated(zoo.circle(narrow, ids, reduction="none"), [narrow])
    assert truth[0].max() > 200
    assert_equal(ours, truth, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [("dclw", {}), ("hcl", {}), ("adnce", {}), ("circle", {})])
def test_half_precision(case, dtype):
    name, options = case
    z1, z2 = pair(16, 8, dtype)
    given, rest = ([z1, z2], []) if case[0] != "circle" else ([z1], [LABELS["any"](16)])
    wide = leaves_of(*(x.double() for x in given))
    truth = differentiated(globals()[name](*wide, *rest, **options).mean(), wide)
    leaves = leaves_of(*given)
    loss = getattr(zoo, name)(*leaves, *rest, **options)
    assert loss.dtype == torch.float32
    scale = truth[0] / loss.detach() if name == "circle" else 1.0  # its mean has another divisor
    for a, b in zip(torch.autograd.grad(loss, leaves), truth[1:], strict=True):
        assert a.dtype == dtype
        assert relative_error(a * scale, b, 1e-6) < 2 * torch.finfo(dtype).eps


def names():
    return [name for name in zoo.__all__ if name[0].islower()]


@pytest.mark.parametrize("name", names())
def test_nan_comes_out(name):
    z1, z2 = pair(6, 4)
    z1[2, 1] = math.nan
    given = (z1, torch.arange(6) // 2) if name in {n for n, _ in ROWS} else (z1, z2)
    assert getattr(zoo, name)(*given).isnan()


# --- graphs, memory -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_one_graph(fresh_dynamo):
    compiled = torch.compile(zoo.hcl, fullgraph=True, backend="aot_eager")
    for n in (6, 9):
        leaves = leaves_of(*pair(n, 4))
        truth, ours = (
            [x.detach(), *torch.autograd.grad(x, leaves)]
            for x in (zoo.hcl(*leaves), compiled(*leaves))
        )
        assert_equal(ours, truth)


@pytest.mark.parametrize("name", ["hcl", "multi_similarity"])
def test_a_second_derivative_raises(name):
    z1, z2 = leaves_of(*pair(6, 3))
    given = (z1, torch.arange(6) // 2) if name == "multi_similarity" else (z1, z2)
    (dz1,) = torch.autograd.grad(getattr(zoo, name)(*given), z1, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dz1.sum().backward()


def test_temperature_has_its_gradient():
    for name in ("dcl", "dclw", "debiased", "hcl", "dhel", "rince"):
        z1, z2 = pair(8, 4)
        tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        truth = torch.autograd.grad(globals()[name](z1, z2, tau).mean(), tau)
        ours = torch.autograd.grad(getattr(zoo, name)(z1, z2, temperature=tau), tau)
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


# --- running sums ---------------------------------------------------------------------------------


def batches(n_samples, size, steps):
    generator = torch.Generator().manual_seed(3)
    for step in range(steps):
        index = torch.randperm(n_samples, generator=generator)[:size]
        yield *pair(size, 5, seed=step), index


def test_sogclr_equals_the_recursion():
    """The surrogate, its gradient and the running means of a loop in float64."""
    tau, gamma, n = 0.4, 0.7, 12
    loss = zoo.SogCLR(n, temperature=tau, gamma=gamma).double()
    u = {}
    for z1, z2, index in batches(n, 7, 5):
        leaves = leaves_of(z1, z2)
        positive, s, negative = of_two_views(*leaves, tau)
        mean = (((s - positive[:, None]) / tau).exp() * negative).sum(1) / 12
        for k, value in enumerate(mean.detach()):
            key = (k // 7, int(index[k % 7]))
            u[key] = (1 - gamma) * u[key] + gamma * value if key in u else value
        held = torch.stack([u[k // 7, int(index[k % 7])] for k in range(14)])
        truth = differentiated((tau * mean / held).mean(), leaves)
        assert_equal(differentiated(loss(*leaves, index), leaves), truth)
    visited = loss.log_u.exp()
    assert len(u) > 14
    for (view, sample), value in u.items():
        torch.testing.assert_close(visited[view, sample], value)
    assert (visited == 0).sum() == 2 * n - len(u)


def test_isogclr_equals_the_recursion():
    tau_0, gamma, rho, step, share, n = 0.25, 0.8, 1.5, 0.05, 0.6, 10
    low, high = 0.2, 0.5
    options = {"temperature": tau_0, "temperature_range": (low, high), "rho": rho}
    loss = zoo.ISogCLR(n, gamma=gamma, step=step, momentum=share, **options).double()
    state = {}
    for z1, z2, index in batches(n, 6, 6):
        leaves = leaves_of(z1, z2)
        x, y = (F.normalize(z, dim=1) for z in leaves)
        expected = 0.0
        for view, s in enumerate((x @ y.t(), y @ x.t())):
            gap = s - s.diagonal()[:, None]
            for k in range(6):
                key = (view, int(index[k]))
                u, tau, m = state.get(key, (None, tau_0, 0.0))
                others = [j for j in range(6) if j != k]
                mean = (gap[k, others] / tau).exp().mean()
                now = float(mean)
                u = now if u is None else (1 - gamma) * u + gamma * now
                weighted = float((((gap[k, others] / tau).exp() / u) * gap[k, others] / tau).mean())
                m = (1 - share) * (math.log(u) + rho - weighted) + share * m
                state[key] = u, min(max(tau - step * m, low), high), m
                expected = expected + tau * mean / u / 6
        assert_equal(differentiated(loss(*leaves, index), leaves), differentiated(expected, leaves))
    for (view, sample), (u, tau, m) in state.items():
        found = (t[view, sample].item() for t in (loss.log_u.exp(), loss.tau, loss.momentum))
        assert [*found] == pytest.approx([u, tau, m], rel=1e-8)
    assert len({round(tau, 6) for _, tau, _ in state.values()}) > 3  # temperatures moved apart


@pytest.mark.parametrize("module", [zoo.SogCLR, zoo.ISogCLR])
def test_state_is_saved_and_loaded(module):
    """A run that is interrupted goes on with the same numbers; evaluation leaves them alone."""
    loss = module(12)
    *first, last = batches(12, 5, 4)
    for z1, z2, index in first:
        loss(z1, z2, index)
    other = module(12)
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    before = copy.deepcopy(loss.state_dict())
    assert loss.eval()(*last) == other.train()(*last)
    for name, x in loss.state_dict().items():
        assert torch.equal(x, before[name])
    assert not torch.equal(other.state_dict()["log_u"], before["log_u"])
    assert "12" in repr(loss)


def three_steps(group, module, sizes, options):
    """The largest error of a rank's losses, gradients and state against one process's."""
    rank, world = dist.get_rank(group), len(sizes)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    whole, part = (
        getattr(zoo, module)(12, **options, **o).double() for o in ({}, {"process_group": group})
    )
    errors = []
    for z1, z2, index in batches(12, sum(sizes), 3):
        found = []
        for loss, cut in ((whole, slice(None)), (part, mine)):
            leaves = leaves_of(z1[cut], z2[cut])
            found.append(differentiated(loss(*leaves, index[cut]), leaves))
        truth, ours = found
        errors += [ours[0] - truth[0]]
        errors += [a / world - b[mine] for a, b in zip(ours[1:], truth[1:], strict=True)]
    errors.append(part.log_u.exp() - whole.log_u.exp())
    states = [(x, whole.state_dict()[name]) for name, x in part.state_dict().items()]
    errors += [a - b for a, b in states[1:]]
    return max(float(x.abs().max()) for x in errors if x.numel())


OF_SAMPLES = [
    ("SogCLR", {}),
    ("ISogCLR", {"temperature": 0.25, "temperature_range": (0.2, 0.5), "rho": 1.5, "step": 0.05}),
]


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("sizes", [(4,), (5, 0), (3, 1, 4), (1, 1, 1)], ids=str)
@pytest.mark.parametrize(("module", "options"), OF_SAMPLES)
def test_running_sums_over_processes(ranks, module, options, sizes):
    arguments = {"module": module, "sizes": sizes, "options": options}
    assert max(ranks.run(len(sizes), three_steps, **arguments)) < 1e-10


def one_pair(group, module):
    """Loss and gradients of a batch of one pair, which the last rank has."""
    n = int(dist.get_rank(group) == 1)
    leaves = leaves_of(*(z[:n] for z in pair(1, 3)))
    loss = getattr(zoo, module)(9, process_group=group)(*leaves, torch.arange(n))
    return [float(x.abs().sum()) for x in (loss, *torch.autograd.grad(loss, leaves))]


def refused(group, module, changes):
    rank = dist.get_rank(group)
    loss = getattr(zoo, module)(9, process_group=group)
    index = torch.tensor([0, changes.get("index", {}).get(rank, 1)])
    loss.train(changes.get("training", {}).get(rank, True))
    try:
        loss(*pair(2, 3), index)
    except ValueError as error:
        return str(error)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("module", ["SogCLR", "ISogCLR"])
def test_all_ranks_refuse(ranks, module):
    for changes, message in (
        ({"index": {1: 9}}, "rank 1: index must be in [0, 9)"),
        ({"training": {1: False}}, "every rank must make the same call"),
    ):
        arguments = {"module": module, "changes": changes}
        assert all(message in text for text in ranks.run(2, refused, **arguments))
    assert ranks.run(2, one_pair, module=module) == [[0.0] * 3] * 2


# --- small batches, bad arguments -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dclw", {"sigma": 0}, r"sigma must be in \(0, inf\), got 0"),
        ("debiased", {"tau_plus": 1.0}, r"tau_plus must be in \[0, 1\), got 1.0"),
        ("hcl", {"beta": -1}, r"beta must be in \[0, inf\), got -1"),
        ("rince", {"q": 1.5}, r"q must be in \(0, 1\], got 1.5"),
        ("rince", {"lam": True}, "lam must be a number, got True"),
        ("adnce", {"temperature": 0.02}, "temperature and sigma must have .* ≤ 80, got 101"),
        ("macl", {"alpha": 2}, r"alpha must be in \[0, 1\], got 2"),
        ("dcl", {"temperature": -1.0}, "temperature must be finite and > 0"),
        ("dhel", {"reduction": "median"}, "reduction must be one of"),
        ("multi_similarity", {"base": math.nan}, "base must be in"),
        ("circle", {"gamma": 1e5}, r"gamma must be in \(0, 10000\], got 100000.0"),
        ("tuplet_margin", {"margin": "5"}, "margin must be a number, got '5'"),
    ],
)
def test_refuses(name, options, message):
    z1, z2 = pair(4, 3)
    given = (z1, torch.arange(4)) if name in {n for n, _ in ROWS} else (z1, z2)
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(zoo, name)(*given, **options)


def test_refuses_bad_rows_and_ids():
    z1, z2 = pair(4, 3)
    for name in names():
        by_id = name in {n for n, _ in ROWS}
        with pytest.raises(ValueError, match="at least 1 row"):
            getattr(zoo, name)(z1[:0], torch.arange(0) if by_id else z2[:0])
        with pytest.raises((TypeError, ValueError), match="ids must be" if by_id else "z2 must"):
            getattr(zoo, name)(z1, z2[:, :2])
    for module, index in itertools.product(
        (zoo.SogCLR, zoo.ISogCLR), ([0, 1, 2, 9], [0, 1, 2], [0, 1, 2, 1])
    ):
        with pytest.raises(
            ValueError, match=r"index must (be in|hold every sample once|be an int)"
        ):
            module(9)(z1, z2, torch.tensor(index))
    with pytest.raises(ValueError, match="n_samples must be a positive integer, got 0"):
        zoo.SogCLR(0)
    for bounds in (0.1, (0.1, 0.2, 0.3)):
        with pytest.raises(TypeError, match=r"temperature_range must be two numbers \(low, high\)"):
            zoo.ISogCLR(4, temperature_range=bounds)
    with pytest.raises(ValueError, match=r"temperature must be in \[0.1, 0.2\]"):
        zoo.ISogCLR(4, temperature=0.3, temperature_range=(0.1, 0.2))
