"""What ``alphacl reproduce evidence`` runs: data, settings, objectives, searches and seeds.

Whoever changes a setting here gets new runs: rows of other settings are left out of the tables.
"""

from typing import NamedTuple


class Contestant(NamedTuple):
    """An objective in the comparison.

    Attributes:
        objective: its name.
        option: its options.
        scale: what is searched beside the learning rate: "temperature", the name of an option, or
            None for an objective that has no scale of its own.
    """

    objective: str
    option: dict
    scale: str | None = "temperature"


class Part(NamedTuple):
    """Runs that are compared with each other.

    Attributes:
        setting: fields of Config that all of its runs share.
        classes: number of classes that its data set has.
        names: its contestants, in the order of their runs; the others are compared with the first.
        seeds: runs of every contestant, with the seeds 1, 2, ….
        judge: the accuracy that decides a search.
        measures: the accuracies of its table.
        held_out: training images of each class whose labels judge a search.
        batch_sizes: batch sizes to run with the choices of the part "cifar10", without a search.
        candidates: instead of contestants: settings to choose from with InfoNCE, by name, the
            cheapest first.
        uses: whether the choice of the part "setting" completes its setting.
    """

    setting: dict
    classes: int = 10
    names: tuple[str, ...] = ()
    seeds: int = 5
    judge: str = "probe"
    measures: tuple[str, ...] = ("knn", "probe")
    held_out: int = 0
    batch_sizes: tuple[int, ...] = ()
    candidates: dict[str, dict] | None = None
    uses: bool = False


CONTESTANTS = {
    "infonce": Contestant("infonce", {}),
    "alpha_direct_p4": Contestant("alpha_direct", {"exponent": 4}),
    "alpha_direct_p2": Contestant("alpha_direct", {"exponent": 2}),
    "alpha_direct_p4_raw": Contestant("alpha_direct", {"exponent": 4, "normalized": False}),
    "alpha_direct_p2_raw": Contestant("alpha_direct", {"exponent": 2, "normalized": False}),
    "uniform": Contestant("uniform", {}, None),
    "alpha_entropy": Contestant("alpha_entropy", {}),
    "alpha_square": Contestant("alpha_square", {}),
    "alpha_inverse": Contestant("alpha_inverse", {}),
    "triplet": Contestant("triplet", {}, "margin"),
    "alpha_gamma": Contestant("alpha_gamma", {}),
    "soft_triplet": Contestant("soft_triplet", {}),
    "lifted_structured": Contestant("lifted_structured", {}, "margin"),
    "modified_triplet": Contestant("modified_triplet", {}, "scale"),
    "triplet_contrastive": Contestant("triplet_contrastive", {}, None),
    "mine": Contestant("mine", {}, None),
    "n_plus_1_tuplet": Contestant("n_plus_1_tuplet", {}, None),
}
#: Six runs of every objective: three values of its scale at each of two learning rates, or six
#: learning rates where it has no scale.
LEARNING_RATES = (0.003, 0.01)
SCALES = {"temperature": (0.1, 0.2, 0.5), "margin": (0.1, 0.3, 1.0), "scale": (1.0, 3.0, 10.0)}
RATES_ALONE = (0.001, 0.0017, 0.003, 0.0055, 0.01, 0.017)
SEARCH_SEED = 1001  # not among the seeds of the comparison
BATCH_SIZE = 128  # of every part; other batch sizes scale the learning rate by the root of theirs

_SMALL = {"batch_size": BATCH_SIZE, "threads": 1, "workers": 0, "eval_every": 0, "probe_every": 0}
#: In float32: a part may go on at another machine, which may have no instructions for bfloat16.
_COLOUR = {
    **_SMALL, "dataset": "imagefolder", "encoder": "resnet18", "augment": "device", "amp": "none",
    "subset": 10_000, "warmup_epochs": 1,
}  # fmt: skip
#: What a setting must fulfil with InfoNCE, the kNN accuracy decides: so many points above raw
#: pixels, and no larger standard deviation over the seeds.
MARGIN, DEVIATION = 10.0, 0.5
PARTS = {
    "digits": Part(
        {**_SMALL, "dataset": "digits", "augment": "device", "epochs": 20},
        names=tuple(CONTESTANTS),
        seeds=20,
        judge="probe_few",
        measures=("knn_few", "probe_few", "knn", "probe"),
        held_out=30,
    ),
    "setting": Part(
        {**_COLOUR, "temperature": 0.2, "lr": 0.003},
        candidates={
            f"width {width}, {epochs} epochs": {"width": width, "epochs": epochs}
            for width, epochs in ((8, 2), (8, 3), (16, 2))
        },
    ),
    "cifar10": Part(_COLOUR, names=tuple(CONTESTANTS)[:10], held_out=200, uses=True),
    "cifar100": Part(
        _COLOUR,
        classes=100,
        names=("infonce", "alpha_direct_p4", "uniform"),
        held_out=20,
        uses=True,
    ),
    "batch_size": Part(
        _COLOUR,
        names=("infonce", "alpha_direct_p4"),
        seeds=3,
        batch_sizes=(64, 128, 256, 512, 1024),
        uses=True,
    ),
}
