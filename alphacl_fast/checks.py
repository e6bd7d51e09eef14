"""Theorem checks: the paper's theorems verified numerically, by ``alphacl theory``.

Each check (pca, rank, relu, gradient) is a table whose rows are held to a tolerance. All
computations are small, in float64, and determined by the seeds. Source of the theorems:
arXiv:2201.12680.
"""

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import theory
from .functional import alpha_cl_loss
from .pair_weights import alpha

PAIRS, FEATURES, HIDDEN = 64, 8, 6
EXACT = 1e-6  # tolerance of E, singular values and directions at a maximum
#: The eight losses of the paper's φ/ψ table.
PAIR_LOSSES = (
    "infonce", "mine", "triplet", "soft_triplet", "n_plus_1_tuplet", "lifted_structured",
    "modified_triplet", "triplet_contrastive",
)  # fmt: skip
SETTINGS = {"similarity": "euclidean", "negatives": "one_view"}


class Check(NamedTuple):
    """The outcome of one theorem check."""

    text: str  # title
    rows: list[dict[str, Any]]  # column → cell; the last column is "holds"
    curves: dict[str, Tensor]  # title → 2E/λ_max over the steps, (steps + 1, seeds)

    @property
    def holds(self) -> bool:
        """Whether every row is within its tolerance."""
        return all(row["holds"] for row in self.rows)


def _views(seed: int) -> tuple[Tensor, Tensor]:
    """Draw two views (N, D); unequal feature variances make the top eigenvalue simple."""
    made = {"dtype": torch.float64, "device": "cpu"}
    draw = {"generator": torch.Generator("cpu").manual_seed(seed), **made}
    scale = torch.linspace(1.5, 0.5, FEATURES, **made)
    x1 = torch.randn(PAIRS, FEATURES, **draw) * scale
    return x1, x1 + 0.3 * torch.randn(PAIRS, FEATURES, **draw)


def _ascended(
    value: theory.Energy, layers: int, norm: str, seeds: int
) -> tuple[theory.Ascent, Tensor]:
    """Train linear networks from random weights; the ascent, and σ₂/σ₁ (layers, seeds)."""
    start = theory.random_weights([FEATURES] + [HIDDEN] * layers, norm, range(seeds))
    end = theory.ascend(value, start, norm, rate=1.0, steps=1000)
    return end, torch.stack([theory.singular_ratio(w) for w in end.weights])


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count > 1)}"


def pca(seeds: int = 5) -> Check:
    """Check that deep linear networks do PCA.

    They must reach 2E = λ_max of C_α[x] with all layers of rank 1 and the first layer along the top
    eigenvector. α is the exact min player on the data themselves.
    """
    fixed = {"temperature": 1.0, "similarity": "euclidean"}
    of_seeds = map(_views, range(seeds))
    covariance = torch.stack(
        [theory.contrastive_covariance(*views, "alpha_entropy", **fixed) for views in of_seeds]
    )
    covariance /= torch.linalg.matrix_norm(covariance, 2, keepdim=True)  # one step size fits all
    values, vectors = torch.linalg.eigh(covariance)
    top, direction = values[:, -1], vectors[:, :, -1]
    rows, curves = [], {}
    for norm in theory.NORMS:
        for layers in (1, 2, 3, 4):
            end, rank = _ascended(theory.linear_energy(covariance), layers, norm, seeds)
            ratio = 2 * end.energies / top
            first = torch.linalg.svd(end.weights[0]).Vh[:, 0]
            off = 1 - (first * direction).sum(1).abs()
            worst = max((ratio[-1] - 1).abs().max(), rank.max(), off.max())
            rows.append({
                "norm": norm, "layers": layers, "2E/λ_max": ratio[-1].min().item(),
                "|2E/λ_max − 1|": _most(ratio[-1] - 1),
                "σ₂/σ₁ per layer": [r.max().item() for r in rank],
                "1 − |⟨v₀,u₁⟩|": _most(off), "holds": bool(worst < EXACT),
            })  # fmt: skip
            curves[f"{norm}, {_layers(layers)}"] = ratio
    text = f"Deep linear networks do PCA on C_α[x]; {seeds} seeds of data and weights, worst shown"
    return Check(text, rows, curves)


def rank(seeds: int = 5) -> Check:
    """Check the violated conditions: a repeated top eigenvalue, and λ_max < 0."""
    spectra = {
        "λ₁ = λ₂ > 0": [1.0, 1.0, 0.6, 0.5, 0.3, 0.2, 0.1, 0.0],
        "λ_max < 0": [-0.2, -0.3, -0.4, -0.5, -0.6, -0.7, -0.8, -1.0],
    }
    rows, curves = [], {}
    for name, spectrum in spectra.items():
        top, c = (
            max(spectrum),
            torch.diag(torch.tensor(spectrum, dtype=torch.float64, device="cpu")),
        )
        for layers in (1, 2, 3, 4):
            # The step size 1 is below 2/(|λ_min| − λ_max) = 1.67; a longer step would end in the
            # most negative direction.
            end, ranks = _ascended(theory.linear_energy(c), layers, "frobenius", seeds)
            ratio, worst = 2 * end.energies / top, ranks.amax(0)
            if top < 0 and layers > 1:
                expected, holds = "collapse: E → 0", ratio[-1].abs().max() < 1e-4
            elif layers > 1 or top < 0:
                expected = "2E = λ_max, rank 1"
                holds = max(_most(ratio[-1] - 1), worst.max()) < EXACT
            else:
                expected = "2E = λ_max, rank above 1"
                holds = _most(ratio[-1] - 1) < EXACT and worst.min() > 1e-2
            rows.append({
                "C_α[x]": name, "layers": layers, "expected": expected,
                "2E/λ_max": ratio[-1].mean().item(), "σ₂/σ₁ least": worst.min().item(),
                "σ₂/σ₁ most": worst.max().item(), "holds": bool(holds),
            })  # fmt: skip
            curves[f"{name}, {_layers(layers)}"] = ratio
    text = f"Conditions of the theorem; ‖W_l‖_F = 1, {seeds} seeds of weights"
    return Check(text, rows, curves)


def relu(seeds: int = 10) -> Check:
    """Check two-layer networks on one-hot data.

    With ReLU and norm-bounded filters the maxima have higher rank; linear networks have rank 1.
    """
    categories, hidden = 8, 4
    x = torch.eye(categories, dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(1)
    a = torch.rand(x.shape, generator=generator, dtype=torch.float64, device="cpu")
    covariance = theory.contrastive_covariance(x, x, a)
    top = torch.linalg.eigvalsh(covariance)[-1]
    rows, curves = [], {}
    for norm in theory.NORMS:
        energies = {
            "ReLU": theory.relu_energy(x, x, a), "linear": theory.linear_energy(covariance),
        }  # fmt: skip
        for kind, value in energies.items():
            start = theory.random_weights([categories, hidden, hidden], norm, range(seeds))
            end = theory.ascend(value, start, norm, rate=0.5, steps=2000)
            ranks, second = (torch.linalg.matrix_rank(w, rtol=1e-4).tolist() for w in end.weights)
            higher = kind == "ReLU" and norm == "filter"
            holds = min(ranks) > 1 if higher else max(ranks + second) == 1
            ratio = 2 * end.energies / top
            change = _most((end.energies[-1] - end.energies[-200]) / top)
            rows.append({
                "layers": f"two, {kind}", "norm": norm, "rank of W₁ (networks)": _counts(ranks),
                "rank of W₂ (networks)": _counts(second),
                "σ₂/σ₁ of W₁": _most(theory.singular_ratio(end.weights[0])),
                "2E/λ_max": ratio[-1].max().item(), "still moving": change,
                "holds": change < EXACT and holds,
            })  # fmt: skip
            curves[f"two layers, {kind}, {norm}"] = ratio
    text = f"Ranks at the maxima, one-hot data of {categories} categories, {seeds} seeds of weights"
    return Check(text, rows, curves)


def gradient(seeds: int = 3) -> Check:
    """Check ∇L = −∇E_α, and coordinate-wise optimisation.

    The first holds for every φ/ψ loss with α held fixed. Alternating between the exact min player
    and one ascent step of the max player equals gradient descent on InfoNCE.
    """
    rows = []

    def row(claim: str, of: str, difference: float, holds: bool) -> None:
        rows.append({"claim": claim, "of": of, "largest difference": difference, "holds": holds})

    for name in PAIR_LOSSES:
        worst = 0.0
        for seed in range(seeds):
            net = _network(seed)
            z1, z2 = (net(x) for x in _views(seed))
            a = alpha(z1, z2, name, **SETTINGS)
            values = alpha_cl_loss(z1, z2, name, **SETTINGS), -theory.energy(z1, z2, a) / PAIRS
            weights = [*net.parameters()]
            ours, theirs = (
                nn.utils.parameters_to_vector(torch.autograd.grad(v, weights, retain_graph=True))
                for v in values
            )
            worst = max(worst, ((ours - theirs).norm() / theirs.norm()).item())
        row("∇L = −∇E_sg(α)", name, worst, worst < 1e-10)
    apart, identity, descends = 0.0, 0.0, True
    for seed in range(seeds):
        by_loss, by_players, between = _descend(seed)
        apart = max(apart, _most(by_loss - by_players))
        identity = max(identity, between)
        descends = descends and bool((by_players[1:] < by_players[:-1]).all())
    what, holds = "infonce(epsilon=0, temperature_scaled=True)", apart < 1e-10 and descends
    row("L = −min_α[E_α − R_H]/N", what, identity, identity < 1e-12)
    row("alternating players = back-propagation, 50 steps", what, apart, holds)
    text = f"Two players; a network of two layers, {seeds} seeds of data and weights, relative"
    return Check(f"{text}, worst shown", rows, {})


def _network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, HIDDEN)).double()


def _descend(seed: int, steps: int = 50, rate: float = 0.05) -> tuple[Tensor, Tensor, float]:
    """Minimise InfoNCE by back-propagation, and by alternating players.

    Returns:
        The losses (steps,) of either, and the largest |L + min_α[E_α − R_H]/N| relative to L.
    """
    views = _views(seed)
    of_both, between = [], 0.0
    for players in (False, True):
        net, losses = _network(seed), []
        for _ in range(steps):
            z1, z2 = (net(x) for x in views)
            loss = alpha_cl_loss(
                z1, z2, "infonce", epsilon=0.0, temperature_scaled=True, **SETTINGS
            )
            losses.append(loss.item())
            if players:
                a = alpha(z1, z2, "alpha_entropy", **SETTINGS)  # τ = 0.5 in both
                e = theory.energy(z1, z2, a)
                entropy = -torch.xlogy(a, a).sum()
                difference = loss + (e - 0.5 * entropy) / PAIRS
                between = max(between, abs(difference.item()) / loss.abs().item())
                loss = -e / PAIRS
            weights = [*net.parameters()]
            for p, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                p.data -= rate * g
        of_both.append(torch.tensor(losses, dtype=torch.float64, device="cpu"))
    return of_both[0], of_both[1], between


def _most(x: Tensor) -> float:
    return x.abs().max().item()


def _counts(values: list[int]) -> str:
    return ", ".join(f"{value} ({count})" for value, count in sorted(Counter(values).items()))


CHECKS: dict[str, Callable[..., Check]] = {f.__name__: f for f in (pca, rank, relu, gradient)}


def table(check: Check) -> str:
    """Format a check as aligned text."""
    lines = [[*check.rows[0]], *([_cell(value) for value in row.values()] for row in check.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [check.text]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        text.append("  " + "  ".join(cells).rstrip())
    return "\n".join(text)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, list):
        return " ".join(map(_cell, value))
    if isinstance(value, float):
        return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.9g}"
    return str(value)


def write(
    checks: dict[str, Check], out: Path, replace: Callable[[Path, bytes], None] = Path.write_bytes
) -> list[Path]:
    """Write theory.json and, for checks with curves, theory-NAME.png.

    Args:
        checks: name → outcome.
        out: folder to write to.
        replace: writes a file; one that replaces it at once leaves no half of it after a crash.

    Returns:
        The files written.
    """
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    written = [out / "theory.json"]
    saved = {name: {"text": c.text, "rows": c.rows} for name, c in checks.items()}
    replace(written[0], (json.dumps(saved, indent=2, ensure_ascii=False) + "\n").encode())
    for name, check in checks.items():
        if not check.curves:
            continue
        columns = min(4, len(check.curves))
        height = -(-len(check.curves) // columns)
        figure = Figure(figsize=(3.2 * columns, 2.6 * height), layout="constrained")
        axes = figure.subplots(height, columns, squeeze=False).flat
        for axis, (title, curve) in zip(axes, check.curves.items(), strict=True):
            axis.plot(range(1, len(curve) + 1), curve.numpy(), linewidth=1)
            axis.axhline(1, color="0.7", linewidth=0.8, linestyle=":")
            axis.set(title=title, xlabel="step", ylabel="2E/λ_max", xscale="log")
            axis.title.set_fontsize(9)
            axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(check.text, fontsize=10, color="0.35")
        written.append(out / f"theory-{name}.png")
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120)
        replace(written[-1], image.getvalue())
    return written
