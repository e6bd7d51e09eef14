"""The min player made visible: α of every member, its statistics, its memory, and what is
refused.
"""

import math

import pytest
import torch
from family import (
    BACKENDS,
    MEMBERS,
    MODES,
    SIMILARITIES,
    gaussian_weight,
    member_id,
    pair,
    relative_error,
)

from alphacl_fast import FusedAlphaCLLoss, MinPlayer, PairWeight, alpha, alpha_summary, objectives
from alphacl_fast.backend import reference
from alphacl_fast.functional import alpha_cl_loss
from alphacl_fast.pair_weights import Importances

ALL_MODES = [{"negatives": negatives, "symmetric": symmetric} for negatives, symmetric in MODES]


def excluded(n, negatives, anchors):
    """(anchors, candidates), True where a pair is no negative."""
    eye = torch.eye(n, dtype=torch.bool)
    return eye.repeat(2, 2) if negatives == "two_view" else eye.repeat(anchors // n, 1)


@pytest.mark.parametrize("member", MEMBERS, ids=member_id)
def test_alpha_equals_the_oracle(member):
    z1, z2 = pair(19, 7)
    for mode in ALL_MODES:
        for similarity in SIMILARITIES:
            settings = {**mode, "similarity": similarity, **member[1]}
            ours = alpha(z1, z2, member[0], **settings)
            theirs = alpha(z1, z2, member[0], backend="reference", **settings)
            assert ours.shape == theirs.shape
            assert not ours.requires_grad
            assert relative_error(ours, theirs) < 1e-10, settings
            assert not ours[excluded(19, mode["negatives"], len(ours))].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["infonce", "triplet", "alpha_direct", "alpha_square", "uniform"])
def test_every_backend(name, backend):
    z1, z2 = pair(21, 8, torch.float32)
    theirs = alpha(z1.double(), z2.double(), name, temperature=0.3, backend="reference")
    assert (
        relative_error(alpha(z1, z2, name, temperature=0.3, backend=backend).double(), theirs)
        < 1e-5
    )


@pytest.mark.parametrize("member", MEMBERS, ids=member_id)
@pytest.mark.parametrize("mode", ALL_MODES, ids=lambda mode: "-".join(map(str, mode.values())))
def test_alpha_gives_the_loss(member, mode):
    """L_i = Σ α Δ where α is designed, and the row's derivative otherwise: both from the loss
    itself.
    """
    objective = objectives.make(*member)
    z1, z2 = pair(9, 5)
    a = Importances(z1, z2, objective, similarity="dot", **mode)
    if mode["negatives"] == "cross_view":
        gaps = [
            z1 @ z2.t() - (z1 * z2).sum(1, keepdim=True),
            z2 @ z1.t() - (z1 * z2).sum(1, keepdim=True),
        ]
        gap = torch.cat(gaps if mode["symmetric"] else gaps[:1])
    else:
        rows = torch.cat([z1, z2])[: a.anchors]
        gap = rows @ rows.t() - (z1 * z2).sum(1, keepdim=True).repeat(len(rows) // 9, 1)
    if isinstance(objective, (PairWeight, MinPlayer, objectives.ClosedForm)):
        expected = (a.dense() * gap).sum(1)
        if mode == {"negatives": "cross_view", "symmetric": True}:
            expected = expected.view(2, -1).mean(0)
        losses = alpha_cl_loss(z1, z2, objective, similarity="dot", reduction="none", **mode)
        torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12)
    # dL/dt⁺ = −Σ α: a common change of the positives' similarity, which dot products allow through
    # z2 = z1 + …
    else:
        step = 1e-6
        there = ~excluded(9, mode["negatives"], a.anchors)
        moved = [
            reference._of_gaps(objective, (gap[there].view(a.anchors, -1) + s), a.tau, 1.0)
            for s in (step, -step)
        ]
        torch.testing.assert_close(
            (moved[0] - moved[1]) / (2 * step), a.dense().sum(1), rtol=1e-5, atol=1e-7
        )


def test_rows_of_a_normalised_alpha_sum_to_one():
    z1, z2 = pair(33, 6)
    for name in (
        "alpha_direct",
        "alpha_entropy",
        "alpha_inverse",
        "alpha_square",
        "alpha_gamma",
        "uniform",
    ):
        torch.testing.assert_close(
            alpha(z1, z2, name, temperature=0.1).sum(1), torch.ones(66).double(), rtol=1e-10, atol=0
        )


def test_square_player_satisfies_kkt():
    z1, z2 = pair(30, 6)
    a = Importances(z1, z2, "alpha_square", temperature=0.2)
    dense, d = a.dense(), a.distances(0, 60, 0, 60)
    # the derivative of Σ α d² + (τ/2) Σ α²: equal where α > 0, and nowhere smaller
    price = d + 0.2 * dense
    there = ~excluded(30, "two_view", 60)
    least = price.masked_fill(~there, math.inf).amin(1, keepdim=True)
    assert (price - least)[dense > 0].abs().max() < 1e-12
    assert 1 < (dense > 0).sum(1).double().mean() < 58  # sparse, and not by being zero


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("mode", ALL_MODES, ids=lambda mode: "-".join(map(str, mode.values())))
@pytest.mark.parametrize("name", ["infonce", "alpha_square", "triplet", "uniform"])
def test_summary_equals_the_dense_statistics(name, mode, similarity, monkeypatch):
    # ragged tiles, blocks that span both towers
    monkeypatch.setattr("alphacl_fast.pair_weights.tile_size", lambda n, device: 7)
    n, k, bins = 17, 5, 6
    z1, z2 = pair(n, 4)
    settings = {"similarity": similarity, "temperature": 0.4, **mode}
    s = alpha_summary(z1, z2, name, k=k, bins=bins, **settings)
    a = alpha(z1, z2, name, **settings)
    oracle = Importances(z1, z2, name, backend="reference", **settings)
    there = ~excluded(n, mode["negatives"], len(a))
    d = torch.full_like(a, math.inf)
    d[there] = (oracle.call.c - oracle._dense[0]).flatten()
    p = (a / a.sum(1, keepdim=True)).nan_to_num()  # rows of hinges may be all zero
    torch.testing.assert_close(s.row_sum, a.sum(1))
    torch.testing.assert_close(s.entropy, -torch.xlogy(p, p).sum(1))
    torch.testing.assert_close(
        s.effective_negatives, (1 / p.square().sum(1)).nan_to_num(posinf=0.0)
    )
    nearest, at = d.sort(1)
    torch.testing.assert_close(s.hardest_distance, nearest[:, :k])
    torch.testing.assert_close(s.hardest_alpha, a.gather(1, at)[:, :k])
    base = torch.zeros(len(a), 1, dtype=torch.int64)
    if mode["negatives"] == "cross_view":
        base[:n] = n
    assert torch.equal(s.hardest, (at + base)[:, :k])
    low, high = (
        (0.0, 2.0) if similarity == "cosine" else (d[there].min().item(), d[there].max().item())
    )
    assert (s.edges[0].item(), s.edges[-1].item()) == pytest.approx((low, high), rel=1e-12)
    place = ((d[there] - low) * (bins / (high - low))).clamp(0, bins - 1).long()
    # a distance on an edge may round to either side
    assert abs(s.pairs - torch.bincount(place, minlength=bins)).sum() <= 2
    assert s.pairs.sum() == there.sum()
    assert s.mass.sum().item() == pytest.approx(a.sum().item(), rel=1e-12)
    assert s.n_neg == there.sum(1)[0]
    assert s.scalars()["hardest_distance"] == pytest.approx(nearest[:, 0].mean().item())
    assert f"{len(a):,} anchors with {s.n_neg:,} negatives" in str(s)


def test_alignment_and_uniformity():
    z1, z2 = pair(23, 6)
    s = alpha_summary(z1, z2, "triplet", similarity="euclidean")
    x, y = (torch.nn.functional.normalize(z) for z in (z1, z2))
    assert s.alignment == pytest.approx((x - y).square().sum(1).mean().item(), rel=1e-12)
    uniform = [torch.pdist(v).square().mul(-2).exp().mean().log().item() for v in (x, y)]
    assert s.uniformity == pytest.approx(sum(uniform) / 2, rel=1e-12)


def test_uniform_and_one_hot_weights():
    z1, z2 = pair(16, 5)
    s = alpha_summary(z1, z2, "uniform")
    torch.testing.assert_close(s.effective_negatives, torch.full((32,), 30.0).double())
    torch.testing.assert_close(s.entropy, torch.full((32,), math.log(30)).double())
    s = alpha_summary(z1, z2, "alpha_entropy", temperature=1e-4)  # all weight on the nearest
    assert s.effective_negatives.max() < 1.5
    assert s.hardest_alpha[:, 0].mean() > 0.99
    nothing = alpha_summary(z1, z2, PairWeight(lambda d: d * 0))
    assert not torch.cat([nothing.row_sum, nothing.entropy, nothing.effective_negatives]).any()


def test_threads_and_the_module_see_the_same(monkeypatch):
    z1, z2 = pair(300, 8, torch.float32)
    threads = torch.get_num_threads()
    monkeypatch.setattr("alphacl_fast.pair_weights.tile_size", lambda n, device: 64)
    seen = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.append(
                alpha_summary(z1, z2, "alpha_direct", temperature=0.2, negatives="cross_view", k=3)
            )
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    loss = FusedAlphaCLLoss("alpha_direct", temperature=torch.tensor(0.2), negatives="cross_view")
    seen.append(loss.alpha_summary(z1, z2, k=3))
    for other in seen[1:]:
        torch.testing.assert_close(other.hardest_alpha, seen[0].hardest_alpha)
        assert torch.equal(other.hardest, seen[0].hardest)
        assert torch.equal(other.pairs, seen[0].pairs)
        torch.testing.assert_close(other.entropy, seen[0].entropy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows(dtype):
    z1, z2 = pair(40, 8, dtype)
    s = alpha_summary(z1, z2, "infonce", temperature=0.1)
    exact = alpha_summary(z1.double(), z2.double(), "infonce", temperature=0.1)
    assert s.row_sum.dtype == torch.float32
    assert relative_error(s.entropy.double(), exact.entropy) < 1e-5


def test_smallest_and_degenerate_batches():
    for shape in ((2, 1), (3, 1)):
        z = torch.ones(shape)
        for mode in ALL_MODES:
            s = alpha_summary(z, z, "alpha_square", k=8, **mode)
            assert s.hardest.shape[1] == s.n_neg
            assert s.row_sum.mean().item() == pytest.approx(1)
    # no range of distances
    equal = alpha_summary(torch.ones(4, 3), torch.ones(4, 3), "infonce", similarity="euclidean")
    assert equal.pairs.sum() == 8 * 6
    zero = alpha_summary(torch.zeros(4, 3), torch.randn(4, 3), "infonce")
    assert zero.entropy.isfinite().all()


def test_nan_comes_out():
    z1, z2 = pair(6, 4)
    z1[2, 0] = math.nan
    s = alpha_summary(z1, z2, "infonce", bins=5)
    assert s.row_sum.isnan().all()
    assert math.isnan(s.alignment)
    assert math.isnan(s.uniformity)
    assert s.pairs.sum() == 12 * 10
    assert s.pairs[-1] >= 2 * 10  # the row is an anchor and a negative


def test_bad_arguments():
    z1, z2 = pair(8, 4)
    with pytest.raises(
        ValueError,
        match=r"at most max_elements=100 numbers, got 16 × 16; alpha_summary needs no such",
    ):
        alpha(z1, z2, max_elements=100)
    assert alpha(z1, z2, negatives="one_view", max_elements=64).shape == (8, 8)
    for arguments, message in (
        ({"k": 0}, "k must be an integer of at least 1, got 0"),
        ({"bins": 2.5}, "bins must be an integer of at least 1, got 2.5"),
        ({"distance_range": (1.0, 1.0)}, "distance_range must be two finite numbers in order"),
        ({"objective": "nce"}, "objective must be one of"),
        ({"process_group": "world"}, "options of infonce must be one of"),
        ({"similarity": "manhattan"}, "similarity must be one of"),
        ({"temperature": -1.0}, "temperature must be finite and > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            alpha_summary(z1, z2, **arguments)
    with pytest.raises(ValueError, match="z2 must have the shape of z1"):
        alpha(z1, z2[:4])
    with pytest.raises(TypeError, match="z1 must be a tensor"):
        alpha([1.0], z2)
    with pytest.raises(ValueError, match="distances of this batch are not finite"):
        alpha_summary(z1 * math.inf, z2, PairWeight(gaussian_weight), similarity="dot")


def test_memory_is_linear():
    """The largest tensor that is made has no n² in it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    z1, z2 = pair(2048, 8, torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a mode sees its own thread
    try:
        with Watch():
            alpha_summary(z1, z2, "alpha_direct", k=4)
    finally:
        torch.set_num_threads(threads)
    # a tile of 512 × 512 in float32 or int64; the matrix would have 64 MiB
    assert 2**20 <= largest <= 2**22


@pytest.mark.parametrize("exponent", [1, 1.999, 2, 2.001, 4])
def test_alpha_direct_of_negative_distances(exponent):
    """Exponent 2 takes no power of d² < 0 and is a softmax; the others count it as 0."""
    z1, z2 = pair(12, 5)
    settings = {"similarity": "dot", "negatives": "one_view", "temperature": 0.7}
    distance = 1 - z1 @ z1.T
    others = ~torch.eye(12, dtype=torch.bool)
    assert (distance[others] < 0).any()
    assert (distance[others] > 0).any()
    power = distance if exponent == 2 else distance.clamp(min=0) ** (exponent / 2)
    expected = (-power / 0.7).masked_fill(~others, -math.inf).softmax(1)
    ours = alpha(z1, z2, "alpha_direct", exponent=exponent, **settings)
    torch.testing.assert_close(ours, expected)
    entropy = alpha(z1, z2, "alpha_entropy", **settings)
    assert torch.allclose(ours, entropy) == (exponent == 2)
    for backend in BACKENDS:
        values = [
            alpha_cl_loss(z1, z2, *name, backend=backend, **settings, **option)
            for name, option in (
                (("alpha_direct",), {"exponent": exponent, "detach_alpha": False}),
                (("alpha_entropy",), {"detach_alpha": False}),
            )
        ]
        assert torch.allclose(*values, rtol=1e-4) == (exponent == 2)
