"""Encoders and the projector. The encoder takes uint8 images and normalises them itself."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from .config import Config
from .data import STATISTICS


class Encoder(nn.Module):
    """Map uint8 (n, C, H, W) to features (n, ``out_dim``).

    Args:
        body: convolutional network with ``planes`` output channels.
        planes: number of those channels.
        cells: side of the grid that average pooling leaves.
        mean, std: per-channel statistics, for pixels in [0, 1].
    """

    def __init__(self, body: nn.Module, planes: int, cells: int, mean: tuple, std: tuple):
        super().__init__()
        self.body, self.pool, self.out_dim = body, nn.AdaptiveAvgPool2d(cells), planes * cells**2
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images):
        x = (images - self.mean) / self.std
        return self.pool(self.body(x.contiguous(memory_format=torch.channels_last))).flatten(1)


class Net(nn.Module):
    """Encoder and projector: map uint8 (n, C, H, W) to embeddings (n, 128) for the loss."""

    def __init__(self, encoder: Encoder, norm: str, hidden: int = 512, out_dim: int = 128):
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Sequential(
            nn.Linear(encoder.out_dim, hidden),
            nn.BatchNorm1d(hidden, affine=False)
            if norm != "group"
            else nn.LayerNorm(hidden, elementwise_affine=False),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out_dim),
        )

    def forward(self, images):
        return self.projector(self.encoder(images))


def build(config: Config) -> Net:
    """Build the network with the initial weights of the config's seed.

    The global random generators are left untouched.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        mean, std = STATISTICS[config.dataset]
        norm = _group_norm if config.norm == "group" else nn.BatchNorm2d
        small = config.encoder == "small"
        body, planes = (_small if small else _resnet)(config, len(mean), norm)
        cells = 2 if small else 1  # digits differ in where their strokes are
        for module in body.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        net = Net(Encoder(body, planes, cells, mean, std), config.norm)
    return net.to(memory_format=torch.channels_last)


class _ThinProjection(nn.Conv2d):
    """Convolve with 1x1 only the pixels that the stride leaves.

    In the backward of the strided form with fewer than 8 channels, oneDNN (torch 2.11) writes
    outside its memory on CPUs with AVX2 alone.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        down, right = self.stride
        return nn.functional.conv2d(images[:, :, ::down, ::right], self.weight, self.bias)


def _group_norm(planes: int) -> nn.GroupNorm:
    """Normalise groups of about 16 channels within each image (arXiv:1803.08494)."""
    return nn.GroupNorm(math.gcd(planes, max(1, planes // 16)), planes)


Norm = Callable[[int], nn.Module]


def _small(config: Config, channels: int, norm: Norm) -> tuple[nn.Module, int]:
    """Build four 3x3 convolutions, two of them strided, for 8x8 digits; (network, channels)."""
    layers, width = [], config.width
    for planes, stride in ((width, 1), (2 * width, 1), (4 * width, 2), (8 * width, 2)):
        layers += [nn.Conv2d(channels, planes, 3, stride, padding=1, bias=False)]
        layers += [norm(planes), nn.ReLU(True)]
        channels = planes
    return nn.Sequential(*layers), channels


def _resnet(config: Config, channels: int, norm: Norm) -> tuple[nn.Module, int]:
    """Build ResNet-18 or -50 of any width from torchvision's blocks; (network, channels).

    Small images get the CIFAR stem (3x3, no pooling), larger ones the usual ImageNet stem.
    """
    block, depths = {
        "resnet18": (BasicBlock, (2, 2, 2, 2)),
        "resnet50": (Bottleneck, (3, 4, 6, 3)),
    }[config.encoder]
    width, small_images = config.width, config.image_size <= 64
    side, stride = (3, 1) if small_images else (7, 2)
    layers = [nn.Conv2d(channels, width, side, stride, padding=side // 2, bias=False)]
    layers += [norm(width), nn.ReLU(True)]
    if not small_images:
        layers.append(nn.MaxPool2d(3, stride=2, padding=1))
    inside = width
    for stage, depth in enumerate(depths):
        planes = width * 2**stage
        for index in range(depth):
            stride = 2 if stage and index == 0 else 1
            outside, shortcut = planes * block.expansion, None
            if stride != 1 or inside != outside:
                kind = _ThinProjection if inside < 8 else nn.Conv2d
                projection = kind(inside, outside, 1, stride, bias=False)
                shortcut = nn.Sequential(projection, norm(outside))
            layers.append(block(inside, planes, stride, shortcut, norm_layer=norm))
            inside = outside
    return nn.Sequential(*layers), inside
