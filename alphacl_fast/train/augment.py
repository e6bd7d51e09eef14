"""Random views of an image, PIL in and uint8 tensor out; the encoder does the normalisation, once per batch."""

from __future__ import annotations

import torch
from torchvision.transforms import InterpolationMode, v2


def augmentation(dataset: str, size: int) -> v2.Compose:
    """The random view of ``dataset`` at side ``size``: PIL image -> uint8 tensor (C, size, size).

    Colour images up to 64 pixels get the recipe the α-CL authors used on CIFAR, larger ones theirs for STL-10. Digits
    are not mirrored (a mirrored 2 is no digit) but turned, sheared, shifted, scaled and changed in contrast a little.
    """
    if dataset == "digits":
        moved = v2.RandomAffine(degrees=15, translate=(0.12, 0.12), scale=(0.8, 1.2), shear=15,
                                interpolation=InterpolationMode.BILINEAR)
        views = [v2.Resize(size), moved, v2.ColorJitter(brightness=0.4, contrast=0.4)]
    else:
        strength = 0.4 if size <= 64 else 0.8
        jitter = v2.ColorJitter(strength, strength, strength, strength / 4)
        views = [v2.RandomResizedCrop(size, scale=(0.08, 1)), v2.RandomHorizontalFlip(0.5),
                 v2.RandomApply([jitter], 0.8), v2.RandomGrayscale(0.2)]
        if size > 64:
            views.append(v2.GaussianBlur(9, sigma=(0.1, 2)))
    return v2.Compose([*views, v2.PILToTensor()])


def plain(size: int) -> v2.Compose:
    """The fixed view used for evaluation: PIL image -> uint8 tensor (C, size, size)."""
    return v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])


class Seeded:
    """Context manager: torch's CPU generator starts from ``seed`` inside and is as before afterwards."""

    def __init__(self, seed: int):
        self.seed = seed

    def __enter__(self):
        self.state = torch.get_rng_state()
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *_):
        torch.set_rng_state(self.state)
