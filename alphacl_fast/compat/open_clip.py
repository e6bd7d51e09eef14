"""A drop-in replacement for ``open_clip.loss.ClipLoss``."""

from torch import Tensor, nn

from ..functional import alpha_cl_loss


class ClipLoss(nn.Module):
    """CLIP's symmetric cross-entropy of normalised features.

    Args:
        local_loss: ignored: it saves memory that is not needed here.
        gather_with_grad: ignored: the gradient is always exact.
        cache_labels: ignored.
        rank: ignored.
        world_size: above 1, the negatives come from the batches of all processes; the gradient is
            exact after DDP's averaging.
        use_horovod: must be False.

    Raises:
        ValueError: horovod is requested.

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
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss.

        Args:
            image_features: (N, D), normalised rows.
            text_features: (N, D), normalised rows, same dtype.
            logit_scale: 1/τ, a float or a tensor of one element, which receives its exact gradient.
            logit_bias: ignored: a bias cancels in a softmax.
            output_dict: whether to return a dictionary.

        Returns:
            (), or {"contrastive_loss": ()}.
        """
        loss = alpha_cl_loss(
            image_features,
            text_features,
            temperature=1 / logit_scale,
            similarity="dot",
            negatives="cross_view",
            process_group="world" if self.world_size > 1 else None,
        )
        return {"contrastive_loss": loss} if output_dict else loss
