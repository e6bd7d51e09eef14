"""Encoders and the projector. The encoder takes uint8 images, so normalisation travels with its weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from .config import Config
from .data import CHANNELS, STATISTICS


class Encoder(nn.Module):
    """Normalise, convolve, average ``cells`` x ``cells`` regions: uint8 (n, C, H, W) -> features (n, ``out_dim``)."""

    def __init__(self, body: nn.Module, planes: int, cells: int, mean: tuple, std: tuple):
        super().__init__()
        self.body, self.pool, self.out_dim = body, nn.AdaptiveAvgPool2d(cells), planes * cells**2
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images):
        x = (images - self.mean) / self.std
        return self.pool(self.body(x.contiguous(memory_format=torch.channels_last))).flatten(1)


class Net(nn.Module):
    """Encoder and projector: uint8 (n, C, H, W) -> embeddings (n, 128) for the loss."""

    def __init__(self, encoder: Encoder, norm: str = "batch", hidden: int = 512, out_dim: int = 128):
        super().__init__()
        self.encoder = encoder
        middle = nn.BatchNorm1d(hidden, affine=False) if norm == "batch" else nn.LayerNorm(hidden, elementwise_affine=False)
        self.projector = nn.Sequential(nn.Linear(encoder.out_dim, hidden), middle,
                                       nn.ReLU(inplace=True), nn.Linear(hidden, out_dim))

    def forward(self, images):
        return self.projector(self.encoder(images))


def build(config: Config) -> Net:
    """The network of ``config`` with the initial weights of its seed; the global generators are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        channels, norm = CHANNELS[config.dataset], {"batch": nn.BatchNorm2d, "group": _group_norm}[config.norm]
        if config.encoder == "small":
            body, planes = _small(channels, config.width, norm)
            cells = 2  # where a stroke is tells digits apart
        else:
            body, planes = _resnet(config.encoder, channels, config.width, norm,
                                   small_images=config.image_size <= 64)
            cells = 1
        net = Net(Encoder(body, planes, cells, *STATISTICS[config.dataset]), config.norm)
    return net.to(memory_format=torch.channels_last)


def _group_norm(planes: int) -> nn.GroupNorm:
    """Groups of about 16 channels (arXiv:1803.08494); an image's result does not depend on the others."""
    return nn.GroupNorm(math.gcd(planes, max(1, planes // 16)), planes)


def _small(channels: int, width: int, norm: Callable[[int], nn.Module]) -> tuple[nn.Module, int]:
    """Four 3x3 convolutions with two halvings: made for 8x8 digits."""
    layers = []
    for planes, stride in ((width, 1), (2 * width, 1), (4 * width, 2), (8 * width, 2)):
        layers += [nn.Conv2d(channels, planes, 3, stride, padding=1, bias=False), norm(planes), nn.ReLU(True)]
        channels = planes
    body = nn.Sequential(*layers)
    _initialise(body)
    return body, channels


def _resnet(
    name: str, channels: int, width: int, norm: Callable[[int], nn.Module], small_images: bool
) -> tuple[nn.Module, int]:
    """ResNet-18 or -50 of any width from torchvision's blocks, with the CIFAR stem (3x3, no pool) or the usual one."""
    block, depths = {"resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet50": (Bottleneck, (3, 4, 6, 3))}[name]
    if small_images:
        stem = [nn.Conv2d(channels, width, 3, padding=1, bias=False), norm(width), nn.ReLU(True)]
    else:
        stem = [nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False), norm(width), nn.ReLU(True),
                nn.MaxPool2d(3, stride=2, padding=1)]
    blocks, inside = [], width
    for stage, depth in enumerate(depths):
        planes = width * 2**stage
        for index in range(depth):
            stride = 2 if stage and index == 0 else 1
            outside, shortcut = planes * block.expansion, None
            if stride != 1 or inside != outside:
                shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), norm(outside))
            blocks.append(block(inside, planes, stride, shortcut, norm_layer=norm))
            inside = outside
    body = nn.Sequential(*stem, *blocks)
    _initialise(body)
    return body, inside


def _initialise(body: nn.Module) -> None:
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
