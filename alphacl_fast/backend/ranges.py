"""Where exp(log f) needs no running maximum; used by every sweep backend."""

from __future__ import annotations

import torch

from ..objectives import PairKind

#: Largest |log f − middle| for which exp needs no running maximum: e^±64 (e^±600) times any n stays normal.
UNSHIFTED_RANGE = {torch.float32: 64.0, torch.float64: 600.0}


def middle(kind: PairKind, span: tuple[float, ...], dtype: torch.dtype) -> float | None:
    """Middle of log f's range where exp(log f − middle) needs no running maximum, else None."""
    if not kind.log or not span or (span[1] - span[0]) / 2 > UNSHIFTED_RANGE[dtype]:
        return None
    return (span[0] + span[1]) / 2
