"""Every adapter, and the class that it replaces: one table for all tests of `test_contract`.

An entry says how the two are made and called, and where ours is to differ. A new parameter or
attribute in a new release of a package is a difference that no entry names.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family import pair
from torch import nn


def package(name: str) -> Any:
    """A package that adapters stand in for; without it, the test is skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@dataclass(frozen=True)
class OverRanks:
    """Flags of a loss over two processes under DistributedDataParallel.

    Attributes:
        text: the flags, as docs/compat.md writes them.
        settings: what the constructors get.
        ratio: our gradient of the encoders over theirs; None: they differ in direction.
        wrapped: the flag ``efficient`` of pytorch-metric-learning's DistributedLossWrapper.
    """

    text: str
    settings: dict[str, Any]
    ratio: float | None = 1.0
    wrapped: bool | None = None


@dataclass(frozen=True)
class Contract:
    """An adapter and what it replaces.

    Attributes:
        ours: module of `alphacl_fast.compat`, and a class.
        theirs: module and class; a class of this file stands for a package that no index has.
        inputs: n → the tensors of a call with n pairs, float64.
        call: (loss, tensors) → the loss; by default loss(*tensors).
        settings: what the constructors get, once for each test of values.
        arguments: () → leading arguments of the constructors.
        towers: how many of the tensors may have dtypes of their own under autocast.
        parameters: parameter → why its default, or its place, is another one in ours.
        small: pairs → why ours gives something else than the package.
        other: attribute → why it is missing in ours.
        ranks: flags to compare over processes.
    """

    ours: str
    theirs: str
    inputs: Callable[[int], tuple[torch.Tensor, ...]]
    call: Callable[..., torch.Tensor] = lambda loss, tensors: loss(*tensors)
    settings: tuple[dict[str, Any], ...] = ({},)
    arguments: Callable[[], tuple[Any, ...]] = tuple
    towers: int = 0
    parameters: dict[str, str] = field(default_factory=dict)
    small: dict[int, str] = field(default_factory=dict)
    other: dict[str, str] = field(default_factory=dict)
    ranks: tuple[OverRanks, ...] = ()

    @property
    def name(self) -> str:
        return self.ours.replace(":", ".")

    def classes(self) -> tuple[type[nn.Module], type[nn.Module]]:
        """Ours and theirs."""
        module, name = self.theirs.split(":")
        their_class = globals()[name] if module == "here" else getattr(package(module), name)
        module, name = self.ours.split(":")
        return getattr(importlib.import_module(f"alphacl_fast.compat.{module}"), name), their_class

    def pair(self, **settings: Any) -> list[nn.Module]:
        """One of each."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a deprecated class of a package
            return [c(*self.arguments(), **settings) for c in self.classes()]


# --- inputs ---------------------------------------------------------------------------------------


def views(n: int) -> tuple[torch.Tensor, ...]:
    return pair(n, 6)


def towers(n: int) -> tuple[torch.Tensor, ...]:
    """Unit rows, scale and bias."""
    image, text = (F.normalize(z) for z in pair(n, 6))
    numbers = (torch.tensor(x, dtype=torch.float64) for x in (14.3, -9.5))
    return image, text, *numbers


def rows_and_labels(n: int) -> tuple[torch.Tensor, ...]:
    """2n rows of about n/2 labels, and five other rows with labels."""
    z1, z2 = pair(n, 5)
    labels = torch.arange(2 * n) % max(2, n // 2)
    return torch.cat([z1, z2]), labels, pair(5, 5, seed=1)[0], torch.arange(5) % 3


def without_reference(loss, tensors):
    return loss(*tensors[:2]) + 0 * tensors[2].sum()


def with_reference(loss, tensors):
    z, labels, ref_emb, ref_labels = tensors
    return loss(z, labels, ref_emb=ref_emb, ref_labels=ref_labels)


def with_pairs(loss, tensors):
    """Triplets, one of which is listed twice, as a miner lists them."""
    z, labels, other, _ = tensors
    listed = [
        (a, p, n)
        for a in range(len(z))
        for p in range(len(z))
        for n in range(len(z))
        if a != p and labels[a] == labels[p] and labels[n] != labels[a] and (a + p + n) % 3
    ]
    triplets = torch.tensor(listed[:1] + listed, dtype=torch.long).reshape(-1, 3)
    return loss(z, labels, tuple(triplets.t())) + 0 * other.sum()


def columns(count: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda n: tuple(pair(n, 5, seed=k)[0] for k in range(count))


def embedded(loss, tensors):
    """The tensors are the embeddings that the model gives."""
    return loss([{"input_ids": x} for x in tensors], None)


def keys(*shape: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    """A query, its key, and negatives of a shape; n in it is the number of pairs."""

    def made(n: int) -> tuple[torch.Tensor, ...]:
        negatives = [n if size == -1 else size for size in shape]
        generator = torch.Generator().manual_seed(2)
        return *pair(n, 6), torch.randn(*negatives, generator=generator, dtype=torch.float64)

    return made


def several_views(count: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    """Features (n, views, 2, 3), which are flattened, and labels."""

    def made(n: int) -> tuple[torch.Tensor, ...]:
        z = torch.stack([pair(n, 6, seed=k)[0] for k in range(count)], 1)
        return F.normalize(z, dim=2).view(n, count, 2, 3), torch.arange(n) // 2

    return made


def squared_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).square().sum(1)


def manhattan(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -torch.cdist(x, y, p=1)


class Embeddings(nn.Module):
    """A model that gives its input; GISTEmbed's guide sees the squares of the numbers."""

    def __init__(self, guide: bool = False) -> None:
        super().__init__()
        self.is_guide, self.max_seq_length = guide, 8
        self.device = torch.device("cpu")

    def __getitem__(self, place: int) -> nn.Module:
        return self  # the package asks its models for their first module

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = features["input_ids"]
        return {"sentence_embedding": x.square() + 0.3 * x if self.is_guide else x}


def model_and_guide() -> tuple[nn.Module, nn.Module]:
    """Two models with one tokenizer, without which the package refuses them."""
    package("sentence_transformers")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    made = Embeddings(), Embeddings(guide=True)
    for model in made:
        model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    return made


# --- the dense formula of a loss that no index has ------------------------------------------------


class DenseSupCon(nn.Module):
    """L_out of arXiv:2004.11362 as HobbitLong/SupContrast calls it, over all pairs at once."""

    def __init__(self, temperature=0.07, contrast_mode="all", base_temperature=0.07):
        super().__init__()
        self.temperature, self.base_temperature = temperature, base_temperature
        self.contrast_mode = contrast_mode

    def forward(self, features, labels=None, mask=None):
        n, views = features.shape[:2]
        rows = torch.cat([*features.flatten(2).unbind(1)])
        if mask is None:
            labels = torch.arange(n) if labels is None else labels.flatten()
            mask = labels[:, None] == labels
        oneself = torch.eye(n * views, dtype=torch.bool)
        wide = torch.promote_types(torch.float32, rows.dtype)  # of the mask, as there
        positive = mask.to(wide).repeat(views, views) * ~oneself
        logits = rows @ rows.t() / self.temperature
        log_share = logits - logits.masked_fill(oneself, -torch.inf).logsumexp(1, keepdim=True)
        total = positive.sum(1)
        mean = (positive * log_share).sum(1) / torch.where(total > 0, total, 1)
        anchors = n if self.contrast_mode == "one" else n * views
        return -mean[:anchors].mean() * (self.temperature / self.base_temperature)


# --- odd calls ------------------------------------------------------------------------------------


def of(*given, **named):
    """A call with the rows z of the entry, and labels that are pairs of rows."""

    def call(loss, z):
        labels = torch.arange(len(z)) // 2
        values = [x(z, labels) if callable(x) else x for x in given]
        return loss(*values, **{name: x(z, labels) for name, x in named.items()})

    return call


def rows(z, labels):
    return z


def its_labels(z, labels):
    return labels


def no_rows(z, labels):
    return z[:0]


def other_rows(z, labels):
    return z.flip(0) + 1


def lists(*pairs):
    return lambda z, labels: tuple(torch.tensor(x, dtype=torch.long) for x in pairs)


#: Calls of every loss of pytorch-metric-learning, by name: our value and gradient are theirs.
METRIC_CALLS = {
    "no rows": of(no_rows, lambda z, labels: labels[:0]),
    "no other rows": of(rows, its_labels, None, no_rows, lambda z, labels: labels[:0]),
    "other rows without labels": of(rows, its_labels, ref_emb=other_rows),
    "one class": of(rows, lambda z, labels: 0 * labels),
    "a class for each row": of(rows, lambda z, labels: torch.arange(len(z))),
    "int8 labels": of(rows, lambda z, labels: labels.to(torch.int8)),
    "large labels": of(rows, lambda z, labels: labels + 2**40),
    "labels in half precision": of(rows, lambda z, labels: labels.half()),
    "a miner without triplets": of(rows, its_labels, lists([], [], [])),
    "a miner without pairs": of(rows, its_labels, lists([], [], [], [])),
    "positive pairs alone": of(rows, its_labels, lists([0, 1], [1, 0], [], [])),
    "negative pairs alone": of(rows, its_labels, lists([], [], [0, 1], [5, 6])),
    "one triplet": of(rows, its_labels, lists([0], [1], [5])),
    "triplets without labels": of(rows, None, lists([0, 2], [1, 3], [4, 5])),
    "named arguments": of(embeddings=rows, labels=its_labels),
    "a row of zeros": of(lambda z, labels: z * (torch.arange(len(z)) > 0)[:, None], its_labels),
}


# --- flags over processes -------------------------------------------------------------------------


def gathered(name: str, **settings: Any) -> OverRanks:
    """A flag that gathers the rows of all processes, with other settings."""
    others = (f"{key}={getattr(x, '__name__', repr(x))}" for key, x in settings.items())
    return OverRanks(f"`{', '.join([f'{name}=True', *others])}`", {name: True, **settings})


def over_lightly(*others: dict[str, Any]) -> tuple[OverRanks, ...]:
    return tuple(gathered("gather_distributed", **settings) for settings in ({}, *others))


CLIP = tuple(
    OverRanks(
        f"`local_loss={local}, gather_with_grad={with_grad}`",
        {"local_loss": local, "gather_with_grad": with_grad},
        ratio,
    )
    for local, with_grad, ratio in (
        (False, False, 2.0), (False, True, 1.0), (True, False, None), (True, True, 1.0),
    )
)  # fmt: skip
SIGLIP = tuple(
    OverRanks(f'`dist_impl="{name}"`', {"dist_impl": name})
    for name in ("bidir", "shift", "reduce", "gather")
)
WRAPPED = tuple(
    OverRanks(f"in `DistributedLossWrapper(efficient={efficient})`", {}, wrapped=efficient)
    for efficient in (False, True)
)


# --- the table ------------------------------------------------------------------------------------

ONE_PAIR = "the package's loss is −inf without negatives; ours is 0"
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
RANKING = (
    {},
    {"directions": DIRECTIONS},
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    *(
        {"hardness_mode": mode, "hardness_strength": 5.0}
        for mode in ("in_batch_negatives", "hard_negatives", "all_negatives")
    ),
    {
        "similarity_fct": manhattan, "scale": 1.0, "directions": DIRECTIONS,
        "hardness_mode": "all_negatives", "hardness_strength": 2.0,
    },
)  # fmt: skip
OVER_ST = (
    gathered("gather_across_devices"),
    OverRanks(
        "`gather_across_devices=True`, all directions",
        {"gather_across_devices": True, "directions": DIRECTIONS},
    ),
    gathered("gather_across_devices", hardness_mode="all_negatives", hardness_strength=5.0),
    gathered("gather_across_devices", similarity_fct=manhattan, scale=1.0),
)
GIST = (
    {},
    {"margin": 0.1, "margin_strategy": "relative", "contrast_anchors": False},
    {"margin": 0.1, "contrast_positives": False, "temperature": 0.1},
)
ST = "sentence_transformers.sentence_transformer.losses"
PML = "pytorch_metric_learning.losses"
NO_MODEL = {"model": "ours has a default, for calls with embeddings"}
OURS_COS_SIM = {"similarity_fct": "ours needs no package for its default"}

TABLE = [
    Contract(
        "lightly:NTXentLoss", "lightly.loss:NTXentLoss", views, towers=2,
        settings=(
            {}, {"temperature": 0.07}, {"temperature": -1.0}, {"gather_distributed": True},
            {"memory_bank_size": (16, 6)}, {"memory_bank_size": (16, 6), "temperature": -1.0},
        ),
        ranks=over_lightly({"temperature": -1.0}, {"memory_bank_size": (16, 6)}),
    ),
    Contract(
        "lightly:DCLLoss", "lightly.loss:DCLLoss", views, towers=2, small={1: ONE_PAIR},
        settings=({}, {"weight_fn": squared_distance}, {"gather_distributed": True}),
        ranks=over_lightly({"weight_fn": squared_distance}),
    ),
    Contract(
        "lightly:DCLWLoss", "lightly.loss:DCLWLoss", views, towers=2, small={1: ONE_PAIR},
        settings=({}, {"sigma": 0.2}), ranks=over_lightly(),
    ),
    Contract(
        "lightly:MACLLoss", "lightly.loss:MACLLoss", views, towers=2,
        settings=({}, {"alpha": 0.2, "A_0": 0.3}),
    ),
    Contract(
        "open_clip:ClipLoss", "open_clip.loss:ClipLoss", towers, towers=2,
        settings=({}, {"cache_labels": True, "local_loss": True}), ranks=CLIP,
    ),
    Contract("open_clip:SigLipLoss", "open_clip.loss:SigLipLoss", towers, towers=2, ranks=SIGLIP),
    *(
        Contract(
            f"pytorch_metric_learning:{name}", f"{PML}:{name}", rows_and_labels, call, settings,
            ranks=WRAPPED if call is without_reference else (),
        )
        for name, settings in (
            ("NTXentLoss", ({}, {"temperature": 0.5}, {"temperature": -2})),
            ("SupConLoss", ({}, {"temperature": 0.5}, {"temperature": -2})),
            (
                "MultiSimilarityLoss",
                ({}, {"alpha": 1.0, "beta": 20.0, "base": 0.3}, {"alpha": -1}),
            ),
            ("CircleLoss", ({}, {"m": 0.25, "gamma": 32.0}, {"m": -0.1})),
            ("TupletMarginLoss", ({}, {"margin": 20.0, "scale": 8.0}, {"margin": -1.0})),
        )
        for call in (without_reference, with_reference, with_pairs)
    ),
    *(
        Contract(
            "sentence_transformers:MultipleNegativesRankingLoss",
            f"{ST}:MultipleNegativesRankingLoss", columns(count), embedded, RANKING,
            lambda: (Embeddings(),), towers=count, parameters=NO_MODEL | OURS_COS_SIM,
            ranks=OVER_ST if count == 4 else OVER_ST[:1],
        )
        for count in (2, 4)
    ),
    Contract(
        "sentence_transformers:MultipleNegativesSymmetricRankingLoss",
        f"{ST}:MultipleNegativesSymmetricRankingLoss", columns(3), embedded,
        arguments=lambda: (Embeddings(),), towers=3, parameters=NO_MODEL | OURS_COS_SIM,
        ranks=OVER_ST[:1],
    ),
    Contract(
        "sentence_transformers:CachedMultipleNegativesRankingLoss",
        f"{ST}:CachedMultipleNegativesRankingLoss", columns(3), embedded,
        tuple({**settings, "mini_batch_size": 2} for settings in RANKING[::3]),
        lambda: (Embeddings(),), ranks=OVER_ST[:1],
    ),
    Contract(
        "sentence_transformers:CachedMultipleNegativesSymmetricRankingLoss",
        f"{ST}:CachedMultipleNegativesSymmetricRankingLoss", columns(2), embedded,
        ({}, {"mini_batch_size": 2}), lambda: (Embeddings(),), ranks=OVER_ST[:1],
    ),
    *(
        Contract(
            "sentence_transformers:CachedGISTEmbedLoss", f"{ST}:CachedGISTEmbedLoss",
            columns(count), embedded, tuple({**x, "mini_batch_size": 2} for x in GIST),
            model_and_guide, ranks=OVER_ST[:1],
        )
        for count in (2, 4)
    ),
    *(
        Contract(
            "sentence_transformers:GISTEmbedLoss", f"{ST}:GISTEmbedLoss", columns(count), embedded,
            GIST, model_and_guide, towers=count, ranks=OVER_ST[:1],
        )
        for count in (2, 3)
    ),
    *(
        Contract(
            "supcontrast:SupConLoss", "here:DenseSupCon", several_views(count),
            settings=({}, {"temperature": 0.5, "contrast_mode": "one"}),
        )
        for count in (2, 3)
    ),
    *(
        Contract(
            "info_nce:InfoNCE", "info_nce:InfoNCE", inputs,
            settings=tuple({"reduction": r, "negative_mode": mode} for r in ("mean", "sum")),
            towers=2,
        )
        for inputs, mode in (
            (views, "unpaired"), (keys(7, 6), "unpaired"), (keys(-1, 4, 6), "paired"),
            (keys(-1, 1, 6), "paired"),
        )
    ),
]  # fmt: skip
