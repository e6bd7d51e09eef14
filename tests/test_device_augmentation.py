"""Device augmentation agrees with torchvision, step by step and image by image; a run uses it."""

import itertools

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2
from training_runs import state_of

from alphacl_fast.train import Config, RunError, data, digit_augmentation, train
from alphacl_fast.train import device_augmentation as augmentation
from alphacl_fast.train.process_context import ProcessContext

V = v2.functional


def pictures(n=12, size=32, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_crops_are_those_of_torchvision():
    x, u = (
        pictures(40),
        torch.rand(40, augmentation.NUMBERS, generator=torch.Generator().manual_seed(1)),
    )
    boxes = augmentation.crop_boxes(u[:, : 4 * augmentation.TRIES], 32, 32)
    for size in (32, 48):
        ours = augmentation.resized_crops(x, boxes, size)
        for image, box, view in zip(x, boxes.long().tolist(), ours, strict=True):
            expected = V.resized_crop(
                image, *box, [size, size], InterpolationMode.BILINEAR, antialias=False
            )
            torch.testing.assert_close(view, expected, rtol=0, atol=3e-5)


def test_boxes_fit_and_have_torchvisions_distribution():
    n = 20_000
    boxes = augmentation.crop_boxes(
        augmentation.uniform(7, torch.arange(n))[:, : 4 * augmentation.TRIES], 32, 32
    )
    top, left, h, w = boxes.unbind(1)
    assert (boxes == boxes.round()).all()
    assert (top >= 0).all()
    assert (top + h <= 32).all()
    assert (left >= 0).all()
    assert (left + w <= 32).all()
    assert (h > 0).all()
    image = torch.zeros(3, 32, 32)
    crop = v2.RandomResizedCrop(32, scale=(0.08, 1))
    torch.manual_seed(0)
    drawn = [
        crop.make_params([image]) if hasattr(crop, "make_params") else crop._get_params([image])
        for _ in range(4000)
    ]
    theirs = torch.tensor(
        [[p["top"], p["left"], p["height"], p["width"]] for p in drawn], dtype=torch.float32
    )
    for ours, reference in zip(boxes.unbind(1), theirs.unbind(1), strict=True):
        error = (ours.var() / n + reference.var() / len(reference)).sqrt()
        assert abs(ours.mean() - reference.mean()) < 4 * error
        assert abs(ours.std() / reference.std() - 1) < 0.05


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))][::5])
def test_jitter_is_torchvisions(order):
    x = pictures()
    strength = torch.rand(len(x), 4, generator=torch.Generator().manual_seed(2))
    ours = augmentation.jitter(x, torch.tensor(order).expand(len(x), 4), strength)
    for image, numbers, view in zip(x, strength.tolist(), ours, strict=True):
        factors = [1 + 0.4 * (2 * number - 1) for number in numbers[:3]]
        expected = image
        for which in order:
            if which == 3:
                expected = V.adjust_hue(expected, 0.1 * (2 * numbers[3] - 1))
            else:
                adjust = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation)[which]
                expected = adjust(expected, factors[which])
        torch.testing.assert_close(view, expected, rtol=0, atol=2e-5)


def test_grayscale_and_gray_pixels():
    x = pictures()
    luma = augmentation.grayscale(x)
    torch.testing.assert_close(luma, V.rgb_to_grayscale(x, 1), rtol=0, atol=1e-6)
    gray = luma.expand_as(x)
    assert torch.equal(augmentation.turned_hue(gray, torch.full((len(x), 1, 1), 0.07)), gray)


def test_numbers_are_uniform_and_belong_to_seed_image_and_place():
    u = augmentation.uniform(3, torch.arange(20_000))
    assert u.shape == (20_000, augmentation.NUMBERS)
    assert (u >= 0).all()
    assert (u < 1).all()
    assert (u.mean(0) - 0.5).abs().max() < 4.5 * (1 / 12 / 20_000) ** 0.5
    assert (u.var(0) - 1 / 12).abs().max() < 0.003
    correlation = torch.corrcoef(u.t()) - torch.eye(augmentation.NUMBERS)
    assert correlation.abs().max() < 5 / 20_000**0.5
    assert torch.corrcoef(torch.stack([u[:-1, 0], u[1:, 0]]))[0, 1].abs() < 0.03
    assert torch.equal(augmentation.uniform(3, torch.tensor([70, 5])), u[[70, 5]])
    assert (augmentation.uniform(4, torch.arange(20_000)) == u).float().mean() < 1e-3


def test_views_do_not_depend_on_the_batch():
    images = (pictures(20) * 255).to(torch.uint8)
    u = augmentation.uniform(1, torch.arange(20))
    together = augmentation.views(images, u, 32)
    assert together.dtype == torch.uint8
    assert together.shape == images.shape
    for part in torch.arange(20).split(7):
        difference = augmentation.views(images[part], u[part], 32).int() - together[part].int()
        assert difference.abs().max() <= 1  # a rounding of the last bit, at most
    assert (together != images).flatten(1).any(1).all()
    gray = (together == together[:, :1]).flatten(1).all(1)
    assert 0 < gray.sum() < 12


FAKE = {
    "dataset": "fake",
    "image_size": 16,
    "width": 4,
    "batch_size": 256,
    "micro_batch": 100,
    "epochs": 1,
    "workers": 0,
    "augment": "device",
    "eval_every": 0,
    "save_every": 2,
}


def test_batches_go_on_anywhere_and_are_shared():
    config = Config.create(**FAKE)
    images = augmentation.images_on(torch.device("cpu"), data.load(config).views, 16)
    assert images.shape == (1024, 3, 16, 16)
    steps = list(augmentation.training_batches(images, config, 0, 8))
    assert [[len(x) for x, _ in parts] for parts in steps] == [[100, 100, 56]] * 8
    later = list(augmentation.training_batches(images, config, 5, 8))
    for ours, theirs in zip(later, steps[5:], strict=True):
        assert all(
            torch.equal(a[view], b[view])
            for a, b in zip(ours, theirs, strict=True)
            for view in range(2)
        )
    shares = [
        next(augmentation.training_batches(images, config, 0, 1, ProcessContext(rank, 3).share))
        for rank in range(3)
    ]
    for view in range(2):
        shared = torch.cat([part[view] for parts in shares for part in parts])
        whole = torch.cat([part[view] for part in steps[0]])
        assert (shared.int() - whole.int()).abs().max() <= 1
    first, second = steps[0][0]
    assert (first != second).flatten(1).any(1).all()


def test_a_run_with_views_made_on_the_device(tmp_path):
    train(Config.create(**FAKE), tmp_path / "run")
    state = state_of(tmp_path / "run")
    assert (state["step"], state["epoch"]) == (4, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"dataset": "digits", "image_size": 16},
            "--augment device is for colour images up to 64 pixels and digits of 8, got digits",
        ),
        (
            {"image_size": 96},
            "--augment device is for colour images up to 64 pixels and digits of 8, got fake of 96",
        ),
    ],
)
def test_unsuitable_data_sets(given, message):
    defaults = {"dataset": "fake", "augment": "device"}
    with pytest.raises(RunError, match=message):
        Config.create(**{**defaults, **given})


@pytest.mark.parametrize("brightness_first", [True, False])
def test_views_of_digits_are_those_of_pillow(brightness_first):
    """Image by image the affine map, brightness and contrast that `augment` draws, to 5 of 255.

    Pillow truncates to whole numbers after each of the three, and a change multiplies what was lost
    before it by up to 1.4: 1.4² + 1.4 + 1 < 5.
    """
    images = data.load(Config.create(dataset="digits")).views
    n = 120
    u = torch.rand(n, digit_augmentation.NUMBERS, generator=torch.Generator().manual_seed(3))
    u[:, 7] = 0.0 if brightness_first else 0.9
    x = augmentation.images_on(torch.device("cpu"), torch.utils.data.Subset(images, range(n)), 8)
    ours = augmentation.views(x, torch.cat([u, torch.zeros(n, 40)], 1), 8)
    assert ours.shape == (n, 1, 8, 8)
    moved = set()
    for k, numbers in enumerate(u.tolist()):
        angle, shear, right, down, light, contrast = (2 * number - 1 for number in numbers[:6])
        shift = [round(0.12 * 8 * right), round(0.12 * 8 * down)]
        moved.add(tuple(shift))
        view = V.affine(
            images[k][0], 15 * angle, shift, 0.8 + 0.4 * numbers[6], [15 * shear, 0.0],
            interpolation=InterpolationMode.BILINEAR,
        )  # fmt: skip
        changes = [(V.adjust_brightness, 1 + 0.4 * light), (V.adjust_contrast, 1 + 0.4 * contrast)]
        for change, factor in changes if brightness_first else reversed(changes):
            view = change(view, factor)
        assert (V.pil_to_tensor(view).int() - ours[k].int()).abs().max() <= 5, k
    assert len(moved) == 9


def test_a_run_on_digits_with_batched_views(tmp_path):
    config = Config.create(
        dataset="digits", augment="device", width=2, batch_size=64, subset=128, epochs=1, workers=0
    )
    train(config, tmp_path / "run")
    assert state_of(tmp_path / "run")["step"] == 2


def test_larger_images_are_refused():
    config = Config.create(**FAKE)
    with pytest.raises(RunError, match=r"at most --image-size 8, got the shapes \(3, 16, 16\)"):
        augmentation.images_on(torch.device("cpu"), data.load(config).views, 8)
