"""Adapters agree with the packages they replace; explicit negatives agree with dense definitions.

The package in float64 is the truth: losses agree to 1e-6, and the gradient's error is at most twice
the package's own in float32.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from contracts import ST, DenseSupCon, model_and_guide, package, several_views
from family import BACKENDS, MEMBERS, assert_same_gradients, member_id, pair, relative_error

from alphacl_fast import compat, explicit_negatives, objectives  # noqa: F401
from alphacl_fast.backend import reference
from alphacl_fast.compat import (
    entry,
    info_nce,
    lightly,
    open_clip,
    pytorch_metric_learning,
    sentence_transformers,
    supcontrast,
)
from alphacl_fast.explicit_negatives import loss_against
from alphacl_fast.supcon import supcon_loss

pytestmark = pytest.mark.xdist_group("packages")  # they take seconds to import

ROUNDING = 4e-7  # tolerance of exact float32 results


@pytest.fixture(autouse=True)
def sweeps(monkeypatch):
    """Small batches go through the sweeps, as large ones do."""
    monkeypatch.setattr(entry, "PAIRS_OF_A_MATRIX", 0)


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
            ours.memory_bank.bank.copy_(theirs.memory_bank.bank)
        if step != 3:
            z1.requires_grad_()
        a, b = ours(z1, z2), theirs(z1, z2)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        if step != 3:
            ga, gb = (torch.autograd.grad(x, z1)[0] for x in (a, b))
            assert relative_error(ga, gb) < 2e-6
        banks = ours.memory_bank.bank, theirs.memory_bank.bank
        torch.testing.assert_close(*banks, rtol=1e-6, atol=1e-6)


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
    MultipleNegativesRankingLoss = package(ST).MultipleNegativesRankingLoss

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


def test_a_scale_in_half_precision_is_not_rounded_again():
    """1/scale is taken in the dtype of the loss."""
    image, text = (F.normalize(z) for z in pair(64, 16, torch.float32))
    for dtype in (torch.bfloat16, torch.float16):
        scale = torch.tensor(33.3, dtype=dtype, requires_grad=True)
        loss = open_clip.ClipLoss()(image, text, scale)
        loss.backward()
        torch.testing.assert_close(loss, open_clip.ClipLoss()(image, text, scale.item()))
        assert scale.grad.dtype == dtype


def test_a_subclass_has_its_own_logits():
    """Its `get_logits` and `get_ground_truth` are called, as the package calls them."""
    loss = package("open_clip.loss")
    tensors = (*(F.normalize(z) for z in pair(9, 6)), torch.tensor(5.0, dtype=torch.float64))

    def smooth(base):
        class Smooth(base):
            def get_logits(self, *args, **options):
                return tuple(x.tanh() for x in super().get_logits(*args, **options))

        return Smooth()

    torch.testing.assert_close(
        smooth(open_clip.ClipLoss)(*tensors), smooth(loss.ClipLoss)(*tensors)
    )

    def flipped(base):
        class Flipped(base):
            def get_ground_truth(self, *args, **options):
                return super().get_ground_truth(*args, **options).flip(0)

        return Flipped()

    for name, more in (("ClipLoss", ()), ("SigLipLoss", (torch.tensor(-1.0),))):
        ours, theirs = (flipped(getattr(module, name)) for module in (open_clip, loss))
        torch.testing.assert_close(ours(*tensors, *more), theirs(*tensors, *more))


def test_a_bank_moves_to_the_embeddings_and_survives_tensors_without_values():
    loss = lightly.NTXentLoss(0.1, (16, 4))
    bank = loss.memory_bank.bank.clone()
    q, k = torch.randn(3, 4, device="meta", requires_grad=True), torch.randn(3, 4, device="meta")
    loss(q, k).backward()
    assert q.grad.shape == q.shape
    assert torch.equal(loss.memory_bank.bank, bank)


METRIC = ("NTXentLoss", "SupConLoss", "MultiSimilarityLoss", "CircleLoss", "TupletMarginLoss")


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", METRIC)
def test_objects_of_pytorch_metric_learning(name, kept, monkeypatch):
    """Reducers, distances, a regulariser, and the wrappers that look for the package's classes."""
    theirs = package("pytorch_metric_learning.losses")
    from pytorch_metric_learning import distances, reducers
    from pytorch_metric_learning.regularizers import LpRegularizer
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    monkeypatch.setitem(entry.PAIRS_OF_A_BLOCK, "cpu", 50)  # several blocks
    monkeypatch.setattr(entry, "PAIRS_KEPT", 14 * 14 * kept)
    z, labels = pair(14, 5)[0], torch.arange(14) % 4
    settings = [
        {"reducer": reducers.MeanReducer()},
        {"reducer": reducers.ThresholdReducer(low=0.5)},
        {"reducer": reducers.AvgNonZeroReducer(), "embedding_regularizer": LpRegularizer()},
        {"distance": distances.CosineSimilarity()},
    ]
    if name in METRIC[:3]:
        settings += [
            {"distance": distance}
            for distance in (
                distances.DotProductSimilarity(normalize_embeddings=False),
                distances.LpDistance(),
                distances.LpDistance(power=2),
            )
        ]
    if name in METRIC[:2]:  # the others' losses have a dimension too many for it
        settings += [{"reducer": reducers.PerAnchorReducer(reducers.AvgNonZeroReducer())}]

    def compare(ours, theirs, *arguments):
        found, expected = (
            [value, torch.autograd.grad(value, x)[0]]
            for loss in (ours, theirs)
            for x in [z.clone().requires_grad_()]
            for value in [loss(x, *arguments)]
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)

    for given in settings:
        pair_of_losses = (
            getattr(module, name)(**given) for module in (pytorch_metric_learning, theirs)
        )
        compare(*pair_of_losses, labels)
    ours, original = getattr(pytorch_metric_learning, name)(), getattr(theirs, name)()
    for symmetric in (True, False):
        wrapped = (theirs.SelfSupervisedLoss(loss, symmetric) for loss in (ours, original))
        compare(*wrapped, pair(14, 5)[1])
    DistributedLossWrapper(ours)
    if name != "TupletMarginLoss":  # NaN in the package where a row meets itself
        memories = [theirs.CrossBatchMemory(loss, 5, 20) for loss in (ours, original)]
        for _ in range(3):
            compare(*memories, labels)


def test_half_precision_without_positives():
    """Sums of half-precision rows overflow; the loss is 0 all the same."""
    for name in METRIC:
        z = torch.full((12, 4), 3e4, dtype=torch.float16, requires_grad=True)
        loss = getattr(pytorch_metric_learning, name)()(z, torch.arange(12))
        loss.backward()
        assert loss == 0 or name == "MultiSimilarityLoss"
        assert z.grad.isfinite().all()


def test_labels_may_be_any_numbers():
    z = pair(10, 4)[0]
    labels = torch.tensor([0.5, 0.25, 0.5, 3.0, 0.25, 3.0, 0.5, 7.0, 8.0, 0.25])
    whole = (4 * labels).long()
    for name in METRIC:
        loss = getattr(pytorch_metric_learning, name)()
        assert loss(z, labels) == loss(z, whole)
        references = {"ref_emb": z[:7], "ref_labels": labels[:7]}
        assert loss(z, labels, **references) == loss(z, whole, ref_emb=z[:7], ref_labels=whole[:7])


ALONE = """
import sys
for name in ("pytorch_metric_learning", "sentence_transformers", "lightly", "open_clip"):
    sys.modules[name] = None
import torch
from alphacl_fast.compat import lightly, open_clip, sentence_transformers
from alphacl_fast.compat import pytorch_metric_learning as metric
z, labels = torch.arange(24.0).sin().view(6, 4), torch.arange(6) % 2
for name in sys.argv[1:]:
    print(getattr(metric, name)()(z, labels).item())
for call in (lambda: metric.NTXentLoss(distance=1), lambda: sentence_transformers.GISTEmbedLoss):
    try:
        call()
    except (ValueError, ImportError) as error:
        print(error)
"""


def test_no_package_is_needed():
    """Without the packages, losses are the same, and their objects are refused."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, *METRIC],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    *values, distance, guide = run.stdout.splitlines()
    z, labels = torch.arange(24.0).sin().view(6, 4), torch.arange(6) % 2
    for name, value in zip(METRIC, values, strict=True):
        here = getattr(pytorch_metric_learning, name)()(z, labels).item()  # by sweeps, not a matrix
        assert float(value) == pytest.approx(here, rel=1e-6)
    assert distance == "distance must be None without pytorch-metric-learning installed"
    assert guide == "GISTEmbedLoss needs sentence-transformers 6 or newer, with which it embeds"


def smoothed(loss):
    loss.cross_entropy = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    return loss


def test_a_guided_loss_keeps_the_parts_that_users_replace():
    """Its cross-entropy and its similarity, which the package's code then calls."""
    losses = package(ST)
    features = [{"input_ids": z} for z in pair(6, 5)]
    for name in ("GISTEmbedLoss", "CachedGISTEmbedLoss"):
        made = [getattr(m, name)(*model_and_guide(), 0.2) for m in (sentence_transformers, losses)]
        for loss in made:
            loss.contrast_anchors = loss.contrast_positives = False
            loss.margin = -3.0  # nothing is left out: smoothing would meet −inf
        plain = made[1](features, None)
        torch.testing.assert_close(made[0](features, None), plain)
        for loss in made:
            loss.cross_entropy_loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        a, b = (loss(features, None) for loss in made)
        torch.testing.assert_close(a, b)
        assert abs(a - plain) > 1e-3


def test_a_guide_keeps_what_equals_the_positive():
    """Copies of the positive are as similar to the anchor, whatever the rounding."""
    losses = package(ST)
    z1, z2 = pair(24, 5, torch.float32)
    features = [{"input_ids": z1}, {"input_ids": z2[torch.arange(24) // 4]}]
    for name in ("GISTEmbedLoss", "CachedGISTEmbedLoss"):
        a, b = (
            getattr(m, name)(*model_and_guide(), 0.2)(features, None)
            for m in (sentence_transformers, losses)
        )
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_guided_loss_names_the_column_that_does_not_fit():
    package(ST)
    anchors, positives = pair(6, 5)
    for negatives in (anchors[:, :3], anchors[:0]):
        features = [{"input_ids": z} for z in (anchors, positives, negatives)]
        with pytest.raises(ValueError, match="the negatives' embeddings must have"):
            sentence_transformers.GISTEmbedLoss(*model_and_guide())(features, None)


def test_weights_of_both_orders():
    """The package weighs each order of the views by itself."""
    theirs = package("lightly.loss")

    def of_the_first(x, y):
        return x.square().sum(1) * x[:, 0] + 0 * y[:, 0]

    z1, z2 = pair(9, 6)
    a, b = (m.DCLLoss(weight_fn=of_the_first)(z1, z2) for m in (lightly, theirs))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_powers_of_similarities():
    theirs = package("pytorch_metric_learning.losses")
    from pytorch_metric_learning.distances import CosineSimilarity

    z, labels = pair(14, 5)[0], torch.arange(14) % 4
    a, b = (
        m.SupConLoss(distance=CosineSimilarity(power=2))(z, labels)
        for m in (pytorch_metric_learning, theirs)
    )
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_info_nce_without_negatives():
    theirs = package("info_nce")
    z1, z2 = pair(6, 4)
    for negatives, mode in ((z1[:0], "unpaired"), (z1.new_zeros(6, 0, 4), "paired")):
        for reduction in ("mean", "none"):
            a, b = (
                m.info_nce(z1, z2, negatives, reduction=reduction, negative_mode=mode)
                for m in (info_nce, theirs)
            )
            torch.testing.assert_close(a, b)


def test_what_is_not_served_is_said():
    z1, z2 = pair(6, 4, torch.float32)
    z, labels = torch.cat([z1, z2]), torch.arange(12) // 2
    metric, ranking = pytorch_metric_learning, sentence_transformers.MultipleNegativesRankingLoss
    for call, message in (
        (lambda: lightly.NTXentLoss(0.0), "temperature must have a magnitude of 1e-8 or more"),
        (
            lambda: lightly.NTXentLoss(0.5, (50, 4, 2)),
            r"memory_bank_size must be .* or \(rows, features\), got \(50, 4, 2\)",
        ),
        (lambda: lightly.MACLLoss(alpha=2.0), r"alpha must be in \[0, 1\], got 2"),
        (lambda: open_clip.ClipLoss(use_horovod=True), "use_horovod must be False"),
        (lambda: open_clip.SigLipLoss(dist_impl="ring"), "dist_impl must be None or one of"),
        (lambda: metric.NTXentLoss(temperature=0)(z, labels), "temperature must be a number other"),
        (lambda: metric.SupConLoss(0.0)(z, labels), "temperature must be a number other"),
        (lambda: metric.MultiSimilarityLoss(alpha=0)(z, labels), "alpha must be a number other"),
        (lambda: metric.SupConLoss()(z, labels, (labels,) * 5), "must have 3 tensors .* got 5"),
        (lambda: smoothed(lightly.NTXentLoss())(z1, z2), "cross_entropy must be the plain .* 0.1"),
        (lambda: lightly.DCLLoss()(z1, z2[:3]), r"out1 must have the shape of out0 \(6, 4\), got"),
        (lambda: lightly.MACLLoss()(z1.int(), z2), "z0 must have one of the dtypes"),
        (lambda: open_clip.ClipLoss()(z1[0], z2, 1.0), "image_features must have shape"),
        (
            lambda: open_clip.SigLipLoss()(z1, z2[:, :2], 1.0, None),
            "text_features must have the sh",
        ),
        (lambda: info_nce.info_nce(z1, z2[:2]), "positive_key must have the shape of query"),
        (lambda: open_clip.ClipLoss()(z1, z2, 0.0), "logit_scale must be > 0, got 0.0"),
        (
            lambda: ranking().compute_loss_from_embeddings([z1, z2.int()]),
            r"embeddings\[1\] must have one of the dtypes",
        ),
        (
            lambda: metric.SupConLoss()(z, torch.arange(5)),
            r"labels must be a tensor of shape \(12,\), got \(5,\)|Number of embeddings",
        ),
        (lambda: metric.SupConLoss()(z), r"labels must be a tensor of shape \(12,\), got NoneType"),
        (lambda: ranking(scale=0.0), "scale must be > 0, got 0"),
        (lambda: ranking(directions=("doc_to_doc",)), "directions must be 'query_to_doc' and some"),
        (
            lambda: ranking(
                directions=("query_to_doc", "doc_to_doc"), partition_mode="per_direction"
            ),
            "partition_mode must be 'joint' with",
        ),
        (lambda: ranking(hardness_mode="soft"), "hardness_mode must be one of"),
        (lambda: ranking(hardness_strength=-1.0), "hardness_strength must be ≥ 0, got -1"),
        (lambda: ranking().compute_loss_from_embeddings([z1]), "two columns or more of one shape"),
        (
            lambda: ranking().compute_loss_from_embeddings([z1, z2[:3]]),
            "two columns or more of one shape",
        ),
        (
            lambda: info_nce.info_nce(z1, z2, z, negative_mode="paired"),
            r"negative_keys must have shape \(6, M, 4\) with negative_mode='paired', got \(12, 4\)",
        ),
        (lambda: info_nce.InfoNCE(negative_mode="some")(z1, z2), "negative_mode must be one of"),
        (
            lambda: supcontrast.SupConLoss()(z),
            r"features must have shape \(B, views, …\), got \(12, 4\)",
        ),
        (lambda: supcontrast.SupConLoss(contrast_mode="two"), "contrast_mode must be one of"),
        (
            lambda: supcontrast.SupConLoss()(z[:, None], torch.arange(3)),
            r"labels must have shape \(12,\), got \(3,\)",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


@pytest.mark.parametrize("kept", [0, 1 << 26])
def test_blocks_are_computed_again_where_they_are_not_kept(kept, monkeypatch):
    monkeypatch.setitem(entry.PAIRS_OF_A_BLOCK, "cpu", 24)
    monkeypatch.setattr(entry, "PAIRS_KEPT", kept)
    rows = []

    def similarity(x, y):
        rows.append(len(x))
        return x.tanh() @ y.t()

    loss = sentence_transformers.MultipleNegativesRankingLoss(similarity_fct=similarity)
    z1, z2 = (x.requires_grad_() for x in pair(12, 4))
    loss.compute_loss_from_embeddings([z1, z2]).backward()
    assert rows == [2] * (6 if kept else 12)
    dense = torch.nn.functional.cross_entropy(20 * z1.tanh() @ z2.t(), torch.arange(12))
    torch.testing.assert_close(z1.grad, torch.autograd.grad(dense, z1)[0])


@pytest.mark.parametrize("mode", ["all", "one"])
def test_masks_of_supcontrast(mode, monkeypatch):
    """A mask of weights, which is not symmetric, in several blocks; labels are a mask too."""
    monkeypatch.setitem(entry.PAIRS_OF_A_BLOCK, "cpu", 50)
    monkeypatch.setattr(entry, "PAIRS_KEPT", 0)
    features, labels = several_views(2)(7)
    generator = torch.Generator().manual_seed(0)
    same = labels[:, None] == labels
    weights = torch.rand(7, 7, generator=generator) * (torch.rand(7, 7, generator=generator) > 0.3)
    ours, dense = supcontrast.SupConLoss(0.2, mode), DenseSupCon(0.2, mode)
    for arguments in ((labels,), (None, same), (None, weights.double()), (labels[:, None] / 2,)):
        found, expected = (
            [value, torch.autograd.grad(value, x)[0]]
            for loss in (ours, dense)
            for x in [features.clone().requires_grad_()]
            for value in [loss(x, *arguments)]
        )
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


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
