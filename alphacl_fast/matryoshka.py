"""`MatryoshkaLoss`: one loss on several prefixes of the features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn


class MatryoshkaLoss(nn.Module):
    """Weighted sum of one loss on the first dims[k] features: Σ_k w_k · loss(z[:, :dims[k]]).

    The embeddings of the trained model can be truncated to any of these widths. A loss with cosine
    similarity normalises the truncated rows itself; a loss that expects unit rows, such as
    `loss_against`, needs a function around it that normalises them. Memory is O(n·Σ_k dims[k]) for
    n rows, and nothing is copied before the inner loss.

    Args:
        loss: a module or a function of (z1, z2), (z1, z2, ids), (z,) or (z, ids), such as
            `FusedAlphaCLLoss` or `supcon_loss`. A module's parameters become
            parameters of this module: all widths share a learnable temperature, which the
            ``state_dict`` holds as "loss.temperature".
        dims: the widths, distinct positive integers in any order.
        weights: w_k, one finite number for each width; None stands for weights of 1.

    Shape:
        * embeddings: (n, D) each, D ≥ max(dims), of any dtype that the inner loss takes.
        * output: has the shape of the inner loss, such as () or, with ``reduction="none"``,
          (anchors,).

    Raises:
        TypeError: ``loss`` cannot be called, or dims or weights are not sequences.
        ValueError: dims are empty, not positive integers or not distinct; weights are not finite
            numbers, or there are more or fewer of them than dims.

    Source: Kusupati et al., arXiv:2205.13147. Weights have the meaning of sentence-transformers'
    MatryoshkaLoss.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        dims: Iterable[int],
        weights: Iterable[float] | None = None,
    ) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"loss must be a module or a function, got {type(loss).__name__}")
        self.loss = loss
        self.dims = _checked_dims(dims)
        self.weights = _checked_weights(weights, len(self.dims))

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        """The weighted sum, from the arguments of the inner loss.

        Args:
            *arguments: embeddings (n, D), that is, floating-point tensors with two dimensions; the
                inner loss receives their first features. Everything else, such as ids or a
                temperature, is passed on unchanged.
            **keywords: the same by name.

        Returns:
            The sum, with the shape and dtype of the inner loss.

        Raises:
            ValueError: no argument has embeddings, they differ in D, or D < max(dims). Only the
                process with the error raises, even if the inner loss has a process group.
            TypeError, ValueError: the inner loss raises them.
        """
        self._check_widths([x.shape[1] for x in (*arguments, *keywords.values()) if _has_rows(x)])
        return sum(
            weight
            * self.loss(
                *(_cut(x, dim) for x in arguments),
                **{name: _cut(x, dim) for name, x in keywords.items()},
            )
            for dim, weight in zip(self.dims, self.weights, strict=True)
        )

    def _check_widths(self, widths: list[int]) -> None:
        if not widths:
            raise ValueError(
                "the arguments must have floating-point embeddings of shape (n, D) among them, "
                "got none"
            )
        if any(width != widths[0] for width in widths):
            raise ValueError(f"all embeddings must have the same number of features, got {widths}")
        if widths[0] < max(self.dims):
            raise ValueError(
                f"embeddings must have at least max(dims) = {max(self.dims)} features, "
                f"got {widths[0]}"
            )

    def extra_repr(self) -> str:
        """Widths and weights, and the inner loss if it is a function."""
        shown = f"dims={self.dims}, weights={self.weights}"
        return shown if isinstance(self.loss, nn.Module) else f"{self.loss!r}, {shown}"


def _has_rows(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 2 and x.is_floating_point()


def _cut(x: Any, dim: int) -> Any:
    return x[:, :dim] if _has_rows(x) else x


def _listed(name: str, values: Any) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of numbers, got {values!r}") from None


def _checked_dims(dims: Any) -> tuple[int, ...]:
    listed = _listed("dims", dims)
    if not listed:
        raise ValueError("dims must have at least one width, got none")
    for dim in listed:
        if isinstance(dim, bool) or not isinstance(dim, Integral) or dim < 1:
            raise ValueError(f"dims must be positive integers, got {dim!r} in {listed}")
    if len({*listed}) < len(listed):
        raise ValueError(f"dims must be distinct, got {listed}")
    return tuple(int(dim) for dim in listed)


def _checked_weights(weights: Any, count: int) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * count
    listed = _listed("weights", weights)
    if len(listed) != count:
        raise ValueError(f"weights must have one number for each of {count} dims, got {listed}")
    for weight in listed:
        number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight):
            raise ValueError(f"weights must be finite numbers, got {weight!r} in {listed}")
    return tuple(float(weight) for weight in listed)
