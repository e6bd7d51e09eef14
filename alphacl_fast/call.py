"""What a call asks for, and which rows of a batch meet which."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .backend import cpu
from .bundles import Pairing
from .objectives import Objective

#: The temperatures that are allowed: float32 must hold τ² and 1/τ².
LEAST_TAU, LARGEST_TAU = 1e-15, 1e15
#: The largest magnitude of SigLIP's scale and bias.
LARGEST_LOGIT = 1e15
#: Cosines that differ by so many units of rounding count as equal: a copy of the positive is as
#: similar to the anchor, in whatever order a backend adds.
ROUNDING = 8


@dataclass(frozen=True)
class Loss:
    """The loss that a call computes: everything that its value depends on but the tensors."""

    objective: Objective
    similarity: str
    negatives: str
    symmetric: bool
    reduction: str
    max_gap: float | None = None  # negatives with a larger Δ do not count

    @property
    def c(self) -> float:
        """d² = c − t."""
        return 0.0 if self.similarity == "euclidean" else 1.0

    def most_gap(self, dtype: torch.dtype) -> float | None:
        """The largest Δ of a pair that counts, of similarities that are accumulated in a dtype."""
        if self.max_gap is None or self.similarity != "cosine":
            return self.max_gap
        return self.max_gap + ROUNDING * torch.finfo(dtype).eps

    @property
    def two_directions(self) -> bool:
        """Whether every pair has two anchors whose losses are averaged."""
        return self.negatives == "cross_view" and self.symmetric

    def anchors(self, n_pairs: int) -> int:
        """The number of anchors; symmetric cross_view has the anchors of both towers."""
        return 2 * n_pairs if self.negatives == "two_view" or self.two_directions else n_pairs

    def reduce(self, row_losses: Tensor) -> Tensor:
        """(anchors,) → () or one value per pair or anchor.

        Symmetric cross_view averages both directions.
        """
        if self.reduction == "none":
            return row_losses.view(2, -1).mean(0) if self.two_directions else row_losses
        if self.reduction == "mean":
            return row_losses.mean()
        return row_losses.sum() / 2 if self.two_directions else row_losses.sum()

    def of_anchors(self, grad: Tensor) -> Tensor:
        """The gradient of every anchor's loss from the gradient of the values that `reduce` gives.

        The reduction is "none".
        """
        return (grad / 2).repeat(2) if self.two_directions else grad

    def divisor(self, n_pairs: int) -> int:
        """The number that divides the sum of all row losses, where the reduced loss is one
        number.
        """
        if self.reduction == "none":
            return 1
        if self.reduction == "mean":
            return self.anchors(n_pairs)
        return 2 if self.two_directions else 1


#: Most keys for which a call keeps what was prepared.
MOST_READY = 64


class Ready(dict[Any, Any]):
    """What was prepared for calls like one before; a copy of the call begins with nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Ready, ()


@dataclass(frozen=True)
class Call(Loss):
    """A call as the user asked for it, with validated arguments."""

    backend: str = "auto"
    precision: str | None = None  # of float32 products; None follows torch
    process_group: Any = (
        None  # `distributed.ProcessGroup`, whose processes each hold a part of the batch
    )
    workspace: int | None = None  # bytes for kept tiles of the CPU kernels; None: their default
    # of `native` and `steps`: what was prepared for calls like one before, by what it depends on
    ready: Ready | None = field(default=None, compare=False, repr=False)

    def remember(self, key: Any, prepared: Any) -> None:
        """Keeps what was prepared for calls of a key."""
        if self.ready is None:
            object.__setattr__(self, "ready", Ready())  # frozen as a setting, not as a memory
        if len(self.ready) >= MOST_READY:  # a learnt temperature is another one at every step
            self.ready.clear()
        self.ready[key] = prepared

    def bind(
        self, backend: str, known: tuple[float | None, ...], reduction: str | None = None
    ) -> BoundCall:
        """The call with the backend that serves it and ``known``, the temperature (or SigLIP's
        scale and bias) where the host knows its value.
        """
        reduction = reduction or self.reduction
        return BoundCall(
            self.objective,
            self.similarity,
            self.negatives,
            self.symmetric,
            reduction,
            self.max_gap,
            backend,
            known,
            self.precision or "",
            workspace=self.workspace,
        )


@dataclass(frozen=True)
class BoundCall(Loss):
    """A call bound to the backend that serves it."""

    backend: str = ""
    known: tuple[float | None, ...] = (None,)  # τ, or scale and bias; None: not on the host
    precision: str = ""
    ranks: Any = None  # `distributed.Ranks`, the processes that share the batch
    workspace: int | None = None

    @property
    def temperature(self) -> float | None:
        """τ where the host knows it and it is the only number."""
        return self.known[0] if len(self.known) == 1 else None


class Need(NamedTuple):
    """Whose gradients are wanted."""

    z1: bool
    z2: bool
    tau: bool

    @classmethod
    def of(cls, z1: Tensor, z2: Tensor, tau: Tensor) -> Need:
        grad = torch.is_grad_enabled()
        return cls(grad and z1.requires_grad, grad and z2.requires_grad, grad and tau.requires_grad)

    @property
    def views(self) -> int:
        """The number of views whose gradients are wanted."""
        return self.z1 + self.z2


class Layout(NamedTuple):
    """Which rows of a batch meet which, in numbers (docs/design.md)."""

    rows: int  # rows that the sweeps see, of the stacked views
    split: int
    partner: int
    anchors: int
    n_neg: int
    rectangle: bool  # split says so too, except for a process that has no rows

    @classmethod
    def of(cls, loss: Loss, n: int) -> Layout:
        """The layout of ``n`` positive pairs."""
        if loss.negatives == "two_view":
            return cls(2 * n, 0, n, 2 * n, 2 * n - 2, False)
        if loss.negatives == "one_view":
            return cls(n, 0, 0, n, n - 1, False)
        return cls(2 * n, n, n, loss.anchors(n), n - 1, True)

    def pairing(
        self,
        same_id: SameId | None = None,
        largest_t: Tensor | None = None,
        guide: Guide | None = None,
        weighted: bool = False,
    ) -> Pairing:
        """The operators' bundle."""
        ids = None if same_id is None else same_id.ids
        of_guide = {} if guide is None else {"guide": guide.rows, "largest_guide": guide.largest}
        return Pairing(
            self.split, self.partner, self.anchors, ids,
            largest_t=largest_t, weighted=weighted, **of_guide,
        )  # fmt: skip


class Guide(NamedTuple):
    """Another model's opinion on which negatives are too similar (arXiv:2402.16829)."""

    rows: Tensor  # (rows, G) unit rows in the accumulation dtype, of the rows that the sweeps see
    largest: Tensor  # (anchors,) the guide's largest similarity of a pair that counts


class SameId(NamedTuple):
    """Rows with equal ids are no negatives of each other (false-negative elimination,
    arXiv:2011.11765).
    """

    ids: Tensor  # (rows,) int32, numbered from 0, of the rows that the sweeps see
    n_neg: Tensor  # (anchors,) |Neg(i)| in the accumulation dtype; 1 where there is none
    empty: Tensor  # (anchors,) bool: no negative is left, so that loss and gradient are 0

    @classmethod
    def make(cls, ids: Tensor, layout: Layout, dtype: torch.dtype) -> SameId:
        """From the ids (rows,), any integers.

        No shape depends on a value, so the host does not wait.
        """
        if not torch.compiler.is_compiling() and ids.is_cpu and cpu.load_error() is None:
            has_rows = layout.split or not layout.rectangle  # a process may have none
            if has_rows and plain(ids):
                return cls(*cpu.number_ids(ids, layout.split, layout.anchors, dtype))
        in_order, order = ids.sort()
        first = torch.nn.functional.pad(in_order[1:] != in_order[:-1], (1, 0))
        number = torch.empty_like(order).scatter_(0, order, first.cumsum(0))

        def with_other_ids(anchors: Tensor, others: Tensor) -> Tensor:
            """For each anchor the number of others whose id differs."""
            sizes = torch.zeros_like(number).index_add_(0, others, torch.ones_like(others))
            return len(others) - sizes[anchors]

        if layout.rectangle:
            left, right = number[: layout.split], number[layout.split :]
            both = [with_other_ids(left, right), with_other_ids(right, left)]
            n_neg = torch.cat(both)[: layout.anchors]
        else:
            n_neg = with_other_ids(number, number)
        return cls(number.to(torch.int32), n_neg.clamp(min=1).to(dtype), n_neg == 0)

    @classmethod
    def of_views(cls, ids: Tensor | None, loss: Loss, n: int, dtype: torch.dtype) -> SameId | None:
        """For N pairs with ids (N,); both views of a sample have its id."""
        if ids is None:
            return None
        layout = Layout.of(loss, n)
        return cls.make(ids.repeat(2)[: layout.rows], layout, dtype)

    def sums_with_other_ids(self, anchors: slice, others: slice, rows: Tensor) -> Tensor:
        """(anchors, D) sums of the ``rows`` (others, D) whose id differs from the anchor's.

        They are differentiable.
        """
        of_id = rows.new_zeros(len(self.ids), rows.shape[1]).index_add(0, self.ids[others], rows)
        return rows.sum(0) - of_id.index_select(0, self.ids[anchors])


def plain(*tensors: Tensor) -> bool:
    """Whether operations on these tensors are not watched or transformed by anybody."""
    for x in tensors:
        # wrapped: of a transform that has ended
        if type(x) not in PLAIN or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
    return (
        not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
    )


PLAIN = {Tensor, torch.nn.Parameter}


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast is off; it costs nothing where autocast is off already."""
    if device.type == "meta":  # it has no autocast
        return _NOTHING
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


_NOTHING = contextlib.nullcontext()


def as_operator(z: Tensor) -> bool:
    """Whether a loss of these rows is one operator: in a compiled graph, or of shapes alone."""
    return torch.compiler.is_compiling() or z.is_meta or is_fake(z)
