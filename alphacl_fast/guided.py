"""Losses of two views in which another model, the guide, says which negatives are false.

GISTEmbed (arXiv:2402.16829): a negative that the guide finds more similar to the anchor than the
anchor's own positive does not count. `loss_against` computes the losses, with the rows of the views
as negatives. Over several processes the sweeps of `distributed` do, and the guide's rows travel
with the others.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import explicit_negatives, functional
from .autograd import unit_rows
from .bundles import accumulation_dtype
from .call import Call, Guide, Layout
from .objectives import ClosedForm, Objective
from .one_operator import one_operator


def check(call: Call) -> None:
    """Raises unless a call can have a guide."""
    if call.similarity == "euclidean":
        raise ValueError("guide must be None with similarity='euclidean'")
    if call.backend not in ("auto", "blocked"):
        raise ValueError(
            f"backend {call.backend!r} cannot serve this call: guide: not in this backend; use "
            "blocked"
        )


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
    z1, z2 = functional.of_one_dtype(z1, z2)
    if call.process_group is not None:
        opinion = functools.partial(_opinion, guide, float(guide_margin))
        return functional.evaluate_over_ranks(z1, z2, temperature, call, ids, opinion)[0]
    check(call)
    functional.check_temperature(temperature, call.objective)
    functional.check_embeddings(z1, z2)
    guide = _checked(guide, z1)
    objective = call.objective
    if isinstance(objective, ClosedForm):
        objective = objective.of_each_pair
    given = {"temperature": temperature, "guide": guide}
    if ids is not None:
        given["ids"] = functional.checked_ids("ids", ids, z1)
    losses = _losses(
        z1,
        z2,
        objective,
        **given,
        similarity=call.similarity,
        negatives=call.negatives,
        symmetric=call.symmetric,
        precision=call.precision,
        max_gap=call.max_gap,
        guide_margin=float(guide_margin),
    )
    return call.reduce(losses[: call.anchors(len(z1))])


def _opinion(guide: Any, guide_margin: float, z1: Tensor, call: Call) -> tuple[Guide, float]:
    """The guide of this process's pairs as the sweeps take it, and its margin."""
    check(call)
    layout = Layout.of(call, len(z1))
    rows, threshold = _compared(_checked(guide, z1), guide_margin, accumulation_dtype(z1.dtype))
    return Guide(
        torch.cat(rows)[: layout.rows], threshold.repeat(2)[: layout.anchors]
    ), guide_margin


def _compared(
    guide: tuple[Tensor, Tensor], guide_margin: float, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The guide's unit rows of both views, and the largest similarity of a true negative (N,)."""
    first, second = (unit_rows(rows.to(dtype)) for rows in guide)
    return (first, second), (first * second).sum(1) - guide_margin


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


@one_operator("z1", "z2", losses=lambda n: (2 * n,))
def _losses(
    z1: Tensor,
    z2: Tensor,
    objective: Objective,
    *,
    temperature: float | Tensor,
    guide: tuple[Tensor, Tensor],
    ids: Tensor | None = None,
    similarity: str,
    negatives: str,
    symmetric: bool,
    precision: str | None,
    max_gap: float | None,
    guide_margin: float,
) -> Tensor:
    """(2N,) losses of the anchors of both views; 0 for the rows of z2 where they are no anchors."""
    wide = accumulation_dtype(z1.dtype)
    rows = unit_rows if similarity == "cosine" else lambda z: z.to(wide)
    f1, f2 = rows(z1), rows(z2)
    (g1, g2), threshold = _compared(guide, guide_margin, wide)
    positive = (f1 * f2).sum(1)
    ids = torch.arange(len(z1), device=z1.device) if ids is None else ids
    call = functional.make_call(
        objective, {}, similarity=similarity, negatives="one_view", reduction="none",
        backend="auto", precision=precision,
    )  # fmt: skip
    call = replace(call, max_gap=max_gap)

    def against(z: Tensor, others: Tensor | None, *guide: Tensor | None) -> Tensor:
        copies = len(z) // len(positive)
        of = [None if x is None else x.repeat(copies) for x in (positive, ids, threshold)]
        given = explicit_negatives.Given(
            z, others, of[0], temperature, of[1], None if others is None else ids, None,
            (*guide, of[2]),
        )  # fmt: skip
        return explicit_negatives.row_losses(given, call)

    if negatives == "two_view":
        return against(torch.cat([f1, f2]), None, torch.cat([g1, g2]), None)
    nothing = (z1 * 0).sum(1).to(wide)
    if negatives == "one_view":
        return torch.cat([against(f1, None, g1, None), nothing])
    back = against(f2, f1, g2, g1) if symmetric else nothing
    return torch.cat([against(f1, f2, g1, g2), back])


functional.GUIDED[:] = [loss]
