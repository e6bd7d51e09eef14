"""Adapters agree with the packages they replace; explicit negatives agree with dense definitions.

The package in float64 is the truth: losses agree to 1e-6, and the gradient's error is at most twice
the package's own in float32.
"""

import importlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from family import BACKENDS, MEMBERS, assert_same_gradients, member_id, pair, relative_error

from alphacl_fast import compat, explicit_negatives, objectives  # noqa: F401
from alphacl_fast.backend import reference
from alphacl_fast.compat import lightly, open_clip, pytorch_metric_learning, sentence_transformers
from alphacl_fast.explicit_negatives import loss_against
from alphacl_fast.supcon import supcon_loss

ROUNDING = 4e-7  # tolerance of exact float32 results


def check(ours, theirs, *inputs):
    """Compare two losses of the inputs, and all gradients; ``theirs`` in float64 is the truth."""

    def run(loss, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        value = loss(*leaves)
        return value.detach().double(), [g.double() for g in torch.autograd.grad(value, leaves)]

    truth, gradients = run(theirs, torch.float64)
    value, mine = run(ours, torch.float32)
    _, eager = run(theirs, torch.float32)
    assert abs(value - truth) <= 1e-6 * max(1.0, abs(truth))
    for g, e, t in zip(mine, eager, gradients, strict=True):
        assert relative_error(g, t) <= 2 * relative_error(e, t) + ROUNDING
    exact, in_float64 = run(ours, torch.float64)
    assert abs(exact - truth) <= 1e-12 * max(1.0, abs(truth))
    for g, t in zip(in_float64, gradients, strict=True):
        assert relative_error(g, t) < 1e-10


def package(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)  # an error if missing: the extra "test" has it


@pytest.mark.parametrize("n", [2, 37])
@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_lightly(n, tau):
    theirs = package("lightly.loss").NTXentLoss(temperature=tau)
    check(lightly.NTXentLoss(temperature=tau), theirs, *pair(n, 16, torch.float32))


def test_lightly_memory_bank():
    """The bank fills, wraps and is left alone in evaluation, as in the original."""
    package("lightly.loss")
    from lightly.loss import NTXentLoss

    ours, theirs = lightly.NTXentLoss(0.1, (50, 16)), NTXentLoss(0.1, (50, 16))
    for step in range(6):
        z1, z2 = pair(19, 16, torch.float32, seed=step)
        if step == 0:  # one start for both
            for loss in (ours, theirs):
                loss(z1, z2)
            bank = theirs.memory_bank.bank if hasattr(theirs, "memory_bank") else theirs.bank
            assert ours.bank.shape == bank.shape
            ours.bank.copy_(bank)
        if step != 3:
            z1.requires_grad_()
        a, b = ours(z1, z2), theirs(z1, z2)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        if step != 3:
            ga, gb = (torch.autograd.grad(x, z1)[0] for x in (a, b))
            assert relative_error(ga, gb) < 2e-6
        torch.testing.assert_close(ours.bank, bank, rtol=1e-6, atol=1e-6)
    state = lightly.NTXentLoss(0.1, (50, 16))
    state.load_state_dict(ours.state_dict())
    assert torch.equal(state.bank, ours.bank)


def test_open_clip():
    theirs = package("open_clip.loss").ClipLoss()
    ours = open_clip.ClipLoss()
    for scale in (1.0, 20.0):
        image, text = (F.normalize(z) for z in pair(41, 12, torch.float32))
        check(ours, theirs, image, text, torch.tensor(scale))
    assert ours(image, text, 5.0, output_dict=True)["contrastive_loss"] == ours(image, text, 5.0)
    assert ours(image, text, 5.0, logit_bias=3.0) == ours(image, text, 5.0)


@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_pytorch_metric_learning_simclr(tau):
    theirs = package("pytorch_metric_learning.losses").NTXentLoss(temperature=tau)
    z1, z2 = pair(23, 8, torch.float32)
    labels = torch.arange(23).repeat(2)
    shuffled = torch.randperm(46, generator=torch.Generator().manual_seed(0))
    z, labels = torch.cat([z1, z2])[shuffled], 1000 - 7 * labels[shuffled]
    ours = pytorch_metric_learning.NTXentLoss(temperature=tau)
    check(lambda z: ours(z, labels), lambda z: theirs(z, labels), z)


@pytest.mark.parametrize("tau", [0.1, 0.5])
@pytest.mark.parametrize("classes", [1, 5, 30])
def test_pytorch_metric_learning_supcon(classes, tau):
    theirs = package("pytorch_metric_learning.losses").SupConLoss(temperature=tau)
    labels = torch.randint(classes, (40,), generator=torch.Generator().manual_seed(1))
    ours = pytorch_metric_learning.SupConLoss(temperature=tau)
    check(lambda z: ours(z, labels), lambda z: theirs(z, labels), pair(40, 8, torch.float32)[0])


@pytest.mark.parametrize("hard", [0, 1, 3])
@pytest.mark.parametrize("scale", [5.0, 20.0])
def test_sentence_transformers(hard, scale):
    package("sentence_transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers.losses import MultipleNegativesRankingLoss

    class Model(torch.nn.Module):
        def forward(self, features):
            return {"sentence_embedding": features["x"]}

    columns = [
        *pair(17, 8, torch.float32),
        *(pair(17, 8, torch.float32, seed=k)[1] for k in range(1, hard + 1)),
    ]
    ours, theirs = (
        loss(Model(), scale=scale)
        for loss in (
            sentence_transformers.MultipleNegativesRankingLoss,
            MultipleNegativesRankingLoss,
        )
    )
    check(
        lambda *z: ours([{"x": x} for x in z]),
        lambda *z: theirs([{"x": x} for x in z], None),
        *columns,
    )
    if not hard:
        return

    def dot_score(a, b):
        return a @ b.t()

    ours = sentence_transformers.MultipleNegativesRankingLoss(scale=1.0, similarity_fct=dot_score)
    scores = columns[0] @ torch.cat(columns[1:]).t()
    torch.testing.assert_close(
        ours.compute_loss_from_embeddings(columns), F.cross_entropy(scores, torch.arange(17))
    )


def test_what_is_not_served_is_said():
    z1, z2 = pair(6, 4, torch.float32)
    z = torch.cat([z1, z2])
    metric, ranking = pytorch_metric_learning, sentence_transformers.MultipleNegativesRankingLoss
    for call, message in (
        (lambda: lightly.NTXentLoss(0.0), "temperature must be > 0, got 0"),
        (
            lambda: lightly.NTXentLoss(0.5, 50),
            r"memory_bank_size must be 0 or \(rows, features\), got 50",
        ),
        (
            lambda: lightly.NTXentLoss(0.5, (16, 4), True),
            "gather_distributed must be False with a memory bank",
        ),
        (lambda: open_clip.ClipLoss(use_horovod=True), "use_horovod must be False"),
        (lambda: metric.NTXentLoss(distance=None), "distance must be left at its default"),
        (lambda: metric.NTXentLoss(temperature=-1.0), "temperature must be > 0"),
        (lambda: metric.NTXentLoss()(z, torch.arange(12) // 3), "labels must each have two rows"),
        (lambda: metric.NTXentLoss()(z, torch.arange(12) // 4), "labels must each have two rows"),
        (lambda: metric.NTXentLoss()(z, torch.arange(12)), "labels must each have two rows"),
        (
            lambda: metric.SupConLoss()(z, torch.arange(5)),
            r"labels must be a tensor of shape \(12,\), got \(5,\)",
        ),
        (lambda: metric.SupConLoss()(z), r"labels must be a tensor of shape \(12,\), got NoneType"),
        (lambda: metric.SupConLoss()(z, torch.zeros(12), ref_emb=z), "ref_emb must be None"),
        (
            lambda: ranking(similarity_fct=torch.cdist),
            "similarity_fct must be cos_sim or dot_score, got cdist",
        ),
        (lambda: ranking().compute_loss_from_embeddings([z1]), "two columns or more of one shape"),
        (
            lambda: ranking().compute_loss_from_embeddings([z1, z2[:3]]),
            "two columns or more of one shape",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    z.requires_grad_()
    alone = metric.SupConLoss()(z, torch.arange(12))  # no positives: nothing to learn, but a graph
    alone.backward()
    assert alone == 0
    assert not z.grad.any()


# --- explicit negatives ---------------------------------------------------------------------------


def dense(z, negatives, positive, tau, objective):
    t = z @ (z if negatives is None else negatives).t()
    if negatives is None:
        t = t[~torch.eye(len(z), dtype=torch.bool)].view(len(z), -1)
    return reference.of_similarities(objective, t, positive, tau, 1.0)


@pytest.mark.parametrize("m", [None, 1, 5, 30])
@pytest.mark.parametrize("member", MEMBERS, ids=member_id)
def test_loss_against(member, m):
    objective = objectives.make(*member)
    generator = torch.Generator().manual_seed(3)
    z, other = (
        torch.randn(k, 4, generator=generator, dtype=torch.float64) / 2 for k in (9, m or 1)
    )
    positive, weights = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=objective.tau_gradient is not None)
    leaves = [z, positive] + ([] if m is None else [other])
    leaves = [x.requires_grad_() for x in leaves] + ([tau] if tau.requires_grad else [])
    negatives = None if m is None else other
    truth = dense(z, negatives, positive, tau, objective)
    ours = loss_against(z, negatives, positive, objective, temperature=tau, reduction="none")
    assert_same_gradients(ours, truth, weights, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_against_on_every_backend(backend):
    z, other = (F.normalize(x) for x in pair(21, 8, torch.float32))
    other = other[:13]
    positive = torch.linspace(-0.5, 0.9, 21)
    results = []
    for x, y, chosen in ((z, other, backend), (z.double(), other.double(), "blocked")):
        x, y, p = x.requires_grad_(), y.requires_grad_(), positive.to(x.dtype).requires_grad_()
        loss = loss_against(x, y, p, temperature=0.1, backend=chosen)
        results.append([loss.detach(), *torch.autograd.grad(loss, (x, y, p))])
        one_side = torch.autograd.grad(
            loss_against(x, y.detach(), p.detach(), temperature=0.1, backend=chosen), x
        )[0]
        torch.testing.assert_close(one_side, results[-1][1])
        other_side = torch.autograd.grad(
            loss_against(x.detach(), y, p.detach(), temperature=0.1, backend=chosen), y
        )[0]
        torch.testing.assert_close(other_side, results[-1][2])
    for a, b in zip(*results, strict=True):
        assert relative_error(a.double(), b) < 1e-5


def test_loss_against_beside_a_graph():
    compiled = torch.compile(lambda z, ids: supcon_loss(2 * z, ids), backend="eager")
    for n in (12, 9, 15):
        z, ids = pair(n, 4)[0].requires_grad_(), torch.arange(n) // 3
        a, b = (
            torch.autograd.grad(f(z, ids), z)[0]
            for f in (compiled, lambda z, ids: supcon_loss(2 * z, ids))
        )
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_loss_against_refuses():
    z, other = pair(5, 3)
    ok = torch.zeros(5, dtype=torch.float64)
    for arguments, error, message in (
        ((z, other[:, :2], ok), ValueError, "negatives must have the width, dtype and device of z"),
        (
            (z, other.float(), ok),
            ValueError,
            "negatives must have the width, dtype and device of z",
        ),
        ((z, other[:0], ok), ValueError, "negatives must have at least 1 row"),
        ((z[:0], None, ok[:0]), ValueError, "z must have at least 1 row"),
        (
            (z, other, ok[:4]),
            ValueError,
            r"positive must be a floating-point tensor of shape \(5,\)",
        ),
        ((z, other, 0.5), ValueError, "got float"),
        ((z.int(), None, ok), TypeError, "z must have one of the dtypes"),
    ):
        with pytest.raises(error, match=message):
            loss_against(*arguments)
    with pytest.raises(ValueError, match="backend must not be 'reference'"):
        loss_against(z, other, ok, backend="reference")
    with pytest.raises(TypeError, match=r"ids must be an integer tensor .* got float64"):
        supcon_loss(z, ok)
    with pytest.raises(ValueError, match="reduction must be one of"):
        supcon_loss(z, torch.zeros(5, dtype=torch.long), reduction="median")


def test_supcon_reductions_and_lonely_rows():
    z, ids = pair(12, 5)[0], torch.tensor([3, 3, 7, 3, 9, 7, 7, 1, 2, 2, 5, 3])
    f = F.normalize(z)
    s = f @ f.t() / 0.2
    expected = []
    for i in range(12):
        others = torch.tensor([j for j in range(12) if j != i])
        same = [j for j in others.tolist() if ids[j] == ids[i]]
        expected.append(
            s[i, others].logsumexp(0) - s[i, same].mean() if same else torch.tensor(0.0).double()
        )
    expected = torch.stack(expected)
    got = supcon_loss(z, ids, temperature=0.2, reduction="none")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        supcon_loss(z, ids, temperature=0.2), expected.sum() / (expected != 0).sum()
    )
    torch.testing.assert_close(
        supcon_loss(z, ids, temperature=0.2, reduction="sum"), expected.sum()
    )
    assert supcon_loss(z, torch.arange(12)) == 0
