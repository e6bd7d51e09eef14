"""The optimizers of ``--optimizer``."""

import torch
from torch import nn

from .config import Config, RunError


def build_optimizer(config: Config, net: nn.Module, loss: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer; LARS and LAMB come from the package pytorch_optimizer.

    Args:
        config: its settings.
        net: network, whose weights decay.
        loss: loss, whose parameters do not.

    Raises:
        RunError: the package is missing.
    """
    groups = [
        {"params": trained(net), "weight_decay": config.weight_decay},
        {"params": trained(loss), "weight_decay": 0.0},
    ]
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
    try:
        from pytorch_optimizer import LARS, Lamb
    except ImportError as error:
        raise RunError(
            f"--optimizer {config.optimizer} needs pytorch_optimizer ({error}): "
            "pip install pytorch_optimizer"
        ) from error
    if config.optimizer == "lars":
        return LARS(groups, lr=config.lr, momentum=0.9)
    return Lamb(groups, lr=config.lr)


def trained(module: nn.Module) -> list[nn.Parameter]:
    """List the parameters of a module that have a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
