"""Batch normalisation over the batches of all ranks."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .process_context import ProcessContext, sum_over_ranks


def synchronised(net: nn.Module, context: ProcessContext, device: torch.device) -> nn.Module:
    """Let every batch normalisation of ``net`` see the batches of all ranks.

    Weights and statistics keep their names, so that one process can load what several trained.
    torch's layer serves accelerators only; :class:`SyncBatchNorm` stands in for it on a CPU.

    Args:
        net: network on ``device``, changed in place.
        context: the ranks; a single one leaves the network as it is.
        device: device of the network.
    """
    if context.size == 1:
        return net
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in [*net.modules()]:
        for name, layer in module.named_children():
            if isinstance(layer, _BatchNorm):
                setattr(module, name, SyncBatchNorm(layer, context))
    return net


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation that takes its training statistics over the rows of all ranks.

    Args:
        layer: layer of one process, whose weights and statistics are taken over.
        context: the ranks.
    """

    def __init__(self, layer: _BatchNorm, context: ProcessContext):
        kept = layer.track_running_stats
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine, kept)
        self.weight, self.bias, self.context = layer.weight, layer.bias, context
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.num_batches_tracked = layer.num_batches_tracked

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"input must have at least two dimensions, got {tuple(x.shape)}")

    @torch.compiler.disable  # exchanges messages
    def forward(self, x: Tensor) -> Tensor:
        """Normalise (n, C, …) over all but C, in float32 for rows of lower precision."""
        if not self.training:
            return super().forward(x)
        over, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        wide = x if x.dtype == torch.float64 else x.float()
        ones = wide.new_full((1,), x.numel() / x.shape[1])
        sums = sum_over_ranks(torch.cat([wide.sum(over), ones]), self.context)
        rows = sums[-1].detach()
        mean = sums[:-1] / rows
        # A second exchange: E[x²] − E[x]² would cancel.
        centred = wide - mean.view(shape)
        var = sum_over_ranks(centred.square().sum(over), self.context) / rows
        if self.track_running_stats:
            self._note(mean.detach(), var.detach() * rows / (rows - 1).clamp(min=1))
        y = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    @torch.no_grad()
    def _note(self, mean: Tensor, var: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
