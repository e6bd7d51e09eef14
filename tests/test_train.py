"""The training package in one process: settings, data, models, evaluation, a run's files,
errors.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from training_runs import rows, state_of

from alphacl_fast import backends, functional, objectives
from alphacl_fast.train import (
    Config,
    RunError,
    augment,
    checkpoint,
    data,
    evaluate,
    evaluation,
    loop,
    models,
    recipe,
    report,
    storage,
    train,
)
from alphacl_fast.train import config as config_module
from alphacl_fast.train.evaluation import (
    Split,
    converged_probe,
    few_label_draws,
    knn_accuracy,
    linear_probe,
    standardise,
)
from alphacl_fast.train.process_context import ProcessContext

# one worker makes what its tests share
pytestmark = [
    pytest.mark.xdist_group("train"),
    pytest.mark.usefixtures("one_thread"),
]

TINY = {
    "dataset": "digits",
    "width": 4,
    "batch_size": 64,
    "subset": 256,
    "epochs": 2,
    "workers": 0,
    "log_every": 1,
}


def tiny(**given):
    return Config.create(**{**TINY, **given})


@pytest.fixture
def drawn():
    """The pictures of this test's runs are drawn."""


@pytest.fixture(autouse=True)
def _drawn_on_request(request):
    """Nothing is drawn at the end of a run, but for `finished` and for those who ask for it."""
    if "drawn" not in request.fixturenames:
        request.getfixturevalue("quick_plots")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two epochs, with its pictures; copy it before changing anything."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny(objective="alpha_direct", eval_every=1), out)
    return out


@pytest.fixture
def folders(tmp_path):
    """An image folder of two classes, 12 training and 4 test images each."""
    for part, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (10, 12), (255 * label, 9 * index, 0)).save(
                    folder / f"{index}.jpg"
                )
    return tmp_path / "images"


# Settings


def test_defaults_depend_on_data_set_and_encoder():
    assert (Config.create().encoder, Config.create().epochs, Config.create().threads) == (
        "small",
        60,
        1,
    )
    cifar = Config.create(dataset="cifar10")
    assert (cifar.encoder, cifar.lr, cifar.batch_size, cifar.epochs) == ("resnet18", 0.01, 128, 500)
    wide = Config.create(dataset="cifar10", encoder="resnet50", epochs=5)
    assert (wide.lr, wide.batch_size, wide.warmup_epochs, wide.eval_every) == (0.001, 256, 0, 1)
    assert Config.create(dataset="cifar10", lr=0.5).lr == 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"batch_size": 1}, "--batch-size must be at least 2, got 1"),
        ({"micro_batch": -1}, "--micro-batch must be at least 0, got -1"),
        ({"norm": "layer"}, "--norm must be one of batch, sync, group, got 'layer'"),
        ({"lr": float("nan")}, "--lr must be positive and finite, got nan"),
        ({"temperature": -1.0}, "--temperature must be positive and finite, got -1.0"),
        ({"lr": "fast"}, "--lr must be float, got 'fast'"),
        (
            {"dataset": "mnist"},
            "--dataset must be one of digits, cifar10, cifar100, stl10, imagefolder, "
            "captions, fake, got 'mnist'",
        ),
        ({"warmup_epochs": 9, "epochs": 3}, "--warmup-epochs must not exceed --epochs 3, got 9"),
        ({"encoder": "resnet18"}, "--encoder must be small for the digits, got resnet18"),
        ({"colour": 1}, "unknown setting 'colour'"),
    ],
)
def test_bad_settings_are_named(given, message):
    with pytest.raises(RunError, match="^" + message.replace(".", r"\.")):
        Config.create(**given)


def test_a_config_survives_its_file(tmp_path):
    config = tiny(option={"exponent": 2.0}, objective="alpha_direct")
    (tmp_path / "run").mkdir()
    checkpoint.begin(tmp_path / "run", config, torch.device("cpu"))
    assert checkpoint.saved_config(tmp_path / "run") == config
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {"alphacl_fast", "commit", "torch", "torchvision", "python", "device", "threads"} <= {
        *saved["environment"]
    }
    with pytest.raises(RunError, match=r"unknown \['colour'\]"):
        Config.from_dict({**dataclasses.asdict(config), "colour": 1}, tmp_path)
    with pytest.raises(RunError, match="the config must be a dict, got list"):
        Config.from_dict([], tmp_path)


def test_a_run_saved_before_a_field_existed_goes_on(finished, tmp_path):
    run, config = tmp_path / "run", tiny(objective="alpha_direct", eval_every=1)
    shutil.copytree(finished, run)
    saved = json.loads((run / "config.json").read_text())
    state = state_of(run)
    del saved["config"]["probe_every"], state["config"]["probe_every"]
    del saved["digest"]
    (run / "config.json").write_text(json.dumps(saved))
    torch.save(state, run / "checkpoint.pt")
    assert train(config, run, resume=True).already
    with pytest.raises(RunError, match="--probe-every: 0 in the run, 1 given"):
        train(dataclasses.replace(config, probe_every=1), run, resume=True)


def test_learning_rate_warms_up_and_follows_a_cosine():
    config = tiny(epochs=10, warmup_epochs=2, lr=0.1)
    rates = [loop.learning_rate(config, step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([0.01 * (step + 1) for step in range(10)])
    assert rates[10:] == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * step / 40)) for step in range(40)]
    )
    assert loop.learning_rate(tiny(epochs=1, warmup_epochs=1, lr=0.1), 4, 5) == pytest.approx(0.1)


# Data


def test_order_covers_every_epoch_and_does_not_depend_on_the_start():
    def steps(start, seed):
        return list(data.steps_of(50, tiny(batch_size=8, seed=seed), start, 18))

    whole = steps(0, 3)
    assert [[epoch for epoch, _ in batch] for batch in whole] == [
        [step // 6] * 8 for step in range(18)
    ]
    for epoch in range(3):
        indices = [index for batch in whole[6 * epoch : 6 * epoch + 6] for _, index in batch]
        assert len(set(indices)) == 48
        assert set(indices) <= set(range(50))
    assert whole[:6] != [[(0, index) for _, index in batch] for batch in whole[6:12]]
    for start in (0, 1, 6, 11):
        assert steps(start, 3) == whole[start:]
    assert steps(0, 4) != whole


def test_batches_do_not_depend_on_workers_or_the_global_generator():
    images, view = data.load(tiny()).views, augment.augmentation("digits", 8)

    def batches(start, **given):
        return [
            views
            for [views] in data.training_batches(images, view, tiny(**given), start, 6, pin=False)
        ]

    before = torch.get_rng_state()
    alone = batches(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    for other in (batches(0, workers=2), batches(0)):
        assert torch.equal(
            torch.stack([*map(torch.stack, other)]), torch.stack([*map(torch.stack, alone)])
        )
    assert torch.equal(torch.stack(alone[4]), torch.stack(batches(4)[0]))
    x1, x2 = alone[0]
    assert x1.dtype == torch.uint8
    assert x1.shape == (64, 1, 8, 8)
    assert (x1 != x2).flatten(1).any(1).all()
    assert not torch.equal(x1, batches(0, seed=1)[0][0])


def test_shares_and_micro_batches_are_the_whole_batch():
    images, view = data.load(tiny()).views, augment.augmentation("digits", 8)
    [whole] = next(data.training_batches(images, view, tiny(), 0, 2, pin=False))
    found = []
    for rank in range(3):
        share = ProcessContext(rank, 3).share
        steps = list(
            data.training_batches(images, view, tiny(micro_batch=8), 0, 2, pin=False, share=share)
        )
        assert [len(x1) for x1, _ in steps[0]] == [[8, 8, 5], [8, 8, 5], [8, 8, 6]][rank]
        assert len(steps) == 2
        found += steps[0]
    for k in range(2):
        assert torch.equal(torch.cat([views[k] for views in found]), whole[k])


def test_a_view_differs_between_epochs_and_images():
    images = data._Views(
        [(Image.new("L", (8, 8), 200), 0)] * 2, augment.augmentation("digits", 8), 0
    )
    assert torch.equal(images[0, 1][0], images[0, 1][0])
    assert not torch.equal(images[0, 1][0], images[1, 1][0])
    assert not torch.equal(images[0, 1][0], images[0, 0][0])


def test_subset_is_balanced_and_deterministic():
    labels = torch.tensor([label for _, label in data.load(tiny(subset=250)).train.dataset])
    chosen = data.load(tiny(subset=250)).train.indices
    assert labels[chosen].bincount().tolist() == [25] * 10
    assert chosen == data.load(tiny(subset=250, seed=5)).train.indices
    with pytest.raises(
        RunError, match="--subset must not exceed the 1297 training images, got 1298"
    ):
        data.load(tiny(subset=1298))
    with pytest.raises(
        RunError, match="--batch-size must not exceed the 60 training images, got 64"
    ):
        data.load(tiny(subset=60))


@pytest.mark.parametrize("size", [32, 96])
def test_colour_augmentations(size):
    image = Image.effect_noise((40, 40), 80).convert("RGB")
    view = augment.augmentation("imagefolder", size)(image)
    assert view.shape == (3, size, size)
    assert view.dtype == torch.uint8
    assert (augment.augmentation("stl10", size).blur is not None) == (size == 96)


def test_fake_and_missing_data(tmp_path):
    fake = data.load(Config.create(dataset="fake", subset=100, batch_size=32))
    assert len(fake.views) == 100
    assert len(fake.test) == 256
    for name in ("cifar10", "cifar100", "stl10"):
        with pytest.raises(RunError, match=rf"cannot open {name} in .* \(--download fetches it\)"):
            data.load(Config.create(dataset=name, data_root=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_torchvision_data_sets(tmp_path, monkeypatch):
    """Data sets open from files of the real layout with a few images; checksums are not checked."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda _: True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    for name, key, batches in (
        ("cifar-10-batches-py", "labels", [f"data_batch_{i}" for i in range(1, 6)]),
        ("cifar-100-python", "fine_labels", ["train"]),
    ):
        (tmp_path / name).mkdir()
        for batch in (*batches, "test_batch", "test"):
            (tmp_path / name / batch).write_bytes(pickle.dumps({"data": pixels, key: [0, 1, 2, 3]}))
        for meta, names in (("batches.meta", "label_names"), ("meta", "fine_label_names")):
            (tmp_path / name / meta).write_bytes(pickle.dumps({names: list("abcd")}))
    stl = tmp_path / "stl10_binary"
    stl.mkdir()
    for part in ("train", "unlabeled", "test"):
        np.zeros((6, 3, 96, 96), np.uint8).tofile(stl / f"{part}_X.bin")
        np.array([1, 2, 3] * 2, np.uint8).tofile(stl / f"{part}_y.bin")
    (stl / "class_names.txt").write_text("a\nb\nc\n")
    for name, views, labelled, side in (
        ("cifar10", 20, 20, 32),
        ("cifar100", 4, 4, 32),
        ("stl10", 12, 6, 96),
    ):
        found = data.load(Config.create(dataset=name, data_root=str(tmp_path), batch_size=2))
        assert (len(found.views), len(found.train)) == (views, labelled)
        assert found.views[0][0].size == (side, side)
        part = data.load(
            Config.create(dataset=name, data_root=str(tmp_path), batch_size=2, subset=3)
        )
        assert (len(part.views), len(part.train)) == (3, 6 if name == "stl10" else 3)
        assert {label for _, label in (found.train[i] for i in range(len(found.train)))} <= set(
            range(4)
        )


def test_imagefolder(folders):
    config = Config.create(
        dataset="imagefolder", data_root=str(folders), batch_size=8, image_size=16
    )
    found = data.load(config)
    assert (len(found.views), len(found.test), found.classes) == (24, 8, ["cat", "dog"])
    ((x, labels),) = data.plain_batches(found.test, augment.plain(16), workers=0, pin=False)
    assert x.shape == (8, 3, 16, 16)
    assert labels.tolist() == [0] * 4 + [1] * 4
    (folders / "test").rename(folders / "val")
    assert len(data.load(config).test) == 8
    (folders / "val" / "dog").rename(folders / "val" / "wolf")
    with pytest.raises(RunError, match="must hold the same classes, but differ in dog, wolf"):
        data.load(config)
    shutil.rmtree(folders / "val")
    with pytest.raises(RunError, match=r"must hold the folders train and test \(or val\)"):
        data.load(config)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(folders, workers):
    config = Config.create(
        dataset="imagefolder", data_root=str(folders), batch_size=8, image_size=16, workers=workers
    )
    broken = folders / "train" / "cat" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    found, before = data.load(config), {*multiprocessing.active_children()}
    with pytest.raises(RunError) as caught:
        list(
            data.training_batches(
                found.views, augment.augmentation("imagefolder", 16), config, 0, 3, pin=False
            )
        )
    assert str(caught.value).startswith(f"cannot read image {broken} (OSError): repair it, or ")
    assert "\n" not in str(caught.value)
    # The loader's processes are gone, although the traceback lives: they would outlive the command.
    assert {*multiprocessing.active_children()} <= before


def grey(values, dtype):
    return Image.fromarray(np.array(values, dtype=dtype))


def transparent(mode):
    """Two red pixels, the second of which is hidden behind its transparency."""
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    return image.convert(mode)


def palette():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 1
    return image


RED, WHITE = [255, 0, 0], [255, 255, 255]


@pytest.mark.parametrize(("image", "expected"), [
    (Image.new("1", (2, 1), 1), [WHITE, WHITE]),
    (grey([[0, 200]], np.uint8), [[0] * 3, [200] * 3]),
    (grey([[0, 257 * 200]], np.uint16), [[0] * 3, [200] * 3]),
    (grey([[65535, 100]], np.uint16), [WHITE, [0] * 3]),
    (Image.new("RGB", (2, 1), "red"), [RED, RED]),
    (Image.new("CMYK", (2, 1), (0, 255, 255, 0)), [RED, RED]),
    (Image.new("HSV", (2, 1), (0, 255, 255)), [RED, RED]),
    (Image.new("YCbCr", (2, 1), (255, 128, 128)), [WHITE, WHITE]),
    (transparent("RGBA"), [RED, WHITE]),
    (transparent("RGBa"), [RED, WHITE]),
    (transparent("LA"), [[76] * 3, WHITE]),
    (palette(), [RED, WHITE]),
])  # fmt: skip
def test_images_of_every_mode(image, expected):
    found = data.as_rgb(image)
    assert found.mode == "RGB"
    assert np.asarray(found).tolist() == [expected]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_files_of_16_bits_are_scaled(tmp_path, suffix):
    grey([[0, 257 * 100, 65535]], np.uint16).save(tmp_path / f"deep.{suffix}")
    found = data._open_image(str(tmp_path / f"deep.{suffix}"))
    assert np.asarray(found).tolist() == [[[0] * 3, [100] * 3, [255] * 3]]


@pytest.mark.parametrize(("mode", "dtype"), [("F", np.float32), ("I", np.int32)])
def test_images_without_a_range_are_refused(tmp_path, mode, dtype):
    file = tmp_path / "deep.tif"
    grey([[0, 1]], dtype).save(file)
    with pytest.raises(RunError, match=f"cannot use image {file}: its mode {mode} has no fixed"):
        data._open_image(str(file))


# Models


@pytest.mark.parametrize(
    ("encoder", "size", "width", "features"),
    [
        ("resnet18", 32, 8, 64),
        ("resnet18", 96, 8, 64),
        ("resnet50", 32, 4, 128),
        ("small", 32, 4, 128),
    ],
)
def test_encoder_shapes(encoder, size, width, features):
    config = Config.create(dataset="fake", encoder=encoder, image_size=size, width=width)
    before = torch.get_rng_state()
    net, again = models.build(config), models.build(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    assert net.encoder(images).shape == (3, features)
    assert net(images).shape == (3, 128)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_is_torchvisions(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)().eval()
    theirs.fc = torch.nn.Identity()
    ours = models.build(Config.create(dataset="stl10", encoder=name)).encoder.eval()
    weights = zip(ours.body.state_dict(), theirs.state_dict().values(), strict=True)
    ours.body.load_state_dict(dict(weights))
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in data.STATISTICS["stl10"])
    torch.testing.assert_close(
        ours(images), theirs((images / 255 - mean) / std), rtol=1e-4, atol=1e-4
    )


def test_thin_projections_are_strided_convolutions():
    """Where PyTorch's own would crash, and on sides of odd length."""
    body = models.build(Config.create(dataset="cifar10", width=2)).double().encoder.body
    convolutions = [m for m in body.modules() if isinstance(m, torch.nn.Conv2d)]
    thin = [m for m in convolutions if type(m) is not torch.nn.Conv2d]
    assert [m.in_channels for m in thin] == [2, 4]
    for ours in thin:
        images = torch.randn(3, ours.in_channels, 7, 9, dtype=torch.float64, requires_grad=True)
        theirs = torch.nn.functional.conv2d(images, ours.weight, stride=2)
        found = ours(images)
        torch.testing.assert_close(found, theirs)
        leaves, grad = (images, ours.weight), torch.randn_like(theirs)
        torch.testing.assert_close(
            torch.autograd.grad(found, leaves, grad), torch.autograd.grad(theirs, leaves, grad)
        )


# Evaluation


def test_knn_is_the_weighted_vote(monkeypatch):
    bank, queries = torch.randn(300, 6), torch.randn(40, 6)
    bank_labels, labels = torch.randint(0, 4, (300,)), torch.randint(0, 4, (40,))
    correct = 0
    for query, label in zip(queries, labels, strict=True):
        similarity = torch.cosine_similarity(query, bank)
        votes = [0.0] * 4
        for neighbour in similarity.argsort(descending=True)[:7].tolist():
            votes[bank_labels[neighbour]] += math.exp(similarity[neighbour].item() / 0.1)
        correct += votes.index(max(votes)) == label
    assert knn_accuracy(Split(bank, bank_labels, queries, labels, 4), k=7) == correct / 40
    assert knn_accuracy(Split(bank, bank_labels, bank, bank_labels, 4), k=1) == 1


def test_knn_never_holds_all_similarities(monkeypatch):
    largest = 0
    topk = torch.Tensor.topk

    def watched(self, k):
        nonlocal largest
        largest = max(largest, self.numel())
        return topk(self, k)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    bank, queries = torch.randn(20_000, 2), torch.randn(2_000, 2)
    labels = (bank[:, 0] > 0).long()
    assert knn_accuracy(Split(bank, labels, queries, (queries[:, 0] > 0).long(), 2)) > 0.95
    assert 0 < largest <= 2**24 < 20_000 * 2_000


def test_probes_separate_and_report_last_and_best():
    labels = torch.arange(600) % 4
    features = torch.nn.functional.one_hot(labels, 8).float() * 5 + torch.randn(600, 8)
    split = Split(features[:300], labels[:300], features[300:], labels[300:], 4)
    assert linear_probe(split)[1] > 0.99
    assert converged_probe(split) > 0.99
    split = split._replace(train=torch.randn(300, 8), test=torch.randn(300, 8))
    last, best = linear_probe(split)
    assert last <= best < 0.5
    assert converged_probe(split) < 0.5


def test_standardise_uses_the_training_rows_and_drops_constants():
    train_rows, test_rows = torch.randn(50, 3) * 7 + 2, torch.randn(9, 3)
    train_rows[:, 1] = 4
    labels = torch.zeros(50).long()
    scaled = standardise(Split(train_rows, labels, test_rows, labels[:9], 1))
    torch.testing.assert_close(scaled.train.std(0), torch.tensor([1.0, 0, 1]))
    expected = (test_rows[:, 2] - train_rows[:, 2].mean()) / train_rows[:, 2].std()
    torch.testing.assert_close(scaled.test[:, 2], expected)
    assert scaled.test[:, 1].tolist() == [0] * 9


def test_few_label_draws():
    labels = torch.arange(60) % 3
    draws = few_label_draws(labels, 5, 4)
    assert [labels[rows].bincount().tolist() for rows in draws] == [[5, 5, 5]] * 4
    assert len({tuple(rows.tolist()) for rows in draws}) == 4
    assert all(torch.equal(a, b) for a, b in zip(draws, few_label_draws(labels, 5, 4), strict=True))
    with pytest.raises(
        RunError, match="--few-label must not exceed the 20 images of the smallest class, got 21"
    ):
        few_label_draws(labels, 21, 1)


def test_training_beats_the_untrained_encoder_with_few_labels(tmp_path):
    config = Config.create(objective="alpha_direct", epochs=4, eval_every=0, width=8, workers=0)
    outcome = train(config, tmp_path / "run")
    assert (outcome.epochs, outcome.signal, outcome.already) == (4, None, False)
    result = evaluate(tmp_path / "run", draws=5)
    assert json.loads((tmp_path / "run" / "eval.json").read_text()) == result
    raw, untrained, trained = result["rows"].values()
    assert trained["knn_few"]["mean"] > untrained["knn_few"]["mean"] + 0.03
    assert trained["probe_few"]["mean"] > untrained["probe_few"]["mean"] + 0.03
    assert trained["knn"] > 0.9
    assert raw["knn"] > 0.95
    assert all(row["probe"] <= row["probe_best"] for row in result["rows"].values())
    lines = report.table(result).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "raw pixels",
        "untrained encoder",
        "trained encoder",
    ]
    assert len({len(line) for line in lines}) == 1


# Runs


def test_what_a_run_leaves(finished):
    names = {"config.json", "checkpoint.pt", "checkpoint-1.pt", "metrics.jsonl", ".lock"}
    names |= {"curves.png", "embedding.png"}
    assert {path.name for path in finished.iterdir()} == names
    steps = [row for row in rows(finished) if row["kind"] == "step"]
    epochs = [row for row in rows(finished) if row["kind"] == "epoch"]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [(row["epoch"], row["step"]) for row in epochs] == [(1, 4), (2, 8)]
    for row in epochs:
        mean = sum(step["loss"] for step in steps if step["epoch"] == row["epoch"]) / 4
        assert row["loss"] == pytest.approx(mean)
        assert 0 <= row["knn"] <= 1
        assert row["images_per_s"] == pytest.approx(64_000 / row["step_ms"])
        assert 0 < row["loss_ms"] < row["step_ms"]
    for name in ("curves.png", "embedding.png"):
        assert Image.open(finished / name).size[0] > 600


def test_knn_and_probe_have_their_own_epochs_and_share_features(tmp_path, monkeypatch, drawn):
    extractions = []
    extract = evaluation.extract
    monkeypatch.setattr(
        evaluation, "extract", lambda *given: extractions.append(len(given[0])) or extract(*given)
    )
    state = torch.get_rng_state()
    for epochs, knn_every, probe_every, expected in (
        (3, 1, 2, "k kp kp"),
        (3, 2, 0, "- k k"),
        (2, 0, 2, "- p"),
    ):
        extractions.clear()
        out = tmp_path / f"{knn_every}{probe_every}"
        train(tiny(subset=128, epochs=epochs, eval_every=knn_every, probe_every=probe_every), out)
        found = [row for row in rows(out) if row["kind"] == "epoch"]
        assert [
            ("k" * ("knn" in row) + "p" * ("probe" in row)) or "-" for row in found
        ] == expected.split()
        # and the picture's
        assert extractions == [128, 500] * sum(due != "-" for due in expected.split()) + [500]
    assert found[-1]["probe"] == found[-1]["probe_best"] > 0.5  # so few labels: run to convergence
    torch.set_rng_state(state)
    linear_probe(
        Split(torch.randn(300, 8), torch.arange(300) % 4, torch.randn(9, 8), torch.arange(9) % 4, 4)
    )
    drawn = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.randn(300, 8), torch.randn(9, 8)
    # a probe during training draws nothing that training would
    assert torch.equal(torch.get_rng_state(), drawn)


def test_same_seed_same_run_and_bf16_and_sgd_differ(finished, tmp_path):
    def same(given, first):
        out = tmp_path / str(given)
        train(tiny(**{"objective": "alpha_direct", **given}), out)
        weights = state_of(first)["model"]
        return all(torch.equal(weights[name], x) for name, x in state_of(out)["model"].items())

    assert same({"eval_every": 1}, finished)
    short = {"subset": 128, "epochs": 1, "eval_every": 0}
    train(tiny(objective="alpha_direct", **short), tmp_path / "short")
    assert same(short, tmp_path / "short")
    for change in ({"seed": 1}, {"amp": "bf16"}, {"optimizer": "sgd"}, {"objective": "infonce"}):
        assert not same({**short, **change}, tmp_path / "short"), change


def test_learnt_temperature_moves_and_is_restored(tmp_path):
    config = tiny(learn_temperature=True, optimizer="sgd", lr=0.5)
    train(config, tmp_path / "run")
    learnt = [row["temperature"] for row in rows(tmp_path / "run") if row["kind"] == "epoch"]
    assert len({0.5, *learnt}) == 3
    state = checkpoint.read(tmp_path / "run")
    assert state["loss"]["temperature"].item() == learnt[-1]
    with pytest.raises(RunError, match="--learn-temperature: temperature must not require"):
        train(tiny(objective="alpha_direct", learn_temperature=True), tmp_path / "other")


def test_a_loss_that_stops_being_finite_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    class Breaks(recipe.FusedAlphaCLLoss):
        calls = 0

        def forward(self, z1, z2):
            self.calls += 1
            # the first call is the trial
            return super().forward(z1, z2) * (float("nan") if self.calls == 8 else 1)

    monkeypatch.setattr(recipe, "FusedAlphaCLLoss", Breaks)
    config = tiny(save_every=3)
    with pytest.raises(
        RunError, match="NaN in epoch 2, by step 7; the last good checkpoint, step 6, is kept"
    ):
        train(config, tmp_path / "run")
    state = checkpoint.read(tmp_path / "run")
    assert state["step"] == 6
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    monkeypatch.undo()
    assert train(config, tmp_path / "run", resume=True).epochs == 2


def test_a_broken_weight_is_not_saved(tmp_path, monkeypatch):
    class Breaks(recipe.FusedAlphaCLLoss):
        calls = 0

        def forward(self, z1, z2):
            self.calls += 1
            value = super().forward(z1, z2)
            # the fourth step, last of its epoch: a finite loss with an infinite gradient
            if self.calls == 5:
                value = value + (z1 - z1.detach()).sum() * float("inf")
                value = torch.where(torch.isfinite(value), value, value.detach().nan_to_num())
            return value

    monkeypatch.setattr(recipe, "FusedAlphaCLLoss", Breaks)
    with pytest.raises(RunError, match="became"):
        train(tiny(), tmp_path / "run")
    state = checkpoint.read(tmp_path / "run")
    assert state["step"] == 0
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_other_settings_are_refused_and_named(finished):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    config = tiny(objective="infonce", eval_every=1, lr=0.1)
    with pytest.raises(RunError) as caught:
        train(config, finished, resume=True)
    assert "--objective: 'alpha_direct' in the run, 'infonce' given" in str(caught.value)
    assert "--lr: 0.003 in the run, 0.1 given" in str(caught.value)
    with pytest.raises(RunError, match="not an empty folder: go on with it by --resume"):
        train(config, finished)
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before
    elsewhere = tiny(objective="alpha_direct", eval_every=1, workers=1, data_root="moved")
    assert train(elsewhere, finished, resume=True).already


def flipped(file, place):
    """Flip one bit of a file; ``place`` in [0, 1) says where."""
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("place", [None, 0.0, 0.3, 0.999999])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(finished, tmp_path, capsys, place):
    run, config = tmp_path / "run", tiny(objective="alpha_direct", eval_every=1)
    shutil.copytree(finished, run)
    newest = run / "checkpoint.pt"
    if place is None:
        newest.write_bytes(newest.read_bytes()[:5000])
    else:
        flipped(newest, place)
    storage.warn.cache_clear()
    state = torch.load(run / "checkpoint-1.pt", weights_only=True)
    # The checkpoint before is the one between the last epoch's steps and its evaluation.
    assert (state["epoch"], state["step"]) == (1, 8)
    assert train(config, run, resume=True).epochs == 2
    warning = capsys.readouterr().err
    assert f"{newest} is damaged: it is cut off or differs from its digest" in warning
    assert warning.rstrip().endswith("using checkpoint-1.pt, of step 8")
    for name in ("model", "optimizer"):
        ours, theirs = (state_of(folder)[name]
                        for folder in (run, finished))  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert [row["kind"] for row in rows(run)] == [row["kind"] for row in rows(finished)]


def test_damaged_and_foreign_checkpoints(finished, tmp_path):
    config = tiny(objective="alpha_direct", eval_every=1)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("checkpoint.pt", "checkpoint-1.pt"):
        flipped(run / name, 0.5)
    for use in (lambda: train(config, run, resume=True), lambda: evaluate(run)):
        with pytest.raises(
            RunError, match=r"checkpoint-1\.pt is damaged.*holds no other checkpoint"
        ):
            use()
    shutil.rmtree(run)
    run.mkdir()
    checkpoint.begin(
        run, tiny(width=5, objective="alpha_direct", eval_every=1), torch.device("cpu")
    )
    shutil.copy(finished / "checkpoint.pt", run)
    with pytest.raises(
        RunError, match="is the checkpoint of another config: --width: 4 in the run, 5 given"
    ):
        evaluate(run)
    os.remove(run / "checkpoint.pt")
    with pytest.raises(RunError, match="has no checkpoint yet"):
        evaluate(run)
    flipped(run / "config.json", 0.5)
    with pytest.raises(RunError, match=r"config\.json is damaged.*nothing has been trained in"):
        train(config, run, resume=True)
    with pytest.raises(RunError, match=r"is not a run: it has no config\.json"):
        evaluate(tmp_path / "nothing")
    torch.save({"weights": torch.zeros(3)}, run / "checkpoint.pt")
    with pytest.raises(RunError, match="is no checkpoint of a run"):
        evaluate(run)


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "edited"])
def test_settings_of_a_damaged_config_are_the_checkpoint_s(finished, tmp_path, capsys, damage):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = run / "config.json"
    text = file.read_text()
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        flipped(file, 0.2)
    else:
        file.write_text(text[:99] if damage == "cut" else text.replace("0.003", "0.007"))
    storage.warn.cache_clear()
    assert train(tiny(objective="alpha_direct", eval_every=1), run, resume=True).already
    assert f"{file} is " in capsys.readouterr().err
    with pytest.raises(RunError, match=r"--lr: 0\.003 in the run, 0\.007 given"):
        train(tiny(objective="alpha_direct", eval_every=1, lr=0.007), run, resume=True)


def image_run(folders, **given):
    return Config.create(
        **{
            "dataset": "imagefolder",
            "data_root": str(folders),
            "encoder": "small",
            "image_size": 8,
            "width": 4,
            "batch_size": 8,
            "epochs": 2,
            "eval_every": 0,
            "workers": 0,
            **given,
        }
    )


def test_a_data_set_that_changed_is_accepted_on_request(folders, tmp_path, capsys):
    config, run = image_run(folders), tmp_path / "run"
    assert train(config, run).epochs == 2
    (run / "embedding.png").unlink()
    (folders / "train" / "cat" / "3.jpg").unlink()
    shutil.copy(folders / "train" / "dog" / "5.jpg", folders / "train" / "dog" / "new.jpg")
    (folders / "train" / "dog" / "2.jpg").unlink()
    expected = (
        "was started with 24 training images, the data set has 23; missing: cat/3.jpg, dog/2.jpg; "
        "new: dog/new.jpg; bring them back, or go on with --accept-data-change"
    )
    with pytest.raises(RunError, match=expected):
        train(config, run, resume=True)
    assert len((run / "images.txt").read_text().splitlines()) == 24
    assert train(config, run, resume=True, accept_data_change=True).epochs == 2
    assert "going on as --accept-data-change asks" in capsys.readouterr().err
    (run / "embedding.png").unlink()
    assert train(config, run, resume=True).epochs == 2  # it is the data set of the run now


def test_an_epoch_with_fewer_images_ends_earlier(folders, tmp_path, monkeypatch):
    config, run = image_run(folders, save_every=1, log_every=1), tmp_path / "run"
    stop_after(monkeypatch, 5)
    assert train(config, run).signal == signal.SIGTERM  # within the second epoch of three steps
    monkeypatch.undo()
    for name in range(9):
        (folders / "train" / "cat" / f"{name}.jpg").unlink()
    assert train(config, run, resume=True, accept_data_change=True).epochs == 2
    assert [row["step"] for row in rows(run) if row["kind"] == "epoch"] == [3, 2]


def stop_after(monkeypatch, step):
    """Send SIGTERM to this process after a step."""
    one_step = loop._Run.one_step

    def stop(self, parts):
        result = one_step(self, parts)
        if self.step == step:
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(loop._Run, "one_step", stop)


def full(*_):
    raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_checkpoint(finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    monkeypatch.setattr(os, "fsync", full)
    for out, before in (
        (run, "the checkpoint before it stands"),
        (tmp_path, "there is no earlier"),
    ):
        with pytest.raises(RunError, match=f"cannot write .*No space left on device; {before}"):
            checkpoint.save(out, {}, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert {path.name: path.read_bytes() for path in run.iterdir()} == {
        path.name: path.read_bytes() for path in finished.iterdir()
    }


@pytest.mark.parametrize("write", ["curves.png", "embedding.png", "config.json", "metrics.jsonl"])
def test_a_full_disk_is_one_line_wherever_it_is_met(tmp_path, monkeypatch, write, drawn):
    real = storage.write

    def write_or_fail(path, *arguments, **options):
        if path.name == write:
            full()
        real(path, *arguments, **options)

    monkeypatch.setattr(storage, "write", write_or_fail)
    if write == "metrics.jsonl":
        monkeypatch.setattr(loop.checkpoint.Metrics, "write", lambda self, **_: broken(self.path))

    def broken(path):
        with storage.writing(path):
            full()

    with pytest.raises(RunError, match=r"cannot write to .*: No space left on device"):
        train(tiny(subset=64, epochs=1), tmp_path / "run")


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_log_is_a_warning(finished, tmp_path, capsys, damage):
    run, config = tmp_path / "run", tiny(objective="alpha_direct", eval_every=1)
    shutil.copytree(finished, run)
    log = run / "metrics.jsonl"
    (run / "embedding.png").unlink()
    if damage == "missing":
        log.unlink()
    elif damage == "cut":
        log.write_bytes(log.read_bytes()[:-40])
    else:
        flipped(log, 0.5)
    storage.warn.cache_clear()
    assert train(config, run, resume=True).epochs == 2
    assert f"{log} is damaged" in capsys.readouterr().err
    assert rows(run)[-1]["kind"] == "damaged"
    (run / "embedding.png").unlink()
    storage.warn.cache_clear()
    assert train(config, run, resume=True).epochs == 2
    assert f"{log} is damaged" not in capsys.readouterr().err


def test_checkpoints_are_kept_in_order(tmp_path):
    for step in range(5):
        checkpoint.save(tmp_path, {"step": step}, keep=3)
    names = ["checkpoint.pt", "checkpoint-1.pt", "checkpoint-2.pt"]
    assert [torch.load(tmp_path / name)["step"] for name in names] == [4, 3, 2]
    assert [path.name for path in storage.versions(tmp_path / "checkpoint.pt")] == names
    checkpoint.save(tmp_path, {"step": 5}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_temperature_that_is_no_number_is_not_saved(tmp_path, monkeypatch):
    one_step = loop._Run.one_step

    def broken(self, parts):
        result = one_step(self, parts)
        if self.step == 6:
            with torch.no_grad():
                next(self.loss.parameters()).fill_(float("nan"))
        return result

    config = tiny(learn_temperature=True, save_every=3)
    monkeypatch.setattr(loop._Run, "one_step", broken)
    with pytest.raises(RunError, match=r"the temperature became .* by step 6; .* step 4, is kept"):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    assert checkpoint.read(tmp_path / "run")["step"] == 4
    assert train(config, tmp_path / "run", resume=True).epochs == 2


def test_one_process_at_a_time_uses_a_run(finished, tmp_path):
    config, run = tiny(objective="alpha_direct", eval_every=1), tmp_path / "run"
    shutil.copytree(finished, run)
    held = f"is in use by process {os.getpid()} on "
    with storage.locked(run):
        with pytest.raises(RunError, match=held):
            train(config, run, resume=True)
        ready, started = os.pipe()
        child = os.fork()  # such as a loader worker, which may outlive a parent that is killed
        if not child:
            os.write(started, b"1")
            signal.pause()
        os.read(ready, 1)
        storage._leave_locks()  # what a kill does
    try:
        with storage.locked(run):
            pass
        with storage.locked(tmp_path / "new"), pytest.raises(RunError, match=held):
            train(config, tmp_path / "new")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert train(config, run, resume=True).already


def test_more_epochs_where_the_schedule_allows_them(tmp_path):
    fixed = {"subset": 64, "eval_every": 0, "schedule": "constant", "epochs": 1}
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    train(tiny(**{**fixed, "epochs": 2}), whole)
    train(tiny(**fixed), grown)
    assert train(tiny(**{**fixed, "epochs": 2}), grown, resume=True).epochs == 2
    states = [torch.load(run / "checkpoint.pt")["model"] for run in (whole, grown)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert checkpoint.saved_config(grown).epochs == evaluate(grown, draws=1)["of_epochs"] == 2
    with pytest.raises(RunError, match="--epochs can only become larger; nothing"):
        train(tiny(**fixed), grown, resume=True)
    cosine = tiny(**{**fixed, "schedule": "cosine"})
    train(cosine, tmp_path / "cosine")
    with pytest.raises(RunError, match="only --schedule constant can be continued"):
        train(dataclasses.replace(cosine, epochs=2), tmp_path / "cosine", resume=True)
    warm = dataclasses.replace(cosine, warmup_epochs=1)
    train(warm, tmp_path / "warm")
    assert train(dataclasses.replace(warm, epochs=2), tmp_path / "warm", resume=True).epochs == 2


def test_names_of_the_loss_are_the_library_s():
    assert objectives.names() == config_module.OBJECTIVES
    assert functional.NEGATIVES == config_module.NEGATIVES
    assert {"auto", *backends()} == {*config_module.BACKENDS}


def test_metrics_are_cut_to_the_checkpoint(tmp_path):
    metrics = checkpoint.Metrics(tmp_path)
    metrics.write(kind="step", step=1)
    state = {"step": 1, "epoch": 0, "metrics": metrics.length}
    state["metrics_digest"] = metrics.hash.hexdigest()
    metrics.write(kind="step", step=2)
    assert metrics.resume(state)
    metrics.write(kind="step", step=3)
    assert [row["step"] for row in rows(tmp_path)] == [1, 3]
    assert not metrics.resume({**state, "metrics": 999})
    assert [row["kind"] for row in rows(tmp_path)] == ["step", "damaged"]


def test_an_unusable_folder_or_data_set_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(RunError, match="not an empty folder"):
        train(tiny(), tmp_path / "file")
    with pytest.raises(RunError, match=r"cannot .*Not a directory"):
        train(tiny(), tmp_path / "file" / "run")
    with pytest.raises(RunError, match="cannot open cifar10"):
        train(Config.create(dataset="cifar10", data_root=str(tmp_path)), tmp_path / "run")
    with pytest.raises(RunError, match=r"--objective must be one of .*; did you mean 'infonce'"):
        train(tiny(objective="infonse"), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_settings_of_the_process_are_restored(tmp_path):
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    train(tiny(epochs=1, subset=64, eval_every=0, threads=before[0] + 1), tmp_path / "run")
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
