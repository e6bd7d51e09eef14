"""Batched random views of the digits, by tensor operations on their device.

The recipe equals `augment`'s for digits: a random affine map (bilinear), then brightness and
contrast in random order. Coordinates and borders are those of Pillow, which `augment` uses.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

NUMBERS = 8  # random numbers per view


def views(images: Tensor, u: Tensor) -> Tensor:
    """Augment uint8 (n, 1, H, W) with random numbers (n, NUMBERS) in [0, 1) to the same shape."""
    signed = 2 * u[:, :6] - 1
    angle, shear = (math.radians(15) * signed[:, k] for k in (0, 1))
    size = torch.tensor([images.shape[3], images.shape[2]], device=u.device)
    shift = (0.12 * size * signed[:, 2:4]).round()
    x = images.to(torch.float32) / 255
    x = mapped(x, inverse_maps(angle, shear, 0.8 + 0.4 * u[:, 6]), shift)
    brightness, contrast = (1 + 0.4 * signed[:, 4:6, None, None, None]).unbind(1)
    first = u[:, 7, None, None, None] < 0.5
    x = torch.where(first, changed_contrast((brightness * x).clamp(0, 1), contrast), x)
    x = torch.where(first, x, (brightness * changed_contrast(x, contrast)).clamp(0, 1))
    return (x * 255).round().to(torch.uint8)


def inverse_maps(angle: Tensor, shear: Tensor, scale: Tensor) -> Tensor:
    """Invert scale · rotation · shear of x: angles (n,) in radians and scales (n,) to (n, 2, 2)."""
    sin, cos, tan = angle.sin(), angle.cos(), shear.tan()
    rows = torch.stack([cos - sin * tan, sin + cos * tan, -sin, cos], 1)
    return rows.view(-1, 2, 2) / scale[:, None, None]


def mapped(x: Tensor, inverse: Tensor, shift: Tensor) -> Tensor:
    """Map images about their centre; what comes from outside is black.

    Args:
        x: float32 (n, 1, H, W).
        inverse: (n, 2, 2), from places of the result, (x, y), to places of the image.
        shift: (n, 2), in pixels, applied after the map.
    """
    sides = (x.shape[3], x.shape[2])
    half = torch.tensor([side / 2 for side in sides], device=x.device)
    columns, rows = (torch.arange(side, device=x.device) + 0.5 for side in sides)
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), 2)  # (H, W, 2)
    places = grid - half - shift[:, None, None]
    grid = torch.einsum("nij,nhwj->nhwi", inverse, places) / half  # from -1 to 1 within the image
    inside = ((grid >= -1) & (grid < 1)).all(3).unsqueeze(1)
    sampled = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled * inside


def changed_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend images in [0, 1] with their mean grey value; factors (n, 1, 1, 1)."""
    mean = (255 * x.mean((1, 2, 3), keepdim=True)).round() / 255
    return (factor * x + (1 - factor) * mean).clamp(0, 1)
