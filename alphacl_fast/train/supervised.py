"""Supervised contrastive learning: all images of a class are positives; ``--recipe supcon``.

Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv:2004.11362.
``--option form=in`` and ``form=sincere`` choose the other forms of `alphacl_fast.supcon_loss`.
"""

import torch
from torch import Tensor, nn

from alphacl_fast import SupConLoss

from .config import RunError
from .data import Data, labels_of
from .process_context import ProcessContext
from .recipe import Recipe, temperature_of


class Supervised(Recipe):
    """Two views of every image; the positives of a view are all others of its class."""

    indexed = True

    def __init__(self, data: Data, context: ProcessContext):
        super().__init__(data, context)
        self.labels = torch.tensor(labels_of(data.views))
        if unlabelled := int((self.labels < 0).sum()):
            raise RunError(
                f"--recipe supcon needs a label for every image, but {unlabelled} images of "
                f"{self.config.dataset} have none"
            )

    def build_loss(self) -> nn.Module:
        config = self.config

        def make() -> nn.Module:
            return SupConLoss(
                temperature=temperature_of(config, self.data.device),
                backend=config.backend,
                process_group="world" if self.context.size > 1 else None,
                **config.option,
            )

        return self.tried(make, lambda z: (z.flatten(0, 1), torch.arange(2 * z.shape[1]) // 4))

    def value(self, z1: Tensor, z2: Tensor, parts: list[tuple]) -> Tensor:
        labels = self.labels[torch.cat([part[-1] for part in parts])]
        labels = labels.to(self.data.device, non_blocking=True)
        return self.loss(torch.cat([z1, z2]), torch.cat([labels, labels]))
