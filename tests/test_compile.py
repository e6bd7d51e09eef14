"""torch.compile: the whole loss in one graph, the same numbers, any batch size, every objective."""

import pytest
import torch
from family import (
    FULL,
    MEMBERS,
    MODES,
    REPRESENTATIVE,
    in_turn,
    member_id,
    pair,
    quadratic_h,
)

from alphacl_fast import FusedAlphaCLLoss, MinPlayer, PairLoss, objectives
from alphacl_fast.functional import alpha_cl_loss

pytestmark = [
    pytest.mark.xdist_group("compile"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


def gradients(value, leaves):
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), leaves)]


def compare(loss, compiled, sizes=(12, 9, 17), dtype=torch.float64, dims=5):
    for n in sizes:
        leaves = [z.requires_grad_() for z in pair(n, dims, dtype)]
        leaves_and_tau = leaves + [
            p for p in getattr(loss, "parameters", list)() if p.requires_grad
        ]
        for a, b in zip(
            *(gradients(f(*leaves), leaves_and_tau) for f in (loss, compiled)), strict=True
        ):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("member", MEMBERS, ids=member_id)
def test_every_member_in_one_graph_at_any_batch_size(member):
    """A second size makes the graph's sizes symbols, the third must not compile again. Where they
    are symbols from the first one on (which compiles once, for members that are not
    representative) the second must not.
    """
    loss = FusedAlphaCLLoss(member[0], **member[1])
    twice = FULL or member in REPRESENTATIVE
    compiled = torch.compile(loss, fullgraph=True, backend="eager", dynamic=None if twice else True)
    compare(loss, compiled, sizes=(12, 9) if twice else (12,))
    with torch.compiler.set_stance("fail_on_recompile"):
        compare(loss, compiled, sizes=(17, 23))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("negatives", "symmetric"), MODES)
def test_modes_and_reductions(negatives, symmetric, reduction):
    """Of one of two objectives; of both under `make test-all`."""
    tau = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    turn = MODES.index((negatives, symmetric)) + ("mean", "sum", "none").index(reduction)
    setting = {"negatives": negatives, "symmetric": symmetric, "reduction": reduction}
    for name, temperature in in_turn((("infonce", tau), ("alpha_square", 0.3)), turn):
        loss = FusedAlphaCLLoss(name, temperature=temperature, **setting)
        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
        compare(loss, compiled, sizes=(12, 9))


@pytest.mark.skipif(
    " " in torch.__file__, reason="torch's inductor does not quote the path of its headers"
)
def test_inductor():
    loss = FusedAlphaCLLoss("alpha_direct", temperature=0.2)

    def step(z1, z2, w):
        return loss(z1 @ w, (z2 @ w).tanh()) + w.square().sum()

    w = torch.randn(5, 7, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for n in (10, 13):
        z1, z2 = pair(n, 5, torch.float32)
        a, b = (torch.autograd.grad(f(z1, z2, w), w)[0] for f in (step, compiled))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_sided_half_and_no_grad(dtype):
    compiled = torch.compile(FusedAlphaCLLoss(), fullgraph=True, backend="aot_eager")
    z1, z2 = pair(11, 6, dtype)
    for first, second in ((True, False), (False, True)):
        leaves = [z1.clone().requires_grad_(first), z2.clone().requires_grad_(second)]
        wanted = [z for z in leaves if z.requires_grad]
        a, b = (torch.autograd.grad(f(*leaves), wanted)[0] for f in (FusedAlphaCLLoss(), compiled))
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert compiled(z1, z2) == FusedAlphaCLLoss()(z1, z2)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(z1, z2) == FusedAlphaCLLoss()(z1, z2)


def test_functional_and_custom_objectives():
    custom = PairLoss(phi=torch.log1p, psi=lambda gap: torch.exp(2 * gap))
    for objective in (
        "infonce",
        objectives.make("infonce", {"epsilon": 0.0}),
        custom,
        MinPlayer(quadratic_h),
    ):

        def loss(z1, z2, objective=objective):
            return alpha_cl_loss(z1, z2, objective, temperature=0.4)

        torch._dynamo.reset()
        compare(loss, torch.compile(loss, fullgraph=True, dynamic=True, backend="eager"))


def test_errors_are_those_of_the_loss():
    compiled = torch.compile(FusedAlphaCLLoss(), fullgraph=True, backend="eager")
    z1, z2 = pair(6, 4)
    with pytest.raises(Exception, match="z2 must have the shape of z1"):
        compiled(z1, z2[:3])


def test_double_backward_raises():
    z1, z2 = (z.requires_grad_() for z in pair(6, 4))
    compiled = torch.compile(FusedAlphaCLLoss(), fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="first ones only"):
        torch.autograd.grad(compiled(z1, z2), z1, create_graph=True)


def test_operators_pass_opcheck():
    objective = objectives.make("alpha_direct")
    z1, z2 = pair(6, 4)
    tau, call = torch.tensor(0.3, dtype=torch.float64), ("cosine", "two_view", True)
    for reduction in ("mean", "none"):
        rest = (
            objective.key,
            *call,
            reduction,
            None,
            "blocked",
            0.3,
            "",
            None,
            [True, True, False],
        )
        torch.library.opcheck(
            torch.ops.alphacl_fast.loss.default,
            (z1, z2, tau, None, *rest),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )
    grad = torch.ones(12, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.alphacl_fast.loss_grad.default, (z1, z2, tau, None, grad, *rest)
    )
    z1.requires_grad_()
    torch.library.opcheck(
        torch.ops.alphacl_fast.loss.default, (z1, z2, tau, None, *rest[:-1], [True, False, False])
    )


def test_keys_name_objectives_and_find_users_objects_while_they_live():
    objective = objectives.make("infonce", {"epsilon": 0.5})
    assert objective.key == 'infonce {"epsilon": 0.5, "temperature_scaled": false}'
    assert repr(objectives.registered(objective.key)) == repr(objective)
    users = PairLoss(None, torch.exp)
    key = users.key
    assert objectives.registered(key) is users
    assert PairLoss(None, torch.exp).key != key
    del users
    with pytest.raises(KeyError, match="an object that lives in this process"):
        objectives.registered(key)
