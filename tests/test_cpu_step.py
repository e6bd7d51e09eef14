"""The native step of the CPU kernels: what it serves, kept tiles, equality with the two sweeps.

Every oracle table of the other files goes through it as well, wherever `native.serves` says so.
"""

import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from conftest import WATCHDOG
from family import (
    BUILT_IN,
    loss_and_grads,
    member_id,
    pair,
    relative_error,
    siglip_and_grads,
    two_sweeps,
)

from alphacl_fast import (
    FusedAlphaCLLoss,
    MinPlayer,
    PairLoss,
    SigLipLoss,
    native,
    objectives,
    program,
    siglip_loss,
)
from alphacl_fast.backend import cpu, cpu_step
from alphacl_fast.bundles import Term, Weight
from alphacl_fast.call import Need
from alphacl_fast.functional import alpha_cl_loss

if cpu.load_error():
    pytest.skip(f"no compiled CPU backend: {cpu.load_error()}", allow_module_level=True)

#: Members whose sweeps differ: constant shift, a third sweep, one sweep, α differentiated, an
#: iteration.
DIFFERENT = [
    ("infonce", {}),
    ("infonce", {"temperature_scaled": True}),
    ("triplet", {}),
    ("alpha_direct", {"detach_alpha": False}),
    ("alpha_gamma", {"detach_alpha": False}),
]
ALL = 1 << 26


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("member", BUILT_IN, ids=member_id)
def test_equals_the_two_sweeps(member, reduction, steps, monkeypatch, poisoned):
    """In float32, to rounding, with ragged blocks; the step serves what can be recorded."""
    equals_the_two_sweeps(member, "cosine", reduction, torch.float32, steps, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
@pytest.mark.parametrize("member", DIFFERENT, ids=member_id)
def test_other_similarities_equal_the_two_sweeps(
    member, similarity, dtype, steps, monkeypatch, poisoned
):
    """Of half precision as well, whose euclidean rows are centred in float32."""
    equals_the_two_sweeps(member, similarity, "mean", dtype, steps, monkeypatch)


@pytest.mark.parametrize("member", DIFFERENT, ids=member_id)
def test_running_maxima_equal_the_two_sweeps(member, steps, monkeypatch, poisoned):
    """At a temperature at which no constant shift serves (online softmax)."""
    equals_the_two_sweeps(member, "cosine", "mean", torch.float64, steps, monkeypatch, tau=1e-3)


def equals_the_two_sweeps(member, similarity, reduction, dtype, steps, monkeypatch, tau=0.3):
    z1, z2 = pair(75, 20, dtype)
    setting = {"similarity": similarity, "reduction": reduction, "backend": "cpu", "tau": tau}
    ours = loss_and_grads(z1, z2, *member, **setting)
    served = len(steps)
    assert (served > 0) == objectives.make(*member).recordable
    two_sweeps(monkeypatch)
    theirs = loss_and_grads(z1, z2, *member, **setting)
    assert len(steps) == served
    bound, floor = {torch.float64: (1e-8, 1e-4), torch.float32: (1e-4, 1e-4)}.get(
        dtype, (2e-2, 1e-2)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b, floor=floor) < bound


@pytest.mark.parametrize("negatives", ["two_view", "one_view", "cross_view"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tau", [0.3, 0.004])  # a constant shift, and online softmax
@pytest.mark.parametrize("member", DIFFERENT, ids=member_id)
def test_same_bits_for_any_workspace_and_threads(member, tau, dtype, negatives, monkeypatch):
    z1, z2 = (z.requires_grad_() for z in pair(150, 9, dtype))
    objective, results = objectives.make(*member), []
    for workspace, threads in ((0, 1), (100_000, 1), (ALL, 1), (100_000, 3), (ALL, 2)):
        monkeypatch.setattr(cpu, "_threads", lambda *args, threads=threads: threads)
        loss = alpha_cl_loss(
            z1, z2, objective, temperature=tau, negatives=negatives, workspace=workspace
        )
        results.append([loss.detach(), *torch.autograd.grad(loss, (z1, z2))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
@pytest.mark.parametrize("negatives", ["two_view", "one_view", "cross_view"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_similarities_have_the_same_bits(dtype, negatives, similarity, steps, monkeypatch):
    """For any workspace and any number of threads; a common shift changes no distance."""
    views, results = [z.requires_grad_() for z in pair(150, 9, dtype)], []
    setting = {"negatives": negatives, "similarity": similarity}
    for workspace, threads in ((0, 1), (100_000, 2), (ALL, 3)):
        monkeypatch.setattr(cpu, "_threads", lambda *args, threads=threads: threads)
        loss = alpha_cl_loss(*views, workspace=workspace, **setting)
        results.append([loss.detach(), *torch.autograd.grad(loss, views)])
    assert len(steps) == 3
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    if similarity == "euclidean" and dtype == torch.float32:
        far = alpha_cl_loss(*(z + 100 for z in views), **setting)
        assert relative_error(far.detach(), results[0][0]) < 1e-4


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sigmoid_loss(dtype, reduction, steps, monkeypatch):
    """The same bits for any number of threads, with ids as well; and the two sweeps' result."""
    views, ids = pair(150, 9, dtype), torch.arange(150) % 40
    setting = {"reduction": reduction, "backend": "cpu", "ids": ids}

    def evaluate(threads=1):
        monkeypatch.setattr(cpu, "_threads", lambda *args: threads)
        return siglip_and_grads(siglip_loss, *views, -7.0, 2.5, **setting)

    results = [evaluate(threads) for threads in (1, 2, 3)]
    assert len(steps) == (6 if reduction == "none" else 3)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    two_sweeps(monkeypatch)
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(results[0], evaluate(), strict=True):
        assert relative_error(a, b, floor=1e-4) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("member", DIFFERENT, ids=member_id)
def test_limited_pairs_are_kept_as_similarities(member, dtype, steps, monkeypatch):
    """With max_gap: the same bits whatever is kept, and the two sweeps' result."""
    z1, z2 = (z.requires_grad_() for z in pair(150, 9, dtype))
    objective, results = objectives.make(*member), []

    def evaluate(workspace):
        loss = alpha_cl_loss(z1, z2, objective, max_gap=-0.2, workspace=workspace)
        return [loss.detach(), *torch.autograd.grad(loss, (z1, z2))]

    results = [evaluate(workspace) for workspace in (0, 100_000, ALL)]
    assert len(steps) == 3
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    two_sweeps(monkeypatch)
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(results[0], evaluate(0), strict=True):
        assert relative_error(a, b, floor=1e-4) < bound


@pytest.mark.parametrize("setting", [{"ids": True}, {"max_gap": -0.1}, {"similarity": "euclidean"}])
@pytest.mark.parametrize("name", ["alpha_square", "alpha_gamma"])
def test_min_players(name, setting, steps, monkeypatch, poisoned):
    """The iteration ends where Python's does, with anchors that have few negatives or none."""
    views, options = pair(40, 6), {"detach_alpha": False, "negatives": "one_view", **setting}
    if setting.get("ids"):
        options["ids"] = torch.arange(40) // 20 * (torch.arange(40) % 3)
    temperature = torch.tensor(0.4, dtype=torch.float64)

    def evaluate():
        leaves = [x.clone().requires_grad_() for x in (*views, temperature)]
        loss = alpha_cl_loss(*leaves[:2], name, temperature=leaves[2], **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    ours = evaluate()
    assert len(steps) == 1
    two_sweeps(monkeypatch)
    for a, b in zip(ours, evaluate(), strict=True):
        assert relative_error(a, b) < 1e-9


def test_an_iteration_that_does_not_converge_ends():
    z1, z2 = pair(9, 4)
    z1[3] = torch.nan
    for name in ("alpha_square", "alpha_gamma"):
        losses = alpha_cl_loss(z1, z2, name, negatives="cross_view", reduction="none")
        assert losses.isnan().all()


def test_one_sum_of_a_repeated_sweep_is_not_added_to_the_last_one(steps):
    """With no sweep behind the repeated one, whose sums would be cleared as well."""
    z1, z2 = pair(30, 4)
    value = alpha_cl_loss(z1, z2, "alpha_square")
    assert [k.most for k in steps[-1].step.program[: steps[-1].step.instructions]].count(60) == 1
    truth = alpha_cl_loss(z1, z2, "alpha_square", backend="reference")
    assert relative_error(value, truth) < 1e-9


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_of_an_earlier_call_is_left(reduction):
    """Its memory is used again: rows that were anchors then are none now."""
    views = pair(40, 9)
    for symmetric in (True, False):
        setting = {"negatives": "cross_view", "symmetric": symmetric, "reduction": reduction}
        ours, truth = (
            loss_and_grads(*views, "infonce", backend=backend, **setting)
            for backend in ("cpu", "reference")
        )
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, b)


def test_taken_workspace(monkeypatch):
    """Threads at once: one has the workspace, the others compute their tiles again."""
    z1, z2 = (z.requires_grad_() for z in pair(300, 16, torch.float32))
    (truth,) = torch.autograd.grad(alpha_cl_loss(z1, z2, workspace=0), z1)
    found = []

    def step():
        for _ in range(10):
            found.extend(torch.autograd.grad(alpha_cl_loss(z1, z2, workspace=ALL), z1))

    threads = [threading.Thread(target=step) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    assert all(torch.equal(g, truth) for g in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_workspace_after_a_fork():
    code = """
import os, torch
from alphacl_fast.functional import alpha_cl_loss
torch.set_num_threads(1)
z = torch.randn(300, 16)
value = alpha_cl_loss(z, z + 0.1)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(alpha_cl_loss(z, z + 0.1), value) else 1)
print(os.waitpid(child, 0)[1], torch.equal(alpha_cl_loss(z, z + 0.1), value))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["0", "True"], run.stderr


def test_workspace_from_the_environment(monkeypatch):
    monkeypatch.setattr(cpu_step, "default_workspace", cpu_step.default_workspace.__wrapped__)
    assert cpu_step.default_workspace() == cpu_step.DEFAULT_WORKSPACE <= 64 << 20
    monkeypatch.setenv("ALPHACL_CPU_WORKSPACE", "0")
    assert cpu_step.default_workspace() == 0
    monkeypatch.setenv("ALPHACL_CPU_WORKSPACE", "12345")
    assert cpu_step.default_workspace() == 12345
    for wrong in ("64M", "-1", "1e6"):
        monkeypatch.setenv("ALPHACL_CPU_WORKSPACE", wrong)
        with pytest.raises(ValueError, match=f"ALPHACL_CPU_WORKSPACE must be .* got '{wrong}'"):
            cpu_step.default_workspace()


def test_what_workspace_may_be(steps):
    z1, z2 = pair(6, 3)
    for wrong, error in ((-1, ValueError), (1.5, TypeError), (True, TypeError), ("1", TypeError)):
        for call in (FusedAlphaCLLoss, lambda **o: alpha_cl_loss(z1, z2, **o)):
            with pytest.raises(error, match="workspace must be"):
                call(workspace=wrong)
    loss = FusedAlphaCLLoss(workspace=4096)
    loss(z1, z2)
    assert steps[-1].step.workspace == 4096
    assert "workspace=4096" in repr(loss)
    assert "workspace" not in repr(FusedAlphaCLLoss())


PEAK = """
import resource, torch
from alphacl_fast import FusedAlphaCLLoss
torch.set_num_threads(1)
z = [torch.randn(6000, 16).requires_grad_() for _ in range(2)]
loss = FusedAlphaCLLoss(workspace={workspace})
loss(z[0][:64], z[1][:64]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss(*z).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB on Linux only")
def test_peak_with_and_without_a_workspace():
    """O(N·D), plus the workspace and no more; half of all pairs would take 288 MB."""
    grown = {}
    for workspace in (0, 32 << 20):
        out = subprocess.run(
            [sys.executable, "-c", PEAK.format(workspace=workspace)],
            check=True, capture_output=True, text=True, timeout=WATCHDOG,
        )  # fmt: skip
        grown[workspace] = float(out.stdout)
    assert grown[0] < 30
    assert grown[32 << 20] < 30 + 32 + 2


def test_need_flags(steps):
    """No gradient work without a gradient; one view's rows alone; equal bits either way."""
    z1, z2 = pair(60, 8, torch.float32)
    both = [z.clone().requires_grad_() for z in (z1, z2)]
    truth = torch.autograd.grad(alpha_cl_loss(*both), both)
    assert steps[-1].step.hi - steps[-1].step.lo == 120
    value = alpha_cl_loss(z1, z2)
    assert not value.requires_grad
    assert [k.gradient for k in steps[-1].step.program[: steps[-1].step.instructions]] == [0, 0]
    with torch.no_grad():
        assert not alpha_cl_loss(*both).requires_grad
    for k, (low, high) in enumerate([(0, 60), (60, 120)]):
        views = [z1, z2]
        views[k] = both[k]
        (found,) = torch.autograd.grad(alpha_cl_loss(*views), both[k])
        assert (steps[-1].step.lo, steps[-1].step.hi) == (low, high)
        assert torch.equal(found, truth[k])


def test_second_derivative_raises():
    z1, z2 = (z.requires_grad_() for z in pair(6, 3))
    for reduction in ("mean", "none"):
        (g,) = torch.autograd.grad(
            alpha_cl_loss(z1, z2, reduction=reduction).sum(), z1, create_graph=True
        )
        with pytest.raises(RuntimeError, match="first ones only"):
            (g.sum() + z1.sum()).backward()


def test_prepared_once_and_checked_again(steps, monkeypatch):
    """A second call of the same shapes makes no plan; another shape, dtype or temperature does."""
    loss = FusedAlphaCLLoss(temperature=torch.nn.Parameter(torch.tensor(0.3)))
    z1, z2 = pair(9, 4, torch.float32)
    loss(z1, z2).backward()
    made = steps[-1]
    loss(z1 + 1, z2).backward()
    assert steps[-1] is made
    with torch.no_grad():
        loss.temperature.mul_(0.5)
    truth = alpha_cl_loss(z1, z2, temperature=0.15, backend="reference")
    assert relative_error(loss(z1, z2).detach(), truth) < 1e-6
    loss(z1[:7], z2[:7])
    assert steps[-1].batch.n_pairs == 7
    loss(z1.double(), z2.double())
    assert steps[-1].wide == torch.float64
    mixed = [loss(z1, z2.double()).item() for _ in range(2)]  # promoted in each call
    assert mixed == [loss(z1.double(), z2.double()).item()] * 2
    with pytest.raises(ValueError, match="z2 must have the shape of z1"):
        loss(z1, z2[:7])
    with pytest.raises(TypeError, match="z2 must have one of the dtypes"):
        loss(z1, z2.long())
    with torch.no_grad():
        loss.temperature.fill_(-1.0)
    with pytest.raises(ValueError, match="temperature must be finite and > 0"):
        loss(z1, z2)


def test_one_plan_for_every_temperature(steps):
    """A module whose temperature, or scale and bias, is learnt is prepared once."""
    z1, z2 = pair(9, 4)
    temperature = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    loss = FusedAlphaCLLoss(temperature=temperature)
    sigmoid = SigLipLoss(torch.tensor(3.0).double(), torch.tensor(-2.0).double())
    for step in range(3):
        for given in (temperature, sigmoid.scale, sigmoid.bias):
            given.data.mul_(0.02 if step else 1.0)  # from a constant shift to online softmax
            given.grad = None
        ours = loss(z1, z2)
        ours.backward()
        (slope,) = torch.autograd.grad(
            alpha_cl_loss(z1, z2, temperature=temperature, backend="reference"), temperature
        )
        assert relative_error(temperature.grad, slope) < 1e-9
        sigmoid(z1, z2).backward()
        truth = siglip_loss(z1, z2, scale=sigmoid.scale, bias=sigmoid.bias, backend="reference")
        slopes = torch.autograd.grad(truth, (sigmoid.scale, sigmoid.bias))
        for a, b in zip((sigmoid.scale.grad, sigmoid.bias.grad), slopes, strict=True):
            assert relative_error(a, b) < 1e-9
    assert len(steps) == 6
    assert len({id(plan.program) for plan in steps}) == 2
    sigmoid.bias.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="bias must be finite"):
        sigmoid(z1, z2)


def test_the_same_call_of_the_function_is_prepared_once(steps):
    z1, z2 = pair(9, 4)
    for _ in range(2):
        alpha_cl_loss(z1, z2, "alpha_direct", exponent=4.0)
    assert steps[0] is steps[1]
    with pytest.raises(TypeError, match="symmetric must be True or False, got 1"):
        alpha_cl_loss(z1, z2, "alpha_direct", exponent=4.0, symmetric=1)
    with pytest.raises(TypeError, match="exponent must be a number, got bool"):
        alpha_cl_loss(z1, z2, "alpha_direct", exponent=True)
    assert alpha_cl_loss(z1, z2, "alpha_direct", exponent=2.0) != alpha_cl_loss(
        z1, z2, "alpha_direct", exponent=4.0
    )
    assert alpha_cl_loss(z1, z2, temperature=torch.tensor(1.0)).isfinite()
    for wrong in (torch.tensor(1), torch.tensor(True), torch.tensor(1 + 0j)):
        with pytest.raises(TypeError, match="temperature must be a floating-point tensor"):
            alpha_cl_loss(z1, z2, temperature=wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kept_graph_is_differentiated_again(dtype):
    """The backward scales its own memory only where no other can follow."""
    z1, z2 = (z.requires_grad_() for z in pair(20, 6, dtype))
    loss = alpha_cl_loss(z1, z2)
    loss += 0  # its value is nothing that a backward needs
    first = torch.autograd.grad(3 * loss, (z1, z2), retain_graph=True)
    z1.grad = z2.grad = None
    loss.backward(retain_graph=True)
    z1.grad += 1  # a gradient belongs to its owner
    weights = torch.tensor([3.0, -2.0])
    several = torch.autograd.grad(
        loss, (z1, z2), weights.to(loss.dtype), is_grads_batched=True, retain_graph=True
    )
    last = torch.autograd.grad(3 * loss, (z1, z2))
    for a, b, c in zip(first, last, several, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c[0])
    assert torch.equal(z2.grad, torch.autograd.grad(alpha_cl_loss(z1, z2), z2)[0])


def test_what_hooks_have_packed_is_not_overwritten():
    """Hooks on saved tensors may keep them and read them after the backward."""
    z1, z2 = (z.requires_grad_() for z in pair(20, 6, torch.float32))
    packed = []

    def pack(x):
        packed.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = alpha_cl_loss(z1, z2)
    before = [x.clone() for x in packed]
    (3 * loss).backward()
    assert len(packed) == 1
    assert torch.equal(packed[0], before[0])
    assert torch.equal(torch.cat([z1.grad, z2.grad]), 3 * before[0])


def test_what_goes_through_the_two_sweeps(steps):
    z1, z2 = pair(6, 3)
    alpha_cl_loss(z1, z2, PairLoss(None, torch.exp))
    alpha_cl_loss(z1, z2, MinPlayer(torch.relu))
    torch.func.grad(lambda z: alpha_cl_loss(z, z2, reduction="none").sum())(z1)
    assert not steps
    bound = native.BoundCall(objectives.make("infonce"), "cosine", "two_view", True, "mean")
    assert not native.serves(replace(bound, backend="cpu"), Need(True, True, False))
    assert native.serves(replace(bound, backend="cpu", known=(0.3,)), Need(True, True, False))


def test_programs():
    """What is recorded of an objective: InfoNCE's two sweeps with a row step between."""
    infonce = program.record(objectives.make("infonce"), gradient=True, learn_tau=False)
    sums, rows, gradient = infonce.instructions
    assert sums.terms == (Term.SHIFT, Term.F)
    assert sums.weight is None
    assert rows.step.name == "exp_rows"
    assert rows.inputs == (program.POSITIVES, *sums.outputs)
    assert gradient.weight == Weight.F
    assert gradient.scalars.row_weight == rows.outputs[0]
    alone = program.record(objectives.make("triplet"), gradient=False, learn_tau=False)
    assert [type(x).__name__ for x in alone.instructions] == ["Step", "Sweep", "Step"]
    assert alone.instructions[1].weight is None
