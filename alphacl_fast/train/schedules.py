"""Learning rate and temperature of a step, as functions of the settings and the step alone."""

import math

from .config import Config


def learning_rate(config: Config, step: int, per_epoch: int) -> float:
    """Compute the learning rate of ``step`` (from 0): linear warm-up, then the schedule."""
    warmup, total = config.warmup_epochs * per_epoch, config.epochs * per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def temperature(config: Config, step: int, per_epoch: int) -> float:
    """Compute the temperature of ``step`` (from 0).

    With a period, it swings between both ends: the cosine follows Kukleva et al., "Temperature
    Schedules for Self-Supervised Contrastive Methods on Long-Tail Data", ICLR 2023,
    arXiv:2303.13664. Without one, the last step has --temperature-end.
    """
    if config.temperature_schedule == "constant":
        return config.temperature
    if config.temperature_period:
        turn = step / (config.temperature_period * per_epoch) % 1  # 0 … 1: there and back
        way = 2 * min(turn, 1 - turn)
    else:
        way = step / max(1, config.epochs * per_epoch - 1)
    if config.temperature_schedule == "cosine":
        way = 0.5 * (1 - math.cos(math.pi * way))
    return config.temperature + (config.temperature_end - config.temperature) * way


def depends_on_epochs(config: Config, step: int, per_epoch: int) -> bool:
    """Whether the first ``step`` steps would have been others with more epochs."""
    decays = config.schedule != "constant" and step > config.warmup_epochs * per_epoch
    cools = config.temperature_schedule != "constant" and not config.temperature_period
    return decays or (cools and step > 0)
