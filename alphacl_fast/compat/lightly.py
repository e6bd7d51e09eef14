"""A drop-in replacement for ``lightly.loss.NTXentLoss``, including its memory bank."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autograd import unit_rows
from ..explicit_negatives import loss_against
from ..functional import alpha_cl_loss


class NTXentLoss(nn.Module):
    """NT-Xent over both views (SimCLR), or of the first view against a memory bank (MoCo).

    Args:
        temperature: temperature τ > 0.
        memory_bank_size: (rows, features) of the bank of earlier second views; 0 uses no bank, and
            the negatives come from the batch.
        gather_distributed: whether the negatives come from the batches of all processes; the
            gradient is exact after DDP's averaging.

    Raises:
        ValueError: temperature or bank size out of range, or a bank with gather_distributed.

    Source: arXiv:2002.05709; arXiv:1911.05722.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        size = (0, 0) if memory_bank_size == 0 else memory_bank_size
        if isinstance(size, int) or len(size) != 2 or min(size) < 0:
            raise ValueError(
                f"memory_bank_size must be 0 or (rows, features), got {memory_bank_size!r}"
            )
        rows, features = size
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        if rows and gather_distributed:
            raise ValueError(
                "gather_distributed must be False with a memory bank: each process fills its own"
            )
        self.temperature, self.rows, self.gather_distributed = temperature, rows, gather_distributed
        self.register_buffer("bank", F.normalize(torch.randn(rows, features), dim=1))
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Compute the loss.

        In training steps, when out0 requires a gradient, out1 replaces the oldest rows of the bank.

        Args:
            out0: (N, D) first view, normalised here; any floating dtype of the backends.
            out1: (N, D) second view, same dtype.

        Returns:
            ().
        """
        if not self.rows:
            group = "world" if self.gather_distributed else None
            return alpha_cl_loss(out0, out1, temperature=self.temperature, process_group=group)
        first, second = unit_rows(out0), unit_rows(out1)
        # A copy, because this step's rows replace some of the bank's before the backward.
        bank, positive = self.bank.to(first.dtype, copy=True), (first * second).sum(1)
        loss = loss_against(first, bank, positive, temperature=self.temperature)
        if out0.requires_grad:
            self._enqueue(second.detach())
        return loss

    @torch.no_grad()
    def _enqueue(self, rows: Tensor) -> None:
        """Overwrite the bank from the pointer on; drop rows beyond its end and start over."""
        start = int(self.bank_ptr)
        end = start + len(rows)
        self.bank[start : min(end, self.rows)] = rows[: self.rows - start].to(self.bank.dtype)
        self.bank_ptr[0] = 0 if end >= self.rows else end
