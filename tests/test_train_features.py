"""What a run may do besides the default: clipping, averages, schedules, initial weights, float16,
held-out images, and normalisation and evaluation over ranks."""

import dataclasses
import functools
import json
import math
import os
import platform
import signal

import pytest
import torch
import torch._dynamo.testing
import torchvision
from PIL import Image
from torch import nn
from training_runs import rows, state_of, train_on_ranks

from alphacl_fast.train import (
    Config,
    RunError,
    data,
    device,
    evaluate,
    evaluation,
    loop,
    models,
    recipe,
    schedules,
    train,
    weights,
)
from alphacl_fast.train.process_context import ProcessContext
from alphacl_fast.train.sync_batch_norm import synchronised

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.usefixtures("one_thread", "quick_plots"),
]

CPU = torch.device("cpu")
TINY = {
    "dataset": "digits",
    "width": 4,
    "batch_size": 32,
    "subset": 128,
    "epochs": 2,
    "workers": 0,
    "log_every": 1,
    "eval_every": 0,
}
#: Everything at once that one process can do.
MUCH = {
    "clip": 0.5,
    "ema": 0.9,
    "amp": "fp16",
    "temperature_schedule": "cosine",
    "validation": 50,
    "eval_every": 1,
    "epochs": 3,
}


def tiny(**given):
    return Config.create(**{**TINY, **given})


def assert_equal(ours, theirs, path=""):
    """Nested dicts and lists are equal bit for bit."""
    assert type(ours) is type(theirs), path
    if isinstance(ours, dict):
        assert {*ours} == {*theirs}, path
        for name in ours:
            assert_equal(ours[name], theirs[name], f"{path}/{name}")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), path
    else:
        assert ours == theirs, path


def each_step(monkeypatch, act):
    """Call ``act(run)`` after every step."""
    one_step = loop._Run.one_step

    def step(self, parts):
        result = one_step(self, parts)
        act(self)
        return result

    monkeypatch.setattr(loop._Run, "one_step", step)


# Settings


@pytest.mark.parametrize(("given", "message"), [
    ({"ema": 1.0}, "--ema must be below 1, got 1.0"),
    ({"ema": math.nan}, "--ema must be at least 0, got nan"),
    ({"clip": -1.0}, "--clip must be at least 0, got -1.0"),
    ({"temperature_end": 0.0}, "--temperature-end must be positive and finite, got 0.0"),
    ({"temperature_period": math.inf}, "--temperature-period must be finite, got inf"),
    ({"temperature_schedule": "linear", "learn_temperature": True},
     "--learn-temperature and --temperature-schedule exclude each other, got linear"),
    ({"validation": 20, "eval_every": 0}, "--validation needs --eval-every or --probe-every"),
    ({"amp": "fp8"}, "--amp must be one of none, bf16, fp16, got 'fp8'"),
])  # fmt: skip
def test_bad_settings_are_named(given, message):
    with pytest.raises(RunError) as caught:
        tiny(**given)
    assert str(caught.value).startswith(message)


def test_all_of_it_resumes_bit_for_bit(tmp_path, monkeypatch):
    config = tiny(**MUCH)
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        each_step(patch, lambda run: run.step == 11 and signal.raise_signal(signal.SIGTERM))
        assert train(config, tmp_path / "run").epochs == 2
    torch.manual_seed(5)
    assert train(config, tmp_path / "run", resume=True).epochs == 3
    ours, theirs = state_of(tmp_path / "run"), state_of(tmp_path / "whole")
    assert {"ema", "scaler", "best"} <= {*ours}
    for state in (ours, theirs):  # the log has measured times
        del state["metrics"], state["metrics_digest"]
    assert_equal(ours, theirs)
    tests = [(tmp_path / name / "test.json").read_text() for name in ("run", "whole")]
    assert tests[0] == tests[1]


# A step


def test_the_gradient_is_clipped(tmp_path, monkeypatch):
    """The first step of SGD moves the weights by lr·clip, and a large limit changes nothing."""
    fixed = {"optimizer": "sgd", "schedule": "constant", "lr": 0.1, "epochs": 1, "warmup_epochs": 0}
    moved, before = {}, models.build(tiny()).state_dict()

    def note(run):
        if run.step == 1:
            now = dict(run.net.named_parameters())
            change = [(x - before[name]).flatten() for name, x in now.items()]
            moved[run.config.clip] = torch.cat(change).detach()

    each_step(monkeypatch, note)
    for clip in (0.0, 0.01, 1e6):
        train(tiny(**fixed, clip=clip), tmp_path / str(clip))
    assert moved[0.01].norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert torch.equal(moved[1e6], moved[0.0])
    cosine = torch.cosine_similarity(moved[0.01], moved[0.0], dim=0)
    assert cosine.item() == pytest.approx(1, abs=1e-4)


def test_the_average_is_a_recurrence_and_is_evaluated(tmp_path, monkeypatch):
    seen = []
    each_step(
        monkeypatch,
        lambda run: seen.append({name: x.clone() for name, x in run.net.state_dict().items()}),
    )
    train(tiny(ema=0.75, eval_every=2), tmp_path / "run")
    state = state_of(tmp_path / "run")
    for name, average in weights.evaluated(state).items():
        expected = seen[0][name].double()
        for later in seen[1:]:
            expected = 0.75 * expected + 0.25 * later[name].double()
        if average.is_floating_point():
            torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(state["model"][name], seen[-1][name])
    judged = evaluate(tmp_path / "run", draws=1)["rows"]["trained encoder"]["knn"]
    assert judged == rows(tmp_path / "run")[-1]["knn"]


def test_float16_skips_a_step_that_overflows(tmp_path, monkeypatch):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**40)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    before, scales = models.build(tiny()).state_dict(), []

    def note(run):
        unchanged = all(torch.equal(x, before[name]) for name, x in run.net.named_parameters())
        scales.append((run.scaler.get_scale(), unchanged))

    each_step(monkeypatch, note)
    train(tiny(amp="fp16", epochs=10), tmp_path / "run")
    assert scales[0] == (2.0**39, True)
    assert scales[-1][0] < 2.0**39
    assert not scales[-1][1]
    losses = [row["loss"] for row in rows(tmp_path / "run") if row["kind"] == "epoch"]
    assert losses[-1] < losses[0]


def test_float16_follows_float32(tmp_path):
    found = {}
    for amp in ("none", "fp16"):
        train(tiny(amp=amp, optimizer="sgd", lr=0.02), tmp_path / amp)
        found[amp] = [row["loss"] for row in rows(tmp_path / amp) if row["kind"] == "step"]
    assert found["fp16"] == pytest.approx(found["none"], rel=1e-2)
    assert found["fp16"] != found["none"]
    assert state_of(tmp_path / "fp16")["scaler"]["scale"] == 2.0**16


# The temperature


def temperatures(**given):
    config = tiny(temperature=0.5, temperature_end=0.1, epochs=4, **given)
    return [schedules.temperature(config, step, 5) for step in range(20)]


def test_temperatures_of_the_schedules():
    assert temperatures() == [0.5] * 20
    assert temperatures(temperature_schedule="linear") == pytest.approx(
        [0.5 - 0.4 * step / 19 for step in range(20)]
    )
    assert temperatures(temperature_schedule="cosine") == pytest.approx(
        [0.1 + 0.2 * (1 + math.cos(math.pi * step / 19)) for step in range(20)]
    )
    swing = temperatures(temperature_schedule="cosine", temperature_period=2.0)
    assert swing == pytest.approx(
        [0.1 + 0.2 * (1 + math.cos(2 * math.pi * step / 10)) for step in range(20)]
    )
    tent = temperatures(temperature_schedule="linear", temperature_period=2.0)
    assert tent == pytest.approx([0.5 - 0.4 * min(s % 10, 10 - s % 10) / 5 for s in range(20)])


def test_a_schedule_reaches_the_loss_and_recompiles_nothing(tmp_path, monkeypatch, fresh_dynamo):
    config, used = tiny(temperature_schedule="linear"), []
    each_step(monkeypatch, lambda run: used.append(run.loss.temperature.item()))
    train(config, tmp_path / "run")
    expected = [schedules.temperature(config, step, 4) for step in range(8)]
    assert used == pytest.approx(expected)
    epochs = [row["temperature"] for row in rows(tmp_path / "run") if row["kind"] == "epoch"]
    assert epochs == [expected[3], expected[7]]
    counter = torch._dynamo.testing.CompileCounter()
    run = recipe.Recipe(data.load(config), ProcessContext())
    compiled = torch.compile(run.loss, backend=counter)
    z1, z2 = torch.randn(2, 32, 16)
    losses = set()
    for step in range(4):
        run.before_step(step, 4)
        losses.add(compiled(z1, z2).item())
    assert (counter.frame_count, len(losses)) == (1, 4)


def test_a_schedule_that_depends_on_the_epochs_cannot_be_continued(tmp_path):
    fixed = {"schedule": "constant", "epochs": 1}
    cools = tiny(**fixed, temperature_schedule="cosine")
    train(cools, tmp_path / "cools")
    with pytest.raises(RunError, match="a temperature schedule without a period depends on them"):
        train(dataclasses.replace(cools, epochs=2), tmp_path / "cools", resume=True)
    swings = tiny(**fixed, temperature_schedule="cosine", temperature_period=1.0)
    train(swings, tmp_path / "swings")
    longer = dataclasses.replace(swings, epochs=2)
    assert train(longer, tmp_path / "swings", resume=True).epochs == 2


# Initial weights


def first_weights(monkeypatch, tmp_path, **given):
    """The weights of a run before its first step."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(
            loop._Run, "epochs", lambda self, _: found.append(self.net.state_dict()) or None
        )
        train(Config.create(**{**TINY, **given}), tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
    return found[0]


def test_initial_weights_come_from_a_run_or_a_state_dict(tmp_path, monkeypatch):
    train(tiny(epochs=1, ema=0.5), tmp_path / "first")
    state = state_of(tmp_path / "first")
    average = weights.evaluated(state)
    for path in (tmp_path / "first", tmp_path / "first" / "checkpoint.pt"):
        begun = first_weights(monkeypatch, tmp_path, weights=str(path), seed=4)
        for name, value in state["model"].items():
            assert torch.equal(begun[name], average[name]), name
            if name.endswith("weight"):
                assert not torch.equal(begun[name], value), name
    torch.save(state["model"], tmp_path / "net.pt")
    assert_equal(
        dict(first_weights(monkeypatch, tmp_path, weights=str(tmp_path / "net.pt"))),
        dict(state["model"]),
    )
    encoder = weights.of_encoder(average)
    torch.save(encoder, tmp_path / "encoder.pt")
    begun = first_weights(monkeypatch, tmp_path, weights=str(tmp_path / "encoder.pt"), seed=3)
    fresh = models.build(tiny(seed=3)).state_dict()
    assert torch.equal(begun["projector.0.weight"], fresh["projector.0.weight"])
    assert torch.equal(begun["encoder.body.0.weight"], encoder["body.0.weight"])


def test_initial_weights_of_torchvision():
    net = models.build(Config.create(dataset="stl10", encoder="resnet18"))
    theirs = torchvision.models.resnet18().eval()
    own = weights._as_torchvision(theirs.state_dict(), net)
    assert weights._difference(net.encoder.body.state_dict(), own) == ""
    net.encoder.body.load_state_dict(own)
    theirs.fc = nn.Identity()
    x = torch.rand(2, 3, 64, 64)
    body = nn.Sequential(net.encoder.body, net.encoder.pool, nn.Flatten()).eval()
    torch.testing.assert_close(body(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("value", "message"), [
    (None, "cannot read --weights .*: No such file or directory"),
    (b"text", r"must be a file of torch\.save, got one that cannot be read"),
    ([1, 2], "must hold a dict of tensors, got list"),
    ({"a": 3}, "must hold a dict of tensors, got int under 'a'"),
    ({"a": torch.ones(2)}, "holds weights of another network: .* is missing; expected weights of"),
    ({"a": torch.tensor([math.nan])}, "holds a weight that is infinite or NaN"),
])  # fmt: skip
def test_unusable_weights_are_named_before_anything_is_written(tmp_path, value, message):
    file = tmp_path / "weights.pt"
    if isinstance(value, bytes):
        file.write_bytes(value)
    elif value is not None:
        torch.save(value, file)
    with pytest.raises(RunError, match=message):
        train(tiny(weights=str(file)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_of_another_width_are_named(tmp_path):
    torch.save(models.build(tiny(width=8)).state_dict(), tmp_path / "net.pt")
    with pytest.raises(RunError, match=r"the shape \(8, 1, 3, 3\) and not \(4, 1, 3, 3\)"):
        train(tiny(weights=str(tmp_path / "net.pt")), tmp_path / "run")


# Held-out images


def test_held_out_images_are_neither_trained_on_nor_tested():
    config = tiny(subset=0, validation=200, eval_every=1)
    found, whole = data.load(config), data.load(tiny(subset=0))
    images = {
        name: {(image.tobytes(), label) for image, label in getattr(found, name)}
        for name in ("views", "train", "validation", "test")
    }
    assert len(found.validation) == 200
    assert len(found.views) == len(whole.views) - 200
    assert images["views"] == images["train"]
    assert not images["validation"] & (images["views"] | images["test"])
    assert torch.tensor(data.labels_of(found.validation)).bincount().tolist() == [20] * 10
    assert whole.scored is whole.test
    assert found.scored is found.validation
    with pytest.raises(RunError, match="--validation must be below the 1297 training images"):
        data.load(tiny(subset=0, validation=1297, eval_every=1))


def test_held_out_images_leave_the_views_that_have_no_labels(monkeypatch):
    """As in STL-10, whose unlabelled images follow the labelled ones."""
    images = [(Image.new("L", (8, 8), number), number % 2) for number in range(30)]
    monkeypatch.setitem(
        data._OPEN, "digits", lambda _: (images, images[:10], images[:4], ["even", "odd"])
    )
    found = data.load(tiny(subset=0, validation=4, eval_every=1, batch_size=8))
    held_out = {*found.validation.indices}
    assert {*found.train.indices} == {*range(10)} - held_out
    assert {*found.views.indices} == {*range(30)} - held_out


def test_the_test_images_are_scored_once_with_the_best_weights(tmp_path, monkeypatch):
    config = tiny(validation=50, eval_every=1, epochs=3)
    accuracies, scored = iter([0.5, 0.9, 0.7, 0.6]), []
    found = {}

    def figures(encoder, data, *, knn, probed, scored=None, context=None):
        which = "validation" if scored is data.validation else "test"
        found.setdefault(which, []).append(
            {name: x.clone() for name, x in encoder.state_dict().items()}
        )
        return {"knn": next(accuracies)}

    monkeypatch.setattr(loop, "figures", figures)
    train(config, tmp_path / "run")
    assert (len(found["validation"]), len(found["test"])) == (3, 1)
    best = found["validation"][1]
    assert_equal(found["test"][0], best)
    assert_equal(weights.of_encoder(weights.evaluated(state_of(tmp_path / "run"))), best)
    result = json.loads((tmp_path / "run" / "test.json").read_text())
    assert (result["epoch"], result["knn"]) == (2, 0.6)
    assert train(config, tmp_path / "run", resume=True).already
    assert not scored


# Over ranks


def split_rows(x, rank, size):
    """Uneven shares of rows."""
    return x.tensor_split([3, 9][: size - 1])[rank]


def layers(dtype):
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.BatchNorm1d(80, affine=False)
    )
    with torch.no_grad():
        net[1].weight.uniform_(0.5, 2)
        net[1].bias.normal_()
    return net.to(dtype)


def normalised(group, dtype):
    """This rank's outputs and gradients of synchronised layers, and their statistics."""
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    context = ProcessContext(rank, size, 0, group)
    net = synchronised(layers(dtype), context, CPU)
    generator = torch.Generator().manual_seed(4)
    whole, weight = (torch.randn(14, *shape, generator=generator) for shape in ((2, 6, 6), (80,)))
    x = split_rows(whole, rank, size).to(dtype).requires_grad_()
    y = net(x)
    (y * split_rows(weight, rank, size).to(dtype)).square().sum().backward()
    net.eval()
    return y.detach(), x.grad, net[0].weight.grad, net.state_dict(), net(whole.to(dtype)).detach()


@pytest.mark.parametrize("size", [2, 3])
def test_synchronised_normalisation_is_that_of_the_whole_batch(ranks, size):
    found = ranks.run(size, normalised, dtype=torch.float64)
    net = layers(torch.float64)
    generator = torch.Generator().manual_seed(4)
    whole, weight = (torch.randn(14, *shape, generator=generator) for shape in ((2, 6, 6), (80,)))
    x = whole.double().requires_grad_()
    y = net(x)
    (y * weight.double()).square().sum().backward()
    state = net.state_dict()
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
    close(torch.cat([part[0] for part in found]), y.detach())
    close(torch.cat([part[1] for part in found]), x.grad)
    close(sum(part[2] for part in found), net[0].weight.grad)
    for part in found:
        assert {*part[3]} == {*state}
        for name, value in state.items():
            close(part[3][name], value)
        close(part[4], net.eval()(whole.double()).detach())


def shared_figures(group):
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    config = tiny(subset=97)
    images, encoder = data.load(config), models.build(config).encoder
    context = ProcessContext(rank, size, 0, group)
    found = evaluation.splits({"": encoder}, images, context=context)[""]
    judged = evaluation.figures(encoder, images, knn=True, probed=True, context=context)
    return found.train, found.labels, judged


def test_ranks_share_an_evaluation(ranks):
    found = ranks.run(3, shared_figures)
    config = tiny(subset=97)
    images, encoder = data.load(config), models.build(config).encoder
    alone = evaluation.splits({"": encoder}, images)[""]
    for features, labels, judged in found:
        torch.testing.assert_close(features, alone.train, rtol=1e-5, atol=1e-6)
        assert torch.equal(labels, alone.labels)
        assert judged == found[0][2]
        assert judged["knn"] == pytest.approx(
            evaluation.figures(encoder, images, knn=True, probed=False)["knn"], abs=0.01
        )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forks of this process")
def test_two_ranks_with_everything_train_as_one_process(tmp_path):
    """Batch normalisation over both ranks is that of the one process with the whole batch."""
    given = {"ema": 0.5, "clip": 1.0, "validation": 50, "eval_every": 1, "optimizer": "sgd"}
    given |= {"batch_size": 31, "lr": 0.02}
    train(tiny(**given), tmp_path / "one")
    both = tiny(**given, norm="sync", eval_ranks="all")
    train_on_ranks(2, both, tmp_path / "two")
    one, two = (rows(tmp_path / name) for name in ("one", "two"))
    for name in ("loss", "knn"):
        ours, theirs = ([row[name] for row in found if name in row] for found in (two, one))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=0.021 if name == "knn" else 0)
    one, two = (state_of(tmp_path / name) for name in ("one", "two"))
    for name, value in one["ema"].items():
        torch.testing.assert_close(two["ema"][name], value, rtol=1e-2, atol=1e-3)


def test_ranks_that_would_wait_for_one_another_are_refused():
    config = tiny(norm="sync", batch_size=33, micro_batch=16)
    with pytest.raises(RunError, match="--norm sync needs equal numbers of micro-batches on all 2"):
        loop._check_shares(config, 2)
    loop._check_shares(dataclasses.replace(config, micro_batch=15), 2)
    loop._check_shares(dataclasses.replace(config, norm="batch"), 2)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is set")
def test_memory_of_a_step_is_not_asked_for_again():
    """Blocks of the size of activations; the page faults of allocating them anew are counted."""
    import resource

    def faults():
        def step():
            return [torch.ones(2**22) for _ in range(4)]

        for _ in range(5):  # until every block has its place
            step()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    usual = faults()
    if usual < 100:
        pytest.skip("another allocator, or huge pages")
    with device.settings(tiny()):
        assert faults() < usual / 2


@pytest.mark.parametrize("name", ["meta", "cuda"])
def test_another_default_device_changes_nothing(tmp_path, name):
    """Also one that the machine lacks."""
    config = tiny(epochs=1, eval_every=1, device="cpu")
    train(config, tmp_path / "usual")
    torch.set_default_device(name)
    try:
        train(config, tmp_path / "other")
        evaluate(tmp_path / "other", draws=1)
    finally:
        torch.set_default_device(None)
    ours, theirs = (state_of(tmp_path / name)["model"] for name in ("other", "usual"))
    assert_equal(ours, theirs)
