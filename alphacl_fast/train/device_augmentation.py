"""Batched augmentation: random views of many images by tensor operations on their device.

The recipe equals `augment`'s for colour images up to 64 pixels: random resized crop (bilinear),
horizontal flip, colour jitter in random order, grayscale. Each image draws its own random numbers,
a hash of (seed, epoch, image index, view), so the views depend neither on the batch, nor on the
number of processes, nor on where a run was stopped. `augment` draws other numbers: the two give
different views from the same distribution. Grey images are digits: `digit_augmentation`.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as V

from . import digit_augmentation
from .config import Config, RunError
from .data import mix, steps_of

TRIES = 10  # as many crops as torchvision's RandomResizedCrop draws before it gives up
NUMBERS = 4 * TRIES + 11  # random numbers per view


def images_on(device: torch.device, images: Dataset, size: int) -> Tensor:
    """Load a data set onto the device as uint8 (n, 3, H, W), digits as (n, 1, H, W).

    Raises:
        RunError: the images differ in shape, or are larger than ``size``.
            Crops may only be enlarged: to shrink them, bilinear interpolation would need
            antialiasing.
    """
    tensors = [V.pil_to_tensor(images[k][0]) for k in range(len(images))]
    shapes = sorted({tuple(x.shape) for x in tensors})
    if len(shapes) > 1 or max(shapes[0][1:]) > size:
        raise RunError(
            f"--augment device needs images of one shape and at most --image-size {size}, "
            f"got the shapes {', '.join(map(str, shapes[:3]))}"
        )
    return torch.stack(tensors).to(device)


def training_batches(
    images: Tensor,
    config: Config,
    start: int,
    stop: int,
    share: Callable[[list], list] = lambda keys: keys,
    count: int = 2,
) -> Iterator[list[tuple[Tensor, ...]]]:
    """Yield what `data.training_batches` does, from images already on the device."""
    for keys in steps_of(len(images), config, start, stop):
        indices = torch.tensor([index for _, index in share(keys)], device=images.device)
        seeds = [mix(config.seed, keys[0][0], view) for view in range(count)]
        yield [
            tuple(views(images[part], uniform(seed, part), config.image_size) for seed in seeds)
            for part in indices.split(config.micro_batch or len(indices))
        ]


def uniform(seed: int, indices: Tensor) -> Tensor:
    """Hash (n,) indices to (n, NUMBERS) float32 in [0, 1): splitmix64 of seed, index, position."""
    place = torch.arange(NUMBERS, device=indices.device)
    z = (indices[:, None] * NUMBERS + place + 1) * _signed(0x9E3779B97F4A7C15) + seed
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return _shifted(z ^ _shifted(z, 31), 40).to(torch.float32) / 2**24


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift right as unsigned 64-bit integers."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def views(images: Tensor, u: Tensor, size: int) -> Tensor:
    """Augment uint8 (n, 3, H, W) with random numbers (n, NUMBERS) to uint8 (n, 3, size, size).

    Digits (n, 1, size, size) keep their shape.
    """
    if images.shape[1] == 1:
        return digit_augmentation.views(images, u[:, : digit_augmentation.NUMBERS])
    boxes = crop_boxes(u[:, : 4 * TRIES], *images.shape[2:])
    flip, apply, gray = u[:, 4 * TRIES : 4 * TRIES + 3, None, None, None].unbind(1)
    order, strength = u[:, 4 * TRIES + 3 :].split(4, 1)
    x = resized_crops(images.to(torch.float32) / 255, boxes, size)
    x = torch.where(flip < 0.5, x.flip(3), x)
    x = torch.where(apply < 0.8, jitter(x, order.argsort(1), strength), x)
    x = torch.where(gray < 0.2, grayscale(x), x)
    return (x * 255).round().to(torch.uint8)


def crop_boxes(u: Tensor, height: int, width: int) -> Tensor:
    """Choose crops: random numbers (n, 4·TRIES) → (n, 4) top, left, height, width.

    The area is 8 to 100 %, the aspect ratio 3:4 to 4:3; the whole image if no try fits.
    """
    area, shape, row, column = u.view(len(u), 4, TRIES).unbind(1)
    area = (0.08 + 0.92 * area) * height * width
    shape = ((2 * shape - 1) * math.log(4 / 3)).exp()
    w, h = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    tried = torch.stack(
        [(row * (height - h + 1)).floor(), (column * (width - w + 1)).floor(), h, w], 2
    )
    first = fits.to(torch.uint8).argmax(1)
    chosen = tried[torch.arange(len(u), device=u.device), first]
    return torch.where(fits.any(1, keepdim=True), chosen, chosen.new_tensor([0, 0, height, width]))


def resized_crops(x: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Resize each image's box (top, left, height, width) to a square, bilinearly."""
    top, left, h, w = boxes[:, :, None].unbind(1)  # (n, 1) each
    centers = (torch.arange(size, device=x.device) + 0.5) / size
    # Coordinates are clamped to the centres of the crop's outermost pixels, so that no pixel
    # outside the crop is read.
    rows = top + (centers * h - 0.5).clamp(min=0).minimum(h - 1)
    columns = left + (centers * w - 0.5).clamp(min=0).minimum(w - 1)
    y = (2 * rows + 1) / x.shape[2] - 1
    z = (2 * columns + 1) / x.shape[3] - 1
    grid = torch.stack([z[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], 3)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def grayscale(x: Tensor) -> Tensor:
    """Return the luma (n, 1, H, W) of RGB images (n, 3, H, W)."""
    r, g, b = x.split(1, 1)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


def jitter(x: Tensor, order: Tensor, strength: Tensor) -> Tensor:
    """Jitter brightness, contrast, saturation (±0.4) and hue (±0.1).

    The hue, which costs most, turns once for all images: each image's blends before its own turn of
    the hue come first, and then those after it.

    Args:
        x: float32 (n, 3, H, W) in [0, 1].
        order: (n, 4), each image's own permutation of the four operations.
        strength: (n, 4) random numbers in [0, 1), one per operation.
    """
    factors = 1 + 0.4 * (2 * strength[:, :3] - 1)
    shift = 0.1 * (2 * strength[:, 3, None, None] - 1)
    turn_of_hue = (order == 3).to(torch.uint8).argmax(1)
    for turn in range(3):
        x = blended(x, order[:, turn], factors, turn < turn_of_hue)
    x = turned_hue(x, shift)
    for turn in range(1, 4):
        x = blended(x, order[:, turn], factors, turn > turn_of_hue)
    return x


def blended(x: Tensor, which: Tensor, factors: Tensor, active: Tensor) -> Tensor:
    """Blend each image with black (0: brightness), its mean grey (1: contrast) or its grey image
    (2: saturation); images that are not ``active`` stay as they are.

    Args:
        x: float32 (n, 3, H, W) in [0, 1].
        which: (n,), the operation of each image.
        factors: (n, 3), the image's weight in each operation.
        active: bool (n,).
    """
    own = factors.gather(1, which.clamp(max=2)[:, None]).where(active[:, None], 1.0)
    other = torch.stack([1 - own] * 2) * torch.stack([which == 1, which == 2])[..., None]
    own, of_mean, of_grey = (weight[:, :, None, None] for weight in (own, *other))
    grey = grayscale(x)
    base = (of_grey * grey).add_(of_mean * grey.mean((1, 2, 3), keepdim=True))
    return (own * x).add_(base).clamp_(0, 1)


def turned_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue by ``shift`` (n, 1, 1), in turns."""
    r, g, b = x.unbind(1)
    largest = torch.maximum(r, g).maximum(b)
    smallest = torch.minimum(r, g).minimum(b)
    span = largest - smallest
    safe = span.where(span > 0, 1.0)
    not_red = torch.where(largest == g, (b - r).div_(safe).add_(2), (r - g).div_(safe).add_(4))
    hue = (g - b).div_(safe).where(largest == r, not_red).div_(6).add_(shift)
    # A hue's RGB at full saturation is three tent functions; scale them by the chroma and shift.
    tents = torch.stack([hue, hue + 2 / 3, hue + 1 / 3], 1)
    tents.sub_(tents.floor()).mul_(6).sub_(3).abs_().sub_(1).clamp_(0, 1)
    return tents.mul_(span.unsqueeze(1)).add_(smallest.unsqueeze(1))
