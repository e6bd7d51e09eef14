"""What a run trains: the network, how a batch becomes embeddings, and their loss.

:class:`Recipe` is SimCLR, and the base of the other recipes, which override what differs. The loop
calls its methods and knows nothing else of a recipe.
"""

import torch
from torch import Tensor, nn

from alphacl_fast import FusedAlphaCLLoss

from . import schedules
from .config import Config, RunError, flag
from .data import Data
from .device import DTYPES
from .models import Net, build
from .process_context import ProcessContext
from .sync_batch_norm import synchronised

TRIAL_PAIRS = 1024  # most pairs of the batch on which the loss is tried before a run


class Recipe:
    """SimCLR: two random views of every image, embedded by one network.

    Args:
        data: data set, settings and device of the run.
        context: the ranks, which share one loss.

    Attributes:
        net: the network; all of its parameters and buffers are saved, and those parameters that
            require a gradient are trained. Its ``encoder`` is evaluated.
        loss: module with the parameters of the loss.
    """

    def __init__(self, data: Data, context: ProcessContext):
        self.data, self.config, self.context = data, data.config, context
        self.net = self.build_net().to(data.device)
        if self.config.norm == "sync":
            self.net = synchronised(self.net, context, data.device)
        self.forward = torch.compile(self.net) if self.config.compile else self.net
        self.loss = build_loss(self.config, data.device, context)

    def build_net(self) -> Net:
        """Build the network with its initial weights."""
        return build(self.config)

    def embed(self, part: tuple) -> tuple[Tensor, Tensor]:
        """Map a micro-batch of uint8 views (n, C, H, W) to two embeddings (n, 128) in one pass."""
        device = self.data.device
        views = torch.cat([x.to(device, non_blocking=True) for x in part])
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


def build_loss(config: Config, device: torch.device, context: ProcessContext) -> nn.Module:
    """Build the loss and try it on random embeddings, so bad settings fail before any write.

    Args:
        config: its settings.
        device: device of the embeddings.
        context: the ranks.

    Raises:
        RunError: the loss cannot be used with these settings.
    """
    temperature, limits = config.temperature, {}
    if config.learn_temperature:
        temperature = nn.Parameter(torch.tensor(config.temperature, device=device))
        limits = {"temperature_range": (0.01, 100.0)}
    elif config.temperature_schedule != "constant":
        temperature = torch.tensor(config.temperature, device=device)  # one program for every value
    generator = torch.Generator().manual_seed(0)
    try:
        loss = FusedAlphaCLLoss(
            config.objective,
            temperature=temperature,
            negatives=config.negatives,
            backend=config.backend,
            process_group="world" if context.size > 1 else None,
            **limits,
            **config.option,
        ).to(device)
        z = torch.randn(2, min(config.batch_size, TRIAL_PAIRS), 128, generator=generator)
        loss(*z.to(device, DTYPES[config.amp]).requires_grad_().unbind()).backward()
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
