"""What a run trains: the network, how a batch becomes embeddings, and their loss.

:class:`Recipe` is SimCLR, and the base of the other recipes, which override what differs. The loop
calls its methods and knows nothing else of a recipe.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from alphacl_fast import FusedAlphaCLLoss

from . import schedules
from .config import Config, RunError, flag
from .data import Data
from .device import DTYPES
from .models import build
from .process_context import ProcessContext
from .sync_batch_norm import synchronised

TRIAL_PAIRS = 1024  # most pairs of the batch on which the loss is tried before a run


class Recipe:
    """SimCLR: two random views of every image, embedded by one network.

    Args:
        data: data set, settings and device of the run.
        context: the ranks, which share one loss.

    Attributes:
        views: random views of every image.
        indexed: whether micro-batches end with the indices (n,) of their images.
        net: the network; all of its parameters and buffers are saved, and those parameters that
            require a gradient are trained. Its ``encoder`` is evaluated.
        loss: module with the parameters of the loss.
    """

    views, indexed = 2, False

    def __init__(self, data: Data, context: ProcessContext):
        self.data, self.config, self.context = data, data.config, context
        self.net = self.build_net().to(data.device)
        if self.config.norm == "sync":
            self.net = synchronised(self.net, context, data.device)
        self.forward = torch.compile(self.net) if self.config.compile else self.net
        self.loss = self.build_loss()

    def build_net(self) -> nn.Module:
        """Build the network with its initial weights, on the CPU."""
        return build(self.config)

    def build_loss(self) -> nn.Module:
        """Build the loss; RunError if it cannot be used."""
        return build_loss(self.config, self.data.device, self.context)

    def embed(self, part: tuple) -> tuple[Tensor, Tensor]:
        """Map a micro-batch of uint8 views (n, C, H, W) to two embeddings (n, 128) in one pass."""
        device = self.data.device
        views = torch.cat([x.to(device, non_blocking=True) for x in part[: self.views]])
        return self.forward(views).chunk(2)

    def value(self, z1: Tensor, z2: Tensor, parts: list[tuple]) -> Tensor:
        """Compute the loss () of a whole batch.

        Args:
            z1, z2: what :meth:`embed` has made of its micro-batches, one after the other.
            parts: the micro-batches.
        """
        return self.loss(z1, z2)

    def before_step(self, step: int, per_epoch: int) -> None:
        """Bring what follows a schedule to ``step`` (from 0), without a synchronisation."""
        if self.config.temperature_schedule != "constant":
            self.loss.temperature.fill_(schedules.temperature(self.config, step, per_epoch))

    def after_step(self) -> None:
        """Act on the network after the optimizer's step."""

    def measured(self) -> dict[str, float]:
        """Read the parameters of the loss that an epoch's line shows."""
        learnt = self.config.learn_temperature
        return {"temperature": self.loss.temperature.item()} if learnt else {}

    def figures(self, net: nn.Module, images: Dataset) -> dict[str, float]:
        """Compute the accuracies that only this recipe has, on labelled images."""
        return {}

    def tried(
        self, make: Callable[[], nn.Module], arguments: Callable[[Tensor], tuple]
    ) -> nn.Module:
        """Make a loss and try it on what ``arguments`` makes of random embeddings (2, n, 128)."""
        return tried(make, arguments, self.config, self.data.device)


def build_loss(config: Config, device: torch.device, context: ProcessContext) -> nn.Module:
    """Build the loss and try it on random embeddings, so bad settings fail before any write.

    Args:
        config: its settings.
        device: device of the embeddings.
        context: the ranks.

    Raises:
        RunError: the loss cannot be used with these settings.
    """
    limits = {"temperature_range": (0.01, 100.0)} if config.learn_temperature else {}

    def make() -> nn.Module:
        return FusedAlphaCLLoss(
            config.objective,
            temperature=temperature_of(config, device),
            negatives=config.negatives,
            backend=config.backend,
            process_group="world" if context.size > 1 else None,
            **limits,
            **config.option,
        )

    return tried(make, tuple, config, device)


def temperature_of(config: Config, device: torch.device) -> float | Tensor:
    """Return the temperature: a parameter if it is learnt, a tensor if it follows a schedule.

    A program that is compiled for a tensor serves all of its values.
    """
    if config.learn_temperature:
        return nn.Parameter(torch.tensor(config.temperature, device=device))
    if config.temperature_schedule != "constant":
        return torch.tensor(config.temperature, device=device)
    return config.temperature


def tried(
    make: Callable[[], nn.Module],
    arguments: Callable[[Tensor], tuple],
    config: Config,
    device: torch.device,
) -> nn.Module:
    """Make a loss and try it on what ``arguments`` makes of random embeddings (2, n, 128).

    Raises:
        RunError: it cannot be used with these settings; the message names the flag.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        loss = make().to(device)
        z = torch.randn(2, min(config.batch_size, TRIAL_PAIRS), 128, generator=generator)
        loss(*arguments(z.to(device, DTYPES[config.amp]).requires_grad_())).backward()
    except (ValueError, TypeError, RuntimeError) as error:
        raise RunError(_loss_problem(config, " ".join(str(error).split()))) from error
    loss.zero_grad(set_to_none=True)
    return loss


def _loss_problem(config: Config, text: str) -> str:
    """Name the flag that an error of the loss is about."""
    name = text.split()[0]
    if name == "temperature" and "require grad" in text:
        return f"--learn-temperature: {text}"
    if name in ("temperature", "negatives", "backend"):
        return flag(name) + text.removeprefix(name)
    if name == "options" or {*text.replace("=", " ").split()} & {*config.option}:
        return f"--option: {text}"
    used = {name: getattr(config, name) for name in ("objective", "temperature", "backend")}
    flags = " ".join(f"{flag(name)} {value}" for name, value in used.items())
    return f"the loss cannot be used with {flags}: {text}"
