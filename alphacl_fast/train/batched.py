"""Random views of many images at once, in tensor operations on the device that holds them.

The recipe is that of `augment` for colour images up to 64 pixels: a crop of random area and shape resized with bilinear
interpolation, a flip, brightness, contrast, saturation and hue in random order, grayscale; each image has its own numbers.
They are a hash of (seed, epoch, index of the image, view), so neither the batch, nor the number of processes, nor the moment
of a stop matters. They are not the numbers of `augment`: the two give different views of the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as V

from .config import Config, RunError
from .data import mix, steps_of

TRIES = 10  # crops drawn until one fits into the image, as torchvision's RandomResizedCrop does
NUMBERS = 4 * TRIES + 11  # random numbers of a view


def images_on(device: torch.device, images: Dataset, size: int) -> Tensor:
    """All images of a data set as uint8 (n, 3, H, W) on a device.

    Raises RunError unless they are colour, of one shape and not larger than ``size``: crops are enlarged, never reduced, for
    which bilinear interpolation would have to average.
    """
    tensors = [V.pil_to_tensor(images[k][0]) for k in range(len(images))]
    shapes = {tuple(x.shape) for x in tensors}
    if len(shapes) > 1 or next(iter(shapes))[0] != 3 or max(next(iter(shapes))[1:]) > size:
        raise RunError(f"--augment device needs colour images of one shape and at most --image-size {size}, got the shapes "
                       f"{', '.join(map(str, sorted(shapes)[:3]))}")
    return torch.stack(tensors).to(device)


def training_batches(
    images: Tensor, config: Config, start: int, stop: int, share: Callable[[list], list] = lambda keys: keys
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """As `data.training_batches`, from images that are on the device already."""
    for keys in steps_of(len(images), config, start, stop):
        epoch, indices = keys[0][0], torch.tensor([index for _, index in share(keys)], device=images.device)
        yield [
            tuple(views(images[part], uniform(mix(config.seed, epoch, view), part), config.image_size) for view in range(2))
            for part in indices.split(config.micro_batch or len(indices))
        ]


def uniform(seed: int, indices: Tensor) -> Tensor:
    """(n,) → (n, NUMBERS) float32 in [0, 1): splitmix64 of a seed, an index and the number's place."""
    place = torch.arange(NUMBERS, device=indices.device)
    z = (indices[:, None] * NUMBERS + place + 1) * _signed(0x9E3779B97F4A7C15) + seed
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return _shifted(z ^ _shifted(z, 31), 40).to(torch.float32) / 2**24


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Of the 64 bits without a sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def views(images: Tensor, u: Tensor, size: int) -> Tensor:
    """uint8 (n, 3, H, W) and random numbers (n, NUMBERS) → uint8 (n, 3, size, size)."""
    boxes = crop_boxes(u[:, : 4 * TRIES], *images.shape[2:])
    flip, apply, gray = u[:, 4 * TRIES : 4 * TRIES + 3, None, None, None].unbind(1)
    order, strength = u[:, 4 * TRIES + 3 :].split(4, 1)
    x = resized_crops(images.to(torch.float32) / 255, boxes, size)
    x = torch.where(flip < 0.5, x.flip(3), x)
    x = torch.where(apply < 0.8, jitter(x, order.argsort(1), strength), x)
    x = torch.where(gray < 0.2, grayscale(x), x)
    return (x * 255).round().to(torch.uint8)


def crop_boxes(u: Tensor, height: int, width: int) -> Tensor:
    """(n, 4·TRIES) → (n, 4) top, left, height, width of a crop: area 8 to 100 %, shape 3:4 to 4:3, else the whole image."""
    area, shape, row, column = u.view(len(u), 4, TRIES).unbind(1)
    area = (0.08 + 0.92 * area) * height * width
    shape = ((2 * shape - 1) * math.log(4 / 3)).exp()
    w, h = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    tried = torch.stack([(row * (height - h + 1)).floor(), (column * (width - w + 1)).floor(), h, w], 2)
    first = fits.to(torch.uint8).argmax(1)
    chosen = tried[torch.arange(len(u), device=u.device), first]
    return torch.where(fits.any(1, keepdim=True), chosen, chosen.new_tensor([0, 0, height, width]))


def resized_crops(x: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Each image's box (top, left, height, width), resized to a square by bilinear interpolation."""
    top, left, h, w = boxes[:, :, None].unbind(1)  # (n, 1) each
    centers = (torch.arange(size, device=x.device) + 0.5) / size
    # A pixel outside the crop is never looked at: coordinates stop at the centres of its outermost pixels.
    rows = top + (centers * h - 0.5).clamp(min=0).minimum(h - 1)
    columns = left + (centers * w - 0.5).clamp(min=0).minimum(w - 1)
    y = (2 * rows + 1) / x.shape[2] - 1
    z = (2 * columns + 1) / x.shape[3] - 1
    grid = torch.stack([z[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], 3)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def grayscale(x: Tensor) -> Tensor:
    weights = x.new_tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)
    return (x * weights).sum(1, keepdim=True).expand_as(x)


def jitter(x: Tensor, order: Tensor, strength: Tensor) -> Tensor:
    """Brightness, contrast, saturation (.4) and hue (.1) of each image, in its own order (n, 4), numbers (n, 4) in [0, 1)."""
    factors = 1 + 0.4 * (2 * strength[:, :3] - 1)
    shift = 0.1 * (2 * strength[:, 3, None, None] - 1)
    for turn in range(4):
        which = order[:, turn, None, None, None]
        now = grayscale(x)
        # Each of the first three blends with black, with the mean gray, or with the gray image: one operation.
        base = torch.where(which == 0, 0.0, torch.where(which == 1, now.mean((1, 2, 3), keepdim=True), now))
        factor = factors.gather(1, which.clamp(max=2).view(-1, 1)).view(-1, 1, 1, 1)
        blended = (factor * x + (1 - factor) * base).clamp(0, 1)
        x = torch.where(which == 3, turned_hue(x, shift), blended)
    return x


def turned_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Hue moved by a part of the circle, (n, 1, 1) each."""
    r, g, b = x.unbind(1)
    largest, smallest = x.amax(1), x.amin(1)
    span = largest - smallest
    safe = torch.where(span > 0, span, 1.0)
    hue = torch.where(largest == r, (g - b) / safe, torch.where(largest == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = hue / 6 + shift
    # RGB of a hue at full saturation, as three tents of height 1, pulled towards white and down to the value.
    tents = torch.stack([((hue + offset) % 1 * 6 - 3).abs() for offset in (0, 2 / 3, 1 / 3)], 1).sub(1).clamp(0, 1)
    return (largest - span).unsqueeze(1) + span.unsqueeze(1) * tents
