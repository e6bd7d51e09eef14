"""One run's settings: every field of :class:`Config` is one flag of ``alphacl train``."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path


class RunError(Exception):
    """A problem the user can mend. Its text is one line, fit to be shown without a traceback.

    ``shown``: another process of the run shows it.
    """

    def __init__(self, text: str, shown: bool = False):
        super().__init__(text)
        self.shown = shown


class Diverged(RunError):
    """The loss or a weight stopped being finite: a result of these settings, not a mistake in them."""


def _flag(default, text, choices=None):
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


# What a data set, and after it an encoder, changes in the defaults below. The small encoder gets one thread: its
# operations are so short that two threads mostly wait for each other.
DATASETS = {
    "digits": {"encoder": "small", "image_size": 8},
    "cifar10": {"encoder": "resnet18", "image_size": 32},
    "cifar100": {"encoder": "resnet18", "image_size": 32},
    "stl10": {"encoder": "resnet18", "image_size": 96},
    "imagefolder": {"encoder": "resnet18", "image_size": 32},
    "fake": {"encoder": "small", "image_size": 32},
}
ENCODERS = {
    "small": {"threads": 1, "width": 16, "batch_size": 128, "lr": 0.003, "epochs": 60},
    "resnet18": {"width": 64, "batch_size": 128, "lr": 0.01, "epochs": 500},
    "resnet50": {"width": 64, "batch_size": 256, "lr": 0.001, "epochs": 500},
}
# Fields that leave the result of a run unchanged, so a resumed run may change them.
FREE_ON_RESUME = ("data_root", "download", "workers")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one run. Build it with :meth:`create`, which fills in the defaults of data set and encoder."""

    dataset: str = _flag("digits", "data set; digits needs no download", tuple(DATASETS))
    data_root: str = _flag("data", "folder of the data set; imagefolder: it holds train/<class>/* and test/ or val/")
    download: bool = _flag(False, "fetch the data set if it is not there")
    subset: int = _flag(0, "train on a class-balanced subset of this many images (0: all)")
    image_size: int = _flag(32, "side of the square input; above 64 the stem and the augmentation are those of STL-10")
    augment: str = _flag("workers", "who makes the views: loader workers, image by image, or the device, batched, from images "
                         "it holds (colour images of one size, up to 64 pixels)", ("workers", "device"))
    encoder: str = _flag("resnet18", "network", tuple(ENCODERS))
    width: int = _flag(64, "channels of the encoder's first stage")
    norm: str = _flag("batch", "normalisation layers; batch: over one process's micro-batch, group: within an image",
                      ("batch", "group"))
    objective: str = _flag("infonce", "objective of FusedAlphaCLLoss")
    option: dict = dataclasses.field(default_factory=dict, metadata={"help": "option of the objective; repeatable"})
    temperature: float = _flag(0.5, "temperature of the loss")
    learn_temperature: bool = _flag(False, "train the temperature too, from the value of --temperature")
    negatives: str = _flag("two_view", "negatives of the loss")
    backend: str = _flag("auto", "backend of the loss")
    epochs: int = _flag(500, "passes over the training images")
    batch_size: int = _flag(128, "images per step, of all processes together; each gives two views")
    micro_batch: int = _flag(0, "images per forward pass (0: all at once): memory is theirs, the gradient the whole batch's")
    optimizer: str = _flag("adam", "optimizer; sgd and lars have momentum 0.9; lars and lamb are for large batches",
                           ("adam", "sgd", "lars", "lamb"))
    lr: float = _flag(0.01, "peak learning rate")
    weight_decay: float = _flag(0.0, "weight decay")
    warmup_epochs: int = _flag(10, "epochs of linear warm-up before the cosine")
    amp: str = _flag("none", "autocast", ("none", "bf16"))
    compile: bool = _flag(False, "torch.compile the network")
    deterministic: bool = _flag(True, "deterministic algorithms, which exact resume on a GPU needs")
    device: str = _flag("auto", "auto, cpu, cuda or cuda:N")
    workers: int = _flag(-1, "loader processes (-1: one per core, at most 4); the number does not change the result")
    threads: int = _flag(0, "CPU threads of the network and the loss (0: torch's default)")
    seed: int = _flag(0, "seed of weights, order and augmentation")
    eval_every: int = _flag(10, "epochs between kNN evaluations (0: none)")
    probe_every: int = _flag(0, "epochs between linear probes (0: none)")
    log_every: int = _flag(10, "steps between step lines in metrics.jsonl")
    alpha_every: int = _flag(0, "steps between summaries of the pairwise weights in metrics.jsonl (0: none)")
    save_every: int = _flag(0, "steps between checkpoints besides the one of every epoch (0: none)")

    @classmethod
    def create(cls, **given) -> Config:
        """A checked config of the ``given`` fields; the others take the defaults of the data set and the encoder.

        Raises RunError for an unknown field or a value out of range.
        """
        _check_names(given)
        dataset = _one_of("dataset", given.get("dataset", "digits"), DATASETS)
        values = {**DATASETS[dataset], **given}
        values = {**ENCODERS[_one_of("encoder", values["encoder"], ENCODERS)], **values}
        values.setdefault("warmup_epochs", min(10, values["epochs"] // 10))
        values.setdefault("eval_every", max(1, values["epochs"] // 10))
        config = cls(**values)
        config.check()
        return config

    @classmethod
    def read(cls, path: Path) -> Config:
        """The config saved in ``path`` (a run's config.json). Raises RunError if it cannot be read or understood."""
        try:
            values = json.loads(path.read_text())["config"]
        except FileNotFoundError:
            raise RunError(f"{path.parent} is not a run: it has no {path.name}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"cannot read {path}: {error!r}") from error
        return cls.from_dict(values, path)

    @classmethod
    def from_dict(cls, values: dict, source: Path) -> Config:
        """The config of saved ``values``. ``source`` is named in the RunError of bad ones.

        A field that was not there yet when they were saved takes its default, with which a run is what it was before.
        """
        if not isinstance(values, dict):
            raise RunError(f"cannot read {source}: the config must be a dict, got {type(values).__name__}")
        unknown = [name for name in values if name not in _types()]
        if unknown:
            raise RunError(f"{source} was written by another version: unknown {unknown}")
        config = cls(**values)
        config.check()
        return config

    def check(self) -> None:
        """Raise RunError, naming the flag, for a value of the wrong type or out of range."""
        for name, kind in _types().items():
            value = getattr(self, name)
            if isinstance(value, int) and not isinstance(value, bool) and kind is float:
                continue
            if type(value) is not kind:
                raise RunError(f"{flag(name)} must be {kind.__name__}, got {value!r}")
        for name in ("dataset", "augment", "encoder", "norm", "optimizer", "amp"):
            _one_of(name, getattr(self, name), _choices(name))
        for name, least in (("epochs", 1), ("batch_size", 2), ("width", 1), ("image_size", 4), ("log_every", 1),
                            ("subset", 0), ("micro_batch", 0), ("warmup_epochs", 0), ("workers", -1), ("threads", 0),
                            ("eval_every", 0), ("probe_every", 0), ("alpha_every", 0), ("save_every", 0),
                            ("seed", 0), ("weight_decay", 0)):
            if not getattr(self, name) >= least:
                raise RunError(f"{flag(name)} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RunError(f"{flag(name)} must be positive and finite, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise RunError(f"--seed must be below 2**63, got {self.seed}")
        if self.warmup_epochs > self.epochs:
            raise RunError(f"--warmup-epochs must not exceed --epochs {self.epochs}, got {self.warmup_epochs}")
        if self.augment == "device" and (self.dataset == "digits" or self.image_size > 64):
            raise RunError("--augment device is for colour images up to 64 pixels, got "
                           f"{self.dataset} of {self.image_size}")
        if self.dataset == "digits" and self.encoder != "small":
            raise RunError(f"--encoder must be small for the digits, got {self.encoder}")

    def differences(self, values: dict) -> list[str]:
        """One 'flag: here A, there B' for each of ``values`` that differs from this config and may not."""
        return [f"{flag(name)}: {getattr(self, name)!r} in the run, {value!r} given"
                for name, value in values.items() if name not in FREE_ON_RESUME and getattr(self, name) != value]


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def _types() -> dict[str, type]:
    return typing.get_type_hints(Config)


def _choices(name: str):
    return Config.__dataclass_fields__[name].metadata["choices"]


def _check_names(given: dict) -> None:
    for name in given:
        if name not in _types():
            raise RunError(f"unknown setting {name!r}; the settings are {', '.join(_types())}")


def _one_of(name: str, value, choices):
    if value not in choices:
        raise RunError(f"{flag(name)} must be one of {', '.join(choices)}, got {value!r}")
    return value
