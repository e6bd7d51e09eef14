"""Properties that hold for any input, searched by hypothesis: values, strides, arguments (options
and shapes: tests/soak.py).

A short search here; `make fuzz` takes ALPHACL_FUZZ_EXAMPLES=2000 cases of every property.
"""

import math
import os

import pytest
import torch
from family import BACKENDS, BUILT_IN, MEMBERS, MODES, SIMILARITIES, SLOW, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alphacl_fast import FusedAlphaCLLoss, objectives
from alphacl_fast.functional import alpha_cl_loss

EXAMPLES = int(os.environ.get("ALPHACL_FUZZ_EXAMPLES", "60"))
FAST = [name for name in BACKENDS if name not in SLOW]
search = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip

#: Rows that go wrong in losses: zero, tiny, huge, of one feature, and copies of other rows with
#: either sign.
KINDS = ("normal", "zero", "tiny", "huge", "one feature", "copy", "opposite")


@st.composite
def hard_views(draw, dtype=torch.float32):
    n, d = draw(st.integers(2, 20)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows = torch.randn(2 * n, d, generator=generator, dtype=torch.float64)
    for i, kind in enumerate(
        draw(st.lists(st.sampled_from(KINDS), min_size=2 * n, max_size=2 * n))
    ):
        other = draw(st.integers(0, i))
        if kind == "one feature":
            rows[i, 1:] = 0
        elif kind != "normal":
            rows[i] = {
                "zero": 0 * rows[i],
                "tiny": 1e-30 * rows[i],
                "huge": 1e30 * rows[i],
                "copy": rows[other],
                "opposite": -rows[other],
            }[kind]
    return rows[:n].to(dtype), rows[n:].to(dtype)


@st.composite
def laid_out(draw, z):
    """The same numbers as a slice, a transpose, every other column, or a view into something
    larger.
    """
    n, d = z.shape
    form = draw(st.sampled_from(("plain", "transposed", "columns", "window", "rows")))
    if form == "transposed":
        return z.t().contiguous().t()
    if form == "plain":
        return z
    step, top, left = draw(st.integers(1, 3)), draw(st.integers(0, 3)), draw(st.integers(0, 5))
    across, down = (step, 1) if form == "columns" else (1, step) if form == "rows" else (1, 1)
    storage = z.new_full((top + n * down, left + d * across), math.nan)
    window = storage[top::down, left::across]
    window.copy_(z)
    return window


modes = st.sampled_from(MODES)
temperatures = st.floats(-3, 0.7).map(lambda x: 10**x)


def gradients(z1, z2, *arguments, **options):
    leaves = [z.detach().requires_grad_() for z in (z1, z2)]
    value = alpha_cl_loss(*leaves, *arguments, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaves)


@search
@given(hard_views(), st.sampled_from(BUILT_IN), st.sampled_from(FAST), modes, temperatures)
def test_finite_rows_have_finite_losses_and_gradients(views, member, backend, mode, tau):
    """Under cosine, whatever the rows."""
    options = {
        "temperature": tau,
        "negatives": mode[0],
        "symmetric": mode[1],
        "backend": backend,
        **member[1],
    }
    value, found = gradients(*views, member[0], **options)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in found)


@search
@given(
    hard_views(torch.float64),
    st.sampled_from(MEMBERS),
    st.sampled_from(FAST),
    modes,
    st.floats(-1, 0.5),
    st.data(),
)
def test_order_of_the_pairs_does_not_matter(views, member, backend, mode, log_tau, data):
    """Pairs in another order: the same loss, the same gradient rows."""
    objective = objectives.make(*member)
    if backend == "cpu" and objective.kind.startswith("custom"):
        backend = "blocked"
    order = torch.tensor(data.draw(st.permutations(range(len(views[0])))))
    options = {
        "temperature": 10**log_tau,
        "negatives": mode[0],
        "symmetric": mode[1],
        "backend": backend,
    }
    value, found = gradients(*views, objective, **options)
    again, moved = gradients(*(z[order] for z in views), objective, **options)
    # roots of distances that are 0 but for rounding make 1e-8 of it
    tolerance = 1e-5 if objective.options.get("exponent", 2) < 2 else 1e-9
    assert relative_error(again, value) < tolerance
    longest = max(g[g.isfinite()].abs().max() for g in found)
    for g, m in zip(found, moved, strict=True):
        torch.testing.assert_close(
            m, g[order], rtol=100 * tolerance, atol=float(tolerance * longest)
        )


@search
@given(st.data(), st.sampled_from(FAST), modes, st.sampled_from(SIMILARITIES))
def test_memory_layout_does_not_matter(data, backend, mode, similarity):
    """Bit for bit, and what lies between the rows is not read."""
    n, d = data.draw(st.integers(2, 40)), data.draw(st.integers(1, 40))
    dtype = data.draw(
        st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16))
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    plain = [(torch.randn(n, d, generator=generator) / d**0.5).to(dtype) for _ in range(2)]
    views = [data.draw(laid_out(z)) for z in plain]
    options = {
        "negatives": mode[0],
        "symmetric": mode[1],
        "similarity": similarity,
        "backend": backend,
    }
    value, found = gradients(*plain, "infonce", **options)
    again, others = gradients(*views, "infonce", **options)
    assert torch.equal(value, again)
    assert all(torch.equal(a, b) for a, b in zip(found, others, strict=True))


@search
@given(
    st.sampled_from(MEMBERS),
    st.sampled_from(FAST),
    modes,
    st.sampled_from((math.nan, math.inf, -math.inf)),
    st.data(),
)
def test_what_is_not_finite_comes_out_and_does_not_hang(member, backend, mode, bad, data):
    """A NaN among the embeddings is a NaN of the loss, or an error that says so.

    A min player's iteration ends.
    """
    objective = objectives.make(*member)
    if backend == "cpu" and objective.kind.startswith("custom"):
        backend = "blocked"
    n, d = data.draw(st.integers(2, 12)), data.draw(st.integers(1, 6))
    z1, z2 = (torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    z1[data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, d - 1))] = bad
    value, found = gradients(
        z1, z2, objective, negatives=mode[0], symmetric=mode[1], backend=backend
    )
    assert value.isnan()
    assert found[0].isnan().any()


#: What users pass by mistake.
anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([[], {}, object()]),
    st.sampled_from(
        [
            torch.zeros(()),
            torch.zeros(3),
            torch.zeros(2, 3),
            torch.zeros(2, 3, dtype=torch.int64),
            torch.zeros(2, 3).to_sparse(),
            torch.zeros(2, 0),
            torch.zeros(0, 3),
            torch.zeros(2, 3, 4),
        ]
    ),
)
NAMES = (
    "objective",
    "temperature",
    "similarity",
    "negatives",
    "symmetric",
    "reduction",
    "backend",
    "precision",
    "margin",
    "exponent",
    "epsilon",
    "detach_alpha",
    "gamma",
    "nonsense",
)


@search
@given(st.dictionaries(st.sampled_from(NAMES), anything, min_size=1, max_size=3))
def test_wrong_arguments_are_refused_by_name(arguments):
    """Of whatever type: served, or a TypeError or ValueError with a message."""
    views = torch.randn(2, 3), torch.randn(2, 3)
    objective = arguments.pop("objective", "infonce")

    def module(*views, **options):
        return FusedAlphaCLLoss(objective, **options)(*views)

    for call in (lambda *views, **options: alpha_cl_loss(*views, objective, **options), module):
        try:
            call(*views, **arguments)
        except (TypeError, ValueError) as error:
            assert str(error)  # noqa: PT017


@search
@given(anything, anything)
def test_wrong_embeddings_are_refused_by_name(z1, z2):
    try:
        value = alpha_cl_loss(z1, z2)
    except (TypeError, ValueError) as error:
        assert "z1" in str(error) or "z2" in str(error)  # noqa: PT017
    else:
        assert value.isfinite()


def test_the_search_can_fail(monkeypatch):
    """A loss that is wrong for zero rows alone is found."""
    from alphacl_fast import autograd

    original = autograd.through_normalization
    monkeypatch.setattr(
        autograd,
        "through_normalization",
        lambda d, rows, inv: original(d, rows, 1 / (rows.norm(dim=1))),
    )

    @settings(search, max_examples=200)
    @given(hard_views(), st.just("infonce"), st.just("blocked"))
    def look(views, objective, backend):
        _, found = gradients(*views, objective, backend=backend)
        assert all(g.isfinite().all() for g in found)

    with pytest.raises(AssertionError):
        look()
