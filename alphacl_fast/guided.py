"""Losses of two views in which another model, the guide, says which negatives are false.

GISTEmbed (arXiv:2402.16829): a negative that the guide finds more similar to the anchor than the
anchor's own positive does not count. The sweeps compute the guide's similarities beside their own
and leave out its pairs; over several processes the guide's rows travel with the others.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import functional
from .autograd import unit_rows
from .bundles import accumulation_dtype
from .call import ROUNDING, Call, Guide, Layout
from .objectives import Objective
from .one_operator import one_operator


def loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    call: Call,
    ids: Tensor | None,
    guide: tuple[Tensor, Tensor],
    guide_margin: float,
) -> Tensor:
    """The loss of a call, without the negatives that the guide calls false; see `alpha_cl_loss`."""
    if call.process_group is not None:
        opinion = functools.partial(_opinion, guide, float(guide_margin))
        return functional.evaluate(z1, z2, temperature, call, ids, opinion=opinion)[0]
    given = {"temperature": temperature, "guide": guide}
    if ids is not None:
        given["ids"] = ids
    return _guided(
        z1,
        z2,
        call.objective,
        **given,
        guide_margin=float(guide_margin),
        similarity=call.similarity,
        negatives=call.negatives,
        symmetric=call.symmetric,
        reduction=call.reduction,
        max_gap=call.max_gap,
        backend=call.backend,
        precision=call.precision,
        workspace=call.workspace,
    )


def _shape(n: int, settings: dict[str, Any]) -> tuple[int]:
    """Of the losses of n pairs."""
    return (2 * n if settings["negatives"] == "two_view" else n,)


@one_operator("z1", "z2", losses=_shape)
def _guided(
    z1: Tensor,
    z2: Tensor,
    objective: Objective,
    *,
    temperature: float | Tensor,
    guide: tuple[Tensor, Tensor],
    guide_margin: float,
    reduction: str = "mean",
    ids: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    call = Call(objective, reduction=reduction, **settings)
    opinion = functools.partial(_opinion, guide, guide_margin)
    return functional.evaluate(z1, z2, temperature, call, ids, opinion=opinion)[0]


def _opinion(guide: Any, guide_margin: float, z1: Tensor, call: Call) -> tuple[Guide, float]:
    """The guide of this process's pairs as the sweeps take it, and its margin."""
    layout, wide = Layout.of(call, len(z1)), accumulation_dtype(z1.dtype)
    first, second = (unit_rows(rows.to(wide)) for rows in _checked(guide, z1))
    rows = torch.cat([first, second])[: layout.rows]
    largest = (first * second).sum(1) - guide_margin + ROUNDING * torch.finfo(wide).eps
    return Guide(rows, largest.repeat(2)[: layout.anchors]), guide_margin


def _checked(guide: Any, z: Tensor) -> tuple[Tensor, ...]:
    """The guide's embeddings of both views; raises unless they fit the rows z."""
    if not isinstance(guide, (tuple, list)) or len(guide) != 2:
        raise TypeError(f"guide must be None or (g1, g2), got {guide!r:.80}")
    for k, rows in enumerate(guide):
        functional.check_rows(f"guide[{k}]", rows)
        if rows.shape[1] < 1:
            raise ValueError(f"guide[{k}] must have at least 1 column, got {tuple(rows.shape)}")
        if len(rows) != len(z) or rows.device != z.device:
            raise ValueError(
                f"guide[{k}] must have {len(z)} rows on {z.device}, as the views, got {len(rows)} "
                f"on {rows.device}"
            )
    if guide[0].shape[1] != guide[1].shape[1]:
        widths = " and ".join(str(rows.shape[1]) for rows in guide)
        raise ValueError(f"guide must have one width in both views, got {widths}")
    return tuple(rows.detach() for rows in guide)


functional.GUIDED[:] = [loss]
