"""The settings of one run: every field of :class:`Config` is a flag of ``alphacl train``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from alphacl_fast.suggestions import did_you_mean


class RunError(Exception):
    """A problem the user can fix; its text is one line and is shown without a traceback.

    Args:
        text: the message.
        shown: whether another process of the run has already printed it.
    """

    def __init__(self, text: str, shown: bool = False):
        super().__init__(text)
        self.shown = shown


class Diverged(RunError):
    """The loss or a weight became infinite or NaN: an outcome of the settings, not a mistake."""


def _flag(default, text, choices=None, least=None, count=False):
    metadata = {"help": text, "choices": choices, "least": least, "count": count}
    return dataclasses.field(default=default, metadata=metadata)


# Defaults that depend on the data set, and then on the encoder. The small encoder runs on one
# thread: its operations are so short that a second thread mostly waits for the first.
DATASETS = {
    "digits": {"encoder": "small", "image_size": 8},
    "cifar10": {"encoder": "resnet18", "image_size": 32},
    "cifar100": {"encoder": "resnet18", "image_size": 32},
    "stl10": {"encoder": "resnet18", "image_size": 96},
    "imagefolder": {"encoder": "resnet18", "image_size": 32},
    "captions": {"encoder": "resnet18", "image_size": 32},
    "fake": {"encoder": "small", "image_size": 32},
}
ENCODERS = {
    "small": {"threads": 1, "width": 16, "batch_size": 128, "lr": 0.003, "epochs": 60},
    "resnet18": {"width": 64, "batch_size": 128, "lr": 0.01, "epochs": 500},
    "resnet50": {"width": 64, "batch_size": 256, "lr": 0.001, "epochs": 500},
}
#: Defaults of the recipes, and after them what a recipe does not let you choose.
RECIPES = {
    "simclr": {},
    "moco": {"temperature": 0.1},
    "supcon": {"temperature": 0.1},
    "image_text": {"temperature": 0.07, "learn_temperature": True, "negatives": "cross_view"},
}
FIXED = {
    "simclr": {},
    "moco": {"negatives": "two_view", "alpha_every": 0},
    "supcon": {"objective": "infonce", "negatives": "two_view", "alpha_every": 0},
    "image_text": {"negatives": "cross_view", "alpha_every": 0},
}
#: Defaults that are computed from other settings, in words.
DERIVED = {
    "warmup_epochs": "a tenth of the epochs, at most 10",
    "eval_every": "a tenth of the epochs",
}
#: Names that the loss knows, for help that does not wait for torch; a test compares them.
OBJECTIVES = (
    "infonce", "mine", "triplet", "soft_triplet", "n_plus_1_tuplet", "lifted_structured",
    "modified_triplet", "triplet_contrastive", "alpha_direct", "alpha_entropy", "alpha_inverse",
    "uniform", "alpha_square", "alpha_gamma",
)  # fmt: skip
SIGLIP = "siglip"
NEGATIVES = ("two_view", "one_view", "cross_view")
BACKENDS = ("auto", "reference", "blocked", "cpu", "cuda", "triton")
_POSITIVE = ("lr", "temperature", "temperature_end")
# Fields that do not affect the result, so a resumed run may change them.
FREE_ON_RESUME = ("data_root", "download", "workers", "keep", "tensorboard")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one run.

    Use :meth:`create`, which fills in the defaults of the data set and the encoder.
    """

    recipe: str = _flag(
        "simclr",
        "what is trained; simclr: two views of an image, moco: queries against a queue of keys of "
        "a momentum encoder, supcon: images of a class, image_text: images and texts (CLIP, "
        "SigLIP)",
        tuple(RECIPES),
    )
    dataset: str = _flag("digits", "data set; digits needs no download", tuple(DATASETS))
    data_root: str = _flag(
        "data",
        "data set folder; imagefolder: it holds train/<class>/* and test/ or val/, captions: "
        "captions.tsv with lines image<tab>caption",
    )
    download: bool = _flag(False, "download the data set if it is missing")
    subset: int = _flag(
        0, "train on a class-balanced subset of this many images (0: all)", least=0, count=True
    )
    image_size: int = _flag(
        32,
        "side of the square input; above 64, stem and augmentation follow the STL-10 recipe",
        least=4,
    )
    augment: str = _flag(
        "workers",
        "where augmentation runs: in loader workers, image by image, or batched on the device "
        "(digits, or colour images of one size up to 64 pixels, all held on the device)",
        ("workers", "device"),
    )
    encoder: str = _flag("resnet18", "encoder architecture", tuple(ENCODERS))
    width: int = _flag(64, "channels of the encoder's first stage", least=1)
    norm: str = _flag(
        "batch",
        "normalisation layers; batch: over one process's micro-batch, sync: over the "
        "micro-batches of all processes, group: within an image",
        ("batch", "sync", "group"),
    )
    weights: str = _flag(
        "",
        "file of initial weights: a run or its checkpoint, or a state dict of the network, of its "
        "encoder or of torchvision's ResNet (default: random)",
    )
    objective: str = _flag(
        "infonce",
        "objective of FusedAlphaCLLoss; siglip: the sigmoid loss of image_text",
        (*OBJECTIVES, SIGLIP),
    )
    option: dict = dataclasses.field(
        default_factory=dict, metadata={"help": "option of the objective; repeatable"}
    )
    temperature: float = _flag(0.5, "temperature of the loss")
    learn_temperature: bool = _flag(False, "learn the temperature, starting at --temperature")
    temperature_schedule: str = _flag(
        "constant",
        "how the temperature goes from --temperature to --temperature-end",
        ("constant", "linear", "cosine"),
    )
    temperature_end: float = _flag(0.1, "temperature at the end of its schedule")
    temperature_period: float = _flag(
        0.0,
        "epochs after which a schedule has come to --temperature-end and back again (0: the run "
        "ends at --temperature-end)",
        least=0,
    )
    negatives: str = _flag("two_view", "negatives of the loss", NEGATIVES)
    backend: str = _flag("auto", "backend of the loss", BACKENDS)
    epochs: int = _flag(500, "passes over the training images", least=1)
    batch_size: int = _flag(
        128, "images per step over all processes; each gives two views", least=2, count=True
    )
    micro_batch: int = _flag(
        0,
        "images per forward pass (0: the whole batch); saves activation memory, and the gradient "
        "stays exact (gradient caching)",
        least=0,
        count=True,
    )
    queue: int = _flag(4096, "keys in the queue of moco", least=1, count=True)
    text_width: int = _flag(
        128, "features of the text tower of image_text, a multiple of 4", least=4
    )
    momentum: float = _flag(
        0.99, "decay of the moving average that is the momentum encoder of moco", least=0
    )
    optimizer: str = _flag(
        "adam",
        "optimizer; sgd and lars use momentum 0.9; lars and lamb are for large batches",
        ("adam", "sgd", "lars", "lamb"),
    )
    lr: float = _flag(0.01, "peak learning rate")
    weight_decay: float = _flag(0.0, "weight decay", least=0)
    warmup_epochs: int = _flag(10, "epochs of linear warm-up", least=0)
    schedule: str = _flag(
        "cosine",
        "learning rate after the warm-up: cosine decay to 0 at the last epoch, or constant, which "
        "lets a resumed run have more --epochs",
        ("cosine", "constant"),
    )
    clip: float = _flag(
        0.0,
        "largest norm of the gradient of all weights; a larger one is scaled (0: none)",
        least=0,
    )
    ema: float = _flag(
        0.0,
        "decay of an exponential moving average of the encoder's weights, which is then evaluated "
        "in their place (0: none)",
        least=0,
    )
    amp: str = _flag("none", "autocast; fp16 scales the loss", ("none", "bf16", "fp16"))
    compile: bool = _flag(False, "torch.compile the network")
    deterministic: bool = _flag(
        True, "use deterministic algorithms, which exact resume on a GPU requires"
    )
    device: str = _flag("auto", "auto, cpu, cuda or cuda:N")
    workers: int = _flag(
        -1, "loader processes (-1: one per core, at most 4); does not affect the result", least=-1
    )
    threads: int = _flag(0, "CPU threads of network and loss (0: torch's default)", least=0)
    seed: int = _flag(0, "seed of weights, order and augmentation", least=0)
    eval_every: int = _flag(10, "epochs between kNN evaluations (0: none)", least=0)
    probe_every: int = _flag(0, "epochs between linear probes (0: none)", least=0)
    validation: int = _flag(
        0,
        "training images to hold out: evaluations during the run then score on them, the weights "
        "of the best one are kept, and the test images are scored once, at the end (0: none)",
        least=0,
        count=True,
    )
    eval_ranks: str = _flag(
        "first", "which of several processes evaluate during the run", ("first", "all")
    )
    log_every: int = _flag(10, "steps between step lines in metrics.jsonl", least=1)
    alpha_every: int = _flag(
        0,
        "steps between summaries of the pair weights and metrics of the batch in metrics.jsonl "
        "(0: none)",
        least=0,
    )
    save_every: int = _flag(
        0, "steps between checkpoints, besides one after every epoch (0: none)", least=0
    )
    tensorboard: bool = _flag(False, "write scalars for TensorBoard to RUN/tensorboard")
    keep: int = _flag(2, "checkpoints to keep, the newest included", least=1)

    @classmethod
    def create(cls, **given) -> Config:
        """Build and check a config.

        Args:
            **given: fields of Config; the others take the defaults of data set and encoder.

        Raises:
            RunError: an unknown field, or a value out of range.
        """
        for name in given:
            if name not in _names():
                raise RunError(
                    f"unknown setting {name!r}; the settings are {', '.join(_names())}"
                    f"{did_you_mean(name, _names())}"
                )
        dataset = _one_of("dataset", given.get("dataset", "digits"), DATASETS)
        values = {**DATASETS[dataset], **given}
        values = {**ENCODERS[_one_of("encoder", values["encoder"], ENCODERS)], **values}
        values = {**RECIPES[_one_of("recipe", values.get("recipe", "simclr"), RECIPES)], **values}
        values.setdefault("warmup_epochs", min(10, values["epochs"] // 10))
        values.setdefault("eval_every", max(1, values["epochs"] // 10))
        config = cls(**values)
        config.check()
        return config

    @classmethod
    def from_dict(cls, values: dict, source: Path) -> Config:
        """Restore a config from saved values.

        A field added since they were saved takes its default, which reproduces the old behaviour.

        Args:
            values: the saved fields, a dict.
            source: the file they came from, named in errors.

        Raises:
            RunError: ``values`` is no dict, or holds an unknown field or a value out of range.
        """
        if not isinstance(values, dict):
            got = type(values).__name__
            raise RunError(f"cannot read {source}: the config must be a dict, got {got}")
        unknown = [name for name in values if name not in _names()]
        if unknown:
            raise RunError(f"{source} was written by another version: unknown {unknown}")
        config = cls(**values)
        config.check()
        return config

    def check(self) -> None:
        """Check every field.

        Raises:
            RunError: a value has the wrong type or is out of range; the message names the flag.
        """
        for name, field in self.__dataclass_fields__.items():
            value = getattr(self, name)
            kind = dict if name == "option" else type(field.default)
            if type(value) not in ((int, float) if kind is float else (kind,)):
                raise RunError(f"{flag(name)} must be {kind.__name__}, got {value!r}")
            if choices := field.metadata.get("choices"):
                _one_of(name, value, choices)
            least = field.metadata.get("least")
            if least is not None and not value >= least:
                raise RunError(f"{flag(name)} must be at least {least}, got {value}")
            if name in _POSITIVE and not 0 < value < float("inf"):
                raise RunError(f"{flag(name)} must be positive and finite, got {value}")
        if self.seed >= 2**63:
            raise RunError(f"--seed must be below 2**63, got {self.seed}")
        if self.warmup_epochs > self.epochs:
            raise RunError(
                f"--warmup-epochs must not exceed --epochs {self.epochs}, got {self.warmup_epochs}"
            )
        if self.temperature_period == float("inf"):
            raise RunError("--temperature-period must be finite, got inf")
        if self.ema >= 1:
            raise RunError(f"--ema must be below 1, got {self.ema}")
        if self.text_width % 4:
            raise RunError(f"--text-width must be a multiple of 4, got {self.text_width}")
        if self.momentum > 1:
            raise RunError(f"--momentum must be at most 1, got {self.momentum}")
        self._check_recipe()
        if self.temperature_schedule != "constant" and self.learn_temperature:
            raise RunError(
                "--learn-temperature and --temperature-schedule exclude each other, got "
                f"{self.temperature_schedule}"
            )
        if self.validation and not (self.eval_every or self.probe_every):
            raise RunError("--validation needs --eval-every or --probe-every, got 0 for both")
        most = 8 if self.dataset == "digits" else 64
        if self.augment == "device" and (
            self.image_size > most or (self.dataset == "digits" and self.image_size < most)
        ):
            raise RunError(
                "--augment device is for colour images up to 64 pixels and digits of 8, got "
                f"{self.dataset} of {self.image_size}"
            )
        if self.dataset == "digits" and self.encoder != "small":
            raise RunError(f"--encoder must be small for the digits, got {self.encoder}")

    def _check_recipe(self) -> None:
        for name, value in FIXED[self.recipe].items():
            if (got := getattr(self, name)) != value:
                raise RunError(f"--recipe {self.recipe} needs {flag(name)} {value}, got {got}")
        if self.dataset == "captions" and (self.recipe != "image_text" or self.probe_every):
            raise RunError(
                "--dataset captions needs --recipe image_text and --probe-every 0, got "
                f"{self.recipe} and {self.probe_every}"
            )
        if self.objective == SIGLIP and (
            self.recipe != "image_text" or self.option or self.temperature_schedule != "constant"
        ):
            raise RunError(
                "--objective siglip needs --recipe image_text, no --option and no "
                f"--temperature-schedule, got {self.recipe}, {self.option} and "
                f"{self.temperature_schedule}"
            )

    def differences(self, values: dict) -> list[str]:
        """List the fields of ``values`` that must equal this config's but do not.

        Args:
            values: fields of Config.

        Returns:
            One "flag: A in the run, B given" per field.
        """
        return [
            f"{flag(name)}: {getattr(self, name)!r} in the run, {value!r} given"
            for name, value in values.items()
            if name not in FREE_ON_RESUME and getattr(self, name) != value
        ]


def flag(name: str) -> str:
    """Return the command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def _names():
    return Config.__dataclass_fields__


def _one_of(name: str, value, choices):
    if value not in choices:
        raise RunError(
            f"{flag(name)} must be one of {', '.join(choices)}, got {value!r}"
            f"{did_you_mean(value, choices)}"
        )
    return value
