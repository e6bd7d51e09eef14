"""PyTorch's own machinery around the losses: export, schedules, checkpoints, dtypes, devices."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import WATCHDOG
from family import Largest, pair, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from alphacl_fast import (
    FusedAlphaCLLoss,
    MatryoshkaLoss,
    MinPlayer,
    PairLoss,
    PairWeight,
    SigLipLoss,
    functional,
    loss_against,
    objectives,
    siglip_loss,
    supcon_loss,
    zoo,
)
from alphacl_fast.functional import alpha_cl_loss

pytestmark = [
    pytest.mark.xdist_group("compile"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


# --- export ---------------------------------------------------------------------------------------

LOAD = """
import sys, torch
from alphacl_fast import FusedAlphaCLLoss
other = [FusedAlphaCLLoss('triplet', margin=2.0), FusedAlphaCLLoss('alpha_direct', exponent=6)]
folder = sys.argv[1]
views = torch.load(folder + '/views.pt')
for k in range(int(sys.argv[2])):
    print(repr(torch.export.load(f'{folder}/{k}.pt2').module()(*views).item()))
"""


def test_an_exported_loss_is_the_same_in_another_process(tmp_path):
    losses = [
        FusedAlphaCLLoss("infonce", epsilon=0.0),
        FusedAlphaCLLoss("alpha_gamma", gamma=1.5, temperature=torch.tensor(0.3).double()),
        FusedAlphaCLLoss(objectives.alpha_direct(exponent=3), negatives="cross_view"),
        FusedAlphaCLLoss("uniform", max_gap=0.4),
        SigLipLoss(),
    ]
    views = pair(6, 5)
    torch.save(views, tmp_path / "views.pt")
    for k, loss in enumerate(losses):
        torch.export.save(torch.export.export(loss, views, strict=k == 0), tmp_path / f"{k}.pt2")
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, str(tmp_path), str(len(losses))],
        check=True,
        capture_output=True,
        text=True,
        timeout=WATCHDOG,
    )
    expected = [loss(*views).item() for loss in losses]
    assert [float(line) for line in child.stdout.split()] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    "objective", [PairLoss(None, torch.exp), PairWeight(torch.exp), MinPlayer(torch.relu)]
)
def test_export_refuses_a_users_function(objective):
    message = rf"must have a named objective .*got {type(objective).__name__} of your own"
    for strict in (False, True):
        with pytest.raises(Exception, match=message):
            torch.export.export(FusedAlphaCLLoss(objective), pair(6, 5), strict=strict)


def test_a_key_of_another_process_is_refused():
    key = PairLoss(None, torch.exp).key
    assert key != PairLoss(None, torch.exp).key
    with pytest.raises(KeyError, match="lives in this process"):
        objectives.registered(key)  # the object is gone


# --- torch.compile --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["temperature", "scale"])
def test_a_schedule_of_floats_needs_two_graphs(what):
    """The first value is a constant of its graph, every other one is an input of the second."""
    loss = FusedAlphaCLLoss() if what == "temperature" else SigLipLoss(learnable=False)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    z1, z2 = (z.requires_grad_() for z in pair(6, 5))
    values = [0.1 + 0.02 * k for k in range(12)]
    for k, value in enumerate(values):
        setattr(loss, what, value)
        with torch.compiler.set_stance("default" if k < 2 else "fail_on_recompile"):
            found = compiled(z1, z2)
        torch.testing.assert_close(found, loss(z1, z2), rtol=1e-12, atol=0)
        gradients = (torch.autograd.grad(x, z1)[0] for x in (found, loss(z1, z2)))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def _composed_losses():
    """Losses of rows that are one operator of a graph, and the shape of what "none" gives."""
    n = 6
    ids = torch.arange(n) % 3
    bank, weights = torch.linspace(-1, 1, 40).view(8, 5).double(), torch.linspace(-1, 0, n).double()
    of_views = {
        name: partial(getattr(zoo, name))
        for name in ["dcl", "dclw", "debiased", "hcl", "dhel", "rince", "adnce", "macl"]
    }
    of_rows = {
        name: partial(lambda f, a, b, **o: f(a * b, ids, **o), getattr(zoo, name))
        for name in ["multi_similarity", "circle", "tuplet_margin"]
    }
    against = {
        "loss_against": lambda a, b, **o: loss_against(a, b, (a * b).sum(1), **o),
        "weights": lambda a, b, **o: loss_against(a, None, b[:, 0], log_weights=weights, **o),
        "bank": lambda a, b, **o: loss_against(
            a, bank, b[:, 0], "alpha_gamma", gamma=1.5, ids=ids, negative_ids=ids[:1].repeat(8), **o
        ),
        "custom": lambda a, b, **o: loss_against(a, b, a[:, 0], _CUSTOM, **o),
        "supcon_loss": lambda a, b, **o: supcon_loss(a * b, ids, form="in", **o),
        "reference": lambda a, b, **o: supcon_loss(
            a, ids, reference=b, reference_ids=ids, form="sincere", **o
        ),
        "siglip_loss": lambda a, b, **o: siglip_loss(a, b, ids=ids, **o),
        "matryoshka": lambda a, b, **o: MatryoshkaLoss(partial(loss_against, **o), (5, 3))(
            a, b, weights
        ),
    }
    return {**of_views, **of_rows, **against}


_CUSTOM = PairLoss(torch.log1p, torch.exp)
COMPOSED = list(_composed_losses())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", COMPOSED)
def test_every_public_loss_is_in_one_graph(name, reduction):
    loss = partial(_composed_losses()[name], reduction=reduction)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    z1, z2 = (z.requires_grad_() for z in pair(6, 5))
    found = [gradients(f(z1, z2), (z1, z2)) for f in (loss, compiled)]
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def gradients(value, leaves):
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), leaves)]


@pytest.mark.parametrize("name", ["FusedAlphaCLLoss", "none", "custom_none", *COMPOSED])
def test_activation_checkpoints(name):
    """Around an encoder with its loss, also in a compiled graph."""
    of_views = {
        "FusedAlphaCLLoss": FusedAlphaCLLoss(),
        "none": FusedAlphaCLLoss("alpha_square", reduction="none"),
        "custom_none": FusedAlphaCLLoss(_CUSTOM, reduction="none"),
    }
    loss = {**of_views, **_composed_losses()}[name]
    net = torch.nn.Linear(5, 5).double()

    def plain(z1, z2):
        return loss(net(z1), net(z2)).sum()

    def step(z1, z2):
        return checkpoint(plain, z1, z2, use_reentrant=False)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    truth, *found = (
        torch.autograd.grad(f(*pair(6, 5)), net.weight)[0] for f in (plain, step, compiled)
    )
    for gradient in found:
        torch.testing.assert_close(gradient, truth, rtol=1e-12, atol=1e-14)


def test_composed_losses_at_any_batch_size_and_temperature():
    """A second size and a second temperature make symbols of both; the next compile nothing."""

    def loss(z1, z2, ids, tau, sigma):
        with_one = supcon_loss(torch.cat([z1, z2]), ids, temperature=tau)
        return with_one + zoo.adnce(z1, z2, sigma=sigma) + loss_against(z1, z2, z1[:, 0])

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for k, n in enumerate((6, 7, 9, 8)):
        z1, z2 = (z.requires_grad_() for z in pair(n, 5))
        arguments = z1, z2, torch.arange(2 * n) % 3, 0.2 + k / 10, 1.0 + k / 10
        with torch.compiler.set_stance("default" if k < 2 else "fail_on_recompile"):
            found = gradients(compiled(*arguments), (z1, z2))
        for a, b in zip(found, gradients(loss(*arguments), (z1, z2)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_learnable_temperatures_and_half_precision_in_a_graph():
    tau = torch.nn.Parameter(torch.tensor(0.3))
    ids = torch.arange(6) % 3

    def loss(a, b):
        return supcon_loss(a, ids, temperature=tau) + zoo.dclw(a, b, temperature=tau)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    z1, z2 = (z.requires_grad_() for z in pair(6, 5, torch.float16))
    found = [torch.autograd.grad(f(z1, z2) * 4096, (z1, z2, tau)) for f in (loss, compiled)]
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_a_composed_loss_is_exported(tmp_path):
    class Net(torch.nn.Module):
        def forward(self, a, b):
            return zoo.adnce(a, b) + loss_against(a, b, a[:, 0], "soft_triplet", margin=0.3)

    views = pair(6, 5)
    torch.export.save(torch.export.export(Net(), views, strict=False), tmp_path / "net.pt2")
    assert torch.export.load(tmp_path / "net.pt2").module()(*views) == Net()(*views)


@pytest.mark.parametrize("kind", [zoo.SogCLR, zoo.ISogCLR])
def test_running_sums_in_one_graph(kind):
    losses = [kind(10), kind(10)]
    compiled = torch.compile(losses[1], fullgraph=True, backend="aot_eager")
    for seed in range(2):
        z1, z2 = (z.requires_grad_() for z in pair(6, 5, seed=seed))
        index = torch.arange(6) + seed
        for a, b in zip(
            *(gradients(f(z1, z2, index), (z1, z2)) for f in (losses[0], compiled)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(*(loss.state_dict() for loss in losses))


# --- dtypes and devices ---------------------------------------------------------------------------


def _losses_of_two_towers():
    ids = torch.arange(6) % 3
    return {
        "alpha_cl_loss": lambda a, b: alpha_cl_loss(a, b),
        "none": lambda a, b: alpha_cl_loss(a, b, reduction="none").sum(),
        "siglip_loss": lambda a, b: SigLipLoss()(a, b),
        "loss_against": lambda a, b: loss_against(a, b, torch.zeros(6)),
        "supcon_loss": lambda a, b: supcon_loss(a, ids, reference=b, reference_ids=ids),
    }


@pytest.mark.parametrize("name", list(_losses_of_two_towers()))
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [(torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.float16,) * 2],
)
def test_towers_of_two_dtypes(name, first, second, autocast):
    loss = _losses_of_two_towers()[name]
    z1, z2 = (
        z.to(dtype).requires_grad_() for z, dtype in zip(pair(6, 5), (first, second), strict=True)
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = loss(z1, z2)
    wide = torch.promote_types(first, second)
    leaves = [z.detach().to(wide).requires_grad_() for z in (z1, z2)]
    assert torch.equal(found, loss(*leaves))
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for z, got, right in zip((z1, z2), torch.autograd.grad(found, (z1, z2)), expected, strict=True):
        assert got.dtype == z.dtype
        assert torch.equal(got, right.to(z.dtype))


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_another_default_device_changes_nothing(device):
    views, ids = pair(8, 5), torch.arange(8) % 3
    functions = (None, torch.exp), (torch.exp,), (torch.relu,)
    made = [kind(*f) for kind, f in zip((PairLoss, PairWeight, MinPlayer), functions, strict=True)]
    settings = [
        ("infonce", 0.31),
        ("alpha_square", 0.31),
        ("uniform", 0.31),
        *((m, 0.5) for m in made),
    ]

    def values():
        losses = [alpha_cl_loss(*views, name, temperature=tau) for name, tau in settings]
        return [*losses, supcon_loss(views[0], ids), SigLipLoss(learnable=False)(*views)]

    expected = values()
    with torch.device(device):
        assert [x.item() for x in values()] == [x.item() for x in expected]
        for kind, f in zip((PairLoss, PairWeight, MinPlayer), functions, strict=True):
            assert alpha_cl_loss(*views, kind(*f)) == alpha_cl_loss(*views, kind(*f))


def _of_shapes(make, reduction):
    z1, z2 = (make(6, 5).requires_grad_() for _ in range(2))
    for objective in ("infonce", "alpha_square", "uniform", PairLoss(None, torch.exp)):
        yield alpha_cl_loss(z1, z2, objective, reduction=reduction), (z1, z2)
    yield SigLipLoss(reduction=reduction)(z1, z2), (z1, z2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tensors_without_data_have_shapes(reduction):
    """A dry run on the meta device, and one on fake tensors."""

    def checked(make):
        for loss, leaves in _of_shapes(make, reduction):
            shape = loss.shape
            assert shape in ((),) if reduction == "mean" else shape in ((12,), (6,))
            for z, dz in zip(leaves, torch.autograd.grad(loss.sum(), leaves), strict=True):
                assert (dz.shape, dz.device, dz.dtype) == (z.shape, z.device, z.dtype)
            assert loss.device == leaves[0].device

    checked(lambda *shape: torch.empty(shape, device="meta"))
    with FakeTensorMode():
        checked(lambda *shape: torch.empty(shape))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", COMPOSED)
def test_composed_losses_without_data_have_shapes(name, reduction):
    loss = partial(_composed_losses()[name], reduction=reduction)
    views = [torch.empty(6, 5, device="meta").double().requires_grad_() for _ in range(2)]
    value, expected = loss(*views), loss(*pair(6, 5))
    assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
    assert value.is_meta
    (dz,) = torch.autograd.grad(value.sum(), views[0])
    assert dz.shape == (6, 5)
    assert dz.is_meta


class _Composed(torch.nn.Module):
    def forward(self, z1, z2):
        return supcon_loss(z1, torch.arange(6) % 3) + zoo.dhel(z1, z2)


def test_jit_trace_is_refused():
    for loss in (FusedAlphaCLLoss(), FusedAlphaCLLoss("uniform"), SigLipLoss(), _Composed()):
        loss(*pair(6, 5))  # a call like it is prepared
        with pytest.raises(TypeError, match=r"torch\.jit\.trace, which sees none"):
            torch.jit.trace(loss, pair(6, 5))


# --- gradients of gradients, and many at once -----------------------------------------------------


def _weighable():
    """Losses that are one number, and whose gradient is linear in a weight."""
    return {
        "infonce": lambda a, b: alpha_cl_loss(a, b),
        "sum": lambda a, b: alpha_cl_loss(a, b, "alpha_square", reduction="sum"),
        "dot": lambda a, b: alpha_cl_loss(a, b, "alpha_direct", similarity="dot"),
        "uniform": lambda a, b: alpha_cl_loss(a, b, "uniform"),
        "custom": lambda a, b: alpha_cl_loss(a, b, _CUSTOM),
        "siglip": lambda a, b: siglip_loss(a, b),
    }


@pytest.mark.parametrize("name", list(_weighable()))
def test_derivative_of_a_gradient_in_a_loss_weight(name):
    """As in GradNorm: ∂‖∂(w²·L)/∂z‖²/∂w = 4·w³·‖∂L/∂z‖². The second derivative in z raises."""
    loss, w = _weighable()[name], torch.tensor(1.3).double().requires_grad_()
    z1, z2 = (z.requires_grad_() for z in pair(6, 5))
    (plain,) = torch.autograd.grad(loss(z1, z2), z1)
    (dz,) = torch.autograd.grad(w.square() * loss(z1, z2), z1, create_graph=True)
    (found,) = torch.autograd.grad(dz.square().sum(), w, retain_graph=True)
    torch.testing.assert_close(found, 4 * w**3 * plain.square().sum())
    for z in (z1, z2):
        with pytest.raises(RuntimeError, match="first ones only"):
            torch.autograd.grad(dz.square().sum(), z, retain_graph=True)


def test_a_weight_for_every_anchor_has_no_derivative():
    z1, z2 = (z.requires_grad_() for z in pair(6, 5))
    for loss in (
        alpha_cl_loss(z1, z2, reduction="none"),
        loss_against(z1, z2, z1[:, 0], reduction="none"),
    ):
        w = torch.ones((), requires_grad=True)
        (dz,) = torch.autograd.grad(w * loss.sum(), z1, create_graph=True)
        with pytest.raises(
            RuntimeError, match="differentiated in a weight of the loss, but only for"
        ):
            torch.autograd.grad(dz.sum(), w)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", COMPOSED)
def test_many_gradients_at_once(name, reduction):
    loss = partial(_composed_losses()[name], reduction=reduction)
    z1, z2 = (z.requires_grad_() for z in pair(6, 5))
    value = loss(z1, z2)
    incoming = torch.randn(3, *value.shape).double()
    found = torch.autograd.grad(
        value, (z1, z2), incoming, is_grads_batched=True, retain_graph=True, allow_unused=True
    )
    for k in range(3):
        one = torch.autograd.grad(
            value, (z1, z2), incoming[k], retain_graph=True, allow_unused=True
        )
        for a, b in zip(found, one, strict=True):
            torch.testing.assert_close(a[k], b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("objective", ["infonce", "alpha_square", "uniform"])
def test_jacobians(objective):
    z1, z2 = pair(6, 5)
    tau = torch.tensor(0.3).double().requires_grad_()
    tau = 0.3 if objective != "infonce" else tau

    def losses(z):
        return alpha_cl_loss(z, z2, objective, temperature=tau, reduction="none")

    found = torch.func.jacrev(losses)(z1), torch.autograd.functional.jacobian(losses, z1)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


# --- few rows of many features --------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["infonce", "alpha_square", "uniform"])
def test_few_long_rows(objective):
    """No tensor is larger than the rows: blocks padded to 48 rows would be, and so would (D, D)."""
    n, d = 2, functional.LONG_ROWS
    loss = FusedAlphaCLLoss(objective)
    z1, z2 = (z.requires_grad_() for z in pair(n, d, torch.float32))
    with Largest() as largest:
        value = loss(z1, z2)
        value.backward()
    assert largest.bytes <= 2 * n * d * 4
    leaves = [z.detach().double().requires_grad_() for z in (z1, z2)]
    truth = alpha_cl_loss(*leaves, objective, backend="reference")
    for z, dz in zip((z1, z2), torch.autograd.grad(truth, leaves), strict=True):
        assert relative_error(z.grad, dz) < 1e-5
    if objective == "infonce":
        assert "last call: blocked, fewer than 40 rows" in repr(loss)
        loss(*pair(n, d // 2, torch.float32))
        assert "last call: cpu" in repr(loss)
