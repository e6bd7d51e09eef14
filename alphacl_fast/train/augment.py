"""Random views of one image: PIL in, uint8 tensor out. The encoder normalises, once per batch."""

import math
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling, Transpose
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2


def augmentation(dataset: str, size: int) -> Callable[[Image.Image], Tensor]:
    """Build the random augmentation: PIL image -> uint8 tensor (C, size, size).

    Colour images up to 64 pixels use the α-CL authors' CIFAR recipe, larger ones their STL-10
    recipe, with stronger jitter and a blur. Digits are not flipped (a mirrored 2 is not a digit);
    they are slightly rotated, sheared, shifted, scaled and changed in contrast.
    """
    if dataset == "digits":
        affine = v2.RandomAffine(
            degrees=15,
            translate=(0.12, 0.12),
            scale=(0.8, 1.2),
            shear=15,
            interpolation=InterpolationMode.BILINEAR,
        )
        jitter = v2.ColorJitter(brightness=0.4, contrast=0.4)
        return v2.Compose([v2.Resize(size), affine, jitter, v2.PILToTensor()])
    return ColourViews(size)


class ColourViews:
    """Map an RGB image to a random view: uint8 (3, size, size).

    The views are those of torchvision's transforms, bit for bit: the same numbers are drawn from
    torch's generator in the same order, and Pillow is called for the same operations. torchvision
    chooses a kernel by the type of its input at every operation, which takes longer than these
    operations on a small image.
    """

    AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
    TRIES = 10  # crops that may not fit into the image before its middle is taken

    def __init__(self, size: int):
        self.size = size
        strength = 0.4 if size <= 64 else 0.8
        #: Ranges of the factors of brightness, contrast and saturation, and of the hue's shift.
        self.ranges = [(1 - strength, 1 + strength)] * 3 + [(-strength / 4, strength / 4)]
        self.log_ratio = torch.tensor(self.RATIO).log().tolist()
        self.blur = v2.GaussianBlur(9, sigma=(0.1, 2)) if size > 64 else None

    def __call__(self, image: Image.Image) -> Tensor:
        image = image.crop(self.box(image.width, image.height))
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Resampling.BILINEAR)
        if _happens(0.5):
            image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
        if _happens(0.8):
            image = self.jitter(image)
        if _happens(0.2):
            image = _grey(image)
        if self.blur:
            image = self.blur(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Draw a crop: left, top, right, bottom."""
        for _ in range(self.TRIES):
            area = width * height * _uniform(*self.AREA)
            ratio = torch.empty(1).uniform_(*self.log_ratio).exp().item()
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top, left = (int(torch.randint(0, n + 1, (1,))) for n in (height - h, width - w))
                return left, top, left + w, top + h
        low, high = self.RATIO
        w, h = min(width, round(height * high)), min(height, round(width / low))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def jitter(self, image: Image.Image) -> Image.Image:
        """Change brightness, contrast, saturation and hue in random order."""
        order = torch.randperm(4).tolist()
        factors = [_uniform(*limits) for limits in self.ranges]
        for number in order:
            image = _JITTERS[number](image, factors[number])
        return image


def _uniform(low: float, high: float) -> float:
    return torch.empty(1).uniform_(low, high).item()


def _happens(probability: float) -> bool:
    return torch.rand(1).item() < probability


def _grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def _brightness(image: Image.Image, factor: float) -> Image.Image:
    return Image.blend(Image.new("RGB", image.size), image, factor)


def _contrast(image: Image.Image, factor: float) -> Image.Image:
    mean = int(np.asarray(image.convert("L")).mean(dtype=np.float64) + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean,) * 3), image, factor)


def _saturation(image: Image.Image, factor: float) -> Image.Image:
    return Image.blend(_grey(image), image, factor)


def _hue(image: Image.Image, turns: float) -> Image.Image:
    pixels = np.array(image.convert("HSV"))
    pixels[..., 0] += np.uint8(int(turns * 255) % 256)  # rounded towards zero; wraps around
    return Image.frombuffer("HSV", image.size, pixels.tobytes(), "raw", "HSV", 0, 1).convert("RGB")


_JITTERS = (_brightness, _contrast, _saturation, _hue)


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
