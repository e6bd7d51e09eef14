"""One pair, or one row, has nothing to be compared with: every loss is 0, with a graph and zero
gradients; no row at all is refused.
"""

import pytest
import torch
import torch.distributed as dist
from family import pair

from alphacl_fast import (
    FusedAlphaCLLoss,
    MatryoshkaLoss,
    SupConLoss,
    alignment,
    loss_against,
    objectives,
    siglip_loss,
    supcon_loss,
    uniformity,
    zoo,
)
from alphacl_fast.compat import lightly, open_clip, pytorch_metric_learning, sentence_transformers
from alphacl_fast.functional import NEGATIVES, REDUCTIONS, alpha_cl_loss

OF_ROWS = ("multi_similarity", "circle", "tuplet_margin")


def index(z):
    return torch.arange(len(z))


#: Name → the loss of two views (N, D).
LOSSES = {
    **{
        f"alpha_cl_loss({name}, {negatives})": (
            lambda x, y, name=name, negatives=negatives: alpha_cl_loss(
                x, y, name, negatives=negatives
            )
        )
        for name in objectives.names()
        for negatives in NEGATIVES
    },
    "alpha_cl_loss(ids)": lambda x, y: alpha_cl_loss(x, y, ids=index(x)),
    "FusedAlphaCLLoss": lambda x, y: FusedAlphaCLLoss(similarity="euclidean")(x, y),
    "MatryoshkaLoss": lambda x, y: MatryoshkaLoss(FusedAlphaCLLoss(), (2, 4))(x, y),
    "loss_against": lambda x, y: loss_against(x, None, (x * y).sum(1)),
    "loss_against(closed)": lambda x, y: loss_against(x, None, (x * y).sum(1), "uniform"),
    **{
        f"supcon_loss({form})": lambda x, y, form=form: supcon_loss(x, index(x), form=form)
        for form in ("out", "in", "sincere")
    },
    "SupConLoss": lambda x, y: SupConLoss()(x, index(x)),
    "uniformity": uniformity,
    **{
        f"zoo.{name}": getattr(zoo, name)
        for name in zoo.__all__
        if name[0].islower() and name not in OF_ROWS
    },
    **{f"zoo.{name}": lambda x, y, name=name: getattr(zoo, name)(x, index(x)) for name in OF_ROWS},
    "zoo.SogCLR": lambda x, y: zoo.SogCLR(3)(x, y, index(x)),
    "zoo.ISogCLR": lambda x, y: zoo.ISogCLR(3)(x, y, index(x)),
    "lightly": lightly.NTXentLoss(),
    "open_clip": lambda x, y: open_clip.ClipLoss()(x, y, 10.0),
    "pytorch_metric_learning": lambda x, y: pytorch_metric_learning.NTXentLoss()(
        torch.cat([x, y]), index(x).repeat(2)
    ),
    "sentence_transformers": lambda x, y: (
        sentence_transformers.MultipleNegativesRankingLoss().compute_loss_from_embeddings([x, y])
    ),
}


#: Adapters whose packages return the dtype of the embeddings.
ROUNDED = ("lightly", "open_clip", "pytorch_metric_learning")
#: The narrowest dtype of all other losses.
WIDE = torch.float32


@pytest.mark.parametrize("name", LOSSES)
def test_one_pair_has_loss_0_and_gradient_0(name):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        leaves = [z.requires_grad_() for z in pair(1, 4, dtype)]
        loss = LOSSES[name](*leaves)
        assert loss.shape == ()
        assert loss.dtype == (dtype if name in ROUNDED else torch.promote_types(dtype, WIDE))
        assert loss == 0
        for gradient in torch.autograd.grad(loss, leaves, allow_unused=True):
            assert gradient is None or (gradient == 0).all()
        assert loss.requires_grad
    broken = leaves[0].detach().clone()
    broken[0, 1] = torch.nan
    assert LOSSES[name](broken, leaves[1]).isnan()


@pytest.mark.parametrize("name", LOSSES)
def test_no_pair_is_refused(name):
    empty = torch.zeros(0, 4)
    if name == "pytorch_metric_learning":  # the package says 0
        assert LOSSES[name](empty, empty) == 0
        return
    with pytest.raises(ValueError, match=r"at least 1 (row|pair)"):
        LOSSES[name](empty, empty)


def test_row_losses_have_their_shape():
    z1, z2 = pair(1, 4)
    for mode, symmetric, anchors in (
        ("two_view", True, 2),
        ("one_view", True, 1),
        ("cross_view", True, 1),
        ("cross_view", False, 1),
    ):
        loss = alpha_cl_loss(z1, z2, negatives=mode, symmetric=symmetric, reduction="none")
        assert loss.shape == (anchors,)
    for name in ("dcl", "hcl"):
        assert getattr(zoo, name)(z1, z2, reduction="none").shape == (2,)
    assert zoo.dhel(z1, z2, reduction="none").shape == (1,)
    assert supcon_loss(z1, index(z1), reduction="none").shape == (1,)


def test_temperature_has_gradient_0():
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    alpha_cl_loss(*pair(1, 4), temperature=tau).backward()
    assert tau.grad == 0


def test_what_compares_a_pair_with_itself():
    """The positive's term of SigLIP, and the distance of the pair."""
    x, y = (torch.nn.functional.normalize(z, dim=1) for z in pair(1, 4))
    positive = -torch.nn.functional.logsigmoid(10 * (x * y).sum() - 10)
    torch.testing.assert_close(siglip_loss(x, y), positive)
    torch.testing.assert_close(alignment(x, y), (x - y).square().sum())


def one_pair_in_all(group, reduction):
    """Loss and gradient of a rank, of which only the second has a pair."""
    leaves = [z[: dist.get_rank(group) == 1].clone().requires_grad_() for z in pair(1, 4)]
    loss = alpha_cl_loss(*leaves, reduction=reduction, process_group=group)
    gradients = torch.autograd.grad(loss.sum(), leaves)
    return loss.tolist(), [float(g.abs().sum()) for g in gradients]


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_pair_on_all_ranks(ranks, reduction):
    (first, _), (second, gradient) = ranks.run(2, one_pair_in_all, reduction=reduction)
    assert first == ([] if reduction == "none" else 0)
    assert second == ([0, 0] if reduction == "none" else 0)
    assert gradient == [0, 0]
