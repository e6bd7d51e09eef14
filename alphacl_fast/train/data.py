"""Data sets, and batches whose order and randomness are functions of (seed, epoch, index) alone.

So a run can stop after any step and go on later, with any number of loader processes, and see the same images.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torchvision import datasets

from .augment import Seeded
from .config import Config, RunError

CHANNELS = {"digits": 1, "cifar10": 3, "cifar100": 3, "stl10": 3, "imagefolder": 3, "fake": 3}
# Mean and standard deviation of each channel, pixels in [0, 1].
STATISTICS = {
    "digits": ((0.305,), (0.376,)),
    "cifar10": ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
    "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
    "stl10": ((0.447, 0.440, 0.407), (0.260, 0.257, 0.271)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "fake": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass
class Data:
    """Map-style data sets of (PIL image, label): ``views`` for training, ``train`` and ``test`` for evaluation."""

    views: Dataset
    train: Dataset
    test: Dataset
    classes: list[str]


def load(config: Config) -> Data:
    """Open the data set of ``config``. Raises RunError if it is missing, broken or too small."""
    try:
        data = _OPEN[config.dataset](config)
    except RunError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        hint = " (--download fetches it)" if config.dataset in ("cifar10", "cifar100", "stl10") else ""
        reason = " ".join(str(error).split())
        raise RunError(f"cannot open {config.dataset} in {config.data_root}{hint}: {reason}") from error
    if config.subset:
        same = data.train is data.views
        data.views = _subset(data.views, config.subset)
        data.train = data.views if same else data.train
    if len(data.views) < config.batch_size:
        raise RunError(f"--batch-size must not exceed the {len(data.views)} training images, got {config.batch_size}")
    return data


class Arrays(Dataset):
    """Images held in memory: uint8 ``images`` (n, H, W), int ``labels`` (n,)."""

    def __init__(self, images, labels):
        self.images, self.targets = images, labels.tolist()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]), self.targets[index]


def _digits(config: Config) -> Data:
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    train_x, test_x, train_y, test_y = train_test_split(images, digits.target, test_size=500, random_state=0,
                                                        stratify=digits.target)
    train = Arrays(train_x, train_y)
    return Data(train, train, Arrays(test_x, test_y), [str(name) for name in digits.target_names])


def _cifar(config: Config) -> Data:
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[config.dataset]
    train = kind(config.data_root, train=True, download=config.download)
    return Data(train, train, kind(config.data_root, train=False, download=config.download), train.classes)


def _stl10(config: Config) -> Data:
    views, train, test = (datasets.STL10(config.data_root, split, download=config.download)
                          for split in ("train+unlabeled", "train", "test"))
    views.targets, train.targets = views.labels.tolist(), train.labels.tolist()
    return Data(views, train, test, train.classes)


def _imagefolder(config: Config) -> Data:
    root = Path(config.data_root)
    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise RunError(f"--data-root {root} must hold the folders train and test (or val) with one folder per class")
    train, test = (datasets.ImageFolder(folder, loader=_open_image) for folder in (root / "train", tests[0]))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise RunError(f"{root / 'train'} and {tests[0]} must hold the same classes, but differ in {', '.join(odd)}")
    return Data(train, train, test, train.classes)


def _fake(config: Config) -> Data:
    def fake(size, offset):
        images = datasets.FakeData(size, (3, config.image_size, config.image_size), 10, random_offset=offset)
        images.targets = [int(images[index][1]) for index in range(size)] if config.subset else None
        return images

    train = fake(1024, 0)
    return Data(train, train, fake(256, 1024), [str(name) for name in range(10)])


_OPEN = {"digits": _digits, "cifar10": _cifar, "cifar100": _cifar, "stl10": _stl10, "imagefolder": _imagefolder,
         "fake": _fake}


def _open_image(path: str) -> Image.Image:
    try:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")
    except Exception as error:  # Pillow's decoders raise a dozen unrelated kinds
        raise RunError(f"cannot read image {path} ({type(error).__name__})") from error


def _subset(dataset: Dataset, size: int) -> Subset:
    """The first ``size`` images when each class, shuffled with a fixed seed, gives one image in turn."""
    if size > len(dataset):
        raise RunError(f"--subset must not exceed the {len(dataset)} training images, got {size}")
    labels = torch.tensor(dataset.targets)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    turn = torch.empty(len(labels), dtype=torch.long)
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        turn[members] = torch.arange(len(members))
    order = shuffled[turn[shuffled].argsort(stable=True)][:size]
    return Subset(dataset, order.sort().values.tolist())


def mix(*numbers: int) -> int:
    """A well-spread 63-bit seed from a few integers."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class _TwoViews(Dataset):
    """Key (epoch, index) -> two views, uint8 (C, H, W) each; or the RunError of an unreadable image."""

    def __init__(self, images: Dataset, augment, seed: int):
        self.images, self.augment, self.seed = images, augment, seed

    def __getitem__(self, key):
        epoch, index = key
        try:
            image, _ = self.images[index]
        except RunError as error:
            return error
        with Seeded(mix(self.seed, epoch, index)):
            return self.augment(image), self.augment(image)


class _OneView(Dataset):
    """Index -> (uint8 (C, H, W), label), or the RunError of an unreadable image."""

    def __init__(self, images: Dataset, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        try:
            image, label = self.images[index]
        except RunError as error:
            return error
        return self.transform(image), label


class _Steps:
    """Batch sampler: the keys of every step from ``start`` to ``stop``, counted over all epochs."""

    def __init__(self, size: int, batch_size: int, seed: int, start: int, stop: int):
        self.size, self.batch_size, self.seed, self.start, self.stop = size, batch_size, seed, start, stop

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        per_epoch, drawn = self.size // self.batch_size, None
        for step in range(self.start, self.stop):
            epoch, place = divmod(step, per_epoch)
            if epoch != drawn:
                generator = torch.Generator().manual_seed(mix(self.seed, epoch))
                order, drawn = torch.randperm(self.size, generator=generator).tolist(), epoch
            yield [(epoch, index) for index in order[place * self.batch_size : (place + 1) * self.batch_size]]


def steps_of(size: int, config: Config, start: int, stop: int) -> _Steps:
    """Lists of (epoch, index): the images of the steps from ``start`` to ``stop`` of a run with so many images."""
    return _Steps(size, config.batch_size, config.seed, start, stop)


class _Parts:
    """Batch sampler: this process's share of every step's keys, in micro-batches."""

    def __init__(self, steps: _Steps, share: Callable[[list], list], size: int):
        self.steps, self.share, self.size = steps, share, size

    def __iter__(self):
        for keys in self.steps:
            keys = self.share(keys)
            yield from (keys[k : k + self.size] for k in range(0, len(keys), self.size))


def training_batches(images: Dataset, augment, config: Config, start: int, stop: int, pin: bool,
                     share: Callable[[list], list] = lambda keys: keys) -> Iterator:
    """Micro-batches [(x1, x2), …], uint8 (n, C, H, W) each, of every step from ``start`` to ``stop``.

    An epoch's last partial batch is dropped. ``share`` picks a process's part of a step's images. Raises RunError, naming
    the file, at the step that holds an unreadable image.
    """
    steps = steps_of(len(images), config, start, stop)
    mine = len(share(list(range(config.batch_size))))
    size = config.micro_batch or mine
    batches = _batches(_TwoViews(images, augment, config.seed), config.workers, pin, batch_sampler=_Parts(steps, share, size))
    while parts := list(itertools.islice(batches, -(-mine // size))):
        yield parts


def plain_batches(images: Dataset, transform, workers: int, pin: bool, batch_size: int = 256) -> Iterator:
    """Batches (x, labels), uint8 (n, C, H, W) and (n,), of all ``images`` in order. Raises RunError as above."""
    return _batches(_OneView(images, transform), workers, pin, batch_size=batch_size)


def _batches(dataset, workers, pin, **sampling) -> Iterator:
    workers = min(4, os.cpu_count() or 1) if workers == -1 else workers
    loader = DataLoader(dataset, num_workers=workers, pin_memory=pin, collate_fn=_collate,
                        worker_init_fn=_ignore_signals, generator=torch.Generator(), **sampling)
    for batch in loader:
        if isinstance(batch, RunError):
            raise batch
        yield batch


def _collate(samples):
    """An error travels to the main process as a value: raised in a worker it would arrive with a traceback as text."""
    return next((sample for sample in samples if isinstance(sample, RunError)), None) or default_collate(samples)


def _ignore_signals(_worker: int) -> None:
    """Ctrl-C reaches the whole process group; the main process alone decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
