"""One loss on several prefixes of the features: value and gradient of the weighted sum, what is
passed on, memory, and what is refused.
"""

import copy
import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from family import Largest, pair, relative_error, saved_bytes

from alphacl_fast import FusedAlphaCLLoss, MatryoshkaLoss, loss_against, supcon_loss
from alphacl_fast.backend import blocked
from alphacl_fast.functional import alpha_cl_loss

pytestmark = pytest.mark.xdist_group("ranks")  # one worker starts the processes

DIMS, WEIGHTS = (8, 3, 16), (0.5, 2.0, -1.25)


def differentiate(loss, *inputs):
    """[loss, gradients] for fresh leaves."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def dense_infonce(z1, z2, tau):
    """NT-Xent of two views in plain PyTorch."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    n = len(z1)
    scores = (z @ z.t() / tau).masked_fill(torch.eye(2 * n, dtype=torch.bool), -math.inf)
    return F.cross_entropy(scores, torch.arange(2 * n).roll(n))


def test_equals_the_dense_sum():
    """Every cut is normalised by itself, in value and gradient."""
    views = pair(11, 16)

    def dense(z1, z2):
        cuts = zip(DIMS, WEIGHTS, strict=True)
        return sum(w * dense_infonce(z1[:, :m], z2[:, :m], 0.3) for m, w in cuts)

    ours = differentiate(MatryoshkaLoss(FusedAlphaCLLoss(temperature=0.3), DIMS, WEIGHTS), *views)
    for mine, theirs in zip(ours, differentiate(dense, *views), strict=True):
        assert relative_error(mine, theirs) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_any_similarity_order_and_reduction(similarity, reduction):
    views = pair(9, 16)
    inner = FusedAlphaCLLoss("alpha_direct", similarity=similarity, reduction=reduction)
    ours = differentiate(MatryoshkaLoss(inner, DIMS), *views)
    other = differentiate(MatryoshkaLoss(inner, sorted(DIMS), [1, 1, 1]), *views)
    by_hand = differentiate(
        lambda z1, z2: sum(inner(z1[:, :m].clone(), z2[:, :m].clone()) for m in DIMS), *views
    )
    for mine, reordered, theirs in zip(ours, other, by_hand, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(reordered, theirs, rtol=1e-12, atol=1e-13)


def test_weights_belong_to_their_dims():
    views = pair(9, 16)
    inner = FusedAlphaCLLoss()
    for k, dim in enumerate(DIMS):
        alone = [float(j == k) for j in range(3)]
        found = MatryoshkaLoss(inner, DIMS, alone)(*views)
        assert found.item() == pytest.approx(inner(*(z[:, :dim] for z in views)).item(), rel=1e-12)


def test_ids_and_other_arguments_are_passed_on():
    (z1, z2), ids = pair(12, 16), torch.arange(12) % 5
    inner = FusedAlphaCLLoss()
    loss = MatryoshkaLoss(inner, DIMS)
    expected = sum(inner(z1[:, :m], z2[:, :m], ids) for m in DIMS)
    assert loss(z1, z2) != expected
    for found in (loss(z1, z2, ids), loss(z1, z2, ids=ids), loss(z1=z1, z2=z2, ids=ids)):
        torch.testing.assert_close(found, expected)
    by_label = MatryoshkaLoss(supcon_loss, DIMS)
    torch.testing.assert_close(
        by_label(z1, ids, temperature=torch.tensor(0.2)),
        sum(supcon_loss(z1[:, :m], ids, temperature=0.2) for m in DIMS),
    )

    def against(query, key, queue):
        query, key, queue = (F.normalize(z, dim=1) for z in (query, key, queue))
        return loss_against(query, queue, (query * key).sum(1))

    bank = torch.randn(30, 16, dtype=torch.float64)
    torch.testing.assert_close(
        MatryoshkaLoss(against, [5, 9])(z1, z2, bank),
        against(z1[:, :5], z2[:, :5], bank[:, :5]) + against(z1[:, :9], z2[:, :9], bank[:, :9]),
    )
    assert MatryoshkaLoss(lambda z: z.sum(), [2, 16])(torch.ones(3, 16)).item() == 3 * 18


def test_the_inner_temperature_is_learnt():
    (z1, z2), tau = pair(12, 16), torch.nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
    loss = MatryoshkaLoss(FusedAlphaCLLoss(temperature=tau), DIMS, WEIGHTS)
    assert [*loss.state_dict()] == ["loss.temperature"]
    loss(z1, z2).backward()
    free = tau.detach().clone().requires_grad_()
    sum(
        w * alpha_cl_loss(z1[:, :m], z2[:, :m], temperature=free)
        for m, w in zip(DIMS, WEIGHTS, strict=True)
    ).backward()
    torch.testing.assert_close(tau.grad, free.grad)
    other = copy.deepcopy(loss)
    other.load_state_dict({"loss.temperature": torch.tensor(0.9, dtype=torch.float64)})
    assert other.loss.temperature.item() == 0.9
    assert f"dims={DIMS}" in repr(loss)
    assert "supcon_loss" in repr(MatryoshkaLoss(supcon_loss, DIMS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """The gradients cause the error: they are summed in the dtype of the embeddings."""
    views = pair(40, 16, dtype)
    loss = MatryoshkaLoss(FusedAlphaCLLoss(temperature=0.2), DIMS)
    ours = differentiate(loss, *views)
    exact = differentiate(loss, *(z.double() for z in views))
    assert ours[0].dtype == torch.float32
    assert relative_error(ours[0].double(), exact[0]) < 1e-6
    for mine, truth in zip(ours[1:], exact[1:], strict=True):
        assert mine.dtype == dtype
        # one rounding of each of the three gradients and one of each of two sums
        assert relative_error(mine.double(), truth) < 5 * torch.finfo(dtype).eps / 2


@pytest.mark.usefixtures("fresh_dynamo")
def test_torch_compile():
    loss = MatryoshkaLoss(FusedAlphaCLLoss("alpha_direct"), DIMS, WEIGHTS)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (12, 20):
        views = pair(n, 16)
        ids = torch.arange(n) % 7
        for mine, theirs in zip(
            differentiate(lambda a, b, ids=ids: compiled(a, b, ids), *views),
            differentiate(lambda a, b, ids=ids: loss(a, b, ids), *views),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_memory_is_linear(monkeypatch):
    n, d, tile = 512, 32, 64
    monkeypatch.setattr(blocked, "tile_size", lambda rows, device: tile)
    z1, z2 = (z.requires_grad_() for z in pair(n, d, torch.float32))
    loss = MatryoshkaLoss(FusedAlphaCLLoss("alpha_direct", backend="blocked"), (32, 16, 8, 4))
    with saved_bytes() as saved, Largest() as largest:
        loss(z1, z2).backward()
    rows_bytes = 2 * n * d * 4
    # the gradients of four cuts, 32 + 16 + 8 + 4 features wide
    assert 0 < sum(saved.values()) <= 2 * rows_bytes
    assert largest.bytes <= max(tile * tile * 4, 2 * rows_bytes)
    assert largest.bytes < (2 * n) ** 2 * 4 / 16


def gradients_of_rank(group):
    """[loss, dz1, dz2] of this process's pairs, and of the whole batch in one process."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    views = pair(12, 16)
    mine = slice(5) if rank == 0 else slice(5, 12)
    over_ranks = MatryoshkaLoss(FusedAlphaCLLoss(process_group=group), DIMS, WEIGHTS)
    ours = differentiate(over_ranks, *(z[mine] for z in views))
    whole = differentiate(MatryoshkaLoss(FusedAlphaCLLoss(), DIMS, WEIGHTS), *views)
    return [ours[0], *(g / world for g in ours[1:])], [whole[0], *(g[mine] for g in whole[1:])]


def test_process_group(ranks):
    for ours, whole in ranks.run(2, gradients_of_rank):
        for mine, theirs in zip(ours, whole, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_sentence_transformers():
    """The class of this name there, with the same weights: value and gradient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = pytest.importorskip("sentence_transformers.losses")

    class Model(torch.nn.Module):
        def forward(self, features):
            return {"sentence_embedding": features["x"]}

        def get_embedding_dimension(self):
            return 16

    from alphacl_fast.compat.sentence_transformers import MultipleNegativesRankingLoss

    model = Model()
    theirs = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), DIMS, WEIGHTS)
    inner = MultipleNegativesRankingLoss()
    ours = MatryoshkaLoss(lambda *z: inner.compute_loss_from_embeddings(z), DIMS, WEIGHTS)
    columns = [*pair(17, 16), pair(17, 16, seed=1)[1]]
    found = differentiate(ours, *columns)
    expected = differentiate(lambda *z: theirs([{"x": x} for x in z], None), *columns)
    for mine, other in zip(found, expected, strict=True):
        assert relative_error(mine, other) < 1e-11


def test_bad_arguments():
    inner = FusedAlphaCLLoss()
    for dims, message in (
        ([], "dims must have at least one width, got none"),
        ([4, 0], r"dims must be positive integers, got 0 in \[4, 0\]"),
        ([4, -2], "dims must be positive integers, got -2"),
        ([4, 2.0], r"dims must be positive integers, got 2\.0"),
        ([True], "dims must be positive integers, got True"),
        ([4, 2, 4], r"dims must be distinct, got \[4, 2, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            MatryoshkaLoss(inner, dims)
    for weights, message in (
        ([1.0], r"weights must have one number for each of 2 dims, got \[1\.0\]"),
        ([1.0, math.nan], "weights must be finite numbers, got nan"),
        ([math.inf, 1.0], "weights must be finite numbers, got inf"),
        ([1.0, "2"], "weights must be finite numbers, got '2'"),
    ):
        with pytest.raises(ValueError, match=message):
            MatryoshkaLoss(inner, [4, 2], weights)
    for arguments, message in (
        ((inner, 64), "dims must be a sequence of numbers, got 64"),
        ((inner, [4, 2], 1.0), r"weights must be a sequence of numbers, got 1\.0"),
        (("infonce", [4]), "loss must be a module or a function, got str"),
    ):
        with pytest.raises(TypeError, match=message):
            MatryoshkaLoss(*arguments)
    loss, (z1, z2) = MatryoshkaLoss(inner, [4, 16]), pair(6, 16)
    for arguments, message in (
        ((z1[:, :8], z2[:, :8]), r"must have at least max\(dims\) = 16 features, got 8"),
        ((z1, z2[:, :8]), r"must have the same number of features, got \[16, 8\]"),
        ((torch.arange(6),), r"floating-point embeddings of shape \(n, D\) among them, got none"),
        ((z1, z2[:3]), r"z2 must have the shape of z1 \(6, 4\), got \(3, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(*arguments)
