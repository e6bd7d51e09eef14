"""What α does to a trained encoder's embeddings: one page of plots, with the pairs that it weighs most."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from alphacl_fast import AlphaSummary, alpha_summary

from . import checkpoint
from .augment import augmentation
from .config import Config, RunError
from .data import load, steps_of, training_batches
from .device import pick_device, settings
from .models import build

#: Beside the run's own objective, where none are named.
OBJECTIVES = ("infonce", "alpha_direct", "alpha_square", "uniform")


def inspect(
    run: str | Path, *, objectives: tuple[str, ...] = (), pairs: int = 1024, thumbnails: int = 12,
    out: str | Path | None = None, **changes,
) -> dict:
    """Draw inspect.png and write inspect.json for the run in a folder (or the folder of a checkpoint file).

    Two fresh views of up to ``pairs`` training images are embedded (evaluation mode); then α of the run's objective and of
    ``objectives``, each with its default options, at the run's temperature.

    Args:
        run: run folder, or its checkpoint.pt.
        thumbnails: of the nearest pairs of distinct images, drawn with their labels, distance and α.
        out: folder of the two files (default: the run's).
        changes: settings that leave the weights alone: device, workers, data_root.

    Returns:
        What inspect.json holds. Raises RunError if there is no usable run, data set, objective or folder.
    """
    run = Path(run)
    run = run.parent if run.is_file() else run
    out = run if out is None else Path(out)
    config, state = checkpoint.open_run(run, changes)
    if pairs < 2 or thumbnails < 1:
        raise RunError(f"--pairs must be at least 2 and --thumbnails at least 1, got {pairs} and {thumbnails}")
    with settings(config):
        views, labels, classes, z = _embed(config, state, pairs)
        temperature = float(state["loss"].get("temperature", config.temperature))
        summaries = _summaries(config, objectives or OBJECTIVES, temperature, *z)
    result = {
        "run": str(run), "objective": config.objective, "epochs": state["epoch"], "pairs": len(labels),
        "temperature": temperature, "negatives": config.negatives,
        "objectives": {name: _as_json(summary) for name, summary in summaries.items()},
    }  # fmt: skip
    nearest = _nearest(next(iter(summaries.values())), thumbnails, len(labels))
    rows = torch.tensor(labels * 2)
    hardest = next(iter(summaries.values())).hardest[:, 0].cpu()  # symmetric cross_view has anchors in both towers
    result["same_label"] = (rows[hardest] == rows[: len(hardest)]).float().mean().item()
    result["nearest"] = [
        {"distance": d, "alpha": a, "labels": [classes[labels[i]], classes[labels[j]]]} for i, j, _, d, a in nearest
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "inspect.json").write_text(json.dumps(result, indent=2) + "\n")
        _draw(config, summaries, nearest, views, [classes[label] for label in labels], out / "inspect.png")
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror}") from error
    return result


def _embed(config: Config, state: dict, pairs: int) -> tuple[Tensor, list[int], list[str], tuple[Tensor, Tensor]]:
    """Views uint8 (2·n, C, H, W), labels (n), class names, and embeddings float32 (n, 128) twice."""
    device, data = pick_device(config.device), load(config)
    net = build(config)
    net.load_state_dict(state["model"])
    net.to(device).eval()
    one_step = dataclasses.replace(config, batch_size=min(pairs, len(data.views)), micro_batch=256)
    views = augmentation(config.dataset, config.image_size)
    batches = training_batches(data.views, views, one_step, 0, 1, pin=device.type == "cuda")
    first, second = (torch.cat(parts) for parts in zip(*next(batches), strict=True))
    ((*keys,),) = steps_of(len(data.views), one_step, 0, 1)
    labels = [int(data.views[index][1]) for _, index in keys]
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.amp == "bf16"):
        z = [torch.cat([net(x.to(device)).float() for x in view.split(256)]) for view in (first, second)]
    return torch.cat([first, second]), labels, data.classes, (z[0], z[1])


def _summaries(config: Config, names: tuple[str, ...], temperature: float, z1: Tensor, z2: Tensor) -> dict[str, AlphaSummary]:
    members = [(f"{config.objective} (this run)", config.objective, config.option)]
    members += [(name, name, {}) for name in names if name != config.objective]
    summaries = {}
    for label, name, options in members:
        try:
            summaries[label] = alpha_summary(
                z1, z2, name, k=min(8, len(z1) - 1), temperature=temperature, negatives=config.negatives, **options
            )
        except (TypeError, ValueError) as error:
            raise RunError(f"--objective {name} cannot be shown: {error}") from error
    return summaries


def _as_json(summary: AlphaSummary) -> dict:
    return {"options": summary.objective, **summary.scalars(), "edges": summary.edges.tolist(),
            "pairs": summary.pairs.tolist(), "mass": summary.mass.tolist()}


def _nearest(summary: AlphaSummary, count: int, n: int) -> list[tuple[int, int, tuple[int, int], float, float]]:
    """(image, image, rows of [z1; z2], d², α) of the nearest pairs of distinct images, each pair of images once."""
    k = summary.hardest.shape[1]
    found, seen = [], set()
    order = summary.hardest_distance.flatten().argsort(stable=True).tolist()
    which, distance, alpha = (x.flatten().tolist() for x in (summary.hardest, summary.hardest_distance, summary.hardest_alpha))
    for place in order:
        i, j = place // k, which[place]
        images = (i % n, j % n)
        if frozenset(images) not in seen and math.isfinite(distance[place]):
            seen.add(frozenset(images))
            found.append((*images, (i, j), distance[place], alpha[place]))
        if len(found) == count:
            break
    return found


def _draw(config: Config, summaries: dict[str, AlphaSummary], nearest, views: Tensor, labels: list[str], path: Path) -> None:
    per_row = min(6, max(1, len(nearest)))
    rows = -(-len(nearest) // per_row)
    figure = Figure(figsize=(13, 4.2 + 1.9 * rows), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(4.2, 1.9 * rows))
    by_distance, effective = top.subplots(1, 2, width_ratios=(3, 2))
    first = next(iter(summaries.values()))
    centers, width = (first.edges[1:] + first.edges[:-1]) / 2, float(first.edges[1] - first.edges[0])
    shade = by_distance.twinx()
    shade.bar(centers.tolist(), (first.pairs / first.pairs.sum()).tolist(), width=width, color="0.88", zorder=0)
    shade.set(yticks=[])
    by_distance.set_zorder(1)
    by_distance.patch.set_visible(False)
    for name, summary in summaries.items():
        there = (summary.pairs > 0) & (summary.mass > 0).to(summary.pairs.device)
        mean = summary.mass[there] / summary.pairs[there]
        relative = mean / (summary.mass.sum() / summary.pairs.sum())
        by_distance.plot(centers[there.cpu()].tolist(), relative.tolist(), marker=".", markersize=4, linewidth=1.3, label=name)
    by_distance.axhline(1, color="0.7", linewidth=0.8, linestyle=":")
    by_distance.set(yscale="log", xlabel="d² between anchor and negative (grey: how many pairs)", ylabel="mean α / uniform α",
                    title="α against distance")
    by_distance.legend(frameon=False, fontsize=8)
    effective.boxplot([s.effective_negatives.tolist() for s in summaries.values()], orientation="horizontal", showfliers=False,
                      tick_labels=list(summaries))
    effective.axvline(first.n_neg, color="0.7", linewidth=0.8, linestyle=":")
    effective.set(xscale="log", xlabel=f"effective number of negatives 1/Σα² (of {first.n_neg:,})", title="Per anchor")
    effective.invert_yaxis()
    for axis in (by_distance, effective, shade):
        axis.spines[["top", "right"]].set_visible(False)
    bottom.suptitle("Nearest pairs of distinct images: labels, d², α relative to a uniform one", fontsize=10, color="0.35")
    uniform = float(first.row_sum.mean()) / first.n_neg
    axes = bottom.subplots(rows, per_row, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (i, j, (a, b), distance, alpha) in zip(axes.flat, nearest, strict=False):
        pair = torch.cat([views[a], views[b]], dim=2).permute(1, 2, 0)  # side by side (H, 2W, C)
        axis.imshow(pair.squeeze(2).numpy() if pair.shape[2] == 1 else pair.numpy(), cmap="gray", interpolation="nearest")
        axis.set_title(f"{labels[i]} | {labels[j]}\nd² {distance:.3f}   α {alpha / uniform:.3g}×", fontsize=8)
    figure.suptitle(f"{config.objective} on {config.dataset}, temperature {config.temperature:g}", fontsize=11, color="0.35")
    figure.savefig(path, dpi=130)
