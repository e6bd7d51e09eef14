"""Inspection of a trained encoder's pair weights α: one page of plots and the nearest pairs."""

import dataclasses
import json
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from alphacl_fast import AlphaSummary, alpha_summary

from . import checkpoint, storage
from .augment import augmentation
from .config import Config, RunError
from .data import load, steps_of, training_batches
from .device import autocast, pick_device, settings, usual_default_device
from .models import build
from .weights import evaluated

#: Objectives compared with the run's own by default.
OBJECTIVES = ("infonce", "alpha_direct", "alpha_square", "uniform")


@usual_default_device()
def inspect(
    run: str | Path,
    *,
    objectives: tuple[str, ...] = (),
    pairs: int = 1024,
    thumbnails: int = 12,
    out: str | Path | None = None,
    **changes,
) -> dict:
    """Plot the pair weights α of a run's embeddings: writes inspect.png and inspect.json.

    Two new views of some training images are embedded in evaluation mode. Then α is computed for
    the run's objective and, with their default options, for the other ``objectives``, all at the
    run's temperature.

    Args:
        run: run folder, or its checkpoint.pt.
        objectives: names of objectives to compare with; by default infonce, alpha_direct,
            alpha_square and uniform.
        pairs: most images to embed, at least 2.
        thumbnails: number of nearest pairs of distinct images to draw, with labels, distance and α.
        out: folder of the two files; by default the run's.
        **changes: fields of :class:`Config` to override that do not affect the weights: device,
            workers, data_root.

    Returns:
        The contents of inspect.json.

    Raises:
        RunError: there is no usable run, data set, objective or folder.
    """
    run = Path(run)
    run = run.parent if run.is_file() else run
    out = run if out is None else Path(out)
    config, state = checkpoint.open_run(run, changes)
    if pairs < 2 or thumbnails < 1:
        raise RunError(
            f"--pairs must be at least 2 and --thumbnails at least 1, got {pairs} and {thumbnails}"
        )
    storage.check_writable(out)
    with settings(config):
        views, labels, classes, z = _embed(config, state, pairs)
        temperature = float(state["loss"].get("temperature", config.temperature))
        summaries = _summaries(config, objectives or OBJECTIVES, temperature, *z)
    own = next(iter(summaries.values()))
    nearest = _nearest(own, thumbnails, len(labels))
    rows = torch.tensor(labels * 2)
    hardest = own.hardest[:, 0].cpu()  # symmetric cross_view has anchors in both towers
    result = {
        "run": str(run),
        "objective": config.objective,
        "epochs": state["epoch"],
        "pairs": len(labels),
        "temperature": temperature,
        "negatives": config.negatives,
        "objectives": {name: _as_json(summary) for name, summary in summaries.items()},
        "same_label": (rows[hardest] == rows[: len(hardest)]).float().mean().item(),
        "nearest": [
            {"distance": d, "alpha": a, "labels": [classes[rows[i]], classes[rows[j]]]}
            for i, j, d, a in nearest
        ],
    }
    with storage.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        storage.write(out / "inspect.json", (json.dumps(result, indent=2) + "\n").encode())
        names = [classes[row] for row in rows]
        _draw(config, summaries, nearest, views, names, out / "inspect.png")
    return result


def _embed(
    config: Config, state: dict, pairs: int
) -> tuple[Tensor, list[int], list[str], list[Tensor]]:
    """Compute views uint8 (2·n, C, H, W), labels (n), class names, two embeddings (n, 128)."""
    device = pick_device(config.device)
    data, net = load(config, device), build(config)
    net.load_state_dict({name: evaluated(state)[name] for name in net.state_dict()})
    net.to(device).eval()
    size = min(pairs, len(data.views))
    one_step = dataclasses.replace(config, batch_size=size, micro_batch=256)
    augment, pin = augmentation(config.dataset, config.image_size), device.type == "cuda"
    batches = training_batches(data.views, augment, one_step, 0, 1, pin)
    views = [torch.cat(parts) for parts in zip(*next(batches), strict=True)]
    ((*keys,),) = steps_of(len(data.views), one_step, 0, 1)
    labels = [int(data.views[index][1]) for _, index in keys]
    with torch.no_grad(), autocast(config, device):
        z = [torch.cat([net(x.to(device)).float() for x in view.split(256)]) for view in views]
    return torch.cat(views), labels, data.classes, z


def _summaries(
    config: Config, names: tuple[str, ...], temperature: float, z1: Tensor, z2: Tensor
) -> dict[str, AlphaSummary]:
    members = [(f"{config.objective} (this run)", config.objective, config.option)]
    members += [(name, name, {}) for name in names if name != config.objective]
    fixed = {"temperature": temperature, "negatives": config.negatives, "k": min(8, len(z1) - 1)}
    summaries = {}
    for label, name, options in members:
        try:
            summaries[label] = alpha_summary(z1, z2, name, **fixed, **options)
        except (TypeError, ValueError) as error:
            raise RunError(f"--objective {name} cannot be shown: {error}") from error
    return summaries


def _as_json(summary: AlphaSummary) -> dict:
    histogram = {name: getattr(summary, name).tolist() for name in ("edges", "pairs", "mass")}
    return {"options": summary.objective, **summary.scalars(), **histogram}


def _nearest(summary: AlphaSummary, count: int, n: int) -> list[tuple[int, int, float, float]]:
    """Find the nearest pairs of distinct images: (row, row, d², α), rows of [z1; z2].

    Each pair of images is listed once.
    """
    k = summary.hardest.shape[1]
    found, seen = [], set()
    which, distance, alpha = (
        x.flatten().tolist()
        for x in (summary.hardest, summary.hardest_distance, summary.hardest_alpha)
    )
    for place in summary.hardest_distance.flatten().argsort(stable=True).tolist():
        i, j = place // k, which[place]
        images = frozenset((i % n, j % n))
        if images not in seen and math.isfinite(distance[place]):
            seen.add(images)
            found.append((i, j, distance[place], alpha[place]))
        if len(found) == count:
            break
    return found


def _draw(
    config: Config,
    summaries: dict[str, AlphaSummary],
    nearest: list[tuple[int, int, float, float]],
    views: Tensor,
    labels: list[str],
    path: Path,
) -> None:
    per_row = min(6, max(1, len(nearest)))
    rows = -(-len(nearest) // per_row)
    figure = Figure(figsize=(13, 4.2 + 1.9 * rows), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(4.2, 1.9 * rows))
    by_distance, effective = top.subplots(1, 2, width_ratios=(3, 2))
    first = next(iter(summaries.values()))
    centers = (first.edges[1:] + first.edges[:-1]) / 2
    width = float(first.edges[1] - first.edges[0])
    shade = by_distance.twinx()
    counts = (first.pairs / first.pairs.sum()).tolist()
    shade.bar(centers.tolist(), counts, width=width, color="0.88", zorder=0)
    shade.set(yticks=[])
    by_distance.set_zorder(1)
    by_distance.patch.set_visible(False)
    for name, summary in summaries.items():
        there = (summary.pairs > 0) & (summary.mass > 0).to(summary.pairs.device)
        mean = summary.mass[there] / summary.pairs[there]
        relative = mean / (summary.mass.sum() / summary.pairs.sum())
        by_distance.plot(
            centers[there.cpu()].tolist(),
            relative.tolist(),
            marker=".",
            markersize=4,
            linewidth=1.3,
            label=name,
        )
    line = {"color": "0.7", "linewidth": 0.8, "linestyle": ":"}
    by_distance.axhline(1, **line)
    by_distance.set(
        yscale="log",
        xlabel="d² between anchor and negative (grey: number of pairs)",
        ylabel="mean α / uniform α",
        title="α against distance",
    )
    by_distance.legend(frameon=False, fontsize=8)
    effective.boxplot(
        [s.effective_negatives.tolist() for s in summaries.values()],
        orientation="horizontal",
        showfliers=False,
        tick_labels=list(summaries),
    )
    effective.axvline(first.n_neg, **line)
    xlabel = f"effective number of negatives 1/Σα² (of {first.n_neg:,})"
    effective.set(xscale="log", xlabel=xlabel, title="Per anchor")
    effective.invert_yaxis()
    for axis in (by_distance, effective, shade):
        axis.spines[["top", "right"]].set_visible(False)
    bottom.suptitle(
        "Nearest pairs of distinct images: labels, d², α relative to uniform weights",
        fontsize=10,
        color="0.35",
    )
    uniform = float(first.row_sum.mean()) / first.n_neg
    axes = bottom.subplots(rows, per_row, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (i, j, distance, alpha) in zip(axes.flat, nearest, strict=False):
        pair = torch.cat([views[i], views[j]], dim=2).permute(1, 2, 0)  # side by side (H, 2W, C)
        axis.imshow(pair.numpy(), cmap="gray", interpolation="nearest")  # (…, 1) is greyscale
        weight = f"d² {distance:.3f}   α {alpha / uniform:.3g}×"
        axis.set_title(f"{labels[i]} | {labels[j]}\n{weight}", fontsize=8)
    title = f"{config.objective} on {config.dataset}, temperature {config.temperature:g}"
    figure.suptitle(title, fontsize=11, color="0.35")
    storage.write_figure(path, figure, dpi=130)
