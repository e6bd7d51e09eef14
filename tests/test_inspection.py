"""`alphacl inspect` and the weights logged during training."""

import json
import shutil

import pytest
import torch
from PIL import Image

from alphacl_fast import alpha_summary
from alphacl_fast.cli import main
from alphacl_fast.train import Config, RunError, inspect, train

pytestmark = pytest.mark.xdist_group("train")

TINY = {
    "dataset": "digits",
    "width": 4,
    "batch_size": 64,
    "subset": 256,
    "epochs": 2,
    "workers": 0,
    "threads": 1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    train(
        Config.create(
            objective="alpha_direct",
            option={"exponent": 3},
            temperature=0.25,
            alpha_every=3,
            **TINY,
        ),
        out,
    )
    return out


def logged(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "alpha"]


def test_weights_are_logged_on_request(run, tmp_path):
    rows = logged(run)
    assert [row["step"] for row in rows] == [3, 6]
    for row in rows:
        assert row["alpha_sum"] == pytest.approx(1, rel=1e-5)
        assert 1 < row["effective_negatives"] < 126
        assert row["alignment"] == pytest.approx(2 - 2 * row["positive_similarity"], rel=1e-5)
    plain = tmp_path / "plain"
    train(
        Config.create(objective="alpha_direct", option={"exponent": 3}, temperature=0.25, **TINY),
        plain,
    )
    assert logged(plain) == []
    states = [torch.load(out / "checkpoint.pt", weights_only=True)["model"] for out in (run, plain)]
    # looking changes nothing
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_logged_weights_are_those_of_the_batch(tmp_path, monkeypatch):
    """In micro-batches too, with a learnt temperature: what the loss saw in that step."""
    from alphacl_fast import FusedAlphaCLLoss

    seen, original = [], FusedAlphaCLLoss.forward

    def forward(self, z1, z2):
        seen.append((z1.detach().clone(), z2.detach().clone(), self.temperature.item()))
        return original(self, z1, z2)

    monkeypatch.setattr(FusedAlphaCLLoss, "forward", forward)
    config = Config.create(
        **{**TINY, "epochs": 1}, micro_batch=24, alpha_every=2, learn_temperature=True
    )
    train(config, tmp_path / "run")
    (first, second), steps = (
        logged(tmp_path / "run"),
        [call for call in seen if len(call[0]) == 64][-4:],
    )
    for row, (z1, z2, tau) in ((first, steps[1]), (second, steps[3])):
        exact = alpha_summary(z1, z2, "infonce", temperature=tau).scalars()
        assert row["effective_negatives"] == pytest.approx(exact["effective_negatives"], rel=1e-5)
        assert row["uniformity"] == pytest.approx(exact["uniformity"], rel=1e-5)


def test_page(run, tmp_path, capsys):
    assert (
        main(
            [
                "inspect",
                str(run / "checkpoint.pt"),
                "--pairs",
                "100",
                "--thumbnails",
                "5",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "alpha_direct (this run)" in out
    assert "anchors whose nearest negative has their own label: " in out
    result = json.loads((tmp_path / "inspect.json").read_text())
    assert [*result["objectives"]] == [
        "alpha_direct (this run)",
        "infonce",
        "alpha_square",
        "uniform",
    ]
    own = result["objectives"]["alpha_direct (this run)"]
    assert "exponent=3" in own["options"]
    assert result["objectives"]["uniform"]["effective_negatives"] == pytest.approx(198, rel=1e-4)
    assert (result["pairs"], result["temperature"], len(result["nearest"])) == (100, 0.25, 5)
    assert sum(own["pairs"]) == 200 * 198
    distances = [near["distance"] for near in result["nearest"]]
    assert distances == sorted(distances)
    assert distances[0] == pytest.approx(own["hardest_distance"], abs=0.5)
    with Image.open(tmp_path / "inspect.png") as page:
        assert page.width > 1000
        assert len(page.convert("L").getcolors(1 << 20)) > 50  # something is drawn
    again = inspect(run, pairs=100, thumbnails=5, objectives=("triplet",), out=tmp_path / "again")
    assert [*again["objectives"]] == ["alpha_direct (this run)", "triplet"]
    assert again["nearest"] == result["nearest"]


@pytest.mark.parametrize(
    "changes",
    [{"negatives": "cross_view"}, {"negatives": "one_view"}, {"objective": "uniform"}],
    ids=str,
)
def test_other_settings(changes, tmp_path):
    """Few pairs have fewer neighbours than the thumbnails that are asked for."""
    train(Config.create(**{**TINY, "epochs": 1, **changes}), tmp_path / "run")
    pairs, thumbnails = (2, 200) if "objective" in changes else (60, 3)
    result = inspect(tmp_path / "run", pairs=pairs, thumbnails=thumbnails)
    assert len(result["nearest"]) >= 1
    assert 0 <= result["same_label"] <= 1


def test_problems_are_one_line(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "begun")
    for file in (tmp_path / "begun").glob("checkpoint*.pt"):
        file.unlink()
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ([str(tmp_path / "nothing")], "is not a run: it has no config.json"),
        ([str(tmp_path / "begun")], "has no checkpoint yet"),
        ([str(run), "--pairs", "1"], "--pairs must be at least 2"),
        (
            [str(run), "--objective", "nce"],
            "--objective nce cannot be shown: objective must be one of",
        ),
        ([str(run), "--out", str(tmp_path / "file" / "under")], "cannot write to"),
        ([str(run), "--device", "abacus"], "--device abacus cannot be used"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", *arguments])
        assert stopped.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    with pytest.raises(RunError, match="--alpha-every must be at least 0, got -1"):
        Config.create(alpha_every=-1)
