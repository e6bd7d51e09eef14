"""`loss_against`: losses with explicit negatives and given positive similarities.

`alpha_cl_loss` derives negatives and positives from two views. Memory banks (MoCo), several
positives per anchor (supervised contrastive) and more candidates than anchors (retrieval) need the
same sums over other pairs: anchors z (N, D) meet all rows of ``negatives`` (M, D), or one another,
and the positive similarities t⁺ (N,) are given. The same two sweeps serve them on every backend,
with t_ij = ⟨z_i, y_j⟩ of the rows as given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional, given_positives, native, shared_rows
from .autograd import (
    Features,
    Need,
    Problem,
    Saved,
    Sweeps,
    constant_alpha,
    first_derivative,
    for_each_gradient,
    mean_negative,
    only_once,
    unit_rows,
)
from .backend import cpu
from .bundles import Rows, accumulation_dtype
from .call import BoundCall, Call, Guide, Layout, SameId, without_autocast
from .objectives import ClosedForm, Objective
from .one_operator import one_operator
from .process_groups import ProcessGroup


@one_operator("z", "negatives")
def loss_against(
    z: Tensor,
    negatives: Tensor | None,
    positive: Tensor,
    objective: str | Objective = "infonce",
    *,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    backend: str = "auto",
    precision: str | None = None,
    process_group: Any = None,
    ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    log_weights: Tensor | None = None,
    max_gap: float | None = None,
    guide: tuple[Tensor, Tensor | None, Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """Loss of anchors z against the rows of ``negatives``, with given positive similarities.

    Gradients flow to z, negatives, positive, a tensor temperature and log_weights.

    Args:
        z: (N, D) anchors, N ≥ 1, float32, float64, bfloat16 or float16. Rows are used as given:
            normalise them for cosine similarity.
        negatives: (M, D) on the device of z, M ≥ 1; rows of two dtypes are promoted to one. None:
            the other rows of z; the only row has loss 0 and no gradient.
        positive: (N,) similarity t⁺ of every anchor with its positive, float32 (float64 for float64
            z).
        objective: a name listed by `alphacl_fast.objectives.names`, or an `Objective`; d² = 1 − t.
        temperature: τ > 0, a float, a tensor with one element, or one number per anchor (N,), which
            only the exponential objectives of τ take (`infonce`, `soft_triplet`): term j of anchor
            i is exp(Δ_ij/τ_i).
        reduction: "mean", "sum" or "none".
        backend: "auto" or the name of a sweep backend. There is no oracle: "reference" is refused.
        precision: arithmetic of float32 matrix products; see
            `alphacl_fast.functional.alpha_cl_loss`.
        ids: (N,) integers, moved to z's device if necessary. A row of ``negatives`` (or of z) that
            has the anchor's id is not its negative: in a queue, an earlier key of the same sample
            or class. An anchor that has no negatives left has loss 0 and no gradient, and "mean"
            still counts it.
        negative_ids: (M,) integers, the ids of ``negatives``; required exactly if both
            ``negatives`` and ``ids`` are given.
        process_group: a `torch.distributed.ProcessGroup` or "world", whose ranks share one batch:
            each rank's anchors meet the negatives of all ranks (with ``negatives=None`` all other
            rows of all ranks), which are gathered. Each rank receives the loss of the whole batch
            or, with "none", its own anchors'. Gradients follow the convention of
            `alphacl_fast.functional.alpha_cl_loss`; every rank must want the same ones.
        log_weights: (M,) numbers w, or (N,) with ``negatives=None``: the term of negative j is
            multiplied by e^{w_j}, which does not depend on τ; −∞ leaves row j out (where the loss
            is the logarithm of the sum alone, as with epsilon=0, some negative of every anchor must
            have a finite weight). Minus the logarithm of the probability to be drawn corrects for
            sampled negatives (logQ). Only for exponential objectives.
        max_gap: negatives with Δ_ij = t_ij − t⁺_i > max_gap do not count; see
            `alphacl_fast.functional.alpha_cl_loss`. Neither log_weights nor temperatures change a
            Δ. The numbers are compared as they are: for copies of the positive, pass 1e-6 instead
            of 0.
        guide: (g, g_negatives, threshold): another model's embeddings of z (N, G) and of negatives
            (M, G), None with ``negatives=None``, in any float dtype, and one number per anchor
            (N,). Negatives whose cosine similarity with the anchor, as the guide sees it, exceeds
            the threshold do not count (GISTEmbed, arXiv:2402.16829). The guide gets no gradient.
            On the backends "cpu" and "blocked" only.
        **options: options of the objective, by its own names.

    Returns:
        (), or (N,) with ``reduction="none"``; float32, or float64 for float64 z.

    Raises:
        TypeError, ValueError: a bad argument; the message names it, what was expected and what was
            received.

    Source: arXiv:1911.05722 (queue of negatives); arXiv:2004.11362 (several positives, whose mean
    is t⁺, with epsilon=0).
    """
    group = functional.make_group(process_group, "auto")
    with shared_rows.failing_together(group):
        call = _call(objective, options, "dot", reduction, backend, precision, max_gap)
        if backend == "reference":
            raise ValueError("backend must not be 'reference': the oracle has two views")
    given = Given(z, negatives, positive, temperature, ids, negative_ids, log_weights, guide)
    if guide is not None and isinstance(call.objective, ClosedForm):
        call = replace(call, objective=call.objective.of_each_pair)
    if group is not None:
        return _over_ranks(given, call, group)
    found, key = _again(given, call)
    if found is not None:
        return found
    given = given.with_checked_guide()
    given.check(call.objective, fewest=1)
    return loss_of(given, call, key=key)


def _call(
    objective: str | Objective,
    options: dict[str, Any],
    similarity: str,
    reduction: str,
    backend: str,
    precision: str | None,
    max_gap: float | None = None,
) -> Call:
    """Checks the settings of a call; a later call with equal settings gets the same object."""
    settings = {
        "similarity": similarity, "reduction": reduction, "backend": backend,
        "precision": precision, "max_gap": max_gap,
    }  # fmt: skip
    known = "loss_against", objective, *settings.values(), *options, *options.values()
    return functional.like_before(
        known, lambda: functional.make_call(objective, options, negatives="one_view", **settings)
    )


@one_operator("z", "negatives")
def loss_against_rows(
    z: Tensor,
    negatives: Tensor | None,
    positive: Tensor,
    objective: Objective,
    *,
    similarity: str,
    temperature: float | Tensor,
    ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    backend: str = "auto",
    precision: str | None = None,
    process_group: Any = None,
    one_each: bool | None = None,
    reduction: str = "none",
) -> Tensor:
    """`loss_against` of rows with one more property; ``one_each``: see `Given`.

    With similarity="cosine" all rows must have unit length: their similarities then lie in
    [−1, 1], which saves a sweep the search for the largest exponent.
    """
    call = _call(objective, {}, similarity, reduction, backend, precision)
    given = Given(z, negatives, positive, temperature, ids, negative_ids, None, one_each=one_each)
    group = functional.make_group(process_group, "auto")
    if group is not None:
        return _over_ranks(given, call, group)
    found, key = _again(given, call)
    if found is not None:
        return found
    given.check(objective, fewest=1)
    return loss_of(given, call, key=key)


class Given(NamedTuple):
    """The tensors of a call."""

    z: Tensor
    negatives: Tensor | None
    positive: Tensor
    temperature: float | Tensor
    ids: Tensor | None
    negative_ids: Tensor | None
    log_weights: Tensor | None
    guide: tuple[Tensor, Tensor | None, Tensor] | None = None
    one_each: bool | None = None  # whether each anchor has a temperature; None: its shape says it

    @property
    def other(self) -> Tensor:
        """The rows among which the negatives are."""
        return self.z if self.negatives is None else self.negatives

    @property
    def per_anchor(self) -> bool:
        """Whether there is a temperature for each anchor."""
        if self.one_each is not None:
            return self.one_each
        tau = self.temperature
        return isinstance(tau, Tensor) and tau.dim() == 1 and tau.numel() != 1

    def among_others(self) -> Given:
        """The same loss with the anchors given a second time, as explicit negatives.

        Ids exclude each anchor's own row and the rows of its id. A temperature per anchor and
        log-weights, which belong to one side of a pair, then change t_ij without changing t_ji.
        """
        ids = torch.arange(len(self.z), device=self.z.device) if self.ids is None else self.ids
        guide = self.guide and (self.guide[0], self.guide[0], self.guide[2])
        return self._replace(negatives=self.z, ids=ids, negative_ids=ids, guide=guide)

    def with_checked_guide(self) -> Given:
        """The same with a guide that has no graph; raises unless it fits the rows."""
        if self.guide is None:
            return self
        return self._replace(guide=_checked_guide(self.guide, self.z, self.negatives))

    def check(self, objective: Objective, fewest: int) -> None:
        """Raises unless all tensors are good but the ids; ``fewest``: rows that there must be."""
        functional.check_rows("z", self.z, fewest)
        functional.check_rows("negatives", self.other, fewest)
        functional.check_alike("negatives", self.other, "z", self.z)
        _check_vector("positive", self.positive, self.z)
        if self.per_anchor:
            _check_temperatures(self.temperature, self.z, objective)
        else:
            functional.check_temperature(self.temperature, objective)
        if self.log_weights is not None:
            if objective.kind != "exp":
                raise ValueError(
                    "log_weights must be None unless the objective sums exponentials of Δ "
                    f"(such as infonce), got log_weights with {objective}"
                )
            _check_vector("log_weights", self.log_weights, self.other)
        if (self.negative_ids is None) != (self.ids is None or self.negatives is None):
            got = (
                "got None"
                if self.negative_ids is None
                else f"got them with {'ids' if self.ids is None else 'negatives'}=None"
            )
            raise ValueError(f"negative_ids must be given exactly if negatives and ids are, {got}")

    def checked_ids(self) -> tuple[Tensor | None, Tensor | None]:
        """Those of the anchors and of the negatives, on the device of the rows."""
        if self.ids is None:
            return None, None
        ids = functional.checked_ids("ids", self.ids, self.z)
        if self.negatives is None:
            return ids, None
        return ids, functional.checked_ids("negative_ids", self.negative_ids, self.negatives)


def _check_vector(name: str, x: Tensor, rows: Tensor) -> None:
    """Raises unless x is (n,) floating-point numbers on the device of rows (n, D)."""
    if (
        not isinstance(x, Tensor)
        or x.shape != rows.shape[:1]
        or x.device != rows.device
        or not x.is_floating_point()
    ):
        got = (
            f"{tuple(x.shape)} {x.dtype} on {x.device}"
            if isinstance(x, Tensor)
            else type(x).__name__
        )
        raise ValueError(
            f"{name} must be a floating-point tensor of shape {tuple(rows.shape[:1])} on "
            f"{rows.device}, got {got}"
        )


def _check_temperatures(temperature: Tensor, z: Tensor, objective: Objective) -> None:
    """Raises unless they are positive numbers, one per anchor, that the objective can have."""
    _check_vector("temperature", temperature, z)
    if objective.kind != "exp" or not objective.uses_temperature:
        raise ValueError(
            f"temperature must have one element with {objective}: only exponentials of Δ/τ take "
            f"one per anchor, got shape {tuple(temperature.shape)}"
        )
    if temperature.device.type == "cpu" and len(temperature):
        low, high = temperature.detach().aminmax()
        if not (low >= 1e-15 and high <= 1e15):
            raise ValueError(
                f"temperature must be between 1e-15 and 1e15, got {low.item()} to {high.item()}"
            )


def row_losses(given: Given, call: Call) -> Tensor:
    """(N,) losses of tensors that are checked."""
    return loss_of(given, replace(call, reduction="none"))


def loss_of(given: Given, call: Call, key: Any = None) -> Tensor:
    """The reduced loss of tensors that are checked; ``key``: what `_again` returned for them."""
    ids, negative_ids = given.checked_ids()
    given = given._replace(ids=ids, negative_ids=negative_ids)
    with without_autocast(given.z.device):
        if given.per_anchor:
            return call.reduce(_at_temperatures(given, replace(call, reduction="none")))
        return _at_one_temperature(given, call, key)


def _at_temperatures(given: Given, call: Call) -> Tensor:
    """(N,) losses of anchors that have a temperature each."""
    wide = accumulation_dtype(given.z.dtype)
    scale = given.temperature.to(wide)
    if given.negatives is None:
        given = given.among_others()
    divided = given._replace(
        z=given.z.to(wide) / scale[:, None],
        negatives=given.negatives.to(wide),
        positive=given.positive.to(wide) / scale,
        temperature=1.0,
        one_each=False,
    )
    limit = None  # of Δ, which no temperature divides
    if call.max_gap is not None:
        limit = ((given.positive.to(wide) + call.max_gap) / scale).detach()
    losses = _at_one_temperature(divided, call, limit=limit)
    return call.objective.times_temperature(losses, scale)


def _at_one_temperature(
    given: Given, call: Call, key: Any = None, limit: Tensor | None = None
) -> Tensor:
    """The reduced loss; the ids are on the device of the rows.

    ``limit`` (N,): the largest t of a negative, if it is not t⁺ + ``max_gap``.
    """
    if given.negatives is None and given.log_weights is not None:
        given = given.among_others()
    z, negatives, with_guide = given.z, given.negatives, given.guide is not None
    wide = accumulation_dtype(z.dtype)
    tau, bound, _ = functional.bind_temperature(
        z, given.temperature, call, given.ids is not None, with_guide=with_guide
    )
    layout = _layout(len(z), len(z) if negatives is None else len(z) + len(negatives))
    if len(z) == 1 and negatives is None:
        nothing = functional.zero_with_graph(z, given.positive.to(wide), tau)
        return call.reduce(nothing.expand(1))
    same_id = _same_id(given.ids, given.negative_ids, layout, wide)
    if isinstance(call.objective, ClosedForm):
        mean = _mean_negative(z, negatives, layout, same_id)
        gap = mean - given.positive.to(wide)
        return call.reduce(constant_alpha(call.objective, gap, layout, same_id))
    positive, bias = given.positive.to(wide).resolve_neg(), _bias(given, call.objective, tau, wide)
    need = native.NeedGiven.of(z, negatives, positive, tau, bias)
    there = (x for x in (z, negatives, positive, tau, bias) if x is not None)
    # a step compares Δ as it sees it, with the weights and divided by the temperature
    own_limit = limit is not None or (call.max_gap is not None and bias is not None)
    served = not with_guide and not own_limit and native.serves(bound, need)
    # there, the gradient's sweep finds what the first one kept: a step would solve the rows again
    served = served and not cpu.keeps_tiles()
    if served and native.plain(*there):
        plan = native.prepared_given(bound, z, layout, need)
        prepared = given_positives.Prepared(bound, layout, plan, need)
        if key:
            call.remember(key, prepared)
        return prepared.loss(z, negatives, positive, tau, bias, same_id)
    if bias is not None:
        bias = torch.cat([bias.new_zeros(len(z)), bias])
    guide = _guide(given.guide, wide) if with_guide else None
    if limit is None and call.max_gap is not None:
        limit = given.positive.detach().to(wide) + call.max_gap
    bound = replace(bound, reduction="none")
    losses = _ExplicitNegatives.apply(
        z, negatives, positive, tau, bias, bound, same_id, guide, limit, need.tau
    )[0]
    return call.reduce(losses)


#: In place of τ·(−∞), with which the moments of a weight of 0 would be NaN.
_NEVER = -1e20


def _bias(given: Given, objective: Objective, tau: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(M,) τ·w, which is added to the similarities with the negatives."""
    if given.log_weights is None:
        return None
    weights = given.log_weights.to(dtype)
    never = weights == -math.inf
    bias = objective.kind_tau(tau).to(dtype) * torch.where(never, 0.0, weights)
    return torch.where(never, _NEVER, bias)


def _again(given: Given, call: Call) -> tuple[Tensor | None, Any]:
    """The loss if a call like this has been made before, and the key of such calls; or None."""
    key = None if cpu.keeps_tiles() else given_positives.key_of(given)
    prepared = key and call.ready and call.ready.get(key)
    if not prepared:
        return None, key
    prepared = prepared.at(given.temperature)
    if prepared is None:  # the checks say why
        return None, None
    call.ready[key] = prepared
    tau, wide = given.temperature, prepared.plan.wide
    if isinstance(tau, Tensor):
        tau = tau.reshape(())
    elif given.log_weights is not None:
        tau = functional.as_number(tau, given.z)
    if given.negatives is None and given.log_weights is not None:
        given = given.among_others()
    positive, bias = given.positive.to(wide).resolve_neg(), _bias(given, call.objective, tau, wide)
    same_id = _same_id(given.ids, given.negative_ids, prepared.layout, wide)
    return prepared.loss(given.z, given.negatives, positive, tau, bias, same_id), key


# --- several processes ----------------------------------------------------------------------------


def _over_ranks(given: Given, call: Call, group: ProcessGroup) -> Tensor:
    """The loss of all ranks' anchors against all ranks' negatives."""
    failure, text, sizes, temperature = None, "", (), ()
    try:
        given = given.with_checked_guide()
        given.check(call.objective, fewest=0)
        given.checked_ids()
        _check_backend(given, call)
        text, sizes = _statement(given, call), (len(given.z), len(given.other))
        temperature = _readings(given)
    except Exception as error:  # the other processes wait for this one
        failure = error
    sharing = shared_rows.agree(group, text, sizes, failure, given.z, call.objective, temperature)
    given = given._replace(one_each=_one_each(sharing.temperatures))
    if given.per_anchor:  # perhaps only in the reading that all ranks share
        given.check(call.objective, fewest=0)
    z, wide = given.z, accumulation_dtype(given.z.dtype)
    if not sum(sharing.counts(0)) or not sum(sharing.counts(1)):
        raise ValueError(f"all ranks together must have at least 1 row, got {sharing.sizes}")
    weights = [] if given.log_weights is None else [given.log_weights.to(wide)[:, None]]
    shared = torch.cat([given.other.to(wide), *weights], 1)  # weights travel as one more feature
    numbers = [] if given.per_anchor else [functional.as_number(given.temperature, z)]
    everyone, *numbers = sharing.share(shared, 1, *numbers)
    dim, place = z.shape[1], sharing.place(0)
    ids, other_ids = given.checked_ids()
    if given.negatives is None:
        own = torch.arange(place.start, place.stop, device=z.device) if ids is None else ids
        ids = own.long()
        other_ids = sharing.gather(ids, 1)
    elif ids is not None:
        ids, other_ids = ids.long(), sharing.gather(other_ids.long(), 1)
    guide = given.guide
    if guide is not None:
        own_rows, others, threshold = guide
        of_shared = own_rows if given.negatives is None else others
        guide = own_rows, sharing.gather(of_shared.to(wide), 1), threshold
    here = Given(
        z.to(wide),
        everyone[:, :dim],
        given.positive,
        numbers[0] if numbers else given.temperature,
        ids,
        other_ids,
        everyone[:, dim] if weights else None,
        guide,
        given.one_each,
    )
    if len(z):
        losses, nothing = row_losses(here, call), 0.0
    else:  # this rank takes part in all messages
        own = [x for x in (here.temperature, here.positive) if isinstance(x, Tensor)]
        nothing = functional.zero_with_graph(everyone, here.z, *own)
        losses = nothing.expand(0)
    if call.reduction == "none":
        return losses
    total = sharing.total(losses.sum() + nothing)
    return total / (sum(sharing.counts(0)) if call.reduction == "mean" else 1)


def _check_backend(given: Given, call: Call) -> None:
    """Raises unless a backend serves the call, before the ranks exchange any rows."""
    wide = given.z[:0].to(accumulation_dtype(given.z.dtype))
    with_ids = given.ids is not None or given.negatives is None
    functional.bind_temperature(wide, 1.0, call, with_ids, with_guide=given.guide is not None)


def _statement(given: Given, call: Call) -> str:
    """What must be the same on every rank."""
    grad = torch.is_grad_enabled()
    tensors = {name: x for name, x in given._asdict().items() if isinstance(x, Tensor)}
    wanted = [name for name, x in tensors.items() if x.requires_grad and grad]
    guide = "" if given.guide is None else f"guide of width {given.guide[0].shape[1]}, "
    return (
        f"D={given.z.shape[1]}, dtype={given.z.dtype}, {call.objective}, "
        f"reduction={call.reduction!r}, max_gap={call.max_gap}, {guide}tensors "
        f"{[*tensors]}, gradients of {wanted}"
    )


#: In a rank's statement: each of its anchors has a temperature.
_EACH = math.inf


def _readings(given: Given) -> tuple[float, ...]:
    """The temperature as a rank states it: its value (NaN: not known on the host), or `_EACH`.

    (1,) of a rank with one anchor can be read in both ways.
    """
    if given.per_anchor:
        return (_EACH,)
    value = functional.known(given.temperature)
    one = isinstance(given.temperature, Tensor) and given.temperature.dim() == 1
    both = one and len(given.z) == 1 and given.one_each is None
    return (math.nan if value is None else value, *[_EACH] * both)


def _one_each(stated: tuple[tuple[float, ...], ...]) -> bool:
    """Whether each anchor of all ranks has a temperature, and not all of them the same one.

    Raises:
        ValueError: the ranks' statements do not fit together.
    """
    first = stated[0][0]

    def is_first(value: float) -> bool:
        return not abs(value - first) > 1e-6 * abs(first)  # true for NaN

    if first != _EACH and all(each[0] != _EACH and is_first(each[0]) for each in stated):
        return False
    if all(each[-1] == _EACH for each in stated):
        return True
    rank = next(r for r, each in enumerate(stated) if each[0] == _EACH or not is_first(each[0]))
    rank = rank or next(r for r, each in enumerate(stated) if each[-1] != _EACH)
    here, there = (
        "one per anchor" if each[0] == _EACH else f"{each[0]:.6g}"
        for each in (stated[0], stated[rank])
    )
    raise ValueError(
        f"every rank must pass the same temperature, got {here} on rank 0 and {there} on rank "
        f"{rank}"
    )


# --- one process ----------------------------------------------------------------------------------


def _layout(n: int, rows: int) -> Layout:
    """All pairs among n anchors, or n anchors against the other rows."""
    return Layout(rows, n, 0, n, rows - n, True) if rows > n else Layout(n, 0, 0, n, n - 1, False)


def _mean_negative(
    z: Tensor, negatives: Tensor | None, layout: Layout, same_id: SameId | None
) -> Tensor:
    """(N,) mean similarity to the negatives, differentiable; 0 for an anchor without negatives."""
    wide, n = accumulation_dtype(z.dtype), len(z)
    if negatives is None:
        return mean_negative(z.to(wide), None, layout, same_id=same_id)
    if same_id is None:
        return (z.to(wide) * negatives.to(wide).sum(0)).sum(1) / layout.n_neg
    sums = same_id.sums_with_other_ids(slice(n), slice(n, None), negatives.to(wide))
    return torch.where(same_id.empty, 0.0, (z.to(wide) * sums).sum(1) / same_id.n_neg)


def _same_id(
    ids: Tensor | None, negative_ids: Tensor | None, layout: Layout, dtype: torch.dtype
) -> SameId | None:
    """The ids of all rows that the sweeps see."""
    if ids is None:
        return None
    if negative_ids is not None:
        ids = torch.cat([ids, negative_ids])
    return SameId.make(ids, layout, dtype)


def _checked_guide(
    guide: tuple[Tensor, Tensor | None, Tensor], z: Tensor, negatives: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The guide without a graph; raises unless it fits the rows."""
    if not isinstance(guide, (tuple, list)) or len(guide) != 3:
        raise TypeError(f"guide must be None or (g, g_negatives, threshold), got {guide!r:.80}")
    g, g_negatives, threshold = guide
    functional.check_rows("z", z)
    pairs = [("guide[0]", g, "z", z)]
    if negatives is not None:
        functional.check_rows("negatives", negatives)
        pairs.append(("guide[1]", g_negatives, "negatives", negatives))
    elif g_negatives is not None:
        raise ValueError("guide[1] must be None with negatives=None")
    for name, rows, other_name, other in pairs:
        functional.check_rows(name, rows)
        if rows.shape[1] < 1:
            raise ValueError(f"{name} must have at least 1 column, got {tuple(rows.shape)}")
        if len(rows) != len(other) or rows.device != other.device:
            raise ValueError(
                f"{name} must have as many rows as {other_name} ({len(other)}), on {other.device}, "
                f"got {len(rows)} on {rows.device}"
            )
    if g_negatives is not None and g_negatives.shape[1] != g.shape[1]:
        raise ValueError(f"guide[1] must have {g.shape[1]} columns, got {g_negatives.shape[1]}")
    _check_vector("guide[2]", threshold, z)
    return g.detach(), None if g_negatives is None else g_negatives.detach(), threshold.detach()


def _guide(given: tuple[Tensor, Tensor | None, Tensor], dtype: torch.dtype) -> Guide:
    """The guide's unit rows of all rows that the sweeps see."""
    *rows, threshold = given
    together = torch.cat([x.to(dtype) for x in rows if x is not None])
    return Guide(unit_rows(together), threshold.to(dtype))


class _GivenPositives(Problem):
    """A problem whose positive similarities t⁺ (N,) are given.

    Its rows are [z; negatives], as given.
    """

    def __init__(
        self,
        z: Tensor,
        negatives: Tensor | None,
        pos: Tensor,
        tau: Tensor,
        bias: Tensor | None,
        call: BoundCall,
        same_id: SameId | None,
        guide: Guide | None,
        limit: Tensor | None,
    ) -> None:
        rows = Rows(z if negatives is None else torch.cat([z, negatives]), bias=bias)
        tau = tau.to(pos.dtype)
        sweeps = Sweeps(rows, pos, tau, call, _layout(len(z), len(rows.f)), same_id, guide, limit)
        super().__init__(Features(rows, None), pos, tau, call, same_id, sweeps)
        self.n_first = len(z)

    def _to_views(
        self, df: Tensor, q: Tensor, weight_sums: Tensor, used: slice, views: slice
    ) -> Tensor:
        self.weight_sums = weight_sums
        return df.view(-1, self.features.rows.f.shape[1])


class _ExplicitNegatives(torch.autograd.Function):
    """(N,) losses; the gradient sweep waits for the incoming row gradient."""

    @staticmethod
    def forward(
        z: Tensor,
        negatives: Tensor | None,
        pos: Tensor,
        tau: Tensor,
        bias: Tensor | None,
        call: BoundCall,
        same_id: SameId | None,
        guide: Guide | None,
        limit: Tensor | None,
        learn_tau: bool,
    ) -> tuple[Tensor | None, ...]:
        problem = _GivenPositives(z, negatives, pos, tau, bias, call, same_id, guide, limit)
        solution = problem.solve(learn_tau)
        # The inputs themselves are saved, not the rows that were put together from them.
        saved = problem.saved(solution)._replace(features=Features(Rows(None), None))
        return solution.loss, *saved.flatten()

    @staticmethod
    def setup_context(ctx, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        z, negatives, _, tau, bias, ctx.call, _, guide, limit, _ = inputs
        ctx.set_materialize_grads(False)
        guide = guide or (None, None)
        ctx.save_for_backward(z, negatives, tau, bias, limit, *guide, *output[1:])

    @staticmethod
    def backward(ctx, grad: Tensor | None, *of_saved: Tensor | None) -> tuple[Tensor | None, ...]:
        if not first_derivative(grad, of_saved):
            return (None,) * 10
        tensors = ctx.saved_tensors
        with torch.no_grad(), without_autocast(grad.device):
            run = partial(_ExplicitNegatives._gradients, ctx, tensors)
            gradients = for_each_gradient(run, grad)
        return *only_once(gradients, (grad, *tensors)), *(None,) * 5

    @staticmethod
    def _gradients(ctx, saved: Sequence[Tensor | None], grad: Tensor) -> tuple[Tensor | None, ...]:
        """Those of the tensors, for the gradient of every loss."""
        need_z, need_negatives, need_pos, need_tau, need_bias = ctx.needs_input_grad[:5]
        z, negatives, tau, bias, limit, guide, largest, *tensors = saved
        saved, guide = Saved.unflatten(tensors), None if guide is None else Guide(guide, largest)
        problem = _GivenPositives(
            z, negatives, saved.pos, tau, bias, ctx.call, saved.same_id, guide, limit
        )
        # the sums of the weights come with the rows' gradient; only the negatives have weights
        need = Need(need_z, need_negatives or need_bias, need_tau)
        dz, dtau = problem.gradient(saved.solution, grad, need)
        own = len(z) if need_z else 0  # rows of dz that belong to z
        return (
            dz[:own].to(z.dtype) if need_z else None,
            dz[own:].to(z.dtype) if need_negatives else None,
            -(saved.solution.mass * grad) if need_pos else None,
            dtau.to(tau.dtype) if need_tau else None,
            problem.weight_sums if need_bias else None,
        )
