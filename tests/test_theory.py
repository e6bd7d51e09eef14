"""Energy and contrastive covariance agree with their definitions; every theorem check holds."""

import json

import pytest
import torch
from family import gaussian_weight, pair, quadratic_h

from alphacl_fast import MinPlayer, PairWeight, alpha, checks, theory
from alphacl_fast.cli import main
from alphacl_fast.pair_weights import Importances

pytestmark = [pytest.mark.xdist_group("theory"), pytest.mark.usefixtures("one_thread")]


def by_definition(x1, x2, a):
    """Sum C_α term by term."""
    n, c = len(x1), torch.zeros(x1.shape[1], x1.shape[1], dtype=x1.dtype)
    for i in range(n):
        for j in range(n):
            if i != j:
                apart, pair_apart = x1[i] - x1[j], x1[i] - x2[i]
                c += a[i, j] * (torch.outer(apart, apart) - torch.outer(pair_apart, pair_apart))
    return c


def test_dense_alpha():
    x1, x2 = pair(11, 4)
    # neither symmetric nor normalised, and with a diagonal
    a = torch.rand(11, 11, dtype=torch.float64)
    c = by_definition(x1 + 1000, x2 + 1000, a)
    torch.testing.assert_close(
        theory.contrastive_covariance(x1 + 1000, x2 + 1000, a), c, rtol=1e-9, atol=1e-9
    )
    assert theory.energy(x1, x2, a).item() == pytest.approx(c.trace().item() / 2, rel=1e-9)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize(
    "objective",
    [
        "infonce",
        "triplet",
        "alpha_direct",
        "alpha_square",
        "uniform",
        PairWeight(gaussian_weight),
        MinPlayer(quadratic_h),
    ],
    ids=str,
)
def test_through_the_sweeps(objective, similarity):
    z1, z2 = pair(13, 5)
    a = alpha(z1, z2, objective, similarity=similarity, negatives="one_view", temperature=0.3)
    rows = [torch.nn.functional.normalize(z) if similarity == "cosine" else z for z in (z1, z2)]
    for backend in ("auto", "reference"):
        c = theory.contrastive_covariance(
            z1, z2, objective, similarity=similarity, temperature=0.3, backend=backend
        )
        torch.testing.assert_close(c, by_definition(*rows, a), rtol=1e-9, atol=1e-10)
        e = theory.energy(
            z1, z2, objective, similarity=similarity, temperature=0.3, backend=backend
        )
        assert e.item() == pytest.approx(c.trace().item() / 2, rel=1e-9)
    # the same α on other data: inputs x of the embeddings z
    x1, x2 = pair(13, 3, seed=5)
    solved = Importances(
        z1, z2, objective, similarity=similarity, negatives="one_view", temperature=0.3
    )
    c = theory.contrastive_covariance(x1, x2, solved)
    torch.testing.assert_close(c, by_definition(x1, x2, a), rtol=1e-9, atol=1e-10)


def test_covariance_in_tiles_and_threads(monkeypatch):
    monkeypatch.setattr("alphacl_fast.pair_weights.tile_size", lambda n, device: 16)
    z1, z2 = pair(50, 5)
    x1, x2 = pair(50, 3, seed=5)
    a = alpha(z1, z2, negatives="one_view")
    for threads in (1, 3):
        torch.set_num_threads(threads)
        c = theory.contrastive_covariance(x1, x2, Importances(z1, z2, negatives="one_view"))
        torch.testing.assert_close(
            c, theory.contrastive_covariance(x1, x2, a), rtol=1e-12, atol=1e-12
        )


def test_bad_arguments():
    x1, x2 = pair(6, 3)
    for alpha_, settings, error, message in (
        (torch.ones(5, 6), {}, ValueError, r"alpha must have shape \(6, 6\), got \(5, 6\)"),
        (
            torch.ones(6, 6),
            {"temperature": 1.0},
            TypeError,
            "temperature must come with an objective, got Tensor",
        ),
        (7, {}, TypeError, "alpha must be a tensor, an objective or Importances, got int"),
        (
            Importances(x1, x2),
            {},
            ValueError,
            "alpha must be of 6 anchors, one for each row of x1, got 12",
        ),
        (
            Importances(x1, x2, negatives="cross_view", symmetric=False),
            {},
            ValueError,
            "must be of negatives='one_view' here",
        ),
    ):
        with pytest.raises(error, match=message):
            theory.energy(x1, x2, alpha_, **settings)
    weights = theory.random_weights([3, 2], "filter", [0])
    with pytest.raises(
        ValueError, match="norm must be one of 'frobenius', 'filter', got 'spectral'"
    ):
        theory.ascend(theory.linear_energy(torch.eye(3)), weights, "spectral", rate=1, steps=1)
    blown = torch.full((3, 3), 1e200, dtype=torch.float64)
    with pytest.raises(ValueError, match="rate must be small enough"):
        theory.ascend(theory.linear_energy(blown), weights, "filter", rate=1e200, steps=3)


def test_ascent_keeps_the_norms_and_climbs():
    c = theory.contrastive_covariance(*checks._views(0), "alpha_entropy", similarity="euclidean")
    c /= torch.linalg.matrix_norm(c, 2)
    for norm in theory.NORMS:
        end = theory.ascend(
            theory.linear_energy(c),
            theory.random_weights([8, 5, 4], norm, (0, 1)),
            norm,
            rate=0.1,
            steps=60,
        )
        assert (end.energies[1:] >= end.energies[:-1] - 1e-15).all()
        assert end.energies.shape == (61, 2)
        for w in end.weights:
            lengths = (
                torch.linalg.matrix_norm(w)
                if norm == "frobenius"
                else w.norm(dim=2) * w.shape[1] ** 0.5
            )
            torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_relu_energy_is_that_of_the_outputs():
    x1, x2 = pair(9, 4)
    a = torch.rand(9, 9, dtype=torch.float64)
    weights = theory.random_weights([4, 6, 3], "frobenius", (3, 4))
    values = theory.relu_energy(x1, x2, a)(weights)
    for seed, value in enumerate(values):
        f = [torch.relu(x @ weights[0][seed].t()) @ weights[1][seed].t() for x in (x1, x2)]
        assert value.item() == pytest.approx(theory.energy(*f, a).item(), rel=1e-12)


# --- the theorem checks ---------------------------------------------------------------------------


def shorten(patch):
    """Every ascent has half its steps, in which its networks converge."""
    ascend = theory.ascend
    patch.setattr(
        theory, "ascend", lambda *args, steps, **given: ascend(*args, steps=steps // 2, **given)
    )


@pytest.fixture(scope="module")
def run():
    """Every check; a collapse to 0 takes the ascents of `rank` all their steps."""
    torch.set_num_threads(1)
    found = {name: checks.CHECKS[name](seeds=2) for name in ("rank", "gradient")}
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        found |= {name: checks.CHECKS[name](seeds=2) for name in checks.CHECKS.keys() - found}
    return found


def test_every_check_holds(run):
    for name, check in run.items():
        assert check.holds, checks.table(check)
        assert all(curve.isfinite().all() for curve in check.curves.values()), name


def test_pca(run):
    rows = run["pca"].rows
    assert {(row["norm"], row["layers"]) for row in rows} == {
        (norm, k) for norm in theory.NORMS for k in (1, 2, 3, 4)
    }
    for row in rows:
        assert row["2E/λ_max"] == pytest.approx(1, abs=1e-6)
        assert len(row["σ₂/σ₁ per layer"]) == row["layers"]
        assert max(row["σ₂/σ₁ per layer"]) < 1e-6
        assert row["1 − |⟨v₀,u₁⟩|"] < 1e-6
    for curve in run["pca"].curves.values():
        assert curve[0].max() < 0.95  # it did not start there


def test_rank(run):
    rows = {(row["C_α[x]"], row["layers"]): row for row in run["rank"].rows}
    assert rows["λ₁ = λ₂ > 0", 1]["σ₂/σ₁ least"] > 0.01
    assert rows["λ₁ = λ₂ > 0", 2]["σ₂/σ₁ most"] < 1e-6
    assert rows["λ_max < 0", 1]["2E/λ_max"] == pytest.approx(1, abs=1e-6)
    assert all(rows["λ_max < 0", k]["2E/λ_max"] < 1e-4 for k in (2, 3, 4))


def test_a_step_that_is_too_long_goes_to_the_most_negative_direction():
    # 2/(|λ_min| − λ_max) = 1.67
    c = torch.diag(torch.tensor([-0.2, -0.5, -1.0], dtype=torch.float64))
    for rate, end in ((1.6, -0.2), (1.75, -1.0)):
        w = theory.ascend(
            theory.linear_energy(c),
            theory.random_weights([3, 2], "frobenius", (0,)),
            "frobenius",
            rate=rate,
            steps=3000,
        )
        assert 2 * w.energies[-1].item() == pytest.approx(end, abs=1e-6)


def test_relu(run):
    ranks = {(row["layers"], row["norm"]): row["rank of W₁ (networks)"] for row in run["relu"].rows}
    assert (
        ranks["two, ReLU", "frobenius"]
        == ranks["two, linear", "filter"]
        == ranks["two, linear", "frobenius"]
        == "1 (2)"
    )
    assert set(ranks["two, ReLU", "filter"].replace(",", "").split()[::2]) <= {"2", "3", "4"}


def test_gradient(run):
    rows = run["gradient"].rows
    assert [row["of"] for row in rows[:8]] == list(checks.PAIR_LOSSES)
    assert all(row["largest difference"] < 1e-10 for row in rows)


def test_claims_can_fail(monkeypatch):
    """A wrong α breaks the gradient theorem; gradient ascent that stops early does no PCA."""
    original = checks.alpha
    monkeypatch.setattr(
        checks, "alpha", lambda *args, **settings: original(*args, **settings) * 1.001
    )
    rows = checks.gradient(seeds=1).rows
    assert not any(row["holds"] for row in rows)
    ascend = theory.ascend
    monkeypatch.setattr(
        theory, "ascend", lambda *args, steps, **settings: ascend(*args, steps=20, **settings)
    )
    assert not any(row["holds"] for row in checks.pca(seeds=1).rows)


def test_command(tmp_path, capsys, monkeypatch):
    shorten(monkeypatch)
    assert main(["theory", "gradient", "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("∇L = −∇E_sg(α)") == 8
    assert "alternating players = back-propagation" in out
    assert main(["theory", "pca", "--seeds", "1", "--out", str(tmp_path / "th")]) == 0
    assert "written:" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "th").iterdir()} == {"theory.json", "theory-pca.png"}
    assert len(json.loads((tmp_path / "th" / "theory.json").read_text())["pca"]["rows"]) == 8
    false = checks.Check("the earth is flat", [{"claim": "flat", "holds": False}], {})
    monkeypatch.setitem(checks.CHECKS, "relu", lambda: false)
    assert main(["theory", "relu"]) == 1
    assert "NO" in capsys.readouterr().out
    for arguments, message in (
        (["everything"], "invalid choice"),
        (["pca", "--seeds", "0"], "--seeds must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["theory", *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["theory", "gradient", "--seeds", "1", "--out", str(tmp_path / "file" / "under")])
    assert "cannot write to" in capsys.readouterr().err
