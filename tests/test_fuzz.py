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

from alphacl_fast import FusedAlphaCLLoss, objectives, ops
from alphacl_fast.functional import alpha_cl_loss

EXAMPLES = int(os.environ.get("ALPHACL_FUZZ_EXAMPLES", "60"))
FAST = [name for name in BACKENDS if name not in SLOW]
#: Of every property on a backend whose kernels are interpreted or emulated.
SLOW_EXAMPLES = max(8, EXAMPLES // 8)
search = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


def searched_everywhere(*strategies):
    """Searches a property of (backend, …) on the fast backends, and on each slow one for itself."""

    def decorate(holds):
        @pytest.mark.parametrize(
            "backends", [FAST, *([name] for name in BACKENDS if name in SLOW)], ids="-".join
        )
        def test(backends):
            examples = EXAMPLES if backends is FAST else SLOW_EXAMPLES
            look = given(st.sampled_from(backends), *strategies)(holds)
            settings(search, max_examples=examples)(look)()

        test.__name__, test.__doc__ = holds.__name__, holds.__doc__
        return test

    return decorate


def serving(backend, objective):
    """The backend, or `blocked` where it has no such pair function."""
    reason = ops.SWEEP_BACKENDS[backend].unsupported(
        torch.device("cpu"), torch.float64, None, objective.kind
    )
    return backend if reason is None else "blocked"


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


@searched_everywhere(hard_views(), st.sampled_from(BUILT_IN), modes, temperatures)
def test_finite_rows_have_finite_losses_and_gradients(backend, views, member, mode, tau):
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


@searched_everywhere(
    hard_views(torch.float64), st.sampled_from(MEMBERS), modes, st.floats(-1, 0.5), st.data()
)
def test_order_of_the_pairs_does_not_matter(backend, views, member, mode, log_tau, data):
    """Pairs in another order: the same loss, the same gradient rows."""
    objective = objectives.make(*member)
    order = torch.tensor(data.draw(st.permutations(range(len(views[0])))))
    options = {
        "temperature": 10**log_tau,
        "negatives": mode[0],
        "symmetric": mode[1],
        "backend": serving(backend, objective),
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


@searched_everywhere(st.data(), modes, st.sampled_from(SIMILARITIES))
def test_memory_layout_does_not_matter(backend, data, mode, similarity):
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


#: Bit patterns that are not finite: with the least and the most bits set (a GPU's own NaN), of both
#: signs.
NOT_FINITE = {
    torch.float32: (0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, 0x7F800000, -0x800000),
    torch.bfloat16: (0x7F81, 0x7FFF, -1, 0x7F80),
    torch.float16: (0x7C01, 0x7FFF, -1, 0x7C00),
    torch.float64: (0x7FF0000000000001, 0x7FFFFFFFFFFFFFFF, -1, 0x7FF0000000000000),
}


@st.composite
def one_not_finite(draw):
    """Views of any dtype with one element that is not finite, in a row of numbers or of zeros."""
    n, d = draw(st.integers(2, 12)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from(list(NOT_FINITE)))
    generator = torch.Generator().manual_seed(1)
    z1, z2 = (torch.randn(n, d, generator=generator).to(dtype) for _ in range(2))
    row, column = draw(st.integers(0, n - 1)), draw(st.integers(0, d - 1))
    if draw(st.booleans()):
        z1[row] = 0
    integers = getattr(torch, f"int{8 * dtype.itemsize}")
    z1.view(integers)[row, column] = draw(st.sampled_from(NOT_FINITE[dtype]))
    return z1, z2


@searched_everywhere(one_not_finite(), st.sampled_from(MEMBERS), modes)
def test_what_is_not_finite_comes_out_and_does_not_hang(backend, views, member, mode):
    """A NaN among the embeddings is a NaN of the loss, and of the gradients of the same rows as of
    the reference. A min player's iteration ends.
    """
    objective = objectives.make(*member)
    options = {"negatives": mode[0], "symmetric": mode[1]}
    value, found = gradients(*views, objective, backend=serving(backend, objective), **options)
    assert value.isnan()
    _, expected = gradients(*(z.double() for z in views), objective, backend="reference", **options)
    ours, theirs = ([g.isnan().any(1) for g in gradients] for gradients in (found, expected))
    assert all((e | ~g).all() for g, e in zip(ours, theirs, strict=True))
    # One negative alone may have a weight that does not depend on it. The second view of one_view
    # meets its positives only, whose weight may be a constant that autograd multiplies by NaN.
    if len(views[0]) > 2:
        for g, e in list(zip(ours, theirs, strict=True))[: 1 if mode[0] == "one_view" else 2]:
            assert (g | ~e).all()


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
