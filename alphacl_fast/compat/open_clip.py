"""In the place of ``open_clip.loss.ClipLoss``."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional import alpha_cl_loss


class ClipLoss(nn.Module):
    """CLIP's symmetric cross-entropy of features that are normalised already: (image, text, logit_scale) → ().

    Args:
        world_size: above 1, one batch over all processes, exact after DDP's averaging, whatever ``local_loss`` and
            ``gather_with_grad`` say: they choose approximations and memory, neither of which is needed here.
        cache_labels, rank, local_loss, gather_with_grad: accepted and without effect.
        use_horovod: must be False.

    Called with image_features, text_features (N, D) and logit_scale = 1/τ, a float or a tensor of one element, which receives
    its exact gradient. ``logit_bias`` cancels in a softmax and has no effect. ``output_dict=True`` returns
    {"contrastive_loss": loss}.

    Raises:
        ValueError: horovod asked for.

    Source: arXiv:2103.00020.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod must be False: processes meet through torch.distributed")
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size = rank, world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        loss = alpha_cl_loss(
            image_features, text_features, temperature=1 / logit_scale, similarity="dot", negatives="cross_view",
            process_group="world" if self.world_size > 1 else None,
        )  # fmt: skip
        return {"contrastive_loss": loss} if output_dict else loss
