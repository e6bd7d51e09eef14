"""The operands of the two sweeps, by name.

`row_sums` and `pair_grad` take four bundles. A bundle is flattened once, where it crosses the
operator schema (`ops`), and nowhere else: autograd, explicit negatives, processes and backends pass
it whole. To add an operand, add a field here (the schema follows from its annotation), the code
that fills it, and its use in the backends that serve it (docs/extending.md).
"""

from __future__ import annotations

import enum
import functools
from typing import NamedTuple

import torch
from torch import Tensor

#: The largest number of parameters that a pair kind of the C++ kernels has.
MOST_PARAMETERS = 3


class Rows(NamedTuple):
    """The rows that the sweeps multiply: t_ij = scale_i·scale_j·⟨f_i, f_j⟩ + bias_i + bias_j."""

    f: Tensor  # (n, D)
    scale: Tensor | None = None  # (n,) accumulation dtype; None is 1
    bias: Tensor | None = None  # (n,) accumulation dtype; None is 0


class NormalizedRows(NamedTuple):
    """What `unit_rows` returns for the stacked views (2N, D) of a cosine loss.

    A row of f is a unit row, or, in half precision, the row as given. A bfloat16 row whose largest
    element is below 2⁻³⁰, or 2³⁰ and more, is multiplied by a power of two, which is exact, because
    products of such rows could leave the range of float32.
    """

    f: Tensor  # (2N, D) in the views' dtype; rows begin `pitch` elements apart
    scale: Tensor  # (2N,) 1/‖f‖ in half precision, else (0,)
    inv_norm: Tensor  # (2N,) 1/‖z‖, 0 for an all-zero row
    pos: Tensor  # (2N,) t⁺, the same for both rows of a pair

    @classmethod
    def empty(cls, z: Tensor) -> NormalizedRows:
        """Uninitialised buffers for two views of the shape (N, D) of z."""
        (n, dim), wide = z.shape, accumulation_dtype(z.dtype)
        f = z.new_empty(2 * n, pitch(dim))[:, :dim]
        lengths = 2 * n if wide != z.dtype else 0, 2 * n, 2 * n
        return cls(f, *(z.new_empty(length, dtype=wide) for length in lengths))


def pitch(dim: int) -> int:
    """Elements from one row to the next.

    It is a multiple of 16 above 16 features, because 16-byte copies, tensor maps and Triton's
    vector loads need it; shorter rows stay dense.
    """
    return -(-dim // 16) * 16 if dim > 16 else dim


def empty_vectors(like: Tensor, count: int, length: int) -> Tensor:
    """(count, length) uninitialised, every row at a multiple of 16 bytes.

    Triton compiles a kernel again for a pointer that is aligned otherwise.
    """
    return like.new_empty(count, -(-length // 4) * 4)[:, :length]


class Pairing(NamedTuple):
    """Which rows meet which. With ``split`` = 0 all rows meet one another: a triangle of tiles.

    Otherwise the rows [0, split) meet the rows [split, n): a rectangle. The first ``anchors`` rows
    have sums of their own; the other rows are negatives only.
    """

    split: int
    partner: (
        int  # row i and row i ± partner are a positive pair and do not meet; 0: no pair is left out
    )
    anchors: int
    ids: Tensor | None = None  # (n,) int32; two rows with the same id do not meet
    # (anchors,) accumulation dtype; a pair with a larger t does not count for the anchor
    largest_t: Tensor | None = None
    # whether the bias of the rows holds log-weights, which ``largest_t`` is compared without
    weighted: bool = False
    # (n, G) unit rows of another model, the guide, and (anchors,) its largest similarity at which a
    # pair counts for the anchor; both in the accumulation dtype
    guide: Tensor | None = None
    largest_guide: Tensor | None = None


class PairFunction(NamedTuple):
    """The function of a similarity that is summed."""

    kind: str  # name under which `objectives.kind` finds it
    params: tuple[float, ...]  # values of the kind's named parameters, in their order
    tau: Tensor  # () temperature, in the accumulation dtype
    log_range: tuple[float, float] | None = (
        None  # bounds of log f, where they are known on the host
    )

    def padded(self) -> tuple[float, ...]:
        """The parameters as the structs of the C++ kernels hold them."""
        return (*self.params, *[0.0] * (MOST_PARAMETERS - len(self.params)))


class RowScalars(NamedTuple):
    """Row vectors (anchors,) in the accumulation dtype that turn a pair's function into its term.

    Linear kinds see x = (t − shift_i) + argument_offset_i; log kinds see t, and sum exp(log f −
    shift_i). Moments are taken of t − moment_origin_i, and g_ij = row_weight_i·(f
    or f′), or row_weight_i·(f + f′·(t − moment_origin_i − baseline_i)).
    """

    moment_origin: Tensor
    row_weight: Tensor | None = None  # of `pair_grad` only
    shift: Tensor | None = None
    argument_offset: Tensor | None = None
    baseline: Tensor | None = None


class Term(enum.IntEnum):
    """The terms that are summed over the negatives of an anchor.

    Their values give the order in which the C++ kernels hold them.
    """

    F = 0  # f
    DF = 1  # ∂f/∂x
    F_MOMENT = 2  # f·(t − moment_origin)
    DF_MOMENT = 3  # ∂f/∂x·(t − moment_origin)
    DTAU = 4  # ∂f/∂τ·(t − moment_origin − baseline)
    SHIFT = 5  # not a sum: the logarithm by which the sums of a log kind are divided; comes first
    T_MAX = 6  # not a sum: the largest t; stands alone


class Weight(enum.IntEnum):
    """The factor by which `pair_grad` weighs a pair, besides the row weight."""

    F = 0  # f
    DF = 1  # ∂f/∂x
    F_PLUS_DF = 2  # f + ∂f/∂x·(t − moment_origin − baseline)


class Form(enum.IntEnum):
    """How a sweep keeps exp(log f) in range."""

    CONSTANT = 0  # a log kind whose bounds are known: one constant shift for all rows
    ONLINE = 1  # a log kind: a running maximum per row (online softmax)
    PLAIN = 2  # plain sums; for a log kind divided by exp(shift_i)
    T_MAX = 3  # the largest t


class Gradient(enum.IntEnum):
    """What a GPU launch of `pair_grad` does with the weights of its pairs."""

    NONE = 0  # adds up the sums only
    PRODUCT = 1  # multiplies the weights with the rows
    WEIGHTS = 2  # writes the weights


def summed(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """The terms that are sums."""
    return tuple(term for term in terms if term < Term.SHIFT)


def leading(terms: tuple[Term, ...]) -> Term | None:
    """The first term if it is not a sum: `Term.SHIFT` or `Term.T_MAX`."""
    return terms[0] if terms and terms[0] >= Term.SHIFT else None


@functools.cache
def rows_of_terms(terms: tuple[Term, ...]) -> tuple[int, ...]:
    """For each member of `Term` its row among the terms, -1 if it is not wanted."""
    return tuple(terms.index(term) if term in terms else -1 for term in Term)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything else is accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Dtype(enum.IntEnum):
    """Dtypes of rows in the C++ kernels, and TF32 as a way to multiply float32 rows."""

    FLOAT32 = 0
    FLOAT64 = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    TFLOAT32 = 4

    @classmethod
    @functools.cache
    def of(cls, dtype: torch.dtype) -> Dtype:
        return cls[str(dtype).removeprefix("torch.").upper()]
