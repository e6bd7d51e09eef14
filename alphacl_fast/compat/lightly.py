"""In the place of ``lightly.loss.NTXentLoss``, memory bank included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autograd import unit_rows
from ..explicit_negatives import loss_against
from ..functional import alpha_cl_loss


class NTXentLoss(nn.Module):
    """NT-Xent over both views, or of the first view against a bank of earlier second views (SimCLR, MoCo).

    Args:
        temperature: τ > 0.
        memory_bank_size: (rows, features) of the bank; 0: none, negatives are the batch's.
        gather_distributed: one batch over all processes, exact after DDP's averaging.

    Called with out0, out1 (N, D); returns (). With a bank, out1 goes into it in training steps (where out0 requires a
    gradient), in the place of the oldest rows.

    Raises:
        ValueError: a temperature or bank size out of range, or a bank together with gather_distributed.

    Source: arXiv:2002.05709; arXiv:1911.05722.
    """

    def __init__(
        self, temperature: float = 0.5, memory_bank_size: int | Sequence[int] = 0, gather_distributed: bool = False
    ) -> None:
        super().__init__()
        size = (0, 0) if memory_bank_size == 0 else memory_bank_size
        if isinstance(size, int) or len(size) != 2 or min(size) < 0:
            raise ValueError(f"memory_bank_size must be 0 or (rows, features), got {memory_bank_size!r}")
        rows, features = size
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        if rows and gather_distributed:
            raise ValueError("gather_distributed must be False with a memory bank: each process fills its own")
        self.temperature, self.rows, self.gather_distributed = temperature, rows, gather_distributed
        self.register_buffer("bank", F.normalize(torch.randn(rows, features), dim=1))
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        if not self.rows:
            group = "world" if self.gather_distributed else None
            return alpha_cl_loss(out0, out1, temperature=self.temperature, process_group=group)
        first, second = unit_rows(out0), unit_rows(out1)
        # a copy: the rows of this step replace some of the bank before the backward
        loss = loss_against(first, self.bank.to(first.dtype, copy=True), (first * second).sum(1), temperature=self.temperature)
        if out0.requires_grad:
            self._enqueue(second.detach())
        return loss

    @torch.no_grad()
    def _enqueue(self, rows: Tensor) -> None:
        """Overwrites from the pointer on; what reaches beyond the end is dropped, and the pointer starts again."""
        start = int(self.bank_ptr)
        end = start + len(rows)
        self.bank[start : min(end, self.rows)] = rows[: self.rows - start].to(self.bank.dtype)
        self.bank_ptr[0] = 0 if end >= self.rows else end
