"""A drop-in replacement for ``SupConLoss`` of the paper's repository, HobbitLong/SupContrast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional
from ..bundles import accumulation_dtype
from ..supcon import supcon_loss
from .entry import class_ids, in_blocks
from .pairs import supcon_rows


class SupConLoss(nn.Module):
    """Supervised contrastive loss of features with several views, or SimCLR's without labels.

    Features are used as given: normalise them, as the repository's networks do.

    Args:
        temperature: temperature τ > 0.
        contrast_mode: "all" (every view is an anchor) or "one" (the first view alone is).
        base_temperature: the loss is multiplied by temperature/base_temperature.

    Raises:
        ValueError: another contrast_mode.

    Source: arXiv:2004.11362, L_out.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
    ) -> None:
        super().__init__()
        functional.one_of("contrast_mode", contrast_mode, ("all", "one"))
        self.temperature, self.base_temperature = temperature, base_temperature
        self.contrast_mode = contrast_mode

    def forward(
        self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the loss.

        An anchor without a positive counts as 0 in the mean over all anchors.

        Args:
            features: (B, views, …), flattened after the second dimension; any floating dtype of the
                backends.
            labels: (B,) or (B, 1), the classes. None: every sample is a class of its own.
            mask: (B, B) instead of labels; entry (i, j) is the weight of sample j as a positive of
                sample i, and need not be symmetric. The loss is then computed in blocks of rows.

        Returns:
            ().

        Raises:
            TypeError, ValueError: bad features, or labels or a mask that do not fit to them.
        """
        if features.dim() < 3:
            raise ValueError(f"features must have shape (B, views, …), got {tuple(features.shape)}")
        if labels is not None and mask is not None:
            raise ValueError("labels and mask must not both be given")
        features = features.flatten(2)
        n, views = features.shape[:2]
        rows = features.transpose(0, 1).flatten(0, 1)  # view by view
        anchors = len(rows) if self.contrast_mode == "all" else n
        if mask is not None:
            losses = self._of_mask(rows, _checked("mask", mask, (n, n), rows), views, anchors)
            return losses.mean() * (self.temperature / self.base_temperature)
        ids = torch.arange(n, device=rows.device)
        if labels is not None:
            (ids,) = class_ids(_checked("labels", labels.flatten(), (n,), rows))
        losses = supcon_loss(
            rows,
            ids.repeat(views),
            similarity="dot",
            temperature=self.temperature,
            reduction="sum" if anchors == len(rows) else "none",
        )
        total = losses if losses.dim() == 0 else losses[:anchors].sum()
        return total / anchors * (self.temperature / self.base_temperature)

    def _of_mask(self, rows: Tensor, mask: Tensor, views: int, anchors: int) -> Tensor:
        """(anchors,) losses."""
        functional.check_rows("features", rows, fewest=1)
        rows = rows.to(accumulation_dtype(rows.dtype))
        mask, places = mask.to(rows.dtype), torch.arange(len(rows), device=rows.device)

        def losses(block: slice) -> Tensor:
            mine = places[block]
            others = places != mine[:, None]
            positives = mask[mine % len(mask)].repeat(1, views) * others
            return supcon_rows(rows[block] @ rows.t() / self.temperature, positives, others)

        return in_blocks(losses, anchors, len(rows), rows.device)


def _checked(name: str, x: Tensor, shape: tuple[int, ...], rows: Tensor) -> Tensor:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    return x.to(rows.device)
