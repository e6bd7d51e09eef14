"""The plots and the result table of a run."""

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from . import checkpoint, storage


def curves(metrics: Path, path: Path, title: str) -> None:
    """Plot loss, learning rate and, if measured, kNN and probe accuracy over the epochs.

    An epoch's mean loss is drawn at the epoch's middle, over the single steps' loss in a paler
    line.

    Args:
        metrics: the run's metrics.jsonl.
        path: image file to write.
        title: title of the figure.
    """
    rows = checkpoint.read_metrics(metrics)
    epochs = [row for row in rows if row["kind"] == "epoch"]
    if not epochs:  # a damaged log lost them
        storage.warn(f"{metrics} holds no epoch any more: {path.name} is not drawn")
        return
    per_epoch = epochs[-1]["step"] / epochs[-1]["epoch"]

    def points(rows, key, scale=1, shift=0):
        return [
            (row["step"] / per_epoch + shift, scale * row[key])
            for row in rows
            if row.get(key) is not None
        ]

    panels = [
        ("loss", points(epochs, "loss", shift=-0.5)),
        ("kNN accuracy, test images (%)", points(epochs, "knn", 100)),
        ("linear probe, test images (%)", points(epochs, "probe", 100)),
        ("learning rate", points(rows, "lr")),
    ]
    panels = [panel for panel in panels if panel[1]]
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    steps = points([row for row in rows if row["kind"] == "step"], "loss")
    if steps:
        axes[0].plot(*zip(*steps, strict=True), color="tab:blue", alpha=0.25, linewidth=1)
    for number, (axis, (label, values)) in enumerate(zip(axes, panels, strict=True)):
        marker = "o" if len(values) <= 20 else None
        axis.plot(*zip(*values, strict=True), marker=marker, markersize=3.5, color=f"C{number}")
        axis.set(xlabel="epoch", title=label, xlim=(0, 1.02 * epochs[-1]["epoch"]))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, color="0.35")
    storage.write_figure(path, figure, dpi=150)


def embedding(
    features: dict[str, torch.Tensor], labels: torch.Tensor, classes: list[str], path: Path
) -> None:
    """Scatter the first two principal components of ℓ2-normalised features.

    Args:
        features: title → feature matrix (n, f), one panel each.
        labels: (n,) class indices, shown by colour.
        classes: class names.
        path: image file to write.
    """
    figure = Figure(figsize=(4.4 * len(features) + 1, 4.4), layout="constrained")
    palette = matplotlib.colormaps["tab10" if len(classes) <= 10 else "turbo"]
    scale = 1 if len(classes) <= 10 else 1 / (len(classes) - 1)
    labels = labels.cpu()
    axes = figure.subplots(1, len(features), squeeze=False)[0]
    for axis, (name, matrix) in zip(axes, features.items(), strict=True):
        plane, share = _principal_plane(matrix)
        for label, text in enumerate(classes):
            axis.scatter(
                *plane[labels == label].T.tolist(),
                s=9,
                color=palette(label * scale),
                alpha=0.75,
                linewidths=0,
                label=text,
            )
        xlabel = f"PC 1 ({share[0]:.0%} of the variance)"
        axis.set(title=name, xticks=[], yticks=[], xlabel=xlabel, ylabel=f"PC 2 ({share[1]:.0%})")
        axis.set_aspect("equal", "datalim")
        axis.spines[["top", "right"]].set_visible(False)
    if len(classes) <= 20:
        handles, names = axis.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right center", frameon=False, markerscale=2)
    storage.write_figure(path, figure, dpi=150)


def _principal_plane(matrix: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Project ℓ2-normalised rows on two principal components: (n, 2), shares of variance."""
    rows = torch.nn.functional.normalize(matrix.double().cpu())
    u, s, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    plane = u[:, :2] * s[:2]
    signs = plane.gather(0, plane.abs().argmax(0, keepdim=True)).sign()  # svd's signs are arbitrary
    return plane * signs, (s[:2] ** 2 / (s**2).sum().clamp_min(1e-300)).tolist()


def table(result: dict) -> str:
    """Format the result of :func:`alphacl_fast.train.evaluate` as text, accuracies in per cent."""
    few = f"{result['few_label']}/class"
    lines = [("", "kNN", "linear probe", f"kNN, {few}", f"probe, {few}")]
    for name, row in result["rows"].items():
        all_labels = [f"{100 * row[key]:.1f}" for key in ("knn", "probe")]
        few_label = [
            f"{100 * row[key]['mean']:.1f} ± {100 * row[key]['std']:.1f}"
            for key in ("knn_few", "probe_few")
        ]
        lines.append((name, *all_labels, *few_label))
    left, *right = zip(*lines, strict=True)
    columns = [[cell.ljust(max(map(len, left))) for cell in left]]
    columns += [[cell.rjust(max(map(len, column))) for cell in column] for column in right]
    return "\n".join(map("  ".join, zip(*columns, strict=True)))
