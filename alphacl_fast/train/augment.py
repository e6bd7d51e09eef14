"""Random views of one image: PIL in, uint8 tensor out. The encoder normalises, once per batch."""

from contextlib import contextmanager

import torch
from torchvision.transforms import InterpolationMode, v2


def augmentation(dataset: str, size: int) -> v2.Compose:
    """Build the random augmentation: PIL image -> uint8 tensor (C, size, size).

    Colour images up to 64 pixels use the α-CL authors' CIFAR recipe, larger ones their STL-10
    recipe. Digits are not flipped (a mirrored 2 is not a digit); they are slightly rotated,
    sheared, shifted, scaled and changed in contrast.
    """
    if dataset == "digits":
        affine = v2.RandomAffine(
            degrees=15,
            translate=(0.12, 0.12),
            scale=(0.8, 1.2),
            shear=15,
            interpolation=InterpolationMode.BILINEAR,
        )
        views = [v2.Resize(size), affine, v2.ColorJitter(brightness=0.4, contrast=0.4)]
    else:
        strength = 0.4 if size <= 64 else 0.8
        jitter = v2.ColorJitter(strength, strength, strength, strength / 4)
        views = [
            v2.RandomResizedCrop(size, scale=(0.08, 1)),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([jitter], 0.8),
            v2.RandomGrayscale(0.2),
        ]
        if size > 64:
            views.append(v2.GaussianBlur(9, sigma=(0.1, 2)))
    return v2.Compose([*views, v2.PILToTensor()])


def plain(size: int) -> v2.Compose:
    """Build the deterministic evaluation view: PIL image -> uint8 tensor (C, size, size)."""
    return v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])


@contextmanager
def seeded(seed: int):
    """Seed torch's CPU generator inside, and restore its state on exit."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
