"""The native step of the CPU kernels with given positives: `loss_against` on the CPU."""

import itertools

import pytest
import torch
from family import member_id, relative_error, two_sweeps

from alphacl_fast import functional, loss_against, native, objectives
from alphacl_fast.backend import cpu, cpu_step

if cpu.load_error():
    pytest.skip(f"no compiled CPU backend: {cpu.load_error()}", allow_module_level=True)

#: Members whose programs differ, and options beside.
CASES = [
    (("infonce", {}), {}),
    (("infonce", {"temperature_scaled": True}), {"log_weights": True}),
    (("soft_triplet", {}), {"ids": True, "log_weights": True}),
    (("infonce", {}), {"each": True, "ids": True}),
    (("soft_triplet", {}), {"each": True, "log_weights": True}),
    (("triplet", {}), {"ids": True}),
    (("alpha_direct", {"detach_alpha": False}), {"max_gap": 0.1}),
    (("triplet_contrastive", {}), {"max_gap": 0.1}),
    (("alpha_square", {"detach_alpha": False}), {"ids": True}),
    (("alpha_gamma", {}), {"max_gap": 0.1}),
]
ROWS = (None, 37)


def batch(m, dtype=torch.float64, seed=0, n=50, dim=9, **options):
    """Arguments of `loss_against`: n anchors against m rows, or one another."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    wide, others = torch.float64 if dtype == torch.float64 else torch.float32, n if m is None else m
    given = {
        "z": (randn(n, dim) * 0.4).to(dtype),
        "negatives": None if m is None else (randn(m, dim) * 0.4).to(dtype),
        "positive": randn(n).sigmoid().to(wide),
        "temperature": torch.tensor(0.4, dtype=wide),
    }
    if options.get("each"):
        given["temperature"] = (randn(n).sigmoid() + 0.2).to(wide)
    if options.get("ids"):
        given["ids"] = torch.arange(n) % 7
        given["negative_ids"] = None if m is None else torch.arange(m) % 5
    if options.get("log_weights"):
        given["log_weights"] = randn(others).to(wide)
    return given | {k: v for k, v in options.items() if k == "max_gap"}


def evaluate(member, given, wanted, **options):
    """Loss and gradients of the ``wanted`` arguments, where the objective has them."""
    objective = objectives.make(*member)
    names = [
        name
        for name in wanted
        if given.get(name) is not None and (name != "temperature" or objective.tau_gradient)
    ]
    leaves = {name: given[name].clone().requires_grad_() for name in names}
    loss = loss_against(objective=objective, **given | leaves, **options)
    total = loss if loss.dim() == 0 else (loss * torch.linspace(-1, 1, len(loss)).to(loss)).sum()
    return [loss.detach(), *torch.autograd.grad(total, [*leaves.values()])]


GRADIENTS = ("z", "negatives", "positive", "temperature", "log_weights")


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(
    ("member", "options"), CASES, ids=["-".join([m[0], *m[1], *options]) for m, options in CASES]
)
def test_equals_the_two_sweeps(member, options, m, steps, monkeypatch, poisoned):
    """All gradients and each alone, with every reduction; the step serves all of it."""
    given = batch(m, **options)
    one_each = [(name,) for name in GRADIENTS if given.get(name) is not None]
    if not objectives.make(*member).tau_gradient:
        one_each.remove(("temperature",))
    asked = [(GRADIENTS, r) for r in ("mean", "sum", "none")]
    asked += itertools.product(one_each, ("mean", "none"))
    ours = [evaluate(member, given, wanted, reduction=r) for wanted, r in asked]
    served = len(steps)
    assert served >= len(asked)
    two_sweeps(monkeypatch)
    theirs = [evaluate(member, given, wanted, reduction=r) for wanted, r in asked]
    assert len(steps) == served
    for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert relative_error(a, b) < 1e-10


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_equal_the_two_sweeps(dtype, m, steps, monkeypatch):
    """Log-weights get a gradient of the right size whatever the weights are divided by."""
    given = batch(m, dtype, log_weights=True)
    ours = evaluate(("infonce", {}), given, GRADIENTS)
    assert len(steps) == 1
    two_sweeps(monkeypatch)
    theirs = evaluate(("infonce", {}), given, GRADIENTS)
    exact = {k: x.double() for k, x in given.items() if x is not None} | {"negatives": None}
    exact |= {} if m is None else {"negatives": given["negatives"].double()}
    truth = evaluate(("infonce", {}), exact, GRADIENTS)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert relative_error(a, b, floor=1e-4) < bound
        assert relative_error(b, c, floor=1e-4) < bound


@pytest.mark.parametrize("m", [None, 170])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("member", [("infonce", {}), ("triplet", {})], ids=member_id)
def test_same_bits_for_any_workspace_and_threads(member, dtype, m, steps, monkeypatch):
    given = batch(m, dtype, n=150, ids=True)
    results = []
    for workspace, threads in ((0, 1), (100_000, 2), (1 << 26, 3)):
        monkeypatch.setattr(cpu, "_threads", lambda *args, threads=threads: threads)
        monkeypatch.setattr(cpu_step, "default_workspace", lambda workspace=workspace: workspace)
        functional._CALLS.clear()
        native._plan_given.cache_clear()
        results.append(evaluate(member, given, GRADIENTS))
    native._plan_given.cache_clear()
    assert [plan.step.workspace for plan in steps] == [0, 100_000, 1 << 26]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_prepared_once_and_checked_again(steps):
    """A call like one before makes no plan; its arguments are still those of the call."""
    z, y, p = torch.randn(9, 4), torch.randn(7, 4), torch.rand(9)
    tau = torch.tensor(0.3)
    for _ in range(2):
        first = loss_against(z, y, p, temperature=tau)
    assert steps[0] is steps[1]
    assert loss_against(z, y, p + 1, temperature=tau) < first
    tau.mul_(0.5)
    other = loss_against(z, y, p, temperature=tau)
    assert other != first
    assert torch.equal(loss_against(z, y, p, temperature=tau.item()), other)
    assert torch.equal(loss_against(z, y, p, temperature=tau, backend="cpu"), other)
    tau.fill_(-1.0)
    with pytest.raises(ValueError, match="temperature must be finite and > 0"):
        loss_against(z, y, p, temperature=tau)
    with pytest.raises(ValueError, match="positive must be a floating-point tensor of shape"):
        loss_against(z, y, p[:3])
    with pytest.raises(ValueError, match="negative_ids must be given exactly"):
        loss_against(z, y, p, negative_ids=torch.arange(7))
    with pytest.raises(TypeError, match="ids must be an integer tensor"):
        loss_against(z, y, p, ids=p, negative_ids=torch.arange(7))
    with pytest.raises(TypeError, match="max_gap must be None or a number"):
        loss_against(z, y, p, max_gap=True)


def test_views_of_memory_are_read_as_they_are():
    """Transposed rows, expanded positives and negations that PyTorch has put off."""
    z, y = torch.randn(6, 5).double(), torch.randn(5, 7).double()
    p = torch.complex(torch.randn(6), torch.randn(6).abs()).to(torch.complex128)
    ours = loss_against(z, y.t(), p.conj().imag, temperature=0.3)
    truth = loss_against(z, y.t().contiguous(), -p.imag.clone(), temperature=0.3)
    assert torch.equal(ours, truth)
    wide = torch.tensor([0.2]).double().expand(6)
    assert torch.equal(loss_against(z, y.t(), wide), loss_against(z, y.t(), wide.clone()))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives_that_follow(reduction):
    """A kept graph, several gradients at once, and no second derivative."""
    z, y = torch.randn(9, 4).requires_grad_(), torch.randn(7, 4)
    positive = torch.rand(9).requires_grad_()
    loss = loss_against(z, y, positive, reduction=reduction)
    one = torch.ones_like(loss)
    first = torch.autograd.grad(loss, (z, positive), one, retain_graph=True)
    several = torch.autograd.grad(
        loss, (z, positive), torch.stack([one, 2 * one]), is_grads_batched=True, retain_graph=True
    )
    last = torch.autograd.grad(loss, (z, positive), 2 * one, create_graph=True)
    for a, b, c in zip(first, several, last, strict=True):
        assert torch.equal(a, b[0])
        assert torch.equal(c, b[1])
    with pytest.raises(RuntimeError, match="first ones only"):
        last[0].sum().backward()
    if reduction == "mean":
        grad = torch.func.grad(lambda p: loss_against(z.detach(), y, p))(positive.detach())
        assert relative_error(grad, first[1]) < 1e-5
