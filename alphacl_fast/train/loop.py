"""The training loop: each step draws two views, embeds them, and takes one optimizer step.

What is trained, and with which loss, is the recipe's business (`recipe`). With several processes
(`process_context`) every rank embeds its share of the batch; the loss is the whole batch's, and
gradients are averaged while the backward computes them (`gradient_average`). Only rank 0 writes
files and logs, and unless all are asked to, only it evaluates.
"""

import dataclasses
import math
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset
from tqdm import tqdm

from alphacl_fast import batch_metrics

from . import checkpoint, device_augmentation, gradient, report, storage
from .augment import augmentation
from .callbacks import Callback, TensorBoard
from .config import Config, Diverged, RunError
from .data import Data, load, mix, training_batches, with_indices
from .device import autocast, pick_device, settings, usual_default_device
from .evaluation import ALONE, figures, picture
from .gradient_average import GradientAverage
from .optimizers import build_optimizer, trained
from .process_context import ProcessContext, joined, peers
from .recipe import build_loss
from .recipes import build_recipe
from .schedules import depends_on_epochs, learning_rate, temperature
from .weights import evaluated, load_weights

PLOTS = ("curves.png", "embedding.png")  # drawn at the end, in this order
REHEARSED_STEPS = 10  # more than the batches that four loader workers prefetch
TEST = "test.json"  # the figures on the test images of a run that holds out others
WARMUP_STEPS = 3  # steps excluded from images/s: first allocations, worker start, compilation
#: Signals that end a run with a checkpoint, where the system has them. Slurm sends SIGUSR1 before a
#: job's time is over, if it is asked to, and a terminal that closes sends SIGHUP.
STOPPING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
]


@dataclasses.dataclass
class Outcome:
    """How :func:`train` ended.

    Args:
        out: run folder.
        epochs: number of finished epochs.
        signal: signal that stopped the run, if any.
        already: whether the run had been finished before.
        leads: whether this process is rank 0.
        late: a signal that arrived after the last step: too late to stop the run, but its sender
            may not want anything else to start.
    """

    out: Path
    epochs: int
    signal: int | None = None
    already: bool = False
    leads: bool = True
    late: int | None = None


class Stopped(Exception):
    """A signal ends the run within a step, which counts as not begun."""


@usual_default_device()
def train(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    accept_data_change: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Outcome:
    """Train a network, or resume a run.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP end the run after the current step, or before the next
    micro-batch, with a checkpoint. A run that was stopped or killed and then resumed ends with the
    weights of an uninterrupted run (bit for bit on a CPU with the same number of threads). Under
    torchrun, or in a process group that the caller has initialised, every process calls this
    function; a run may be resumed with another number of processes.

    Args:
        config: settings of the run, from :meth:`Config.create`.
        out: run folder, new or empty unless ``resume``; no other process may use it meanwhile.
        resume: whether to continue the run in ``out``, which must have the same settings. It may
            have more epochs if the learning rates of all steps so far do not depend on their
            number: with a constant schedule, or within the warm-up.
        accept_data_change: whether to go on if the training images are others than before.
        callbacks: objects that are told what is measured, as `callbacks.Callback` describes.

    Returns:
        How the run ended.

    Raises:
        RunError: ``out`` holds something else or is in use, or data set, device or settings are
            unusable (existing files are left untouched); or the loss became infinite or NaN (the
            last good checkpoint is kept).
    """
    with joined() as context, ExitStack() as lock:
        start = _Start(config, Path(out), context, lock)
        start.callbacks = [*callbacks]
        return start.train(resume, accept_data_change)


class _Start:
    """What happens before the first step; ``lock`` holds the lock of ``out`` on rank 0."""

    def __init__(self, config: Config, out: Path, context: ProcessContext, lock: ExitStack):
        self.config, self.out, self.context, self.lock = config, out, context, lock
        self.callbacks: list[Callback] = []

    def train(self, resume: bool, accept_data_change: bool) -> Outcome:
        config, out, context = self.config, self.out, self.context
        config.check()
        state, complete = context.on_rank_0(self.saved if resume else self.nothing)
        if state and state["epoch"] == config.epochs and complete:
            return Outcome(out, config.epochs, already=True, leads=context.leads)
        _check_shares(config, context.size)
        device = pick_device(config.device, context.local_rank if context.size > 1 else None)
        if config.download:  # once, not in every process
            context.on_rank_0(lambda: len(load(config).views))
        data = load(config, device)
        with settings(config):
            run = _Run(data, out, context)
            context.on_rank_0(lambda: self.listen(run))
            if config.weights and not state:
                context.on_rank_0(lambda: load_weights(run.net, Path(config.weights)))
            if state:
                context.on_rank_0(lambda: self.check_images(state, data, accept_data_change))
            with stop_signals(context.launched) as caught:
                context.on_rank_0(lambda: self.begin(data, state, resume))
                run.restore(state)
                with run.told():
                    stopped_by = run.epochs(caught)
                if stopped_by is None and context.leads:
                    self.draw(run)
        late = None if stopped_by else next(iter(caught), None)
        return Outcome(out, run.epoch, signal=stopped_by, leads=context.leads, late=late)

    def listen(self, run: "_Run") -> None:
        """Give the callbacks to the run of rank 0."""
        run.callbacks = [*self.callbacks]
        if self.config.tensorboard:
            run.callbacks.append(TensorBoard(self.out))

    def nothing(self) -> tuple[None, bool]:
        """Check that ``out`` is free for a new run; its lock is taken when the run begins."""
        _check_empty(self.out)
        storage.check_writable(self.out)
        return None, False

    def saved(self) -> tuple[dict | None, bool]:
        """Lock the run folder and read its checkpoint (None before the first one).

        Returns:
            The state, and whether everything is there that a finished run leaves.
        """
        out, config = self.out, self.config
        checkpoint.saved_config(out)  # names a folder that holds no run, before it gets a lock
        self.lock.enter_context(storage.locked(out))
        saved, state = checkpoint.saved_config(out), checkpoint.read(out)
        trained = Config.from_dict(state["config"], out / state["file"]) if state else saved
        differing = {
            text: None
            for known in (saved, trained)
            for text in known.differences(dataclasses.asdict(config))
            if not (text.startswith("--epochs:") and _may_extend(known, config, state))
        }
        if differing:
            raise RunError(
                f"{out} was started with other settings: {'; '.join(differing)}; "
                f"{_why_not_longer(saved, config)}nothing was changed"
            )
        if state:
            checkpoint.promote(out, state["file"])
        complete = state and trained.epochs == config.epochs and (out / PLOTS[-1]).exists()
        return state, bool(complete) and checkpoint.Metrics(out).is_whole(state)

    def check_images(self, state: dict, data: Data, accept: bool) -> None:
        """Raise RunError if the training images differ from the checkpoint's; warn if accepted."""
        found = checkpoint.changed_images(self.out, state, len(data.views), data.names)
        if found and not accept:
            raise RunError(f"{found}; bring them back, or go on with --accept-data-change")
        if found:
            storage.warn(f"{found}; going on as --accept-data-change asks")

    def begin(self, data: Data, state: dict | None, resume: bool) -> None:
        """Write the files that do not change during the run; a new run takes the lock first."""
        out, config = self.out, self.config
        if not resume:
            self.lock.enter_context(storage.locked(out))
            _check_empty(out)  # another process may have begun here meanwhile
        elif state and state["config"]["epochs"] != config.epochs:
            for name in (TEST, *PLOTS):  # the last one marks a finished run
                (out / name).unlink(missing_ok=True)
        try:
            values = storage.read_json(out / checkpoint.CONFIG)["config"]
            same = not config.differences(values)
        except (storage.Damaged, KeyError):
            same = False
        if not same:
            checkpoint.begin(out, config, data.device)
        checkpoint.record_images(out, data.names)

    def draw(self, run: "_Run") -> None:
        out, config = self.out, self.config
        with storage.writing(out):
            title = f"{config.objective} on {config.dataset}"
            if config.validation:
                run.judged().load_state_dict(evaluated(run.checkpoint()))
                storage.write_json(out / TEST, self.tested(run))
            report.curves(out / checkpoint.METRICS, out / PLOTS[0], title)
            picture(run.judged().encoder, run.data, out / PLOTS[1])

    def tested(self, run: "_Run") -> dict:
        """Score the weights of the best evaluation on the test images, once."""
        data, epoch = run.data, run.best["epoch"]
        every = self.config.eval_every, self.config.probe_every
        found = run.score(*map(bool, every), data.test, ALONE)
        print(f"test images, weights of epoch {epoch}:{shown(found)}", flush=True)
        return {"epoch": epoch, **found}


def _may_extend(saved: Config, config: Config, state: dict | None) -> bool:
    """Whether a run may have the larger number of epochs of ``config``, as if from its start."""
    if state is None or config.epochs < saved.epochs:
        return state is None
    return not depends_on_epochs(saved, state["step"], state["images"] // saved.batch_size)


def _why_not_longer(saved: Config, config: Config) -> str:
    if config.epochs == saved.epochs:
        return ""
    if config.epochs < saved.epochs:
        return "--epochs can only become larger; "
    return (
        "the learning rates of a cosine schedule depend on --epochs from the end of the warm-up "
        "on, and a temperature schedule without a period depends on them from the start, so that "
        "only --schedule constant can be continued; "
    )


def try_out(configs: list[Config]) -> None:
    """Check that data set, device and loss of every config are usable.

    Args:
        configs: settings that differ in the loss only.

    Raises:
        RunError: one of them is not.
    """
    load(configs[0])
    device = pick_device(configs[0].device)
    for config in configs:
        with settings(config):
            build_loss(config, device, ProcessContext())


def rehearse(config: Config, *, judged: bool) -> dict[str, float]:
    """Time the parts of a run in this process, in a temporary folder; the loss may diverge.

    Args:
        config: settings of the run.
        judged: whether to time evaluation and plots too.

    Returns:
        "step": seconds of one step after warm-up; "start": seconds before the first step;
        "per_epoch": number of steps; if judged, "evaluation": seconds of an epoch's kNN and probe,
        and "end": seconds of the plots.
    """
    begun = time.perf_counter()
    data = load(config, pick_device(config.device))
    with settings(config), tempfile.TemporaryDirectory() as folder:
        run = _Run(data, Path(folder), ProcessContext())
        batches = run.batches(WARMUP_STEPS + REHEARSED_STEPS)
        run.net.train()
        for step in range(WARMUP_STEPS + REHEARSED_STEPS):
            if step == WARMUP_STEPS:
                warm = time.perf_counter()
            value, _, _ = run.one_step(next(batches))
            value.item()  # synchronises with the device
        step = (time.perf_counter() - warm) / REHEARSED_STEPS
        start = max(0.0, warm - begun - WARMUP_STEPS * step)
        found = {"step": step, "per_epoch": run.per_epoch, "start": start}
        batches.close()  # ends the loader's processes
        if judged:
            before = time.perf_counter()
            figures(run.judged().encoder, data, knn=True, probed=True)
            found["evaluation"] = time.perf_counter() - before
            picture(run.judged().encoder, data, Path(folder) / "embedding.png")
            found["end"] = time.perf_counter() - before - found["evaluation"]
    return found


def shown(found: dict) -> str:
    """Format accuracies for the terminal."""
    names = {"knn": "kNN", "probe": "probe", "zero_shot": "zero-shot", "retrieval": "retrieval"}
    return "".join(
        f"  {name} {100 * found[key]:.1f} %" for key, name in names.items() if key in found
    )


def due(epoch: int, every: int, epochs: int) -> bool:
    """Whether to evaluate after ``epoch`` (from 1): each ``every`` epochs (0: never), and last."""
    return bool(every) and (epoch % every == 0 or epoch == epochs)


class _Run:
    """The state of a run: ``step`` steps are done, ``epoch`` epochs are evaluated and logged."""

    def __init__(self, data: Data, out: Path, context: ProcessContext):
        self.data, self.out, self.context = data, out, context
        self.config, self.device = config, device = data.config, data.device
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        self.recipe = recipe = build_recipe(data, context)
        self.net, self.loss = recipe.net, recipe.loss
        self.parameters = [*trained(self.net), *trained(self.loss)]
        self.mean_gradient = GradientAverage(trained(self.net), trained(self.loss), context)
        self.optimizer = build_optimizer(config, self.net, self.loss)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.average = self.moving_average() if config.ema else None
        #: With validation images: the best evaluation so far, its epoch and its encoder's weights.
        self.best: dict = {}
        self.per_epoch = len(data.views) // config.batch_size
        self.epoch = self.step = self.saved_step = 0
        # The epoch's summed loss stays on the device and is read at sync points only.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.metrics = checkpoint.Metrics(out)
        self.callbacks: list[Callback] = []
        self.caught: list[int] = []
        # Micro-batches of a step that every rank has. To look for a signal takes all ranks, so a
        # rank with one more does not look before it, and no rank looks if one has a single one.
        smallest = config.batch_size // context.size
        self.looks = -(-smallest // config.micro_batch) if config.micro_batch else 1

    def moving_average(self) -> AveragedModel:
        """Build the average of the weights, which its first update overwrites."""
        net = self.recipe.build_net().to(self.device)  # `self.net` may hold process groups
        function = get_ema_multi_avg_fn(self.config.ema)
        return AveragedModel(net, multi_avg_fn=function, use_buffers=True)

    def restore(self, state: dict | None) -> None:
        """Load a checkpoint, or write the first one."""
        whole = self.context.on_rank_0(lambda: self.metrics.resume(state))
        if state is None:
            self.seed_rank()
            self.context.broadcast([*self.net.state_dict().values()])
            if self.average:
                self.average.module.load_state_dict(self.net.state_dict())
            return self.save()
        self.net.load_state_dict(state["model"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state.get("scaler", {}))
        if self.average:
            self.average.load_state_dict(state["ema"])
        self.best = state.get("best", {})
        self.epoch, self.step = state["epoch"], state["step"]
        if state["images"] != len(self.data.views):  # the epochs may have other numbers of steps
            begun = self.step - self.epoch * (state["images"] // self.config.batch_size)
            self.step = self.epoch * self.per_epoch + min(begun, self.per_epoch)
        self.saved_step = self.step
        self.loss_sum.copy_(state["loss_sum"])
        checkpoint.restore_rng(state)
        self.seed_rank()
        ours = self.checkpoint()
        if not whole or any(
            state.get(key, ours[key]) != ours[key] for key in ("config", "images", "images_digest")
        ):
            self.save()  # of the repaired log, the longer run or the other images

    def seed_rank(self) -> None:
        """Give each of several ranks its own random numbers, however many there were before."""
        if self.context.size > 1:
            torch.manual_seed(mix(self.config.seed, self.step, self.context.rank))

    def save(self) -> None:
        """Write the checkpoint, unless something in it is no longer finite (RunError)."""
        self.check_finite()
        state = self.checkpoint()
        parts = [
            ("model", "a weight"), ("loss", "the temperature"), ("optimizer", "the optimizer"),
            ("ema", "an averaged weight"), ("scaler", "the scale of the loss"),
        ]  # fmt: skip
        broken = [not _finite(state.get(key)) for key, _ in parts]
        found = self.context.all_reduce_max(1 + broken.index(True) if any(broken) else 0)
        if found:
            self.fail(f"{parts[found - 1][1]} became infinite or NaN")
        if self.context.leads:
            self.metrics.sync()  # before the checkpoint that counts its lines
            checkpoint.save(self.out, state, self.config.keep)
        self.saved_step = self.step

    def checkpoint(self) -> dict:
        """Collect the state of the run, besides the random generators'."""
        state = {
            "config": dataclasses.asdict(self.config),
            "model": self.net.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "images": len(self.data.views),
            "images_digest": checkpoint.digest_of(self.data.names),
            "metrics": self.metrics.length,
            "metrics_digest": self.metrics.hash.hexdigest(),
        }
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        if self.average:
            state["ema"] = self.average.state_dict()
        if self.best:
            state["best"] = self.best
        return state

    def check_finite(self) -> float:
        """Return the epoch's summed loss (synchronises); RunError if it is not finite."""
        total = self.loss_sum.item()
        if not math.isfinite(total):
            self.fail(f"the loss became {'NaN' if math.isnan(total) else 'infinite'}")
        return total

    def fail(self, what: str):
        raise Diverged(
            f"{what} in epoch {self.epoch + 1}, by step {self.step}; the last good checkpoint, "
            f"step {self.saved_step}, is kept in {self.out}; a lower --lr or a higher "
            "--temperature may help",
            shown=not self.context.leads,
        )

    def batches(self, stop: int):
        """Yield the micro-batches of every step up to ``stop``, counted over all epochs."""
        config, images, share = self.config, self.data.views, self.context.share
        views = self.recipe.views
        if config.augment == "device":
            held = device_augmentation.images_on(self.device, images, config.image_size)
            batches = device_augmentation.training_batches(
                held, config, self.step, stop, share, views
            )
        else:
            augment = augmentation(config.dataset, config.image_size)
            pin = self.device.type == "cuda"
            batches = training_batches(
                images, augment, config, self.step, stop, pin, share=share, count=views
            )
        if not self.recipe.indexed:
            return batches
        return with_indices(batches, len(images), config, self.step, stop, share)

    def epochs(self, caught: list[int]) -> int | None:
        """Train to the end (None), or save and return the signal that turns up in ``caught``."""
        self.caught = caught
        config, total = self.config, self.config.epochs * self.per_epoch
        batches = self.batches(total)
        quiet = None if self.context.leads else True  # None: tqdm shows itself on a terminal only
        bar = tqdm(total=total, initial=self.step, unit="step", disable=quiet, dynamic_ncols=True)
        done = 0
        try:
            while self.epoch < config.epochs:
                seconds, loss_seconds, counted = 0.0, 0.0, 0
                self.net.train()
                before = time.perf_counter()
                stop = self.stop()
                while self.step < (self.epoch + 1) * self.per_epoch and not stop:
                    try:
                        value, lr, in_loss = self.one_step(next(batches))
                    except Stopped:
                        stop = self.stop()
                        continue
                    done, ends_epoch = done + 1, self.step == (self.epoch + 1) * self.per_epoch
                    bar.update()
                    logged = self.step % config.log_every == 0
                    if logged or ends_epoch:
                        self.check_finite()
                        loss = value.item()
                        bar.set_postfix(epoch=self.epoch + 1, loss=f"{loss:.4f}", refresh=False)
                    if logged:
                        self.log(
                            kind="step", epoch=self.epoch + 1, step=self.step, loss=loss, lr=lr
                        )
                    now = time.perf_counter()
                    if done > WARMUP_STEPS:
                        seconds, counted = seconds + now - before, counted + 1
                        loss_seconds += in_loss
                    before = now
                    if config.save_every and self.step % config.save_every == 0 and not ends_epoch:
                        self.save()
                        before = time.perf_counter()
                    stop = self.stop()
                if stop:
                    self.save()
                    return stop
                self.close_epoch(seconds, loss_seconds, counted, bar)
        finally:
            bar.close()
        return None

    def stop(self) -> int:
        """Return the signal that should end the run on every rank, 0 for none."""
        return self.context.all_reduce_max(next(iter(self.caught), 0))

    def look(self, number: int) -> None:
        """Raise Stopped before micro-batch ``number`` (from 0) if a signal should end the run."""
        if number < self.looks > 1 and self.stop():
            raise Stopped

    def log(self, **row) -> None:
        """Write a line of metrics.jsonl and tell the callbacks."""
        if not self.context.leads:
            return
        self.metrics.write(**row)
        kind, step = row.pop("kind"), row.pop("step")
        for callback in self.callbacks:
            if kind in ("step", "epoch"):
                getattr(callback, f"on_{kind}")(step, row)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tell the callbacks that training begins, and that it ends in whatever way."""
        for callback in self.callbacks:
            callback.on_begin(dataclasses.asdict(self.config), self.step)
        try:
            yield
        finally:
            for callback in self.callbacks:
                callback.on_end()

    def embed(self, part: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """Map a micro-batch to two embeddings (n, 128)."""
        with autocast(self.config, self.device):
            return self.recipe.embed(part)

    def one_step(self, parts: list[tuple]) -> tuple[torch.Tensor, float, float]:
        """Take one optimizer step on micro-batches.

        Returns:
            Loss (), learning rate, and host seconds spent in the loss.
        """
        lr = learning_rate(self.config, self.step, self.per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.recipe.before_step(self.step, self.per_epoch)
        self.optimizer.zero_grad(set_to_none=True)
        with peers(), self.embeddings_of_loss() as embeddings:
            value, in_loss = self.accumulate_gradients(parts)
        summary = None
        if embeddings:
            summary = self.loss.alpha_summary(*embeddings, k=1).scalars()
            summary |= batch_metrics(*embeddings).scalars()
        self.mean_gradient.finish()
        if self.config.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.recipe.after_step()
        if self.average:
            self.average.update_parameters(self.net)
        self.loss_sum += value
        self.step += 1
        if summary is not None:
            self.log(kind="alpha", step=self.step, **summary)
        return value, lr, in_loss

    def accumulate_gradients(self, parts: list[tuple]) -> tuple[torch.Tensor, float]:
        """Compute the loss (), every gradient, and host seconds spent in the loss."""

        def loss(z1, z2):
            return self.recipe.value(z1, z2, parts)

        scale, last = self.scaler.scale, self.mean_gradient.begin
        if len(parts) == 1:
            return gradient.whole(self.embed, loss, parts[0], scale, last)
        with gradient.undone(self.net, self.device, Stopped):
            return gradient.in_parts(
                self.net, self.embed, loss, parts, self.device, self.look, scale, last
            )

    @contextmanager
    def embeddings_of_loss(self):
        """Yield a list that receives the loss's inputs z1, z2, if this step's α is to be logged."""
        embeddings: list[torch.Tensor] = []
        every = self.config.alpha_every
        if not (self.context.leads and every and (self.step + 1) % every == 0):
            yield embeddings
            return
        hook = self.loss.register_forward_pre_hook(
            lambda _, views: embeddings.extend(z.detach() for z in views)
        )
        try:
            yield embeddings
        finally:
            hook.remove()

    def close_epoch(self, seconds: float, loss_seconds: float, counted: int, bar) -> None:
        """Evaluate if it is due, log the epoch and save."""
        config, number = self.config, self.epoch + 1
        row = {
            "loss": self.check_finite() / self.per_epoch,
            "lr": learning_rate(config, self.step - 1, self.per_epoch),
            "images_per_s": None,
            "step_ms": None,
        }
        text, speed = f"epoch {number}/{config.epochs}  loss {row['loss']:.4f}", ""
        if counted:
            row["images_per_s"] = counted * config.batch_size / seconds
            row["step_ms"] = 1000 * seconds / counted
            speed = f"  {row['images_per_s']:.0f} images/s"
            if self.device.type == "cpu":  # on a GPU the host's clock sees the launches only
                row["loss_ms"] = 1000 * loss_seconds / counted
                speed += f", {loss_seconds / seconds:.0%} of the time in the loss"
        row |= self.recipe.measured()
        if config.temperature_schedule != "constant":
            row["temperature"] = temperature(config, self.step - 1, self.per_epoch)
        knn, probed = (
            due(number, every, config.epochs) for every in (config.eval_every, config.probe_every)
        )
        if knn or probed:
            self.save()  # a second Ctrl-C during the evaluation then loses nothing
            found = self.evaluate(knn, probed)
            row.update(found)
            for callback in self.callbacks:
                callback.on_evaluation(self.step, {"epoch": number, **found})
            text += shown(found)
        self.log(kind="epoch", epoch=number, step=self.step, **row)
        self.epoch = number
        if knn or probed:
            self.keep_best(found)
        self.loss_sum.zero_()
        self.save()
        if self.context.leads and (knn or probed or number == config.epochs):
            bar.write(text + speed)

    def judged(self) -> torch.nn.Module:
        """Return the network that evaluations use: the averaged one, if there is one."""
        return self.average.module if self.average else self.net

    def evaluate(self, knn: bool, probed: bool) -> dict:
        """Score the network; only on rank 0, unless all ranks share the work, is there a result."""
        context = ALONE
        if self.config.eval_ranks == "all":
            context = self.context
            context.broadcast(self.judged().buffers())  # each rank has statistics of its own
        elif not self.context.leads:
            return {}
        return self.score(knn, probed, self.data.scored, context)

    def score(self, knn: bool, probed: bool, images: Dataset, context: ProcessContext) -> dict:
        """Score the network on labelled ``images``, with what the recipe adds whenever kNN is due.

        Captions are no labels for kNN or a probe.
        """
        net, found = self.judged(), {}
        if self.config.dataset != "captions":
            found = figures(
                net.encoder, self.data, knn=knn, probed=probed, scored=images, context=context
            )
        return found | (self.recipe.figures(net, images) if knn else {})

    def keep_best(self, found: dict) -> None:
        """Keep the weights of the best evaluation on held-out images, the first of several."""
        judged_by = "knn" if self.config.eval_every else "probe"
        judged_by = "zero_shot" if "zero_shot" in found else judged_by
        if not (self.config.validation and judged_by in found):
            return
        if found[judged_by] > self.best.get("accuracy", -1):
            weights = {name: x.clone() for name, x in self.judged().state_dict().items()}
            self.best = {"epoch": self.epoch, "accuracy": found[judged_by], "model": weights}


def _check_shares(config: Config, processes: int) -> None:
    """Raise RunError if a step cannot be shared by so many processes."""
    if config.batch_size < processes:
        raise RunError(
            f"--batch-size must be at least the number of processes, {processes}, "
            f"got {config.batch_size}"
        )
    smallest, largest = config.batch_size // processes, -(-config.batch_size // processes)
    size = config.micro_batch or largest
    if config.norm == "sync" and -(-smallest // size) < -(-largest // size):
        raise RunError(
            f"--norm sync needs equal numbers of micro-batches on all {processes} processes, got "
            f"--micro-batch {size} for {smallest} and {largest} images"
        )


def _check_empty(out: Path) -> None:
    """Raise RunError unless ``out`` is absent or an empty folder."""
    try:
        if not out.exists() or (out.is_dir() and storage.is_empty(out)):
            return
    except OSError as error:
        raise RunError(f"cannot use the run folder {out}: {error.strerror}") from error
    resumable = out.is_dir() and checkpoint.is_run(out)
    hint = f"go on with it by --resume {out}, or choose" if resumable else "choose"
    raise RunError(
        f"{out} exists and is not an empty folder: {hint} another --out; nothing was changed"
    )


def _finite(values) -> bool:
    """Whether every number in nested dicts and lists of tensors and numbers is finite."""
    if isinstance(values, torch.Tensor):
        return bool(torch.isfinite(values).all())
    if isinstance(values, dict):
        return all(map(_finite, values.values()))
    if isinstance(values, (list, tuple)):
        return all(map(_finite, values))
    return not isinstance(values, float) or math.isfinite(values)


@contextmanager
def stop_signals(launched: bool = False) -> Iterator[list[int]]:
    """Collect the signals that end a run in the yielded list.

    Every signal after the first is the same wish to stop, because schedulers and launchers repeat
    theirs. Only a second Ctrl-C acts as before, unless a launcher passes it on.

    Args:
        launched: whether a launcher passes the terminal's signals on.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in [*before.items()]:
        # A handler outside Python cannot be restored; nohup ignores SIGHUP.
        if handler is None or (number != signal.SIGINT and handler == signal.SIG_IGN):
            del before[number]

    def note(number, _frame):
        caught.append(number)
        if number == signal.SIGINT and not launched:
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
