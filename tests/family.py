"""Every member of the family that the tests loop over, and helpers to evaluate one."""

from __future__ import annotations

import contextlib
import itertools
import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alphacl_fast import MinPlayer, PairLoss, PairWeight, functional, native, objectives, ops
from alphacl_fast.functional import NEGATIVES, REDUCTIONS, SIMILARITIES, alpha_cl_loss


def log1p_and_square(xi):
    return torch.log1p(xi) + xi.square() / 100


def exp_plus_sigmoid(gap):
    return gap.exp() + gap.sigmoid()


def smooth_hinge(gap):
    return torch.nn.functional.softplus(3 * gap)


def gaussian_weight(d):
    return torch.exp(-d.square())


def student_weight(d):
    return 1 / (1 + d.square())


def quadratic_h(x):
    return torch.relu(x + 0.2).square()


BUILT_IN = [(name, {}) for name in objectives.names()] + [
    ("infonce", {"epsilon": 0.0, "temperature_scaled": True}),
    ("infonce", {"epsilon": 0.3}),
    ("triplet", {"margin": 0.1}),
    ("soft_triplet", {"margin": -0.5}),
    ("lifted_structured", {"margin": -0.2}),
    ("modified_triplet", {"scale": 5.0}),
    ("alpha_direct", {"normalized": False}),
    ("alpha_direct", {"detach_alpha": False}),
    ("alpha_direct", {"detach_alpha": False, "normalized": False}),
    ("alpha_direct", {"exponent": 2, "alpha_eps": 0.1}),
    ("alpha_direct", {"exponent": 2, "alpha_eps": 0.1, "detach_alpha": False}),
    ("alpha_direct", {"exponent": 1.5, "alpha_eps": 0.1, "detach_alpha": False}),
    ("alpha_direct", {"exponent": 3}),
    ("alpha_entropy", {"detach_alpha": False}),
    ("alpha_entropy", {"alpha_eps": 0.2}),
    ("alpha_inverse", {"detach_alpha": False, "order": 2, "exponent": 3}),
    ("alpha_inverse", {"normalized": False, "alpha_eps": 0.0}),
    ("alpha_inverse", {"exponent": 1, "alpha_eps": 0.5}),
    ("alpha_square", {"detach_alpha": False}),
    ("alpha_gamma", {"detach_alpha": False, "gamma": 1.5}),
]
CUSTOM = [
    (PairLoss(log1p_and_square, exp_plus_sigmoid), {}),
    (PairLoss(phi=None, psi=smooth_hinge), {}),
    (PairWeight(gaussian_weight), {}),
    (PairWeight(student_weight, detach_alpha=False, alpha_eps=0.1), {}),
    (PairWeight(gaussian_weight, detach_alpha=False, normalized=False), {}),
    (MinPlayer(quadratic_h), {}),
    (MinPlayer(quadratic_h, detach_alpha=False), {}),
]
MEMBERS = BUILT_IN + CUSTOM
MODES = [(negatives, True) for negatives in NEGATIVES] + [("cross_view", False)]


def member_id(member) -> str:
    objective, options = member
    return str(objectives.make(objective, options)).replace(" ", "")


#: Sweep backends that can be used here.
BACKENDS = [
    name for name, reason in ops.backends().items() if name != "reference" and reason is None
]


def served_by(backend):
    """The members that a backend serves: the built-in ones, and users' functions if it can."""
    unsupported = ops.SWEEP_BACKENDS[backend].unsupported
    here = (torch.device("cpu"), torch.float64, None)
    return BUILT_IN + [
        member for member in CUSTOM if unsupported(*here, objectives.make(*member).kind) is None
    ]


#: (backend, member) wherever the backend serves the member.
SERVED = [(backend, member) for backend in BACKENDS for member in served_by(backend)]
#: Backends whose kernels are not run but interpreted or emulated, which is slow.
SLOW = ("triton", "cuda")
#: `make test-all`: every product of settings. Without it tests take some settings in turn.
FULL = os.environ.get("ALPHACL_TEST_FULL") == "1"
#: One member for each form of a sweep: a slow backend runs these where all members would take the
#: interpreter of the Triton kernels an hour (which `make test-all` gives it).
REPRESENTATIVE = [("infonce", {}), ("triplet", {}), ("alpha_direct", {"detach_alpha": False})]


def is_due(turn, every):
    """Whether a case runs: each ``every``-th turn, and each turn under `make test-all`."""
    return FULL or turn % every == 0


def in_turn(values, turn):
    """The value whose turn it is, in a list; all values under `make test-all`."""
    return [value for k, value in enumerate(values) if is_due(turn - k, len(values))]


def members_for(backend):
    """The members that a backend is tested with; a slow one with the representative ones, and with
    all under `make test-all`.
    """
    everything = FULL or backend not in SLOW
    return [m for name, m in SERVED if name == backend and (everything or m in REPRESENTATIVE)]


def backends_for(member):
    """The backends that are tested with a member."""
    return [backend for backend in BACKENDS if member in members_for(backend)]


def sampled(members=MEMBERS):
    """The arguments of ``parametrize`` for each member and each backend that is tested with it."""
    served = [(backend, member) for member in members for backend in backends_for(member)]
    return {
        "argvalues": served,
        "ids": [f"{backend}-{member_id(member)}" for backend, member in served],
    }


def every_setting():
    """All (negatives, symmetric, similarity)."""
    return [(n, s, sim) for (n, s), sim in itertools.product(MODES, SIMILARITIES)]


def rotated(members=MEMBERS):
    """(member, negatives, symmetric, similarity, reduction): each member in each mode, with one
    similarity and one reduction, which change from one case to the next.

    Every pair of values occurs, and most defects need no more than two values to show. `make
    test-all` takes the whole product, nine times as many cases.
    """
    for (m, member), (k, mode) in itertools.product(enumerate(members), enumerate(MODES)):
        similarities, reductions = in_turn(SIMILARITIES, m + k), in_turn(REDUCTIONS, m // 3 + k)
        for similarity, reduction in itertools.product(similarities, reductions):
            yield member, *mode, similarity, reduction


def pair(n, d, dtype=torch.float64, noise=0.5, seed=0):
    """Two correlated views (n, d)."""
    generator = torch.Generator().manual_seed(seed)
    z1 = torch.randn(n, d, generator=generator, dtype=torch.float64)
    z2 = z1 + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return z1.to(dtype), z2.to(dtype)


def loss_and_grads(
    z1, z2, objective, options=None, *, tau=0.3, learn_tau=None, weights=None, **kwargs
):
    """[loss, dz1, dz2(, dτ)] for a fixed random row weighting of the output."""
    objective = objectives.make(objective, options)
    z1, z2 = z1.detach().clone().requires_grad_(), z2.detach().clone().requires_grad_()
    learn_tau = objective.tau_gradient is not None if learn_tau is None else learn_tau
    wide = torch.float64 if z1.dtype == torch.float64 else torch.float32
    temperature = torch.tensor(tau, dtype=wide, requires_grad=learn_tau)
    loss = alpha_cl_loss(z1, z2, objective, temperature=temperature if learn_tau else tau, **kwargs)
    if weights is None:
        weights = torch.linspace(-0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    inputs = [z1, z2] + ([temperature] if learn_tau else [])
    return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), inputs)]


def two_sweeps(monkeypatch):
    """From now on the CPU kernels serve losses by two sweeps, not by one native step."""
    monkeypatch.setattr(native, "serves", lambda *call: False)
    functional._CALLS.clear()  # nothing is prepared


def siglip_and_grads(function, z1, z2, scale, bias, **options):
    """[loss, dz1, dz2, dscale, dbias] of a SigLIP loss for a fixed weighting of the output."""
    wide = torch.float64 if z1.dtype == torch.float64 else torch.float32
    leaves = [z.detach().clone().requires_grad_() for z in (z1, z2)]
    leaves += [torch.tensor(x, dtype=wide, requires_grad=True) for x in (scale, bias)]
    loss = function(*leaves[:2], scale=leaves[2], bias=leaves[3], **options)
    weights = torch.linspace(1.0, -0.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), leaves)]


class Largest(TorchDispatchMode):
    """Within the context: bytes of the largest storage that any operation returned."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@contextlib.contextmanager
def saved_bytes():
    """Within the context: bytes of every storage that autograd keeps, by its address."""
    saved = {}

    def keep(x):
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield saved


def assert_same_gradients(ours, truth, weights, leaves, bound=1e-10):
    """Row losses (anchors,) of the same leaves: values, and gradients of their weighted sums."""
    assert relative_error(ours.detach(), truth.detach()) < bound
    found, expected = (
        torch.autograd.grad((x * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
        for x in (ours, truth)
    )
    for f, e in zip(found, expected, strict=True):
        assert relative_error(f, e) < bound


def relative_error(value, truth, floor=1e-3):
    """‖value − truth‖/‖truth‖.

    Below ``floor`` (against values of order 1) the error counts as absolute.
    """
    truth = truth.to(torch.float64)
    return float((value.to(torch.float64) - truth).norm() / truth.norm().clamp(min=floor))
