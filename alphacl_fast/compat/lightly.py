"""Drop-in replacements for the contrastive losses of ``lightly.loss``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..autograd import unit_rows
from ..explicit_negatives import loss_against
from ..functional import alpha_cl_loss, of_one_dtype
from ..objectives import LOG_SUM
from ..zoo import macl
from .entry import (
    check_pair,
    cross_entropy,
    everyone,
    log_sum_exp,
    loss_dtype,
    own_ids,
    world,
)

_EPS = 1e-8


def _check_gather(gather_distributed: bool) -> None:
    if gather_distributed and not dist.is_available():
        raise ValueError(
            "gather_distributed must be False: this build of torch has no torch.distributed"
        )


class MemoryBankModule(nn.Module):
    """A queue of earlier rows, ``lightly.models.modules.memory_bank.MemoryBankModule``.

    The buffers ``bank`` and ``bank_ptr`` are no part of the ``state_dict``, as in the package.

    Args:
        size: (rows, features) of the bank; 0 keeps no bank. A number of rows alone, which releases
            before 1.6 take, leaves the features to the first batch.
        gather_distributed: whether the rows of all processes enter the bank.
        feature_dim_first: whether the bank is returned as (features, rows).

    Raises:
        ValueError: a size that is neither one number ≥ 0 nor two.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        gather_distributed: bool = False,
        feature_dim_first: bool = True,
    ) -> None:
        super().__init__()
        shape = (size,) if isinstance(size, int) else tuple(size)
        if len(shape) not in (1, 2) or min(shape) < 0:
            raise ValueError(
                f"memory_bank_size must be a number of rows ≥ 0 or (rows, features), got {size!r}"
            )
        self.size, self.gather_distributed = shape, gather_distributed
        self.feature_dim_first = feature_dim_first
        self.register_buffer("bank", self._first_rows(*shape), persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Look at the bank, and put rows into it.

        Args:
            output: (N, D) rows.
            labels: ignored.
            update: whether the rows replace the oldest rows of the bank.

        Returns:
            The rows, and the bank before the update on their device, or None without a bank.
        """
        if self.size[0] == 0:
            return output, None
        if self.bank.dim() == 1:
            self.bank = self._first_rows(self.size[0], output.shape[1])
        # A copy, because this step's rows replace some of the bank's before the backward.
        bank = self._bank_on(output.device).clone()
        if update:
            self._enqueue(output.detach())
        return output, bank.t() if self.feature_dim_first else bank

    @staticmethod
    def _first_rows(rows: int, features: int | None = None) -> Tensor:
        if features is None:
            return torch.zeros(rows)
        return F.normalize(torch.randn(rows, features), dim=1)

    def _bank_on(self, device: torch.device) -> Tensor:
        """The bank, which moves to the rows' device; a device without values keeps none of it."""
        if device.type == "meta":
            return self.bank.to(device)
        self.bank = self.bank.to(device)
        return self.bank

    @torch.no_grad()
    def _enqueue(self, rows: Tensor) -> None:
        """Overwrite the bank from the pointer on; drop rows beyond its end and start over."""
        rows, _ = everyone(rows, world(self.gather_distributed))
        if rows.is_meta:
            return
        start = int(self.bank_ptr)
        end = start + len(rows)
        self.bank[start : min(end, self.size[0])] = rows[: self.size[0] - start].to(self.bank.dtype)
        self.bank_ptr[0] = 0 if end >= self.size[0] else end


class NTXentLoss(nn.Module):
    """NT-Xent over both views (SimCLR), or of the first view against a memory bank (MoCo).

    Args:
        temperature: temperature τ with |τ| ≥ 1e-8; with a negative one the positive repels.
        memory_bank_size: (rows, features) of the bank of earlier second views, or rows alone; 0
            uses no bank, and the negatives come from the batch.
        gather_distributed: whether the negatives come from the batches of all processes, or, with
            a bank, whether the rows of all processes enter it. One process is a world of its own.
            A process returns the mean over its own rows; the gradient is exact after DDP's
            averaging.

    Raises:
        ValueError: temperature or bank size out of range.

    Source: arXiv:2002.05709; arXiv:1911.05722.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        if not abs(temperature) >= _EPS:
            raise ValueError(
                f"temperature must have a magnitude of 1e-8 or more, got {temperature}"
            )
        _check_gather(gather_distributed)
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed)
        self.temperature, self.gather_distributed = temperature, gather_distributed
        self.cross_entropy, self.eps = nn.CrossEntropyLoss(reduction="mean"), _EPS

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Compute the loss.

        In training steps, when out0 requires a gradient, out1 replaces the oldest rows of the bank.

        Args:
            out0: (N, D) first view, normalised here; any floating dtype of the backends.
            out1: (N, D) second view.

        Returns:
            ().

        Raises:
            TypeError, ValueError: bad embeddings.
        """
        out0, out1 = of_one_dtype(out0, out1)
        self._check_cross_entropy()
        check_pair("out0", out0, "out1", out1, world(self.gather_distributed))
        has_bank = self.memory_bank.size[0] > 0
        loss = (self._of_bank if has_bank else self._of_batch)(out0, out1)
        return loss.to(loss_dtype(out0.dtype, out0.device, cross_entropy))

    def _check_cross_entropy(self) -> None:
        """Raises if the attribute of the package is another loss now, which ours cannot call."""
        given = self.cross_entropy
        names = ("weight", "label_smoothing", "reduction")
        found = {name: getattr(given, name, None) for name in names}
        plain = {"weight": None, "label_smoothing": 0.0, "reduction": "mean"}
        if type(given) is not nn.CrossEntropyLoss or found != plain:
            raise ValueError(
                f"cross_entropy must be the plain nn.CrossEntropyLoss(), got {given} with {found}"
            )

    def _of_bank(self, out0: Tensor, out1: Tensor) -> Tensor:
        functional.check_embeddings(out0, out1)
        first, second = unit_rows(out0), unit_rows(out1)
        _, bank = self.memory_bank(second, update=out0.requires_grad)
        sign = 1 if self.temperature > 0 else -1
        return loss_against(
            sign * first, bank.t().to(first.dtype), sign * (first * second).sum(1),
            temperature=abs(self.temperature),
        )  # fmt: skip

    def _of_batch(self, out0: Tensor, out1: Tensor) -> Tensor:
        group = world(self.gather_distributed)
        if self.temperature > 0:
            return _own_mean(out0, out1, "infonce", self.temperature, group)
        functional.check_embeddings(out0, out1)
        first, second = unit_rows(out0), unit_rows(out1)
        rows, ids = torch.cat([first, second]), own_ids(first, group).repeat(2)
        losses = loss_against(
            -rows, rows, -(first * second).sum(1).repeat(2), temperature=-self.temperature,
            ids=ids, negative_ids=ids, process_group=group, reduction="none",
        )  # fmt: skip
        return losses.mean()


def _own_mean(
    out0: Tensor, out1: Tensor, objective, temperature: float, group: str | None
) -> Tensor:
    """The mean over the rows of this process."""
    reduction = "mean" if group is None else "none"
    loss = alpha_cl_loss(
        out0, out1, objective, temperature=temperature, process_group=group, reduction=reduction
    )
    return loss.mean()


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """Weights of the positives: 2 − N·softmax(⟨out0, out1⟩/σ), a constant of the gradient.

    Args:
        out0: (N, D) unit rows of the first view.
        out1: (N, D) unit rows of the second view.
        sigma: σ > 0.

    Returns:
        (N,).

    Source: arXiv:2110.06848.
    """
    similarity = (out0.detach() * out1.detach()).sum(1) / sigma
    return 2 - len(out0) * similarity.softmax(0)


class DCLLoss(nn.Module):
    """Decoupled contrastive loss: log Σ_j exp(s_ij/τ) − w_i·s⁺_i/τ without the positive in the sum.

    Args:
        temperature: temperature τ > 0.
        weight_fn: gives the weights w (N,) of unit rows (N, D) of both views; it is called for each
            order of the views. None: 1.
        gather_distributed: as `NTXentLoss`.

    Raises:
        ValueError: gather_distributed without torch.distributed; when called, a bad temperature.

    Source: arXiv:2110.06848.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        _check_gather(gather_distributed)
        self.temperature, self.weight_fn = temperature, weight_fn
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            out0: (N, D) first view, normalised here; any floating dtype of the backends.
            out1: (N, D) second view.

        Returns:
            (), the mean over both views; 0 for one pair, which has no negative.

        Raises:
            TypeError, ValueError: bad embeddings or a bad temperature.
        """
        out0, out1 = of_one_dtype(out0, out1)
        group = world(self.gather_distributed)
        check_pair("out0", out0, "out1", out1, group)
        loss = _own_mean(out0, out1, LOG_SUM, self.temperature, group)
        dtype = loss_dtype(out0.dtype, out0.device, partial(self._last_operation, out0))
        if self.weight_fn is None or (len(out0) == 1 and group is None):
            return loss.to(dtype)
        first, second = unit_rows(out0), unit_rows(out1)
        weights = self.weight_fn(first, second) + self.weight_fn(second, first)
        positive = (first * second).sum(1) / self.temperature
        return (loss + ((1 - weights / 2) * positive).mean()).to(dtype)

    def _last_operation(self, rows: Tensor, logits: Tensor) -> Tensor:
        """For `loss_dtype`: the weights may be of another dtype than the products."""
        row, loss = torch.ones_like(rows[:1]), log_sum_exp(logits)
        return loss if self.weight_fn is None else loss + self.weight_fn(row, row)


class DCLWLoss(DCLLoss):
    """`DCLLoss` with the weights `negative_mises_fisher_weights`: hard positives weigh more.

    Args:
        temperature: temperature τ > 0.
        sigma: σ > 0 of the weights.
        gather_distributed: as in `NTXentLoss`; each process weighs its own batch by itself.

    Raises:
        ValueError: as `DCLLoss`.

    Source: arXiv:2110.06848.
    """

    def __init__(
        self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False
    ) -> None:
        weight_fn = partial(negative_mises_fisher_weights, sigma=sigma)
        super().__init__(temperature, weight_fn, gather_distributed)

    def _last_operation(self, rows: Tensor, logits: Tensor) -> Tensor:
        return log_sum_exp(logits)  # the package's weights have the dtype of its products


class MACLLoss(nn.Module):
    """Model-aware contrastive loss: the temperature follows the alignment of the batch.

    Args:
        temperature: τ_0 ≥ 1e-8.
        alpha: α in [0, 1], how far the temperature follows.
        A_0: initial alignment in [0, 1].

    Raises:
        ValueError: an argument is out of range.

    Source: arXiv:2207.07874.
    """

    def __init__(self, temperature: float = 0.1, alpha: float = 0.5, A_0: float = 0.0) -> None:
        super().__init__()
        if not temperature >= _EPS:
            raise ValueError(f"temperature must be ≥ 1e-8, got {temperature}")
        for name, value in (("alpha", alpha), ("A_0", A_0)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        self.temperature, self.alpha, self.A_0, self.eps = temperature, alpha, A_0, _EPS

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            z0: (N, D) first view, normalised here; any floating dtype of the backends.
            z1: (N, D) second view.

        Returns:
            (), the mean over both views.

        Raises:
            TypeError, ValueError: bad embeddings.
        """
        z0, z1 = of_one_dtype(z0, z1)
        check_pair("z0", z0, "z1", z1, None)
        loss = macl(
            z0,
            z1,
            temperature=self.temperature,
            alpha=self.alpha,
            initial_alignment=self.A_0,
            eps=self.eps,
        )
        return loss.to(loss_dtype(z0.dtype, z0.device, log_sum_exp))
