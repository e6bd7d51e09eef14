"""How fast the adapters of `alphacl_fast.compat` are beside the classes that they replace.

    python -m benchmarks.adapters [--sizes 256,1024,4096] [--only NAME] [--out FILE]

Loss and gradient of the same random rows, float32, one thread. The two take turns in one process; a
row holds the ratio of the medians of their CPU times, which other processes disturb less than the
clock. A package that is not installed, or whose class needs more memory than there is, has no
ratio. (SupContrast is no package, and is left out.)
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

DIM = 128
#: No class may need more memory than this by its estimate.
LIMIT = 6 << 30
#: A turn lasts at least so many seconds.
TURN = 0.02


@dataclass(frozen=True)
class Case:
    """A class of a package, a setting of it, and what it is called with.

    Attributes:
        module: of `alphacl_fast.compat`.
        package: the module of the package.
        name: the class.
        inputs: n → tensors.
        call: (loss, tensors) → the loss.
        settings: arguments of the constructors.
        text: what else distinguishes the case.
        floats: n → about how many numbers the package's class holds at once.
    """

    module: str
    package: str
    name: str
    inputs: Callable[[int], list[Tensor]]
    call: Callable[[nn.Module, list[Tensor]], Tensor] = lambda loss, tensors: loss(*tensors)
    settings: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    floats: Callable[[int], int] = lambda n: 16 * n * n

    @property
    def title(self) -> str:
        settings = ", ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in self.settings.items())
        details = "; ".join(x for x in (settings, self.text) if x)
        return f"{self.module}.{self.name}" + (f" ({details})" if details else "")

    def losses(self) -> tuple[nn.Module, nn.Module]:
        """Ours and theirs; raises ImportError without the package."""
        theirs = getattr(importlib.import_module(self.package), self.name)
        ours = getattr(importlib.import_module(f"alphacl_fast.compat.{self.module}"), self.name)
        return tuple(_made(c, self.settings) for c in (ours, theirs))


def _made(loss: type[nn.Module], settings: dict[str, Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a deprecated class of a package
        if "GIST" in loss.__name__:
            return loss(*_with_tokenizer(Embeddings(), Embeddings()), **settings)
        return loss(Embeddings(), **settings) if "Negatives" in loss.__name__ else loss(**settings)


def _with_tokenizer(*models: nn.Module) -> tuple[nn.Module, ...]:
    """The models with one tokenizer, without which the package refuses them."""
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(kinds.WordLevel({"a": 0}, unk_token="a"))
    for model in models:
        model.tokenizer, model.max_seq_length = PreTrainedTokenizerFast(tokenizer_object=words), 8
    return models


# --- inputs ---------------------------------------------------------------------------------------


def rows(*shape: int) -> Tensor:
    """Random rows that require a gradient."""
    return torch.randn(*shape, DIM).requires_grad_()


def columns(count: int) -> Callable[[int], list[Tensor]]:
    return lambda n: [rows(n) for _ in range(count)]


def towers(n: int) -> list[Tensor]:
    """Unit rows of images and texts, a scale and a bias."""
    units = [normalize(rows(n).detach()).requires_grad_() for _ in range(2)]
    return [*units, torch.tensor(14.3, requires_grad=True), torch.tensor(-9.5, requires_grad=True)]


def labelled(each: int) -> Callable[[int], list[Tensor]]:
    """n rows, with as many of each label."""
    return lambda n: [rows(n), torch.arange(n) // each]


def with_reference(n: int) -> list[Tensor]:
    return [rows(n), torch.arange(n) // 4, rows(n), torch.arange(n) // 4]


def against_reference(loss: nn.Module, tensors: list[Tensor]) -> Tensor:
    z, labels, ref_emb, ref_labels = tensors
    return loss(z, labels, ref_emb=ref_emb, ref_labels=ref_labels)


def mined(n: int) -> list[Tensor]:
    """n rows in fours, and for each pair of equal labels one negative, as a miner lists them."""
    anchors = torch.arange(n).repeat_interleave(3)
    positives = anchors // 4 * 4 + (anchors + torch.arange(3).repeat(n) + 1) % 4
    return [rows(n), torch.arange(n) // 4, anchors, positives, (anchors + 7) % n]


def with_triplets(loss: nn.Module, tensors: list[Tensor]) -> Tensor:
    z, labels, *triplets = tensors
    return loss(z, labels, tuple(triplets))


def embedded(loss: nn.Module, tensors: list[Tensor]) -> Tensor:
    """The tensors are the embeddings that the model gives."""
    return loss([{"input_ids": x} for x in tensors], None)


def manhattan(x: Tensor, y: Tensor) -> Tensor:
    """A similarity that the sweeps do not know."""
    return -torch.cdist(x, y, p=1)


class Embeddings(nn.Module):
    """A model of sentence-transformers that gives its input."""

    def __getitem__(self, place: int) -> nn.Module:
        return self  # the package asks its models for their first module

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["input_ids"]}


# --- the cases ------------------------------------------------------------------------------------

ST = "sentence_transformers.sentence_transformer.losses"
PML = "pytorch_metric_learning.losses"
RANKING = "MultipleNegativesRankingLoss"
ALL = {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")}


def _metric_learning(name: str, per_pair: bool) -> list[Case]:
    """The package holds a value for each positive pair and each negative, if it is per pair."""
    module = "pytorch_metric_learning"

    def floats(n: int) -> int:
        return (4 * 3 * n * n * n) if per_pair else 16 * n * n

    return [
        Case(module, PML, name, labelled(4), text="4 rows a label", floats=floats),
        Case(
            module, PML, name, with_reference, against_reference, text="ref_emb", floats=floats
        ),
        Case(
            module, PML, name, mined, with_triplets, text="3n triplets",
            floats=(lambda n: 4 * 9 * n * n) if per_pair else floats,
        ),
    ]  # fmt: skip


CASES = [
    Case("lightly", "lightly.loss", "NTXentLoss", columns(2)),
    Case(
        "lightly", "lightly.loss", "NTXentLoss", columns(2),
        settings={"memory_bank_size": (4096, DIM)},
    ),
    Case("lightly", "lightly.loss", "NTXentLoss", columns(2), settings={"temperature": -1.0}),
    Case("lightly", "lightly.loss", "DCLLoss", columns(2)),
    Case("lightly", "lightly.loss", "DCLWLoss", columns(2)),
    Case("lightly", "lightly.loss", "MACLLoss", columns(2)),
    Case("open_clip", "open_clip.loss", "ClipLoss", towers),
    Case("open_clip", "open_clip.loss", "SigLipLoss", towers),
    *_metric_learning("NTXentLoss", per_pair=True),
    *_metric_learning("SupConLoss", per_pair=False),
    *_metric_learning("MultiSimilarityLoss", per_pair=False),
    *_metric_learning("CircleLoss", per_pair=False),
    *_metric_learning("TupletMarginLoss", per_pair=True),
    *(
        Case(
            "sentence_transformers", ST, name, columns(count), embedded, settings,
            text=f"{count} columns",
        )
        for name, count, settings in (
            (RANKING, 2, {}), (RANKING, 3, {}), (RANKING, 2, ALL), (RANKING, 3, ALL),
            (RANKING, 3, {"hardness_mode": "all_negatives", "hardness_strength": 5.0}),
            (RANKING, 2, {"similarity_fct": manhattan}),
            ("MultipleNegativesSymmetricRankingLoss", 2, {}),
            ("CachedMultipleNegativesRankingLoss", 2, {}),
            ("CachedMultipleNegativesRankingLoss", 2, ALL),
            ("CachedMultipleNegativesSymmetricRankingLoss", 2, {}),
        )
    ),
    *(
        Case(
            "sentence_transformers", ST, name, columns(3), embedded, text="3 columns", floats=floats
        )
        for name, floats in (
            ("GISTEmbedLoss", lambda n: 8 * n * n * DIM),
            ("CachedGISTEmbedLoss", lambda n: 8 * n * n + 8 * 32 * n * DIM),
        )
    ),
    Case("info_nce", "info_nce", "InfoNCE", columns(2)),
    Case("info_nce", "info_nce", "InfoNCE", columns(3), text="n negatives"),
    Case(
        "info_nce", "info_nce", "InfoNCE", lambda n: [rows(n), rows(n), rows(n, 16)],
        settings={"negative_mode": "paired"}, text="16 negatives each",
    ),
]  # fmt: skip


# --- measurement ----------------------------------------------------------------------------------


def seconds(case: Case, loss: nn.Module, tensors: list[Tensor], steps: int) -> float:
    """CPU seconds of a loss and its gradient."""
    start = time.process_time()
    for _ in range(steps):
        for x in tensors:
            x.grad = None
        case.call(loss, tensors).backward()
    return (time.process_time() - start) / steps


def measure(case: Case, n: int, rounds: int) -> dict[str, Any]:
    """Medians of ours and theirs, in turns. Raises ImportError without the package."""
    torch.manual_seed(0)
    losses = dict(zip(("ours", "theirs"), case.losses(), strict=True))
    if 4 * case.floats(n) > LIMIT:
        del losses["theirs"]
    tensors, times, steps = case.inputs(n), {name: [] for name in losses}, {}
    for name, loss in losses.items():
        seconds(case, loss, tensors, 1)
        steps[name] = 1 + int(TURN / max(1e-6, seconds(case, loss, tensors, 1)))
    for _ in range(rounds):
        for name, loss in losses.items():
            times[name].append(seconds(case, loss, tensors, steps[name]))
    medians = {name: statistics.median(found) for name, found in times.items()}
    ratio = medians["ours"] / medians["theirs"] if "theirs" in medians else None
    return {
        "benchmark": "adapters", "contestant": case.title, "n": n, "dim": DIM, "dtype": "float32",
        "repeats": rounds, "ours_over_theirs": ratio,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="256,1024,4096", help="numbers of rows, with commas")
    parser.add_argument("--only", default="", help="only cases with this text in their name")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    from alphacl_fast.benchmarks.loss import provenance
    from alphacl_fast.journal import append

    for case in (c for c in CASES if given.only in c.title):
        for n in map(int, given.sizes.split(",")):
            try:
                row = measure(case, n, given.rounds)
            except ImportError as error:
                print(f"{case.title}: {error}", flush=True)
                break
            ratio = row["ours_over_theirs"]
            text = f"{ratio:.3f} of their time" if ratio else "their class needs too much memory"
            print(f"{case.title}, n = {n}: {text}", flush=True)
            if given.out:
                append(given.out, row | provenance(torch.device("cpu")))


if __name__ == "__main__":
    main()
