"""`siglip_loss` and `SigLipLoss` against the formula of arXiv:2303.15343 over all N² pairs."""

import copy
import itertools
import pickle
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import set_tiles
from family import (
    BACKENDS,
    SLOW,
    Largest,
    in_turn,
    pair,
    relative_error,
    saved_bytes,
    siglip_and_grads,
)
from torch.nn.functional import logsigmoid, normalize

from alphacl_fast import SigLipLoss, distributed, siglip_loss
from alphacl_fast.backend import blocked
from alphacl_fast.functional import REDUCTIONS
from alphacl_fast.objectives import SIGLIP

NAMES = ("loss", "dz1", "dz2", "dscale", "dbias")
#: Some samples share an id, all do, or none.
IDS = {
    "some": lambda n: torch.arange(n) % 5,
    "one": lambda n: torch.zeros(n, dtype=torch.long),
    "all differ": lambda n: 3 * torch.arange(n),
}


def dense(z1, z2, scale, bias, ids=None, similarity="cosine", reduction="mean"):
    """The definition, one matrix of all pairs."""
    if similarity == "cosine":
        z1, z2 = normalize(z1, dim=1), normalize(z2, dim=1)
    labels = 2 * torch.eye(len(z1), dtype=z1.dtype) - 1
    terms = -logsigmoid(labels * (scale * (z1 @ z2.t()) + bias))
    if ids is not None:
        left_out = (ids[:, None] == ids) & (labels < 0)
        terms = torch.where(left_out, 0.0, terms)
    return reduced(terms.sum(1), reduction)


def reduced(losses, reduction):
    return losses if reduction == "none" else getattr(losses, reduction)()


def assert_equal(ours, truth, bound=1e-11, floor=1e-3):
    for name, a, b in zip(NAMES, ours, truth, strict=True):
        assert relative_error(a, b, floor) < bound, name


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_the_dense_formula(backend, similarity, reduction, monkeypatch, poisoned):
    """In tiles, the last of them ragged; the scale may be negative, or 0."""
    if backend != "reference":
        set_tiles(monkeypatch, 16)
    options = {"similarity": similarity, "reduction": reduction}
    turn = REDUCTIONS.index(reduction) + (similarity == "dot")
    cases = [(10.0, -10.0), (-3.0, 0.7), (0.0, -1.3)]
    for scale, bias in in_turn(cases, turn) if backend in SLOW else cases:
        views = pair(37, 9)
        truth = siglip_and_grads(dense, *views, scale, bias, **options)
        ours = siglip_and_grads(siglip_loss, *views, scale, bias, backend=backend, **options)
        assert_equal(ours, truth)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("kind", IDS)
def test_ids(backend, kind, monkeypatch, poisoned):
    """Only pairs of other ids and the positives count; with one id the positives alone."""
    if backend != "reference":
        set_tiles(monkeypatch, 16)
    for reduction in REDUCTIONS:
        options = {"ids": IDS[kind](21), "reduction": reduction}
        truth = siglip_and_grads(dense, *pair(21, 6), 4.0, -2.0, **options)
        ours = siglip_and_grads(siglip_loss, *pair(21, 6), 4.0, -2.0, backend=backend, **options)
        assert_equal(ours, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_gradient_alone(backend, reduction):
    """What needs no gradient changes nothing in the gradient of the rest."""
    n = 12 if backend in SLOW else 30
    z1, z2 = pair(n, 8)
    scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (7.0, -3.0))
    weights = torch.linspace(0.5, 1.5, n if reduction == "none" else 1, dtype=torch.float64)
    whole = None
    tensors = (z1, z2, scale, bias)
    subsets = [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 0)]
    for needed in subsets:
        given = [x.clone().requires_grad_(bool(k)) for x, k in zip(tensors, needed, strict=True)]
        loss = siglip_loss(
            *given[:2], scale=given[2], bias=given[3], reduction=reduction, backend=backend
        )
        (loss * weights).sum().backward()
        found = [x.grad for x in given]
        whole = whole or found
        for k, a, b in zip(needed, found, whole, strict=True):
            assert (a is not None) == bool(k)
            if k:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        assert not siglip_loss(*given[:2], scale=given[2], backend=backend).requires_grad


def test_numbers_and_tensors_are_the_same():
    z1, z2 = pair(9, 4, torch.float32)
    expected = siglip_loss(z1, z2, scale=5.0, bias=-2.0)
    assert expected.dtype == torch.float32
    for scale, bias in ((5, torch.tensor([-2.0])), (torch.tensor(5.0).double(), -2)):
        assert siglip_loss(z1, z2, scale=scale, bias=bias) == expected
    default = siglip_loss(z1, z2)
    assert default == siglip_loss(z1, z2, scale=10.0, bias=-10.0) == SigLipLoss()(z1, z2)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in SLOW])
def test_gradcheck(backend):
    leaves = [z.requires_grad_() for z in pair(6, 3)]
    leaves += [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, -1.0)]
    for reduction, ids in itertools.product(REDUCTIONS, (None, torch.arange(6) % 4)):

        def loss(z1, z2, scale, bias, reduction=reduction, ids=ids):
            options = {"reduction": reduction, "ids": ids, "backend": backend}
            return siglip_loss(z1, z2, scale=scale, bias=bias, **options)

        assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_pair_is_its_positive_term(backend, reduction):
    truth = siglip_and_grads(dense, *pair(1, 5), 3.0, -1.0, reduction=reduction)
    ours = siglip_and_grads(
        siglip_loss, *pair(1, 5), 3.0, -1.0, reduction=reduction, backend=backend
    )
    assert_equal(ours, truth)
    ids = torch.zeros(1, dtype=torch.long)
    loss = siglip_loss(*pair(1, 5), scale=3.0, bias=-1.0, ids=ids, backend=backend)
    torch.testing.assert_close(loss, truth[0].reshape(()), rtol=1e-12, atol=0)


# --- float32 and half precision -------------------------------------------------------------------


def started(seed):
    return pair(48, 24, torch.float32, seed=seed)


def trained(seed):
    """Float32 views whose positives coincide and whose negatives are orthogonal, nearly."""
    generator = torch.Generator().manual_seed(seed)
    square, noise = torch.randn(2, 48, 48, generator=generator, dtype=torch.float64)
    q, _ = torch.linalg.qr(square)
    return q.float(), (q + 0.01 * noise).float()


#: Views, scale and bias. In "trained" each logit is ±28, so that a term is 7e-13.
BATCHES = {
    "start": (started, 10.0, -10.0),
    "scale 100": (started, 100.0, -17.3),
    "scale 1e4": (started, 1e4, -20.0),
    "trained": (trained, 56.0, -28.0),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", BATCHES)
def test_float32_is_as_good_as_eager(backend, batch):
    """Errors against float64, their root mean squares over some batches."""
    make, scale, bias = BATCHES[batch]
    batches = [make(seed) for seed in range(2 if backend in SLOW else 8)]
    squares = {"ours": [0.0] * len(NAMES), "eager": [0.0] * len(NAMES)}
    for z1, z2 in batches:
        truth = siglip_and_grads(dense, z1.double(), z2.double(), scale, bias)
        for who, function in (("ours", siglip_loss), ("eager", dense)):
            options = {"backend": backend} if who == "ours" else {}
            found = siglip_and_grads(function, z1, z2, scale, bias, **options)
            assert all(x.isfinite().all() for x in found)
            for k, (a, b) in enumerate(zip(found, truth, strict=True)):
                squares[who][k] += relative_error(a, b, 0.0) ** 2 / len(batches)
    # the CUDA kernels take exp(−28) from exp2, where the rounding of log2(e) is 3 eps of every term
    band = torch.finfo(torch.float32).eps * (4 if backend == "cuda" else 1)
    for name, ours, eager in zip(NAMES, squares["ours"], squares["eager"], strict=True):
        assert ours**0.5 <= 2 * eager**0.5 + band, (name, ours**0.5, eager**0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend, dtype):
    """The loss, dscale and dbias are float32; dz has the rounding of its dtype."""
    z1, z2 = pair(40, 32, dtype)
    truth = siglip_and_grads(dense, z1.double(), z2.double(), 12.0, -8.0)
    ours = siglip_and_grads(siglip_loss, z1, z2, 12.0, -8.0, backend=backend)
    for name, a, b in zip(NAMES, ours, truth, strict=True):
        assert a.dtype == (dtype if name in ("dz1", "dz2") else torch.float32)
        bound = torch.finfo(dtype).eps if name in ("dz1", "dz2") else 1e-5
        assert relative_error(a, b, 0.0) < bound, name


def test_autocast_changes_nothing():
    z1, z2 = pair(20, 8, torch.float32)
    truth = siglip_and_grads(siglip_loss, z1, z2, 10.0, -10.0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = siglip_and_grads(siglip_loss, z1, z2, 10.0, -10.0)
    assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_infinite_logits(backend):
    """A logit beyond float32's exponentials gives a linear loss, not inf or NaN."""
    z1, z2 = pair(10, 4, torch.float32)
    for scale, bias in ((1e8, 0.0), (1.0, 1e9), (1.0, -1e9)):
        ours = siglip_and_grads(siglip_loss, z1, z2, scale, bias, backend=backend)
        truth = siglip_and_grads(dense, z1.double(), z2.double(), scale, bias)
        assert_equal(ours, truth, bound=1e-4)


# --- the module, graphs, memory -------------------------------------------------------------------


def test_module_learns_scale_and_bias():
    z1, z2 = pair(12, 5)
    loss = SigLipLoss(6.0, -4.0)
    assert {name for name, _ in loss.named_parameters()} == {"scale", "bias"}
    truth = siglip_and_grads(dense, z1, z2, 6.0, -4.0)
    loss(z1, z2).backward()
    torch.testing.assert_close(loss.scale.grad, truth[3].float())
    torch.testing.assert_close(loss.bias.grad, truth[4].float())
    assert "scale=6 (learnable), bias=-4 (learnable)" in repr(loss)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert other.scale is not loss.scale
        assert other(z1, z2) == loss(z1, z2)
    ids = torch.arange(12) // 2
    torch.testing.assert_close(loss(z1, z2, ids), dense(z1, z2, 6.0, -4.0, ids))


def test_module_keeps_what_it_is_given():
    fixed = SigLipLoss(6.0, torch.tensor(-4.0), learnable=False)
    assert not [*fixed.parameters()]
    assert [name for name, _ in fixed.named_buffers()] == ["bias"]
    assert "scale=6, bias=-4 (tensor)" in repr(fixed)
    shared = torch.nn.Parameter(torch.tensor(3.0))
    assert SigLipLoss(shared, learnable=False).scale is shared
    assert SigLipLoss(shared).scale is shared


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_one_graph_at_any_batch_size(reduction, with_ids):
    loss = SigLipLoss(5.0, -3.0, reduction=reduction).double()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")

    def compare(n):
        leaves = [z.requires_grad_() for z in pair(n, 5)] + [*loss.parameters()]
        ids = torch.arange(n) % 4 if with_ids else None
        both = (gradients(f(*leaves[:2], ids), leaves) for f in (loss, compiled))
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)

    for n in (12, 9):
        compare(n)
    with torch.compiler.set_stance("fail_on_recompile"):
        compare(17)


def gradients(value, leaves):
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), leaves)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_dynamo")
def test_function_in_a_graph():
    """Numbers, a learnable log-scale, and no gradient at all."""
    z1, z2 = pair(9, 4)
    log_scale = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)

    def step(z1, z2, log_scale):
        return siglip_loss(z1 * 2, z2, scale=log_scale.exp(), bias=-3.0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    both = (gradients(f(z1, z2, log_scale), [log_scale]) for f in (step, compiled))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(compiled(z1, z2, log_scale), step(z1, z2, log_scale))


def test_operators_pass_opcheck():
    z1, z2 = pair(6, 4)
    scale_and_bias = torch.tensor([3.0, -2.0], dtype=torch.float64)
    for reduction in ("mean", "none"):
        rest = (SIGLIP.key, "cosine", "cross_view", False, reduction)
        rest = (*rest, None, "blocked", None, "", None)
        given = (z1, z2, scale_and_bias, None, *rest, [True, False, True])
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(torch.ops.alphacl_fast.loss.default, given, test_utils=tests)
    given = (*given[:4], torch.ones(6, dtype=torch.float64), *given[4:])
    torch.library.opcheck(torch.ops.alphacl_fast.loss_grad.default, given)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in SLOW])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_matrix_of_pairs(backend, reduction, monkeypatch):
    n, d, tile = 1024, 8, 64
    monkeypatch.setattr(blocked, "tile_size", lambda rows, device: tile)
    leaves = [z.requires_grad_() for z in pair(n, d, torch.float32)]
    loss = SigLipLoss(reduction=reduction, backend=backend)
    with saved_bytes() as saved, Largest() as largest:
        loss(*leaves).sum().backward()
    rows_bytes = 2 * n * d * 4
    assert sum(saved.values()) <= 4 * rows_bytes
    assert largest.bytes <= max(tile * tile * 4, 2 * rows_bytes) < n * n * 4 / 16


def test_one_sweep(monkeypatch):
    """The gradient sweep gives the loss as well."""
    calls = []
    for name in ("row_sums", "pair_grad"):
        sweep = getattr(blocked, name)
        monkeypatch.setattr(
            blocked, name, lambda *a, name=name, sweep=sweep: calls.append(name) or sweep(*a)
        )
    siglip_and_grads(siglip_loss, *pair(8, 4), 10.0, -10.0, backend="blocked")
    assert calls == ["pair_grad"]


def test_a_second_derivative_raises():
    z1, z2 = (z.requires_grad_() for z in pair(6, 3))
    (dz1,) = torch.autograd.grad(siglip_loss(z1, z2), z1, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dz1.sum().backward()


# --- bad arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"similarity": "euclidean"}, ValueError, "similarity must be 'cosine' or 'dot'.*euclid"),
        ({"reduction": "median"}, ValueError, "reduction must be one of"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
        ({"scale": "10"}, TypeError, "scale must be a float or a tensor, got str"),
        ({"bias": True}, TypeError, "bias must be a float or a tensor, got bool"),
        ({"scale": float("nan")}, ValueError, "scale must be finite.*nan"),
        ({"bias": torch.tensor(-1e30)}, ValueError, "bias must be finite"),
        ({"scale": torch.ones(2)}, ValueError, r"scale must have one element, got shape \(2,\)"),
        ({"bias": torch.tensor(3)}, TypeError, "bias must be a floating-point tensor"),
        ({"ids": torch.zeros(4)}, TypeError, "ids must be an integer tensor"),
        ({"process_group": "moon"}, TypeError, "process_group must be None"),
    ],
)
def test_refuses(options, error, message):
    with pytest.raises(error, match=message):
        siglip_loss(*pair(5, 3), **options)
    if "ids" not in options:
        with pytest.raises(error, match=message):
            SigLipLoss(**options)


def test_refuses_no_pairs_and_other_shapes():
    with pytest.raises(ValueError, match=r"z1 must have at least 1 row, got shape \(0, 3\)"):
        siglip_loss(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match="z2 must have the shape of z1"):
        siglip_loss(torch.zeros(4, 3), torch.zeros(5, 3))
    with pytest.raises(TypeError, match="learnable must be True or False"):
        SigLipLoss(learnable="yes")
    computed = torch.ones(1, requires_grad=True).exp()
    with pytest.raises(ValueError, match=r"bias must be .* no gradient, got a tensor with"):
        SigLipLoss(bias=computed)


# --- other packages -------------------------------------------------------------------------------


def test_open_clip():
    theirs = pytest.importorskip("open_clip.loss").SigLipLoss()

    def their_loss(z1, z2, scale, bias):
        return theirs(normalize(z1, dim=1), normalize(z2, dim=1), scale, bias)

    views = pair(19, 8)
    truth = siglip_and_grads(their_loss, *views, 11.0, -9.0)
    assert_equal(siglip_and_grads(siglip_loss, *views, 11.0, -9.0), truth)


# --- processes ------------------------------------------------------------------------------------


def parts(group, sizes, reduction, strategy, with_ids):
    """The largest error of a rank's loss and gradients, which are averaged over the ranks as DDP
    does.
    """
    rank, world = dist.get_rank(group), len(sizes)
    total, first = sum(sizes), sum(sizes[:rank])
    mine = slice(first, first + sizes[rank])
    weights = torch.linspace(-0.5, 1.5, total if reduction == "none" else 1).double()
    here = weights[mine] * world if reduction == "none" else weights
    found, ids = [], torch.arange(total) % 3
    for z1, z2, weight, options in (
        (*pair(total, 5), weights, {"ids": ids} if with_ids else {}),
        (
            *(z[mine] for z in pair(total, 5)),
            here,
            {"process_group": group, **({"ids": ids[mine]} if with_ids else {})},
        ),
    ):
        leaves = [z.clone().requires_grad_() for z in (z1, z2)]
        leaves += [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (4.0, -2.0)]
        most = distributed.GATHER_BYTES if strategy == "gather" else 0
        with mock.patch.object(distributed, "GATHER_BYTES", most):
            loss = siglip_loss(
                *leaves[:2], scale=leaves[2], bias=leaves[3], reduction=reduction, **options
            )
        found.append([loss.detach(), *torch.autograd.grad((loss * weight).sum(), leaves)])
    truth, ours = found
    if reduction == "none":
        truth[0] = truth[0][mine]
    truth[1:3] = [x[mine] for x in truth[1:3]]
    ours[1:3] = [x / world for x in ours[1:3]]
    pairs = [(a, b) for a, b in zip(ours, truth, strict=True) if a.numel()]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("sizes", [(4, 3), (1, 0), (3, 1, 4)])
def test_processes_share_a_batch(ranks, sizes, reduction, strategy):
    options = {"sizes": sizes, "reduction": reduction, "strategy": strategy}
    for with_ids in (False, True):
        assert max(ranks.run(len(sizes), parts, with_ids=with_ids, **options)) < 1e-12


def refused(group, options):
    """The error of this rank, which has a number of its own for some options."""
    rank = dist.get_rank(group)
    given = {name: x[rank] if isinstance(x, list) else x for name, x in options.items()}
    n = given.pop("n", 4)
    try:
        siglip_loss(*pair(n, 3), process_group=group, **given)
    except (TypeError, ValueError) as error:
        return str(error)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "at least 1 pair"),
        ({"scale": [10.0, 11.0]}, "the same scale, got 10.0 on rank 0 and 11.0 on rank 1"),
        ({"bias": [1.0, 2.0]}, "the same bias"),
        ({"similarity": ["cosine", "euclidean"]}, "rank 1: similarity must be"),
        ({"ids": [torch.arange(4), torch.arange(3)]}, "rank 1: ids must be an integer tensor"),
        ({"backend": "reference"}, "backend must not be 'reference'"),
    ],
)
def test_all_ranks_refuse(ranks, options, message):
    assert all(message in text for text in ranks.run(2, refused, options=options))
