"""Data sets, and batches whose order and randomness depend on (seed, epoch, index) alone.

A run can therefore stop after any step and resume later, with any number of loader processes, and
still see the same images.
"""

import hashlib
import itertools
import os
import signal
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torchvision import datasets

from .augment import seeded
from .config import Config, RunError

# Mean and standard deviation of each channel, for pixels in [0, 1].
STATISTICS = {
    "digits": ((0.305,), (0.376,)),
    "cifar10": ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
    "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
    "stl10": ((0.447, 0.440, 0.407), (0.260, 0.257, 0.271)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "captions": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "fake": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


#: Files of ``--dataset captions``, with lines "image<tab>caption".
TRAIN_CAPTIONS, TEST_CAPTIONS = "captions.tsv", "captions-test.tsv"


@dataclass
class Data:
    """Map-style data sets of (PIL image, label), with a run's settings and device.

    Training draws its views from ``views``; evaluation fits on ``train`` and scores on ``test``, or
    during a run on ``validation``, if images are held out. ``names`` are the files of ``views``,
    where each image is a file.
    """

    views: Dataset
    train: Dataset
    test: Dataset
    classes: list[str]
    config: Config
    device: torch.device
    names: list[str] | None = None
    validation: Dataset | None = None

    @property
    def scored(self) -> Dataset:
        """The images that evaluations score on during a run."""
        return self.test if self.validation is None else self.validation


def load(config: Config, device: torch.device | None = None) -> Data:
    """Open the data set of ``config``, to be used on ``device`` (default: the CPU).

    Raises:
        RunError: the data set is missing, broken or too small.
    """
    try:
        found = _OPEN[config.dataset](config)
        data = Data(*found, config, device or torch.device("cpu"))
    except RunError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        hint = " (--download fetches it)" * (config.dataset in ("cifar10", "cifar100", "stl10"))
        reason = " ".join(str(error).split())
        raise RunError(
            f"cannot open {config.dataset} in {config.data_root}{hint}: {reason}"
        ) from error
    if config.validation:
        _hold_out(data, config.validation)
    if config.subset:
        same = data.train is data.views
        data.views = Subset(data.views, _balanced("--subset", data.views, config.subset))
        data.train = data.views if same else data.train
    data.names = _names(data.views)
    if len(data.views) < config.batch_size:
        raise RunError(
            f"--batch-size must not exceed the {len(data.views)} training images, "
            f"got {config.batch_size}"
        )
    return data


def _digits(config: Config) -> tuple:
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    samples = list(zip(map(Image.fromarray, images), digits.target.tolist(), strict=True))
    train, test = train_test_split(samples, test_size=500, random_state=0, stratify=digits.target)
    return train, train, test, [str(name) for name in digits.target_names]


def _cifar(config: Config) -> tuple:
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[config.dataset]
    train, test = (kind(config.data_root, part, download=config.download) for part in (True, False))
    return train, train, test, train.classes


def _stl10(config: Config) -> tuple:
    views, train, test = (
        datasets.STL10(config.data_root, split, download=config.download)
        for split in ("train+unlabeled", "train", "test")
    )
    views.targets, train.targets = views.labels.tolist(), train.labels.tolist()
    return views, train, test, train.classes


def _imagefolder(config: Config) -> tuple:
    root = Path(config.data_root)
    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise RunError(
            f"--data-root {root} must hold the folders train and test (or val) "
            "with one folder per class"
        )
    train, test = (
        datasets.ImageFolder(folder, loader=_open_image) for folder in (root / "train", tests[0])
    )
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise RunError(
            f"{root / 'train'} and {tests[0]} must hold the same classes, "
            f"but differ in {', '.join(odd)}"
        )
    return train, train, test, train.classes


def _names(images: Dataset) -> list[str] | None:
    """List the files of an image folder or a part of it; None for other data sets."""
    if isinstance(images, Subset):
        names = _names(images.dataset)
        return None if names is None else [names[index] for index in images.indices]
    if isinstance(images, CaptionedImages):
        return images.names
    if not isinstance(images, datasets.ImageFolder):
        return None
    return [Path(path).relative_to(images.root).as_posix() for path, _ in images.samples]


def _captions(config: Config) -> tuple:
    """Open images with captions; the label of an image is the number of its caption."""
    root = Path(config.data_root)
    train = _lines(root / TRAIN_CAPTIONS)
    if (root / TEST_CAPTIONS).exists():
        test = _lines(root / TEST_CAPTIONS)
    else:  # about every tenth image, the same ones in any order of the lines
        chosen = {name for name, _ in train if mix(*name.encode()) % 10 == 0}
        test = [line for line in train if line[0] in chosen]
        train = [line for line in train if line[0] not in chosen]
    texts = sorted({text for _, text in (*train, *test)})
    train, test = (CaptionedImages(root, lines, texts) for lines in (train, test))
    if not len(train) or not len(test):
        raise RunError(
            f"{root} must hold training and test images, got {len(train)} and {len(test)}: add "
            f"lines to {TRAIN_CAPTIONS}, or name the test images in {TEST_CAPTIONS}"
        )
    return train, train, test, texts


def _lines(path: Path) -> list[tuple[str, str]]:
    """Read the lines "image<tab>caption" of a file."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        name, tab, text = line.partition("\t")
        if line.strip() and not (tab and name.strip() and text.strip()):
            raise RunError(f"{path}, line {number}: expected image<tab>caption, got {line[:60]!r}")
        if line.strip():
            found.append((name.strip(), text.strip()))
    return found


class CaptionedImages(Dataset):
    """Map a line of a captions file to its PIL image and its caption's place in ``texts``.

    Args:
        root: folder that the names of the images start from.
        lines: names and captions.
        texts: the captions, each once.
    """

    def __init__(self, root: Path, lines: list[tuple[str, str]], texts: list[str]):
        place = {text: number for number, text in enumerate(texts)}
        self.root, self.names = root, [name for name, _ in lines]
        self.targets = [place[text] for _, text in lines]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return _open_image(str(self.root / self.names[index])), self.targets[index]


class FakeImages(Dataset):
    """Random images, those of torchvision's FakeData.

    That class seeds every generator for each image, which takes longer than the image; in a build
    for CUDA each seeding also stays in memory.

    Args:
        size: number of images.
        side: their width and height.
        offset: added to an image's number, which seeds it.
    """

    def __init__(self, size: int, side: int, offset: int):
        self.size, self.side, self.offset = size, side, offset

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(f"image {index} of {self.size}")
        with seeded(self.offset + index):
            image = torch.randn(3, self.side, self.side)
            label = int(torch.randint(0, 10, (1,)))
        pixels = image.mul(255).byte().permute(1, 2, 0).contiguous()
        return Image.fromarray(pixels.numpy()), label


def _fake(config: Config) -> tuple:
    train = FakeImages(1024, config.image_size, 0)
    test = FakeImages(256, config.image_size, 1024)
    return train, train, test, [str(name) for name in range(10)]


#: Each returns the first four fields of `Data`.
_OPEN = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "stl10": _stl10,
    "imagefolder": _imagefolder,
    "captions": _captions,
    "fake": _fake,
}


def _open_image(path: str) -> Image.Image:
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            return as_rgb(image)
    except RunError as error:
        raise RunError(f"cannot use image {path}: {error}") from error
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types
        raise RunError(
            f"cannot read image {path} ({type(error).__name__}): repair it, or remove it and go on "
            "with --accept-data-change"
        ) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    16-bit grey is scaled to 8 bits, where Pillow would clip it, and transparent pixels are drawn
    over white, where Pillow would show the colour that their transparency hides.

    Raises:
        RunError: the mode does not say which values are black and white.
    """
    image.load()
    mode = image.mode
    if mode in _DEEP_GREY or (mode == "I" and image.format in _DEEP_GREY_FORMATS):
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _over_white(image)
    if mode in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"):
        return image.convert("RGB")
    raise RunError(f"its mode {mode} has no fixed range of values: convert it to 8-bit RGB or grey")


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    opaque = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(opaque, image).convert("RGB")


# 16-bit grey has the mode I in some formats and older versions of Pillow.
_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
_DEEP_GREY_FORMATS = ("PNG", "PPM")


def _hold_out(data: Data, size: int) -> None:
    """Move ``size`` images from the training images of ``data`` to its validation images.

    Where ``views`` are more than ``train``, they begin with it.
    """
    if size >= len(data.train):
        raise RunError(
            f"--validation must be below the {len(data.train)} training images, got {size}"
        )
    held_out = _balanced("--validation", data.train, size)
    same, gone = data.train is data.views, {*held_out}
    data.validation = Subset(data.train, held_out)
    data.views, data.train = (
        Subset(images, [index for index in range(len(images)) if index not in gone])
        for images in (data.views, data.train)
    )
    data.train = data.views if same else data.train


def labels_of(images: Dataset) -> list[int]:
    """List the labels, without opening an image where the data set knows them."""
    if isinstance(images, Subset):
        labels = labels_of(images.dataset)
        return [labels[index] for index in images.indices]
    return getattr(images, "targets", None) or [int(label) for _, label in images]


def _balanced(flag: str, dataset: Dataset, size: int) -> list[int]:
    """Pick ``size`` images round-robin over the classes, each shuffled with a fixed seed."""
    if size > len(dataset):
        raise RunError(f"{flag} must not exceed the {len(dataset)} training images, got {size}")
    labels = torch.tensor(labels_of(dataset))
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    turn = torch.empty(len(labels), dtype=torch.long)
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        turn[members] = torch.arange(len(members))
    order = shuffled[turn[shuffled].argsort(stable=True)][:size]
    return order.sort().values.tolist()


def mix(*numbers: int) -> int:
    """Hash a few integers into a well-distributed 63-bit seed."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class _Views(Dataset):
    """Map an image to uint8 (C, H, W) views, or to the RunError of an unreadable image.

    With a seed, the key (epoch, index) gives ``count`` random views; without one, index gives one
    fixed view and the label.
    """

    def __init__(self, images: Dataset, view: Callable, seed: int | None = None, count: int = 2):
        self.images, self.view, self.seed, self.count = images, view, seed, count

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        try:
            image, label = self.images[key if self.seed is None else key[1]]
        except RunError as error:
            return error
        if self.seed is None:
            return self.view(image), label
        with seeded(mix(self.seed, *key)):
            return tuple(self.view(image) for _ in range(self.count))


def steps_of(size: int, config: Config, start: int, stop: int) -> Iterator[list[tuple[int, int]]]:
    """Yield the keys (epoch, index) of each step's images.

    Args:
        size: number of training images.
        config: gives batch size and seed.
        start, stop: range of steps, counted over all epochs.
    """
    per_epoch, drawn = size // config.batch_size, None
    for step in range(start, stop):
        epoch, place = divmod(step, per_epoch)
        if epoch != drawn:
            generator = torch.Generator().manual_seed(mix(config.seed, epoch))
            order, drawn = torch.randperm(size, generator=generator).tolist(), epoch
        first = place * config.batch_size
        yield [(epoch, index) for index in order[first : first + config.batch_size]]


def training_batches(
    images: Dataset,
    augment: Callable,
    config: Config,
    start: int,
    stop: int,
    pin: bool,
    share: Callable[[list], list] = lambda keys: keys,
    count: int = 2,
) -> Iterator[list]:
    """Yield each step as micro-batches [(x1, x2), …] of uint8 views (n, C, H, W).

    The last partial batch of an epoch is dropped.

    Args:
        images: data set of (PIL image, label).
        augment: PIL image → random view.
        config: gives batch and micro-batch size, seed and number of loader workers.
        start, stop: range of steps, counted over all epochs.
        pin: whether to pin the views' memory.
        share: picks this process's images of a step.
        count: views of each image.

    Raises:
        RunError: a step contains an unreadable image; the message names the file.
    """
    mine = len(share(list(range(config.batch_size))))
    size = config.micro_batch or mine
    parts = (
        keys[k : k + size]
        for keys in map(share, steps_of(len(images), config, start, stop))
        for k in range(0, mine, size)
    )
    views = _Views(images, augment, config.seed, count)
    batches = _batches(views, config.workers, pin, batch_sampler=parts)
    while step := list(itertools.islice(batches, -(-mine // size))):
        yield step


def with_indices(
    batches: Iterator[list],
    size: int,
    config: Config,
    start: int,
    stop: int,
    share: Callable[[list], list],
) -> Iterator[list]:
    """Add to every micro-batch the indices (n,) of its images among the ``size`` training images.

    Args:
        batches: what :func:`training_batches` yields for the same arguments.
        size: number of training images.
        config, start, stop, share: as there.
    """
    for parts, keys in zip(batches, map(share, steps_of(size, config, start, stop)), strict=True):
        indices = torch.tensor([index for _, index in keys]).split(config.micro_batch or len(keys))
        yield [(*part, index) for part, index in zip(parts, indices, strict=True)]


def plain_batches(
    images: Dataset, transform: Callable, workers: int, pin: bool, batch_size: int = 256
) -> Iterator:
    """Yield all images in order, in batches: uint8 (n, C, H, W) and labels (n,).

    Args:
        images: data set of (PIL image, label).
        transform: PIL image → uint8 tensor (C, H, W).
        workers: loader processes; -1 takes one per core, at most 4.
        pin: whether to pin memory.
        batch_size: images per batch.

    Raises:
        RunError: an image is unreadable; the message names the file.
    """
    return _batches(_Views(images, transform), workers, pin, batch_size=batch_size)


def _batches(dataset: Dataset, workers: int, pin: bool, **sampling: int | Iterable) -> Iterator:
    loader = DataLoader(
        dataset,
        num_workers=min(4, os.cpu_count() or 1) if workers == -1 else workers,
        pin_memory=pin,
        collate_fn=_collate,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),
        **sampling,
    )
    with _stop_signals_blocked():
        batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, RunError):
                raise batch
            yield batch
    finally:
        # This ends the workers: a traceback may keep this frame until the process ends, which would
        # then wait for them in vain, since they ignore its signals.
        del batches


def _collate(samples):
    """Pass an error on as a value: raised in a worker, it would arrive with a traceback as text."""
    errors = (sample for sample in samples if isinstance(sample, RunError))
    return next(errors, None) or default_collate(samples)


#: Signals that the main process handles alone: a terminal sends them to the whole process group.
_STOPPING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
]


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Block the signals that stop a run; processes started inside start with them blocked.

    A worker that is interrupted before it ignores them would print a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(_worker: int) -> None:
    """Leave stopping to the main process."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
