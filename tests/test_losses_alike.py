"""What every loss of the package does alike: reductions, gradients of one side, dtypes, NaN."""

import pytest
import torch
from family import relative_error

from alphacl_fast import (
    FusedAlphaCLLoss,
    MatryoshkaLoss,
    loss_against,
    siglip_loss,
    supcon_loss,
)
from alphacl_fast.functional import REDUCTIONS, alpha_cl_loss

N = 8
IDS = torch.arange(2 * N) % 5
GUIDE = torch.linspace(-2, 1.5, 6 * N).sin().view(2, N, 3)


def supcon(a, b, **setting):
    return supcon_loss(torch.cat([a, b]), IDS, **setting)


def siglip(a, b, **setting):
    return siglip_loss(a, b, ids=IDS[:N], **setting)


def limited(a, b, **setting):
    return alpha_cl_loss(a, b, max_gap=0.2, ids=IDS[:N], **setting)


def guided(a, b, **setting):
    return alpha_cl_loss(a, b, guide=tuple(GUIDE), ids=IDS[:N], **setting)


def weighted(a, b, **setting):
    setting |= {"log_weights": torch.linspace(-1, 1, N), "max_gap": 3.0}
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return loss_against(
        a, b, torch.zeros(N, dtype=wide), ids=IDS[:N], negative_ids=IDS[N:], **setting
    )


def tempered(a, b, **setting):
    setting |= {"temperature": torch.linspace(0.5, 1.5, N), "max_gap": 3.0}
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return loss_against(
        a, b, torch.zeros(N, dtype=wide), ids=IDS[:N], negative_ids=IDS[N:], **setting
    )


def matryoshka(a, b, **setting):
    return MatryoshkaLoss(FusedAlphaCLLoss(max_gap=0.2, **setting), (6, 3))(a, b, ids=IDS[:N])


LOSSES = [supcon, siglip, limited, guided, weighted, tempered, matryoshka]
VIEWS = torch.randn(2, N, 6, generator=torch.Generator().manual_seed(0))


def evaluate(loss, dtype, sides=(True, True), **setting):
    """The losses, and the gradients of a weighted sum; None for a side that needs none."""
    leaves = [x.to(dtype, copy=True).requires_grad_(s) for x, s in zip(VIEWS, sides, strict=True)]
    found = loss(*leaves, **setting)
    weights = torch.linspace(-0.5, 1.5, found.numel(), dtype=found.dtype).view(found.shape)
    (found * weights).sum().backward()
    return found.detach(), *(x.grad for x in leaves)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_one_side(loss):
    """They are those of both sides, with every reduction."""
    for reduction in REDUCTIONS:
        value, first, second = evaluate(loss, torch.float64, reduction=reduction)
        for sides, wanted in (((True, False), first), ((False, True), second)):
            alone, *found = evaluate(loss, torch.float64, sides, reduction=reduction)
            torch.testing.assert_close(alone, value)
            one, other = found if sides[0] else found[::-1]
            torch.testing.assert_close(one, wanted)
            assert other is None


@pytest.mark.parametrize("loss", LOSSES)
def test_reductions(loss):
    """A sum is that of the losses, and a mean is a part of it."""
    each, total, mean = (
        evaluate(loss, torch.float64, reduction=reduction)[0]
        for reduction in ("none", "sum", "mean")
    )
    torch.testing.assert_close(each.sum(), total)
    torch.testing.assert_close(mean * len(each), total)  # every anchor has a positive


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(loss, dtype):
    bound = 1e-5 if dtype == torch.float32 else 6 * torch.finfo(dtype).eps
    for reduction in REDUCTIONS:
        truth = evaluate(loss, torch.float64, reduction=reduction)
        ours = evaluate(loss, dtype, reduction=reduction)
        assert ours[0].dtype == torch.float32
        assert all(x.dtype == dtype for x in ours[1:])
        for a, b in zip(ours, truth, strict=True):
            assert relative_error(a, b, floor=1e-3) < bound, reduction


@pytest.mark.parametrize("loss", LOSSES)
def test_a_nan_is_not_lost(loss):
    first = VIEWS[0].clone()
    first[2, 1] = torch.nan
    assert loss(first, VIEWS[1]).isnan()
