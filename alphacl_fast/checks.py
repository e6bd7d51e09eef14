"""What the paper proves of the two players, run: ``alphacl theory pca | rank | relu | gradient``.

Every claim is a table of rows, each with the tolerance that it is held to. Everything is float64, small, and a function of
the seeds. Source of the claims: arXiv:2201.12680.
"""

from __future__ import annotations

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
EXACT = 1e-6  # of E, singular values and directions at a maximum
#: The eight losses of the paper's φ/ψ table.
PAIR_LOSSES = (
    "infonce", "mine", "triplet", "soft_triplet", "n_plus_1_tuplet", "lifted_structured", "modified_triplet",
    "triplet_contrastive",
)  # fmt: skip
SETTINGS = {"similarity": "euclidean", "negatives": "one_view"}


class Claim(NamedTuple):
    """One claim as run: a sentence, rows of named cells with "holds" last, and E/λ_max over the steps of its networks."""

    text: str
    rows: list[dict[str, Any]]
    curves: dict[str, Tensor]  # title → (steps + 1, seeds)

    @property
    def holds(self) -> bool:
        return all(row["holds"] for row in self.rows)


def _views(seed: int) -> tuple[Tensor, Tensor]:
    """Two views (N, D) of data whose features differ in variance, so that the top eigenvalue stands alone."""
    generator = torch.Generator().manual_seed(seed)
    shape = {"generator": generator, "dtype": torch.float64}
    x1 = torch.randn(PAIRS, FEATURES, **shape) * torch.linspace(1.5, 0.5, FEATURES, dtype=torch.float64)
    return x1, x1 + 0.3 * torch.randn(PAIRS, FEATURES, **shape)


def pca(seeds: int = 5) -> Claim:
    """Deep linear networks reach 2E = λ_max of C_α[x], all layers of rank 1, the first along the top eigenvector."""
    covariances = []
    for seed in range(seeds):  # α: the exact min player on the data themselves
        x1, x2 = _views(seed)
        c = theory.contrastive_covariance(x1, x2, "alpha_entropy", temperature=1.0, similarity="euclidean")
        covariances.append(c / torch.linalg.matrix_norm(c, 2))  # so that one step size serves all
    covariance = torch.stack(covariances)
    values, vectors = torch.linalg.eigh(covariance)
    top, direction = values[:, -1], vectors[:, :, -1]
    rows, curves = [], {}
    for norm in theory.NORMS:
        for layers in (1, 2, 3, 4):
            start = theory.random_weights([FEATURES] + [HIDDEN] * layers, norm, range(seeds))
            end = theory.ascend(theory.linear_energy(covariance), start, norm, rate=1.0, steps=1000)
            ratio = 2 * end.energies / top
            rank = torch.stack([theory.singular_ratio(w) for w in end.weights])  # (layers, seeds)
            first = torch.linalg.svd(end.weights[0]).Vh[:, 0]
            off = 1 - (first * direction).sum(1).abs()
            worst = max((ratio[-1] - 1).abs().max(), rank.max(), off.max())
            rows.append({
                "norm": norm, "layers": layers, "2E/λ_max": ratio[-1].min().item(), "|2E/λ_max − 1|": _most(ratio[-1] - 1),
                "σ₂/σ₁ per layer": [r.max().item() for r in rank], "1 − |⟨v₀,u₁⟩|": _most(off), "holds": bool(worst < EXACT),
            })  # fmt: skip
            curves[f"{norm}, {layers} layer{'s' * (layers > 1)}"] = ratio
    return Claim(f"Deep linear networks do PCA on C_α[x]; {seeds} seeds of data and weights, worst shown", rows, curves)


def rank(seeds: int = 5) -> Claim:
    """Where a condition of the theorem fails: a repeated top eigenvalue, and λ_max < 0."""
    spectra = {
        "λ₁ = λ₂ > 0": torch.tensor([1.0, 1.0, 0.6, 0.5, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64),
        "λ_max < 0": torch.tensor([-0.2, -0.3, -0.4, -0.5, -0.6, -0.7, -0.8, -1.0], dtype=torch.float64),
    }
    rows, curves = [], {}
    for name, spectrum in spectra.items():
        top = spectrum.max()
        for layers in (1, 2, 3, 4):
            start = theory.random_weights([FEATURES] + [HIDDEN] * layers, "frobenius", range(seeds))
            value = theory.linear_energy(torch.diag(spectrum))
            # η < 2/(|λ_min| − λ_max) = 1.67: a longer step would go over to the most negative direction
            end = theory.ascend(value, start, "frobenius", rate=1.0, steps=1000)
            ratio, worst = 2 * end.energies / top, torch.stack([theory.singular_ratio(w) for w in end.weights]).amax(0)
            if top < 0 and layers > 1:
                expected, holds = "collapse: E → 0", ratio[-1].abs().max() < 1e-4
            elif layers > 1 or top < 0:
                expected, holds = "2E = λ_max, rank 1", max((ratio[-1] - 1).abs().max(), worst.max()) < EXACT
            else:
                expected = "2E = λ_max, rank above 1"
                holds = (ratio[-1] - 1).abs().max() < EXACT and worst.min() > 1e-2
            rows.append({
                "C_α[x]": name, "layers": layers, "expected": expected, "2E/λ_max": ratio[-1].mean().item(),
                "σ₂/σ₁ least": worst.min().item(), "σ₂/σ₁ most": worst.max().item(), "holds": bool(holds),
            })  # fmt: skip
            curves[f"{name}, {layers} layer{'s' * (layers > 1)}"] = ratio
    return Claim(f"Conditions of the theorem; ‖W_l‖_F = 1, {seeds} seeds of weights", rows, curves)


def relu(seeds: int = 10) -> Claim:
    """Two layers on one-hot data: with ReLU and bounded filters maxima have higher rank; linear networks have rank 1."""
    categories, hidden = 8, 4
    x = torch.eye(categories, dtype=torch.float64)
    a = torch.rand(categories, categories, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    covariance = theory.contrastive_covariance(x, x, a)
    top = torch.linalg.eigvalsh(covariance)[-1]
    rows, curves = [], {}
    for norm in theory.NORMS:
        for kind, value in (("ReLU", theory.relu_energy(x, x, a)), ("linear", theory.linear_energy(covariance))):
            start = theory.random_weights([categories, hidden, hidden], norm, range(seeds))
            end = theory.ascend(value, start, norm, rate=0.5, steps=2000)
            ranks = torch.linalg.matrix_rank(end.weights[0], rtol=1e-4).tolist()
            second = torch.linalg.matrix_rank(end.weights[1], rtol=1e-4).tolist()
            higher = kind == "ReLU" and norm == "filter"
            settled = _most((end.energies[-1] - end.energies[-200]) / top)
            rows.append({
                "layers": f"two, {kind}", "norm": norm, "rank of W₁ (networks)": _counts(ranks),
                "rank of W₂ (networks)": _counts(second), "σ₂/σ₁ of W₁": _most(theory.singular_ratio(end.weights[0])),
                "2E/λ_max": (2 * end.energies[-1] / top).max().item(), "still moving": settled,
                "holds": (min(ranks) > 1 if higher else max(ranks + second) == 1) and settled < EXACT,
            })  # fmt: skip
            curves[f"two layers, {kind}, {norm}"] = 2 * end.energies / top
    return Claim(f"Ranks at the maxima, one-hot data of {categories} categories, {seeds} seeds of weights", rows, curves)


def gradient(seeds: int = 3) -> Claim:
    """∇L = −∇E_α with α held fixed for every φ/ψ loss, and coordinate-wise optimisation is gradient descent on InfoNCE."""
    rows = []
    for name in PAIR_LOSSES:
        worst = 0.0
        for seed in range(seeds):
            views, net = _views(seed), _network(seed)
            z1, z2 = (net(x) for x in views)
            ours = _flat(torch.autograd.grad(alpha_cl_loss(z1, z2, name, **SETTINGS), net.parameters(), retain_graph=True))
            a = alpha(z1, z2, name, **SETTINGS)
            theirs = _flat(torch.autograd.grad(-theory.energy(z1, z2, a) / PAIRS, net.parameters()))
            worst = max(worst, ((ours - theirs).norm() / theirs.norm()).item())
        rows.append({"claim": "∇L = −∇E_sg(α)", "of": name, "largest difference": worst, "holds": worst < 1e-10})
    apart, identity, descends = 0.0, 0.0, True
    for seed in range(seeds):
        by_loss, by_players, between = _descend(seed)
        apart = max(apart, _most(by_loss - by_players))
        identity, descends = max(identity, between), descends and bool((by_players[1:] < by_players[:-1]).all())
    what = "infonce(epsilon=0, temperature_scaled=True)"
    rows += [
        {"claim": "L = −min_α[E_α − R_H]/N", "of": what, "largest difference": identity, "holds": identity < 1e-12},
        {"claim": "alternating players = back-propagation, 50 steps", "of": what, "largest difference": apart,
         "holds": apart < 1e-10 and descends},
    ]  # fmt: skip
    return Claim(f"Two players; a network of two layers, {seeds} seeds of data and weights, relative, worst shown", rows, {})


def _network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, HIDDEN)).double()


def _descend(seed: int, steps: int = 50, rate: float = 0.05) -> tuple[Tensor, Tensor, float]:
    """InfoNCE along back-propagation, and along exact min player and one ascent step in turn; L + min_α[E_α − R_H]/N."""
    views = _views(seed)
    of_both, between = [], 0.0
    for players in (False, True):
        net, losses = _network(seed), []
        for _ in range(steps):
            z1, z2 = (net(x) for x in views)
            loss = alpha_cl_loss(z1, z2, "infonce", epsilon=0.0, temperature_scaled=True, **SETTINGS)
            losses.append(loss.item())
            if players:
                a = alpha(z1, z2, "alpha_entropy", **SETTINGS)  # τ = 0.5 in both
                e = theory.energy(z1, z2, a)
                entropy = -torch.xlogy(a, a).sum()
                between = max(between, abs((loss + (e - 0.5 * entropy) / PAIRS).item()) / loss.abs().item())
                loss = -e / PAIRS
            for p, g in zip(net.parameters(), torch.autograd.grad(loss, [*net.parameters()]), strict=True):
                p.data -= rate * g
        of_both.append(torch.tensor(losses, dtype=torch.float64))
    return of_both[0], of_both[1], between


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _most(x: Tensor) -> float:
    return x.abs().max().item()


def _counts(values: list[int]) -> str:
    return ", ".join(f"{value} ({count})" for value, count in sorted(Counter(values).items()))


CLAIMS: dict[str, Callable[..., Claim]] = {"pca": pca, "rank": rank, "relu": relu, "gradient": gradient}


def table(claim: Claim) -> str:
    """The claim as aligned text."""
    lines = [[*claim.rows[0]], *([_cell(value) for value in row.values()] for row in claim.rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    aligned = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join([claim.text, *(f"  {line}" for line in aligned)])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, list):
        return " ".join(map(_cell, value))
    if isinstance(value, float):
        return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.9g}"
    return str(value)


def write(claims: dict[str, Claim], out: Path) -> list[Path]:
    """theory.json and, of claims with curves, theory-NAME.png in the folder ``out``; the files written."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    written = [out / "theory.json"]
    written[0].write_text(json.dumps({name: {"text": c.text, "rows": c.rows} for name, c in claims.items()},
                                     indent=2, ensure_ascii=False) + "\n")
    for name, claim in claims.items():
        if not claim.curves:
            continue
        columns = min(4, len(claim.curves))
        height = -(-len(claim.curves) // columns)
        figure = Figure(figsize=(3.2 * columns, 2.6 * height), layout="constrained")
        axes = figure.subplots(height, columns, squeeze=False).flat
        for axis, (title, curve) in zip(axes, claim.curves.items(), strict=True):
            axis.plot(range(1, len(curve) + 1), curve.numpy(), linewidth=1)
            axis.axhline(1, color="0.7", linewidth=0.8, linestyle=":")
            axis.set(title=title, xlabel="step", ylabel="2E/λ_max", xscale="log")
            axis.title.set_fontsize(9)
            axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(claim.text, fontsize=10, color="0.35")
        figure.savefig(out / f"theory-{name}.png", dpi=120)
        written.append(out / f"theory-{name}.png")
    return written
