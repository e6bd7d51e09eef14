"""`supcon_loss` and `SupConLoss`: supervised contrastive losses with any number of positives.

The sum over the rows of other ids, Σ_N, comes from the sweeps of `loss_against`; what needs the
rows of the anchor's own id comes from blocks on the diagonal (`same_id`). All exponents are taken
relative to m_i, the mean similarity of the anchor's positives, which cancels in every form and is a
constant: g_ip = (s_ip − m_i)/τ, ℓ_i = log Σ_N exp((s_in − m_i)/τ).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional, native, ops, shared_rows
from .autograd import first_derivative, scaled, unit_rows
from .backend import cpu, cpu_step
from .bundles import accumulation_dtype
from .call import without_autocast
from .explicit_negatives import loss_against_rows
from .functional import zero_with_graph
from .objectives import LOG_SUM
from .one_operator import one_operator
from .process_groups import ProcessGroup
from .same_id import Block, Compiled, Formula, Groups, Outcome, losses_of_groups, unsorted
from .tracing import breaks_the_graph

# --- the forms ------------------------------------------------------------------------------------


class _Exponents(NamedTuple):
    """What "out" and "in" need of a block."""

    e: Tensor  # (b, c) exp(g − top), 0 at excluded pairs
    top: Tensor  # (b,) some g that is so large that no exponential overflows
    log_mean: Tensor  # (b,) log mean_p exp(g_ip)
    ratio: Tensor  # (b,) log(Σ_N/Σ_P)

    @classmethod
    def of(cls, block: Block, g: Tensor, top: Tensor, log_sums: Tensor) -> _Exponents:
        top = torch.where(top == -math.inf, 0.0, top)  # an anchor without positives
        e = (g - top[:, None]).exp_()
        log_mean = top + (e.sum(1) / block.count).log()
        return cls(e, top, log_mean, log_sums - log_mean - block.count.log())


def _relative(block: Block, origin: Tensor, tau: Tensor) -> Tensor:
    """(b, c) g, 0 at excluded pairs; it takes the place of the similarities."""
    g = block.t.sub_(origin[:, None]).mul_((1 / tau)[:, None])
    return g.masked_fill_(block.excluded, 0.0)


def _outcome(block: Block, loss: Tensor, dg: Tensor, g: Tensor, dl: Tensor, tau: Tensor) -> Outcome:
    """From |P|·∂loss/∂g and ∂loss/∂ℓ; the origin is a constant."""
    dg.masked_fill_(block.excluded, 0.0)
    d_tau = None
    if block.needed[2]:
        g = g.masked_fill(block.excluded, 0.0)
        d_tau = (dg * g).sum(1) / (-tau * block.count)
    return Outcome(loss, dg, 1 / (tau * block.count), (dl, None, d_tau))


def _out(
    block: Block, log_sums: Tensor, origin: Tensor, tau: Tensor, bounded: bool = False
) -> Outcome:
    """mean_p [log Σ_A exp(g_ia) − g_ip] = log|P| + (log mean exp g − mean g) + log(1 + Σ_N/Σ_P)."""
    g = _relative(block, origin, tau)
    mean = g.sum(1) / block.count
    g.masked_fill_(block.excluded, -math.inf)
    # from the mean or the maximum on, equal g have the log_mean that they should have exactly
    _, _, log_mean, ratio = _Exponents.of(block, g, mean if bounded else g.amax(1), log_sums)
    loss = block.count.log() + (log_mean - mean) + _log1p_exp(ratio)
    # |P|·(share of p in A) − 1, as a sum of small numbers: no share is subtracted from 1
    among, others = torch.sigmoid(-ratio), torch.sigmoid(ratio)
    dg = (g - log_mean[:, None]).expm1_().mul_(among[:, None]).sub_(others[:, None])
    return _outcome(block, loss, dg, g, others, tau)


def _in(
    block: Block, log_sums: Tensor, origin: Tensor, tau: Tensor, bounded: bool = False
) -> Outcome:
    """log Σ_A exp(g_ia) − log mean_p exp(g_ip) = log|P| + log(1 + Σ_N/Σ_P)."""
    g = _relative(block, origin, tau).masked_fill_(block.excluded, -math.inf)
    top = torch.zeros_like(origin) if bounded else g.amax(1)
    e, top, log_mean, ratio = _Exponents.of(block, g, top, log_sums)
    loss, others = block.count.log() + _log1p_exp(ratio), torch.sigmoid(ratio)
    dg = e.mul_((-others * (top - log_mean).exp())[:, None])
    return _outcome(block, loss, dg, g, others, tau)


def _sincere(
    block: Block, log_sums: Tensor, origin: Tensor, tau: Tensor, bounded: bool = False
) -> Outcome:
    """mean_p log(1 + exp(ℓ_i − g_ip))."""
    g = _relative(block, origin, tau)
    ratio = (log_sums[:, None] - g).masked_fill_(block.excluded, -math.inf)
    loss = _log1p_exp(ratio).sum(1) / block.count
    dg = ratio.sigmoid_().neg_()
    return _outcome(block, loss, dg, g, dg.sum(1) / -block.count, tau)


def _log1p_exp(x: Tensor) -> Tensor:
    # where torch's softplus turns linear, at 20, it would be off by 2e-9
    return torch.nn.functional.softplus(x, threshold=40.0)


FORMS: dict[str, Formula] = {"out": _out, "in": _in, "sincere": _sincere}


# --- the loss -------------------------------------------------------------------------------------


@one_operator("z", "reference")
def supcon_loss(
    z: Tensor,
    ids: Tensor,
    *,
    form: str = "out",
    temperature: float | Tensor = 0.1,
    reference: Tensor | None = None,
    reference_ids: Tensor | None = None,
    similarity: str = "cosine",
    reduction: str = "mean",
    backend: str = "auto",
    precision: str | None = None,
    process_group: Any = None,
) -> Tensor:
    """Supervised contrastive loss: the positives of a row are all other rows with its id.

    With the similarity s, the rows P of the anchor's id, the rows N of other ids, and A of both:

    * ``"out"``: mean_{p∈P} [log Σ_{a∈A} exp(s_ia/τ) − s_ip/τ];
    * ``"in"``: log Σ_{a∈A} exp(s_ia/τ) − log((1/\\|P\\|) Σ_{p∈P} exp(s_ip/τ));
    * ``"sincere"``: mean_{p∈P} [log(exp(s_ip/τ) + Σ_{n∈N} exp(s_in/τ)) − s_ip/τ], in which the
      positives do not repel each other.

    The time of the sums over P grows with Σ k² for groups of k rows. With one id only, "out" and
    "in" follow the formula and "sincere" is 0.

    Args:
        z: (n, D) embeddings of all views, n ≥ 1, float32, float64, bfloat16 or float16.
        ids: (n,) integers, the labels.
        form: "out", "in" or "sincere".
        temperature: τ > 0, a float or a tensor with one element, which receives its gradient.
        reference: (M, D) rows that contain the positives and negatives of z, instead of z itself:
            prototypes, a memory bank. None of them counts as the anchor. None: the rows of z.
        reference_ids: (M,) integers; required exactly if ``reference`` is given.
        similarity: "cosine" (rows are normalised here) or "dot" (rows as given).
        reduction: "mean" or "sum" over the anchors that have a positive, or "none": (n,), 0 for the
            others.
        backend: "auto" or the name of a sweep backend. "reference" does not have this loss and
            raises an error.
        precision: arithmetic of the sweeps' float32 matrix products; see
            `alphacl_fast.functional.alpha_cl_loss`.
        process_group: a `torch.distributed.ProcessGroup` or "world", whose ranks share one batch:
            positives, negatives and references are the rows of all ranks. Each rank passes its own
            rows (any number) and receives the loss of the whole batch or, with "none", the
            losses of its own anchors. Gradients follow the convention of
            `alphacl_fast.functional.alpha_cl_loss`; every rank must need the same gradients.

    Returns:
        () or, with ``reduction="none"``, (n,); float32, or float64 for float64 embeddings.

    Raises:
        TypeError, ValueError: a bad argument; the message names it, what was expected and what was
            received. With a process group every rank raises.

    Source: Khosla et al., arXiv:2004.11362 (L_out and L_in); Feeney and Hughes, arXiv:2309.14277
    (SINCERE).
    """
    group = functional.make_group(process_group, "auto")
    with shared_rows.failing_together(group):
        _check_options(form, similarity, reduction, backend, precision)
    given = _Given(z, ids, reference, reference_ids, temperature, similarity)
    if group is not None:
        return _over_ranks(given, form, reduction, backend, precision, group)
    ids, reference_ids = given.checked(fewest=1)
    with without_autocast(z.device):
        tau = functional.as_number(temperature, z)
        if len(z) == 1 and reference is None:
            losses = zero_with_graph(z, tau).expand(1)
            return losses if reduction == "none" else losses.sum()
        evaluate = partial(
            _alone, given, form=form, reduction=reduction, backend=backend, precision=precision,
        )  # fmt: skip
        if reduction != "none" and _in_one_go(backend, precision, z, reference, tau):
            return _InOneGo.apply(evaluate, ids, reference_ids, z, reference, tau)[0]
        return evaluate(ids, reference_ids, z, reference, tau)


class SupConLoss(nn.Module):
    """Supervised contrastive loss that never stores a matrix of all pairs.

    Call it as ``loss(z, ids)``; see `supcon_loss`.

    Args:
        form: "out", "in" or "sincere".
        temperature: τ > 0, a float, or an ``nn.Parameter`` or a tensor with one element.
        similarity: "cosine" or "dot".
        reduction: "mean", "sum" or "none".
        backend: "auto" or the name of a sweep backend.
        precision: arithmetic of float32 matrix products; None follows torch.
        process_group: None, "world" or a `torch.distributed.ProcessGroup` whose ranks share one
            batch.

    Shape:
        * z: (n, D), float32, float64, bfloat16 or float16.
        * ids: (n,) integers.
        * output: () or, with ``reduction="none"``, (n,), in float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: the constructor raises on bad options, the call on bad embeddings or
            ids. The message gives the name, the expected and the received value.

    Source: arXiv:2004.11362; arXiv:2309.14277.
    """

    def __init__(
        self,
        form: str = "out",
        temperature: float | Tensor = 0.1,
        *,
        similarity: str = "cosine",
        reduction: str = "mean",
        backend: str = "auto",
        precision: str | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        _check_options(form, similarity, reduction, backend, precision)
        functional.check_temperature(temperature, LOG_SUM)
        functional.make_group(process_group, "auto")
        self.form, self.similarity = form, similarity
        self.reduction, self.backend = reduction, backend
        self.precision, self.process_group = precision, process_group
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature.detach().clone())
        else:
            self.temperature = temperature

    def forward(
        self,
        z: Tensor,
        ids: Tensor,
        reference: Tensor | None = None,
        reference_ids: Tensor | None = None,
    ) -> Tensor:
        """The loss of embeddings with ids.

        Args:
            z: (n, D) embeddings.
            ids: (n,) integers.
            reference: None, or (M, D) rows among which positives and negatives are.
            reference_ids: (M,) integers, with ``reference``.

        Returns:
            () for reduction "mean" or "sum", (n,) for "none", in float32 or float64.

        Raises:
            TypeError, ValueError: bad embeddings or ids.
        """
        return supcon_loss(
            z,
            ids,
            form=self.form,
            temperature=self.temperature,
            reference=reference,
            reference_ids=reference_ids,
            similarity=self.similarity,
            reduction=self.reduction,
            backend=self.backend,
            precision=self.precision,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        """Every setting. Tensor values are shown on a CPU only: reading others would wait."""
        parts = [f"form={self.form!r}", f"temperature={functional.shown(self.temperature)}"]
        parts += [f"similarity={self.similarity!r}", f"reduction={self.reduction!r}"]
        if self.process_group is not None:
            parts += [f"process_group={self.process_group!r}"]
        if self.precision is not None:
            parts += [f"precision={self.precision!r}"]
        return ", ".join([*parts, f"backend={self.backend!r}"])


# --- one process ----------------------------------------------------------------------------------


class _Pool(NamedTuple):
    """Anchors, the rows among which their positives and negatives are, and who shares an id."""

    rows: Tensor  # (n, D) in the accumulation dtype
    others: Tensor | None  # (m, D) likewise; None: the anchors
    ids: Tensor  # (n,)
    other_ids: Tensor | None  # (m,)
    groups: Groups
    similarity: str  # "cosine": all rows have unit length


def _alone(
    given: _Given,
    ids: Tensor,
    reference_ids: Tensor | None,
    z: Tensor,
    reference: Tensor | None,
    tau: Tensor,
    **settings: Any,
) -> Tensor:
    """The loss of checked tensors in one process."""
    rows = given.rows(z)
    if reference is None:
        pool = _Pool(rows, None, ids, None, Groups.among(ids), given.similarity)
    else:
        groups = Groups.between(ids, reference_ids)
        pool = _Pool(rows, given.rows(reference), ids, reference_ids, groups, given.similarity)
    return _evaluate(pool, tau, **settings)


def _in_one_go(backend: str, precision: str | None, *tensors: Tensor | None) -> bool:
    """Whether loss and gradients are computed together: if the CPU kernels serve the call and no
    mode or transform intercepts operations on its tensors.
    """
    there = [x for x in tensors if x is not None]
    z = there[0]
    return (
        torch.is_grad_enabled()
        and any(x.requires_grad for x in there)
        and native.plain(*there)
        and _serving(backend, z, precision) == "cpu"
    )


def _serving(backend: str, z: Tensor, precision: str | None) -> str:
    """The backend of the sweeps."""
    dtype = accumulation_dtype(z.dtype)
    return ops.choose(backend, z.device, dtype, precision, "exp", ("ids",))[0]


class _InOneGo(torch.autograd.Function):
    """A loss that is one number, with its gradients: the second sweep finds what the first kept.

    Rows are sorted by their ids, so that few tiles of the sweeps hold pairs of equal ids.
    The gradients are outputs because a gradient that arrives at them belongs to a second
    derivative, which raises.
    """

    @staticmethod
    def forward(
        ctx: Any,
        evaluate: Callable[..., Tensor],
        ids: Tensor,
        reference_ids: Tensor | None,
        *inputs: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        ctx.dtypes = tuple(None if x is None else x.dtype for x in inputs)
        # in the accumulation dtype: a half-precision gradient of 1e-8 would vanish before
        # GradScaler sees it
        wide = [None if x is None else x.detach().to(accumulation_dtype(x.dtype)) for x in inputs]
        each = [x if x is None else x.sort(stable=True) for x in (ids, reference_ids)]
        for k, x in enumerate(each):
            wide[k] = None if x is None else wide[k].index_select(0, x.indices)
        leaves = [
            x if x is None else x.requires_grad_(n) for x, n in zip(wide, needed, strict=True)
        ]
        with torch.enable_grad(), cpu.keeping_tiles(cpu_step.default_workspace()):
            loss = evaluate(*(x if x is None else x.values for x in each), *leaves)
            wanted = [x for x, n in zip(leaves, needed, strict=True) if n]
            found = iter(
                torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
            )
        gradients = [next(found) if n else None for n in needed]
        for k, x in enumerate(each):
            if gradients[k] is not None:
                gradients[k] = unsorted(gradients[k], x.indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients)
        return loss.detach(), *gradients

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *of_saved: Tensor | None) -> Any:
        if not first_derivative(grad, of_saved):
            return (None,) * (3 + len(ctx.dtypes))
        return None, None, None, *scaled(ctx.saved_tensors, grad, ctx.dtypes)


def _evaluate(
    pool: _Pool,
    tau: Tensor,
    form: str,
    reduction: str,
    backend: str,
    precision: str | None,
    sharing: shared_rows.Sharing | None = None,
) -> Tensor:
    # |g| ≤ 2/τ: where that is small no exponential overflows, and no largest g is looked for
    known = functional.known(tau)
    bounded = pool.similarity == "cosine" and known is not None and 2 / known <= 60
    losses_of, compiled = partial(FORMS[form], bounded=bounded), None
    if known is not None and _serving(backend, pool.rows, precision) == "cpu":
        compiled = Compiled([*FORMS].index(form), bounded, known)
    losses_of = partial(
        losses_of_groups, pool.rows, pool.others, pool.groups, losses_of, compiled=compiled
    )
    vectors = _vectors(pool, tau, backend, precision)
    if reduction == "none":
        return losses_of(*vectors)
    weight = pool.groups.has_positive.to(pool.rows.dtype)
    if reduction == "mean":
        count = weight.sum() if sharing is None else sharing.sum(weight.sum())
        weight = weight / count.clamp(min=1)
    return losses_of(*vectors, weight=weight)


def _vectors(
    pool: _Pool, tau: Tensor, backend: str, precision: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """ℓ, m and τ of every anchor."""
    groups, rows = pool.groups, pool.rows
    origin = groups.mean_similarity(rows, pool.others)
    log_sums = loss_against_rows(
        rows,
        pool.others,
        origin,
        LOG_SUM,
        similarity=pool.similarity,
        temperature=tau,
        ids=pool.ids,
        negative_ids=pool.other_ids,
        backend=backend,
        precision=precision,
    )
    log_sums = torch.where(groups.has_negative, log_sums, -math.inf)
    return log_sums, origin, tau.expand(len(rows))


# --- several processes ----------------------------------------------------------------------------


@breaks_the_graph  # sizes and errors of the other processes are read on the host
def _over_ranks(
    given: _Given,
    form: str,
    reduction: str,
    backend: str,
    precision: str | None,
    group: ProcessGroup,
) -> Tensor:
    failure, text, sizes, ids, reference_ids = None, "", (), None, None
    try:
        ids, reference_ids = given.checked(fewest=0)
        text, sizes = given.statement(form, reduction), given.sizes()
    except Exception as error:  # the other processes wait for this one
        failure = error
    sharing = shared_rows.agree(group, text, sizes, failure, given.z)
    z, kind = given.z, 0 if given.reference is None else 1
    if not sum(sharing.counts(kind)):
        raise ValueError(f"all ranks together must have at least 1 row, got {sharing.counts(kind)}")
    with without_autocast(z.device):
        tau = functional.as_number(given.temperature, z)
        rows = given.rows(z)
        own = rows if given.reference is None else given.rows(given.reference)
        everyone, tau = sharing.share(own, kind, tau)
        other_ids = sharing.gather((ids if kind == 0 else reference_ids).long(), kind)
        mine = None
        if kind == 0:
            place = sharing.place(0)
            mine = torch.arange(place.start, place.stop, device=z.device)
        groups = Groups.between(ids.long(), other_ids, mine)
        pool = _Pool(rows, everyone, ids.long(), other_ids, groups, given.similarity)
        if len(rows):
            loss = _evaluate(pool, tau, form, reduction, backend, precision, sharing)
        else:  # this rank takes part in all messages
            if reduction == "mean":
                sharing.sum(rows.new_zeros(()))
            nothing = zero_with_graph(everyone, rows, tau)
            loss = nothing.expand(0) if reduction == "none" else nothing
        return loss if reduction == "none" else sharing.total(loss)


# --- arguments ------------------------------------------------------------------------------------


class _Given(NamedTuple):
    """The tensors of a call."""

    z: Tensor
    ids: Tensor
    reference: Tensor | None
    reference_ids: Tensor | None
    temperature: float | Tensor
    similarity: str

    def rows(self, x: Tensor) -> Tensor:
        """Rows (n, D) whose inner products are the similarities, in the accumulation dtype."""
        return unit_rows(x) if self.similarity == "cosine" else x.to(accumulation_dtype(x.dtype))

    def checked(self, fewest: int) -> tuple[Tensor, Tensor | None]:
        """Raises unless the tensors are good; gives the ids on the device of the rows."""
        functional.check_rows("z", self.z, fewest)
        if self.z.shape[1] < 1:
            raise ValueError(f"z must have at least 1 column, got shape {tuple(self.z.shape)}")
        functional.check_temperature(self.temperature, LOG_SUM)
        if (self.reference is None) != (self.reference_ids is None):
            missing = "reference" if self.reference is None else "reference_ids"
            raise ValueError(
                f"reference and reference_ids must be given together, got no {missing}"
            )
        ids, reference_ids = functional.checked_ids("ids", self.ids, self.z), None
        if self.reference is not None:
            functional.check_rows("reference", self.reference, fewest)
            functional.check_alike("reference", self.reference, "z", self.z)
            reference_ids = functional.checked_ids(
                "reference_ids", self.reference_ids, self.reference
            )
        return ids, reference_ids

    def sizes(self) -> tuple[int, ...]:
        return (len(self.z), *(() if self.reference is None else (len(self.reference),)))

    def statement(self, form: str, reduction: str) -> str:
        """What must be the same on every rank."""
        wanted = [
            name
            for name, x in zip(("z", "reference", "temperature"), self[0:5:2], strict=True)
            if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()
        ]
        return (
            f"D={self.z.shape[1]}, dtype={self.z.dtype}, form={form!r}, "
            f"similarity={self.similarity!r}, reduction={reduction!r}, "
            f"reference={'None' if self.reference is None else 'given'}, "
            f"temperature={functional.shown(self.temperature)}, gradients of {wanted}"
        )


def _check_options(
    form: str, similarity: str, reduction: str, backend: str, precision: str | None
) -> None:
    functional.one_of("form", form, tuple(FORMS))
    functional.one_of("similarity", similarity, ("cosine", "dot"))
    functional.make_call(
        LOG_SUM,
        {},
        similarity="cosine",
        negatives="one_view",
        reduction=reduction,
        backend=backend,
        precision=precision,
    )
    if backend == "reference":
        raise ValueError("backend must not be 'reference': the oracle has two views")
