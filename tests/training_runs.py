"""Training runs in tests: what they wrote, and runs on several ranks."""

import json

import torch
from ranks import forked

from alphacl_fast.train import train


def rows(out):
    """The rows of a run's log."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def state_of(out):
    """A run's checkpoint."""
    return torch.load(out / "checkpoint.pt", weights_only=True)


def train_on_ranks(count, config, out):
    """Trains in forks of this process, which form a group."""
    forked(count, _train, config, out)


def _train(config, out):
    train(config, out)  # its outcome stays in the process
