"""`FusedAlphaCLLoss` as users meet it: arguments, errors, autograd citizenship."""

import copy
import pickle
import re

import pytest
import torch
from family import (
    BACKENDS,
    MEMBERS,
    loss_and_grads,
    member_id,
    pair,
    relative_error,
    smooth_hinge,
)
from ranks import forked

from alphacl_fast import (
    FusedAlphaCLLoss,
    MinPlayer,
    PairLoss,
    PairWeight,
    loss_against,
    objectives,
    ops,
    supcon_loss,
)
from alphacl_fast.bundles import PairFunction, Pairing, Rows, RowScalars, Term, Weight
from alphacl_fast.functional import alpha_cl_loss


def test_default_is_simclr():
    z1, z2 = pair(16, 8, torch.float32)
    f = torch.nn.functional.normalize(torch.cat([z1, z2]), dim=1)
    logits = (f @ f.t() / 0.5).fill_diagonal_(float("-inf"))
    truth = torch.nn.functional.cross_entropy(logits, torch.arange(32).roll(16))
    torch.testing.assert_close(FusedAlphaCLLoss()(z1, z2), truth)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("negatives", "anchors"), [("two_view", 12), ("one_view", 6), ("cross_view", 6)]
)
def test_shapes(reduction, negatives, anchors):
    for name in ("infonce", "uniform", "triplet"):
        for backend in ("auto", "reference"):
            loss = FusedAlphaCLLoss(
                name, reduction=reduction, negatives=negatives, backend=backend
            )(*pair(6, 3))
            assert loss.shape == ((anchors,) if reduction == "none" else ())


TAU = torch.tensor(0.5)
BAD_ARGUMENTS = [
    ({"objective": "infonse"}, ValueError, "objective must be one of infonce, .*got 'infonse'"),
    ({"objective": 3}, TypeError, "objective must be a name or an Objective, got int"),
    (
        {"objective": "infonce", "margin": 1.0},
        ValueError,
        "options of infonce must be one of epsilon.*got margin",
    ),
    ({"objective": "uniform", "alpha_eps": 1.0}, ValueError, "options of uniform must be none"),
    (
        {"objective": objectives.infonce(), "epsilon": 0.0},
        TypeError,
        "options must be given to the objective",
    ),
    ({"epsilon": -1.0}, ValueError, "epsilon must be a finite number ≥ 0, got -1"),
    ({"epsilon": "1"}, TypeError, "epsilon must be a number, got str"),
    (
        {"objective": "alpha_gamma", "gamma": 1.0},
        ValueError,
        "gamma must be a finite number > 1, got 1",
    ),
    (
        {"objective": "alpha_direct", "exponent": 0},
        ValueError,
        "exponent must be a finite number > 0, got 0",
    ),
    (
        {"objective": "alpha_direct", "normalized": 1},
        TypeError,
        "normalized must be True or False, got 1",
    ),
    (
        {"objective": "alpha_direct", "normalized": False, "alpha_eps": 0.1},
        ValueError,
        "alpha_eps must be 0",
    ),
    (
        {"objective": "triplet", "margin": float("nan")},
        ValueError,
        "margin must be a finite number, got nan",
    ),
    ({"temperature": 0.0}, ValueError, "temperature must be finite and > 0, got 0.0"),
    ({"temperature": -1}, ValueError, "temperature must be finite and > 0, got -1"),
    ({"temperature": float("nan")}, ValueError, "temperature must be finite and > 0, got nan"),
    ({"temperature": float("inf")}, ValueError, "temperature must be finite and > 0, got inf"),
    (
        {"temperature": torch.tensor(float("nan"))},
        ValueError,
        "temperature must be finite and > 0, got nan",
    ),
    ({"temperature": 1e-46}, ValueError, "temperature must be between 1e-15 and 1e15, got 1e-46"),
    ({"temperature": 10**400}, ValueError, "temperature must be between 1e-15 and 1e15"),
    ({"temperature": "0.5"}, TypeError, "temperature must be a float or a tensor, got str"),
    (
        {"temperature": torch.ones(2)},
        ValueError,
        r"temperature must have one element, got shape \(2,\)",
    ),
    (
        {"temperature": torch.tensor(1)},
        TypeError,
        "temperature must be a floating-point tensor, got torch.int64",
    ),
    ({"similarity": "cos"}, ValueError, "similarity must be one of 'cosine', .*got 'cos'"),
    ({"negatives": "both"}, ValueError, "negatives must be one of 'two_view', .*got 'both'"),
    ({"reduction": "avg"}, ValueError, "reduction must be one of 'mean', .*got 'avg'"),
    ({"backend": "cudnn"}, ValueError, "backend must be one of 'auto', .*got 'cudnn'"),
    ({"precision": "fp8"}, ValueError, "precision must be one of None, .*got 'fp8'"),
    ({"symmetric": 1}, TypeError, "symmetric must be True or False, got 1"),
    ({"process_group": object()}, TypeError, "process_group must be None, 'world', a"),
    ({"strategy": "ring"}, ValueError, "strategy must be 'auto' without"),
    ({"process_group": "world", "strategy": "star"}, ValueError, "strategy must be one of"),
    (
        {"process_group": "world", "backend": "reference"},
        ValueError,
        "backend must not be 'reference'",
    ),
    (
        {"temperature": TAU, "temperature_range": (1.0, 0.5)},
        ValueError,
        "temperature_range must satisfy 0 < low ≤ high",
    ),
    (
        {"temperature": TAU, "temperature_range": 1.0},
        TypeError,
        "temperature_range must be None or two numbers",
    ),
    (
        {"temperature_range": (0.1, 1.0)},
        ValueError,
        "temperature_range must be None with a fixed temperature",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    BAD_ARGUMENTS,
    ids=lambda x: re.sub(r" at 0x\w+", "", str(x))[:40],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        FusedAlphaCLLoss(**arguments)
    if "temperature_range" not in arguments:
        with pytest.raises(error, match=message):
            alpha_cl_loss(*pair(4, 3), **arguments)


Z = torch.zeros(4, 3)
PARAMETER = torch.ones((), requires_grad=True)
BAD_EMBEDDINGS = [
    ((Z, Z[:3]), ValueError, r"z2 must have the shape of z1 \(4, 3\), got \(3, 3\)"),
    ((Z, Z[:, :2]), ValueError, r"z2 must have the shape of z1 \(4, 3\), got \(4, 2\)"),
    ((Z[:0], Z[:0]), ValueError, r"at least 1 row, got shape \(0, 3\)"),
    ((Z[:, :0], Z[:, :0]), ValueError, r"at least 1 column, got shape \(4, 0\)"),
    ((Z[0], Z[0]), ValueError, r"z1 must have shape \(N, D\), got \(3,\)"),
    ((Z, Z[None]), ValueError, r"z2 must have shape \(N, D\), got \(1, 4, 3\)"),
    ((Z, Z.int()), TypeError, "z2 must have one of the dtypes float32.*got int32"),
    ((Z.int(), Z.int()), TypeError, "z1 must have one of the dtypes float32.*got int32"),
    ((Z.to(torch.complex64), Z), TypeError, "z1 must have one of the dtypes.*got complex64"),
    ((Z, Z.to("meta")), ValueError, r"z2 must be on the device of z1 \(cpu\), got meta"),
    ((Z.tolist(), Z), TypeError, "z1 must be a tensor, got list"),
    ((Z.to_sparse(), Z), TypeError, "z1 must be a dense"),
]


@pytest.mark.parametrize(
    ("embeddings", "error", "message"), BAD_EMBEDDINGS, ids=lambda x: str(x)[-30:]
)
def test_bad_embeddings(embeddings, error, message):
    with pytest.raises(error, match=message):
        FusedAlphaCLLoss()(*embeddings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PairLoss(None, 3), "psi must be a function of one tensor, got int"),
        (
            lambda: PairLoss(None, lambda x: x.sum()),
            r"psi must map a tensor elementwise to \(2, 3\).*got \(\)",
        ),
        (
            lambda: PairLoss(lambda x: 1.0, torch.exp),
            "phi must map a tensor elementwise.*got float",
        ),
        (
            lambda: PairWeight(lambda d: d > 0),
            "weight must map a tensor elementwise.*got .*torch.bool",
        ),
        (lambda: PairWeight(lambda d: d * PARAMETER), "closes over a tensor"),
        (lambda: PairLoss(None, lambda x: x - x.mean()), "psi must be elementwise"),
        (lambda: PairLoss(torch.log, lambda x: x.softmax(-1)), "psi must be elementwise"),
        (lambda: PairLoss(None, lambda x: x.relu_()), "psi must be a differentiable function"),
        (
            lambda: MinPlayer(lambda x: torch.sigmoid(x) / 2),
            "h must pass 1 somewhere, got smaller values only",
        ),
    ],
)
def test_bad_custom_functions(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_temperature_without_gradient_is_refused():
    tau = torch.nn.Parameter(torch.tensor(0.5))
    with pytest.raises(ValueError, match="a detached α does not pass a gradient"):
        FusedAlphaCLLoss("alpha_direct", temperature=tau)
    with pytest.raises(ValueError, match="must not require grad with triplet"):
        FusedAlphaCLLoss("triplet", temperature=tau)
    FusedAlphaCLLoss("alpha_direct", temperature=tau, detach_alpha=False)


def test_learnable_temperature_and_clamping():
    loss = FusedAlphaCLLoss(
        temperature=torch.nn.Parameter(torch.tensor(0.5)), temperature_range=(0.01, 1.0)
    )
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    z1, z2 = pair(32, 8, torch.float32, noise=0.1)
    optimizer = torch.optim.SGD(loss.parameters(), lr=50.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss(z1, z2).backward()
        assert loss.temperature.grad.abs() > 0
        optimizer.step()
    assert loss.temperature.item() < 0.01
    value = loss(z1, z2)
    assert loss.temperature.item() == pytest.approx(0.01)
    torch.testing.assert_close(value.detach(), alpha_cl_loss(z1, z2, temperature=0.01))


def test_temperature_that_went_wrong_is_reported():
    loss = FusedAlphaCLLoss(temperature=torch.nn.Parameter(torch.tensor(0.5)))
    loss.temperature.data.fill_(-0.1)
    with pytest.raises(ValueError, match="temperature must be finite and > 0"):
        loss(*pair(4, 3, torch.float32))


def test_tensor_temperature_is_a_buffer():
    loss = FusedAlphaCLLoss(temperature=torch.tensor([0.2]))
    assert list(loss.state_dict()) == ["temperature"]
    z1, z2 = pair(8, 4)
    torch.testing.assert_close(
        loss(z1, z2), alpha_cl_loss(z1, z2, temperature=0.2), rtol=1e-6, atol=0
    )
    loss.load_state_dict({"temperature": torch.tensor([0.4])})
    torch.testing.assert_close(
        loss(z1, z2), alpha_cl_loss(z1, z2, temperature=0.4), rtol=1e-6, atol=0
    )


def test_parameter_that_becomes_trainable_later():
    """A closed-over parameter gets no gradient.

    That must not go unnoticed when it is unfrozen after construction.
    """
    scale = torch.ones((), requires_grad=False)
    loss = FusedAlphaCLLoss(PairLoss(None, lambda x: (scale * x).exp()))
    loss(*pair(4, 3))
    scale.requires_grad_()
    with pytest.raises(ValueError, match="closes over a tensor"):
        loss(*pair(4, 3))


def test_temperature_must_be_a_leaf():
    parameter = torch.zeros((), requires_grad=True)
    with pytest.raises(ValueError, match="temperature must be a leaf"):
        FusedAlphaCLLoss(temperature=parameter.exp())
    z1, z2 = pair(6, 3)
    (grad,) = torch.autograd.grad(alpha_cl_loss(z1, z2, temperature=parameter.exp()), parameter)
    assert grad.abs() > 0


def test_temperature_set_later_is_checked():
    loss = FusedAlphaCLLoss()
    loss.temperature = 0.0
    with pytest.raises(ValueError, match="temperature must be finite and > 0"):
        loss(*pair(4, 3))


def test_gamma_that_leaves_the_range_of_the_dtype():
    z1, z2 = pair(100, 8, torch.float32)
    with pytest.raises(
        ValueError, match=r"gamma must be at most 8.39 with 198 negatives in float32.*got 17"
    ):
        alpha_cl_loss(z1, z2, "alpha_gamma", gamma=17.0)
    assert torch.isfinite(alpha_cl_loss(z1.double(), z2.double(), "alpha_gamma", gamma=17.0))


@pytest.mark.parametrize(
    "name", ["uniform", "triplet_contrastive", "infonce", "alpha_direct", "triplet"]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_compile_gives_the_same_numbers(name, reduction):
    loss = FusedAlphaCLLoss(name, reduction=reduction)
    z1, z2 = (z.requires_grad_() for z in pair(12, 5))
    results = []
    for function in (loss, torch.compile(loss, backend="eager")):
        value = function(z1, z2)
        results.append([value.detach(), *torch.autograd.grad(value.square().sum(), [z1, z2])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_negation_that_was_put_off(backend):
    """``conj().imag`` has the memory of its opposite; a column of it needs no other copy."""
    z1, z2 = pair(8, 1)
    opposite = torch.complex(z1, -z1).conj().imag
    assert opposite.is_neg()
    loss = FusedAlphaCLLoss(similarity="dot", backend=backend)
    for _ in range(2):  # the second call would find a plan
        assert loss(opposite, z2) == loss(z1, z2)
        assert loss(z2, opposite) == loss(z2, z1)


@pytest.mark.skipif(
    not hasattr(torch._C, "_get_fp32_precision_getter"), reason="a setting of torch from 2.9 on"
)
def test_new_precision_settings():
    (found,) = forked(1, _with_new_settings)  # torch mixes no new setting with the older ones
    assert found[0] == found[1]


def _with_new_settings():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    z = torch.eye(4)
    return [FusedAlphaCLLoss(precision=p)(z, z).item() for p in (None, "ieee")]


def test_repr_names_backend_and_reason():
    assert "no backend can serve this call" in repr(FusedAlphaCLLoss(precision="tf32"))
    loss = FusedAlphaCLLoss("alpha_direct", negatives="cross_view")
    best = "blocked" if ops.backends()["cpu"] else "cpu"
    assert f"on a CPU: {best}" in repr(loss)
    loss(*pair(4, 3, torch.bfloat16))
    text = repr(loss)
    assert "alpha_direct(exponent=4.0, normalized=True" in text
    assert f"last call: {best}, first that serves bfloat16 on cpu" in text
    assert "symmetric=True" in text
    assert "reference, as asked" in repr(FusedAlphaCLLoss(backend="reference"))


def test_which_backend_a_gpu_takes_first(monkeypatch):
    """CUDA where wgmma kernels serve the call, Triton elsewhere; never one that cannot serve it."""
    gpu, usable = torch.device("cuda"), {"triton", "cuda", "blocked"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, module in ops.SWEEP_BACKENDS.items():
        monkeypatch.setattr(
            module, "unsupported", lambda *call, name=name: None if name in usable else "absent"
        )

    def chosen(capability, dtype, wgmma=True, precision=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return ops.choose("auto", gpu, dtype, precision, "exp", wgmma=wgmma)[0]

    assert chosen((9, 0), torch.bfloat16) == chosen((9, 0), torch.float16) == "cuda"
    assert chosen((9, 0), torch.float32) == chosen((8, 0), torch.bfloat16) == "triton"
    assert chosen((9, 0), torch.float32, precision="tf32") == "cuda"
    assert chosen((8, 0), torch.float32, precision="tf32") == "triton"
    assert chosen((9, 0), torch.float32, precision="ieee") == "triton"
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    assert chosen((9, 0), torch.float32) == "cuda"
    assert chosen((9, 0), torch.bfloat16, wgmma=False) == "triton"
    usable.discard("cuda")
    assert chosen((9, 0), torch.bfloat16) == "triton"
    usable.discard("triton")
    assert chosen((9, 0), torch.bfloat16) == "blocked"


def test_explicit_precision_is_never_ignored():
    z1, z2 = pair(4, 3, torch.float32)
    torch.testing.assert_close(alpha_cl_loss(z1, z2, precision="ieee"), alpha_cl_loss(z1, z2))
    for backend in ("auto", "blocked", "reference"):
        with pytest.raises(ValueError, match="precision='tf32'"):
            alpha_cl_loss(z1, z2, precision="tf32", backend=backend)


@pytest.mark.parametrize("member", MEMBERS, ids=member_id)
def test_pickle_and_deepcopy(member):
    loss = FusedAlphaCLLoss(objectives.make(*member))
    z1, z2 = pair(6, 3)
    value = loss(z1, z2)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(z1, z2), value)
        assert repr(other.objective) == repr(loss.objective)


def test_custom_function_outlives_its_name():
    losses = [FusedAlphaCLLoss(PairLoss(None, lambda x, k=k: (k * x).exp())) for k in (1.0, 2.0)]
    z1, z2 = pair(6, 3)
    assert float(losses[0](z1, z2)) != float(losses[1](z1, z2))


@pytest.mark.parametrize("name", ["infonce", "alpha_direct", "uniform", "triplet", "alpha_square"])
class TestAutograd:
    def test_strides(self, name):
        z1, z2 = pair(8, 6)
        truth = loss_and_grads(z1, z2, name)
        wide = torch.zeros(6, 16, dtype=torch.float64)
        wide[:, ::2] = z1.t()
        a, b = wide[:, ::2].t().requires_grad_(), z2.t().contiguous().t().requires_grad_()
        loss = FusedAlphaCLLoss(name, temperature=0.3)(a, b)
        grads = torch.autograd.grad(loss, [a, b])
        for g, t in zip(grads, truth[1:3], strict=True):
            torch.testing.assert_close(-0.5 * g, t)
        expanded = z1[:1].expand(8, 6)
        assert torch.isfinite(FusedAlphaCLLoss(name)(expanded, z2))

    def test_scaled_gradients_accumulate(self, name):
        """GradScaler, gradient accumulation, retain_graph: the incoming gradient counts every
        time.
        """
        for backend in ("auto", "blocked"):
            z1, z2 = (z.requires_grad_() for z in pair(8, 4))
            loss = FusedAlphaCLLoss(name, backend=backend)(z1, z2)
            (loss * 3.0).backward(retain_graph=True)
            once = z1.grad.clone()
            (loss * 65536.0).backward()
            torch.testing.assert_close(z1.grad, once * (1 + 65536 / 3))

    def test_half_gradient_survives_scaling(self, name):
        z1, z2 = (z.requires_grad_() for z in pair(512, 8, torch.float16))
        loss = FusedAlphaCLLoss(name)(z1, z2)
        (loss * 2.0**15).backward()
        truth = loss_and_grads(z1.detach().double(), z2.detach().double(), name, tau=0.5)
        assert relative_error(z1.grad.double() / 2**15, -2 * truth[1], floor=1e-12) < 2e-3

    def test_double_backward_raises(self, name):
        z1, z2 = (z.requires_grad_() for z in pair(6, 3))
        (grad,) = torch.autograd.grad(FusedAlphaCLLoss(name)(z1, z2), z1, create_graph=True)
        with pytest.raises(RuntimeError, match=r"first ones only|does not require grad"):
            grad.sum().backward()

    def test_autocast_changes_nothing(self, name):
        z1, z2 = pair(40, 16, torch.float32)
        # the second multiplies through torch, whose products autocast rounds
        for backend in (
            "auto",
            "blocked",
        ):
            for reduction in ("mean", "none"):
                plain = loss_and_grads(z1, z2, name, backend=backend, reduction=reduction)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    inside = loss_and_grads(z1, z2, name, backend=backend, reduction=reduction)
                assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = FusedAlphaCLLoss(name, temperature=0.3, backend="reference")(z1, z2)
        assert torch.equal(
            inside, FusedAlphaCLLoss(name, temperature=0.3, backend="reference")(z1, z2)
        )

    def test_no_grad_does_no_gradient_work(self, name, monkeypatch):
        from alphacl_fast.backend import blocked

        z1, z2 = (z.requires_grad_() for z in pair(8, 4))
        truth = FusedAlphaCLLoss(name)(z1, z2)

        def refuse(*args):
            raise AssertionError("pair_grad ran")

        monkeypatch.setattr(blocked, "pair_grad", refuse)
        with torch.no_grad():
            torch.testing.assert_close(FusedAlphaCLLoss(name)(z1, z2), truth.detach())

    def test_frozen_views(self, name):
        z1, z2 = pair(6, 3)
        assert not FusedAlphaCLLoss(name)(z1, z2).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["infonce", "triplet", "alpha_direct", "alpha_square", "uniform"])
def test_functional_gradients(name, reduction):
    """torch.func.grad and vjp give what backward gives, to the last bit where one native step makes
    the loss: without a reduction, and for constant α, some of it are PyTorch operations here alone.

    A second derivative raises.
    """
    z1, z2 = pair(6, 3)

    def same(a, b):
        if reduction == "mean" and name != "uniform":
            return torch.equal(a, b)
        return relative_error(a, b) < 1e-13

    def loss(z1, z2):
        return alpha_cl_loss(z1, z2, name, reduction=reduction).square().sum()

    leaves = [z.clone().requires_grad_() for z in (z1, z2)]
    truth = torch.autograd.grad(loss(*leaves), leaves)
    pull = torch.func.vjp(loss, z1, z2)[1]
    for found in (
        torch.func.grad(loss, argnums=(0, 1))(z1, z2),
        pull(torch.ones((), dtype=z1.dtype)),
    ):
        assert all(same(a, b) for a, b in zip(found, truth, strict=True))
    assert same(torch.func.grad(loss)(z1, leaves[1]), truth[0])  # z2 requires grad outside
    with pytest.raises(RuntimeError, match="first ones only"):
        torch.func.grad(lambda z: torch.func.grad(loss)(z, z2).sum())(z1)


def test_functional_gradients_of_a_module_and_of_other_negatives():
    z1, z2 = pair(6, 3)
    module = FusedAlphaCLLoss(temperature=torch.nn.Parameter(torch.tensor(0.3)))
    module(z1, z2).backward()
    held = {"temperature": module.temperature.detach()}
    found = torch.func.grad(lambda values: torch.func.functional_call(module, values, (z1, z2)))(
        held
    )
    assert torch.equal(found["temperature"], module.temperature.grad)
    ids = torch.tensor([0, 0, 1, 1, 2, 3])
    for loss in (
        lambda z: loss_against(z, z2, (z * z2).sum(1), "alpha_direct"),
        lambda z: supcon_loss(z, ids),
        lambda z: alpha_cl_loss(z, z2, "alpha_entropy", ids=ids),
    ):
        z = z1.clone().requires_grad_()
        (truth,) = torch.autograd.grad(loss(z), z)
        assert relative_error(torch.func.grad(loss)(z1), truth) < 1e-12
        with pytest.raises(RuntimeError, match="first ones only"):
            torch.func.grad(lambda z, loss=loss: torch.func.grad(loss)(z).sum())(z1)


def test_functional_transforms_of_users_functions_raise():
    z1, z2 = pair(6, 3)
    with pytest.raises(ValueError, match="functorch transform"):
        torch.func.grad(lambda z: alpha_cl_loss(z, z2, PairLoss(phi=torch.log1p, psi=torch.exp)))(
            z1
        )


@pytest.mark.parametrize("name", ["infonce", "uniform"])
def test_functional_transforms_raise(name):
    z1, z2 = pair(6, 3)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda z: alpha_cl_loss(z, z2, name))(z1.expand(2, 6, 3))
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda z: alpha_cl_loss(z, z2, name), (z1,), (z1,))


def test_a_dtensor_is_refused():
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    DTensor = getattr(pytest.importorskip("torch.distributed.tensor"), "DTensor", None)
    if DTensor is None:
        pytest.skip("torch before 2.5 has no public DTensor")

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        z1, z2 = pair(6, 3)
        sharded = DTensor.from_local(z1, DeviceMesh("cpu", [0]))
        for views in ((sharded, z2), (z1, sharded)):
            with pytest.raises(
                TypeError, match=r"must be a plain tensor, got a DTensor \(pass z.to_local\(\)"
            ):
                FusedAlphaCLLoss()(*views)
    finally:
        dist.destroy_process_group()


def test_optimizing_it_works():
    torch.manual_seed(0)
    net = torch.nn.Linear(20, 8)
    x = torch.randn(64, 20)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    loss_fn = FusedAlphaCLLoss("alpha_direct")
    losses = []
    for _ in range(60):
        loss = loss_fn(net(x + 0.1 * torch.randn_like(x)), net(x + 0.1 * torch.randn_like(x)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05


def test_functional_equals_module():
    z1, z2 = pair(6, 3)
    custom = PairLoss(None, smooth_hinge)
    for arguments in ({"objective": "alpha_inverse", "order": 2.0}, {"objective": custom}):
        assert torch.equal(
            FusedAlphaCLLoss(**arguments)(z1, z2), alpha_cl_loss(z1, z2, **arguments)
        )


def test_operators_pass_opcheck():
    f = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
    pos, tau = torch.rand(8), torch.tensor(0.5)
    operands = *Rows(f), *Pairing(0, 4, 8), *PairFunction("exp", (), tau)
    terms = [Term.SHIFT, Term.F, Term.F_MOMENT]
    torch.library.opcheck(ops.ROW_SUMS, (*operands, *RowScalars(pos), terms, "", "blocked"))
    scalars = RowScalars(pos, pos, pos)
    torch.library.opcheck(
        ops.PAIR_GRAD, (*operands, *scalars, Weight.F, [Term.F], 0, 8, "", "blocked")
    )


def test_row_operators_pass_opcheck():
    """Those of backends that have them."""
    z1, z2 = (torch.randn(4, 3) for _ in range(2))
    backend = "triton" if ops.backends()["triton"] is None else "cpu"
    torch.library.opcheck(ops.unit_rows, (z1, z2, backend))
    f, _, inv_norm, pos = ops.unit_rows(z1, z2, backend)
    torch.library.opcheck(
        ops.finish_rows, (torch.randn(8, 3), f, None, inv_norm, torch.rand(8), backend)
    )
    if ops.has(backend, "row_step"):
        vectors, tau = [pos, torch.zeros(8), torch.rand(8) + 1], torch.tensor(0.5)
        arguments = vectors, tau, 6, 8, 8, "exp_rows", [1.0, 0.0, 0.0, 0.0], backend
        assert ops.row_step(*arguments).shape == (3, 8)
        torch.library.opcheck(ops.row_step, arguments)
