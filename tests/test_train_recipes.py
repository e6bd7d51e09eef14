"""Recipes: a momentum encoder with a queue, supervised contrast, and images with texts."""

import os
import signal

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from training_runs import rows, state_of, train_on_ranks

from alphacl_fast.train import (
    Config,
    RunError,
    data,
    evaluate,
    evaluation,
    image_text,
    inspect,
    loop,
    moco,
    models,
    train,
)
from alphacl_fast.train.process_context import ProcessContext
from alphacl_fast.train.recipes import build_recipe

pytestmark = pytest.mark.usefixtures("one_thread", "quick_plots")

TINY = {"dataset": "digits", "width": 4, "batch_size": 32, "subset": 128, "epochs": 2, "workers": 0}
TINY |= {"text_width": 16}
#: Enough to learn something from in a few seconds.
LEARNS = {"dataset": "digits", "width": 8, "batch_size": 64, "subset": 640, "workers": 0}
LEARNS |= {"augment": "device"}


def tiny(**given):
    return Config.create(**{**TINY, "log_every": 1, "eval_every": 0, **given})


def learned(out, **given):
    """The last epoch's line of a run."""
    train(Config.create(**{**LEARNS, "eval_every": given["epochs"], **given}), out)
    return rows(out)[-1]


def untrained_knn(**given):
    config = Config.create(**{**LEARNS, **given})
    encoder = models.build(config).encoder
    return evaluation.figures(encoder, data.load(config), knn=True, probed=False)["knn"]


# Accuracies on the digits


def test_supervised_contrast_learns_the_labels(tmp_path):
    row = learned(tmp_path / "run", recipe="supcon", width=4, lr=0.01, epochs=6)
    assert row["knn"] > max(0.9, untrained_knn(width=4) + 0.03)


def test_a_momentum_encoder_learns_without_labels(tmp_path):
    row = learned(tmp_path / "run", recipe="moco", width=4, lr=0.005, queue=512, epochs=12)
    assert row["knn"] > max(0.9, untrained_knn(width=4) + 0.02)
    assert evaluate(tmp_path / "run", draws=1)["rows"]["trained encoder"]["knn"] == row["knn"]


@pytest.mark.parametrize(("objective", "epochs", "accuracy"), [
    ("infonce", 6, 0.8),
    ("siglip", 8, 0.7),
])  # fmt: skip
def test_images_find_their_names(tmp_path, objective, epochs, accuracy):
    given = {"recipe": "image_text", "objective": objective, "epochs": epochs, "lr": 0.003}
    row = learned(tmp_path / "run", **given, temperature=0.2, text_width=64)
    assert row["zero_shot"] > accuracy
    assert row["retrieval"] >= 0.9
    learnt = {"infonce": {"temperature"}, "siglip": {"scale", "bias"}}[objective]
    assert learnt <= {*row}


# Runs


@pytest.mark.parametrize("given", [
    {"recipe": "moco", "queue": 80, "ema": 0.5},
    {"recipe": "moco", "queue": 100, "micro_batch": 12, "learn_temperature": True},
    {"recipe": "supcon", "micro_batch": 12, "temperature_schedule": "cosine"},
    {"recipe": "image_text", "validation": 40, "eval_every": 1, "micro_batch": 12},
])  # fmt: skip
def test_recipes_resume_bit_for_bit(tmp_path, monkeypatch, given):
    config, one_step = tiny(**given), loop._Run.one_step

    def stop(self, parts):
        result = one_step(self, parts)
        if self.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return result

    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "one_step", stop)
        assert train(config, tmp_path / "run").signal == signal.SIGTERM
    assert train(config, tmp_path / "run", resume=True).epochs == 2
    ours, theirs = (state_of(tmp_path / name) for name in ("run", "whole"))
    for part in ("model", "loss", *({"ema"} & {*theirs})):
        for name, value in theirs[part].items():
            assert torch.equal(ours[part][name], value), name
    if given["recipe"] == "moco":
        assert theirs["model"]["place"] == 8 * 32 % given["queue"]
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("run", "whole")]
    assert losses[0] == losses[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forks of this process")
@pytest.mark.parametrize("given", [
    {"recipe": "moco", "queue": 100, "learn_temperature": True},
    {"recipe": "supcon"},
    {"recipe": "image_text", "objective": "siglip"},
])  # fmt: skip
def test_two_ranks_train_as_one_process(tmp_path, given):
    config = tiny(**given, norm="group", optimizer="sgd", lr=0.02, batch_size=31)
    train(config, tmp_path / "one")
    train_on_ranks(2, config, tmp_path / "two")
    one, two = ([row["loss"] for row in rows(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)
    one, two = (state_of(tmp_path / name) for name in ("one", "two"))
    for part in ("model", "loss"):
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("given", "message"), [
    ({"recipe": "mocov9"}, "--recipe must be one of simclr, moco, supcon, image_text, got"),
    ({"recipe": "supcon", "objective": "mine"}, "--recipe supcon needs --objective infonce, got"),
    ({"recipe": "image_text", "negatives": "two_view"},
     "--recipe image_text needs --negatives cross_view, got two_view"),
    ({"objective": "siglip"}, "--objective siglip needs --recipe image_text, no --option"),
    ({"dataset": "captions"}, "--dataset captions needs --recipe image_text and"),
    ({"recipe": "moco", "queue": 0}, "--queue must be at least 1, got 0"),
    ({"recipe": "moco", "momentum": 1.5}, "--momentum must be at most 1, got 1.5"),
    ({"recipe": "moco", "alpha_every": 1}, "--recipe moco needs --alpha-every 0, got 1"),
])  # fmt: skip
def test_bad_settings_are_named(given, message):
    with pytest.raises(RunError) as caught:
        tiny(**given)
    assert str(caught.value).startswith(message)


def test_bad_options_of_a_recipe_s_loss_are_named(tmp_path):
    for given, message in (
        ({"recipe": "supcon", "option": {"form": "outer"}}, "--option: form must be one of"),
        ({"recipe": "moco", "option": {"epsilons": 2}}, "--option: options of infonce must be one"),
        ({"recipe": "moco", "backend": "reference"}, "--backend must not be 'reference'"),
    ):
        with pytest.raises(RunError) as caught:
            train(tiny(**given), tmp_path / "run")
        assert str(caught.value).startswith(message)
    assert not (tmp_path / "run").exists()


def test_supervised_contrast_needs_labels(monkeypatch):
    images = [(Image.new("L", (8, 8), number), number % 2 - (number > 9)) for number in range(40)]
    monkeypatch.setitem(data._OPEN, "digits", lambda _: (images, images, images, ["a", "b"]))
    with pytest.raises(RunError, match="needs a label for every image, but 15 images of digits"):
        build_recipe(data.load(tiny(recipe="supcon", subset=0)), ProcessContext())


def test_inspection_shows_a_recipe_s_own_objective(tmp_path):
    train(tiny(recipe="moco"), tmp_path / "run")
    assert inspect(tmp_path / "run", pairs=32)["objective"] == "infonce"


# The momentum encoder


def test_the_queue_keeps_the_latest_keys_in_a_ring():
    net = moco.MomentumNet(models.build(tiny()), 7, 0)
    keys = F.normalize(torch.randn(20, 128))
    assert torch.allclose(net.queue.norm(dim=1), torch.ones(7))
    for start, stop in ((0, 3), (3, 6), (6, 9)):
        net.enqueue(keys[start:stop])
    assert net.place == 2
    assert torch.equal(net.queue, keys[[7, 8, 2, 3, 4, 5, 6]])
    net.enqueue(keys[9:20])  # more than there is room for
    assert torch.equal(net.queue.sort(0).values, keys[13:20].sort(0).values)


def test_keys_follow_and_have_no_gradient():
    net = moco.MomentumNet(models.build(tiny()), 7, 0).train()
    before = [x.clone() for x in net.keys.parameters()]
    with torch.no_grad():
        for parameter in [*net.encoder.parameters(), *net.projector.parameters()]:
            parameter.add_(1)
    net.follow(0.75)
    for now, then in zip(net.keys.parameters(), before, strict=True):
        torch.testing.assert_close(now, then + 0.25)
        assert not now.requires_grad
    queries, keys = net(*torch.randint(0, 256, (2, 6, 1, 8, 8), dtype=torch.uint8))
    assert queries.requires_grad
    assert not keys.requires_grad


def test_the_loss_of_the_queue_is_a_cross_entropy():
    run = build_recipe(data.load(tiny(recipe="moco", queue=50)), ProcessContext())
    z1, z2 = torch.randn(2, 32, 128)
    value = run.value(z1, z2, [])
    queries, keys = F.normalize(z1), F.normalize(z2)
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ run.net.queue.T], 1) / 0.1
    torch.testing.assert_close(value, F.cross_entropy(logits, torch.zeros(32, dtype=torch.long)))


# Images and texts


@pytest.fixture
def captions(tmp_path):
    """Images whose colour their captions name."""
    root, lines = tmp_path / "pairs", []
    (root / "images").mkdir(parents=True)
    for number in range(60):
        colour = ("red", "green", "blue")[number % 3]
        Image.new("RGB", (8, 8), colour).save(root / "images" / f"{number}.png")
        lines.append(f"images/{number}.png\ta {colour} square, naïve" + "!" * (number % 2))
    (root / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def captioned(root, **given):
    fixed = {"dataset": "captions", "data_root": str(root), "encoder": "small", "image_size": 8}
    fixed |= {"recipe": "image_text", "subset": 0, "batch_size": 16}
    return tiny(**{**fixed, **given})


def test_a_folder_of_images_and_captions(captions, tmp_path):
    config = captioned(captions, eval_every=1)
    found = data.load(config)
    assert len(found.classes) == 6
    assert len(found.views) + len(found.test) == 60
    assert not {*found.names} & {*found.test.names}
    (captions / "captions-test.tsv").write_text("images/0.png\ta red square, naïve\n")
    assert len(data.load(config).views) == 60
    (captions / "captions-test.tsv").unlink()
    train(config, tmp_path / "run")
    row = rows(tmp_path / "run")[-1]
    assert {"zero_shot", "retrieval"} <= {*row}
    assert "knn" not in row
    assert (tmp_path / "run" / "images.txt").read_text().splitlines() == found.names
    with pytest.raises(RunError, match="was trained on captions: its images have no labels"):
        evaluate(tmp_path / "run")


def test_damaged_captions_are_named(captions):
    file = captions / "captions.tsv"
    file.write_text("images/0.png a red square\n")
    with pytest.raises(RunError, match=r"captions\.tsv, line 1: expected image<tab>caption, got"):
        data.load(captioned(captions))
    file.write_text("images/0.png\ta red square\n")
    with pytest.raises(RunError, match="must hold training and test images, got 1 and 0"):
        data.load(captioned(captions))
    file.unlink()
    with pytest.raises(RunError, match=r"cannot open captions in .*No such file"):
        data.load(captioned(captions))


def test_every_image_meets_its_own_text():
    run = build_recipe(data.load(tiny(recipe="image_text")), ProcessContext())
    seen = []
    run.forward = lambda images, tokens: seen.append(tokens) or (images, tokens)
    index = torch.arange(128)
    run.embed((torch.zeros(128, 1, 8, 8), index))
    for row, tokens in enumerate(seen[0]):
        text = bytes(int(token) - 1 for token in tokens if token).decode()
        template = image_text.TEMPLATES[row % 4]
        assert text == template.format(image_text.DIGITS[run.labels[row]])


def test_texts_end_where_their_bytes_do():
    tower = image_text.TextTower(32, 16).eval()
    tokens = torch.stack([image_text.tokens_of(text) for text in ("naïve", "a", "b" * 500)])
    assert (tokens > 0).sum(1).tolist() == [6, 1, image_text.TEXT_BYTES]
    with torch.no_grad():
        torch.testing.assert_close(
            tower(tokens[:2])[:2], tower(tokens[:2, :9]), rtol=1e-4, atol=1e-5
        )
