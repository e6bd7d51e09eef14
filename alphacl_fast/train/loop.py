"""The training loop. One step is: two views, one forward pass, the loss, one optimizer step.

With several processes (`world`) each has its share of the batch; the loss is that of the whole batch, and gradients are
averaged in one all-reduce. The first process writes, evaluates and talks.
"""

from __future__ import annotations

import dataclasses
import math
import random
import signal
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from alphacl_fast import FusedAlphaCLLoss

from . import batched, checkpoint, gradient, report
from .augment import augmentation
from .config import Config, Diverged, RunError
from .data import Data, load, mix, training_batches
from .device import pick_device, settings
from .evaluate import figures, picture
from .models import Net, build
from .world import World, joined, peers

TRIAL_PAIRS = 1024  # most pairs of the batch on which the loss is tried before a run
REHEARSED_STEPS = 10  # more than the batches that four loader processes prepare ahead
WARMUP_STEPS = 3  # steps of this process left out of images/s: first allocations, worker start, compilation


@dataclasses.dataclass
class Outcome:
    """How :func:`train` ended: ``epochs`` finished, the ``signal`` that stopped it, or ``already`` finished before.

    ``leads``: whether this is the run's first process, or the only one. ``late``: a signal that came after the last step,
    too late to stop the run, but its sender may want nothing more to be started.
    """

    out: Path
    epochs: int
    signal: int | None = None
    already: bool = False
    leads: bool = True
    late: int | None = None


def train(config: Config, out: str | Path, *, resume: bool = False) -> Outcome:
    """Run ``config`` in the folder ``out``, or go on with the run there (``resume=True``).

    SIGINT and SIGTERM end it after the current step with a checkpoint. A run that was stopped, or killed, and resumed
    ends with the weights of an uninterrupted one (bit for bit on a CPU with the same number of threads). Raises
    RunError, without touching a file that exists, when ``out`` holds something else, or data set, device or settings
    are unusable; and when the loss becomes infinite or NaN, keeping the last good checkpoint. Under torchrun every process
    calls it; a run may be resumed with another number of processes.
    """
    with joined() as world:
        return _train(config, Path(out), resume, world)


def _train(config: Config, out: Path, resume: bool, world: World) -> Outcome:
    config.check()
    state, drawn = world.lead(lambda: (_saved_state(config, out) if resume else _check_empty(out),
                                       (out / "embedding.png").exists()))
    if state and state["epoch"] == config.epochs and drawn:
        return Outcome(out, config.epochs, already=True, leads=world.leads)
    if config.batch_size < world.size:
        raise RunError(f"--batch-size must be at least the number of processes, {world.size}, got {config.batch_size}")
    device = pick_device(config.device, world.local_rank if world.size > 1 else None)
    if config.download:  # once, not in every process
        world.lead(lambda: len(load(config).views))
    data = load(config)
    with settings(config):
        run = _Run(config, out, device, data, world)
        if world.leads and not (out / checkpoint.CONFIG).exists():
            checkpoint.begin(out, config, device)
        run.restore(state)
        with stop_signals() as caught:
            stopped_by = run.epochs(caught)
        if stopped_by is None and world.leads:
            report.curves(out / checkpoint.METRICS, out / "curves.png", f"{config.objective} on {config.dataset}")
            picture(run.net.encoder, data, config, device, out / "embedding.png")
    return Outcome(out, run.epoch, signal=stopped_by, leads=world.leads, late=None if stopped_by else sum(caught[:1]) or None)


def try_out(configs: list[Config]) -> None:
    """Raise RunError if data set, device or loss of one of ``configs``, which differ in the loss, cannot be used."""
    load(configs[0])
    device = pick_device(configs[0].device)
    for config in configs:
        with settings(config):
            _build_loss(config, device, World())


def rehearse(config: Config, *, judged: bool) -> dict[str, float]:
    """Seconds that the parts of a run of ``config`` take here and now, in one process; it leaves nothing behind.

    "step": one step after the first ones, "start": what comes before, "per_epoch": the number of steps; with ``judged`` also
    "evaluation": kNN and probe of an epoch, "end": the pictures. A diverging loss does not matter here.
    """
    begun = time.perf_counter()
    device, data = pick_device(config.device), load(config)
    with settings(config), tempfile.TemporaryDirectory() as folder:
        run = _Run(config, Path(folder), device, data, World())
        batches = run.batches(WARMUP_STEPS + REHEARSED_STEPS)
        run.net.train()
        for step in range(WARMUP_STEPS + REHEARSED_STEPS):
            if step == WARMUP_STEPS:
                warm = time.perf_counter()
            value, _, _ = run.one_step(next(batches))
            value.item()  # waits for the device
        found = {"step": (time.perf_counter() - warm) / REHEARSED_STEPS, "per_epoch": run.per_epoch}
        found["start"] = max(0.0, warm - begun - WARMUP_STEPS * found["step"])
        batches.close()  # ends the loader's processes
        if judged:
            before = time.perf_counter()
            figures(run.net.encoder, data, config, device, knn=True, probed=True)
            judged_at = time.perf_counter()
            picture(run.net.encoder, data, config, device, Path(folder) / "embedding.png")
            found.update(evaluation=judged_at - before, end=time.perf_counter() - judged_at)
    return found


def due(epoch: int, every: int, epochs: int) -> bool:
    """Whether ``epoch``, counted from 1, is one that is evaluated every so many epochs (0: none); the last one is."""
    return bool(every) and (epoch % every == 0 or epoch == epochs)


def learning_rate(config: Config, step: int, per_epoch: int) -> float:
    """Learning rate of ``step``, counted from 0: linear warm-up, then half a cosine down to 0."""
    warmup, total = config.warmup_epochs * per_epoch, config.epochs * per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class _Run:
    """The moving parts of a run and where it stands: ``step`` steps done, ``epoch`` epochs evaluated and logged."""

    def __init__(self, config: Config, out: Path, device: torch.device, data: Data, world: World):
        self.config, self.out, self.device, self.data, self.world = config, out, device, data, world
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        self.net: Net = build(config).to(device)
        self.forward = torch.compile(self.net) if config.compile else self.net
        self.loss = _build_loss(config, device, world)
        groups = [{"params": [*self.net.parameters()], "weight_decay": config.weight_decay},
                  {"params": [*self.loss.parameters()], "weight_decay": 0.0}]
        self.optimizer = _build_optimizer(config, groups)
        self.per_epoch = len(data.views) // config.batch_size
        self.epoch = self.step = self.saved_step = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # of this epoch; read at sync points only
        self.metrics, self.metrics_length = checkpoint.Metrics(out), 0

    def restore(self, state: dict | None) -> None:
        """Take over a checkpoint, or start with the first one."""
        images = len(self.data.views)
        if state and state["images"] != images:
            raise RunError(f"{self.out} was started with {state['images']} training images, the data set has {images}")
        self.metrics_length = state["metrics"] if state else 0
        if self.world.leads:
            self.metrics.cut(self.metrics_length)
        if state is None:
            self.own_noise()
            self.world.first([*self.net.state_dict().values()])
            return self.save()
        self.net.load_state_dict(state["model"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step, self.saved_step = state["epoch"], state["step"], state["step"]
        self.loss_sum.copy_(state["loss_sum"])
        checkpoint.restore_rng(state)
        self.own_noise()

    def own_noise(self) -> None:
        """Give each of several processes random numbers of its own, whichever number of them there was before."""
        if self.world.size > 1:
            torch.manual_seed(mix(self.config.seed, self.step, self.world.rank))

    def save(self) -> None:
        """Write the checkpoint, unless the loss or a weight has stopped being finite (RunError)."""
        self.check_finite()
        if not all(torch.isfinite(p).all() for p in self.net.parameters()):
            self.fail("a weight became infinite or NaN")
        self.saved_step = self.step
        if not self.world.leads:
            return
        checkpoint.save(self.out, {
            "config": dataclasses.asdict(self.config), "model": self.net.state_dict(), "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(), "epoch": self.epoch, "step": self.step,
            "loss_sum": self.loss_sum, "images": len(self.data.views), "metrics": self.metrics_length})

    def check_finite(self) -> float:
        """The epoch's summed loss (synchronises). Raises RunError if it is not finite."""
        total = self.loss_sum.item()
        if not math.isfinite(total):
            self.fail(f"the loss became {'NaN' if math.isnan(total) else 'infinite'}")
        return total

    def fail(self, what: str):
        text = (f"{what} in epoch {self.epoch + 1}, by step {self.step}; the last good checkpoint, step "
                f"{self.saved_step}, is kept in {self.out}; a lower --lr or a higher --temperature may help")
        raise Diverged(text, shown=not self.world.leads)

    def batches(self, stop: int):
        """Micro-batches of every step from the next one to ``stop``, counted over all epochs."""
        config = self.config
        if config.augment == "device":
            images = batched.images_on(self.device, self.data.views, config.image_size)
            return batched.training_batches(images, config, self.step, stop, self.world.share)
        return training_batches(self.data.views, augmentation(config.dataset, config.image_size), config, self.step, stop,
                                self.device.type == "cuda", self.world.share)

    def epochs(self, caught: list[int]) -> int | None:
        """Train until the last epoch is closed (None) or a signal is in ``caught``: then save and return its number."""
        config, total = self.config, self.config.epochs * self.per_epoch
        batches = self.batches(total)
        quiet = None if self.world.leads else True
        done, bar = 0, tqdm(total=total, initial=self.step, unit="step", disable=quiet, dynamic_ncols=True)
        try:
            while self.epoch < config.epochs:
                seconds, loss_seconds, counted = 0.0, 0.0, 0
                self.net.train()
                before = time.perf_counter()
                stop = self.world.agreed(sum(caught[:1]))
                while self.step < (self.epoch + 1) * self.per_epoch and not stop:
                    value, lr, in_loss = self.one_step(next(batches))
                    done, last_of_epoch = done + 1, self.step == (self.epoch + 1) * self.per_epoch
                    bar.update()
                    if self.step % config.log_every == 0 or last_of_epoch:
                        self.check_finite()
                        bar.set_postfix(epoch=self.epoch + 1, loss=f"{value.item():.4f}", refresh=False)
                    if self.step % config.log_every == 0:
                        self.log(kind="step", epoch=self.epoch + 1, step=self.step, loss=value.item(), lr=lr)
                    now = time.perf_counter()
                    if done > WARMUP_STEPS:
                        seconds, loss_seconds, counted = seconds + now - before, loss_seconds + in_loss, counted + 1
                    before = now
                    if config.save_every and self.step % config.save_every == 0 and not last_of_epoch:
                        self.save()
                        before = time.perf_counter()
                    stop = self.world.agreed(sum(caught[:1]))
                if stop:
                    self.save()
                    return stop
                self.close_epoch(seconds, loss_seconds, counted, bar)
        finally:
            bar.close()
        return None

    def log(self, **row) -> None:
        if self.world.leads:
            self.metrics_length = self.metrics.write(**row)

    def embed(self, views):
        """uint8 (n, C, H, W) twice -> embeddings (n, 128) twice, in one forward pass."""
        views = torch.cat([x.to(self.device, non_blocking=True) for x in views])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp == "bf16"):
            return self.forward(views).chunk(2)

    def one_step(self, parts) -> tuple[torch.Tensor, float, float]:
        """One optimizer step on micro-batches of views uint8 (n, C, H, W): (loss, learning rate, host seconds in the loss)."""
        lr = learning_rate(self.config, self.step, self.per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        with peers(), self.seen_by_the_loss() as embeddings:
            if len(parts) == 1:
                value, in_loss = gradient.whole(self.embed, self.loss, parts[0])
            else:
                value, in_loss = gradient.in_parts(self.net, self.embed, self.loss, parts, self.device)
        weights = self.loss.alpha_summary(*embeddings, k=1).scalars() if embeddings else None
        self.world.average_gradients([p for group in self.optimizer.param_groups for p in group["params"]])
        self.optimizer.step()
        self.loss_sum += value
        self.step += 1
        if weights is not None:
            self.log(kind="alpha", step=self.step, **weights)
        return value, lr, in_loss

    @contextmanager
    def seen_by_the_loss(self):
        """The embeddings z1, z2 that the loss is called with inside, if this step's α is to be logged."""
        embeddings: list[torch.Tensor] = []
        if not (self.world.leads and self.config.alpha_every and (self.step + 1) % self.config.alpha_every == 0):
            yield embeddings
            return
        hook = self.loss.register_forward_pre_hook(lambda _, views: embeddings.extend(z.detach() for z in views))
        try:
            yield embeddings
        finally:
            hook.remove()

    def close_epoch(self, seconds: float, loss_seconds: float, counted: int, bar) -> None:
        """Evaluate if it is time, write the epoch's line, save."""
        config, number = self.config, self.epoch + 1
        row = {"loss": self.check_finite() / self.per_epoch, "lr": learning_rate(config, self.step - 1, self.per_epoch),
               "images_per_s": None, "step_ms": None}
        if counted:
            row.update(images_per_s=counted * config.batch_size / seconds, step_ms=1000 * seconds / counted)
            if self.device.type == "cpu":  # elsewhere the host's clock sees the launch only
                row["loss_ms"] = 1000 * loss_seconds / counted
        if config.learn_temperature:
            row["temperature"] = next(self.loss.parameters()).item()
        text = f"epoch {number}/{config.epochs}  loss {row['loss']:.4f}"
        knn, probed = (due(number, every, config.epochs) for every in (config.eval_every, config.probe_every))
        if knn or probed:
            self.save()  # a second Ctrl-C during the evaluation then loses nothing
            if self.world.leads:
                row.update(figures(self.net.encoder, self.data, config, self.device, knn=knn, probed=probed))
                names = {"knn": "kNN", "probe": "probe"}
                text += "".join(f"  {names[key]} {100 * row[key]:.1f} %" for key in names if key in row)
        self.log(kind="epoch", epoch=number, step=self.step, **row)
        self.epoch = number
        self.loss_sum.zero_()
        self.save()
        if self.world.leads and (knn or probed or number == config.epochs):
            speed = f"  {row['images_per_s']:.0f} images/s" if counted else ""
            if "loss_ms" in row:
                speed += f", {row['loss_ms'] / row['step_ms']:.0%} of the time in the loss"
            bar.write(text + speed)


def _build_optimizer(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    """The optimizer of ``config``; lars and lamb are those of the package pytorch_optimizer."""
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
    try:
        from pytorch_optimizer import LARS, Lamb
    except ImportError as error:
        raise RunError(f"--optimizer {config.optimizer} needs pytorch_optimizer ({error}): "
                       "pip install 'alphacl-fast[large-batch]'") from error
    return LARS(groups, lr=config.lr, momentum=0.9) if config.optimizer == "lars" else Lamb(groups, lr=config.lr)


def _build_loss(config: Config, device: torch.device, world: World) -> nn.Module:
    """The loss of ``config``, tried once on random embeddings: a bad setting shows before anything is written."""
    temperature, limits = config.temperature, {}
    if config.learn_temperature:
        temperature = nn.Parameter(torch.tensor(config.temperature, device=device))
        limits = {"temperature_range": (0.01, 100.0)}
    dtype = torch.bfloat16 if config.amp == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    try:
        loss = FusedAlphaCLLoss(config.objective, temperature=temperature, negatives=config.negatives,
                                backend=config.backend, process_group="world" if world.size > 1 else None, **limits,
                                **config.option).to(device)
        pairs = min(config.batch_size, TRIAL_PAIRS)
        z1, z2 = torch.randn(2, pairs, 128, generator=generator).to(device, dtype).requires_grad_().unbind()
        loss(z1, z2).backward()
    except (ValueError, TypeError, RuntimeError) as error:
        raise RunError(f"the loss cannot be used: {' '.join(str(error).split())}") from error
    loss.zero_grad(set_to_none=True)
    return loss


def _check_empty(out: Path) -> None:
    """Raise RunError unless ``out`` is absent or an empty folder."""
    try:
        if not out.exists():
            return
        if out.is_dir() and not any(out.iterdir()):
            return
    except OSError as error:
        raise RunError(f"cannot use the run folder {out}: {error.strerror}") from error
    hint = f"go on with it by --resume {out}, or choose" if (out / checkpoint.CONFIG).exists() else "choose"
    raise RunError(f"{out} exists and is not an empty folder: {hint} another --out; nothing was changed")


def _saved_state(config: Config, out: Path) -> dict | None:
    """The checkpoint of the run in ``out``, None before its first one. Raises RunError if its config is another."""
    differing = Config.read(out / checkpoint.CONFIG).differences(dataclasses.asdict(config))
    if differing:
        raise RunError(f"{out} was started with other settings: {'; '.join(differing)}; nothing was changed")
    return checkpoint.read(out, config)


@contextmanager
def stop_signals():
    """Collect SIGINT and SIGTERM in the yielded list; the second of a kind acts as it did before."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, _frame):
        caught.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
