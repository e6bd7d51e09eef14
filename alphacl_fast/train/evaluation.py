"""Evaluation of frozen features by kNN and linear probes.

Raw pixels and the untrained encoder serve as baselines.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from . import checkpoint, report, storage
from .augment import plain
from .config import RunError
from .data import Data, load, plain_batches
from .device import autocast, pick_device, settings, threads, usual_default_device
from .models import Encoder, build
from .process_context import ProcessContext
from .weights import evaluated, of_encoder

ALONE = ProcessContext()


class Split(NamedTuple):
    """Labelled features to fit on (``train``) and to score (``test``)."""

    train: Tensor  # (n, f) float32
    train_labels: Tensor  # (n,) class indices
    test: Tensor  # (m, f)
    labels: Tensor  # (m,)
    classes: int

    def subset(self, rows: Tensor) -> Split:
        """Keep only these training rows."""
        return self._replace(train=self.train[rows], train_labels=self.train_labels[rows])


def raw_pixels(images):
    """Map uint8 (n, C, H, W) to pixels in [0, 1], (n, C·h·w), downsampled to at most 32x32."""
    side = min(32, images.shape[-1])
    return F.adaptive_avg_pool2d(images.float() / 255, side).flatten(1)


@torch.no_grad()
def extract(
    images: Dataset, encoders: dict[str, Callable], data: Data, context: ProcessContext = ALONE
) -> tuple[dict[str, Tensor], Tensor]:
    """Compute every encoder's features of all images, with the settings and device of ``data``.

    Each rank of ``context`` embeds its share of the images.

    Returns:
        Encoder name → float32 (n, f), and labels (n,), both on the device.

    Raises:
        RunError: an image is unreadable; the message names the file.
    """
    config, device, total = data.config, data.device, len(images)
    features, labels = {name: [] for name in encoders}, []
    modules = [encoder for encoder in encoders.values() if isinstance(encoder, nn.Module)]
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    pin = device.type == "cuda"
    if context.size > 1:
        images = Subset(images, context.share([*range(len(images))]))
    for x, y in plain_batches(images, plain(config.image_size), config.workers, pin):
        x = x.to(device, non_blocking=True)
        with autocast(config, device):
            for name, encoder in encoders.items():
                features[name].append(encoder(x).float())
        labels.append(y)
    for module, mode in zip(modules, modes, strict=True):
        module.train(mode)
    features = {name: context.gather(torch.cat(rows), total) for name, rows in features.items()}
    return features, context.gather(torch.cat(labels).to(device), total)


def splits(
    encoders: dict[str, Callable],
    data: Data,
    scored: Dataset | None = None,
    context: ProcessContext = ALONE,
) -> dict[str, Split]:
    """Compute every encoder's features of the training and the scored images: name → Split.

    ``scored`` are the test images by default.
    """
    train, train_labels = extract(data.train, encoders, data, context)
    test, labels = extract(data.test if scored is None else scored, encoders, data, context)
    return {
        name: Split(train[name], train_labels, test[name], labels, len(data.classes))
        for name in encoders
    }


def knn_accuracy(
    split: Split,
    k: int | None = None,
    temperature: float = 0.1,
    context: ProcessContext = ALONE,
) -> float:
    """Classify by a k-nearest-neighbour vote weighted by exp(cosine similarity / temperature).

    Test rows are processed in chunks, so the m·n similarities never exist at once.

    Args:
        split: features and labels.
        k: number of neighbours; None takes 200, or 20 if there are fewer than 10,000 training rows.
        temperature: temperature of the vote.
        context: the ranks, each of which classifies its share of the test rows.

    Returns:
        The accuracy on the test rows, on every rank.
    """
    k = k or (200 if len(split.train) >= 10_000 else min(20, len(split.train)))
    bank = F.normalize(split.train).T
    rows, correct = max(1, 2**24 // bank.shape[1]), 0
    mine = context.share(range(len(split.labels)))
    test, labels = (x[mine.start : mine.stop] for x in (split.test, split.labels))
    for chunk, truth in zip(test.split(rows), labels.split(rows), strict=True):
        similarity, nearest = (F.normalize(chunk) @ bank).topk(k)  # (rows, k)
        votes = similarity.new_zeros(len(chunk), split.classes)
        votes.scatter_add_(1, split.train_labels[nearest], (similarity / temperature).exp())
        correct += (votes.argmax(1) == truth).sum().item()
    return context.sum(correct) / len(split.labels)


def standardise(split: Split) -> Split:
    """Standardise by mean and deviation of the training rows; constant features become 0."""
    mean, std = split.train.mean(0), split.train.std(0)
    scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0)
    return split._replace(train=(split.train - mean) * scale, test=(split.test - mean) * scale)


def converged_probe(split: Split) -> float:
    """Fit scikit-learn's logistic regression (L2, C=1) on standardised features; test accuracy."""
    train, train_labels, test, labels = (x.cpu().numpy() for x in split[:4])
    return LogisticRegression(max_iter=3000).fit(train, train_labels).score(test, labels)


@threads(1)  # in operations this short, threads mostly wait for one another
def linear_probe(split: Split, epochs: int = 50) -> tuple[float, float]:
    """Fit a logistic regression on standardised features by the α-CL experiments' protocol.

    The protocol is Adam 3e-4, weight decay 1e-3, batch 128, 50 epochs. The published accuracies
    belong to the best epoch on the test set; the unbiased choice is the last epoch.

    Returns:
        The test accuracy after the last epoch, and the largest of all epochs.
    """
    features, device = split.train.shape[1], split.train.device
    head = nn.utils.skip_init(nn.Linear, features, split.classes, device=device)  # draws no numbers
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-4, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(0)
    best = last = 0.0
    for _ in range(epochs):
        order = torch.randperm(len(split.train), generator=generator).to(device)
        for rows in order.split(128):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(head(split.train[rows]), split.train_labels[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            last = (head(split.test).argmax(1) == split.labels).float().mean().item()
        best = max(best, last)
    return last, best


def few_label_draws(labels: Tensor, per_class: int, draws: int) -> list[Tensor]:
    """Draw ``per_class`` random rows of every class, ``draws`` times, the same on every call.

    Returns:
        One index tensor per draw.

    Raises:
        RunError: a class has fewer rows.
    """
    members = [(labels == label).nonzero().flatten() for label in labels.unique()]
    smallest = min(map(len, members))
    if smallest < per_class:
        raise RunError(
            f"--few-label must not exceed the {smallest} images of the smallest class, "
            f"got {per_class}"
        )
    generators = [torch.Generator().manual_seed(seed) for seed in range(draws)]
    return [
        torch.cat(
            [r[torch.randperm(len(r), generator=g)[:per_class].to(r.device)] for r in members]
        )
        for g in generators
    ]


def probe(split: Split) -> tuple[float, float]:
    """Fit the linear probe that suits the number of labels, on standardised features.

    Below 2,000 labels :func:`linear_probe`'s 50 epochs are too few steps to converge, which would
    favour high-dimensional features; :func:`converged_probe` is used instead.

    Returns:
        The test accuracy after the last epoch, and the largest of all epochs.
    """
    if len(split.train) < 2000:
        accuracy = converged_probe(split)
        return accuracy, accuracy
    return linear_probe(split)


def score(split: Split, few_label: int, draws: int) -> dict:
    """Compute all accuracies of one encoder.

    Args:
        split: its features.
        few_label: labels per class in the few-label columns; also the k of their kNN.
        draws: random choices of those labels to average over.

    Returns:
        "knn", "probe" and "probe_best" with all labels; "knn_few" and "probe_few" with few.
    """
    scaled = standardise(split)
    last, best = probe(scaled)
    row = {"knn": knn_accuracy(split), "probe": last, "probe_best": best}
    chosen = few_label_draws(split.train_labels, few_label, draws)
    for name, values in (
        ("knn_few", [knn_accuracy(split.subset(rows), k=few_label) for rows in chosen]),
        ("probe_few", [converged_probe(scaled.subset(rows)) for rows in chosen]),
    ):
        found = torch.tensor(values, dtype=torch.float64)
        std = found.std(correction=0).item()
        row[name] = {"mean": found.mean().item(), "std": std, "draws": found.tolist()}
    return row


def figures(
    encoder: Encoder,
    data: Data,
    *,
    knn: bool,
    probed: bool,
    scored: Dataset | None = None,
    context: ProcessContext = ALONE,
) -> dict:
    """Evaluate an encoder during training.

    Args:
        encoder: the encoder, whose training mode is preserved.
        data: its ``train`` is fitted on.
        knn: whether to compute "knn".
        probed: whether to compute "probe" (last epoch) and "probe_best".
        scored: images to score on; by default ``data.test``.
        context: the ranks that share the work; all of them call this function and have the same
            encoder. The probe is fitted on each of them alike.

    Returns:
        The accuracies that were asked for.
    """
    split, found = splits({"": encoder}, data, scored, context)[""], {}
    if knn:
        found["knn"] = knn_accuracy(split, context=context)
    if probed:
        found["probe"], found["probe_best"] = probe(standardise(split))
    return found


def picture(encoder: Encoder, data: Data, path: Path, most: int = 2000) -> None:
    """Plot up to ``most`` test images by two principal components of their features.

    The untrained encoder is drawn beside the trained one.
    """
    images = data.test
    if len(images) > most:
        images = Subset(images, torch.linspace(0, len(images) - 1, most).long().tolist())
    untrained = build(data.config).encoder.to(data.device)
    encoders = {"untrained encoder": untrained, "trained encoder": encoder}
    features, labels = extract(images, encoders, data)
    report.embedding(features, labels, data.classes, path)


@usual_default_device()
def evaluate(run: str | Path, *, few_label: int = 5, draws: int = 10, **changes) -> dict:
    """Evaluate a run: kNN and linear probes of raw pixels, untrained and trained encoder.

    Writes eval.json and embedding.png into the run folder. All three rows share images, protocol
    and label draws; the untrained encoder has the run's initial weights.

    Args:
        run: run folder.
        few_label: labels per class in the few-label columns.
        draws: random choices of those labels to average over.
        **changes: fields of :class:`Config` to override that do not affect the weights: device,
            workers, data_root.

    Returns:
        The contents of eval.json.

    Raises:
        RunError: there is no usable run or data set, or an argument is out of range.
    """
    run = Path(run)
    config, state = checkpoint.open_run(run, changes)
    if config.dataset == "captions":
        raise RunError(f"{run} was trained on captions: its images have no labels to evaluate with")
    if few_label < 1 or draws < 1:
        raise RunError(f"--few-label and --draws must be at least 1, got {few_label} and {draws}")
    storage.check_writable(run)
    with settings(config):
        return _evaluate(run, load(config, pick_device(config.device)), state, few_label, draws)


def _evaluate(run: Path, data: Data, state: dict, few_label: int, draws: int) -> dict:
    config = data.config
    trained, untrained = (build(config).to(data.device) for _ in range(2))
    trained.encoder.load_state_dict(of_encoder(evaluated(state)))
    encoders = {
        "raw pixels": raw_pixels,
        "untrained encoder": untrained.encoder,
        "trained encoder": trained.encoder,
    }
    found = splits(encoders, data)
    first = found["raw pixels"]
    result = {
        "run": str(run),
        "dataset": config.dataset,
        "objective": config.objective,
        "epochs": state["epoch"],
        "of_epochs": config.epochs,
        "train_images": len(first.train),
        "test_images": len(first.test),
        "few_label": few_label,
        "rows": {name: score(split, few_label, draws) for name, split in found.items()},
    }
    with storage.writing(run):
        storage.write(run / "eval.json", (json.dumps(result, indent=2) + "\n").encode())
        picture(trained.encoder, data, run / "embedding.png")
    return result
