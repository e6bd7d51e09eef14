"""Pictures and the table of a run."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure


def curves(metrics: Path, path: Path, title: str) -> None:
    """Draw loss, learning rate and, where measured, kNN and probe accuracy over the epochs of ``metrics`` (a metrics.jsonl).

    The mean loss of an epoch stands at its middle, over the paler loss of single steps.
    """
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    per_epoch = epochs[-1]["step"] / epochs[-1]["epoch"]

    def points(rows, key, scale=1, shift=0):
        return [(row["step"] / per_epoch + shift, scale * row[key]) for row in rows if row.get(key) is not None]

    panels = [("loss", points(epochs, "loss", shift=-0.5)), ("kNN accuracy, test images (%)", points(epochs, "knn", 100)),
              ("linear probe, test images (%)", points(epochs, "probe", 100)), ("learning rate", points(rows, "lr"))]
    panels = [panel for panel in panels if panel[1]]
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    axes[0].plot(*zip(*points([row for row in rows if row["kind"] == "step"], "loss"), strict=True),
                 color="tab:blue", alpha=0.25, linewidth=1)
    colors = ("tab:blue", "tab:orange", "tab:green", "tab:red")
    for axis, (label, values), color in zip(axes, panels, colors, strict=False):
        axis.plot(*zip(*values, strict=True), marker="o" if len(values) <= 20 else None, markersize=3.5, color=color)
        axis.set(xlabel="epoch", title=label, xlim=(0, 1.02 * epochs[-1]["epoch"]))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, color="0.35")
    figure.savefig(path, dpi=150)


def embedding(features: dict[str, torch.Tensor], labels: torch.Tensor, classes: list[str], path: Path) -> None:
    """Scatter two principal components of each ℓ2-normalised feature matrix (n, f), coloured by label (n,)."""
    figure = Figure(figsize=(4.4 * len(features) + 1, 4.4), layout="constrained")
    palette = matplotlib.colormaps["tab10" if len(classes) <= 10 else "turbo"]
    colors = [palette(i if len(classes) <= 10 else i / (len(classes) - 1)) for i in range(len(classes))]
    labels = labels.cpu()
    for axis, (name, matrix) in zip(figure.subplots(1, len(features), squeeze=False)[0], features.items(), strict=True):
        plane, share = _principal_plane(matrix)
        for label, color in enumerate(colors):
            axis.scatter(*plane[labels == label].T.tolist(), s=9, color=color, alpha=0.75, linewidths=0,
                         label=classes[label])
        axis.set(title=name, xticks=[], yticks=[], xlabel=f"PC 1 ({share[0]:.0%} of the variance)",
                 ylabel=f"PC 2 ({share[1]:.0%})")
        axis.set_aspect("equal", "datalim")
        axis.spines[["top", "right"]].set_visible(False)
    if len(classes) <= 20:
        handles, names = axis.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right center", frameon=False, markerscale=2)
    figure.savefig(path, dpi=150)


def _principal_plane(matrix: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """First two principal components (n, 2) of the ℓ2-normalised rows, and their shares of the variance."""
    rows = torch.nn.functional.normalize(matrix.double().cpu())
    rows = rows - rows.mean(0)
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    plane = u[:, :2] * s[:2]
    signs = plane.gather(0, plane.abs().argmax(0, keepdim=True)).sign()  # svd leaves the sign open
    return plane * signs, (s[:2] ** 2 / (s**2).sum().clamp_min(1e-300)).tolist()


def table(result: dict) -> str:
    """The rows of :func:`alphacl_fast.train.evaluate` as aligned text, accuracies in per cent."""
    few = f"{result['few_label']}/class"
    lines = [("", "kNN", "linear probe", f"kNN, {few}", f"probe, {few}")]
    for name, row in result["rows"].items():
        few_label = [f"{100 * row[key]['mean']:.1f} ± {100 * row[key]['std']:.1f}" for key in ("knn_few", "probe_few")]
        lines.append((name, f"{100 * row['knn']:.1f}", f"{100 * row['probe']:.1f}", *few_label))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    aligned = [[name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]
               for name, *cells in lines]
    return "\n".join("  ".join(cells) for cells in aligned)
