"""Frozen features judged by kNN and by linear probes, next to raw pixels and the untrained encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from . import checkpoint, report
from .augment import plain
from .config import Config, RunError
from .data import Data, load, plain_batches
from .device import one_thread, pick_device, settings
from .models import Encoder, build


def raw_pixels(images):
    """uint8 (n, C, H, W) -> pixels in [0, 1], (n, C·h·w), with h, w at most 32."""
    side = min(32, images.shape[-1])
    return F.adaptive_avg_pool2d(images.float() / 255, side).flatten(1)


@torch.no_grad()
def extract(images: Dataset, encoders: dict[str, Callable], config: Config, device: torch.device):
    """Features of all ``images`` by every one of ``encoders``: ({name: float32 (n, f)}, labels (n,)), on ``device``.

    Raises RunError, naming the file, for an unreadable image.
    """
    features, labels = {name: [] for name in encoders}, []
    training = {name: encoder.training for name, encoder in encoders.items() if isinstance(encoder, nn.Module)}
    for name in training:
        encoders[name].eval()
    batches = plain_batches(images, plain(config.image_size), config.workers, pin=device.type == "cuda")
    for x, y in batches:
        x = x.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp == "bf16"):
            for name, encoder in encoders.items():
                features[name].append(encoder(x).float())
        labels.append(y)
    for name, mode in training.items():
        encoders[name].train(mode)
    return {name: torch.cat(parts) for name, parts in features.items()}, torch.cat(labels).to(device)


def knn_accuracy(bank, bank_labels, queries, labels, *, classes: int, k: int | None = None, temperature: float = 0.1):
    """Accuracy of the cosine-weighted k-nearest-neighbour vote, weights exp(s/temperature).

    ``bank`` (n, f) with ``bank_labels`` (n,), ``queries`` (m, f) with ``labels`` (m,). k defaults to 200, or to 20
    where the bank holds fewer than 10,000 rows. Works through the queries in chunks: never m·n numbers at once.
    """
    k = k or (200 if len(bank) >= 10_000 else min(20, len(bank)))
    bank = F.normalize(bank).T
    rows, correct = max(1, 2**24 // bank.shape[1]), 0
    for chunk, truth in zip(queries.split(rows), labels.split(rows), strict=True):
        similarity, nearest = (F.normalize(chunk) @ bank).topk(k)  # (rows, k)
        votes = similarity.new_zeros(len(chunk), classes)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        correct += (votes.argmax(1) == truth).sum().item()
    return correct / len(labels)


def standardise(train, test):
    """Both feature matrices with the mean and standard deviation of ``train``; constant features become 0."""
    mean, std = train.mean(0), train.std(0)
    scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0)
    return (train - mean) * scale, (test - mean) * scale


def converged_probe(train, train_labels, test, labels) -> float:
    """Accuracy of scikit-learn's logistic regression (L2, C=1, run to convergence) on features already standardised."""
    head = LogisticRegression(max_iter=3000).fit(train.cpu().numpy(), train_labels.cpu().numpy())
    return head.score(test.cpu().numpy(), labels.cpu().numpy())


@one_thread()
def linear_probe(train, train_labels, test, labels, *, classes: int, epochs: int = 50) -> tuple[float, float]:
    """Accuracy (last epoch, best epoch) of a logistic regression on features already standardised.

    The protocol of the α-CL experiments: Adam 3e-4, weight decay 1e-3, batch 128, 50 epochs. Their published figure is
    the best epoch on the test set; the honest one is the last.
    """
    head = nn.utils.skip_init(nn.Linear, train.shape[1], classes, device=train.device)  # draws no random numbers
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-4, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(0)
    best = last = 0.0
    for _ in range(epochs):
        for rows in torch.randperm(len(train), generator=generator).to(train.device).split(128):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(head(train[rows]), train_labels[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            last = (head(test).argmax(1) == labels).float().mean().item()
        best = max(best, last)
    return last, best


def few_label_draws(labels, per_class: int, draws: int) -> list[torch.Tensor]:
    """``draws`` random choices of ``per_class`` rows of every class, as index tensors; the same ones on every call."""
    members = [(labels.cpu() == label).nonzero().flatten() for label in labels.cpu().unique()]
    if min(len(rows) for rows in members) < per_class:
        raise RunError(f"--few-label must not exceed the {min(map(len, members))} images of the smallest class, "
                       f"got {per_class}")
    chosen = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)
        chosen.append(torch.cat([rows[torch.randperm(len(rows), generator=generator)[:per_class]] for rows in members]))
    return chosen


def probe(train, train_labels, test, labels, *, classes: int) -> tuple[float, float]:
    """Accuracy (last epoch, best epoch) of the linear probe that fits so many labels, on features already standardised.

    Below 2,000 labels, the 50 epochs of :func:`linear_probe` are too few steps to converge, which would flatter features
    of many dimensions: there :func:`converged_probe` takes its place.
    """
    if len(train) < 2000:
        accuracy = converged_probe(train, train_labels, test, labels)
        return accuracy, accuracy
    return linear_probe(train, train_labels, test, labels, classes=classes)


def score(train, train_labels, test, labels, *, classes: int, few_label: int, draws: int) -> dict:
    """All figures for one kind of features: kNN and probe with every label, and with ``few_label`` per class.

    With few labels kNN takes k = ``few_label``, and the probe is :func:`converged_probe`.
    """
    scaled_train, scaled_test = standardise(train, test)
    last, best = probe(scaled_train, train_labels, scaled_test, labels, classes=classes)
    row = {"knn": knn_accuracy(train, train_labels, test, labels, classes=classes), "probe": last, "probe_best": best}
    knn, probes = [], []
    for rows in few_label_draws(train_labels, few_label, draws):
        there = rows.to(train.device)
        knn.append(knn_accuracy(train[there], train_labels[there], test, labels, classes=classes, k=few_label))
        probes.append(converged_probe(scaled_train[there], train_labels[there], scaled_test, labels))
    for name, values in (("knn_few", knn), ("probe_few", probes)):
        values = torch.tensor(values, dtype=torch.float64)
        row[name] = {"mean": values.mean().item(), "std": values.std(correction=0).item(), "draws": values.tolist()}
    return row


def figures(encoder: Encoder, data: Data, config: Config, device: torch.device, *, knn: bool, probed: bool) -> dict:
    """Accuracies of ``encoder`` on the test images of ``data``, with the labels of its training images.

    {"knn": …} with ``knn``, {"probe": last epoch, "probe_best": best epoch} with ``probed``, from the same features.
    """
    (bank, bank_labels), (queries, labels) = (extract(images, {"features": encoder}, config, device)
                                              for images in (data.train, data.test))
    bank, queries, classes, found = bank["features"], queries["features"], len(data.classes), {}
    if knn:
        found["knn"] = knn_accuracy(bank, bank_labels, queries, labels, classes=classes)
    if probed:
        bank, queries = standardise(bank, queries)
        found["probe"], found["probe_best"] = probe(bank, bank_labels, queries, labels, classes=classes)
    return found


def picture(encoder: Encoder, data: Data, config: Config, device: torch.device, path: Path, most: int = 2000) -> None:
    """Draw up to ``most`` test images by two principal components, untrained and trained encoder side by side."""
    images = data.test
    if len(images) > most:
        images = Subset(images, torch.linspace(0, len(images) - 1, most).long().tolist())
    encoders = {"untrained encoder": build(config).encoder.to(device), "trained encoder": encoder}
    features, labels = extract(images, encoders, config, device)
    report.embedding(features, labels, data.classes, path)


def evaluate(run: str | Path, *, few_label: int = 5, draws: int = 10, **changes) -> dict:
    """Judge the run in the folder ``run``; returns what it writes to eval.json, and draws embedding.png.

    ``changes`` replaces settings that leave the weights alone: device, workers, data_root. The rows "raw pixels",
    "untrained encoder" (same initial weights) and "trained encoder" share images, protocol and label draws. Raises
    RunError if there is no usable run or data set.
    """
    run = Path(run)
    config, state = checkpoint.open_run(run, changes)
    if few_label < 1 or draws < 1:
        raise RunError(f"--few-label and --draws must be at least 1, got {few_label} and {draws}")
    with settings(config):
        return _evaluate(run, config, state, few_label, draws)


def _evaluate(run: Path, config: Config, state: dict, few_label: int, draws: int) -> dict:
    device = pick_device(config.device)
    data = load(config)
    trained, untrained = build(config), build(config)
    trained.load_state_dict(state["model"])
    encoders = {"raw pixels": raw_pixels, "untrained encoder": untrained.encoder.to(device),
                "trained encoder": trained.encoder.to(device)}
    train, train_labels = extract(data.train, encoders, config, device)
    test, labels = extract(data.test, encoders, config, device)
    rows = {name: score(train[name], train_labels, test[name], labels, classes=len(data.classes), few_label=few_label,
                        draws=draws) for name in encoders}
    result = {"run": str(run), "dataset": config.dataset, "objective": config.objective, "epochs": state["epoch"],
              "of_epochs": config.epochs, "train_images": len(train_labels), "test_images": len(labels),
              "few_label": few_label, "rows": rows}
    try:
        (run / "eval.json").write_text(json.dumps(result, indent=2) + "\n")
        picture(trained.encoder, data, config, device, run / "embedding.png")
    except OSError as error:
        raise RunError(f"cannot write to {run}: {error.strerror}") from error
    return result
