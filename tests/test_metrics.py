"""Metrics of a batch against dense float64 formulas and other packages, their gradients, memory,
edge cases and errors, and the trainer's log of them.
"""

import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from family import Largest, pair, relative_error, saved_bytes

from alphacl_fast import FusedAlphaCLLoss, alignment, batch_metrics, uniformity
from alphacl_fast.train import Config, RunError, train

pytestmark = pytest.mark.xdist_group("train")


def noisy_pair(n, d, dtype=torch.float64, noise=1.0):
    """Two views that agree somewhat, so that accuracies lie between 0 and 1."""
    z1, z2 = pair(n, d)
    return z1.to(dtype), (z1 + noise * z2).to(dtype)


# --- dense definitions ---


def unit(z):
    return F.normalize(z.double(), dim=1)


def dense_alignment(z1, z2):
    return (unit(z1) - unit(z2)).square().sum(1).mean()


def dense_uniformity(z1, z2, t=2.0):
    return sum(torch.pdist(unit(z)).square().mul(-t).exp().mean().log() for z in (z1, z2)) / 2


def dense_accuracy(z1, z2, k):
    """A strict comparison, for rows without ties."""
    scores = unit(z1) @ unit(z2).t()
    found = []
    for s in (scores, scores.t()):
        rank = 1 + (s > s.diagonal()[:, None]).sum(1)
        found.append((rank <= k).double().mean().item())
    return sum(found) / 2


def dense_effective_rank(z1, z2):
    p = torch.linalg.svdvals(torch.cat([unit(z1), unit(z2)]))
    p = p / p.sum()
    return (-p * p.clamp(min=1e-300).log()).sum().exp()


# --- values ---


@pytest.mark.parametrize("tile", [7, 512])
@pytest.mark.parametrize("shape", [(2, 1), (3, 5), (29, 6), (40, 64), (57, 8)], ids=str)
def test_equals_the_dense_formulas(shape, tile, monkeypatch):
    # ragged tiles, and fewer pairs than features
    monkeypatch.setattr("alphacl_fast.metrics.tile_size", lambda n, device: min(n, tile))
    z1, z2 = noisy_pair(*shape)
    m = batch_metrics(z1, z2, t=3.0, top=(1, 2, 5, 1000))
    assert m.alignment == pytest.approx(dense_alignment(z1, z2).item(), rel=1e-12)
    assert m.uniformity == pytest.approx(dense_uniformity(z1, z2, 3.0).item(), rel=1e-11)
    assert m.effective_rank == pytest.approx(dense_effective_rank(z1, z2).item(), rel=1e-10)
    assert [*m.accuracy] == [1, 2, 5, 1000]
    assert m.accuracy[1000] == 1
    if shape[1] > 1:  # with one feature every cosine ties
        for k in (1, 2, 5):
            assert m.accuracy[k] == pytest.approx(dense_accuracy(z1, z2, k), abs=1e-15)
    assert alignment(z1, z2).item() == pytest.approx(m.alignment, rel=1e-12)
    assert uniformity(z1, z2, t=3.0).item() == pytest.approx(m.uniformity, rel=1e-11)


def test_accuracies_of_noisy_views_differ():
    """The batch of the other tests is not one where every accuracy is 0 or 1."""
    m = batch_metrics(*noisy_pair(57, 8, noise=1.5))
    assert 0 < m.accuracy[1] < m.accuracy[5] < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accumulates_in_float32(dtype):
    z1, z2 = noisy_pair(60, 16, dtype)
    m, exact = batch_metrics(z1, z2), batch_metrics(z1.double(), z2.double())
    for name, value in exact.scalars().items():
        assert m.scalars()[name] == pytest.approx(value, rel=2e-6, abs=1e-6), name
    for f in (alignment, uniformity):
        value = f(z1, z2)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), f(z1.double(), z2.double()), rtol=2e-6, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert batch_metrics(z1, z2) == m
        assert uniformity(z1, z2) == value


def test_close_rows_and_large_t_keep_their_digits():
    """Nearly collapsed rows in float32, and exponentials far below its range."""
    common = torch.randn(1, 16)
    z1, z2 = (common + 1e-3 * torch.randn(50, 16) for _ in range(2))
    truth = dense_uniformity(z1, z2, 1e6).item()  # squared distances of about 1e-6
    assert -5 < truth < -0.5
    for value in (batch_metrics(z1, z2, t=1e6).uniformity, uniformity(z1, z2, t=1e6).item()):
        assert value == pytest.approx(truth, rel=1e-3)
    z1, z2 = pair(50, 16, torch.float32)
    x = [torch.pdist(unit(z)).square() for z in (z1, z2)]
    truth = sum((-1000 * d).logsumexp(0) - math.log(len(d)) for d in x).item() / 2
    assert truth < -200
    for value in (batch_metrics(z1, z2, t=1000.0).uniformity, uniformity(z1, z2, t=1000).item()):
        assert value == pytest.approx(truth, rel=1e-5)


def test_threads_change_nothing(one_thread, monkeypatch):
    monkeypatch.setattr("alphacl_fast.metrics.tile_size", lambda n, device: 64)
    z1, z2 = noisy_pair(300, 8, torch.float32)
    alone = batch_metrics(z1, z2)
    torch.set_num_threads(3)
    shared = batch_metrics(z1, z2)
    assert torch.get_num_threads() == 3
    assert shared.accuracy == alone.accuracy
    assert shared.scalars() == pytest.approx(alone.scalars(), rel=1e-6)


# --- ties and small batches ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_count_against(dtype):
    z = torch.randn(1, 33, dtype=dtype).expand(700, 33)  # several tiles, some of them ragged
    m = batch_metrics(z, z)
    assert m.accuracy == {1: 0.0, 5: 0.0}
    assert m.alignment == pytest.approx(0, abs=1e-6)
    assert m.uniformity == pytest.approx(0, abs=1e-6)
    assert m.effective_rank == pytest.approx(1, abs=1e-3)
    twins = torch.randn(40, 33, dtype=dtype).repeat(2, 1)  # each positive ties with one other
    assert batch_metrics(twins, twins, top=(1, 2)).accuracy == {1: 0.0, 2: 1.0}


def test_rank_counts_both_directions():
    """Rows of x all prefer y_0, whereas y_0 and y_1 have their nearest row where it belongs."""
    x = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    y = torch.tensor([[1.0, 0.1], [-0.2, 1.0]])
    assert batch_metrics(x, y, top=(1, 2)).accuracy == {1: 0.75, 2: 1.0}


def test_effective_rank_of_known_matrices():
    eye = torch.eye(6, dtype=torch.float64)
    assert batch_metrics(eye, eye).effective_rank == pytest.approx(6, rel=1e-12)
    assert batch_metrics(eye[:3], eye[:3]).effective_rank == pytest.approx(3, rel=1e-12)
    assert batch_metrics(eye[:1], -eye[:1]).effective_rank == pytest.approx(1, rel=1e-12)


def test_one_pair():
    z1, z2 = (z.requires_grad_() for z in pair(1, 5))
    m = batch_metrics(z1, z2)
    assert m.alignment == pytest.approx((unit(z1) - unit(z2)).square().sum().item(), rel=1e-12)
    assert (m.uniformity, m.accuracy) == (0.0, {1: 1.0, 5: 1.0})
    assert m.effective_rank == pytest.approx(dense_effective_rank(z1, z2).item(), rel=1e-12)
    assert alignment(z1, z2).item() == pytest.approx(m.alignment, rel=1e-12)
    value = uniformity(z1, z2)
    assert value == 0
    assert not any(g.any() for g in torch.autograd.grad(value, (z1, z2)))


def test_rows_that_are_zero_or_not_finite():
    z1, z2 = noisy_pair(9, 4)
    z1[2] = 0
    m = batch_metrics(z1, z2)
    assert m.alignment == pytest.approx(dense_alignment(z1, z2).item(), rel=1e-12)
    assert m.uniformity == pytest.approx(dense_uniformity(z1, z2).item(), rel=1e-12)
    z1.requires_grad_()
    for f in (alignment, uniformity):
        (g,) = torch.autograd.grad(f(z1, z2), z1)
        assert g.isfinite().all()
        assert not g[2].any()
    nothing = batch_metrics(torch.zeros(3, 2), torch.zeros(3, 2))
    assert (nothing.effective_rank, nothing.accuracy[1]) == (0.0, 0.0)
    for bad in (math.nan, math.inf):
        z = z1.detach().clone()
        z[4, 0] = bad
        found = batch_metrics(z, z2)
        assert all(math.isnan(x) for x in (found.alignment, found.uniformity, found.effective_rank))
        assert found.accuracy[1] <= m.accuracy[1]


# --- gradients ---


def test_gradients():
    views = [z.requires_grad_() for z in noisy_pair(13, 5)]
    for ours, dense in (
        (alignment, dense_alignment),
        (uniformity, dense_uniformity),
        (lambda a, b: uniformity(a, b, t=0.3), lambda a, b: dense_uniformity(a, b, 0.3)),
    ):
        for mine, theirs in zip(
            torch.autograd.grad(ours(*views), views),
            torch.autograd.grad(dense(*views), views),
            strict=True,
        ):
            assert relative_error(mine, theirs) < 1e-11
        assert torch.autograd.gradcheck(ours, views)
    with torch.no_grad():
        assert not uniformity(*views).requires_grad


@pytest.mark.parametrize("metric", [alignment, uniformity])
def test_torch_compile(metric):
    compiled = torch.compile(metric, fullgraph=True, backend="aot_eager")
    for n in (12, 20):
        views = [z.requires_grad_() for z in noisy_pair(n, 6)]
        torch.testing.assert_close(compiled(*views), metric(*views))
        for mine, theirs in zip(
            torch.autograd.grad(compiled(*views), views),
            torch.autograd.grad(metric(*views), views),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)


# --- memory ---


def test_memory_is_linear():
    """The largest tensor that is made is a tile; a matrix of all pairs would have 16 MiB."""
    z1, z2 = (z.requires_grad_() for z in pair(2048, 8, torch.float32))
    with Largest() as largest:
        batch_metrics(z1, z2)
    assert 2**20 <= largest.bytes <= 2**20 + 2**16  # 512 × 512 in float32

    with saved_bytes() as saved, Largest() as largest:
        (alignment(z1, z2) + uniformity(z1, z2)).backward()
    assert largest.bytes <= 2**20 + 2**16
    assert 0 < sum(saved.values()) <= 16 * z1.nbytes


# --- other packages ---


def test_lightly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = pytest.importorskip("lightly.loss.hypersphere_loss").HypersphereLoss(t=2.0, lam=0.7)
    views = [z.requires_grad_() for z in noisy_pair(31, 8)]
    ours = alignment(*views) + 0.7 * uniformity(*views)
    theirs = loss(*views)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for mine, other in zip(
        torch.autograd.grad(ours, views), torch.autograd.grad(theirs, views), strict=True
    ):
        assert relative_error(mine, other) < 1e-11


def test_lightly_accuracy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        topk = pytest.importorskip("lightly.utils.benchmarking.topk")
    z1, z2 = noisy_pair(57, 8, noise=1.5)
    scores = unit(z1) @ unit(z2).t()
    found = [
        topk.mean_topk_accuracy(s.argsort(1, descending=True), torch.arange(57), (1, 5))
        for s in (scores, scores.t())
    ]
    for k, share in batch_metrics(z1, z2).accuracy.items():
        assert share == pytest.approx(sum(f[k].item() for f in found) / 2, abs=1e-6)


def test_pytorch_metric_learning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("pytorch_metric_learning")
        from pytorch_metric_learning.distances import CosineSimilarity
        from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
        from pytorch_metric_learning.utils.inference import CustomKNN
    assert package
    z1, z2 = noisy_pair(57, 8, torch.float32, noise=1.5)
    calculator = AccuracyCalculator(
        include=("precision_at_1",),
        k=1,
        device=torch.device("cpu"),
        knn_func=CustomKNN(CosineSimilarity()),
    )
    labels = torch.arange(57)
    found = [
        calculator.get_accuracy(query, labels, reference, labels)["precision_at_1"]
        for query, reference in ((z1, z2), (z2, z1))
    ]
    assert batch_metrics(z1, z2).accuracy[1] == pytest.approx(sum(found) / 2, abs=1e-6)


# --- errors ---


@pytest.mark.parametrize("metric", [alignment, uniformity, batch_metrics])
def test_bad_embeddings(metric):
    z1, z2 = pair(8, 4)
    for arguments, error, message in (
        ((z1[:0], z2[:0]), ValueError, r"z1 must have at least 1 row, got shape \(0, 4\)"),
        ((z1[:, :0], z2[:, :0]), ValueError, r"z1 must have .* 1 column, got shape \(8, 0\)"),
        ((z1, z2[:4]), ValueError, r"z2 must have the shape of z1 \(8, 4\), got \(4, 4\)"),
        ((z1, z2.long()), TypeError, "z2 must have one of the dtypes float32"),
        ((z1.long(), z2.long()), TypeError, "z1 must have one of the dtypes float32"),
        (([1.0], z2), TypeError, "z1 must be a tensor, got list"),
    ):
        with pytest.raises(error, match=message):
            metric(*arguments)


def test_bad_options():
    z1, z2 = pair(8, 4)
    for t in (0.0, -1.0, math.nan, math.inf, True, "2"):
        for metric in (uniformity, batch_metrics):
            with pytest.raises(ValueError, match="t must be a number between 1e-12 and 1e12, got"):
                metric(z1, z2, t=t)
    for top in ((0,), (1, -5), (1.0,), (True,)):
        with pytest.raises(ValueError, match="top must be positive integers, got"):
            batch_metrics(z1, z2, top=top)
    with pytest.raises(TypeError, match="top must be a sequence of positive integers, got 5"):
        batch_metrics(z1, z2, top=5)


# --- the trainer ---


def test_a_run_logs_the_metrics_of_its_batches(tmp_path, monkeypatch):
    """`--alpha-every` writes what the loss saw in that step, and looking changes nothing."""
    seen, original = [], FusedAlphaCLLoss.forward

    def forward(self, z1, z2):
        seen.append((z1.detach().clone(), z2.detach().clone()))
        return original(self, z1, z2)

    monkeypatch.setattr(FusedAlphaCLLoss, "forward", forward)
    tiny = {
        "dataset": "digits", "width": 4, "batch_size": 64, "subset": 256, "epochs": 1,
        "workers": 0, "threads": 1,
    }  # fmt: skip
    train(Config.create(alpha_every=2, **tiny), tmp_path / "run")
    steps = seen[-4:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "alpha"]
    assert [row["step"] for row in rows] == [2, 4]
    for row, views in zip(rows, steps[1::2], strict=True):
        expected = batch_metrics(*views).scalars()
        assert {*expected} == {
            "alignment", "uniformity", "accuracy_top1", "accuracy_top5", "effective_rank",
        }  # fmt: skip
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert row["alignment"] == pytest.approx(2 - 2 * row["positive_similarity"], rel=1e-5)
        assert "effective_negatives" in row
    train(Config.create(**tiny), tmp_path / "plain")
    states = [
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
        for name in ("run", "plain")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run_that_diverges_says_so_while_metrics_are_logged(tmp_path):
    config = Config.create(
        dataset="digits", width=4, batch_size=64, subset=256, epochs=2, workers=0, threads=1,
        optimizer="sgd", lr=1e30, warmup_epochs=0, alpha_every=1,
    )  # fmt: skip
    with pytest.raises(RunError, match="the loss became NaN in epoch 1"):
        train(config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert math.isnan([row for row in rows if row["kind"] == "alpha"][-1]["effective_rank"])
