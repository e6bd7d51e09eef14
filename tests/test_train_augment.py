"""The loader's views of colour images are torchvision's, bit for bit."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import FakeData
from torchvision.transforms import v2

from alphacl_fast.train import Config, data
from alphacl_fast.train.augment import ColourViews, augmentation, seeded

SEEDS = 60


def torchvision_s(size):
    strength = 0.4 if size <= 64 else 0.8
    jitter = v2.ColorJitter(strength, strength, strength, strength / 4)
    views = [
        v2.RandomResizedCrop(size, scale=(0.08, 1)),
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([jitter], 0.8),
        v2.RandomGrayscale(0.2),
        *([v2.GaussianBlur(9, sigma=(0.1, 2))] if size > 64 else []),
        v2.PILToTensor(),
    ]
    return v2.Compose(views)


def picture(width, height, kind="noise"):
    generator = np.random.default_rng(width * height)
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "grey":  # no hue, and a maximum that several channels share
        pixels[:] = pixels[:, :, :1]
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("size", "width", "height", "kind"), [
    (32, 32, 32, "noise"),
    (32, 32, 32, "grey"),
    (24, 40, 17, "noise"),
    (48, 9, 64, "noise"),
    (72, 96, 96, "noise"),
])  # fmt: skip
def test_views_are_torchvision_s(size, width, height, kind):
    ours, theirs = augmentation("cifar10", size), torchvision_s(size)
    image = picture(width, height, kind)
    different = 0
    for seed in range(SEEDS):
        with seeded(seed):
            view, after = ours(image), torch.rand(1)
        with seeded(seed):
            expected, expected_after = theirs(image), torch.rand(1)
        assert torch.equal(view, expected), seed
        assert torch.equal(after, expected_after), seed
        assert view.is_contiguous()
        different += not torch.equal(view, ours(image))
    assert different > SEEDS // 2


@pytest.mark.parametrize(("width", "height"), [(1, 40), (40, 1), (3, 200), (200, 3), (1, 1)])
def test_the_middle_of_an_image_that_no_crop_fits(width, height):
    """Where torchvision gives up too, after as many tries."""
    crop = v2.RandomResizedCrop(8, scale=(0.08, 1))
    boxes = ColourViews(8).box
    for seed in range(SEEDS):
        with seeded(seed):
            left, top, right, bottom = boxes(width, height)
        with seeded(seed):
            expected = crop.make_params([Image.new("RGB", (width, height))])
        found = {"top": top, "left": left, "height": bottom - top, "width": right - left}
        assert found == expected, seed


def test_fake_images_are_torchvision_s():
    config = Config.create(dataset="fake", image_size=12, batch_size=32)
    found = data.load(config)
    for images, offset in ((found.views, 0), (found.test, 1024)):
        expected = FakeData(len(images), (3, 12, 12), 10, random_offset=offset)
        for number in (0, 7, len(images) - 1):
            (image, label), (other, same) = images[number], expected[number]
            assert np.array_equal(image, other)
            assert label == same
        with pytest.raises(IndexError):
            images[len(images)]
    assert data.labels_of(found.test) == [label for _, label in found.test]
